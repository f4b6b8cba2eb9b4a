"""Safetensors files of this project: named tensors and a JSON object, all under checksums.

    write_atomically(path, *encode(tensors, {"format": ..., ...}))
    stored = read(path)                     # TensorFileError if a single bit is wrong
    stored.metadata, stored.tensors("model.")

safetensors itself has no checksum: a flipped bit is another weight, name or option. Every reader of
safetensors opens these files; they have three entries in its `__metadata__`:

    matryoshka       the JSON object, as text
    data_crc32       CRC-32 of the bytes after the header
    header_blake2b   BLAKE2b of the bytes before them, with the digits of this entry as zeros

Files of older versions have the first entry only, or `crc32` of the data beside it; they are read
as before, and `is_sealed` is False.
"""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from matryoshka.files import open_regular

if TYPE_CHECKING:
    import torch
    from torch import Tensor

KEY = "matryoshka"
DATA, HEADER, OLD_DATA = "data_crc32", "header_blake2b", "crc32"
# All entries that a file may have; `format` is added by other libraries. A file with another entry
# is refused: damage in the name of a checksum must not make a file one of an older version.
KNOWN = ({KEY}, {KEY, OLD_DATA}, {KEY, DATA, HEADER})
FOREIGN = {"format"}

MAX_HEADER = 1 << 26  # bytes: a damaged length must not allocate more
DIGEST_BYTES = 16
_BLANK = b"0" * (2 * DIGEST_BYTES)
# Quotes inside of a JSON text are escaped: this matches an entry, never a part of its neighbours.
_ENTRY = re.compile(rb'"%s": ?"([0-9a-f]{%d})"' % (HEADER.encode(), len(_BLANK)))
OLD_NOTE = "written by an older version: without a checksum, damage would not be noticed"


class TensorFileError(ValueError):
    """A file that is not whole; the message has no path."""


