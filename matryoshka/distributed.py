"""Processes and their devices: torchrun, collectives (no-ops on one process)."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from matryoshka import mig
from matryoshka.devices import choose_kernels
from matryoshka.environment import count_in
from matryoshka.runtime import DistConfig

T = TypeVar("T")
# Exit status of a run that was stopped by a signal: EX_TEMPFAIL of sysexits.h, which job schedulers
# read as "start the same command again".
REQUEUE = 75


class DistributedError(ValueError):
    """Processes or devices that are not available; the message names the option and the remedy."""

    user_error = True


@dataclass(frozen=True)
class World:
    """This process: its device, its rank among `size`, its local rank on this machine."""

    device: torch.device
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def started_by_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def check(distributed: bool | None, device: str) -> None:
    """Raise DistributedError if options, environment and hardware do not fit each other.

    distributed: None means yes under torchrun, else no.
    """
    size = count_in("WORLD_SIZE") if started_by_torchrun() else 1
    if size > 1 and distributed is False:
        raise DistributedError(
            f"training.distributed=0 under torchrun with {size} processes: each would train the "
            "whole model on its own; leave it out, or start one process"
        )
    pick_device(device, local_rank())


def local_rank() -> int:
    """This process's number on its machine, 0 without torchrun."""
    return count_in("LOCAL_RANK", 0)


def processes_to_start(config: DistConfig, distributed: bool | None, device: str) -> int:
    """Number of processes to start through torchrun's launcher; 1: this process does the work."""
    if started_by_torchrun() or not distributed:
        return 1
    gpus, kind = 0, "GPUs"
    if device in ("auto", "cuda"):
        gpus = len(mig.slices())
        if gpus:
            kind = "MIG slices"
        else:
            gpus = torch.cuda.device_count()
    if config.world_size < 0:
        raise DistributedError(
            f"dist.world_size={config.world_size}: expected 0 (all {kind}) or a number of processes"
        )
    if gpus and config.world_size > gpus:
        raise DistributedError(
            f"dist.world_size={config.world_size}: only {gpus} {kind} are visible; lower it, or "
            "add --training.device=cpu"
        )
    return config.world_size or gpus or 1


def launch(processes: int, config: DistConfig, script: str, argv: Sequence[str]) -> int:
    """Run `script argv` in several processes with torchrun's own launcher.

    Returns 0, REQUEUE after a signal, or the exit code of the first process that failed.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    rendezvous = ["--standalone"]
    if config.port:
        _check_port(config)
        endpoint = f"--rdzv-endpoint={config.address}:{config.port}"
        # An id of its own, as --standalone has it: two runs must never meet at one port.
        rendezvous = ["--rdzv-backend=c10d", endpoint, f"--rdzv-id={uuid.uuid4()}"]
    try:
        run(parse_args([*rendezvous, f"--nproc-per-node={processes}", script, *argv]))
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode or 1
    except SignalException:  # the processes have received it and saved a checkpoint
        return REQUEUE
    return 0


def _check_port(config: DistConfig) -> None:
    """DistributedError if another process of this machine has the port, or none may have it.

    torchrun would take the other process for its own rendezvous, and wait.
    """
    option = f"dist.port={config.port}"
    try:
        socket.getaddrinfo(config.address, config.port)
    except socket.gaierror:
        raise DistributedError(f"dist.address={config.address}: no such host") from None
    try:
        socket.create_server((config.address, config.port)).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise DistributedError(
                f"{option}: another process of this machine uses it; give another one, or 0 for "
                "any that is free"
            ) from None
        if error.errno == errno.EACCES:
            raise DistributedError(
                f"{option}: {error.strerror}; ports from 1024 on are for everybody"
            ) from None
        # EADDRNOTAVAIL: an address of another machine


def pick_device(name: str, local_rank: int) -> torch.device:
    """Resolve "auto": CUDA, else Apple's MPS, else CPU. DistributedError for a missing device.

    A process of torchrun on a machine with MIG slices sees only its own one, see mig.py.
    """
    if _on_own_slice(name):
        local_rank = 0
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
        else:
            name = "cpu"
    if name == "cuda":
        if (reason := _why_no_cuda()) is not None:
            raise DistributedError(
                f"device=cuda: {reason}; install what it asks for, or device=cpu"
            )
        if local_rank >= torch.cuda.device_count():
            raise DistributedError(
                f"device=cuda: {torch.cuda.device_count()} GPUs are visible, process "
                f"{local_rank} needs one; use device=cpu or fewer processes"
            )
        return torch.device("cuda", local_rank)
    if name == "mps" and not torch.backends.mps.is_available():
        raise DistributedError("device=mps: this machine has no Apple GPU; use device=cpu or auto")
    return torch.device(name)


def _why_no_cuda() -> str | None:
    """The warning with which torch finds no GPU, such as that of a driver older than its CUDA; None
    without a warning.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if torch.cuda.is_available() or not caught:
            return None
    # "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040).
    # Please update ... (Triggered internally at ...)"
    text = str(caught[0].message).partition("(Triggered internally")[0]
    first, _, _ = text.removeprefix("CUDA initialization: ").partition(" Please ")
    return " ".join(first.split()).rstrip(".")


