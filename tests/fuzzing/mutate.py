"""Mutations of .beton files, one function per kind of damage.

    draft = bases()[0].copy()
    apply(draft, "table: a size is wrong", random.Random(1))
    draft.write(path)

Each kind declares its possible effect on the pixels of a file that still opens and decodes: none
("same"), a change that the new values legally cause ("legal"), or a change that no reader can
detect, because the format has no checksum ("payload").
"""

import copy
import os
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import NamedTuple

from beton_files import PAGE

HUGE = [
    0,
    1,
    0x7FFF,
    0xFFFF,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**50,
    2**63 - 1,
    2**63,
    2**64 - 1,
]
ALL_FIELDS = [
    (2, b"image"),
    (1, b"label"),
    (0, b"weight"),
    (3, b"blob"),
    (5, b"info"),
    (4, b"array"),
    (6, b"tensor"),
]


class Layout(NamedTuple):
    """fields: [(type, name)]. record: struct format. image, label: offsets of these members in a
    record.
    """

    fields: list[tuple[int, bytes]]
    record: str
    image: int
    label: int | None


IMAGE_LABEL = Layout([(2, b"image"), (1, b"label")], "<BHHQ3xq", 0, 16)
LABEL_IMAGE = Layout([(1, b"label"), (2, b"image")], "<qBHHQ3x", 8, 0)
ALONE = Layout([(2, b"image")], "<BHHQ", 0, None)
EVERYTHING = Layout(ALL_FIELDS, "<BHHQ3xqdQQQQQQ", 0, 16)


class Draft:
    """A .beton in parts that mutations change: head (header, descriptors, records), body (the
    pages), rows (the allocation table).
    """

    def __init__(self, layout: Layout, content: bytes) -> None:
        self.layout = layout
        self.size = struct.calcsize(layout.record)
        self.records = 24 + 1041 * len(layout.fields)
        _, _, _, self.n, self.table = struct.unpack_from("<HHIQQ", content)
        self.head = bytearray(content[: self.records + self.n * self.size])
        self.rows = [list(row) for row in struct.iter_unpack("<QQQ", content[self.table :])]
        self.body = bytearray(content[PAGE : max(p + s for _, p, s in self.rows)])
        self.cut: int | None = None
        pointers = [self.pointer(i) for i in range(self.n)]
        self.row_of = [next(k for k, row in enumerate(self.rows) if row[1] == p) for p in pointers]
        self.places = [(p, self.rows[k][2]) for p, k in zip(pointers, self.row_of, strict=True)]

    def copy(self) -> "Draft":
        return copy.deepcopy(self)

    def at(self, i: int, member: int = 0) -> int:
        """Where a record's member is in the head; member: bytes behind the record's start."""
        return self.records + i * self.size + member

    def image(self, i: int) -> int:
        return self.at(i, self.layout.image)

    def pointer(self, i: int) -> int:
        return struct.unpack_from("<Q", self.head, self.image(i) + 5)[0]

    def is_raw(self, i: int) -> bool:
        return not self.stream(i).startswith(b"\xff\xd8")

    def stream(self, i: int) -> bytes:
        pointer, size = self.places[i]
        return bytes(self.body[pointer - PAGE : pointer - PAGE + size])

    def replace(self, i: int, data: bytes) -> None:
        """Another image for sample i; where its length changed it moves, and record and table
        follow.
        """
        pointer, size = self.places[i]
        if len(data) != size:
            pointer = PAGE + len(self.body)
            self.body += data
            struct.pack_into("<Q", self.head, self.image(i) + 5, pointer)
            if self.row_of[i] < len(self.rows):
                self.rows[self.row_of[i]][1:] = pointer, len(data)
        self.body[pointer - PAGE : pointer - PAGE + len(data)] = data
        self.places[i] = pointer, len(data)

    def boundaries(self) -> list[int]:
        """Where something begins or ends."""
        ends = [
            0,
            24,
            *range(24, self.records + 1, 1041),
            *range(self.records, len(self.head) + 1, self.size),
        ]
        ends += [end for pointer, size in self.places for end in (pointer, pointer + size)]
        return [*ends, PAGE, *range(self.table, self.table + 24 * len(self.rows) + 1, 24)]

    def write(self, path: str | os.PathLike) -> None:
        """A new file each time (an older one may be mapped), sparse."""
        Path(path).unlink(missing_ok=True)
        rows = b"".join(struct.pack("<QQQ", *(value % 2**64 for value in row)) for row in self.rows)
        table = max(self.table, PAGE + len(self.body))
        with open(path, "wb") as file:
            for place, data in ((0, self.head), (PAGE, self.body), (table, rows)):
                file.seek(place)
                file.write(data)
            file.truncate(self.cut if self.cut is not None else table + len(rows))


