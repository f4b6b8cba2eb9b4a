"""Training checkpoints: all that a run needs to go on as if it had never stopped, safetensors +
JSON, no pickle.

    snapshots = Snapshots(run / "checkpoints", about={...}, keep_last=3)
    snapshots.save(step, tensors, progress)     # copies, then writes in the background
    saved = newest(run / "checkpoints")         # Saved(path, about, tensors), or None

`step_N.safetensors` are the last few, `last` the newest of them and `best` the most accurate (hard
links). A file has its name only when it is whole and on the disk; its checksum is tested when it is
read.
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
from matryoshka.files import write_atomically

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
class Saved:
    """A checkpoint that was read: `about` as it was saved, tensors on the CPU."""

    path: Path
    about: dict[str, Any]
    tensors: dict[str, Tensor]


class _Arena:
    """Tensors side by side in one block of host memory, pinned where they come from a GPU."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.shape = _shape(tensors)
        self.entries: dict[str, dict] = {}
        # The widest numbers first: safetensors allows no holes, and so every view is aligned.
        self._names = sorted(tensors, key=lambda name: -tensors[name].element_size())
        end = 0
        for name in self._names:
            tensor, begin = tensors[name], end
            end += tensor.numel() * tensor.element_size()
            about = {
                "dtype": _NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begin, end],
            }
            self.entries[name] = about
        on_gpu = any(tensor.is_cuda for tensor in tensors.values())
        self.block = torch.empty(end, dtype=torch.uint8, pin_memory=on_gpu)
        self._views = [_view(self.block, self.entries[name]) for name in self._names]
        self.event = torch.cuda.Event() if on_gpu else None

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Queued behind the work of the current stream; `wait` for it before the block is read."""
        for view, name in zip(self._views, self._names, strict=True):
            view.copy_(tensors[name].detach(), non_blocking=True)
        if self.event is not None:
            self.event.record()

    def wait(self) -> None:
        if self.event is not None:
            self.event.synchronize()

    def poisoned(self) -> str | None:
        """The first tensor that is not finite."""
        for name, view in zip(self._names, self._views, strict=True):
            if view.is_floating_point() and not torch.isfinite(view).all():
                return name
        return None


def _view(block: Tensor, entry: Mapping[str, Any]) -> Tensor:
    begin, end = entry["data_offsets"]
    return block[begin:end].view(_DTYPES[entry["dtype"]]).view(entry["shape"])


def _shape(tensors: Mapping[str, Tensor]) -> list:
    return [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


class Snapshots:
    """Writes the checkpoints of one run, one at a time, from a thread.

    folder: made when the first one is written. about: what does not change in a run; goes into
    every file. keep_last: so many step_N stay. waited: seconds for which `save` has kept its
    caller, the longest of them. A write that fails (disk full) leaves the older ones as they were
    and is told by `problems`; training goes on.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], keep_last: int) -> None:
        self.folder, self.keep_last, self.waited = folder, keep_last, 0.0
        self._about = dict(about)
        self._arena: _Arena | None = None
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
        """Copy the tensors as they are now, and write them as step `step` in the background. Waits
        for an earlier one.

        progress: plain values that change from one checkpoint to the next. best: is the most
        accurate so far, too.
        """
        self.wait()
        start = time.perf_counter()
        if self._arena is None or self._arena.shape != _shape(tensors):
            self._arena = _Arena(tensors)
        self._arena.fill(tensors)
        about = json.dumps(
            self._about | {"format": FORMAT, "step": step, "best": best, "progress": dict(progress)}
        )
        self._thread = threading.Thread(
            target=self._write, args=(step, about, best), name="matryoshka-snapshot"
        )
        self._thread.start()
        self.waited = max(self.waited, time.perf_counter() - start)

    def adopt(self, saved: Saved) -> None:
        """The run goes on from here: finish what its writer may have left undone, the other names
        of the file.
        """
        if saved.path.stem.startswith("step_"):
            _name(saved.path, saved.about["best"])

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def problems(self) -> list[str]:
        """What went wrong since the last call, one line each."""
        told, self._problems = self._problems, []
        return told

    def _write(self, step: int, about: str, best: bool) -> None:
        arena = self._arena
        assert arena is not None
        try:
            arena.wait()
            if poisoned := arena.poisoned():
                self._problems.append(
                    f"checkpoint of step {step} not written: {poisoned} is not finite"
                )
                return
            data = memoryview(arena.block.numpy())  # pyright: ignore[reportArgumentType]
            header = json.dumps(
                {
                    "__metadata__": {"matryoshka": about, "crc32": f"{zlib.crc32(data):08x}"},
                    **arena.entries,
                }
            ).encode()
            header += b" " * (-len(header) % 8)
            path = self.folder / f"step_{step}.safetensors"
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, len(header).to_bytes(8, "little"), header, data)
            _name(path, best)
            for old in _steps(self.folder)[self.keep_last :]:
                old.unlink(missing_ok=True)
        except OSError as error:
            self._problems.append(
                f"checkpoint of step {step} not written: {error.strerror or error}"
            )
        except Exception as error:  # a thread's exception would be lost
            self._problems.append(
                f"checkpoint of step {step} not written: {type(error).__name__}: {error}"
            )