def _on_own_slice(device: str) -> bool:
    """Whether this process of torchrun works on a slice of a GPU, which it then sees alone."""
    if device not in ("auto", "cuda") or not started_by_torchrun():
        return False
    local_size = count_in("LOCAL_WORLD_SIZE", 1)
    return mig.use_own_slice(local_rank(), local_size) is not None


def start_device(device: torch.device) -> None:
    """DistributedError for a GPU that cannot be used now: that of another process alone, or full.

    Otherwise the error would come from the first tensor on it, after the run has taken its folder.
    """
    if device.type != "cuda":
        return
    try:
        torch.zeros(1, device=device)
    except RuntimeError as error:  # and its subclasses for accelerators and their memory
        reason = str(error).partition("\n")[0]
        raise DistributedError(
            f"device={device}: {reason}; choose another GPU by CUDA_VISIBLE_DEVICES, wait until "
            "this one is free (nvidia-smi shows who uses it), or device=cpu"
        ) from None


def pick_backend(name: str, device: torch.device, *, on_slice: bool = False) -> str:
    """Resolve "auto" of `dist.backend`: gloo on CPUs and on slices of GPUs, else NCCL.

    DistributedError for NCCL without a GPU.
    """
    if name == "auto":
        return "nccl" if device.type == "cuda" and not on_slice else "gloo"
    if name == "nccl" and device.type != "cuda":
        raise DistributedError(
            f"dist.backend=nccl needs GPUs, the device is {device.type}; leave it out"
        )
    return name


@contextlib.contextmanager
def joined(device: str, backend: str = "auto") -> Iterator[World]:
    """This process's World; inside the block, torchrun's processes have a default process group.

    backend: what carries gradients and metrics, see `pick_backend`.
    """
    if not started_by_torchrun():
        world = World(pick_device(device, 0))
        start_device(world.device)
        choose_kernels(world.device)
        yield world
        return
    env = os.environ
    world = World(
        device=pick_device(device, local_rank()),
        rank=count_in("RANK"),
        size=count_in("WORLD_SIZE"),
        local_rank=local_rank(),
        local_size=count_in("LOCAL_WORLD_SIZE", 1),
    )
    choose_kernels(world.device)
    # An agent that restarts its workers keeps its store, with the addresses of the earlier ones.
    store: dict[str, Any] = {}
    if env.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = {
            "store": fresh_store(world.rank, world.size),
            "rank": world.rank,
            "world_size": world.size,
        }
    on_slice = _on_own_slice(device)
    if world.device.type == "cuda":
        torch.cuda.set_device(world.device)
        start_device(world.device)
    if pick_backend(backend, world.device, on_slice=on_slice) == "nccl":
        if on_slice:
            # NCCL takes the slices of a GPU for ranks that share it, which it refuses by default
            # (github.com/NVIDIA/nccl/issues/1716).
            os.environ.setdefault("NCCL_MULTI_RANK_GPU_ENABLE", "1")
        dist.init_process_group("nccl", device_id=world.device, **store)
    else:
        dist.init_process_group("gloo", **store)
    try:
        yield world
    finally:
        dist.destroy_process_group()


