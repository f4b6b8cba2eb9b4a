"""Memory-mapped .beton reader with full validation.

    data = BetonFile("train.beton")
    (samples,) = data.fetch(np.array([3, 1, 2]))     # where the stored images are
    labels = data.labels[[3, 1, 2]]

Opening reads the metadata and the allocation table, never an image. In a file that passes, no
sample points outside its bytes; the contents of a JPEG stream are validated by the decoder.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from matryoshka import json_files
from matryoshka.arrays import integers, takes
from matryoshka.data import _native, fields, layout
from matryoshka.data.fingerprint import Content, hash_beton, joined
from matryoshka.data.layout import BetonError, Samples
from matryoshka.data.pages import MapFeed, PagedFile
from matryoshka.files import open_regular

PART = 1 << 16  # rows of metadata that are checked together: bounds the memory of opening


def manifest_path(path: str | os.PathLike) -> Path:
    """The side file of a .beton: `<file>.json`."""
    return Path(f"{os.fspath(path)}.json")


def printable(text: str) -> str:
    """Escape control characters and line ends, so that text from a file is safe on a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _not_empty(rows: np.ndarray) -> np.ndarray:
    """Drop the regions of empty values: they have no bytes, and their position has no meaning."""
    return rows if rows["size"].all() else rows[rows["size"] > 0]


