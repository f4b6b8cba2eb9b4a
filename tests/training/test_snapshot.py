"""Training checkpoints: complete or absent after any failure of the disk."""

import errno
import os
import resource
import signal

import pytest
import torch
from safetensors import safe_open

from matryoshka.checkpoint.contents import CheckpointError
from matryoshka.training import snapshot
from matryoshka.training.snapshot import Snapshots


def tensors(scale=1.0):
    return {
        "model.w": torch.arange(6, dtype=torch.float32).view(2, 3) * scale,
        "n": torch.tensor(5),
        "half": torch.full((3,), scale, dtype=torch.bfloat16),
        "rng": torch.arange(7, dtype=torch.uint8),
        "empty": torch.zeros(0, 4),
        "wide": torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last) * scale,
    }


def test_a_checkpoint_is_safetensors_and_comes_back(tmp_path):
    snapshots = Snapshots(tmp_path / "c", {"config": {"a": 1}}, keep_last=2)
    given = tensors()
    for step in (1, 2, 3, 20):
        snapshots.save(step, given, {"step": step}, best=step == 2)
        for tensor in given.values():  # training continues: the copy must not change
            tensor.add_(1)
    snapshots.wait()
    assert snapshots.problems() == []
    names = sorted(p.name for p in (tmp_path / "c").iterdir())
    assert names == [
        "best.safetensors",
        "last.safetensors",
        "step_20.safetensors",
        "step_3.safetensors",
    ]
    saved, notes = snapshot.newest(tmp_path / "c")
    assert (notes, saved.metadata["progress"], saved.metadata["config"]) == (
        [],
        {"step": 20},
        {"a": 1},
    )
    with safe_open(
        tmp_path / "c" / "last.safetensors", "pt"
    ) as file:  # the real library reads the same
        assert set(file.keys()) == set(given)
        for name, tensor in tensors().items():
            expected = tensor.add(3)
            assert torch.equal(saved.tensors[name], expected)
            assert torch.equal(file.get_tensor(name), expected)
            assert saved.tensors[name].dtype == tensor.dtype
    assert snapshot.read(tmp_path / "c" / "best.safetensors").metadata["progress"] == {"step": 2}
    snapshot.delete_after(tmp_path / "c", 3)
    assert snapshot.newest(tmp_path / "c")[0].metadata["step"] == 3


@pytest.mark.parametrize("call", ["write", "fsync", "replace", "link", "short"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_write_that_fails_leaves_the_last_good_one(tmp_path, monkeypatch, call, number):
    snapshots = Snapshots(tmp_path, {}, keep_last=3)
    snapshots.save(1, tensors(), {})
    snapshots.wait()
    original, left = getattr(os, "write" if call == "short" else call), [number]

    def failing(*args, **kwargs):
        left[0] -= 1
        if call == "short":
            return original(args[0], bytes(args[1])[: max(1, len(args[1]) // 3)])
        if left[0] == 0:
            raise OSError(errno.ENOSPC if number < 3 else errno.EIO, "No space left on device")
        return original(*args, **kwargs)

    monkeypatch.setattr(os, "write" if call == "short" else call, failing)
    snapshots.save(2, tensors(2.0), {})
    snapshots.wait()
    monkeypatch.undo()
    problems = snapshots.problems()
    saved, notes = snapshot.newest(tmp_path)
    assert notes == []
    assert saved.metadata["step"] in ((2,) if call == "short" else (1, 2))
    assert torch.equal(saved.tensors["model.w"], tensors(float(saved.metadata["step"]))["model.w"])
    snapshot.read(tmp_path / "last.safetensors")
    assert not list(tmp_path.glob(".*.tmp"))
    if call != "short" and left[0] <= 0:
        assert len(problems) == 1, problems
        assert "step 2 not written: No space" in problems[0]
    snapshots.save(3, tensors(3.0), {})  # and the next one works
    snapshots.wait()
    assert snapshot.newest(tmp_path)[0].metadata["step"] == 3


def test_a_full_disk(tmp_path):
    snapshots, limit = (
        Snapshots(tmp_path, {}, keep_last=3),
        resource.getrlimit(resource.RLIMIT_FSIZE),
    )
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    snapshots.save(1, tensors(), {})
    snapshots.wait()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
        snapshots.save(2, {"big": torch.zeros(100_000)}, {})
        snapshots.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert "step 2 not written" in snapshots.problems()[0]
    assert snapshot.newest(tmp_path)[0].metadata["step"] == 1


def test_poisoned_states_are_not_written(tmp_path):
    snapshots = Snapshots(tmp_path, {}, keep_last=3)
    for bad in (float("nan"), float("inf")):
        snapshots.save(1, {"model.w": torch.tensor([1.0, bad])}, {})
        snapshots.wait()
        assert snapshots.problems() == ["checkpoint of step 1 not written: model.w is not finite"]
    assert snapshot.newest(tmp_path) == (None, [])


def test_damaged_checkpoints_are_passed_over_and_named(tmp_path):
    snapshots = Snapshots(tmp_path, {}, keep_last=9)
    for step in (1, 2, 3, 4):
        snapshots.save(step, tensors(step), {})
    snapshots.wait()
    cut, flipped, other = (tmp_path / f"step_{k}.safetensors" for k in (4, 3, 2))
    (tmp_path / "last.safetensors").unlink()
    cut.write_bytes(cut.read_bytes()[:-5])
    flipped.write_bytes(flipped.read_bytes()[:-5] + b"\x07" + flipped.read_bytes()[-4:])
    other.write_bytes(b"<html>not found</html>")
    saved, notes = snapshot.newest(tmp_path)
    assert saved.metadata["step"] == 1
    assert [str(p) in note for p, note in zip((cut, flipped, other), notes, strict=True)] == [
        True
    ] * 3
    for path in (other, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match=path.name):
            snapshot.read(path)
