"""Damaged JPEGs through every path that reads them: the paths accept the same files, and give
libjpeg's pixels.

The paths: a whole image, crops for evaluation and for training, lossless copies, and Pillow, which
has a libjpeg of its own and accepts what libjpeg only warns of.
"""

import io
import warnings
from pathlib import Path
from random import Random

import numpy as np
import pytest
from attacks.damaged_jpegs import KINDS, damaged
from attacks.scale import scaled
from jpeg_files import SAMPLINGS, picture, sampled
from PIL import Image

from matryoshka.data import _native

POOL = _native.Pool(1)
MOST_PIXELS = 1 << 20  # a changed header may describe a large image


def sources():
    """name -> a sound JPEG."""
    found = {}
    for name in SAMPLINGS:
        plain = sampled(104, 72, name, 80)
        found[name] = plain
        found[f"{name}, tiles"] = _native.transcode(plain, 16)
        found[f"{name}, restarts"] = sampled(104, 72, name, 80, restart_marker_blocks=5)
    for mode in ("RGB", "L"):
        for option in ("progressive", "optimize"):
            file = io.BytesIO()
            image = Image.fromarray(picture(72, 104)).convert(mode)
            image.save(file, "JPEG", quality=85, **{option: True})
            found[f"{mode}, {option}"] = file.getvalue()
    # From libjpeg-turbo's cjpeg -quality 60, for what Pillow cannot write.
    for path in sorted(Path(__file__).with_name("jpegs").glob("*.jpg")):
        found[path.stem] = path.read_bytes()
    return found


SOURCES = sources()


def pillow(data):
    """Pillow's pixels, or None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return np.asarray(Image.open(io.BytesIO(data), formats=("JPEG",)).convert("RGB"))
    except Exception:  # nearly any type, for damage
        return None


def whole(data):
    try:
        return _native.decode(data)
    except ValueError:
        return None


def crop(data, size, box, exact):
    """The pixels of a crop at its own size, or None. size: (width, height) of the image."""
    x, y, width, height = box
    out = np.full((1, height, width, 3), 77, np.uint8)
    (status,) = _native.decode_batch(
        POOL,
        data,
        np.zeros(1, np.uint64),
        np.array([len(data)], np.uint64),
        np.zeros(1, np.uint8),
        np.array([size[0]], np.int32),
        np.array([size[1]], np.int32),
        np.array([[x, y, width, height, 0]], np.int32),
        out,
        exact,
    )
    if status:
        assert not out.any(), "a failed slot is zero"
        return None
    return out[0]


def random_box(size, rng):
    width = rng.randrange(1, size[0] + 1)
    height = rng.randrange(1, size[1] + 1)
    return rng.randrange(size[0] - width + 1), rng.randrange(size[1] - height + 1), width, height


def luma(pixels):
    return pixels.astype(float) @ [0.299, 0.587, 0.114]


def check_training_pixels(found, expected, components):
    """Grey is exact. Of colours, brightness where no channel was clipped: chroma is enlarged in
    another way.
    """
    if components == 1:
        np.testing.assert_array_equal(found, expected)
        return
    inside = ((found > 0) & (found < 255) & (expected > 0) & (expected < 255)).all(-1)
    difference = np.abs(luma(found) - luma(expected))[inside]
    assert difference.max(initial=0) <= 2.5


def check(data, rng):
    """All paths agree on these bytes; whether they accept them."""
    pixels = whole(data)
    try:
        width, height, components = _native.jpeg_size(data)
    except ValueError:
        assert pixels is None
        with pytest.raises(ValueError, match=r".+"):
            _native.transcode(data)
        return False
    if width * height > MOST_PIXELS:
        return False
    size = width, height
    theirs = pillow(data)
    if pixels is not None and theirs is not None:
        np.testing.assert_array_equal(pixels, theirs, "Pillow's pixels")

    everything = (0, 0, width, height)
    for exact in (True, False):
        found = crop(data, size, everything, exact)
        assert (found is None) == (pixels is None), f"the whole as a crop, {exact=}"
        if found is not None and exact:
            np.testing.assert_array_equal(found, pixels)
        elif found is not None:
            check_training_pixels(found, pixels, components)
        x, y, w, h = box = random_box(size, rng)
        found = crop(data, size, box, exact)
        if pixels is not None:
            assert found is not None, f"crop {box}, {exact=}"
            expected = pixels[y : y + h, x : x + w]
            if exact or components == 1:
                np.testing.assert_array_equal(found, expected)

    try:
        copy = _native.transcode(data, rng.choice((0, 16, 64)))
    except ValueError:
        return pixels is not None
    assert pixels is not None, "a copy of a file that no path reads"
    np.testing.assert_array_equal(whole(copy), pixels, "the copy")
    np.testing.assert_array_equal(pillow(copy), pixels, "Pillow's pixels of the copy")
    box = random_box(size, rng)
    x, y, w, h = box
    np.testing.assert_array_equal(crop(copy, size, box, True), pixels[y : y + h, x : x + w])
    assert crop(copy, size, everything, False) is not None
    return True


def test_sound_files():
    assert len(SOURCES) > 30
    for name, data in SOURCES.items():
        assert check(data, Random(name)), name


@pytest.mark.parametrize("part", range(4))
def test_all_paths_agree_on_damaged_files(part):
    """Of each kind of damage, some files are accepted or refused by all paths."""
    rng = Random(part)
    names = list(SOURCES)
    accepted = 0
    cases = scaled(250, 50_000)
    for case in range(cases):
        seed = rng.randrange(2**32)
        source = names[case % len(names)]
        data, kinds = damaged(SOURCES[source], Random(seed))
        try:
            accepted += check(data, Random(seed))
        except AssertionError as error:
            raise AssertionError(f"{source}, {kinds}, seed {seed}: {error}") from error
    assert cases / 20 < accepted < cases


def test_every_kind_of_damage_applies():
    for name, change in KINDS.items():
        changed = 0
        for seed in range(40):
            for data in SOURCES.values():
                changed += change(data, Random(seed)) not in (None, data)
        assert changed, name
