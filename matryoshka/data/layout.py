"""The .beton file layout (FFCV, version 2), declared once for the writer and the reader.

    header | field descriptors | one metadata record per sample | zeros | pages | allocation table

Integers are little-endian, offsets count bytes from the start of the file. There is no magic number
and no checksum: a reader must validate everything (`reader.py`). docs/data_format.md explains the
parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import xxhash

VERSION = 2
MIN_PAGE = 1 << 21
MAX_PAGE = 1 << 31  # the largest power of two that fits into the header's 32 bits
DEFAULT_PAGE = 1 << 23

# Type numbers of fields. 255 is a class of the program that wrote the file; only that program can
# read its records.
FLOAT = 0
INT = 1
IMAGE = 2
BYTES = 3
NDARRAY = 4
JSON = 5
TENSOR = 6
CUSTOM = 255

# Values of an image record's mode.
JPG = 0
RAW = 1

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("table", "<u8"),  # written last: 0 marks a file that was never finished
    ]
)
DESCRIPTOR = np.dtype([("type", "u1"), ("name", "S16"), ("arguments", "V1024")])
TABLE_ROW = np.dtype([("sample", "<u8"), ("pointer", "<u8"), ("size", "<u8")])

_IMAGE_RECORD = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("pointer", "<u8")])
_SPAN_RECORD = np.dtype([("pointer", "<u8"), ("size", "<u8")])

# Type number -> (metadata of one sample, alignment inside the record).
FIELDS: dict[int, tuple[np.dtype, int]] = {
    FLOAT: (np.dtype("<f8"), 8),
    INT: (np.dtype("<i8"), 8),
    IMAGE: (_IMAGE_RECORD, 1),
    BYTES: (_SPAN_RECORD, 1),
    NDARRAY: (np.dtype("<u8"), 8),
    JSON: (_SPAN_RECORD, 1),
    TENSOR: (np.dtype("<u8"), 8),
}


class BetonError(ValueError):
    """A dataset cannot be read or written; the message names the file and the sample."""

    user_error = True  # programs print the message alone, without a traceback


def _kept() -> None:
    """The check of bytes that cannot be lost."""


class Samples(NamedTuple):
    """The stored images of a batch that are in one file; the native decoder's input.

    data: uint8 [N], a memory map or a buffer; sample b is data[offset[b] : offset[b] + size[b]].
    offset, size: uint64 [B]. mode: uint8 [B], JPG (a whole JPEG stream) or RAW (RGB, height x width
    x 3). width, height: int32 [B], pixels. rows: the positions of these B samples in the batch; the
    default is a whole batch in its order. check: call it after the last use of `data`; BetonError
    if the file has lost bytes meanwhile, in whose place the map has zeros.
    """

    data: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    mode: np.ndarray
    width: np.ndarray
    height: np.ndarray
    rows: slice | np.ndarray = slice(None)
    check: Callable[[], None] = _kept


def align(offset: int, alignment: int) -> int:
    """`offset` rounded up to a multiple of `alignment`."""
    return -(-offset // alignment) * alignment


def record_dtype(types: list[int]) -> np.dtype:
    """The dtype of one sample's metadata record, with the members f0, f1, ... in field order.

    Every member starts at a multiple of its alignment, and the record is padded to the largest
    alignment, as in a C struct. KeyError for an unknown type.
    """
    offsets = []
    end = 0
    for kind in types:
        member, alignment = FIELDS[kind]
        offsets.append(align(end, alignment))
        end = offsets[-1] + member.itemsize
    return np.dtype(
        {
            "names": [f"f{k}" for k in range(len(types))],
            "formats": [FIELDS[kind][0] for kind in types],
            "offsets": offsets,
            "itemsize": align(end, max(FIELDS[kind][1] for kind in types)),
        }
    )


def page_size_for(largest: int) -> int:
    """Page size in bytes: the default, or the next power of two that holds `largest` bytes.

    ValueError if that is more than MAX_PAGE.
    """
    size = max(DEFAULT_PAGE, 1 << (largest - 1).bit_length())
    if size > MAX_PAGE:
        raise ValueError(f"{largest} bytes do not fit into one page (at most {MAX_PAGE} bytes)")
    return size


class PageWriter:
    """Packs samples (image, label) into pages in the order they arrive, then writes the header,
    records and allocation table.

    write(data, offset) stores bytes in the file. most: the largest number of samples that will be
    added; their records come before the pages, so their room is reserved. page_size: bytes. count:
    samples so far. hashes: of every byte, once the file is finished: `first_page`, where its pages
    begin; `head` and `pages`, XXH3 with 128 bits of the bytes before and from there on.
    """

    def __init__(
        self, write: Callable[[bytes | bytearray, int], None], most: int, page_size: int
    ) -> None:
        self._write = write
        self._page_size = page_size
        self._fields = np.array([(IMAGE, b"image", b""), (INT, b"label", b"")], DESCRIPTOR)
        self._records = np.zeros(most, record_dtype([IMAGE, INT]))
        self._table = np.zeros(most, TABLE_ROW)
        # with fewer samples than `most`, zeros remain between the last record and the first page
        self._page_at = align(
            HEADER.itemsize + self._fields.nbytes + self._records.nbytes, page_size
        )
        self._first_page = self._page_at
        self._pages_hash = xxhash.xxh3_128()
        self._page = bytearray(page_size)
        self._used = 0
        self.count = 0
        self.hashes: dict[str, Any] = {}

    def add(
        self, payload: bytes | memoryview, mode: int, width: int, height: int, label: int
    ) -> None:
        """Append one sample. ValueError if `payload` is larger than a page."""
        size = len(payload)
        if size > self._page_size:
            raise ValueError(f"{size} bytes do not fit into a page of {self._page_size}")
        # A sample must not cross the end of a page: the rest of this page stays zeros.
        if self._used + size > self._page_size:
            self._close_page()
        pointer = self._page_at + self._used
        self._page[self._used : self._used + size] = payload
        self._records[self.count] = (mode, width, height, pointer), label
        self._table[self.count] = self.count, pointer, size
        self._used += size
        self.count += 1

    def _close_page(self) -> None:
        # The buffer still has bytes of the page before; equal sources must give equal files.
        self._page[self._used :] = bytes(self._page_size - self._used)
        self._write(self._page, self._page_at)
        self._pages_hash.update(self._page)
        self._page_at += self._page_size
        self._used = 0

    def finish(self) -> int:
        """Write the rest, the header last; return the size of the file in bytes."""
        self._close_page()
        table = self._table[: self.count].tobytes()
        self._write(table, self._page_at)
        self._pages_hash.update(table)
        metadata = self._fields.tobytes() + self._records[: self.count].tobytes()
        self._write(metadata, HEADER.itemsize)
        # Last: until now its bytes are zeros, which mark an unfinished file.
        values = (VERSION, len(self._fields), self._page_size, self.count, self._page_at)
        header = np.array(values, HEADER).tobytes()
        self._write(header, 0)

        head = xxhash.xxh3_128(header)
        head.update(metadata)
        head.update(bytes(self._first_page - len(header) - len(metadata)))
        self.hashes = {
            "first_page": self._first_page,
            "head": head.hexdigest(),
            "pages": self._pages_hash.hexdigest(),
        }
        return self._page_at + len(table)
