"""data.on_error: a sample that cannot be decoded ends the run, or is left out and listed."""

import contextlib
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matryoshka.train import train_imagenet
from torchrun_starts import ROOT, torchrun
from training_commands import options, refused

from matryoshka.data import (
    BetonError,
    BetonFile,
    CenterCrop,
    Loader,
    RandomResizedCrop,
    ResidentLoader,
)
from matryoshka.data.augment import Preprocessing
from matryoshka.data.slots import Batch
from matryoshka.distributed import World
from matryoshka.nested import nested_cross_entropy
from matryoshka.training import supervised_step
from matryoshka.training.compiling import Forward
from matryoshka.training.guard import NonFiniteGuard
from matryoshka.training.options import DataConfig
from matryoshka.training.state import TrainState
from matryoshka.training.sums import Sums

BROKEN = (7, 130, 131, 399)


@pytest.fixture(scope="module")
def damaged(digits, tmp_path_factory):
    """The training digits with four samples that cannot be decoded."""
    data = BetonFile(digits["train"])
    content = bytearray(digits["train"].read_bytes())
    for i in BROKEN:
        start, size = int(data.offset[i]), int(data.size[i])
        content[start : start + size] = bytes(size)
    path = tmp_path_factory.mktemp("damaged") / "damaged.beton"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("make", [Loader, ResidentLoader])
@pytest.mark.parametrize("in_memory", [True, False])
def test_skipped_samples_leave_their_batch(damaged, digits, make, in_memory):
    options = {"order": "random", "crop": RandomResizedCrop(12), "seed": 1}
    good = list(make(digits["train"], 64, **options))
    results = []
    for workers, world in ((1, 1), (3, 1), (2, 3)):
        ranks = [
            make(
                damaged,
                64,
                on_error="skip",
                num_workers=workers,
                rank=r,
                world=world,
                in_memory=in_memory,
                **options,
            )
            for r in range(world)
        ]
        shares = [list(rank) for rank in ranks]
        batches = [
            tuple(torch.cat(parts) for parts in zip(*share, strict=True))
            for share in zip(*shares, strict=True)
        ]
        results.append((batches, sorted(s for rank in ranks for s in rank.skipped)))
    for batches, skipped in results:
        assert [s.index for s in skipped] == list(BROKEN)
        assert skipped == results[0][1]
        assert skipped[0].name == "sample 7"
        assert "JPEG" in skipped[0].reason
        for (images, labels, index), whole in zip(batches, good, strict=True):
            kept = ~np.isin(whole.index.numpy(), BROKEN)
            assert torch.equal(index, whole.index[kept])
            assert torch.equal(labels, whole.labels[kept])
            assert torch.equal(images, whole.images[kept])


def test_skipped_is_counted_when_a_batch_is_handed_out(damaged):
    loader = Loader(damaged, 5, order="sequential", crop=CenterCrop(8), on_error="skip", prefetch=4)
    iterator = iter(loader)
    next(iterator)
    assert loader.skipped == []  # batch 1, decoded ahead, holds sample 7
    assert len(next(iterator).labels) == 4, "the batch with a damaged sample"
    assert [s.index for s in loader.skipped] == [7]
    for _ in iterator:
        pass
    assert [s.index for s in loader.skipped] == list(BROKEN)
    state = loader.state_dict()
    assert (state["epoch"], state["batch"]) == (1, 0)


def test_error_is_the_default(damaged):
    for make in (Loader, ResidentLoader):
        with pytest.raises(BetonError, match=r"damaged\.beton: sample 7: "):
            list(make(damaged, 100, order="sequential", crop=CenterCrop(8)))
    with pytest.raises(ValueError, match="on_error='ignore'"):
        Loader(damaged, 4, on_error="ignore")


def test_a_share_without_any_image(damaged):
    """Training counts on every batch, evaluation on none."""
    for make in (Loader, ResidentLoader):
        loader = make(damaged, 1, order="sequential", crop=CenterCrop(8), on_error="skip")
        assert [i for b in loader for i in b.index.tolist()] == [
            i for i in range(400) if i not in BROKEN
        ]
        loader = make(
            damaged, 1, order="sequential", crop=CenterCrop(8), on_error="skip", drop_last=True
        )
        with pytest.raises(
            BetonError, match=r"damaged\.beton: none of the 1 images of a batch.*sample 7: "
        ):
            list(loader)