def dtypes() -> dict[str, torch.dtype]:
    """safetensors' names of the types that a file may have."""
    import torch  # here: the report reads the metadata alone, and torch takes seconds to import

    return {
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


# ---------------------------------------------------------------- writing


def encode_header(
    metadata: str, entries: Mapping[str, Mapping[str, Any]], data: bytes | memoryview
) -> bytes:
    """All bytes before `data`. entries: {name: safetensors' dtype, shape and data_offsets}."""
    own = {KEY: metadata, DATA: f"{zlib.crc32(data):08x}", HEADER: _BLANK.decode()}
    header = json.dumps({"__metadata__": own, **entries}).encode()
    header += b" " * (-len(header) % 8)  # safetensors aligns the data to 8 bytes
    start = len(header).to_bytes(8, "little") + header
    first, last = _digits(start)
    return start[:first] + _digest(start).encode() + start[last:]


def encode(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> list[bytes | memoryview]:
    """A file's content, in parts. tensors: contiguous, on the CPU."""
    from safetensors.torch import save

    content = memoryview(save(dict(tensors)))
    end = 8 + int.from_bytes(content[:8], "little")
    entries = json.loads(bytes(content[8:end]))
    entries.pop("__metadata__", None)
    data = content[end:]
    return [encode_header(json.dumps(metadata), entries, data), data]


def _digits(start: bytes) -> tuple[int, int]:
    """Where the digits of the header's checksum begin and end. TensorFileError without them."""
    found = list(_ENTRY.finditer(start))
    if len(found) != 1:
        raise TensorFileError("damaged: the checksum of its header cannot be found")
    return found[0].span(1)


def _digest(start: bytes) -> str:
    """The checksum of a length and a header."""
    first, last = _digits(start)
    blank = start[:first] + _BLANK + start[last:]
    return hashlib.blake2b(blank, digest_size=DIGEST_BYTES).hexdigest()


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class Header:
    """The verified start of a file.

    metadata: the JSON object; None if the file is not one of this project. entries: {name: dtype,
    shape and data_offsets}, unverified in a file that is not sealed. data_crc32: None in files that
    have no checksum. is_sealed: header and data are under checksums.
    """

    metadata: dict[str, Any] | None
    entries: dict[str, Any]
    data_crc32: str | None
    is_sealed: bool


@dataclass(frozen=True)
class Stored:
    """A verified file in memory."""

    metadata: dict[str, Any] | None
    is_sealed: bool
    _entries: dict[str, Any]
    _data: bytearray

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """The tensors whose names start with `prefix`, without it; on the CPU, each with memory of
        its own. TensorFileError for entries that do not describe the data.
        """
        import torch

        known = dtypes()
        block = torch.empty(0, dtype=torch.uint8)
        if self._data:
            block = torch.frombuffer(self._data, dtype=torch.uint8)
        found = {}
        end = 0
        for name, entry in sorted(self._entries.items(), key=lambda item: _offsets(item[1])):
            begin, following = _offsets(entry)
            if begin != end:
                raise TensorFileError("damaged: its tensors overlap, or leave a gap")
            end = following
            if not name.startswith(prefix):
                continue
            try:
                view = block[begin:end].view(known[entry["dtype"]]).view(entry["shape"])
            except (RuntimeError, TypeError, LookupError, OverflowError) as error:
                reason = str(error).splitlines()[0]
                raise TensorFileError(f"damaged: tensor {name!r}: {reason}") from None
            # Clones are aligned as libraries expect it (torch.set_rng_state crashes otherwise).
            found[name.removeprefix(prefix)] = view.clone()
        if end != len(self._data):
            raise TensorFileError(f"damaged: {len(self._data)} bytes of tensors, expected {end}")
        return found


def _offsets(entry: Any) -> tuple[int, int]:
    try:
        begin, end = entry["data_offsets"]
        if type(begin) is int and type(end) is int and 0 <= begin <= end:
            return begin, end
    except (TypeError, LookupError, ValueError):
        pass
    raise TensorFileError("damaged: a tensor without a place")


def read(path: str | Path) -> Stored:
    """Read and verify a file. OSError, or TensorFileError if it is not whole."""
    with open_regular(path) as file:
        header = read_header(file)
        data = bytearray(file.read())
    if header.data_crc32 is not None and f"{zlib.crc32(data):08x}" != header.data_crc32:
        raise TensorFileError("damaged: its checksum does not match its contents")
    return Stored(header.metadata, header.is_sealed, header.entries, data)


def is_safetensors(path: str | Path) -> bool:
    """Whether a file of any name, such as checkpoint/vit-4-ckpt.t7, starts as this format does."""
    with open_regular(path) as file:
        start = file.read(9)  # the length of a JSON object, and its brace
    return len(start) == 9 and start[8:] == b"{"


def read_header(file: BinaryIO) -> Header:
    """Read and verify the start of a file; its data follow. TensorFileError if it is damaged."""
    length = file.read(8)
    size = int.from_bytes(length, "little")
    text = file.read(size) if size <= MAX_HEADER else b""
    if len(length) < 8 or len(text) < size:
        raise TensorFileError("not a whole safetensors file")
    try:
        entries = json.loads(text)
        own = entries.pop("__metadata__", {})
        names = own.keys() - FOREIGN
    except (ValueError, AttributeError, TypeError, RecursionError):
        raise TensorFileError("not a whole safetensors file") from None
    if HEADER in own and _digest(length + text) != own[HEADER]:
        raise TensorFileError("damaged: the checksum of its header does not match")
    if KEY not in own:
        if names & {DATA, HEADER}:
            raise TensorFileError(f"damaged: its metadata lack the entry {KEY}")
        return Header(None, entries, None, is_sealed=False)
    if names not in KNOWN:
        raise TensorFileError(f"damaged: its metadata have the entries {', '.join(sorted(names))}")
    try:
        metadata = json.loads(own[KEY])
    except (ValueError, TypeError, RecursionError):
        raise TensorFileError("damaged: its metadata are not JSON") from None
    if not isinstance(metadata, dict):
        raise TensorFileError("damaged: its metadata are not a JSON object")
    return Header(metadata, entries, own.get(DATA, own.get(OLD_DATA)), is_sealed=HEADER in own)
