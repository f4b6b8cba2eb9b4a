"""One decode for several crops of an image: the bytes are those of a decode for each crop."""

import io

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from jpeg_files import SAMPLINGS, picture, sampled
from PIL import Image

from matryoshka.data import _native

POOL = _native.Pool(1)
JPG, RAW = 0, 1


def columns(content, mode, width, height):
    """One sample, as the decoder takes it."""
    numbers = ((0, np.uint64), (len(content), np.uint64), (mode, np.uint8))
    sides = ((width, np.int32), (height, np.int32))
    return content, *(np.array([value], kind) for value, kind in (*numbers, *sides))


def together(sample, crops, sizes, exact):
    """(all views, status) of one call."""
    out = [np.full((1, h, w, 3), 77, np.uint8) for h, w in sizes]
    rows = np.array(crops, np.int32)[:, None]
    status = _native.decode_views(POOL, *sample, rows, out, exact)
    return out, int(status[0])


def one_by_one(sample, crops, sizes, exact):
    """(view, status) of one call each."""
    for crop, (h, w) in zip(crops, sizes, strict=True):
        out = np.full((1, h, w, 3), 77, np.uint8)
        status = _native.decode_batch(POOL, *sample, np.array([crop], np.int32), out, exact)
        yield out, int(status[0])


def check(sample, crops, sizes, exact):
    views, status = together(sample, crops, sizes, exact)
    alone = list(one_by_one(sample, crops, sizes, exact))
    assert status == next((s for _, s in alone if s), 0)
    for view, (expected, _) in zip(views, alone, strict=True):
        if status:
            assert not view.any(), "a failed slot is zero"
        else:
            np.testing.assert_array_equal(view, expected)


@st.composite
def boxes(draw, width, height):
    """A crop of any size, often small or at an edge, and the size of its output."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    w, h = (int(rng.integers(1, side + 1)) for side in (width, height))
    if rng.random() < 0.3:
        w, h = min(w, int(rng.integers(1, 20))), min(h, int(rng.integers(1, 20)))
    x = [int(rng.integers(0, width - w + 1)), 0, width - w][rng.integers(3)]
    y = [int(rng.integers(0, height - h + 1)), 0, height - h][rng.integers(3)]
    # outputs below half of the crop are scaled by the inverse DCT, where libjpeg decodes
    sizes = [(h, w), (max(1, h // 3), max(1, w // 3)), (24, 24), (9, 70)]
    return (x, y, w, h, int(rng.integers(2))), sizes[rng.integers(4)]


markers = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"restart_marker_blocks": st.integers(1, 40)}),
    st.fixed_dictionaries({"restart_marker_rows": st.integers(1, 4)}),
    st.integers(1, 200).map(lambda tile: {"tile": tile}),
)


@settings(max_examples=250)
@given(
    width=st.integers(1, 300) | st.integers(1, 40),
    height=st.integers(1, 200) | st.integers(1, 40),
    sampling=st.sampled_from(list(SAMPLINGS)),
    options=markers,
    progressive=st.booleans(),
    exact=st.booleans(),
    data=st.data(),
)
def test_jpegs(*, width, height, sampling, options, progressive, exact, data):
    options = dict(options)
    tile = options.pop("tile", None)
    if not options and tile is None and progressive and SAMPLINGS[sampling][2] is None:
        options["progressive"] = True
    content = sampled(width, height, sampling, **options)
    if tile is not None:
        content = _native.transcode(content, tile)
    views = data.draw(st.lists(boxes(width, height), min_size=1, max_size=5))
    crops, sizes = zip(*views, strict=True)
    check(columns(content, JPG, width, height), crops, sizes, exact)


@settings(max_examples=150)
@given(
    options=markers,
    progressive=st.booleans(),
    damage=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4),
    kept=st.just(1.0) | st.floats(0, 1),
    data=st.data(),
)
def test_damaged_jpegs(*, options, progressive, damage, kept, data):
    """Also where one view meets the damage and another does not."""
    options = dict(options)
    tile = options.pop("tile", None)
    width, height = 150, 110
    if progressive and not options and tile is None:
        options["progressive"] = True
    content = sampled(width, height, **options)
    if tile is not None:
        content = _native.transcode(content, tile)
    content = bytearray(content[: max(4, int(kept * len(content)))])
    for place, value in damage:
        content[int(place * (len(content) - 1))] = value
    views = data.draw(st.lists(boxes(width, height), min_size=2, max_size=4))
    crops, sizes = zip(*views, strict=True)
    check(columns(bytes(content), JPG, width, height), crops, sizes, False)


@given(st.integers(1, 60), st.integers(1, 60), st.data())
def test_raw_images(width, height, data):
    views = data.draw(st.lists(boxes(width, height), min_size=1, max_size=4))
    crops, sizes = zip(*views, strict=True)
    content = picture(height, width).tobytes()
    check(columns(content, RAW, width, height), crops, sizes, False)


def test_crops_that_are_too_large_together():
    """Beyond 16 MB of planes each crop is decoded for itself."""
    file = io.BytesIO()
    Image.new("L", (4200, 4200), 90).save(file, "JPEG")
    sample = columns(file.getvalue(), JPG, 4200, 4200)
    check(sample, [(0, 0, 500, 500, 0), (3700, 3700, 500, 500, 1)], [(20, 20), (30, 30)], False)