class BetonFile:
    """An opened and validated .beton file, as a dataset.

    fields: [(name, type number)], see layout.py.
    labels: int64 [N], the Int field called "label", else the first Int field.
    width, height: int32 [N], pixels.
    mode: uint8 [N], layout.JPG or layout.RAW.
    offset, size: uint64 [N], the bytes of each image in the file.
    manifest: the content of the side file, or None.
    classes: names by label, or None.
    num_classes: len(classes); without names the largest label + 1.

    BetonError for anything but a complete, consistent .beton file with an image field.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        file = self._open()
        self._map: _native.FileMap | None = file
        self._data = file.data
        self._size = len(self._data)
        self._by_position: fields.Regions | None = None  # created by the first `field`
        self._read_header()
        self._read_fields()
        self._read_samples()
        self._check_whole(file)
        self._read_manifest()

    # ---------------------------------------------------------------- use

    def __len__(self) -> int:
        return self._num_samples

    @property
    def labels(self) -> np.ndarray:
        if self._labels is None:
            raise self._error("has no integer field that could be the label")
        return self._labels

    @property
    def num_classes(self) -> int:
        return len(self.classes) if self.classes is not None else max(int(self.labels.max()) + 1, 0)

    @takes(indices=integers("B"))
    def fetch(self, indices: np.ndarray) -> list[Samples]:
        """The stored images of `indices` (int64 [B]): one Samples of places in the memory map.

        IndexError for an index outside the file, BetonError if the file was closed or has been
        truncated.
        """
        file = self._check_open()
        samples = Samples(
            data=self._data,
            offset=self.offset[indices],
            size=self.size[indices],
            mode=self.mode[indices],
            width=self.width[indices],
            height=self.height[indices],
            check=partial(self._check_whole, file),
        )
        return [samples]

    def feed(self, batches: list[np.ndarray], unreadable: dict[int, str] | None = None) -> MapFeed:
        return MapFeed(self.fetch, batches)

    def pages(self) -> np.ndarray:
        """The page that holds each sample's image, int64 [N]."""
        # A region never crosses the end of a page (_checked): its first byte decides.
        shift = np.uint64(self.page_size.bit_length() - 1)
        return (self.offset >> shift).astype(np.int64)

    def paged(self) -> PagedFile:
        """The file for reads by offset, which need no map."""
        return PagedFile(self)

    @takes(indices=integers("B"))
    def field(self, name: str, indices: np.ndarray) -> Any:
        """The values of a field for the samples `indices` (int64 [B]).

        float -> float64 [B]; integer -> int64 [B]; bytes -> list of read-only uint8 [n]; JSON ->
        list of objects; array and tensor -> [B, *shape] of the stored dtype.

        IndexError for an index outside the file. BetonError for an unknown field, for the image
        (use `fetch`), for damage, and if the file was closed.
        """
        file = self._check_open()
        names = [known for known, _ in self.fields]
        if name not in names:
            raise self._error(f"has no field {name!r}; it has {', '.join(map(repr, names))}")
        k = names.index(name)
        kind = self.fields[k][1]
        if kind == layout.IMAGE:
            raise self._error(
                f"field {name!r} holds images: fetch() finds them, a Loader decodes them"
            )
        samples = np.arange(len(self))[indices]  # negative ones count from the end, as in fetch
        records = self._records()[f"f{k}"][samples]
        if kind in (layout.FLOAT, layout.INT):
            numbers = fields.read_numbers(records)
            self._check_whole(file)
            return numbers

        def fail(reason: str) -> NoReturn:
            raise self._error(f"field {name!r}: {reason}")

        # Built on demand: training reads images and labels only, which need no table.
        if self._by_position is None:
            self._by_position = fields.Regions(self._regions())
        column = fields.Column(self._data, self._by_position, records, samples, fail)
        if kind == layout.BYTES:
            values = fields.read_bytes(column)
        elif kind == layout.JSON:
            values = fields.read_json(column)
        else:
            arguments = self._descriptors()[k]["arguments"].tobytes()
            values = fields.read_arrays(column, arguments)
        self._check_whole(file)
        return values

    @property
    def page_size(self) -> int:
        return self._page_size

    @property
    def num_bytes(self) -> int:
        return self._size

    def fingerprint(self) -> int:
        """Checksum of the image sizes, which differ between datasets."""
        return zlib.crc32(self.size.tobytes())

    def content(self) -> Content:
        """Metadata of all images, bytes of some; and the writer's hash of all bytes, while the side
        file that has it is of this file. BetonError if the file cannot be read.
        """
        columns = (self._labels, self.width, self.height, self.mode)
        try:
            sampled = hash_beton(self.path, self.offset, self.size, columns)
        except OSError as error:
            raise self._error(f"cannot be read: {error.strerror}") from error
        written = self.written_hashes()
        whole = None
        if written is not None and written.get("sampled") == sampled and self._is_older():
            whole = joined(written["head"], written["pages"])
        return Content(sampled, whole)

    def written_hashes(self) -> dict[str, Any] | None:
        """`xxh3_128` of the side file: hashes that the writer left, see layout.PageWriter; None
        without.
        """
        written = (self.manifest or {}).get("xxh3_128")
        kinds = {"first_page": int, "head": str, "pages": str, "sampled": str}
        if not isinstance(written, dict):
            return None
        is_whole = all(isinstance(written.get(name), kind) for name, kind in kinds.items())
        return written if is_whole else None

    def _is_older(self) -> bool:
        """Whether the file has not been written to since its side file was."""
        try:
            written = os.stat(self.path).st_mtime_ns
            return written <= os.stat(manifest_path(self.path)).st_mtime_ns
        except OSError:
            return False

    def name(self, index: int) -> str:
        """A sample's name for messages; includes the original file name if the side file has it."""
        names = (self.manifest or {}).get("names")
        original = f" ({printable(names[index])})" if names else ""
        return f"sample {index}{original}"

    def preload(self) -> None:
        """Ask the system to read the whole file into the page cache, in the background."""
        if self._map is not None:
            self._map.expect()

    def close(self) -> None:
        """Close the file. Batches fetched before stay valid: the map lives as long as they do."""
        self._map = None
        self._data = np.empty(0, np.uint8)

    def __enter__(self) -> BetonFile:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # ---------------------------------------------------------------- checks

    def _check_open(self) -> _native.FileMap:
        if self._map is None:
            raise self._error("is closed")
        self._check_whole(self._map)
        return self._map

    def _check_whole(self, file: _native.FileMap) -> None:
        """BetonError if the file has lost bytes since it was opened: readers may find zeros."""
        now = file.begin_reading()
        if now < self._size:
            raise self._error(f"was truncated while in use: {now} of {self._size} bytes are left")
        if file.torn:
            raise self._error("was truncated while in use, or its disk failed; open it again")

    def _error(self, reason: str) -> BetonError:
        return BetonError(f"{self.path}: {reason}")

    def _open(self) -> _native.FileMap:
        try:
            with open_regular(self.path) as file:
                size = os.fstat(file.fileno()).st_size
                if size < layout.HEADER.itemsize:
                    raise self._error(
                        f"is not a .beton file: {size} bytes are fewer than its header"
                    )
                # The map stays valid after the file is closed.
                return _native.FileMap(file.fileno())
        except OSError as error:
            raise self._error(error.strerror or str(error)) from error

    def _rows(self, dtype: np.dtype, offset: int, count: int) -> np.ndarray:
        return np.frombuffer(self._data, dtype, count, offset)

    def _descriptors(self) -> np.ndarray:
        return self._rows(layout.DESCRIPTOR, layout.HEADER.itemsize, self._num_fields)

    def _records(self) -> np.ndarray:
        return self._rows(self._record, self._fields_end, self._num_samples)

    def _read_header(self) -> None:
        header = self._rows(layout.HEADER, 0, 1)[0]
        # Python integers: sums and products of hostile values must not wrap around.
        version = int(header["version"])
        self._page_size = int(header["page_size"])
        self._num_fields = int(header["num_fields"])
        self._num_samples = int(header["num_samples"])
        self._table = int(header["table"])
        size = self._size
        if version != layout.VERSION:
            raise self._error(
                f"is not a .beton file of version {layout.VERSION} (its first two bytes are "
                f"{version})"
            )
        if self._table == 0:
            raise self._error(
                "was never finished: its writer stopped before the end; write it again"
            )
        power_of_two = self._page_size & (self._page_size - 1) == 0
        if not power_of_two or not layout.MIN_PAGE <= self._page_size <= layout.MAX_PAGE:
            raise self._error(
                f"page size {self._page_size} is not a power of two from 2 MiB to 2 GiB"
            )
        if self._num_fields == 0 or self._num_samples == 0:
            raise self._error(f"is empty: {self._num_fields} fields, {self._num_samples} samples")
        self._fields_end = layout.HEADER.itemsize + self._num_fields * layout.DESCRIPTOR.itemsize
        if self._fields_end > size:
            raise self._error(
                f"is cut off: {self._num_fields} field descriptors do not fit into {size} bytes"
            )
        if self._table > size:
            raise self._error(
                f"is cut off: its allocation table is at byte {self._table}, it has {size}"
            )
        if (size - self._table) % layout.TABLE_ROW.itemsize:
            raise self._error(
                f"is cut off: the {size - self._table} bytes of its allocation table are not "
                "whole rows"
            )
        if size == self._table:
            raise self._error("was never finished: its allocation table is empty; write it again")

    def _read_fields(self) -> None:
        self.fields: list[tuple[str, int]] = []
        for row in self._descriptors():
            name = row["name"].decode("ascii", "backslashreplace")
            kind = int(row["type"])
            if kind == layout.CUSTOM:
                raise self._error(
                    f"field {name!r} has a custom type, which only the program that wrote it can "
                    "read"
                )
            if kind not in layout.FIELDS:
                raise self._error(f"field {name!r} has the unknown type {kind}")
            self.fields.append((name, kind))
        self._image = self._field(layout.IMAGE, "image")
        if self._image is None:
            raise self._error(
                f"has no image field, only {', '.join(repr(name) for name, _ in self.fields)}"
            )

    def _field(self, kind: int, preferred: str) -> str | None:
        """The record member of the field of this type: the one called `preferred`, else the first;
        None if the file has no field of this type.
        """
        first = None
        for k, (name, type_number) in enumerate(self.fields):
            if type_number != kind:
                continue
            if name == preferred:
                return f"f{k}"
            first = first or f"f{k}"
        return first

    def _read_samples(self) -> None:
        self._record = layout.record_dtype([kind for _, kind in self.fields])
        self._records_end = self._fields_end + self._num_samples * self._record.itemsize
        if self._records_end > self._table:
            raise self._error(
                f"metadata of {self._num_samples} samples ends at byte {self._records_end}, "
                f"after the start of the allocation table ({self._table})"
            )
        label = self._field(layout.INT, "label")
        n = self._num_samples
        self._labels = None if label is None else np.empty(n, np.int64)
        self.width = np.empty(n, np.int32)
        self.height = np.empty(n, np.int32)
        self.mode = np.empty(n, np.uint8)
        self.offset = np.empty(n, np.uint64)
        self.size = np.zeros(n, np.uint64)
        for part, records in self._parts(self._record, self._fields_end, n):
            if self._labels is not None:
                self._labels[part] = records[label]
            image = records[self._image]
            self.width[part] = image["width"]
            self.height[part] = image["height"]
            self.mode[part] = image["mode"]
            self.offset[part] = image["pointer"]
        self._reject((self.width == 0) | (self.height == 0), "has no pixels (width or height is 0)")
        self._reject(self.mode > layout.RAW, "has an unknown mode (neither jpg nor raw)")
        self._read_table()
        self._reject(self.size == 0, "points to bytes that are not the start of one of its regions")
        # A JPEG stream has its own size, which the decoder compares; raw pixels have none.
        for start in range(0, n, PART):
            part = slice(start, start + PART)
            pixels = self.width[part].astype(np.uint64) * self.height[part].astype(np.uint64)
            wrong = (self.mode[part] == layout.RAW) & (self.size[part] != 3 * pixels)
            which = np.arange(start, start + len(wrong))
            self._reject(
                wrong, "is stored raw in a region that is not 3 x width x height bytes", which
            )

    def _reject(self, wrong: np.ndarray, reason: str, sample: np.ndarray | None = None) -> None:
        """BetonError for the first True of `wrong`. sample: the sample of each of its rows; the
        default is the row's position.
        """
        if wrong.any():
            first = int(wrong.argmax())
            raise self._error(f"sample {first if sample is None else sample[first]} {reason}")

    def _parts(
        self, dtype: np.dtype, offset: int, count: int
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield (slice, rows) for all `count` rows, part by part.

        The pages of the map that were read are released after each part, so opening a file needs
        little memory.
        """
        for start in range(0, count, PART):
            part = slice(start, min(start + PART, count))
            begin = offset + start * dtype.itemsize
            end = offset + part.stop * dtype.itemsize
            yield part, self._rows(dtype, begin, part.stop - start)
            if self._map is not None:
                self._map.forget(begin, end - begin)

    def _table_rows(self) -> int:
        return (self._size - self._table) // layout.TABLE_ROW.itemsize

    def _read_table(self) -> None:
        """Set `size` of every image from its sample's region that starts at `offset`; check all
        regions.
        """
        ordered = True  # by position, which makes overlaps visible in one pass
        end = np.uint64(0)
        for _, part in self._parts(layout.TABLE_ROW, self._table, self._table_rows()):
            rows = self._checked(_not_empty(part))
            sample = rows["sample"]
            pointer = rows["pointer"]
            size = rows["size"]
            is_image = pointer == self.offset[sample]  # the other regions belong to other fields
            self.size[sample[is_image]] = size[is_image]
            if len(rows) and ordered:
                ends = np.concatenate([[end], pointer + size])
                ordered = bool((pointer >= ends[:-1]).all())
                end = ends[-1]
        if not ordered:  # FFCV writes the table in the order in which its workers finish
            rows = self._regions()
            pointer = rows["pointer"]
            order = np.argsort(pointer, kind="stable")
            pointer = pointer[order]
            size = rows["size"][order]
            self._reject(
                pointer[1:] < pointer[:-1] + size[:-1],
                "has a region that overlaps the next one",
                rows["sample"][order],
            )

    def _checked(self, rows: np.ndarray) -> np.ndarray:
        """`rows`, after a check that each region is inside the pages and inside one of them."""
        sample = rows["sample"]
        pointer = rows["pointer"]
        size = rows["size"]
        self._reject(sample >= self._num_samples, "of the allocation table does not exist", sample)
        # `size > table - pointer`, because `pointer + size` could exceed 64 bits.
        outside = (
            (pointer < self._records_end) | (pointer > self._table) | (size > self._table - pointer)
        )
        self._reject(
            outside,
            f"has a region outside the pages (bytes {self._records_end} to {self._table})",
            sample,
        )
        # A power of two: the upper bits of a position are the number of its page.
        shift = np.uint64(self._page_size.bit_length() - 1)
        crosses = (pointer >> shift) != ((pointer + size - np.uint64(1)) >> shift)
        self._reject(crosses, "has a region that crosses the end of a page", sample)
        return rows

    def _regions(self) -> np.ndarray:
        """The rows of the allocation table that hold bytes."""
        return _not_empty(self._rows(layout.TABLE_ROW, self._table, self._table_rows()))

    def _read_manifest(self) -> None:
        self.manifest: dict | None = None
        self.classes: list[str] | None = None
        path = manifest_path(self.path)
        try:
            with open_regular(path) as file:
                manifest, _ = json_files.decode(file.read())
        except FileNotFoundError:
            return
        except OSError as error:
            raise BetonError(f"{path}: cannot be read: {error.strerror}") from error
        except json_files.JsonFileError as error:
            raise BetonError(f"{path}: {error}") from None
        if not isinstance(manifest, dict):
            raise BetonError(f"{path}: is not a JSON object")
        self.manifest = manifest
        # The side file may have been left from another .beton of the same name.
        for key, actual in (("num_samples", len(self)), ("num_bytes", self._size)):
            if manifest.get(key, actual) != actual:
                raise BetonError(
                    f"{path}: describes another file ({key} is {manifest[key]}, not {actual}); "
                    "remove it, or write the data set again"
                )
        for key in ("classes", "names"):
            value = manifest.get(key)
            if value is not None and not (
                isinstance(value, list) and all(isinstance(v, str) for v in value)
            ):
                raise BetonError(f"{path}: {key} is not a list of strings")
        self.classes = manifest.get("classes")
        if len(manifest.get("names") or self.mode) != len(self):
            raise BetonError(
                f"{path}: names has {len(manifest['names'])} entries for {len(self)} samples"
            )
        if self.classes is not None and self._labels is not None:
            self._reject(
                self._labels >= len(self.classes),
                f"has a label beyond the {len(self.classes)} names in {path}",
            )
