"""The native core against slow oracles: NumPy's Philox, float64 resampling matrices, Pillow."""

import contextlib
import io
import math
import os
import re
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jpeg_files import KINDS, jpeg, three_components
from PIL import Image

from matryoshka.data import _native

MESSAGES = [
    "ok",
    "truncated or corrupt JPEG data",
    "not a JPEG",
    "JPEG dimensions differ from the metadata",
]
MESSAGES += [
    "raw size does not match its dimensions",
    "unknown mode",
    "outside the file",
    "bad crop",
]
MESSAGES += ["unsupported colour space (CMYK)", "image too large", "not a baseline JPEG"]
MESSAGES += ["a copy would have other coefficients"]
(
    OK,
    CORRUPT,
    NOT_JPEG,
    DIMENSIONS,
    RAW_SIZE,
    MODE,
    OUTSIDE,
    CROP,
    COLOUR,
    TOO_LARGE,
    NOT_BASELINE,
    NOT_COPIED,
) = range(len(MESSAGES))
JPG, RAW = 0, 1
POOL = _native.Pool(2)


def picture(height, width, seed=0):
    """Smooth colours with noise on top: survives JPEG, and has something in every frequency."""
    rng = np.random.default_rng(seed)
    base = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((width, height))
    return np.clip(np.asarray(base) + rng.normal(0, 12, (height, width, 3)), 0, 255).astype(
        np.uint8
    )


