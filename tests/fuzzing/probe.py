"""Use a damaged .beton file in every way, and compare with the results of the sound file."""

import contextlib
import os
from functools import cache
from pathlib import Path
from random import Random

import mutate_bases
import numpy as np
from matryoshka.train import check_data

from matryoshka.data import BetonError, BetonFile, CenterCrop, Loader, RandomResizedCrop, _native
from matryoshka.data.sources import decode_image

RANDOM, SMALL = ((0.08, 1.0), (0.75, 4 / 3), 0.5), ((0.01, 0.05), (0.5, 2.0), 0.5)
# name, crops of (width, height, index), output side, exact pixels or those for training
VIEWS = [("whole", lambda w, h, _: whole(w, h), 16, True)]
VIEWS += [("centre", lambda w, h, _: _native.center_crops(w, h, 0.875), 96, True)]
for _k in range(3):
    _random = lambda w, h, i, k=_k: _native.random_crops(w, h, i, 7, k, *RANDOM)  # noqa: E731
    _tiny = lambda w, h, i, k=_k: _native.random_crops(w, h, i, 7, k, *SMALL)  # noqa: E731
    VIEWS += [(f"random {_k}", _random, 128, True), (f"tiny {_k}", _tiny, 24, True)]
    VIEWS += [(f"training {_k}", _random, 64, False), (f"training tiny {_k}", _tiny, 24, False)]
VIEWS += [("training small", lambda w, h, _: whole(w, h), 12, False)]  # may decode at half size


def whole(width, height):
    return np.stack([0 * width, 0 * width, width, height, 0 * width], 1).astype(np.int32)


class Failure(Exception):
    """A violated invariant, described by the message."""


def decode(pool, data: BetonFile, view) -> tuple[np.ndarray, np.ndarray]:
    """(status, pixels) of every sample."""
    indices = np.arange(len(data))
    (samples,) = data.fetch(indices)
    crops = view[1](samples.width, samples.height, indices)
    out = np.full((len(data), view[2], view[2], 3), 7, np.uint8)
    status = _native.decode_batch(
        pool,
        samples.data,
        samples.offset,
        samples.size,
        samples.mode,
        samples.width,
        samples.height,
        crops,
        out,
        view[3],
    )
    if out[status != 0].any():
        raise Failure(f"{view[0]}: a refused sample has left pixels")
    return status, out


def compare_with_whole_decode(
    pool, data: BetonFile, view, status: np.ndarray, out: np.ndarray
) -> None:
    """Check that crops equal those of the full decode, although the decoder read fewer bytes."""
    for i in np.flatnonzero((status == 0) & (data.mode == 0)).tolist():
        start, size = int(data.offset[i]), int(data.size[i])
        try:
            pixels = _native.decode(data.fetch(np.array([i]))[0].data[start : start + size])
        except ValueError:
            continue  # the damage is outside the crop
        shape = [np.array([n], np.int32) for n in pixels.shape[1::-1]]
        raw, index = pixels.reshape(-1), np.array([i])
        again = np.empty((1, view[2], view[2], 3), np.uint8)
        zero, one = np.zeros(1, np.uint64), np.ones(1, np.uint8)
        crops = view[1](*shape, index)
        _native.decode_batch(
            pool, raw, zero, np.array([raw.size], np.uint64), one, *shape, crops, again
        )
        if (again[0] != out[i]).any():
            raise Failure(f"{view[0]}: sample {i}: the crop differs from that of the whole image")


def probe(pool, path: Path, rng: Random, expected: dict | None) -> dict:
    """Use a file in every way. expected: {view: pixels} and labels of the sound file; None to
    return these for `path`.
    """
    try:
        data = BetonFile(path)
    except BetonError as error:
        check_message(error, path)
        return {"outcome": "refused", "reason": str(error)}
    labels = data.labels.tolist() if any(kind == 1 for _, kind in data.fields) else None
    results = {
        view[0]: decode(pool, data, view) for view in (VIEWS if expected is None else picked(rng))
    }
    if expected is None:
        # libjpeg, used for evaluation, may decode images that the training decoder refuses
        libjpeg = {view[0]: decode(pool, data, (*view[:3], True))[1] for view in VIEWS}
        return results | {"labels": labels, "libjpeg": libjpeg}
    refused, stricter = np.zeros(len(data), np.uint8), False
    changed = len(data) != len(next(iter(expected.values()))[0])
    for name, (status, out) in results.items():
        stricter = stricter or bool(((status != 0) & (results["whole"][0] == 0)).any())
        refused = np.maximum(refused, status)
        if not changed:
            ok = status == 0
            changed = not all(
                map(same_pixels, out[ok], expected[name][1][ok], expected["libjpeg"][name][ok])
            )
    if rng.random() < 0.3:
        view = rng.choice([view for view in VIEWS if view[0] in results and view[3]])
        compare_with_whole_decode(pool, data, view, *results[view[0]])
    if rng.random() < 0.2:
        compare_after_others(data)
    if rng.random() < 0.3:
        as_file_of_its_own(data, rng.randrange(len(data)), rng.choice((0, 1, 8, 64, 300, 65_535)))
    if rng.random() < 0.2:
        compare_with_views(pool, data, rng)
    for name, _ in data.fields:
        try:
            data.field(name, np.arange(len(data)))
        except BetonError as error:
            check_message(error, path)
    if rng.random() < 0.05:
        check_data.describe(data)
        check_data.info_text(check_data.describe(data))
    if rng.random() < 0.03:
        through_loader(path, data, rng)
    if rng.random() < 0.1:
        cut_off(pool, path, data, rng)
    return {
        "outcome": "samples refused" if refused.any() else "decodes",
        "reason": _native.status_message(int(refused.max())),
        "changed": changed,
        "stricter": stricter,
        "labels": labels != expected["labels"],
    }


