"""Mutations of the images of a Draft: marker segments, restart markers, entropy data, pixels."""

import struct
from random import Random

from mutate import Draft, kind

SOF, DHT, DQT, SOS, DRI, APP0, COM = (0xC0, 0xC1, 0xC2), 0xC4, 0xDB, 0xDA, 0xDD, 0xE0, 0xFE


def segments(data: bytes) -> list[tuple[int, int, int]]:
    """(marker, start, end) up to the first scan's header (T.81, Annex B)."""
    found, at = [], 2
    while at + 4 <= len(data) and data[at] == 0xFF and (not found or found[-1][0] != SOS):
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        found.append((data[at + 1], at, end))
        at = end
    return found


def jpeg(name: str, pixels: str = "same"):
    """Register a mutation of one JPEG: change(data, rng, segments, draft, sample) returns the new
    bytes, or None if it does not apply.
    """

    def register(change):
        def on_draft(draft: Draft, rng: Random):
            found = [i for i in range(draft.n) if not draft.is_raw(i)]
            if not found:
                return False
            i = rng.choice(found)
            data = draft.stream(i)
            parts = segments(data)
            if not parts or parts[-1][0] != SOS or parts[-1][2] + 4 > len(data):
                return False  # an earlier mutation has destroyed the structure
            try:
                changed = change(bytearray(data), rng, parts, draft, i)
            except (ValueError, IndexError, struct.error):
                return False  # an earlier mutation has made a segment too short for this one
            return False if changed is None else draft.replace(i, bytes(changed))

        kind(f"jpeg: {name}", pixels)(on_draft)
        return change

    return register


def one(rng, parts, markers):
    found = [part for part in parts if part[0] in markers]
    return rng.choice(found) if found else None


def restarts(data: bytes, start: int) -> list[int]:
    """Offsets of the restart markers in the entropy-coded data."""
    return [
        k for k in range(start, len(data) - 1) if data[k] == 0xFF and 0xD0 <= data[k + 1] <= 0xD7
    ]


# ---------------------------------------------------------------- marker segments


@jpeg("restart interval changed")
def _(data, rng, parts, *_):
    part = one(rng, parts, (DRI,))
    if part is None:
        return None
    old = struct.unpack_from(">H", data, part[1] + 4)[0]
    struct.pack_into(
        ">H",
        data,
        part[1] + 4,
        rng.choice([0, 1, old + 1, max(0, old - 1), 2 * old, 65535]) & 0xFFFF,
    )
    return data


@jpeg("restart interval where there are no markers")
def _(data, rng, parts, *_):
    if one(rng, parts, (DRI,)):
        return None
    at = rng.choice(parts)[1]
    return (
        data[:at] + struct.pack(">HHH", 0xFFDD, 4, rng.choice([1, 2, 3, 4, 8, 65535])) + data[at:]
    )


@jpeg("restart interval removed")
def _(data, rng, parts, *_):
    part = one(rng, parts, (DRI,))
    return part and data[: part[1]] + data[part[2] :]


@jpeg("two restart intervals")
def _(data, rng, parts, *_):
    at = rng.choice(parts)[1]
    return data[:at] + struct.pack(">HHH", 0xFFDD, 4, rng.choice([0, 1, 2, 3, 9])) + data[at:]


def _frame(data, rng, parts):
    """(place of height and width, old height, old width)"""
    part = one(rng, parts, SOF)
    return part and (part[1] + 5, *struct.unpack_from(">HH", data, part[1] + 5))


