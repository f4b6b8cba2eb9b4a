"""Fingerprints of stored images: whether a run that resumes has the images that it began with.

A fingerprint hashes what is known of every image without reading it (names, sizes, labels, places
in the file), and the bytes of a few hundred places. It takes 50 ms at most for ImageNet's 1.28
million images. The writer of a .beton also hashes every byte; that hash is in the side file.

XXH3 with 128 bits (xxhash.com): 10 GB/s and more, where zlib.crc32 has 1 and BLAKE2b less. It is
for accidents and mix-ups; someone who wants to can make two files of one hash.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from matryoshka.files import open_regular

PLACES = 256
PLACE_BYTES = 4096
CHUNK = 1 << 23  # bytes that `hash_file` holds


class Content(NamedTuple):
    """What tells stored images from others, as 32 hex digits each.

    sampled: of the metadata and of PLACES places. whole: of all bytes; None where it is not known.
    """

    sampled: str
    whole: str | None = None


def evenly(count: int, most: int = PLACES) -> np.ndarray:
    """At most `most` positions of `count`, int64, evenly spread, the first and last among them."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).astype(np.int64))


def hash_beton(
    path: Path, offset: np.ndarray, size: np.ndarray, columns: Iterable[np.ndarray | None]
) -> str:
    """The sampled hash of a .beton.

    offset, size: uint64 [N], of every image in the file. columns: what else is known of every
    image, one array each; None where the file has no such field. OSError if the file cannot be
    read.
    """
    digest = xxhash.xxh3_128()
    for column in (offset, size, *columns):
        # The type separates columns: their bytes alone could be shared out in another way.
        kind = "none" if column is None else f"{column.dtype.str} {len(column)}"
        digest.update(kind.encode())
        if column is not None:
            digest.update(np.ascontiguousarray(column).data)
    with open_regular(path) as file:
        chosen = evenly(len(size))
        spans = []
        for start, count in zip(offset[chosen].tolist(), size[chosen].tolist(), strict=True):
            spans.append(_middle(start, count))
        if hasattr(os, "posix_fadvise"):  # a disk is then asked for all places at once
            for start, count in spans:
                os.posix_fadvise(file.fileno(), start, count, os.POSIX_FADV_WILLNEED)
        for start, count in spans:
            digest.update(os.pread(file.fileno(), count, start))
    return digest.hexdigest()


def hash_folder(root: Path, names: list[str]) -> str:
    """The sampled hash of an image folder. names: of its files, relative to `root`."""
    digest = xxhash.xxh3_128("\n".join(names).encode(errors="surrogateescape"))
    for index in evenly(len(names)).tolist():
        try:
            with open_regular(root / names[index]) as file:
                size = os.fstat(file.fileno()).st_size
                start, count = _middle(0, size)
                digest.update(f"{size} ".encode())
                digest.update(os.pread(file.fileno(), count, start))
        except OSError:  # a loader may leave it out
            digest.update(b"unreadable ")
    return digest.hexdigest()


def _middle(start: int, size: int) -> tuple[int, int]:
    """The middle PLACE_BYTES of a region: files of one camera begin with the same bytes."""
    count = min(size, PLACE_BYTES)
    return start + (size - count) // 2, count


def hash_file(path: Path, first_page: int) -> dict[str, str]:
    """Hashes of every byte of a .beton: `head` before its first page, `pages` from there on.

    OSError if the file cannot be read.
    """
    hashes = {}
    with open_regular(path) as file:
        for name, end in (("head", first_page), ("pages", None)):
            digest = xxhash.xxh3_128()
            while end is None or file.tell() < end:
                most = CHUNK if end is None else min(CHUNK, end - file.tell())
                part = file.read(most)
                if not part:
                    break
                digest.update(part)
            hashes[name] = digest.hexdigest()
    return hashes


def joined(head: str, pages: str) -> str:
    """One hash of those of `hash_file`."""
    return xxhash.xxh3_128_hexdigest((head + pages).encode())


def selected(content: Content, indices: np.ndarray) -> Content:
    """The fingerprint of a selection of images."""
    chosen = np.ascontiguousarray(indices).data

    def of(parent: str) -> str:
        digest = xxhash.xxh3_128(parent.encode())
        digest.update(chosen)
        return digest.hexdigest()

    return Content(of(content.sampled), None if content.whole is None else of(content.whole))