def pillow(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def decode_batch(samples, size, pool=POOL):
    """samples: (bytes, mode, width, height, crop), stored with gaps between them."""
    content, *columns = zip(*samples, strict=True)
    sizes = np.array([len(c) for c in content], np.uint64)
    offsets = np.cumsum(sizes + np.uint64(7), dtype=np.uint64) - sizes
    out = np.full((len(samples), *size, 3), 77, np.uint8)
    columns = [offsets, sizes, *(np.array(c, t) for c, t in zip(columns, "Biii", strict=True))]
    status = _native.decode_batch(pool, b"".join(b"\xff" * 7 + c for c in content), *columns, out)
    assert status.dtype == np.uint8
    assert not out[status != OK].any(), "a failed slot is zero"
    return out, status


def oracle_crop(size, index, seed, epoch, draw, *, view=0):
    (width, height), (scale, ratio, flip) = size, draw

    def uniforms(attempt):  # NumPy's Philox adds one to its counter before each block
        counter = (index % 2**64 + (attempt << 64) + (view << 128) - 1) % 2**256
        block = np.random.Philox(counter=counter, key=seed + (epoch << 64)).random_raw(4)
        return [(int(word) >> 11) * 2.0**-53 for word in block]

    flipped = int(uniforms(10)[0] < flip)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for attempt in range(10):
        u = uniforms(attempt)
        target = width * height * (scale[0] + u[0] * (scale[1] - scale[0]))
        aspect = math.exp(low + u[1] * (high - low))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            return (
                math.floor(u[2] * (width - w + 1)),
                math.floor(u[3] * (height - h + 1)),
                w,
                h,
                flipped,
            )
    w, h = width, height
    if width / height < ratio[0]:
        h = max(1, round(w / ratio[0]))
    elif width / height > ratio[1]:
        w = max(1, round(h * ratio[1]))
    return (width - w) // 2, (height - h) // 2, w, h, flipped


def check_crops(images, seed, epoch, draw, view=0):
    width, height, index = (
        np.array(c, t) for c, t in zip(zip(*images, strict=True), "iiq", strict=True)
    )
    crops = _native.random_crops(width, height, index, seed, epoch, *draw, view)
    expected = [oracle_crop(image[:2], image[2], seed, epoch, draw, view=view) for image in images]
    assert crops.dtype == np.int32
    np.testing.assert_array_equal(crops, expected)
    x, y, w, h, _ = crops.T
    assert ((x >= 0) & (y >= 0) & (w > 0) & (h > 0) & (x + w <= width) & (y + h <= height)).all(), (
        "a crop is not inside its image"
    )


def test_random_crops_thousands():
    images = np.random.default_rng(0).integers(1, 700, (3000, 3)).tolist()
    check_crops(images, 17, 3, ((0.08, 1.0), (3 / 4, 4 / 3), 0.5))
    check_crops(images[:500], 17, 3, ((0.08, 1.0), (3 / 4, 4 / 3), 0.5), view=2)


def test_a_crop_without_a_view_is_view_0():
    sides = np.full(50, 500, np.int32)
    draw = sides, sides, np.arange(50), 3, 1, (0.1, 1.0), (1.0, 1.0), 0.5
    views = [_native.random_crops(*draw, view).tobytes() for view in range(4)]
    assert views[0] == _native.random_crops(*draw).tobytes()
    assert len(set(views)) == 4, "views have the same crops"


sizes = st.integers(1, 12) | st.integers(1, 65535)
ranges = st.tuples(st.floats(0.01, 20), st.floats(0.01, 20)).map(lambda pair: tuple(sorted(pair)))
images = st.tuples(sizes, sizes, st.integers(-(2**63), 2**63 - 1))


@settings(max_examples=300)
@given(images, *[st.integers(0, 2**64 - 1)] * 3, st.tuples(ranges, ranges, st.floats(0, 1)))
def test_random_crops_of_anything(image, seed, epoch, view, draw):
    check_crops([image], seed, epoch, draw, view)


@given(sizes, sizes, st.floats(0.001, 1))
def test_center_crops(width, height, ratio):
    side = max(1, int(ratio * min(width, height)))
    crops = _native.center_crops(*np.array([[width], [height]], np.int32), ratio)
    assert crops.tolist() == [[(width - side) // 2, (height - side) // 2, side, side, 0]]


def matrix(source, target):
    position = np.arange(source)
    if target <= source:
        low = (np.arange(target) * source / target)[:, None]
        high = low + source / target
        covered = np.clip(np.minimum(position + 1, high) - np.maximum(position, low), 0, None)
        return covered * target / source
    centre = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)[:, None]
    return np.clip(1 - np.abs(position - centre), 0, None)


def resize_errors(result, pixels, crop):
    x, y, w, h, flip = crop
    axes = matrix(h, result.shape[0]), matrix(w, result.shape[1])
    region = pixels[y : y + h, x : x + w].astype(np.float64)
    expected = np.einsum("ik,klc,jl->ijc", axes[0], region, axes[1], optimize=True)
    errors = np.abs(result - (expected[:, ::-1] if flip else expected))
    assert errors.max() <= 0.75, (
        f"largest error {errors.max()}"
    )  # rounding to whole levels takes 0.5
    return errors


@st.composite
def cropped_pictures(draw, limit=90):
    height, width = draw(st.integers(1, limit)), draw(st.integers(1, limit))
    w, h = draw(st.integers(1, width)), draw(st.integers(1, height))
    crop = (
        draw(st.integers(0, width - w)),
        draw(st.integers(0, height - h)),
        w,
        h,
        draw(st.integers(0, 1)),
    )
    # Often an axis keeps its size.
    out = draw(st.just(h) | st.integers(1, limit)), draw(st.just(w) | st.integers(1, limit))
    return picture(height, width, draw(st.integers(0, 9))), crop, out


@settings(max_examples=200)
@given(cropped_pictures(), st.sampled_from([*KINDS, "raw"]))
def test_samples_of_every_kind(case, kind):
    pixels, crop, size = case
    height, width = pixels.shape[:2]
    data = pixels.tobytes() if kind == "raw" else jpeg(pixels, kind)
    out, status = decode_batch([(data, RAW if kind == "raw" else JPG, width, height, crop)], size)
    assert status.tolist() == [OK]
    resize_errors(out[0], pixels if kind == "raw" else pillow(data), crop)


@pytest.mark.parametrize("size", [(224, 224), (64, 48), (150, 400), (400, 90), (200, 300)])
def test_errors_are_hardly_more_than_rounding(size):
    pixels = picture(200, 300)
    assert (
        resize_errors(_native.resize(pixels, *size), pixels, (0, 0, 300, 200, 0)).mean() < 0.26
    ), f"mean error at {size}"


@pytest.mark.parametrize("shape", [(64, 9), (65, 9), (200, 300), (9, 5000), (70001, 2)])
def test_strong_shrinking(shape):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    for size in ((1, 1), (2, 1), (3, 2)):
        resize_errors(_native.resize(pixels, *size), pixels, (0, 0, shape[1], shape[0], 0))


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (13, 90), (64, 64), (130, 70), (1030, 7)])
def test_constants_stay_exactly_constant(shape):
    for size in ((31, 41), (3, 3), (1, 1), (64, 64)):
        for level in range(256):
            assert (_native.resize(np.full((*shape, 3), level, np.uint8), *size) == level).all()


