"""Training checkpoints for exact resume: safetensors + JSON, no pickle, written in the background.

    snapshots = Snapshots(run / "checkpoints", metadata={...}, keep_last=3)
    snapshots.save(step, tensors, progress)          # copies, then writes in a thread
    checkpoint, notes = newest(run / "checkpoints")  # Checkpoint(path, metadata, tensors), or None

`step_N.safetensors` are the latest few, `last` is the newest of them and `best` the most accurate
one (hard links). A file gets its name only after it is complete and flushed to disk; reading
verifies its checksums (tensor_files.py).
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from matryoshka import tensor_files
from matryoshka.checkpoint.contents import TRAINING_FORMAT as FORMAT
from matryoshka.checkpoint.contents import CheckpointError
from matryoshka.files import read_regular, write_atomically

_DTYPES = tensor_files.dtypes()
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
# What a run that resumes reads of the metadata; every version has written it.
_METADATA = {"config": dict, "global_batch": int, "step": int, "best": bool, "progress": dict}
_PROGRESS = {
    "step": int,
    "epoch": int,
    "best": (int, float),
    "rollbacks": int,
    "calm_until": int,
    "loader": dict,
    "scaler": dict,
    "optimizer": dict,
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read from a file; tensors are on the CPU.

    is_sealed: all of the file was under checksums. Only a file of an older version is not.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]
    is_sealed: bool = True

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose name starts with `prefix`, without it: `model.`, `ema.`."""
        found = {}
        for name, tensor in self.tensors.items():
            if name.startswith(prefix):
                found[name.removeprefix(prefix)] = tensor
        return found


class _HostCopy:
    """Tensors side by side in one block of host memory, pinned if they come from a GPU."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.layout = _layout(tensors)
        self.entries: dict[str, dict] = {}
        # Widest dtypes first: safetensors forbids gaps, and this order aligns every view.
        self._names = sorted(tensors, key=lambda name: -tensors[name].element_size())
        end = 0
        for name in self._names:
            tensor = tensors[name]
            begin = end
            end += tensor.numel() * tensor.element_size()
            self.entries[name] = {
                "dtype": _NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begin, end],
            }
        on_gpu = any(tensor.is_cuda for tensor in tensors.values())
        self.block = torch.empty(end, dtype=torch.uint8, pin_memory=on_gpu)
        self._views = [_view(self.block, self.entries[name]) for name in self._names]
        # blocking: the writer would otherwise spin, on a core of the decoders
        self.event = torch.cuda.Event(blocking=True) if on_gpu else None

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Queue the copy on the current stream; call `wait` before the block is read."""
        for view, name in zip(self._views, self._names, strict=True):
            view.copy_(tensors[name].detach(), non_blocking=True)
        if self.event is not None:
            self.event.record()

    def wait(self) -> None:
        if self.event is not None:
            self.event.synchronize()

    def first_non_finite(self) -> str | None:
        """Name of the first tensor with a nan or an inf."""
        for name, view in zip(self._names, self._views, strict=True):
            if view.is_floating_point() and not torch.isfinite(view).all():
                return name
        return None


def _view(block: Tensor, entry: Mapping[str, Any]) -> Tensor:
    begin, end = entry["data_offsets"]
    return block[begin:end].view(_DTYPES[entry["dtype"]]).view(entry["shape"])


def _layout(tensors: Mapping[str, Tensor]) -> list:
    return [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


class Snapshots:
    """Writes the checkpoints of one run, one at a time, from a thread.

    folder: created with the first checkpoint. metadata: constant over the run, part of every file.
    keep_last: number of step_N files to keep. blocked: the longest time in seconds for which `save`
    has blocked its caller, without the wait for an earlier write; waited: the sum of these waits. A
    failed write (disk full) leaves older checkpoints unchanged and is
    reported by `problems()`; training continues.
    """

    def __init__(self, folder: Path, metadata: Mapping[str, Any], keep_last: int) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self.blocked = 0.0
        self.waited = 0.0
        self._metadata = dict(metadata)
        self._copy: _HostCopy | None = None
        self._thread: threading.Thread | None = None
        self._problems: list[str] = []

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        progress: Mapping[str, Any],
        *,
        best: bool = False,
    ) -> None:
        """Copy the tensors and write them as step `step` in the background.

        Waits for an earlier write. progress: JSON values that change between checkpoints. best:
        this is also the most accurate checkpoint so far.
        """
        began = time.perf_counter()
        self.wait()  # one block of host memory: the earlier write still reads it
        start = time.perf_counter()
        self.waited += start - began
        if self._copy is None or self._copy.layout != _layout(tensors):
            self._copy = _HostCopy(tensors)
        self._copy.fill(tensors)
        metadata = {
            **self._metadata,
            "format": FORMAT,
            "step": step,
            "best": best,
            "progress": dict(progress),
        }
        self._thread = threading.Thread(
            target=self._write, args=(step, json.dumps(metadata), best), name="matryoshka-snapshot"
        )
        self._thread.start()
        self.blocked = max(self.blocked, time.perf_counter() - start)

    def adopt(self, checkpoint: Checkpoint) -> None:
        """Resume from here: make the links that a killed writer may have left out."""
        if checkpoint.path.stem.startswith("step_"):
            _link_names(checkpoint.path, checkpoint.metadata["best"])

    @property
    def is_writing(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Wait until no checkpoint is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def problems(self) -> list[str]:
        """Return the problems since the last call, one line each."""
        problems = self._problems
        self._problems = []
        return problems

    def _write(self, step: int, metadata: str, best: bool) -> None:
        """Write one file; runs in the thread, which must not raise."""
        copy = self._copy
        assert copy is not None
        failed = f"checkpoint of step {step} not written"
        try:
            copy.wait()
            # A checkpoint with a NaN cannot be trained on, and would in time displace the good
            # ones.
            bad_tensor = copy.first_non_finite()
            if bad_tensor is not None:
                self._problems.append(f"{failed}: {bad_tensor} is not finite")
                return

            data = memoryview(copy.block.numpy())  # pyright: ignore[reportArgumentType]
            header = tensor_files.encode_header(metadata, copy.entries, data)
            path = self.folder / f"step_{step}.safetensors"
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, header, data)
            _link_names(path, best)
            # `best` is another hard link: deleting its step_N file does not delete its data.
            for old in _steps(self.folder)[self.keep_last :]:
                old.unlink(missing_ok=True)
        except OSError as error:
            self._problems.append(f"{failed}: {error.strerror or error}")
        except Exception as error:  # an exception of a thread would be lost
            self._problems.append(f"{failed}: {type(error).__name__}: {error}")


