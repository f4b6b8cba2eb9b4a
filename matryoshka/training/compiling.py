"""Compilation of a step's forward pass, loss and backward pass: fewer kernels, or CUDA graphs.

    forward = compile_step(module, "graphs", sizes=(256,), shapes=3)
    forward.begin_step()
    loss, per_prefix = forward(images, labels)

`1` is torch.compile with a graph for each shape. `graphs` also records the launches of both passes
and replays them (reduce-overhead: torch's CUDA graph trees, which share one pool of memory): it
pays where launching takes longer than computing, as with small networks, images and batches.
Recorded are both passes, not what lies around them: augmentation with numbers of the host, the
gradients' norm, the optimizer and the average stay launches, a few for all tensors together.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from matryoshka import devices
from matryoshka.training.options import GRAPHS

# Compiling takes about a minute for each size of images and saves a tenth to a fifth of a step of
# some tens of milliseconds: shorter runs end sooner without it.
LEAST_STEPS = 5000
# Optimizers whose update is many launches: those of torch, fused, are a few.
UNRECORDED = ("lars", "muon", "adan")
SPARE = 8  # compilations of a function beyond those of the shapes that a run has: torch's default


class CompileError(ValueError):
    """Code of torch.compile that fails; the message names the option."""

    user_error = True


@contextlib.contextmanager
def explained(forward: Forward) -> Iterator[None]:
    """Raise CompileError for a failure of the compiler, or of the code that it made, in the block.

    A small network that compiles, see `devices.why_not_compile`, is no proof: on CPUs torch
    2.11 compiles ResNets of 32-pixel images into a backward pass that uses a name before it has a
    value.
    """
    try:
        yield
    except Exception as error:
        if not forward.is_compiled or not _is_of_compiler(error):
            raise
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise CompileError(
            f"training.compile: torch.compile of torch {torch.__version__} fails for this model "
            f"({reason}); resume without it: --training.compile=0 --training.resume=auto"
        ) from error


def _is_of_compiler(error: Exception) -> bool:
    """Whether the compiler's own frames are in the stack; a lack of memory is none of its errors,
    nor is one that the GPU reports.
    """
    if isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError)):
        return False
    dynamo: Any = torch._dynamo
    if isinstance(error, dynamo.exc.TorchDynamoException):
        return True
    compiler = Path(torch.__file__).parent / "_inductor"
    files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    return any(compiler in file.parents for file in files)


class Forward:
    """A module's forward pass, compiled for batches of some sizes and eager for all others.

    module: as it is, for `no_sync` and the like. sizes: of the first argument, a batch of images or
    a list of views of one; empty: all sizes are compiled. A batch of another size is one that lost
    an image, or two: compiling for it would take longer than the epoch.
    """

    def __init__(
        self,
        module: nn.Module,
        compiled: Callable[..., Any] | None = None,
        *,
        sizes: Collection[int] = (),
        graphs: bool = False,
    ) -> None:
        self.module = module
        self.is_compiled = compiled is not None
        self._compiled = compiled
        self._sizes = frozenset(sizes)
        self.has_graphs = graphs

    def begin_step(self) -> None:
        """Before the first forward pass of a step, when nothing of the last one is needed.

        With several passes per step, torch would otherwise reuse the memory of the gradients that
        the first one has left.
        """
        if self.has_graphs:
            torch.compiler.cudagraph_mark_step_begin()

    def __call__(self, images: Any, *rest: Any, **more: Any) -> Any:
        first = images[0] if isinstance(images, list) else images
        if self._compiled is None or (self._sizes and len(first) not in self._sizes):
            return self.module(images, *rest, **more)
        # torch.compile compiles anew for every value of a number.
        rest = tuple(_as_tensor(value, first.device) for value in rest)
        return self._compiled(images, *rest, **more)


def _as_tensor(value: Any, device: torch.device) -> Any:
    """A float as a 0-d tensor of the device, made there; everything else as it is."""
    return torch.full((), value, device=device) if isinstance(value, float) else value


def compile_step(
    module: nn.Module, how: str | None, *, sizes: Collection[int] = (), shapes: int = 1
) -> Forward:
    """The forward pass of `module`, eager (None), compiled (`1`) or as CUDA graphs (`graphs`).

    sizes: see Forward. shapes: how many shapes of input a run has, each of which is compiled.
    """
    if how is None:
        return Forward(module)
    # Beyond this limit torch stops compiling, for the rest of the run.
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, shapes + SPARE)
    graphs = how == GRAPHS
    # Static shapes: for the second size of images torch would otherwise compile one slower graph
    # for all sizes, and stay with it also after a single odd batch.
    mode = "reduce-overhead" if graphs else None
    compiled = torch.compile(module, dynamic=False, mode=mode)
    return Forward(module, compiled, sizes=sizes, graphs=graphs)


def requested(training: SimpleNamespace, device: torch.device, steps: int) -> str | None:
    """`1`, `graphs` or None of `training.compile`. steps: of the run, for each size of images."""
    if training.compile is not None:
        return None if training.compile == "0" else training.compile
    if device.type != "cuda" or training.deterministic or steps < LEAST_STEPS:
        return None
    return "1"


def outside_graphs(data: SimpleNamespace, training: SimpleNamespace) -> list[str]:
    """What of a run's options is launched as before, because graphs cannot have it."""
    found = []
    if getattr(data, "randaugment", 0):  # numbers of the host for every image
        found.append("RandAugment")
    if training.optimizer in UNRECORDED:
        found.append(f"the update of {training.optimizer}")
    return found


def skipped_graphs() -> int:
    """How many parts of what was compiled so far could not be recorded as CUDA graphs."""
    return torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


def forward_of(
    module: nn.Module,
    how: str | None,
    device: torch.device,
    *,
    sizes: Collection[int],
    shapes: int,
    obstacle: str | None = None,
    processes: int = 1,
) -> tuple[Forward, str]:
    """`compile_step` where it is possible, and a text about it for the line of the device.

    obstacle: why this run cannot be compiled. CUDA graphs are for one process: DDP's reductions
    start within the backward pass.
    """
    if how is None:
        return Forward(module), ""
    reason = obstacle or devices.why_not_compile(device)
    if reason is not None:
        return Forward(module), f", not compiled ({reason})"
    if how == GRAPHS and processes > 1:
        text = f", compiled without CUDA graphs (they are for one process, not {processes})"
        return compile_step(module, "1", sizes=sizes, shapes=shapes), text
    text = ", compiled into CUDA graphs" if how == GRAPHS else ", compiled"
    return compile_step(module, how, sizes=sizes, shapes=shapes), text


def part_sizes(local_batch: int, largest: int) -> set[int]:
    """Sizes of the forward passes of a full batch, see step.micro_batches."""
    whole, rest = divmod(local_batch, largest)
    return ({largest} if whole else set()) | ({rest} if rest else set())