def _name(path: Path, best: bool) -> None:
    for name in ("best", "last") if best else ("last",):
        _link(path, path.with_name(f"{name}.safetensors"))


def _link(path: Path, name: Path) -> None:
    """`name` becomes another name of `path`, at once; a copy where the file system has no hard
    links.
    """
    temporary = name.with_name(f".{name.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
        os.replace(temporary, name)
    except PermissionError:  # what FAT, some network volumes and containers answer
        write_atomically(name, path.read_bytes())
    finally:
        temporary.unlink(missing_ok=True)


def _steps(folder: Path) -> list[Path]:
    """step_N files, the newest first."""
    found = [
        (int(m[1]), path)
        for path in folder.glob("step_*.safetensors")
        if (m := re.fullmatch(r"step_(\d+)\.safetensors", path.name))
    ]
    return [path for _, path in sorted(found, reverse=True)]


def forget_after(folder: Path, step: int) -> None:
    """Remove checkpoints of later steps, which a run that goes on writes anew, and what killed
    writers left.
    """
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)
    for path in _steps(folder):
        if int(path.stem.removeprefix("step_")) > step:
            path.unlink(missing_ok=True)


def newest(folder: Path) -> tuple[Saved | None, list[str]]:
    """(the newest checkpoint that is whole, what is wrong with those that are newer)."""
    notes = []
    for path in _steps(folder):
        try:
            return read(path), notes
        except CheckpointError as error:
            notes.append(str(error))
    last = folder / "last.safetensors"
    if last.exists():
        try:
            return read(last), notes
        except CheckpointError as error:
            notes.append(str(error))
    return None, notes


def about(path: Path) -> dict[str, Any]:
    """What a training checkpoint says about itself; its tensors are not read. CheckpointError if it
    is none.
    """
    try:
        with open(path, "rb") as file:
            return json.loads(_header(path, file)["__metadata__"]["matryoshka"])
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def _header(path: Path, file) -> dict[str, Any]:
    try:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size)) if size < 1 << 26 else None
        told = json.loads(header["__metadata__"]["matryoshka"])  # type: ignore[index]
    except (ValueError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not a whole training checkpoint") from error
    if told.get("format") != FORMAT or header is None:
        raise CheckpointError(f"{path}: not a training checkpoint (no {FORMAT} metadata)")
    return header


def read(path: Path) -> Saved:
    """A training checkpoint. CheckpointError where it is none, or not whole."""
    try:
        with open(path, "rb") as file:
            header = _header(path, file)
            data = bytearray(file.read())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    meta = header.pop("__metadata__")
    if f"{zlib.crc32(data):08x}" != meta.get("crc32"):
        raise CheckpointError(f"{path}: its checksum is wrong; it is damaged")
    whole = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    # copies: aligned as libraries expect it (torch.set_rng_state crashes otherwise), each free to
    # live on alone
    tensors = {name: _view(whole, entry).clone() for name, entry in header.items()}
    return Saved(path, json.loads(meta["matryoshka"]), tensors)
