"""Device, clock and peak rates of the machine, and the work of a training step."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from measure import Block, Run
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from matryoshka.devices import choose_kernels, pick_precision
from matryoshka.distributed import pick_device

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MATMUL = "matmul"
COPY = "copy"


class Machine(NamedTuple):
    """clock: `cpu` (seconds of all threads; other processes hardly affect it), on a GPU `wall`."""

    device: torch.device
    precision: str
    threads: int

    @property
    def clock(self) -> str:
        return "cpu" if self.device.type == "cpu" else "wall"

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]


def current_machine(device: str, precision: str, threads: int) -> Machine:
    """The device and precision that the trainer would choose."""
    picked = pick_device(device, 0)
    choose_kernels(picked)
    return Machine(picked, pick_precision(precision, picked), threads)


def finish(device: torch.device) -> None:
    """Wait for the device to finish its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def repeated(machine: Machine, call: Callable[[], object], amount: int, seconds: float) -> Run:
    """A block of calls that takes about `seconds`; each call counts as `amount`."""

    def block(times: int) -> int:
        torch.set_num_threads(machine.threads)
        for _ in range(times):
            call()
        finish(machine.device)
        return times * amount

    # Compilation and choice of kernels, then one block to find how many fit into `seconds`.
    block(2)
    start = time.perf_counter()
    block(1)
    times = max(1, round(seconds / (time.perf_counter() - start)))
    return lambda: block(times)


def peaks(machine: Machine, seconds: float) -> dict[str, Callable[[], Run]]:
    """Peak rates, measured like competitors: FLOPs of a square matrix product, bytes of a copy."""
    gpu = machine.device.type != "cpu"

    def product() -> Run:
        n = 8192 if gpu else 1024
        a, b = (torch.randn(n, n, device=machine.device).to(machine.dtype) for _ in range(2))
        out = torch.empty_like(a)
        return repeated(machine, lambda: torch.mm(a, b, out=out), 2 * n**3, seconds / 2)

    def copy() -> Run:
        # 4 GiB or 256 MiB: no cache holds it.
        source = torch.ones(2**30 if gpu else 2**26, device=machine.device)
        target = torch.empty_like(source)
        return repeated(machine, lambda: target.copy_(source), 2 * source.nbytes, seconds / 2)

    return {MATMUL: product, COPY: copy}


class Work(NamedTuple):
    """Work of a call. bytes: inputs and outputs of every operator, as if run one by one."""

    flops: int
    bytes: int


def work_of(call: Callable[[], object]) -> Work:
    """Run `call` once and count its work."""
    with FlopCounterMode(display=False) as flops, _Traffic() as traffic:
        call()
    return Work(flops.get_total_flops(), traffic.bytes)


class _Traffic(TorchDispatchMode):
    """Counts the bytes of all operators' inputs and outputs; views move none."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            leaves = tree_leaves((args, kwargs, result))
            self.bytes += sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))
        return result


def ratios(a: list[Block], b: list[Block], clock: str) -> list[float]:
    """Speed of a over b, turn by turn."""
    pairs = zip(a, b, strict=True)
    return [(x.images / getattr(x, clock)) / (y.images / getattr(y, clock)) for x, y in pairs]