def test_files_of_a_folder(folder, tmp_path):
    root = tmp_path / "photos"
    shutil.copytree(folder / "train", root)
    (root / "ant" / "2.jpg").write_bytes(b"nothing like an image")
    (root / "bee" / "1.jpg").write_bytes((root / "bee" / "1.jpg").read_bytes()[:300])
    (root / "cat" / "0.jpg").write_bytes(b"")
    with pytest.raises(BetonError, match=r"ant/2\.jpg: "):
        list(Loader(root, 6, order="sequential", crop=CenterCrop(8)))
    loader = Loader(root, 6, order="sequential", crop=CenterCrop(8), on_error="skip")
    seen = [i for b in loader for i in b.index.tolist()]
    assert [s.name for s in loader.skipped] == ["ant/2.jpg", "bee/1.jpg", "cat/0.jpg"]
    assert all(s.reason for s in loader.skipped)
    assert seen == [i for i in range(20) if i not in (2, 9, 15)]


def test_the_gradient_is_that_of_the_images_that_are_left_over_the_whole_batch():
    """Two ranks, one with 3 images of 4, one with 4: their DDP mean is sum over 7 images / 8."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (8, 4, 4, 3), dtype=torch.uint8)
    labels = torch.arange(8) % 3
    model = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(48, 3), torch.nn.Unflatten(0, (1, -1))
    )
    model.preprocessing = Preprocessing()
    plain = DataConfig()
    cfg = SimpleNamespace(data=plain, training=SimpleNamespace(seed=0, batch_size=3, sandwich=None))
    objective = supervised_step.Objective(
        model, nested_cross_entropy, weights=None, precision="fp32"
    )
    objective.no_sync = contextlib.nullcontext
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    world = World(torch.device("cpu"), 0, 2)

    def gradient(which, global_size, world):
        batch = Batch(images[which], labels[which], torch.tensor(which))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        loader = SimpleNamespace(batch_size=global_size)
        state = TrainState(
            model=model,
            optimizer=optimizer,
            loader=loader,
            scaler=scaler,
            sums=Sums({"loss": (), "prefix_loss": (1,)}, world.device),
            metadata={},
        )
        supervised_step.train_step(
            batch,
            0.0,
            cfg=cfg,
            world=world,
            forward=Forward(objective),
            state=state,
            guard=NonFiniteGuard(model, world.device),
        )
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    by_ddp = (gradient([0, 2, 3], 8, world) + gradient([4, 5, 6, 7], 8, world)) / 2
    alone = World(torch.device("cpu"))
    expected = sum(gradient([i], 1, alone) for i in (0, 2, 3, 4, 5, 6, 7)) / 8
    torch.testing.assert_close(by_ddp, expected)


def test_a_run_lists_what_it_skipped(damaged, digits, tmp_path, capsys):
    data = {"train": damaged, "val": digits["val"]}
    more = ["--data.on_error=skip", "--training.batch_size=100"]
    assert train_imagenet.main(options(data, tmp_path, "run", *more)) == 0
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()
    ]
    assert [(line["epoch"], line["index"]) for line in lines] == [
        (e, i) for e in (0, 1) for i in BROKEN
    ]
    assert {line["name"] for line in lines} == {f"sample {i}" for i in BROKEN}
    assert "4 images were left out of this epoch" in capsys.readouterr().out
    assert "damaged.beton: sample" in refused(
        train_imagenet.main, options(data, tmp_path, "strict"), capsys
    )


@pytest.mark.slow
def test_two_processes_list_what_both_skipped(damaged, digits, tmp_path):
    data = {"train": damaged, "val": digits["val"]}
    more = ["--data.on_error=skip", "--training.batch_size=50", "--training.epochs=1"]
    torchrun(2, ROOT / "train" / "train_imagenet.py", *options(data, tmp_path, "run", *more))
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()
    ]
    assert [(line["epoch"], line["index"]) for line in lines] == [(0, i) for i in BROKEN]