def test_same_size_is_exact():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    np.testing.assert_array_equal(_native.resize(pixels, 64, 80), pixels)
    samples = [(pixels.tobytes(), RAW, 80, 64, (3, 5, 40, 30, flip)) for flip in (0, 1)]
    out, _ = decode_batch(samples, (30, 40))
    np.testing.assert_array_equal(out, [pixels[5:35, 3:43], pixels[5:35, 3:43][:, ::-1]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 33), (17, 1), (16, 16), (37, 61), (123, 201)])
def test_decode_equals_pillow(kind, shape):
    data = jpeg(picture(*shape), kind)
    for buffer in (data, bytearray(data), memoryview(data), np.frombuffer(data, np.uint8)):
        np.testing.assert_array_equal(_native.decode(buffer), pillow(data))
    assert _native.jpeg_size(data) == (shape[1], shape[0], 1 if "grey" in kind else 3)


@pytest.mark.parametrize("quality", [1, 30, 75, 90, 100])
@pytest.mark.parametrize("shape", [(1, 1), (33, 17), (240, 320)])
def test_encode_like_pillow(quality, shape):
    pixels = picture(*shape)
    data = _native.encode(pixels, quality)
    ours, theirs = (Image.open(io.BytesIO(d)) for d in (data, jpeg(pixels, quality=quality)))
    assert ours.quantization == theirs.quantization
    assert ours.layer == theirs.layer  # components, sampling, table numbers
    assert b"\xff\xc0" in data  # baseline
    errors = [((np.asarray(image, float) - pixels) ** 2).mean() + 1e-9 for image in (ours, theirs)]
    assert abs(10 * math.log10(errors[0] / errors[1])) < 0.1, (
        f"our error is {errors[0] / errors[1]} of Pillow's"
    )  # dB
    np.testing.assert_array_equal(_native.decode(data), np.asarray(ours))


def test_scans():
    data = three_components(pixels := picture(8, 8), 3)
    np.testing.assert_array_equal(_native.decode(data), pillow(data))
    for bad in (three_components(pixels, 5000), three_components(pixels, 2, end=b""), data[:-2]):
        with pytest.raises(ValueError, match=MESSAGES[CORRUPT]):
            _native.decode(bad)


def with_side(data, side):
    place = data.index(b"\xff\xc0") + 5
    return data[:place] + 2 * side.to_bytes(2, "big") + data[place + 4 :]


