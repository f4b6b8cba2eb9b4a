"""Damage to JPEGs where their structure is: tables, markers, scans, sampling.

    data, names = damaged(sound, rng)

Every kind is a function (data, rng) -> bytes, or None where it does not apply.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import NamedTuple

SOF = (0xC0, 0xC1, 0xC2, 0xC9, 0xCA)
DHT, DAC, DQT, DRI, SOS, EOI = 0xC4, 0xCC, 0xDB, 0xDD, 0xDA, 0xD9
RESTARTS = range(0xD0, 0xD8)

Damage = Callable[[bytes, Random], bytes | None]
KINDS: dict[str, Damage] = {}


def kind(function: Damage) -> Damage:
    KINDS[function.__name__] = function
    return function


def damaged(data: bytes, rng: Random) -> tuple[bytes, list[str]]:
    """One to three kinds of damage, and their names."""
    names = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if len(data) < 32:
            break
        name = rng.choice(list(KINDS))
        changed = KINDS[name](data, rng)
        if changed is not None and changed != data:
            data = changed
            names.append(name)
    return data, names


class Part(NamedTuple):
    """A marker segment, or the data of a scan (marker 0): bytes [start, end)."""

    marker: int
    start: int
    end: int


def parts_of(data: bytes) -> list[Part]:
    """Segments and scans in their order, as far as the structure can be read (T.81, Annex B)."""
    parts = []
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == EOI:
            break
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        parts.append(Part(marker, at, min(end, len(data))))
        at = end
        if marker == SOS:
            end = scan_end(data, at)
            parts.append(Part(0, at, end))
            at = end
    return parts


def scan_end(data: bytes, at: int) -> int:
    while at + 1 < len(data):
        if data[at] == 0xFF and data[at + 1] not in (0, 0xFF, *RESTARTS):
            return at
        at += 1
    return len(data)


def pick(data: bytes, rng: Random, *markers: int) -> Part | None:
    found = [part for part in parts_of(data) if part.marker in markers and part.end > part.start]
    return rng.choice(found) if found else None


def replaced(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def inserted(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at:]


def restart_markers(data: bytes) -> list[int]:
    found = []
    for part in parts_of(data):
        if part.marker == 0:
            for at in range(part.start, part.end - 1):
                if data[at] == 0xFF and data[at + 1] in RESTARTS:
                    found.append(at)
    return found


# ---------------------------------------------------------------- anywhere


@kind
def bits_flipped(data: bytes, rng: Random) -> bytes | None:
    at = rng.randrange(2, len(data))
    return replaced(data, at, bytes([data[at] ^ (1 << rng.randrange(8))]))


@kind
def bytes_set(data: bytes, rng: Random) -> bytes | None:
    at = rng.randrange(2, len(data))
    return replaced(data, at, rng.randbytes(rng.randrange(1, 9)))[: len(data)]


@kind
def bytes_inserted(data: bytes, rng: Random) -> bytes | None:
    return inserted(data, rng.randrange(2, len(data)), rng.randbytes(rng.randrange(1, 9)))


@kind
def bytes_removed(data: bytes, rng: Random) -> bytes | None:
    at = rng.randrange(2, len(data))
    return data[:at] + data[at + rng.randrange(1, 9) :]


@kind
def cut_off(data: bytes, rng: Random) -> bytes | None:
    return data[: rng.randrange(4, len(data))]


# ---------------------------------------------------------------- segments


@kind
def segment_removed(data: bytes, rng: Random) -> bytes | None:
    part = rng.choice(parts_of(data) or [Part(0, 2, 2)])
    return data[: part.start] + data[part.end :]


@kind
def segment_repeated(data: bytes, rng: Random) -> bytes | None:
    part = rng.choice(parts_of(data) or [Part(0, 2, 2)])
    to = rng.choice(parts_of(data) or [Part(0, 2, 2)]).start
    return inserted(data, to, data[part.start : part.end])


@kind
def segments_swapped(data: bytes, rng: Random) -> bytes | None:
    parts = parts_of(data)
    if len(parts) < 2:
        return None
    k = rng.randrange(len(parts) - 1)
    a, b = parts[k], parts[k + 1]
    return data[: a.start] + data[b.start : b.end] + data[a.start : a.end] + data[b.end :]


@kind
def quantiser_changed(data: bytes, rng: Random) -> bytes | None:
    part = pick(data, rng, DQT)
    if part is None or part.end - part.start < 69:
        return None
    at = part.start + 5 + rng.choice((0, rng.randrange(64)))
    return replaced(data, at, bytes([rng.choice((0, 1, 255))]))


@kind
def quantisers_of_16_bits(data: bytes, rng: Random) -> bytes | None:
    part = pick(data, rng, DQT)
    if part is None or part.end - part.start != 69:
        return None
    values = list(data[part.start + 5 : part.end])
    values[rng.randrange(64)] = rng.choice((0, 256, 4000, 32767, 65535))
    body = b"".join(value.to_bytes(2, "big") for value in values)
    segment = b"\xff\xdb\x00\x83" + bytes([0x10 | data[part.start + 4] & 15]) + body
    return data[: part.start] + segment + data[part.end :]


@kind
def code_count_changed(data: bytes, rng: Random) -> bytes | None:
    part = pick(data, rng, DHT)
    if part is None or part.end - part.start < 22:
        return None
    at = part.start + 5 + rng.randrange(16)
    return replaced(data, at, bytes([(data[at] + rng.choice((-1, 1))) % 256]))


@kind
def code_symbol_changed(data: bytes, rng: Random) -> bytes | None:
    """Among others: long runs, which lead beyond the end of a block."""
    part = pick(data, rng, DHT)
    if part is None or part.end - part.start < 22:
        return None
    at = part.start + 21 + rng.choice((0, 1, 2, rng.randrange(part.end - part.start - 21)))
    at = min(at, part.end - 1)
    return replaced(data, at, bytes([rng.choice((0xF1, 0xE1, 0xF0, 0xFA, 0x0F, 0x00, 0x11))]))


@kind
def sampling_changed(data: bytes, rng: Random) -> bytes | None:
    part = pick(data, rng, *SOF)
    if part is None or part.end - part.start < 13:
        return None
    count = (part.end - part.start - 10) // 3
    at = part.start + 11 + 3 * rng.randrange(count)
    factors = (0x11, 0x12, 0x13, 0x21, 0x22, 0x23, 0x31, 0x32, 0x33, 0x41, 0x14, 0x44, 0x24, 0x42)
    return replaced(data, at, bytes([rng.choice(factors)]))


@kind
def size_changed(data: bytes, rng: Random) -> bytes | None:
    part = pick(data, rng, *SOF)
    if part is None or part.end - part.start < 10:
        return None
    at = part.start + 5 + 2 * rng.randrange(2)
    old = int.from_bytes(data[at : at + 2], "big")
    new = rng.choice((old - 1, old + 1, old - 8, old + 8, old // 2, 2 * old, 0, 65535)) % 65536
    return replaced(data, at, new.to_bytes(2, "big"))


@kind
def component_changed(data: bytes, rng: Random) -> bytes | None:
    """Numbers of components and of their tables, in frame and scan headers."""
    part = pick(data, rng, *SOF, SOS)
    if part is None:
        return None
    at = rng.randrange(part.start + 4, part.end)
    return replaced(data, at, bytes([rng.choice((0, 1, 2, 3, 0x11, 0x22, ord("R"), data[at] ^ 1))]))


@kind
def colour_space_changed(data: bytes, rng: Random) -> bytes | None:
    transform = rng.choice((0, 1, 2, 7))
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([transform])
    without = data
    if data[2:4] == b"\xff\xe0" and rng.random() < 0.5:
        without = data[:2] + data[parts_of(data)[0].end :]
    return inserted(without, 2, adobe)


@kind
def garbage_between_segments(data: bytes, rng: Random) -> bytes | None:
    parts = parts_of(data)
    if not parts:
        return None
    filler = rng.choice((b"\xff" * rng.randrange(1, 5), b"\x00" * rng.randrange(1, 5)))
    return inserted(data, rng.choice(parts).start, filler)


# ---------------------------------------------------------------- scans


@kind
def filled_stuffing(data: bytes, rng: Random) -> bytes | None:
    """FF FF 00, which is neither data nor a marker."""
    part = pick(data, rng, 0)
    if part is None:
        return None
    found = [at for at in range(part.start, part.end - 1) if data[at : at + 2] == b"\xff\x00"]
    if not found:
        return None
    return inserted(data, rng.choice(found), b"\xff" * rng.choice((1, 1, 2)))


@kind
def marker_in_scan(data: bytes, rng: Random) -> bytes | None:
    part = pick(data, rng, 0)
    if part is None:
        return None
    marker = rng.choice((EOI, 0xD0, 0xD3, 0x01, SOS, DQT, 0xFE))
    return inserted(data, rng.randrange(part.start, part.end), bytes([0xFF, marker]))


@kind
def end_after_a_scan(data: bytes, rng: Random) -> bytes | None:
    """Of a progressive file, the first scans only, and a proper end."""
    part = pick(data, rng, 0)
    return None if part is None else data[: part.end] + bytes([0xFF, EOI])


@kind
def high_bytes_in_scan(data: bytes, rng: Random) -> bytes | None:
    """Long codes and large values, without a marker."""
    part = pick(data, rng, 0)
    if part is None:
        return None
    at = rng.randrange(part.start, part.end)
    return replaced(data, at, b"\xff\x00" * rng.randrange(1, 6))[: len(data)]


@kind
def restart_interval_changed(data: bytes, rng: Random) -> bytes | None:
    part = pick(data, rng, DRI)
    if part is None or part.end - part.start != 6:
        return None
    old = int.from_bytes(data[part.start + 4 : part.end], "big")
    new = rng.choice((0, 1, old - 1, old + 1, 2 * old)) % 65536
    return replaced(data, part.start + 4, new.to_bytes(2, "big"))


@kind
def restart_interval_without_markers(data: bytes, rng: Random) -> bytes | None:
    part = pick(data, rng, SOS)
    if part is None:
        return None
    return inserted(data, part.start, b"\xff\xdd\x00\x04\x00" + bytes([rng.randrange(1, 20)]))


@kind
def restart_moved(data: bytes, rng: Random) -> bytes | None:
    found = restart_markers(data)
    if not found:
        return None
    at = rng.choice(found)
    marker = data[at : at + 2]
    without = data[:at] + data[at + 2 :]
    return inserted(without, max(2, at + rng.choice((-9, -3, -2, -1, 1, 2, 3, 9))), marker)


@kind
def restart_removed(data: bytes, rng: Random) -> bytes | None:
    found = restart_markers(data)
    if not found:
        return None
    at = rng.choice(found)
    return data[:at] + data[at + 2 :]


@kind
def restart_repeated(data: bytes, rng: Random) -> bytes | None:
    found = restart_markers(data)
    if not found:
        return None
    at = rng.choice(found)
    return inserted(data, at, data[at : at + 2])


@kind
def restart_renumbered(data: bytes, rng: Random) -> bytes | None:
    found = restart_markers(data)
    if not found:
        return None
    return replaced(data, rng.choice(found) + 1, bytes([rng.choice(RESTARTS)]))


@kind
def bytes_before_restart(data: bytes, rng: Random) -> bytes | None:
    """Left-over bytes, of which a decoder notices those that it has not read ahead."""
    found = restart_markers(data)
    if not found:
        return None
    filler = bytes([rng.choice((0, 0x55, 0xAA, 0xFE))]) * rng.choice((1, 1, 2, 3, 7, 8, 30))
    return inserted(data, rng.choice(found), filler)


@kind
def segment_data_repeated(data: bytes, rng: Random) -> bytes | None:
    """The data between two restart markers, at the place of other data."""
    found = restart_markers(data)
    if len(found) < 3:
        return None
    k, to = rng.randrange(len(found) - 1), rng.randrange(len(found) - 1)
    piece = data[found[k] + 2 : found[k + 1]]
    return data[: found[to] + 2] + piece + data[found[to + 1] :]
