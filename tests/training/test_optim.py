"""Schedules against formulas, optimizers against their published update rules in NumPy."""

import json
import math
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn

from matryoshka import config
from matryoshka.nested import NestedLinear
from matryoshka.training import optim
from matryoshka.training.muon import MuonRules
from matryoshka.training.optim import (
    OPTIMIZERS,
    LrConfig,
    OptimError,
    configured_optimizer,
    lr_at,
    make_optimizer,
    parameter_groups,
    peak_epoch,
)
from matryoshka.training.options import TrainingConfig, adan_betas

CPU = torch.device("cpu")

# ---------------------------------------------------------------- schedules


@settings(max_examples=200)
@given(
    kind=st.sampled_from(["step", "constant", "cosine"]),
    epochs=st.integers(1, 60),
    warmup=st.floats(0, 20),
    length=st.integers(20, 40),
    ratio=st.floats(0, 1),
    place=st.floats(0, 1),
    peak=st.floats(0, 10),
)
def test_schedules_equal_the_formulas(*, kind, epochs, warmup, length, ratio, place, peak):
    options = LrConfig(
        lr_schedule_type=kind, warmup_epochs=warmup, step_ratio=ratio, step_length=length
    )
    end = warmup if warmup < epochs else (epochs - 1) // 2
    epoch = place * epochs
    if epoch < end:
        expected = peak * np.interp(epoch, [0, end], [1e-4, 1])
    elif kind == "cosine":
        expected = peak / 2 * (1 + math.cos(math.pi * (epoch - end) / (epochs - end)))
    else:
        expected = peak * (
            ratio ** sum(epoch >= k for k in range(length, 100, length)) if kind == "step" else 1
        )
    assert lr_at(epoch, options, peak, epochs) == pytest.approx(expected, abs=1e-9), (
        f"{kind}: rate at epoch {epoch} of {epochs}"
    )


@pytest.mark.parametrize("kind", ["step", "constant", "cosine"])
@pytest.mark.parametrize(
    ("warmup", "epochs"), [(5, 90), (0.5, 1), (2.25, 16), (30, 90), (7, 5), (3, 3), (1, 1)]
)
def test_the_warm_up_is_continuous_and_reaches_the_peak(kind, warmup, epochs):
    options = LrConfig(lr_schedule_type=kind, warmup_epochs=warmup)
    end = peak_epoch(options, epochs)
    assert end == (warmup if warmup < epochs else (epochs - 1) // 2), "epoch of the peak"
    if end < options.step_length or kind != "step":
        assert lr_at(end, options, 2.0, epochs) == 2.0
    ramp = [lr_at(end * k / 100, options, 2.0, epochs) for k in range(100)] if end else []
    assert all(0 < b - a < 0.021 for a, b in pairwise(ramp)), f"not an even ramp: {ramp}"
    assert not end or (
        ramp[0] == pytest.approx(2e-4) and lr_at(end - 1e-9, options, 2.0, epochs) > 2 - 1e-6
    ), "warm-up from 1e-4 of the peak rate up to the peak"


def test_cosine_ends_at_zero_and_stays_there():
    cosine = LrConfig(lr_schedule_type="cosine", warmup_epochs=2)
    rates = [lr_at(e / 7, cosine, 1.5, 20) for e in range(14, 142)]
    assert rates[0] == 1.5
    assert all(a > b for a, b in pairwise(rates[:127])), f"does not fall: {rates}"
    assert rates[126] == lr_at(20.5, cosine, 1.5, 20) == 0


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"lr": -1.5}, ["lr.lr=-1.5"]),
        ({"lr_per_256": -0.5}, ["lr.lr_per_256=-0.5"]),
        ({"lr_peak_epoch": -1}, ["lr.lr_peak_epoch=-1"]),
        ({"warmup_epochs": -0.5, "lr_schedule_type": "step"}, ["lr.warmup_epochs=-0.5"]),
        ({"step_ratio": -0.1}, ["lr.step_ratio=-0.1"]),
        ({"step_length": 0}, ["lr.step_length=0"]),
        (
            {"warmup_epochs": 5.0},
            ["lr.warmup_epochs=5.0", "lr.lr_schedule_type=cyclic", "lr.lr_peak_epoch"],
        ),
        (
            {"warmup_epochs": 31.0, "lr_schedule_type": "step"},
            ["lr.warmup_epochs=31.0", "lr.step_length=30"],
        ),
    ],
)
def test_a_wrong_rate_is_named(wrong, words):
    with pytest.raises(ValueError, match=r"expected|give|fall") as caught:
        LrConfig(**wrong)
    for reading in (
        str(caught.value),
        refusal([f"--lr.{name}={value}" for name, value in wrong.items()]),
    ):
        assert all(word in reading for word in words)


