"""Named hostile files, generated: each is a sound .beton with one false value.

FFCV 1.0.2 reads the first four without an error and trains on other pixels; the fifth makes it wait
for ever. `ATTACKS` maps a name to (change of the file, when it must be detected, error message);
`{}` in a message is the sample.
"""

import struct
from collections.abc import Callable

from mutate import Draft
from mutate_jpeg import DHT, DQT, SOF, restarts, segments

AT_OPENING, AT_DECODING = "at opening", "at decoding"
ATTACKS: dict[str, tuple[Callable[[Draft, int], None], str, str]] = {}


def attack(name: str, when: str, message: str):
    def register(change):
        ATTACKS[name] = change, when, message
        return change

    return register


def poke(draft: Draft, place: int, code: str, *values: int) -> None:
    struct.pack_into("<" + code, draft.head, place, *values)


@attack("a JPEG of zeros", AT_DECODING, "sample {}: not a JPEG")
def _(draft, i):  # FFCV returns the last image decoded into the buffer, with this sample's label
    draft.replace(i, bytes(len(draft.stream(i))))


@attack("a JPEG whose second half is zeros", AT_DECODING, "sample {}: truncated or corrupt")
def _(draft, i):
    data = draft.stream(i)
    draft.replace(i, data[: len(data) // 2].ljust(len(data), b"\0"))


@attack("a pointer to 2^50", AT_OPENING, "sample {} points to bytes that are not")
def _(draft, i):
    poke(draft, draft.image(i) + 5, "Q", 2**50)


@attack("metadata of other dimensions", AT_DECODING, "sample {}: JPEG dimensions differ")
def _(draft, i):
    poke(draft, draft.image(i) + 1, "HH", 100, 100)


@attack("a JPEG that says it is raw", AT_OPENING, "sample {} is stored raw in a region that is not")
def _(draft, i):
    poke(draft, draft.image(i), "B", 1)


@attack("a file without its last byte", AT_OPENING, "is cut off")
def _(draft, i):
    draft.cut = draft.table + 24 * len(draft.rows) - 1


@attack("a file without its allocation table", AT_OPENING, "never finished")
def _(draft, i):
    draft.cut = draft.table


@attack(
    "a region whose end wraps around 2^64", AT_OPENING, "sample {} has a region outside the pages"
)
def _(draft, i):
    row = draft.rows[draft.row_of[i]]
    row[2] = 2**64 - row[1] + 8


@attack("the image of another sample", AT_OPENING, "sample {} points to bytes that are not")
def _(draft, i):
    poke(draft, draft.image(i) + 5, "Q", draft.pointer(i - 1))


@attack("two samples that share their bytes", AT_OPENING, "overlaps the next one")
def _(draft, i):
    draft.rows[draft.row_of[i]][1] = draft.rows[draft.row_of[i - 1]][1]
    poke(draft, draft.image(i) + 5, "Q", draft.pointer(i - 1))


@attack("2^63 samples", AT_OPENING, "metadata of 9223372036854775808 samples")
def _(draft, i):
    poke(draft, 8, "Q", 2**63)


@attack("65,535 x 65,535 pixels in a few bytes", AT_DECODING, "sample {}: image too large")
def _(draft, i):
    data = bytearray(draft.stream(i))
    frame = next(start for marker, start, _ in segments(data) if marker in SOF)
    struct.pack_into(">HH", data, frame + 5, 65535, 65535)
    draft.replace(i, bytes(data))
    poke(draft, draft.image(i) + 1, "HH", 65535, 65535)


@attack("restart markers in another order", AT_DECODING, "sample {}: truncated or corrupt")
def _(draft, i):
    data = bytearray(draft.stream(i))
    for k, place in enumerate(restarts(data, segments(data)[-1][2])):
        data[place + 1] = 0xD0 + (7 - k) % 8
    draft.replace(i, bytes(data))


@attack(
    "a restart interval that is twice the true one", AT_DECODING, "sample {}: truncated or corrupt"
)
def _(draft, i):
    data = bytearray(draft.stream(i))
    start = next(start for marker, start, _ in segments(data) if marker == 0xDD)
    struct.pack_into(">H", data, start + 4, 2 * struct.unpack_from(">H", data, start + 4)[0])
    draft.replace(i, bytes(data))


def _without(draft, i, marker):
    data = draft.stream(i)
    start, end = next((start, end) for found, start, end in segments(data) if found == marker)
    draft.replace(i, data[:start] + data[end:])


@attack("a JPEG without a quantisation table", AT_DECODING, "sample {}: truncated or corrupt")
def _(draft, i):  # libjpeg would take the table of the image that it decoded before
    _without(draft, i, DQT)


@attack("a JPEG without a Huffman table", AT_DECODING, "sample {}: truncated or corrupt")
def _(draft, i):
    _without(draft, i, DHT)
