"""Functions around a training step: parts of a batch, sums, gradients, any method's checkpoints."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from matryoshka import checkpoint
from matryoshka.data.loader import Batch
from matryoshka.distributed import World
from matryoshka.models import ModelSpec, build
from matryoshka.training import snapshot
from matryoshka.training.guard import NonFiniteGuard
from matryoshka.training.snapshot import Snapshots
from matryoshka.training.state import TrainState
from matryoshka.training.step import (
    StepError,
    apply_gradients,
    begin_step,
    check_whole_batch,
    gradient_sync,
    micro_batches,
)
from matryoshka.training.sums import Sums

CPU = torch.device("cpu")
ALONE = World(CPU)


def batch_of(count):
    images = torch.zeros(count, 2, 2, 3, dtype=torch.uint8)
    return Batch(images, torch.arange(count), torch.arange(count))


class Loader(SimpleNamespace):
    """The part of a loader that a training state uses."""

    def state_dict(self):
        return {"epoch": self.epoch}

    def load_state_dict(self, state):
        self.epoch = state["epoch"]


def state_of(model, lr=0.1, **more):
    return TrainState(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9),
        loader=Loader(epoch=0, batch_size=4),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        sums=Sums({"loss": (), "prefix_loss": (2,)}, CPU),
        **{"metadata": {}, **more},
    )


# ---------------------------------------------------------------- parts of a batch


@pytest.mark.parametrize(("size", "lengths"), [(3, [3, 3, 1]), (7, [7]), (100, [7])])
def test_micro_batches_cover_the_batch_once(size, lengths):
    parts = list(micro_batches(batch_of(7), size, world=World(CPU, 0, 2), global_batch=14))
    assert [len(part) for part in parts] == lengths
    assert torch.cat([part.labels for part in parts]).tolist() == list(range(7))
    weights = [part.loss_weight for part in parts]
    assert weights == pytest.approx([n * 2 / 14 for n in lengths]), f"loss weights {weights}"
    assert [part.sync for part in parts] == [False] * (len(parts) - 1) + [True]
    single = list(micro_batches(batch_of(7), size, world=ALONE, global_batch=7))
    assert all(part.sync for part in single), "one process has nothing to delay"


def test_gradients_are_synchronised_with_the_last_part_only():
    calls = []

    class Parallel(nn.Module):
        def no_sync(self):
            calls.append("no_sync")
            return torch.no_grad()

    for sync in (False, True):
        with gradient_sync(Parallel(), sync):
            pass
    assert calls == ["no_sync"]


def test_a_loss_of_the_whole_batch_refuses_accumulation():
    two = World(CPU, 0, 2)
    check_whole_batch("info_nce", 50, world=two, global_batch=99)
    with pytest.raises(StepError, match=r"^training\.batch_size=49: info_nce .* expected 50 or"):
        check_whole_batch("info_nce", 49, world=two, global_batch=99)


def test_a_step_is_a_function_of_seed_step_and_rank():
    state = state_of(nn.Linear(2, 2))
    drawn = {}
    for seed, step, rank in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)):
        state.loop.step = step
        rng = begin_step(state, seed=seed, rank=rank)
        numbers = (rng.random(), torch.rand(()).item())
        assert drawn.setdefault((seed, step, rank), numbers) == numbers
    assert len(set(drawn.values())) == 4, "each has its own stream"


# ---------------------------------------------------------------- sums


def test_sums_are_means_over_the_images_that_counted():
    rng = np.random.default_rng(0)
    sums = Sums({"loss": (), "prefix_loss": (2,)}, CPU, torch.float64)
    kept, images = [], 0
    for step in range(6):
        parts = [(int(rng.integers(1, 9)), rng.random(3)) for _ in range(1 + step % 2)]
        for n, means in parts:
            loss, prefix_loss = torch.tensor(means[0]), torch.from_numpy(means[1:])
            sums.add(images=n, loss=loss, prefix_loss=prefix_loss)
        total = sum(n for n, _ in parts)
        want = sum(n * means for n, means in parts) / total
        np.testing.assert_allclose(sums.step_mean("loss"), want[0], rtol=1e-12)
        np.testing.assert_allclose(sums.step_mean("prefix_loss"), want[1:], rtol=1e-12)
        skipped = step == 3
        sums.end_step(torch.tensor(skipped))
        if not skipped:
            kept += parts
            images += total
    means = sums.means(sums.totals)
    want = sum(n * means for n, means in kept) / images
    assert means["images"] == images, "skipped steps must not count"
    np.testing.assert_allclose(means["loss"], want[0], rtol=1e-12)
    np.testing.assert_allclose(means["prefix_loss"], want[1:], rtol=1e-12)
    assert isinstance(means["loss"], float)

    # [loss, per prefix ..., images]: the layout of `totals` in checkpoints
    np.testing.assert_allclose(sums.totals, [*(want * images), images], rtol=1e-12)
    sums.reset()
    assert sums.means(sums.totals) == {"images": 0, "loss": 0, "prefix_loss": [0, 0]}


def test_sums_of_other_ranks_are_kept_once():
    totals = torch.tensor([[1.0, 2, 3, 4], [10, 20, 30, 40]])
    sums = Sums({"loss": (), "prefix_loss": (2,)}, CPU)
    for rank in range(2):
        sums.restore(totals, rank=rank, ranks=2)
        assert torch.equal(sums.totals, totals[rank])
    for ranks in (1, 3):
        restored = torch.zeros(4)
        for rank in range(ranks):
            sums.restore(totals, rank=rank, ranks=ranks)
            restored += sums.totals
        assert torch.equal(restored, totals.sum(0)), f"{ranks} ranks"


# ---------------------------------------------------------------- gradients


def test_gradients_are_applied_once_at_the_rate():
    torch.manual_seed(0)
    model, reference = nn.Linear(3, 2), nn.Linear(3, 2)
    reference.load_state_dict(model.state_dict())
    state = state_of(model, lr=123.0)
    guard = NonFiniteGuard(model, CPU)
    other = torch.optim.SGD(reference.parameters(), lr=0.05, momentum=0.9)
    x = torch.randn(4, 3)
    for bad in (False, True, False):
        begin_step(state, seed=0, rank=0)
        loss = model(x).square().mean() * (float("nan") if bad else 1)
        state.backward(loss)
        state.sums.add(images=4, loss=loss, prefix_loss=torch.zeros(2))
        norm, skipped = apply_gradients(state, guard, 0.05)
        assert bool(skipped) == bad, f"gradient norm {norm.item()}"
        if not bad:
            other.zero_grad()
            reference(x).square().mean().backward()
            other.step()
    torch.testing.assert_close(model.weight, reference.weight)
    assert state.sums.totals[-1] == 8, "images of the two steps that counted"


# ---------------------------------------------------------------- checkpoints


class Method(nn.Module):
    """Like a self-supervised method: an encoder beside a target network and a queue."""

    def __init__(self):
        super().__init__()
        self.online = build(ModelSpec("resnet10", 3, (8, 16)))
        self.target = nn.Linear(4, 4).requires_grad_(False)
        self.register_buffer("queue", torch.randn(5, 4))


def test_a_checkpoint_names_its_encoder(tmp_path):
    torch.manual_seed(0)
    method = Method()
    metadata = checkpoint.describe(method.online)
    state = state_of(method, metadata=metadata, encoder="online.")
    assert state.metadata["encoder"] == "model.online."
    snapshots = Snapshots(tmp_path, state.metadata, keep_last=1)
    snapshots.save(0, state.tensors(state.sums.totals[None]), state.values())
    snapshots.wait()
    assert snapshots.problems() == []

    images = torch.randn(2, 3, 32, 32)
    opened = checkpoint.load_model(tmp_path / "last.safetensors")
    assert torch.equal(opened(images), method.online.eval()(images))
    assert opened.spec == method.online.spec

    # Everything that the method carries comes back.
    saved = snapshot.read(tmp_path / "last.safetensors")
    other = state_of(Method(), metadata=metadata, encoder="online.")
    other.restore(saved.tensors, saved.metadata["progress"])
    for name, value in method.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name


@pytest.mark.parametrize("encoder", [None, 7, "elsewhere."])
def test_an_encoder_that_is_not_there_is_one_line(tmp_path, encoder):
    model = build(ModelSpec("resnet10", 3, (8, 16)))
    state = state_of(model, metadata=checkpoint.describe(model))
    snapshots = Snapshots(tmp_path, {**state.metadata, "encoder": encoder}, keep_last=1)
    snapshots.save(0, state.tensors(state.sums.totals[None]), state.values())
    snapshots.wait()
    with pytest.raises(checkpoint.CheckpointError, match=r"last\.safetensors") as error:
        checkpoint.load_model(tmp_path / "last.safetensors")
    assert "\n" not in str(error.value)


def test_older_checkpoints_hold_a_classifier(tmp_path):
    """Written before metadata had the key `encoder`."""
    model = build(ModelSpec("resnet10", 3, (8, 16)))
    state = state_of(model, metadata=checkpoint.describe(model))
    metadata = {key: value for key, value in state.metadata.items() if key != "encoder"}
    snapshots = Snapshots(tmp_path, metadata, keep_last=1)
    snapshots.save(0, state.tensors(state.sums.totals[None]), state.values())
    snapshots.wait()
    opened = checkpoint.load_model(tmp_path / "last.safetensors")
    assert torch.equal(opened.trunk.conv1.weight, model.trunk.conv1.weight)