def same_pixels(out: np.ndarray, sound: np.ndarray, libjpeg: np.ndarray) -> bool:
    """Whether the pixels of one sample are right; for a decode at half size, whether their mean
    error is small.
    """
    if (out == sound).all() or (out == libjpeg).all():
        return True
    halved = len(out) == VIEWS[-1][2]
    return halved and bool(np.abs(out.astype(int) - libjpeg).mean() < 3)


def picked(rng: Random) -> list:
    return [VIEWS[0], *rng.sample(VIEWS[1:], 4)]


def compare_with_views(pool, data: BetonFile, rng: Random) -> None:
    """Check that several views, decoded at once, are those of one call for each."""
    exact = rng.random() < 0.5
    views = rng.sample([view for view in VIEWS if view[3] == exact], rng.randint(1, 3))
    (samples,) = data.fetch(np.arange(len(data)))
    crops = [view[1](samples.width, samples.height, np.arange(len(data))) for view in views]
    out = [np.full((len(data), view[2], view[2], 3), 7, np.uint8) for view in views]
    together = _native.decode_views(pool, *samples[:6], np.stack(crops), out, exact)
    alone = [decode(pool, data, view) for view in views]
    failed = np.any([status != 0 for status, _ in alone], axis=0)
    if ((together != 0) != failed).any():
        raise Failure("views: another status than of one call for each")
    for pixels, (_, expected) in zip(out, alone, strict=True):
        if pixels[failed].any():
            raise Failure("views: a refused sample has left pixels")
        if (pixels[~failed] != expected[~failed]).any():
            raise Failure("views: other pixels than of one call for each")


def cut_off(pool, path: Path, data: BetonFile, rng: Random) -> None:
    """Cut the mapped file off, and read on: an error, no signal. The last use of the file."""
    indices = np.arange(len(data))
    (samples,) = data.fetch(indices)
    os.truncate(path, rng.randrange(data.num_bytes))
    for view in rng.sample(VIEWS, 2):
        crops = view[1](samples.width, samples.height, indices)
        out = np.empty((len(data), view[2], view[2], 3), np.uint8)
        _native.decode_batch(pool, *samples[:6], crops, out, view[3])
    for use in (samples.check, lambda: data.fetch(indices)):
        try:
            use()
        except BetonError as error:
            check_message(error, path)
        else:
            raise Failure("a file that was cut off is read without an error")


def as_file_of_its_own(data: BetonFile, index: int, tile: int) -> None:
    """Pass the bytes of an image to the functions of the writer."""
    (samples,) = data.fetch(np.array([index]))
    start, size = int(samples.offset[0]), int(samples.size[0])
    content = samples.data[start : start + size].tobytes()
    for use in (_native.jpeg_size, _native.decode, decode_image):
        with contextlib.suppress(ValueError):
            use(content)
    try:
        copy = _native.transcode(content, tile)
    except ValueError:
        return
    if (_native.decode(copy) != _native.decode(content)).any():
        raise Failure("transcode changes pixels")
    # A copy is a sound file, which can be copied in turn.
    again = _native.transcode(_native.transcode(copy, 0), tile)
    if (_native.decode(again) != _native.decode(content)).any():
        raise Failure("a copy of a copy has other pixels")


def through_loader(path: Path, data: BetonFile, rng: Random) -> None:
    image = rng.choice([RandomResizedCrop(20), CenterCrop(24)])
    try:
        for batch in Loader(
            path,
            rng.randint(1, 4),
            order="random",
            crop=image,
            num_workers=2,
            seed=rng.randrange(9),
        ):
            if batch.images.shape[1:] != (image.size, image.size, 3):
                raise Failure(f"the loader made {batch.images.shape}")
    except BetonError as error:
        check_message(error, path)
        if "sample" not in str(error) and "no integer field" not in str(error):
            raise Failure(f"an error that names no sample: {error}") from None


def compare_after_others(data: BetonFile) -> None:
    """Check that pixels do not depend on the image that the thread decoded before."""
    pool, results = _native.Pool(1), []
    for quality in (5, 95):
        _native.decode_batch(pool, *neighbour(quality))
        results.append(decode(pool, data, VIEWS[0]))
    (status, out), (status_2, out_2) = results
    if (status != status_2).any() or (out != out_2).any():
        raise Failure("the result depends on the image decoded before")


@cache
def neighbour(quality: int) -> tuple:
    jpeg = _native.encode(np.asarray(mutate_bases.picture(16, 16, 0)), quality)
    size, crops = np.array([16], np.int32), np.array([[0, 0, 16, 16, 0]], np.int32)
    spans = np.zeros(1, np.uint64), np.array([len(jpeg)], np.uint64), np.zeros(1, np.uint8)
    return jpeg, *spans, size, size, crops, np.empty((1, 8, 8, 3), np.uint8)


def check_message(error: BetonError, path: Path) -> None:
    if str(path) not in str(error) or not str(error).isprintable():
        raise Failure(f"not a message of one line that names the file: {error!r}")