def _link_names(path: Path, best: bool) -> None:
    for name in ("best", "last") if best else ("last",):
        _link(path, path.with_name(f"{name}.safetensors"))


def _link(path: Path, name: Path) -> None:
    """Make `name` another name of `path`, atomically; a copy if the system has no hard links."""
    temporary = name.with_name(f".{name.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
        os.replace(temporary, name)
    except PermissionError:  # FAT, some network volumes, some containers
        write_atomically(name, read_regular(path, max_bytes=None))
    finally:
        temporary.unlink(missing_ok=True)


def _steps(folder: Path) -> list[Path]:
    """step_N files, newest first."""
    paths = []
    for path in folder.glob("step_*.safetensors"):
        if re.fullmatch(r"step_\d+", path.stem):
            paths.append(path)
    return sorted(paths, key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    """N of step_N, as a number: step_10 is later than step_9."""
    return int(path.stem.removeprefix("step_"))


def delete_after(folder: Path, step: int) -> None:
    """Delete the checkpoints of later steps, which a resumed run writes again, and stale temporary
    files of killed writers.
    """
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)
    for path in _steps(folder):
        if _step_of(path) > step:
            path.unlink(missing_ok=True)


def chosen(path: Path, accept: Callable[[Checkpoint], None]) -> tuple[Checkpoint, list[str]]:
    """The checkpoint of a file that the user named, and a note if it lacks a checksum.

    Raises CheckpointError if it is damaged, and what `accept` raises.
    """
    checkpoint = read(path)
    accept(checkpoint)
    return checkpoint, _age(checkpoint)


def _age(checkpoint: Checkpoint) -> list[str]:
    return [] if checkpoint.is_sealed else [f"{checkpoint.path}: {tensor_files.OLD_NOTE}"]


def newest(
    folder: Path,
    accept: Callable[[Checkpoint], None] = lambda checkpoint: None,
    *,
    before: int | None = None,
) -> tuple[Checkpoint | None, list[str]]:
    """Newest valid checkpoint, and notes: why newer ones were rejected, and what it lacks.

    accept: raises a ValueError if a checkpoint cannot be resumed. That of a sealed file counts. A
    file of an older version may be damaged, so its reason counts only if no other file will do.
    before: a step; only earlier checkpoints.
    """
    candidates = []
    for path in _steps(folder):
        if before is None or _step_of(path) < before:
            candidates.append(path)
    last = folder / "last.safetensors"
    if last.exists() and before is None:
        candidates.append(last)
    # A damaged file costs only the steps since the one before it.
    notes: list[str] = []
    unfit: ValueError | None = None
    for path in candidates:
        try:
            checkpoint = read(path)
        except CheckpointError as error:
            notes.append(str(error))
            continue
        try:
            accept(checkpoint)
        except ValueError as error:
            if checkpoint.is_sealed:
                raise
            unfit = unfit or error
            notes.append(str(error))
            continue
        return checkpoint, notes + _age(checkpoint)
    if unfit is not None:
        raise unfit
    return None, notes


def read(path: Path) -> Checkpoint:
    """Read a training checkpoint. Raises CheckpointError if it is not one, or damaged."""
    try:
        stored = tensor_files.read(path)
        metadata = stored.metadata
        if metadata is None or metadata.get("format") != FORMAT:
            raise CheckpointError(f"{path}: not a training checkpoint (no {FORMAT} metadata)")
        tensors = stored.tensors()
        if not stored.is_sealed:
            _check_types(metadata, _METADATA, "")
            _check_types(metadata["progress"], _PROGRESS, "progress.")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except tensor_files.TensorFileError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return Checkpoint(path, metadata, tensors, stored.is_sealed)


def _check_types(values: Mapping[str, Any], types: Mapping[str, Any], prefix: str) -> None:
    """TensorFileError unless `values` has all names of `types`, with values of these types."""
    for name, kind in types.items():
        if not isinstance(values.get(name), kind):
            raise tensor_files.TensorFileError(f"damaged: its metadata lack {prefix}{name}")