def _other_size(rng, height, width):
    change = rng.choice([-16, -8, -1, 1, 8, 16, 64])
    sizes = [
        (height + change, width),
        (height, width + change),
        (width, height),
        (0, width),
        (height, 0),
    ]
    sizes += [
        (65535, width),
        (height, 65535),
        (65500, 65500),
        (2 * height, width),
        (height, width // 2),
    ]
    return rng.choice(sizes)


@jpeg("frame size")
def _(data, rng, parts, *_):
    frame = _frame(data, rng, parts)
    if frame is None:
        return None
    height, width = _other_size(rng, *frame[1:])
    struct.pack_into(">HH", data, frame[0], height & 0xFFFF, width & 0xFFFF)
    return data


@jpeg("frame size, and the record agrees", "legal")
def _(data, rng, parts, draft, i):
    frame = _frame(data, rng, parts)
    if frame is None:
        return None
    height, width = (side & 0xFFFF for side in _other_size(rng, *frame[1:]))
    struct.pack_into(">HH", data, frame[0], height, width)
    struct.pack_into("<HH", draft.head, draft.image(i) + 1, width, height)
    return data


@jpeg("sampling factors, components, table numbers of the frame", "legal")
def _(data, rng, parts, *_):
    part = one(rng, parts, SOF)
    if part is None:
        return None
    place = rng.choice([part[1] + 4, part[1] + 9, *range(part[1] + 10, part[2])])
    data[place] = rng.choice(
        [
            0,
            1,
            2,
            3,
            4,
            0x11,
            0x12,
            0x14,
            0x21,
            0x22,
            0x24,
            0x41,
            0x42,
            0x44,
            255,
            rng.randrange(256),
        ]
    )
    return data


@jpeg("sampling factors of luma", "legal")
def _(data, rng, parts, *_):
    part = one(rng, parts, SOF)
    if part is None:
        return None
    data[part[1] + 11] = rng.choice([0x11, 0x12, 0x14, 0x21, 0x22, 0x24, 0x41, 0x42, 0x31, 0x13])
    return data


@jpeg("type of the frame", "legal")
def _(data, rng, parts, *_):
    part = one(rng, parts, SOF)
    if part is None:
        return None
    data[part[1] + 1] = rng.choice([0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC9, 0xCA, 0xCB])
    return data


@jpeg("a second frame", "legal")
def _(data, rng, parts, *_):
    part = one(rng, parts, SOF)
    return part and data[: part[2]] + data[part[1] : part[2]] + data[part[2] :]


@jpeg("header of the scan", "legal")
def _(data, rng, parts, *_):
    data[rng.randrange(parts[-1][1] + 4, parts[-1][2])] = rng.choice(
        [0, 1, 2, 3, 0x10, 0x11, 63, 255, rng.randrange(256)]
    )
    return data


@jpeg("values of a quantisation table", "legal")
def _(data, rng, parts, *_):
    part = one(rng, parts, (DQT,))
    if part is None or part[2] - part[1] < 6:
        return None
    data[rng.randrange(part[1] + 4, part[2])] = rng.choice([0, 1, 16, 255, rng.randrange(256)])
    return data


@jpeg("values of a Huffman table", "legal")
def _(data, rng, parts, *_):
    part = one(rng, parts, (DHT,))
    if part is None or part[2] - part[1] < 6:
        return None
    end = rng.choice([min(part[1] + 22, part[2]), part[2]])
    data[rng.randrange(part[1] + 4, end)] = rng.choice([0, 1, 16, 17, 255, rng.randrange(256)])
    return data


@jpeg(
    "length of a segment", "legal"
)  # what follows is then read as something else: a table may be another one
def _(data, rng, parts, *_):
    marker, start, end = rng.choice(parts)
    length = end - start - 2 if marker else 0
    struct.pack_into(
        ">H",
        data,
        start + 2,
        rng.choice([0, 1, 2, 3, length - 1, length + 1, length + 2, 65535]) & 0xFFFF,
    )
    return data


@jpeg("a segment removed", "legal")  # without its colour transform an image has other colours
def _(data, rng, parts, *_):
    _, start, end = rng.choice(parts[:-1])
    return data[:start] + data[end:]


@jpeg("a table or application segment twice")
def _(data, rng, parts, *_):
    _, start, end = rng.choice(
        [part for part in parts if part[0] in (DHT, DQT, DRI, APP0, COM)] or parts[:1]
    )
    return data[:end] + data[start:end] + data[end:]


@jpeg("an unknown or long segment inserted")
def _(data, rng, parts, *_):
    at, size = rng.choice(parts)[1], rng.choice([0, 1, 14, 1000, 65533])
    return (
        data[:at]
        + bytes([0xFF, rng.choice([0xE1, 0xE2, COM])])
        + struct.pack(">H", size + 2)
        + rng.randbytes(size)
        + data[at:]
    )


@jpeg("a whole JPEG inside a comment")
def _(data, rng, parts, draft, i):
    other = draft.stream(i)[:60000]
    return data[:2] + b"\xff\xfe" + struct.pack(">H", len(other) + 2) + other + data[2:]


@jpeg("Adobe's colour transform", "legal")
def _(data, rng, *_):
    return (
        data[:2]
        + b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0"
        + bytes([rng.choice([0, 1, 2, 255])])
        + data[2:]
    )


@jpeg("fill bytes before a marker")
def _(data, rng, parts, *_):
    at = rng.choice(parts)[1]
    return data[:at] + b"\xff" * rng.randint(1, 40) + data[at:]


@jpeg("marker bytes of the header", "legal")
def _(data, rng, parts, *_):
    data[rng.choice(parts)[1] + rng.randrange(2)] = rng.choice(
        [0, 0xC4, 0xD0, 0xD8, 0xD9, 0xDA, 0xDB, 0xFF, rng.randrange(256)]
    )
    return data


@jpeg("any bytes of the header", "legal")
def _(data, rng, parts, *_):
    for _ in range(rng.randint(1, 5)):
        data[rng.randrange(parts[-1][2])] = rng.choice([0, 1, 255, rng.randrange(256)])
    return data


# ---------------------------------------------------------------- restart markers, entropy data


@jpeg("cut anywhere")
def _(data, rng, parts, *_):
    return data[: rng.choice([rng.randrange(1, len(data)), rng.randrange(parts[-1][2], len(data))])]


@jpeg("cut at a boundary")
def _(data, rng, parts, *_):
    places = [end for _, _, end in parts] + restarts(data, parts[-1][2])
    return data[: max(1, rng.choice(places) + rng.choice([-1, 0, 0, 1, 2]))]


@jpeg("cut, and the bytes that follow are taken as its data", "payload")
def _(data, rng, parts, draft, i):
    at = rng.randrange(parts[-1][2], len(data))
    return data[:at] + draft.stream(rng.randrange(draft.n))[: len(data) - at]


@jpeg("all zeros")
def _(data, *_):
    return bytes(len(data))


@jpeg("zeros in the entropy-coded data", "payload")
def _(data, rng, parts, *_):
    start = rng.randrange(parts[-1][2], len(data))
    end = rng.choice([len(data), min(len(data), start + rng.randint(1, 64))])
    return data[:start] + bytes(end - start) + data[end:]


@jpeg("flipped bits in the entropy-coded data", "payload")
def _(data, rng, parts, *_):
    for _ in range(rng.choice([1, 1, 2, 8])):
        data[rng.randrange(parts[-1][2], len(data))] ^= 1 << rng.randrange(8)
    return data


@jpeg("bytes inserted into the entropy-coded data", "payload")
def _(data, rng, parts, *_):
    at = rng.randrange(parts[-1][2], len(data))
    return (
        data[:at]
        + rng.choice(
            [rng.randbytes(rng.randint(1, 9)), b"\xff", b"\xff\0", b"\xff\xff", b"\xff\xd9"]
        )
        + data[at:]
    )


@jpeg("bytes removed from the entropy-coded data", "payload")
def _(data, rng, parts, *_):
    at = rng.randrange(parts[-1][2], len(data))
    return data[:at] + data[at + rng.choice([1, 1, 2, 10, 100]) :]


@jpeg("a restart marker of another number")
def _(data, rng, parts, *_):
    found = restarts(data, parts[-1][2])
    if not found:
        return None
    place = rng.choice(found) + 1
    data[place] = 0xD0 + (data[place] + rng.randint(1, 7)) % 8
    return data


@jpeg("a restart marker removed, doubled or inserted", "payload")
def _(data, rng, parts, *_):
    found = restarts(data, parts[-1][2])
    where = rng.choice(found) if found else len(data)
    at = rng.randrange(parts[-1][2], len(data))
    return rng.choice(
        [
            data[:where] + data[where + 2 :],
            data[:where] + data[where : where + 2] + data[where:],
            data[:at] + bytes([0xFF, 0xD0 + rng.randrange(8)]) + data[at:],
        ]
    )


@jpeg("restart segments exchanged, renumbered", "payload")
def _(data, rng, parts, *_):
    found = restarts(data, parts[-1][2])
    if len(found) < 3:
        return None
    k = rng.randrange(len(found) - 2)
    a, b, c = found[k : k + 3]
    first, second = data[a + 2 : b], data[b + 2 : c]
    return data[: a + 2] + second + data[b : b + 2] + first + data[c:]


@jpeg("restart markers in a wrong order")
def _(data, rng, parts, *_):
    found = restarts(data, parts[-1][2])
    if len(found) < 2:
        return None
    a, b = rng.sample(found, 2)
    if data[a + 1] == data[b + 1]:
        return None
    data[a + 1], data[b + 1] = data[b + 1], data[a + 1]
    return data


@jpeg("another marker in the entropy-coded data", "payload")
def _(data, rng, parts, *_):
    found = restarts(data, parts[-1][2]) or [rng.randrange(parts[-1][2], len(data) - 1)]
    place = rng.choice(found)
    data[place : place + 2] = bytes(
        [0xFF, rng.choice([0xD8, 0xD9, 0xDA, 0xC0, 0xC4, 0xDB, 0xDD, 0xFE, 0x01, 0xFF])]
    )
    return data


@jpeg("the end marker removed")
def _(data, *_):
    return data[:-2] if data.endswith(b"\xff\xd9") else None


@jpeg("bytes behind the end")
def _(data, rng, *_):
    return data + rng.choice([bytes(64), rng.randbytes(20), b"\xff\xd0" * 9, bytes(data)])


@kind("raw pixels: changed", "payload")
def _(d, rng):
    found = [i for i in range(d.n) if d.is_raw(i)]
    if not found:
        return False
    i = rng.choice(found)
    data = bytearray(d.stream(i))
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return d.replace(i, bytes(data))