def fresh_store(rank: int, size: int, patience: float = 900.0) -> Any:
    """A namespace of the agents' store (a Store) that no earlier attempt has written to.

    Restarted workers inherit the store of their predecessors (torch 2.15 keeps MASTER_PORT), find
    the addresses of dead processes in it and fail to connect. No environment variable identifies an
    attempt on all ranks, so the ranks agree on a random name:

    1. Every other rank publishes a random number under `hello/<rank>`.
    2. Rank 0 draws the name and publishes it under `name/<number>` for every number that it sees.
    3. A rank that finds the name under its own number reports with `here/<name>`.
    4. When all ranks have reported, rank 0 sets `go/<name>`, for which the others wait.

    patience: seconds to wait for all ranks.
    """
    from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

    store = TCPStore(os.environ["MASTER_ADDR"], count_in("MASTER_PORT"), is_master=False)
    deadline = time.monotonic() + patience

    def wait(ready: Callable[[], bool]) -> None:
        while not ready():
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"rank {rank} of {size}: other ranks have not joined after {patience:.0f} s"
                )
            time.sleep(0.02)

    if rank:
        own = secrets.token_hex(8)
        store.set(f"hello/{rank}", own)
        wait(lambda: store.check([f"name/{own}"]))
        name = store.get(f"name/{own}").decode()
        store.add(f"here/{name}", 1)
        wait(lambda: store.check([f"go/{name}"]))
        return PrefixStore(name, store)

    name = secrets.token_hex(8)

    def all_are_here() -> bool:
        # Answer all numbers repeatedly: a number of an earlier attempt may still be in the store
        # until this attempt's process replaces it.
        for other in range(1, size):
            if store.check([f"hello/{other}"]):
                store.set(f"name/{store.get(f'hello/{other}').decode()}", name)
        return store.add(f"here/{name}", 0) == size - 1

    wait(all_are_here)
    store.set(f"go/{name}", "")
    return PrefixStore(name, store)


def broadcast(value, world: World):
    """Return rank 0's (small, picklable) value on every rank."""
    if world.size == 1:
        return value
    box = [value]
    device = world.device if dist.get_backend() == "nccl" else None  # sends device memory only
    dist.broadcast_object_list(box, src=0, device=device)
    return box[0]


def on_main(function: Callable[[], T], world: World) -> T:
    """Run on rank 0 only and return its result on every rank; a ValueError ends every rank."""
    if world.size == 1:
        return function()
    result: Any = None
    error: ValueError | None = None
    if world.is_main:
        try:
            result = function()
        except ValueError as raised:
            error = raised
    # The error travels as well: otherwise the other ranks would wait for rank 0 until a timeout.
    result, error = broadcast((result, error), world)
    if error is not None:
        raise error if world.is_main else SystemExit(2)  # rank 0 prints the message, once
    return result


def broadcast_buffers(module: torch.nn.Module, world: World) -> None:
    """Copy rank 0's buffers to every rank; batch-norm statistics differ between ranks."""
    if world.size > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def gather(values: list, world: World) -> list:
    """Return the (small, picklable) values of all ranks as one list, on all ranks."""
    if world.size == 1:
        return list(values)
    boxes: list = [None] * world.size
    dist.all_gather_object(boxes, values)
    return [value for box in boxes for value in box]


def sum_over_ranks(tensor: torch.Tensor, world: World) -> torch.Tensor:
    """Return the elementwise sum over ranks, on all ranks; `tensor` is not changed."""
    tensor = tensor.detach().clone()
    if world.size > 1:
        dist.all_reduce(tensor)
    return tensor


def stack_over_ranks(tensor: torch.Tensor, world: World) -> torch.Tensor:
    """Return the tensors of all ranks, [ranks, *shape], on all ranks."""
    tensor = tensor.detach().clone()  # the caller keeps adding to its own
    if world.size == 1:
        return tensor[None]
    parts = [torch.empty_like(tensor) for _ in range(world.size)]
    dist.all_gather(parts, tensor)
    return torch.stack(parts)


class _GatherRows(torch.autograd.Function):
    """Rows of all ranks; a rank's rows get the sum of the gradients of all ranks."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
        ctx.rank, ctx.count = dist.get_rank(), len(rows)
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        return total[ctx.rank * ctx.count : (ctx.rank + 1) * ctx.count]


def gather_rows(rows: torch.Tensor, world: World) -> torch.Tensor:
    """The rows [B, ...] of all ranks in their order, [ranks x B, ...], on all ranks.

    Every rank has equally many. With gradients: when each rank computes its own share of a loss
    from all rows and DDP averages the gradients, the result is the gradient of the mean of the
    ranks' losses.
    """
    if world.size == 1:
        return rows
    if rows.requires_grad:
        gathered = _GatherRows.apply(rows)
        assert isinstance(gathered, torch.Tensor)
        return gathered
    parts = [torch.empty_like(rows) for _ in range(world.size)]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)