# ---------------------------------------------------------------- mutations


class Kind(NamedTuple):
    """change(draft, rng) returns False if it does not apply. pixels: see the module's docstring.
    labels: whether it may change labels.
    """

    change: Callable[[Draft, Random], object]
    pixels: str
    labels: bool


KINDS: dict[str, Kind] = {}


def kind(name: str, pixels: str = "same", labels: bool = False):
    def register(change):
        KINDS[name] = Kind(change, pixels, labels)
        return change

    return register


def apply(draft: Draft, name: str, rng: Random) -> bool:
    """Apply a mutation; False if the file has nothing that it could change."""
    return KINDS[name].change(draft, rng) is not False


def near(rng: Random, value: int, bits: int) -> int:
    """Another value: close to `value`, random, or extreme."""
    choice = rng.choice(
        [
            value + rng.choice([-24, -8, -2, -1, 1, 2, 8, 24, 1041]),
            value ^ 1 << rng.randrange(bits),
            rng.getrandbits(bits),
            rng.choice(HUGE),
        ]
    )
    return choice % 2**bits


def poke(data: bytearray, place: int, code: str, rng: Random, value: int | None = None) -> None:
    bits = 8 * struct.calcsize(code)
    old = struct.unpack_from("<" + code, data, place)[0]
    struct.pack_into(
        "<" + code, data, place, near(rng, old, bits) if value is None else value % 2**bits
    )


for _name, _place, _code in (
    ("version", 0, "H"),
    ("number of fields", 2, "H"),
    ("page size", 4, "I"),
    ("number of samples", 8, "Q"),
    ("start of the table", 16, "Q"),
):
    kind(f"header: {_name}")(
        lambda d, rng, place=_place, code=_code: poke(d.head, place, code, rng)
    )


@kind("header: another legal page size")
def _(d, rng):
    struct.pack_into("<I", d.head, 4, 1 << rng.randrange(21, 32))


@kind("header: one field or sample more or less")
def _(d, rng):
    place, code = rng.choice([(2, "H"), (8, "Q")])
    poke(
        d.head,
        place,
        code,
        rng,
        max(0, struct.unpack_from("<" + code, d.head, place)[0] + rng.choice([-1, 1])),
    )


@kind("descriptor: type", labels=True)
def _(d, rng):
    d.head[24 + 1041 * rng.randrange(len(d.layout.fields))] = rng.choice(
        [*range(8), 255, rng.randrange(256)]
    )


@kind("descriptor: name", labels=True)
def _(d, rng):
    place = 25 + 1041 * rng.randrange(len(d.layout.fields))
    d.head[place : place + 16] = rng.choice(
        [rng.randbytes(16), bytes(16), b"label".ljust(16, b"\0"), b"\x1b[2J\n" * 3 + b"x"]
    )


@kind("descriptor: arguments")
def _(d, rng):
    k = rng.randrange(len(d.layout.fields))
    for _ in range(rng.randint(1, 4)):
        place = (
            24
            + 1041 * k
            + 17
            + rng.choice([rng.randrange(40), 256 + rng.randrange(24), rng.randrange(1024)])
        )
        d.head[place] = rng.choice([0, 255, 91, rng.randrange(256)])


@kind("descriptor: two exchanged", labels=True)
def _(d, rng):
    a, b = (24 + 1041 * rng.randrange(len(d.layout.fields)) for _ in range(2))
    d.head[a : a + 1041], d.head[b : b + 1041] = d.head[b : b + 1041], d.head[a : a + 1041]


@kind("record: mode")
def _(d, rng):
    d.head[d.image(rng.randrange(d.n))] = rng.choice([0, 1, 1, 2, 255])