def refusal(argv):
    with pytest.raises(config.ConfigError) as caught:
        config.read({"lr": LrConfig}, argv)
    return str(caught.value)


def test_the_options_are_read():
    read = config.read({"lr": LrConfig}, ["--lr.lr_schedule_type=cosine", "--lr.warmup_epochs=2.5"])
    assert read.lr == LrConfig(lr_schedule_type="cosine", warmup_epochs=2.5)
    assert "cosine" in refusal(["--lr.lr_schedule_type=cosin"])


# ---------------------------------------------------------------- optimizers


class Small(nn.Module):
    """Each kind of parameter: kernel, norm layer, hidden matrix with bias, two classifiers."""

    def __init__(self):
        super().__init__()
        self.head = NestedLinear((4, 12), 9)
        self.conv = nn.Conv2d(5, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.hidden = nn.Linear(8, 12)


def small(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    model = Small().to(dtype)
    model.norm.weight.data.uniform_(0.5, 1.5)
    return model.to(memory_format=torch.channels_last)


def gradients(model, step):
    rng = np.random.default_rng(step)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter).copy_(
            torch.from_numpy(rng.normal(size=parameter.shape))
        )


def run(model, optimizer, steps, lr=0.01):
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = lr / (step + 1)  # as the loop does
        gradients(model, step)
        optimizer.step()


def values(model):
    return {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}


def sgd(w, g, state, *, step, lr, decay, momentum, adapted):
    g = g + decay * w
    state["m"] = g if step == 0 else momentum * state["m"] + g
    return w - lr * state["m"]


def adamw(w, g, state, *, step, lr, decay, momentum, adapted):
    state["m"] = momentum * state.get("m", 0) + (1 - momentum) * g
    state["v"] = 0.999 * state.get("v", 0) + 0.001 * g**2
    mean, square = state["m"] / (1 - momentum ** (step + 1)), state["v"] / (1 - 0.999 ** (step + 1))
    return w - lr * decay * w - lr * mean / (np.sqrt(square) + 1e-8)


def lars(w, g, state, *, step, lr, decay, momentum, adapted):
    if adapted:
        w_norm, g_norm = math.sqrt((w**2).sum()), math.sqrt((g**2).sum())
        ratio = (
            0.001 * w_norm / (g_norm + decay * w_norm) if w_norm else 1
        )  # the bias of a norm layer begins at 0
        g = ratio * (g + decay * w)
    state["m"] = g if step == 0 else momentum * state["m"] + g
    return w - lr * state["m"]


def adam(w, g, state, *, step, lr, decay, momentum, adapted):
    return adamw(
        w, g + decay * w, state, step=step, lr=lr, decay=0, momentum=momentum, adapted=adapted
    )


def adan(w, g, state, *, step, lr, decay, momentum, adapted, betas=(0.02, 0.08, 0.01)):
    """Algorithm 1 of arXiv 2208.06677, with the bias corrections of the authors' code.

    Its betas are the weights of the new gradient; the difference of gradients is 0 at first.
    """
    b1, b2, b3 = betas
    difference = g - state.get("g", g)
    state["m"] = (1 - b1) * state.get("m", 0) + b1 * g
    state["v"] = (1 - b2) * state.get("v", 0) + b2 * difference
    state["n"] = (1 - b3) * state.get("n", 0) + b3 * (g + (1 - b2) * difference) ** 2
    state["g"] = g
    corrected = []
    for key, beta in (("m", b1), ("v", b2), ("n", b3)):
        corrected.append(state[key] / (1 - (1 - beta) ** (step + 1)))
    m, v, n = corrected
    return (w - lr / (np.sqrt(n) + 1e-8) * (m + (1 - b2) * v)) / (1 + lr * decay)


ORACLES = {"sgd": sgd, "adam": adam, "adamw": adamw, "adan": adan, "lars": lars}


def expected(name, decay, norm_decay, momentum, *, steps=6, lr=0.01):
    model, states = small(), {}
    now = values(model)
    for step in range(steps):
        gradients(model, step)
        for key, parameter in model.named_parameters():
            own = norm_decay if key.startswith("norm") else decay
            adapted = own != 0 or not key.startswith("norm")
            state = states.setdefault(key, {})
            now[key] = ORACLES[name](
                now[key],
                parameter.grad.numpy(),
                state,
                step=step,
                lr=lr / (step + 1),
                decay=own,
                momentum=momentum,
                adapted=adapted,
            )
    return now


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize(
    ("decay", "norm_decay", "momentum"), [(0.1, 0, 0.9), (0, 0, 0), (0.02, 0.3, 0.5)]
)
def test_updates_equal_the_formula(name, decay, norm_decay, momentum):
    model = small()
    optimizer = make_optimizer(name, parameter_groups(model, decay, norm_decay), 0.7, momentum, CPU)
    run(model, optimizer, range(6))
    want = expected(name, decay, norm_decay, momentum)
    for key, value in values(model).items():
        np.testing.assert_allclose(value, want[key], rtol=0, atol=1e-9, err_msg=key)


@pytest.mark.parametrize("flags", [(0.02, 0.08, 0.01), (0.035, 0.11, 0.015), (0.5, 0.25, 0.75)])
def test_the_betas_of_adan_in_both_conventions(flags):
    """The seed's flags, converted, give the algorithm that the paper writes with these numbers."""
    model, states = small(), {}
    betas = adan_betas(*flags)
    assert betas == pytest.approx([1 - beta for beta in flags], abs=1e-12)
    optimizer = make_optimizer(
        "adan", parameter_groups(model, 0.1, 0.2), 0.01, 0.9, CPU, betas=betas
    )
    now = values(model)
    for step in range(5):
        run(model, optimizer, [step])
        for key, parameter in model.named_parameters():
            now[key] = adan(
                now[key],
                parameter.grad.numpy(),
                states.setdefault(key, {}),
                step=step,
                lr=0.01 / (step + 1),
                decay=0.2 if key.startswith("norm") else 0.1,
                momentum=None,
                adapted=None,
                betas=flags,
            )
    for key, value in values(model).items():
        np.testing.assert_allclose(value, now[key], rtol=0, atol=1e-9, err_msg=key)


def test_the_converted_betas_read_as_they_would_be_typed():
    assert adan_betas(0.02, 0.08, 0.01) == (0.98, 0.92, 0.99)
    for wrong in (0, -0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=f"^adan_beta2={wrong}: expected"):
            adan_betas(0.02, wrong, 0.01)


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_betas_stand_for_the_momentum_and_its_second_beta(name):
    ours, theirs = small(), small()
    groups = parameter_groups(ours, 0.1, 0.1)
    optimizer = make_optimizer(name, groups, 0.01, 0.3, CPU, betas=(0.5, 0.9))
    kind = torch.optim.Adam if name == "adam" else torch.optim.AdamW
    reference = kind(theirs.parameters(), lr=0.01, betas=(0.5, 0.9), weight_decay=0.1)
    run(ours, optimizer, range(4))
    run(theirs, reference, range(4))
    for key, value in values(theirs).items():
        np.testing.assert_allclose(values(ours)[key], value, rtol=0, atol=1e-12, err_msg=key)


def test_nesterov_equals_the_formula():
    model = small()
    now, buffers = values(model), {}
    optimizer = make_optimizer(
        "sgd", parameter_groups(model, 0.1, 0.0), 0.01, 0.9, CPU, nesterov=True
    )
    for step in range(4):
        run(model, optimizer, [step])
        for key, parameter in model.named_parameters():
            g = parameter.grad.numpy() + (0 if key.startswith("norm") else 0.1) * now[key]
            buffers[key] = 0.9 * buffers.get(key, 0) + g
            now[key] = now[key] - 0.01 / (step + 1) * (g + 0.9 * buffers[key])
    for key, value in values(model).items():
        np.testing.assert_allclose(value, now[key], rtol=0, atol=1e-9, err_msg=key)


def newton_schulz(matrix, steps, a=3.4445, b=-4.7750, c=2.0315):
    """Jordan et al. 2024, with the coefficients of their text."""
    x = matrix / np.linalg.norm(matrix)
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    for _ in range(steps):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if tall else x


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("steps", [3, 5])
def test_filters_of_a_fixed_norm_and_sgd_for_the_rest(steps, nesterov):
    """As airbench94_muon does; its momentum is a sum, whose direction is the mean's."""
    model = small(torch.float32)
    rules = MuonRules(steps, scale="filters", rest="sgd", rest_lr=0.25, rest_momentum=0.8)
    optimizer = make_optimizer(
        "muon", parameter_groups(model, 0.01, 0.02), 0.1, 0.6, CPU, nesterov=nesterov, muon=rules
    )
    now, buffers = {key: v.astype(np.float64) for key, v in values(model).items()}, {}
    for step in range(4):
        run(model, optimizer, [step], lr=0.1)
        lr = 0.1 / (step + 1)
        for key, parameter in model.named_parameters():
            g, w = parameter.grad.numpy().astype(np.float64), now[key]
            if key == "conv.weight":
                buffers[key] = 0.6 * buffers.get(key, 0) + g
                direction = g + 0.6 * buffers[key] if nesterov else buffers[key]
                matrix = newton_schulz(direction.reshape(8, 45), steps).reshape(w.shape)
                w = w * 8**0.5 / np.linalg.norm(w)
                now[key] = (1 - lr * 0.01) * w - lr * matrix
            else:
                g = g + (0.02 if key.startswith("norm") else 0.01) * w
                buffers[key] = 0.8 * buffers.get(key, 0) + g
                move = g + 0.8 * buffers[key] if nesterov else buffers[key]
                now[key] = w - 0.25 * lr * move
    for key, value in values(model).items():
        np.testing.assert_allclose(value, now[key], rtol=0, atol=2e-5, err_msg=key)


def test_muon_with_sgd_takes_the_same_kernels_as_with_adamw():
    """And the same steps of them, where their scale is AdamW's."""
    after = []
    for rest in ("adamw", "sgd"):
        model = small(torch.float32)
        optimizer = make_optimizer(
            "muon", parameter_groups(model, 0.1, 0), 0.1, 0.9, CPU, muon=MuonRules(rest=rest)
        )
        run(model, optimizer, range(3))
        after.append(values(model))
    same = {key for key in after[0] if np.array_equal(after[0][key], after[1][key])}
    assert same == {"conv.weight", "hidden.weight"}


@pytest.mark.parametrize("rest", ["adamw", "sgd"])
def test_the_rest_has_a_rate_of_its_own(rest):
    after = []
    for lr, rest_lr in ((0.02, 0.5), (0.01, 1.0)):
        model = small(torch.float32)
        rules = MuonRules(rest=rest, rest_lr=rest_lr)
        optimizer = make_optimizer("muon", parameter_groups(model, 0, 0), 0.1, 0.9, CPU, muon=rules)
        run(model, optimizer, range(3), lr=lr)
        after.append(values(model))
    for key in after[0]:
        is_kernel = key in ("conv.weight", "hidden.weight")
        assert np.allclose(after[0][key], after[1][key], rtol=0, atol=1e-7) != is_kernel, key


@pytest.mark.parametrize("decay", [0, 0.5])
def test_muon_steps_are_orthogonal_and_all_else_follows_adamw(decay):
    model = small()
    before = values(model)
    optimizer = make_optimizer("muon", parameter_groups(model, decay, 0.25), 0.7, 0.9, CPU)
    run(model, optimizer, range(1), lr=0.02)
    for key in ("conv.weight", "hidden.weight"):
        weight = values(model)[key]
        rows, columns = matrix = (weight.shape[0], weight[0].size)
        step = ((1 - 0.02 * decay) * before[key] - weight).reshape(matrix) / (
            0.02 * 0.2 * max(rows, columns) ** 0.5
        )
        assert np.abs(np.linalg.svd(step, compute_uv=False) - 1).max() < 0.35, key
    run(model, optimizer, range(1, 6), lr=0.02)
    want = expected("adamw", decay, 0.25, 0.9, lr=0.02)
    others = [key for key in before if key not in ("conv.weight", "hidden.weight")]
    assert len(others) == 7, list(others)  # of the norm layer, the hidden bias, the classifiers
    for key in others:
        np.testing.assert_allclose(values(model)[key], want[key], rtol=0, atol=1e-9, err_msg=key)


def test_muon_on_a_cpu_leaves_timm_as_it_was():
    import timm.optim

    before = timm.optim.muon.zeropower_via_newtonschulz
    model = small(torch.float32)
    optimizer = make_optimizer("muon", parameter_groups(model, 0, 0), 0.1, 0.9, CPU)
    dtypes = []

    def watch(g, *args, dtype=torch.bfloat16, **kwargs):
        dtypes.append(dtype)
        return before(g, *args, dtype=dtype, **kwargs)

    timm.optim.muon.zeropower_via_newtonschulz = watch
    try:
        run(model, optimizer, range(2))
        assert timm.optim.muon.zeropower_via_newtonschulz is watch
    finally:
        timm.optim.muon.zeropower_via_newtonschulz = before
    assert dtypes == [torch.float32] * 4


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_option_changes_the_result(name):
    def after(lr=0.01, decay=0.1, norm_decay=0.0, momentum=0.9):
        model = small()
        optimizer = make_optimizer(
            name, parameter_groups(model, decay, norm_decay), 1.0, momentum, CPU
        )
        run(model, optimizer, range(3), lr)
        return values(model)

    def different(a, b):
        return {key for key in a if not np.array_equal(a[key], b[key])}

    base, every = after(), set(after())
    assert different(base, after()) == set()
    assert different(base, after(lr=0.02)) == every
    assert different(base, after(momentum=0.5)) == (set() if name == "adan" else every)
    norms = {"norm.weight", "norm.bias"}
    assert different(base, after(decay=0.2)) == every - norms
    assert different(base, after(norm_decay=0.2)) == norms
    frozen = after(lr=0)
    assert different(frozen, values(small())) == set()


def test_groups_by_type_with_the_classifiers_last():
    model = small()
    model.norm.bias.requires_grad_(False)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    norms, others = parameter_groups(model, 0.1, 0.2)
    assert [names[id(p)] for p in norms["params"]] == ["norm.weight"]
    assert (norms["weight_decay"], others["weight_decay"]) == (0.2, 0.1)
    shown = [names[id(p)] for p in others["params"]]
    assert shown[:3] == ["conv.weight", "hidden.weight", "hidden.bias"]
    assert others["classifiers"] == len(shown[3:]) == 4
    assert all(name.startswith("head.") for name in shown[3:])


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_any_fused_step_may_be_skipped(name, monkeypatch):
    """As a GradScaler does on CUDA; torch has fused kernels for a CPU, too."""
    monkeypatch.setattr(
        torch, "empty_like", lambda like, **how: torch.full_like(like, math.nan, **how)
    )
    models = [small(), small()]
    for model, skips in zip(models, (True, False), strict=True):
        optimizer = make_optimizer(name, parameter_groups(model, 0.1, 0.0), 0.1, 0.9, CPU)
        optimizer.grad_scale = None
        for group in optimizer.param_groups:
            group["fused"] = True
        for step in range(4):
            if skips:
                for parameter in model.parameters():
                    parameter.grad = torch.full_like(parameter, math.inf)
                optimizer.found_inf = torch.ones(())
                optimizer.step()
            optimizer.found_inf = torch.zeros(())
            run(model, optimizer, [step])
    skipping, plain = map(values, models)
    assert all(np.array_equal(skipping[key], plain[key]) for key in plain)
    for key, value in expected(name, 0.1, 0.0, 0.9, steps=4).items():
        np.testing.assert_allclose(plain[key], value, rtol=0, atol=1e-9, err_msg=key)


@pytest.mark.parametrize("name", [*OPTIMIZERS, "muon and sgd"])
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_a_state_without_pickle_continues_the_run(name, momentum):
    kind, _, rest = name.partition(" and ")
    muon = MuonRules(scale="filters", rest="sgd") if rest else None

    def start(seed):
        model = small(torch.float32, seed)
        groups = parameter_groups(model, 0.1, 0.0)
        return model, make_optimizer(kind, groups, 0.1, momentum, CPU, muon=muon)

    model, optimizer = start(0)
    run(model, optimizer, range(3))
    weights, state = model.state_dict(), optimizer.state_dict()
    tensors = {
        f"{k}.{key}": v
        for k, own in state["state"].items()
        for key, v in own.items()
        if torch.is_tensor(v)
    }
    rest = {
        k: {key: v for key, v in own.items() if not torch.is_tensor(v)}
        for k, own in state["state"].items()
    }
    assert all(isinstance(v, int | float) for own in rest.values() for v in own.values())
    stored = save({key: value.contiguous() for key, value in tensors.items()})
    text = json.dumps({"rest": rest, "groups": state["param_groups"]})

    again, resumed = start(1)
    again.load_state_dict(weights)
    read = json.loads(text)
    restored = {int(k): own for k, own in read["rest"].items()}
    for key, value in load(stored).items():
        k, what = key.split(".")
        restored[int(k)][what] = value
    groups = (
        [{**group, "fused": True} for group in read["groups"]]
        if name in ("sgd", "adam", "adamw")
        else read["groups"]
    )
    resumed.load_state_dict({"state": restored, "param_groups": groups})
    assert not any(
        group.get("fused") for group in resumed.param_groups
    )  # chosen by the device, not by the file
    for parameter, own in resumed.state.items():
        for value in own.values():
            assert (
                not torch.is_tensor(value)
                or value.ndim == 0
                or value.stride() == parameter.stride()
            )

    run(model, optimizer, range(3, 6))
    run(again, resumed, range(3, 6))
    for key, value in values(model).items():
        assert np.array_equal(value, values(again)[key]), key


def test_mistakes_are_one_line(monkeypatch):
    groups = parameter_groups(small(), 0, 0)
    for name, momentum, word in (
        ("adamax", 0.9, "training.optimizer"),
        ("adamw", 1.0, "training.momentum=1.0"),
        ("adam", 1.0, "training.momentum=1.0"),
    ):
        with pytest.raises(OptimError, match=word):
            make_optimizer(name, groups, 0.1, momentum, CPU)
    monkeypatch.setitem(sys.modules, "timm.optim", None)
    for name in ("adan", "lars", "muon"):
        with pytest.raises(
            OptimError, match=rf"^training.optimizer={name} needs timm .*: pip install timm$"
        ) as caught:
            make_optimizer(name, groups, 0.1, 0.9, CPU)
        assert caught.value.user_error
    for name in ("sgd", "adam", "adamw"):  # they do without
        make_optimizer(name, groups, 0.1, 0.9, CPU)
    assert "timm" not in vars(optim)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["optimizer=sgd", "betas=0.9,0.99"], ["betas=0.9,0.99", "leave it out"]),
        (["optimizer=muon", "muon_rest=sgd", "betas=0.9,0.99"], ["betas", "leave it out"]),
        (["optimizer=adan", "betas=0.9,0.99"], ["betas=0.9,0.99", "adan has 3"]),
        (["optimizer=adamw", "betas=0.9,0.99,0.9"], ["adamw has 2"]),
        (["optimizer=adamw", "betas=0.9,1"], ["training.betas", "less than 1"]),
        (["optimizer=adam", "betas=0.9,0.99", "momentum=0.8"], ["momentum=0.8", "first beta"]),
        (["optimizer=adan", "momentum=0.8"], ["momentum=0.8", "training.betas"]),
        (["optimizer=adam", "nesterov=1"], ["training.nesterov=1", "sgd or muon"]),
        (["nesterov=1", "momentum=0"], ["training.nesterov=1", "momentum"]),
        (["muon_steps=3"], ["training.muon_steps=3", "training.optimizer=muon", "sgd"]),
        (["optimizer=adamw", "muon_rest_lr=0.5"], ["training.muon_rest_lr=0.5"]),
        (["optimizer=muon", "muon_scale=filters"], ["training.muon_rest=sgd"]),
        (["optimizer=muon", "muon_rest_momentum=0.5"], ["training.muon_rest=sgd"]),
    ],
    ids=lambda given: given[-1] if "=" in given[-1] else "",
)
def test_an_option_without_a_use_is_refused(argv, words):
    with pytest.raises(config.ConfigError) as caught:
        config.read({"training": TrainingConfig}, [f"--training.{word}" for word in argv])
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_options_reach_the_optimizer():
    """Each option of the section against the same call in Python."""
    cases = (
        (TrainingConfig(optimizer="adan", betas=(0.9, 0.8, 0.7)), {"betas": (0.9, 0.8, 0.7)}),
        (TrainingConfig(optimizer="adam", betas=(0.5, 0.6)), {"betas": (0.5, 0.6)}),
        (TrainingConfig(nesterov=True), {"nesterov": True}),
        (TrainingConfig(optimizer="muon", muon_steps=2), {"muon": MuonRules(steps=2)}),
        (
            TrainingConfig(
                optimizer="muon",
                momentum=0.6,
                nesterov=True,
                muon_scale="filters",
                muon_rest="sgd",
                muon_rest_lr=0.2,
                muon_rest_momentum=0.85,
            ),
            {"nesterov": True, "muon": MuonRules(5, "filters", "sgd", 0.2, 0.85)},
        ),
    )
    for section, expected_options in cases:
        after = []
        for source in ("section", "call", "defaults"):
            model = small(torch.float32)
            groups = parameter_groups(model, 0.1, 0.0)
            if source == "section":
                optimizer = configured_optimizer(section, groups, 0.1, CPU)
            else:
                more = expected_options if source == "call" else {}
                optimizer = make_optimizer(
                    section.optimizer, groups, 0.1, section.momentum, CPU, **more
                )
            run(model, optimizer, range(3))
            after.append(values(model))
        by_section, by_call, by_default = after
        assert all(np.array_equal(by_section[key], by_call[key]) for key in by_call)
        assert any(not np.array_equal(by_section[key], by_default[key]) for key in by_call)
