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
from matryoshka.training.optim import (
    OPTIMIZERS,
    LrConfig,
    OptimError,
    lr_at,
    make_optimizer,
    parameter_groups,
    peak_epoch,
)

CPU = torch.device("cpu")

# ---------------------------------------------------------------- schedules


@settings(max_examples=200, deadline=None)
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


ORACLES = {"sgd": sgd, "adamw": adamw, "lars": lars}


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
    assert different(base, after(lr=0.02)) == different(base, after(momentum=0.5)) == every
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


@pytest.mark.parametrize("name", ["sgd", "adamw"])
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


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_a_state_without_pickle_continues_the_run(name, momentum):
    def start(seed):
        model = small(torch.float32, seed)
        return model, make_optimizer(name, parameter_groups(model, 0.1, 0.0), 0.1, momentum, CPU)

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
        if name in ("sgd", "adamw")
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
        ("adam", 0.9, "training.optimizer"),
        ("adamw", 1.0, "training.momentum=1.0"),
    ):
        with pytest.raises(OptimError, match=word):
            make_optimizer(name, groups, 0.1, momentum, CPU)
    monkeypatch.setitem(sys.modules, "timm.optim", None)
    for name in ("lars", "muon"):
        with pytest.raises(
            OptimError, match=rf"^training.optimizer={name} needs timm .*: pip install timm$"
        ) as caught:
            make_optimizer(name, groups, 0.1, 0.9, CPU)
        assert caught.value.user_error
    for name in ("sgd", "adamw"):  # they do without
        make_optimizer(name, groups, 0.1, 0.9, CPU)
    assert "timm" not in vars(optim)
