"""An independent .beton parser and builder, and small sources.

Written with struct from docs/data_format.md; it does not import matryoshka.data.layout.
"""

import io
import struct

import numpy as np
from PIL import Image

from matryoshka.data import layout

PAGE = 1 << 21


def parse(path):
    """page size, [(type, name)], [(mode, width, height, pointer, label)], [(sample, pointer,
    size)], bytes
    """
    data = path.read_bytes()
    version, num_fields, page, n, table = struct.unpack_from("<HHIQQ", data)
    fields = [struct.unpack_from("<B16s1024s", data, 24 + 1041 * k) for k in range(num_fields)]
    start = 24 + 1041 * num_fields
    records = [struct.unpack_from("<BHHQ3xq", data, start + 24 * i) for i in range(n)]
    rows = list(struct.iter_unpack("<QQQ", data[table:]))
    between = bytearray(data[start + 24 * n : table])
    for _, pointer, size in rows:
        assert pointer // page == (pointer + size - 1) // page
        at = pointer - start - 24 * n
        between[at : at + size] = bytes(size)
    assert (version, table % page, any(between)) == (2, 0, False)
    return page, [(t, name.rstrip(b"\0")) for t, name, _ in fields], records, rows, data


def build(path, fields, record, samples, table=list):
    """A file from [(type, name)], the struct format of a record, and its values; of bytes, the
    record gets the place and the file the content. `table` may reorder the allocation rows.
    """
    at = -(-(24 + 1041 * len(fields) + struct.calcsize(record) * len(samples)) // PAGE) * PAGE
    body, records, rows = b"", b"", []
    for i, values in enumerate(samples):
        placed = []
        for value in values:
            placed.append(at + len(body) if isinstance(value, bytes) else value)
            if isinstance(value, bytes):
                rows.append((i, at + len(body), len(value)))
                body += value
        records += struct.pack(record, *placed)
    body += bytes(-len(body) % PAGE)
    head = struct.pack("<HHIQQ", 2, len(fields), PAGE, len(samples), at + len(body))
    head += b"".join(struct.pack("<B16s1024s", kind, name, b"") for kind, name in fields) + records
    rows = b"".join(struct.pack("<QQQ", *row) for row in table(rows))
    path.write_bytes(head.ljust(at, b"\0") + body + rows)
    return path


class Files:
    """A source of (name, bytes or an exception to raise, label)."""

    def __init__(self, files, classes=("a", "b")):
        self.files, self.classes = files, list(classes)
        self.labels = np.array([label for *_, label in files], np.int64)

    def __len__(self):
        return len(self.files)

    def name(self, index):
        return self.files[index][0]

    def read(self, index):
        content = self.files[index][1]
        if isinstance(content, bytes):
            return content
        raise content


def photo(width, height, seed=0):
    """A smooth RGB picture: JPEG keeps it nearly as it is."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def pngs(n, seed=0, size=(40, 30)):
    return Files(
        [(f"{i % 2}/{i}.png", encoded(photo(*size, seed=seed + i)), i % 2) for i in range(n)]
    )


def raw_beton(path, sizes, seed=0):
    """A file of raw noise images of (width, height) `sizes`, in pages of 2 MiB."""
    rng = np.random.default_rng(seed)
    with open(path, "wb") as file:

        def write(data, offset):
            file.seek(offset)
            file.write(data)

        pages = layout.PageWriter(write, len(sizes), PAGE)
        for i, (width, height) in enumerate(sizes):
            pixels = rng.integers(0, 256, 3 * width * height, dtype=np.uint8)
            pages.add(pixels.data, layout.RAW, width, height, i % 10)
        pages.finish()
    return path