def bad_samples():
    """(expected status, sample); the samples would be good but for one thing."""
    pixels = picture(30, 40)
    data, raw, whole = jpeg(pixels), pixels.tobytes(), (0, 0, 40, 30, 0)
    scan = data.index(b"\xff\xda") + 14
    cuts = [data[:20], data[: len(data) // 2], data[:-20], data[:scan] + b"\xff\x00" * 300]
    cuts += [cut[: len(cut) * 2 // 3] for cut in (jpeg(pixels, kind) for kind in KINDS)]
    yield from ((CORRUPT, (cut, JPG, 40, 30, whole)) for cut in cuts)
    noise = np.random.default_rng(0).bytes(500)
    yield from ((NOT_JPEG, (other, JPG, 40, 30, whole)) for other in (bytes(500), noise, b""))
    for width, height in ((40, 31), (41, 30), (30, 40), (40, 60)):
        yield DIMENSIONS, (data, JPG, width, height, (0, 0, 30, 30, 0))
    yield from (
        (RAW_SIZE, (wrong, RAW, 40, 30, whole)) for wrong in (raw[:-1], raw + b"x", b"", raw[:120])
    )
    yield RAW_SIZE, (raw, RAW, -40, -30, whole)
    yield from ((MODE, (data, mode, 40, 30, whole)) for mode in (2, 3, 255))
    crops = [(0, 0, 0, 5), (0, 0, 5, 0), (-1, 0, 5, 5), (0, -1, 5, 5), (36, 0, 5, 5), (0, 26, 5, 5)]
    crops += [
        (0, 0, 41, 5),
        (0, 0, 5, -5),
        (2**31 - 1, 0, 2**31 - 1, 1),
        (-(2**31), 0, -(2**31), 1),
    ]
    for crop in crops:
        yield CROP, (data, JPG, 40, 30, (*crop, 0))
        yield CROP, (raw, RAW, 40, 30, (*crop, 0))
    yield CROP, (data, JPG, 0, 0, (0, 0, 0, 0, 0))
    yield COLOUR, (jpeg(pixels, "CMYK"), JPG, 40, 30, whole)
    yield TOO_LARGE, (with_side(data, 65000), JPG, 65000, 65000, whole)
    yield TOO_LARGE, (raw, RAW, 2**31 - 1, 2**31 - 1, whole)


@pytest.mark.parametrize(("expected", "sample"), list(bad_samples()))
def test_bad_sample_between_good_ones(expected, sample):
    good = data, *_, crop = jpeg(picture(30, 40, seed=5)), JPG, 40, 30, (4, 3, 30, 20, 1)
    out, status = decode_batch([good, sample, good], (16, 24))
    assert [_native.status_message(code) for code in status] == ["ok", MESSAGES[expected], "ok"]
    assert (out[0] == out[2]).all()
    resize_errors(out[0], pillow(data), crop)


@pytest.mark.parametrize("kind", KINDS)
def test_truncation_anywhere(kind):
    """An error, or the right pixels if only bytes after the last block are missing."""
    data = jpeg(picture(30, 40), kind)
    samples = [(data[:cut], JPG, 40, 30, (0, 0, 40, 30, 0)) for cut in range(len(data))]
    out, status = decode_batch(samples, (30, 40))
    assert set(status[:-4]) == {CORRUPT, NOT_JPEG}
    assert set(status[2:]) <= {OK, CORRUPT}, f"statuses {set(status[2:])}"
    assert (out[status == OK] == pillow(data)).all()


def test_offsets_outside_the_file():
    data = jpeg(picture(30, 40))
    end, top = len(data), 2**64 - 1
    spans = [
        (0, end),
        (1, end),
        (0, end + 1),
        (end + 1, 0),
        (end, 1),
        (top, end),
        (top, 1),
        (1, top),
    ]
    n = len(spans)
    offset, size = np.array(spans, np.uint64).T.copy()
    sides, crops = np.tile(np.int32([[40], [30]]), n), np.tile(np.int32([0, 0, 40, 30, 0]), (n, 1))
    out = np.full((n, 8, 8, 3), 9, np.uint8)
    status = _native.decode_batch(
        POOL, data, offset, size, np.zeros(n, np.uint8), *sides, crops, out
    )
    assert status.tolist() == [OK] + [OUTSIDE] * (n - 1)
    assert not out[1:].any()


def test_decode_refuses():
    pixels = picture(40, 40)
    huge, cut = with_side(jpeg(pixels), 65000), jpeg(pixels)[:-50]
    cases = [(b"", NOT_JPEG), (b"\x89PNG\r\n", NOT_JPEG), (b"\xff\xd8\xff\xd9", CORRUPT)]
    for data, status in [*cases, (jpeg(pixels, "CMYK"), COLOUR), (huge, TOO_LARGE), (cut, CORRUPT)]:
        with pytest.raises(ValueError, match=re.escape(MESSAGES[status])):
            _native.decode(data)


def test_mutated_streams():
    """Thousands of damaged JPEGs: a known status each, and healthy neighbours."""
    rng = np.random.default_rng(2024)
    sources = [jpeg(picture(48, 64, seed), kind) for seed, kind in enumerate(KINDS)]
    good = sources[0], JPG, 64, 48, (5, 5, 50, 40, 0)
    expected = decode_batch([good], (32, 32))[0][0]
    counts = np.zeros(len(MESSAGES), int)
    for _ in range(20):
        samples = []
        for source in sources * 30:
            data = np.frombuffer(source, np.uint8).copy()
            reach = (
                700 if rng.random() < 0.5 else len(data)
            )  # half of the damage goes where the structure is
            places = rng.integers(0, reach, rng.integers(1, 6)) % len(data)
            data[places] = rng.integers(0, 256, len(places))
            samples += [(data.tobytes(), JPG, 64, 48, (0, 0, 64, 48, 0)), good]
        out, status = decode_batch(samples, (32, 32))
        assert (out[1::2] == expected).all()
        assert (status[1::2] == OK).all()
        counts += np.bincount(status[::2], minlength=len(MESSAGES))  # raises for an unknown status
        for sample in samples[::20]:
            with contextlib.suppress(ValueError):
                assert _native.decode(sample[0]).ndim == 3
    assert counts[CORRUPT] > 500, f"only {counts[CORRUPT]} were found corrupt"


def test_any_number_of_threads_gives_the_same_batch():
    samples = []
    for k, (height, width) in enumerate(
        np.random.default_rng(1).integers(20, 120, (60, 2)).tolist()
    ):
        pixels, crop = picture(height, width, k), (3, 2, width - 9, height - 7, k % 2)
        data, mode = (pixels.tobytes(), RAW) if k % 3 else (jpeg(pixels), JPG)
        samples.append((data, mode, width, height, crop))
    reference, status = decode_batch(samples, (48, 40), _native.Pool(1))
    assert not status.any()
    for threads in (2, 5) * 4:
        np.testing.assert_array_equal(
            decode_batch(samples, (48, 40), _native.Pool(threads))[0], reference
        )


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "not true after 10 seconds"
        time.sleep(0.01)


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs Linux's /proc")
def test_threads_end_with_the_pool():
    before = len(os.listdir("/proc/self/task"))
    pools = [_native.Pool(5) for _ in range(3)]
    assert pools[2].num_threads == 5
    assert len(os.listdir("/proc/self/task")) == before + 12, (
        "threads of the pool"
    )  # the caller is the fifth
    pools.clear()
    wait_for(lambda: len(os.listdir("/proc/self/task")) == before)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_can_drop_the_pool():
    pools = [_native.Pool(2)]
    child = os.fork()
    if child == 0:
        pools.clear()
        os._exit(0)
    wait_for(lambda: os.waitpid(child, os.WNOHANG)[0] == child)


def arguments(count):
    columns = [np.zeros(count, t) for t in "QQBii"]
    return [*columns, np.zeros((count, 5), np.int32), np.zeros((count, 4, 4, 3), np.uint8)]


def test_wrong_arguments():
    sides = np.array(
        [[0, 5, -1], [5, 0, 3]], np.int32
    )  # without pixels: an empty crop, refused later
    assert not _native.random_crops(*sides, np.arange(3), 0, 0, (0.1, 1), (1, 1), 1.0).any()
    assert not _native.center_crops(*sides, 1.0).any()
    two, three, one, pixels = (
        arguments(2),
        arguments(3),
        np.ones(1, np.int32),
        np.zeros((4, 4, 3), np.uint8),
    )
    assert _native.decode_batch(POOL, b"", *arguments(0)).shape == (0,)
    for k in range(len(two)):
        with pytest.raises(ValueError, match="differ in length"):
            _native.decode_batch(POOL, b"", *two[:k], three[k], *two[k + 1 :])
        with pytest.raises(TypeError):
            _native.decode_batch(POOL, b"", *two[:k], two[k].astype(np.float32), *two[k + 1 :])
    read_only = np.frombuffer(bytes(96), np.uint8).reshape(2, 4, 4, 3)
    for out in (
        read_only,
        np.zeros((2, 4, 4, 6), np.uint8)[..., ::2],
        np.zeros((2, 4, 4, 4), np.uint8),
    ):
        with pytest.raises(TypeError):
            _native.decode_batch(POOL, b"", *two[:-1], out)
    with pytest.raises(TypeError):
        _native.decode_batch(POOL, "text", *two)
    crops, index = _native.random_crops, np.zeros(1, np.int64)
    for call, *rest in (
        (_native.decode_batch, POOL, b"", *two[:-1], np.zeros((2, 0, 4, 3), np.uint8)),
        (crops, one, one, np.zeros(2, np.int64), 0, 0, (0.1, 1), (1, 1), 0),
        *(
            (crops, one, one, index, 0, 0, *draw)
            for draw in (((1, 0.1), (1, 1), 0), ((0.1, 1), (1, 1), 2))
        ),
        (_native.center_crops, one, one, 1.5),
        *((_native.Pool, threads) for threads in (0, 100_000)),
        *(
            (_native.encode, image, 90)
            for image in (pixels[:0], np.zeros((1, 70_000, 3), np.uint8))
        ),
        *((_native.encode, pixels, quality) for quality in (0, 101)),
        *((_native.resize, pixels, *size) for size in ((0, 4), (2**40, 2**40))),
        (_native.status_message, len(MESSAGES)),
    ):
        with pytest.raises(ValueError):  # noqa: PT011
            call(*rest)
