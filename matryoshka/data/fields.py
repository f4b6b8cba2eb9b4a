"""The fields of a .beton beside image and label: numbers, bytes, JSON, arrays. `BetonFile.field`
calls this.

A descriptor, a record and an allocation table may say anything: what they say is compared before a
byte is read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any, NoReturn

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
_ARGUMENTS = np.dtype(
    [("shape", "<u8", 32), ("length", "<u8"), ("dtype", "V760")]
)  # of an array's descriptor
_PLAIN_DTYPE = re.compile(r"\|[biu]1|[<>](i[248]|u[248]|f[248]|c8|c16)")
_MAX_AXIS = 1 << 40  # beyond any page; the product of 32 such numbers is still a cheap integer

Fail = Callable[[str], NoReturn]


class Regions:
    """The allocation table by position: how many bytes start somewhere, and whose they are.

    table: rows of layout.TABLE_ROW that do not overlap, in any order, sizes > 0.
    """

    def __init__(self, table: np.ndarray) -> None:
        order = np.argsort(table["pointer"], kind="stable")
        self._pointer, self._sample, self._size = (
            table[key][order] for key in ("pointer", "sample", "size")
        )

    def sizes(self, sample: np.ndarray, pointer: np.ndarray) -> np.ndarray:
        """Bytes uint64 [B] of each sample's region that starts at pointer, 0 where it has none
        there.
        """
        if not len(self._pointer):
            return np.zeros(len(pointer), np.uint64)
        at = np.minimum(np.searchsorted(self._pointer, pointer), len(self._pointer) - 1)
        found = (self._pointer[at] == pointer) & (self._sample[at] == sample.astype(np.uint64))
        return np.where(found, self._size[at], 0).astype(np.uint64)


def array_type(arguments: bytes) -> tuple[np.dtype, tuple[int, ...]]:
    """(dtype, shape) from the 1024 bytes of arguments of an array's descriptor.

    ValueError with the reason for anything but plain booleans, integers, floats and complex
    numbers.
    """
    row = np.frombuffer(arguments, _ARGUMENTS, 1)[0]
    shape = row["shape"].tolist()
    while shape and shape[-1] == 0:
        shape.pop()
    if any(not 0 < axis < _MAX_AXIS for axis in shape):
        raise ValueError(f"has an impossible shape {tuple(shape)}")
    length, text = int(row["length"]), row["dtype"].tobytes()
    if not 0 < length <= len(text):
        raise ValueError(f"describes its type in {length} bytes")
    try:
        described = json.loads(text[:length].decode("ascii"))
    except (ValueError, RecursionError):
        raise ValueError("describes its type in something that is not JSON") from None
    match described:
        case [["", str() as name]] if _PLAIN_DTYPE.fullmatch(name):
            return np.dtype(name), tuple(shape)
    raise ValueError("has elements that are not plain numbers")


def read_numbers(column: np.ndarray) -> np.ndarray:
    """float64 or int64 [B] from the record members of a float or integer field."""
    return column.astype(column.dtype.newbyteorder("="))


def read_bytes(
    data: np.ndarray, regions: Regions, column: np.ndarray, samples: np.ndarray, fail: Fail
) -> list[np.ndarray]:
    """Read-only uint8 views, one for each sample. column: records (pointer, size)."""
    pointer, size = column["pointer"], column["size"]
    stored = regions.sizes(samples, pointer)
    for k in np.flatnonzero((stored != size) & (size != 0))[:1]:
        fail(
            f"sample {samples[k]} says {size[k]} bytes at {pointer[k]}, where it has a region of "
            f"{stored[k]}"
        )
    # a value without bytes has no region, and its pointer means nothing
    return [
        data[p : p + s] if s else data[:0]
        for p, s in zip(pointer.tolist(), size.tolist(), strict=True)
    ]


def read_json(
    data: np.ndarray, regions: Regions, column: np.ndarray, samples: np.ndarray, fail: Fail
) -> list[Any]:
    """Python objects from JSON texts that end in NUL."""
    values = []
    for sample, content in zip(
        samples, read_bytes(data, regions, column, samples, fail), strict=True
    ):
        try:
            values.append(json.loads(content.tobytes().rstrip(b"\0").decode("utf-8")))
        except (ValueError, RecursionError) as error:
            fail(f"sample {sample} is not JSON: {error}")
    return values


def read_arrays(
    data: np.ndarray,
    regions: Regions,
    column: np.ndarray,
    samples: np.ndarray,
    fail: Fail,
    arguments: bytes,
) -> np.ndarray:
    """[B, *shape] of the declared dtype. column: pointers; arguments: of the field's descriptor."""
    try:
        dtype, shape = array_type(arguments)
    except ValueError as error:
        fail(str(error))
    expected = dtype.itemsize * math.prod(shape)
    stored = regions.sizes(samples, column)
    for k in np.flatnonzero(stored != min(expected, layout.MAX_PAGE + 1))[:1]:
        fail(
            f"sample {samples[k]} has a region of {stored[k]} bytes at {column[k]}, "
            f"{dtype.name} {shape} takes {expected}"
        )
    if not len(samples):  # nothing was compared: the shape may be anything
        expected, shape = (0, (0,)) if expected > layout.MAX_PAGE else (expected, shape)
    values = np.empty((len(samples), expected), np.uint8)
    for row, pointer in zip(values, column.tolist(), strict=True):
        row[:] = data[pointer : pointer + expected]
    return values.view(dtype).reshape(len(samples), *shape)
