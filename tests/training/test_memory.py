"""GPUs without enough memory, of another process, or with an old driver: one line, by stand-ins."""

import warnings

import pytest
import torch
from matryoshka.train import train_imagenet, train_ssl
from training_commands import options, refused

from matryoshka import distributed
from matryoshka.distributed import DistributedError
from matryoshka.models import NestedModel
from matryoshka.training import memory

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
OLD_DRIVER = (
    "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040). "
    "Please update your GPU driver by downloading and installing a new version from the URL: "
    "http://www.nvidia.com/Download/index.aspx (Triggered internally at c10/cuda/x.cpp:108.)"
)


@pytest.fixture
def holds(monkeypatch):
    """holds(n): passes of more than n images end as those of a full GPU."""
    features = NestedModel.features

    def limit(most):
        def limited(self, images):
            if len(images) > most and self.training:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return features(self, images)

        monkeypatch.setattr(NestedModel, "features", limited)

    return limit


@pytest.mark.parametrize(
    ("most", "more", "words"),
    [
        (16, [], "16 images fit: --training.batch_size=16 --training.global_batch_size=64 makes"),
        (
            16,
            ["--training.accumulate=2"],
            "--training.batch_size=16 --training.global_batch_size=128, without training.accum",
        ),
        (0, [], "not even one image fits"),
    ],
)
def test_a_batch_that_does_not_fit(holds, digits, tmp_path, capsys, *, most, more, words):
    holds(most)
    line = refused(train_imagenet.main, options(digits, tmp_path, "run", *more), capsys)
    assert line.startswith("error: training.batch_size=64: a step needs more memory than the GPU")
    assert words in line


def test_what_is_proposed_makes_the_same_steps(holds, digits, tmp_path):
    holds(16)
    proposed = ["--training.batch_size=16", "--training.global_batch_size=64"]
    proposed += ["--training.epochs=1", "--lr.lr_peak_epoch=0"]
    assert train_imagenet.main(options(digits, tmp_path, "run", *proposed)) == 0


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("byol", "--training.batch_size=16 --training.global_batch_size=32 makes"),
        ("vicreg", "--training.batch_size=16, in smaller steps"),
    ],
)
def test_a_batch_of_views_that_does_not_fit(holds, tmp_path, capsys, method, words):
    holds(16)
    argv = ["--data", "digits", "--method", method, "--net", "fast_cnn"]
    argv += ["--training.batch_size=32", "--epochs", "1", "--training.device=cpu"]
    argv += [f"--logging.folder={tmp_path}"]
    assert words in refused(train_ssl.main, argv, capsys)


def test_who_uses_the_memory(monkeypatch):
    gib = memory.GIB
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 * gib, 80 * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 9 * gib)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    tried = []

    def attempt(size):
        tried.append(size)
        if size > 3:
            raise torch.OutOfMemoryError

    used = r"\(80.0 GiB, of which this process has 9.0 and all else 70.0\); 2 images fit: two"
    with (
        pytest.raises(memory.OutOfMemory, match=used),
        memory.explained(GPU, 20, attempt, {2: "two"}.get),
    ):
        raise torch.OutOfMemoryError
    assert tried == [10, 5, 2]
    with (
        pytest.raises(memory.OutOfMemory, match="10 images may fit: ten"),
        memory.explained(GPU, 20, None, {10: "ten"}.get),
    ):
        raise torch.OutOfMemoryError


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="misaligned"), memory.explained(CPU, 8, None, str):
        raise RuntimeError("CUDA error: misaligned address")


# ---------------------------------------------------------------- a GPU that does not start


def test_a_driver_older_than_cuda(monkeypatch, digits, tmp_path, capsys):
    def is_available():
        warnings.warn(OLD_DRIVER, UserWarning, stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # NVML has its own count
    argv = options(digits, tmp_path, "run", "--training.device=cuda")
    line = refused(train_imagenet.main, argv, capsys)
    assert "device=cuda: The NVIDIA driver on your system is too old (found version 11040)" in line
    assert "device=cpu" in line
    assert "http" not in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "reason",
    [
        "CUDA error: all CUDA-capable devices are busy or unavailable",
        "CUDA error: out of memory",
    ],
)
def test_a_gpu_of_another_process(monkeypatch, reason):
    def zeros(*_, **__):
        raise RuntimeError(f"{reason}\nCUDA kernel errors might be asynchronously reported")

    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.raises(DistributedError, match=reason) as refusal:
        distributed.start_device(GPU)
    assert "\n" not in str(refusal.value)
    assert "CUDA_VISIBLE_DEVICES" in str(refusal.value)
    distributed.start_device(CPU)
