"""Values of the other fields of a .beton: numbers, bytes, JSON, arrays.

`BetonFile.field` calls these functions. Descriptors, records and the allocation table are not
trusted: they are compared with each other before a byte is read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import numpy as np

from matryoshka.data import layout

TYPE_NAMES = {
    layout.FLOAT: "float",
    layout.INT: "integer",
    layout.IMAGE: "image",
    layout.BYTES: "bytes",
    layout.NDARRAY: "array",
    layout.JSON: "JSON",
    layout.TENSOR: "tensor",
}
# arguments of an array's descriptor; `dtype` holds JSON text of `length` bytes
_ARGUMENTS = np.dtype([("shape", "<u8", 32), ("length", "<u8"), ("dtype", "V760")])
_PLAIN_DTYPE = re.compile(r"\|[biu]1|[<>](i[248]|u[248]|f[248]|c8|c16)")
_MAX_AXIS = 1 << 40  # more than any page holds; the product of 32 of them is still cheap

Fail = Callable[[str], NoReturn]


class Regions:
    """Lookup in the allocation table by position.

    table: rows of layout.TABLE_ROW that do not overlap, in any order, sizes > 0.
    """

    def __init__(self, table: np.ndarray) -> None:
        order = np.argsort(table["pointer"], kind="stable")
        self._pointer = table["pointer"][order]
        self._sample = table["sample"][order]
        self._size = table["size"][order]

    def sizes(self, sample: np.ndarray, pointer: np.ndarray) -> np.ndarray:
        """Size in bytes, uint64 [B], of the region of each sample that starts at `pointer`; 0 where
        no region of that sample starts there.
        """
        if not len(self._pointer):
            return np.zeros(len(pointer), np.uint64)
        # A pointer beyond the last region is compared with that region, and differs.
        at = np.minimum(np.searchsorted(self._pointer, pointer), len(self._pointer) - 1)
        found = (self._pointer[at] == pointer) & (self._sample[at] == sample.astype(np.uint64))
        return np.where(found, self._size[at], 0).astype(np.uint64)


class Column(NamedTuple):
    """One field of some samples.

    data: uint8 [N], the file. records: [B], the field's member of their records. samples: int64
    [B], for messages. fail: raises an error with the reason.
    """

    data: np.ndarray
    regions: Regions
    records: np.ndarray
    samples: np.ndarray
    fail: Fail


def array_type(arguments: bytes) -> tuple[np.dtype, tuple[int, ...]]:
    """(dtype, shape) from an array's descriptor; `arguments` are its last 1024 bytes.

    ValueError with the reason for any type but booleans, integers, floats and complex numbers.
    """
    row = np.frombuffer(arguments, _ARGUMENTS, 1)[0]
    shape = row["shape"].tolist()
    # The descriptor has room for 32 axes; zeros fill the unused ones.
    while shape and shape[-1] == 0:
        shape.pop()
    if any(not 0 < axis < _MAX_AXIS for axis in shape):
        raise ValueError(f"has an impossible shape {tuple(shape)}")
    length = int(row["length"])
    text = row["dtype"].tobytes()
    if not 0 < length <= len(text):
        raise ValueError(f"describes its type in {length} bytes")
    try:
        described = json.loads(text[:length].decode("ascii"))
    except (ValueError, RecursionError):
        raise ValueError("describes its type in text that is not JSON") from None
    match described:
        case [["", str() as name]] if _PLAIN_DTYPE.fullmatch(name):
            return np.dtype(name), tuple(shape)
    raise ValueError("has elements that are not plain numbers")


def read_numbers(column: np.ndarray) -> np.ndarray:
    """float64 or int64 [B], native byte order, from the records of a float or integer field."""
    return column.astype(column.dtype.newbyteorder("="))


def read_bytes(column: Column) -> list[np.ndarray]:
    """Read-only uint8 arrays, one per sample. records: (pointer, size)."""
    data, regions, records, samples, fail = column
    pointer = records["pointer"]
    size = records["size"]
    stored = regions.sizes(samples, pointer)
    wrong = (stored != size) & (size != 0)
    if wrong.any():
        k = int(wrong.argmax())
        fail(
            f"sample {samples[k]} records {size[k]} bytes at {pointer[k]}, where it has a region "
            "of "
            f"{stored[k]}"
        )
    values = []
    for start, length in zip(pointer.tolist(), size.tolist(), strict=True):
        # A value without bytes has no region, and its pointer has no meaning. Copies: a file that
        # is cut off later would make zeros of a view.
        value = data[start : start + length].copy() if length else np.empty(0, np.uint8)
        value.flags.writeable = False
        values.append(value)
    return values


def read_json(column: Column) -> list[Any]:
    """Python objects, one per sample, from JSON texts that end in NUL."""
    values = []
    for sample, content in zip(column.samples, read_bytes(column), strict=True):
        try:
            values.append(json.loads(content.tobytes().rstrip(b"\0").decode("utf-8")))
        except (ValueError, RecursionError) as error:
            column.fail(f"sample {sample} is not JSON: {error}")
    return values


def read_arrays(column: Column, arguments: bytes) -> np.ndarray:
    """[B, *shape] of the declared dtype. records: pointers. arguments: those of the descriptor."""
    data, regions, pointers, samples, fail = column
    try:
        dtype, shape = array_type(arguments)
    except ValueError as error:
        fail(str(error))
    expected = dtype.itemsize * math.prod(shape)
    stored = regions.sizes(samples, pointers)
    # Clipped, because `expected` of a hostile shape can exceed 64 bits.
    wrong = stored != min(expected, layout.MAX_PAGE + 1)
    if wrong.any():
        k = int(wrong.argmax())
        fail(
            f"sample {samples[k]} has a region of {stored[k]} bytes at {pointers[k]}, "
            f"{dtype.name} {shape} takes {expected}"
        )
    # without samples nothing was compared, and a hostile shape could be too large for an array
    if not len(samples) and expected > layout.MAX_PAGE:
        expected = 0
        shape = (0,)
    values = np.empty((len(samples), expected), np.uint8)
    for row, pointer in zip(values, pointers.tolist(), strict=True):
        row[:] = data[pointer : pointer + expected]
    return values.view(dtype).reshape(len(samples), *shape)
