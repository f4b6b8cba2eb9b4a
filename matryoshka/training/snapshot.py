"""Training checkpoints for exact resume: safetensors + JSON, no pickle, written in the background.

    snapshots = Snapshots(run / "checkpoints", metadata={...}, keep_last=3)
    snapshots.save(step, tensors, progress)          # copies, then writes in a thread
    checkpoint, notes = newest(run / "checkpoints")  # Checkpoint(path, metadata, tensors), or None

`step_N.safetensors` are the latest few, `last` is the newest of them and `best` the most accurate
one (hard links). A file gets its name only after it is complete and flushed to disk; reading
verifies its checksum.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from matryoshka.checkpoint.contents import TRAINING_FORMAT as FORMAT
from matryoshka.checkpoint.contents import CheckpointError
from matryoshka.files import open_regular, read_regular, write_atomically

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as read from a file; tensors are on the CPU."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]

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
        self.event = torch.cuda.Event() if on_gpu else None

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
    has blocked its caller. A failed write (disk full) leaves older checkpoints unchanged and is
    reported by `problems()`; training continues.
    """

    def __init__(self, folder: Path, metadata: Mapping[str, Any], keep_last: int) -> None:
        self.folder = folder
        self.keep_last = keep_last
        self.blocked = 0.0
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
        self.wait()  # one block of host memory: the earlier write still reads it
        start = time.perf_counter()
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
            own = {"matryoshka": metadata, "crc32": f"{zlib.crc32(data):08x}"}
            header = json.dumps({"__metadata__": own, **copy.entries}).encode()
            header += b" " * (-len(header) % 8)  # safetensors aligns the data to 8 bytes

            path = self.folder / f"step_{step}.safetensors"
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, len(header).to_bytes(8, "little"), header, data)
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
    numbered = []
    for path in folder.glob("step_*.safetensors"):
        match = re.fullmatch(r"step_(\d+)\.safetensors", path.name)
        if match is not None:
            numbered.append((int(match[1]), path))  # as a number: step_10 is later than step_9
    return [path for _, path in sorted(numbered, reverse=True)]


def delete_after(folder: Path, step: int) -> None:
    """Delete the checkpoints of later steps, which a resumed run writes again, and stale temporary
    files of killed writers.
    """
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)
    for path in _steps(folder):
        if int(path.stem.removeprefix("step_")) > step:
            path.unlink(missing_ok=True)


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Newest valid checkpoint, and why newer ones were rejected."""
    candidates = _steps(folder)
    last = folder / "last.safetensors"
    if last.exists():
        candidates.append(last)
    # A damaged file costs only the steps since the one before it.
    notes = []
    for path in candidates:
        try:
            return read(path), notes
        except CheckpointError as error:
            notes.append(str(error))
    return None, notes


def read(path: Path) -> Checkpoint:
    """Read a training checkpoint. Raises CheckpointError if it is not one, or damaged."""
    try:
        with open_regular(path) as file:
            header = _read_header(path, file)
            data = bytearray(file.read())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error

    # safetensors has no checksum of its own, and a flipped bit would go unnoticed.
    own = header.pop("__metadata__")
    if f"{zlib.crc32(data):08x}" != own.get("crc32"):
        raise CheckpointError(f"{path}: damaged: its checksum does not match its contents")
    block = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    # Clones are aligned as libraries expect it (torch.set_rng_state crashes otherwise), and each
    # can be freed alone.
    tensors = {name: _view(block, entry).clone() for name, entry in header.items()}
    return Checkpoint(path, json.loads(own["matryoshka"]), tensors)


def _read_header(path: Path, file) -> dict[str, Any]:
    try:
        size = int.from_bytes(file.read(8), "little")
        # A damaged size must not allocate more than 64 MiB.
        header = json.loads(file.read(size)) if size < 1 << 26 else None
        metadata = json.loads(header["__metadata__"]["matryoshka"])  # type: ignore[index]
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not a complete training checkpoint") from error
    if metadata.get("format") != FORMAT or header is None:
        raise CheckpointError(f"{path}: not a training checkpoint (no {FORMAT} metadata)")
    return header
