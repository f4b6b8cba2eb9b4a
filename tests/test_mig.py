"""Slices of GPUs: what is read from nvidia-smi, and that every rank gets its own one."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from matryoshka import distributed, mig
from matryoshka.distributed import DistConfig, DistributedError
from matryoshka.mig import MigError

# As driver 535 prints it; GPU 1 is whole.
LISTED = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77)
  MIG 2g.10gb     Device  0: (UUID: MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f)
  MIG 1g.5gb      Device  1: (UUID: MIG-cba663e8-9bed-5b25-b243-5985ef7c9beb)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-ec7ad2e1-6dd1-4e3c-8f36-9a2d1f5c6a10)
GPU 2: NVIDIA H200 (UUID: GPU-0ba1f2c3-1234-4e3c-8f36-9a2d1f5c6a10)
  MIG 1c.3g.71gb  Device  0: (UUID: MIG-00000000-0000-5b25-b243-5985ef7c9beb)
  MIG 1g.18gb+me  Device  1: (UUID: MIG-11111111-0000-5b25-b243-5985ef7c9beb)
"""
ALL = [
    "MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f",
    "MIG-cba663e8-9bed-5b25-b243-5985ef7c9beb",
    "MIG-00000000-0000-5b25-b243-5985ef7c9beb",
    "MIG-11111111-0000-5b25-b243-5985ef7c9beb",
]
# Before driver 470.
OLD = "GPU 0: A100 (UUID: GPU-5d5ba0d6-d33d)\n  MIG 1g.5gb Device 0: (UUID: MIG-GPU-5d5ba0d6/1/0)\n"


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """f(what it prints, its exit status) puts a fake nvidia-smi on PATH."""

    def install(text, status=0):
        (tmp_path / "listed").write_text(text)
        program = tmp_path / "nvidia-smi"
        program.write_text(f'#!/bin/sh\ntest "$1" = -L && cat {tmp_path}/listed\nexit {status}\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    mig.use_own_slice.cache_clear()
    # What the code under test sets is undone.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    yield install
    mig.use_own_slice.cache_clear()


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, ALL),
        ("0", ALL[:2]),
        ("2,0", ALL),
        ("1", []),
        ("GPU-0ba1f2c3", ALL[2:]),
        ("", []),
        ("-1", []),
        (f"{ALL[3]}, {ALL[0]}", [ALL[3], ALL[0]]),
    ],
)
def test_slices_that_may_be_used(nvidia_smi, monkeypatch, visible, expected):
    nvidia_smi(LISTED)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert mig.slices() == expected


def test_other_drivers(nvidia_smi, monkeypatch):
    nvidia_smi(OLD)
    assert mig.slices() == ["MIG-GPU-5d5ba0d6/1/0"]
    nvidia_smi("GPU 0: NVIDIA H200 (UUID: GPU-0ba1f2c3)\n")
    assert mig.slices() == []
    nvidia_smi(LISTED, status=9)  # "couldn't communicate with the NVIDIA driver"
    assert mig.slices() == []
    nvidia_smi("No devices found.\n")
    assert mig.slices() == []
    monkeypatch.setenv("PATH", "")
    assert mig.slices() == []


def test_every_rank_uses_its_own_slice(nvidia_smi, monkeypatch):
    nvidia_smi(LISTED)
    for key, value in {"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4}.items():
        monkeypatch.setenv(key, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # of its slice
    for _ in range(2):  # checks of the options come first
        assert distributed.pick_device("auto", 1) == torch.device("cuda", 0)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ALL[1]


def test_more_processes_than_slices(nvidia_smi, monkeypatch):
    nvidia_smi(LISTED)
    for key, value in {"RANK": 4, "WORLD_SIZE": 5, "LOCAL_RANK": 4, "LOCAL_WORLD_SIZE": 5}.items():
        monkeypatch.setenv(key, str(value))
    with pytest.raises(MigError, match="5 processes on a machine with 4 MIG slices: start 4"):
        distributed.check(None, "auto")
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    assert distributed.pick_device("cpu", 4).type == "cpu"


def test_one_process_for_each_slice_is_started(nvidia_smi, monkeypatch):
    for key in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    nvidia_smi(LISTED)
    assert distributed.processes_to_start(DistConfig(), True, "auto") == 4
    assert "CUDA_VISIBLE_DEVICES" not in os.environ, "the processes inherit it"
    assert distributed.processes_to_start(DistConfig(), True, "cpu") == 1
    with pytest.raises(DistributedError, match="world_size=6: only 4 MIG slices"):
        distributed.processes_to_start(DistConfig(world_size=6), True, "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert distributed.processes_to_start(DistConfig(), True, "auto") == 3


def test_backends():
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert distributed.pick_backend("auto", cpu) == "gloo"
    assert distributed.pick_backend("auto", gpu) == "nccl"
    assert distributed.pick_backend("auto", gpu, on_slice=True) == "gloo"
    assert distributed.pick_backend("nccl", gpu, on_slice=True) == "nccl"
    assert distributed.pick_backend("gloo", gpu) == "gloo"
    with pytest.raises(DistributedError, match=r"dist\.backend=nccl needs GPUs"):
        distributed.pick_backend("nccl", cpu)


FOUR_RANKS = """
import json, os, sys, traceback
import torch
from matryoshka import distributed
from torch import distributed as dist

def work():
    with distributed.joined("auto") as world:
        gradient = distributed.sum_over_ranks(torch.full((2,), float(world.rank)), world)
        visible = os.environ["CUDA_VISIBLE_DEVICES"]
        own = (world.rank, visible, dist.get_backend(), world.device.type)
        found = distributed.gather([own], world)
        if distributed.broadcast(world.rank, world) == world.rank:
            print(json.dumps({"ranks": found, "gradient": gradient.tolist()}))

children = []
for rank in range(4):
    children.append(os.fork())
    if children[-1] == 0:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        code = 1
        try:
            work()
            sys.stdout.flush()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the slices of the fake do not exist")
def test_four_ranks_on_four_slices_add_their_gradients(nvidia_smi):
    nvidia_smi(LISTED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {
        "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", FOUR_RANKS],
        env=env,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["ranks"] == [[rank, ALL[rank], "gloo", "cpu"] for rank in range(4)]
    assert found["gradient"] == [6.0, 6.0]