def _side(d, rng, raw):
    found = [i for i in range(d.n) if d.is_raw(i) == raw]
    if not found:
        return False
    place, i = rng.choice([1, 3]), rng.choice(found)
    w, h = struct.unpack_from("<HH", d.head, d.image(i) + 1)
    if rng.random() < 0.3:
        w, h = rng.choice([(h, w), (w * 2 & 0xFFFF, h // 2), (h * w & 0xFFFF, 1), (1, 1)])
        struct.pack_into("<HH", d.head, d.image(i) + 1, w, h)
    else:
        poke(d.head, d.image(i) + place, "H", rng)
    return True


kind("record: width or height of a jpg")(lambda d, rng: _side(d, rng, False))
kind("record: width or height of a raw image", "legal")(lambda d, rng: _side(d, rng, True))


@kind("record: pointer")
def _(d, rng):
    i = rng.randrange(d.n)
    other = rng.choice(
        [
            d.pointer(rng.randrange(d.n)),
            0,
            24,
            d.records,
            PAGE,
            PAGE - 1,
            d.table,
            d.table - 1,
            2**50,
        ]
    )
    poke(d.head, d.image(i) + 5, "Q", rng, rng.choice([None, other]))


@kind("record: label", labels=True)
def _(d, rng):
    return d.layout.label is not None and poke(
        d.head, d.at(rng.randrange(d.n), d.layout.label), "Q", rng
    )


@kind("record: any byte of another field")
def _(d, rng):
    if d.layout != EVERYTHING:
        return False
    return poke(d.head, d.at(rng.randrange(d.n), rng.randrange(24, d.size - 7, 8)), "Q", rng)


@kind("record: two exchanged", labels=True)
def _(d, rng):
    a, b = (d.at(rng.randrange(d.n)) for _ in range(2))
    d.head[a : a + d.size], d.head[b : b + d.size] = d.head[b : b + d.size], d.head[a : a + d.size]


@kind("two samples exchanged everywhere", "legal", labels=True)
def _(d, rng):
    a, b = rng.randrange(d.n), rng.randrange(d.n)
    x, y = d.at(a), d.at(b)
    d.head[x : x + d.size], d.head[y : y + d.size] = d.head[y : y + d.size], d.head[x : x + d.size]
    for row in d.rows:
        row[0] = {a: b, b: a}.get(row[0], row[0])


@kind("table: a sample is wrong")
def _(d, rng):
    row = rng.choice(d.rows)
    row[0] = rng.choice([near(rng, row[0], 64), rng.randrange(d.n)])


@kind("table: a start is wrong")
def _(d, rng):
    row = rng.choice(d.rows)
    row[1] = rng.choice([near(rng, row[1], 64), rng.choice(d.rows)[1], row[1] + rng.randint(-3, 3)])


@kind("table: a size is wrong")
def _(d, rng):
    row = rng.choice(d.rows)
    row[2] = rng.choice(
        [near(rng, row[2], 64), rng.choice(d.rows)[2], max(0, row[2] + rng.randint(-3, 3))]
    )


@kind("table: a member of two rows is exchanged")
def _(d, rng):
    a, b, k = rng.choice(d.rows), rng.choice(d.rows), rng.randrange(3)
    a[k], b[k] = b[k], a[k]


@kind("table: rows in another order")
def _(d, rng):
    rng.shuffle(d.rows)


@kind("table: a row twice")
def _(d, rng):
    d.rows.insert(rng.randrange(len(d.rows) + 1), list(rng.choice(d.rows)))


@kind("table: a row is missing")
def _(d, rng):
    return len(d.rows) > 1 and d.rows.pop(rng.randrange(len(d.rows)))


@kind("table: a row of nothing")
def _(d, rng):
    d.rows.insert(
        rng.randrange(len(d.rows) + 1), [rng.choice([0, d.n, 2**64 - 1]), rng.choice(HUGE), 0]
    )


@kind("table: a row in a free place")
def _(d, rng):
    d.rows.append(
        [
            rng.randrange(d.n),
            rng.choice([d.table - 9, PAGE + len(d.body), 2**40]),
            rng.randint(1, 9),
        ]
    )


@kind("file: cut at a boundary")
def _(d, rng):
    d.cut = max(0, rng.choice(d.boundaries()) + rng.choice([-1, 0, 0, 1]))


@kind("file: cut anywhere")
def _(d, rng):
    d.cut = rng.randrange(d.table + 24 * len(d.rows))


@kind("file: bytes behind the end")
def _(d, rng):
    d.cut = d.table + 24 * len(d.rows) + rng.choice([1, 23, 24, 48, PAGE])


@kind("file: flipped bits in the head", labels=True)
def _(d, rng):
    for _ in range(rng.randint(1, 4)):
        end = d.records if rng.random() < 0.2 else len(d.head)
        start = 24 if end == d.records else d.records
        place = rng.choice([rng.randrange(24), rng.randrange(start, end)])
        d.head[place] ^= 1 << rng.randrange(8)
