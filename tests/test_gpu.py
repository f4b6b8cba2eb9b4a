"""Training on a real GPU. What needs none runs on a CPU, too."""

import numpy as np
import pytest
import torch
from matryoshka.train import train_imagenet
from small_steps import SmallStep
from training_commands import options

from matryoshka.checkpoint import load_model
from matryoshka.data import Loader, RandomResizedCrop
from matryoshka.nested import nested_cross_entropy
from matryoshka.training.options import OPTIMIZERS
from matryoshka.training.snapshot import Snapshots, read

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ANY = [pytest.param(CPU, id="cpu")]
ANY.append(pytest.param(torch.device("cuda", 0), id="cuda", marks=needs_gpu))
ON_GPU = [ANY[1]]
# Several runs: on a CPU other tests have them in the default run.
RUNS = [pytest.param(CPU, id="cpu", marks=pytest.mark.slow), ANY[1]]
MIXING = {"random_erasing": 0.3, "mixup": 0.2, "cutmix": 1.0}


def losses_of(step: SmallStep, count: int) -> list[float]:
    reports = []
    for _ in range(count):
        reports += step()
    return [report.loss for report in reports + step.guard.finish()]


# ---------------------------------------------------------------- steps


@pytest.mark.parametrize("device", ON_GPU)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", [name for name in OPTIMIZERS if name != "adan"])
def test_a_step_does_not_wait(device, optimizer, precision):
    step = SmallStep(device, optimizer, precision=precision, ema=True, data=MIXING)
    losses_of(step, 3)  # constants, workspaces, the state of the optimizer
    torch.cuda.set_sync_debug_mode("error")
    try:
        reports = [step(), step(), step()]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [len(arrived) for arrived in reports] == [0, 0, 1], "reports come two steps late"


@pytest.mark.parametrize("device", ANY)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_batch_without_a_finite_loss_changes_nothing(device, optimizer):
    """Bit by bit: weights, running statistics, momentum, counters of steps; the average is finite
    though the batch was the last one before it was updated.
    """
    factor = torch.ones((), device=device)

    def loss(logits, labels, weights, label_smoothing):
        total, per_prefix = nested_cross_entropy(logits * factor, labels, weights, label_smoothing)
        return total, per_prefix

    step = SmallStep(device, optimizer, precision="fp32", ema=True, loss=loss)
    # The forward pass itself, too: batch norm's statistics become NaN.
    first = next(m for m in step.model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    first.register_forward_pre_hook(lambda module, inputs: (inputs[0] * factor,))
    losses_of(step, 2)

    def everything():
        tensors = step.state.tensors(step.state.sums.totals)
        return {
            name: value.clone()
            for name, value in tensors.items()
            if not name.startswith(("ema.", "rng")) and "num_batches" not in name
        }

    before = everything()
    factor.fill_(float("nan"))
    skips = [report.consecutive_skips for report in step() + step.guard.finish()]
    assert skips == [1]
    after = everything()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert before.keys() == after.keys()
    averages = step.state.ema.module.state_dict()
    assert all(torch.isfinite(value).all() for value in averages.values())
    factor.fill_(1.0)
    assert np.isfinite(losses_of(step, 2)).all()


@pytest.mark.parametrize("device", ON_GPU)
@pytest.mark.parametrize("how", ["1", "graphs"])
@pytest.mark.parametrize(("dims", "shared"), [((8,), False), ((4, 8), False), ((4, 8), True)])
def test_compiled_steps_are_those_of_eager_ones(device, how, dims, shared):
    """A fixed feature, MRL and MRL-E, with the average and two passes per step."""
    shape = {"dims": dims, "shared": shared, "precision": "fp32", "ema": True, "part": 4}
    eager = SmallStep(device, "sgd", **shape)
    compiled = SmallStep(device, "sgd", **shape, how=how)
    want, got = losses_of(eager, 6), losses_of(compiled, 6)
    # Kernels that add in another order, over six steps.
    np.testing.assert_allclose(got, want, rtol=2e-3)
    for one, other in zip(
        eager.state.ema.module.parameters(), compiled.state.ema.module.parameters(), strict=True
    ):
        torch.testing.assert_close(other, one, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("device", ON_GPU)
def test_graphs_survive_an_odd_batch_and_skip_a_bad_one(device):
    step = SmallStep(device, "sgd", precision="fp32", how="graphs")
    losses_of(step, 4)
    whole = step.batch
    step.batch = type(whole)(whole.images[:7], whole.labels[:7], whole.index[:7])
    odd = losses_of(step, 1)
    step.batch = whole
    weights = [p.detach().clone() for p in step.model.parameters()]
    parameter = next(step.model.parameters())
    good = parameter.detach().clone()
    with torch.no_grad():
        parameter.fill_(float("nan"))
    assert [r.consecutive_skips for r in step() + step.guard.finish()] == [1]
    with torch.no_grad():
        parameter.copy_(good)
    assert all(torch.equal(a, b) for a, b in zip(weights, step.model.parameters(), strict=True))
    assert np.isfinite([*odd, *losses_of(step, 3)]).all()


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize("device", ANY)
def test_a_snapshot_holds_the_step_at_which_it_was_taken(device, tmp_path):
    """Further steps change all tensors while the snapshot is copied and written."""
    step = SmallStep(device, "adamw", precision="fp32", ema=True)
    losses_of(step, 1)
    snapshots = Snapshots(tmp_path, {"config": {}, "global_batch": 8}, keep_last=1)
    tensors = step.state.tensors(step.state.sums.totals)
    want = {name: value.detach().cpu().clone() for name, value in tensors.items()}
    snapshots.save(1, tensors, step.state.loop.to_json())
    losses_of(step, 3)
    snapshots.wait()
    assert snapshots.problems() == []
    found = read(tmp_path / "step_1.safetensors").tensors
    assert found.keys() == want.keys()
    assert [name for name in want if not torch.equal(found[name], want[name])] == []


@pytest.mark.parametrize("device", RUNS)
def test_a_deterministic_run_resumes_bit_by_bit(device, digits, tmp_path):
    more = ["--training.deterministic=1", f"--training.device={device.type}", "--training.ema=0.9"]
    whole = [*options(digits, tmp_path, "whole", *more), "--training.epochs=2"]
    assert train_imagenet.main(whole) == 0
    stopped = [*options(digits, tmp_path, "parts", *more), "--training.epochs=2"]
    assert train_imagenet.main(stopped) == 0
    # As if it had been killed after the first epoch: the rest is done again.
    folder = tmp_path / "parts"
    steps = sorted(folder.glob("checkpoints/step_*"), key=lambda path: int(path.stem[5:]))
    assert len(steps) >= 2
    (folder / "model.safetensors").unlink()
    resumed = [*stopped, f"--training.resume={steps[-2]}"]
    assert train_imagenet.main(resumed) == 0
    for name in ("model.safetensors", "model_ema.safetensors"):
        want = load_model(tmp_path / "whole" / name).state_dict()
        got = load_model(folder / name).state_dict()
        assert [key for key in want if not torch.equal(want[key], got[key])] == []


@pytest.mark.parametrize("device", ON_GPU)
def test_batches_on_the_gpu_are_those_of_the_host(device, digits):
    crop = RandomResizedCrop(32)
    both = [Loader(digits["train"], 64, crop=crop, seed=3, device=d) for d in (CPU, device)]
    for host, gpu in zip(*both, strict=True):
        assert gpu.images.device == device
        assert torch.equal(gpu.images.cpu(), host.images)
        assert torch.equal(gpu.labels.cpu(), host.labels)
