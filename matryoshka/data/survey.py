"""A look at every photo before training: sizes, damage, copies, and what a teacher would warn of.

looked = look(photos, progress=print_it)
photos.take(np.flatnonzero(looked.readable))
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from matryoshka.data.photos import Photos
from matryoshka.data.sources import decode_image

# Difference hash (Krawetz 2013) of 16 x 16 comparisons. Distances in bits, 99th percentile of 150
# ImageNet photos: stored again as JPEG 30, 23; at half the size, 25. Of the 28 million pairs of
# 7,500 Tiny-ImageNet photos, one is within 26: two photos of one lion.
HASH_SIDE = 16
NEAR_BITS = 26
# Pictures with few edges share hashes: 955 pairs of 1,437 handwritten digits are within 26 bits.
# Thumbnails must also correlate this much: JPEG 30 gives 0.993 or more, half the size 0.99 (the
# median); of the digits, 2 pairs do.
NEAR_CORRELATION = 0.99
NEAR_SHARE = 0.01  # of a part: fewer near duplicates change its accuracy by less than its interval
COMPARED_AT_ONCE = 1024  # rows of the matrix of distances
MAX_COMPARED = 20_000  # images; beyond, only equal hashes are near duplicates (20,000^2 take 30 s)

FEW = 10  # images of a class: below, its accuracy is a guess
UNEQUAL = 10  # largest class / smallest class
SHOWN = 3


class Copy(NamedTuple):
    """Row `row` has the same bytes as row `of`, which comes earlier."""

    row: int
    of: int


@dataclass(frozen=True)
class Looked:
    """What `look` saw; arrays have one row per photo.

    width, height: int32, 0 if the file cannot be read. digest: bytes [N, 16], of the file's bytes.
    thumbnail: uint8 [N, 16, 17], grey. problems: {row: reason}.
    """

    width: np.ndarray
    height: np.ndarray
    digest: np.ndarray
    thumbnail: np.ndarray
    problems: dict[int, str]

    @property
    def readable(self) -> np.ndarray:
        """bool [N]."""
        return self.width > 0

    def take(self, rows: np.ndarray) -> Looked:
        """The same for some rows, all readable."""
        return Looked(
            self.width[rows], self.height[rows], self.digest[rows], self.thumbnail[rows], {}
        )


def look(
    photos: Photos,
    progress: Callable[[int, int], None] | None = None,
    *,
    seconds: float = math.inf,
    seed: int = 0,
) -> Looked:
    """Decode every photo once, in a random order, for at most `seconds`.

    progress(done, total) is called after every photo. A photo that was not reached is not readable
    and has no problem.
    """
    count = len(photos)
    width = np.zeros(count, np.int32)
    height = np.zeros(count, np.int32)
    digest = np.zeros((count, 16), np.uint8)
    thumbnail = np.zeros((count, HASH_SIDE, HASH_SIDE + 1), np.uint8)
    problems: dict[int, str] = {}

    end = time.monotonic() + seconds

    def look_at(row: int) -> None:
        if time.monotonic() >= end:
            return
        try:
            data = photos.read(row)
            pixels = decode_image(data).pixels
        except OSError as error:
            problems[row] = error.strerror or str(error)
            return
        except ValueError as error:
            problems[row] = str(error)
            return
        height[row], width[row] = pixels.shape[:2]
        digest[row] = np.frombuffer(hashlib.blake2b(data, digest_size=16).digest(), np.uint8)
        thumbnail[row] = grey_thumbnail(pixels)

    # Decoding and resizing release the GIL.
    with ThreadPoolExecutor(os.cpu_count(), "matryoshka-survey") as workers:
        order = np.random.default_rng(seed).permutation(count).tolist()
        for done, _ in enumerate(workers.map(look_at, order), 1):
            if progress is not None:
                progress(done, count)
    return Looked(width, height, digest, thumbnail, dict(sorted(problems.items())))


def grey_thumbnail(pixels: np.ndarray) -> np.ndarray:
    """uint8 [16, 17]: means of the image's cells. pixels: uint8 [H, W, 3]."""
    image = Image.fromarray(pixels)
    # First a cheap reduction by whole numbers: a box filter of the rest costs little.
    factor = min(pixels.shape[0] // (4 * HASH_SIDE), pixels.shape[1] // (4 * HASH_SIDE))
    if factor > 1:
        image = image.reduce(factor)
    return np.asarray(image.convert("L").resize((HASH_SIDE + 1, HASH_SIDE), Image.Resampling.BOX))


def difference_hash(thumbnails: np.ndarray) -> np.ndarray:
    """bool [N, 256]: whether a cell is darker than its right neighbour. thumbnails: [N, 16, 17]."""
    return (thumbnails[:, :, :-1] < thumbnails[:, :, 1:]).reshape(-1, HASH_SIDE**2)


def exact_copies(looked: Looked) -> list[Copy]:
    """Rows whose bytes are those of an earlier row."""
    first: dict[bytes, int] = {}
    copies = []
    for row in np.flatnonzero(looked.readable).tolist():
        earlier = first.setdefault(looked.digest[row].tobytes(), row)
        if earlier != row:
            copies.append(Copy(row, earlier))
    return copies


def near_groups(looked: Looked, near: int = NEAR_BITS) -> np.ndarray:
    """int64 [N]: a group per row. Rows are in one group if their hashes differ in at most `near`
    bits and their thumbnails correlate, directly or over other rows. Rows that cannot be read are
    alone.

    Pictures of nearly one colour have hashes without meaning: fewer than `near` or more than 256 -
    `near` bits set. They are alone, too. Above MAX_COMPARED rows, only equal hashes are grouped.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    count = len(looked.thumbnail)
    bits = difference_hash(looked.thumbnail)
    packed = np.packbits(bits, axis=1).view(np.uint64)  # [N, 4]
    set_bits = bits.sum(1)
    telling = np.flatnonzero(looked.readable & (set_bits > near) & (set_bits < HASH_SIDE**2 - near))
    if len(telling) > MAX_COMPARED:
        _, group = np.unique(packed[telling], axis=0, return_inverse=True)
        groups = np.arange(count) + len(telling)
        groups[telling] = group.ravel()
        return np.unique(groups, return_inverse=True)[1]

    left = []
    right = []
    codes = packed[telling]
    for start in range(0, len(codes), COMPARED_AT_ONCE):
        block = codes[start : start + COMPARED_AT_ONCE]
        distance = np.zeros((len(block), len(codes)), np.uint16)
        for word in range(codes.shape[1]):
            distance += np.bitwise_count(block[:, None, word] ^ codes[None, :, word])
        a, b = np.nonzero(distance <= near)
        left.append(telling[a + start])
        right.append(telling[b])
    rows = np.concatenate(left) if left else np.empty(0, np.int64)
    columns = np.concatenate(right) if right else np.empty(0, np.int64)
    different = rows < columns
    rows, columns = rows[different], columns[different]
    alike = _correlations(looked.thumbnail, rows, columns) >= NEAR_CORRELATION
    rows, columns = rows[alike], columns[alike]
    graph = coo_array((np.ones(len(rows), bool), (rows, columns)), shape=(count, count))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def _correlations(thumbnails: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """float64 [P]: Pearson's correlation of the thumbnails of each pair; 0 for one of one grey."""
    values = np.empty(len(left))
    for start in range(0, len(left), COMPARED_AT_ONCE):
        pairs = slice(start, start + COMPARED_AT_ONCE)
        a, b = (
            thumbnails[rows[pairs]].reshape(len(rows[pairs]), -1).astype(np.float64)
            for rows in (left, right)
        )
        a -= a.mean(1, keepdims=True)
        b -= b.mean(1, keepdims=True)
        scale = np.sqrt((a * a).sum(1) * (b * b).sum(1))
        values[pairs] = (a * b).sum(1) / np.maximum(scale, 1e-9)
    return values


# ---------------------------------------------------------------- warnings


def class_warnings(photos: Photos) -> list[str]:
    """Lines about classes with few images and about very unequal classes."""
    counts = photos.counts()
    warnings = []
    few = np.flatnonzero(counts < FEW)
    if len(few):
        named = [f"{photos.classes[c]} ({counts[c]})" for c in few[:SHOWN]]
        warnings.append(
            f"{_number(len(few), 'class', 'classes')} with fewer than {FEW} images to train on: "
            f"{_listed(named, len(few))}; too few to learn a class or to measure it"
        )
    largest, smallest = int(counts.argmax()), int(counts.argmin())
    if counts[largest] > UNEQUAL * max(1, counts[smallest]):
        warnings.append(
            f"very unequal classes: {photos.classes[largest]} has {counts[largest]:,} images, "
            f"{photos.classes[smallest]} {counts[smallest]:,}; the model will prefer the large ones"
        )
    return warnings


def overlap_warnings(parts: Mapping[str, tuple[Photos, Looked]]) -> list[str]:
    """Lines about images of val and test that are also in train, as copies or nearly.

    parts: name -> photos and what `look` saw of them, all readable.
    """
    train, seen = parts["train"]
    warnings = []
    known = {row.tobytes(): index for index, row in enumerate(seen.digest)}
    for name, (photos, looked) in parts.items():
        if name == "train":
            continue
        copies = [row for row, digest in enumerate(looked.digest) if digest.tobytes() in known]
        if copies:
            first = photos.name(copies[0])
            twin = train.name(known[looked.digest[copies[0]].tobytes()])
            warnings.append(
                f"{len(copies):,} of {len(photos):,} images of {name} are also in train "
                f"({first} is {twin}): their accuracy says nothing about new images"
            )
        both = Looked(
            *(
                np.concatenate((getattr(seen, column), getattr(looked, column)))
                for column in ("width", "height", "digest", "thumbnail")
            ),
            problems={},
        )
        groups = near_groups(both)
        in_train = set(groups[: len(seen.thumbnail)].tolist())
        near = [r for r, g in enumerate(groups[len(seen.thumbnail) :].tolist()) if g in in_train]
        near = sorted(set(near) - set(copies))
        if len(near) > NEAR_SHARE * len(photos):
            warnings.append(
                f"{len(near):,} of {len(photos):,} images of {name} are nearly the same as one in "
                f"train (the first: {photos.name(near[0])}): the accuracy may be too high"
            )
    return warnings


def label_conflicts(photos: Photos, copies: list[Copy]) -> list[str]:
    """A line about copies of one image under different classes."""
    conflicts = [c for c in copies if photos.labels[c.row] != photos.labels[c.of]]
    if not conflicts:
        return []
    first = conflicts[0]
    return [
        f"{_number(len(conflicts), 'image', 'images')} in two classes: {photos.name(first.row)} is "
        f"{photos.name(first.of)}; left out in the second class"
    ]


def _number(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


def _listed(named: list[str], count: int) -> str:
    return ", ".join(named) + (", ..." if count > len(named) else "")
