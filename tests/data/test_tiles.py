"""Crops that decode only the tiles they need equal crops of the full decode, bit by bit."""

import io
import itertools
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jpeg_files import SAMPLINGS, picture, three_components
from jpeg_files import sampled as make
from PIL import Image

from matryoshka.data import _native

OK, CORRUPT = 0, 1
KNOWN = 11  # statuses
POOL = _native.Pool(1)


def pillow(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def decode(samples, size, exact=True):
    """Samples are (bytes, width, height, crop)."""
    content, width, height, crops = zip(*samples, strict=True)
    sizes = np.array([len(c) for c in content], np.uint64)
    out = np.full((len(samples), *size, 3), 77, np.uint8)
    status = _native.decode_batch(
        POOL,
        b"".join(content),
        np.cumsum(sizes, dtype=np.uint64) - sizes,
        sizes,
        np.zeros(len(samples), np.uint8),
        *(np.array(c, np.int32) for c in (width, height, crops)),
        out,
        exact,
    )
    assert not out[status != OK].any(), "a failed slot is zero"
    return out, status


def check_crop(data, whole, crop):
    x, y, w, h, flip = crop
    out, status = decode([(data, whole.shape[1], whole.shape[0], crop)], (h, w))
    assert status.tolist() == [OK]
    expected = whole[y : y + h, x : x + w]
    np.testing.assert_array_equal(out[0], expected[:, ::-1] if flip else expected)


def crops_of(width, height, rng, n):
    for _ in range(n):
        w, h = rng.integers(1, width + 1), rng.integers(1, height + 1)
        if rng.random() < 0.5:  # small: one or two tiles
            w, h = min(w, rng.integers(1, 20)), min(h, rng.integers(1, 20))
        x, y = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
        x = [x, 0, width - w][rng.integers(3)]  # often at an edge
        y = [y, 0, height - h][rng.integers(3)]
        yield int(x), int(y), int(w), int(h), int(rng.integers(2))


markers = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"restart_marker_blocks": st.integers(1, 40)}),
    st.fixed_dictionaries({"restart_marker_rows": st.integers(1, 4)}),
    st.integers(1, 200).map(lambda tile: {"tile": tile}),
)


@settings(max_examples=400)
@given(
    width=st.integers(1, 200) | st.integers(1, 40),
    height=st.integers(1, 120) | st.integers(1, 40),
    sampling=st.sampled_from(list(SAMPLINGS)),
    options=markers,
    seed=st.integers(0, 2**32),
    quality=st.sampled_from([95, 50, 10]),
    progressive=st.booleans(),
)
def test_crops_are_those_of_the_whole_image(
    *, width, height, sampling, options, seed, quality, progressive
):
    """Twelve crops of each of 400 images."""
    options = dict(options)
    tile = options.pop("tile", None)
    if not options and tile is None and progressive and SAMPLINGS[sampling][2] is None:
        options["progressive"] = True
    data = make(width, height, sampling, quality, **options)
    whole = pillow(data)
    if tile is not None:
        data = _native.transcode(data, tile)
        np.testing.assert_array_equal(pillow(data), whole)
    for crop in crops_of(width, height, np.random.default_rng(seed), 12):
        check_crop(data, whole, crop)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("tile", [0, 8, 16, 64])
def test_every_crop_of_a_size(sampling, tile):
    """All places of small crops, so that they end on either side of every tile's edge."""
    width, height = 99, 35
    data = _native.transcode(make(width, height, sampling), tile)
    whole = pillow(data)
    for w, h in ((1, 1), (3, 2)):
        xs, ys = range(0, width - w + 1), range(0, height - h + 1, 3)
        samples = [(data, width, height, (x, y, w, h, 0)) for x, y in itertools.product(xs, ys)]
        out, status = decode(samples, (h, w))
        assert not status.any()
        np.testing.assert_array_equal(
            out, [whole[y : y + h, x : x + w] for *_, (x, y, *_) in samples]
        )


@pytest.mark.parametrize("size", [(1, 1), (17, 5), (63, 40), (64, 64), (353, 70), (500, 90)])
@pytest.mark.parametrize("tile", [1, 16, 64, 200, 100_000])
def test_encode_with_markers(size, tile):
    pixels = picture(*size[::-1])
    plain, tiled = _native.encode(pixels, 90, tile=0), _native.encode(pixels, 90, tile=tile)
    np.testing.assert_array_equal(pillow(plain), pillow(tiled))
    assert b"\xff\xdd" not in plain
    at = tiled.index(b"\xff\xdd\x00\x04") + 4
    interval, columns = int.from_bytes(tiled[at : at + 2], "big"), -(-size[0] // 16)
    assert columns % interval == 0
    assert _native.encode(pixels, 90) == _native.encode(pixels, 90, tile=64)
    rng = np.random.default_rng(tile)
    for crop in crops_of(*size, rng, 10):
        check_crop(tiled, pillow(plain), crop)


def test_tiles_are_about_as_wide_as_asked_for():
    for width, expected in (
        (500, 4),
        (375, 4),
        (333, 3),
        (496, 31),
        (64, 4),
        (65, 5),
        (30, 2),
        (1, 1),
    ):
        data = _native.encode(picture(20, width), 90)
        at = data.index(b"\xff\xdd\x00\x04") + 4
        assert int.from_bytes(data[at : at + 2], "big") == expected


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_transcode_changes_no_pixel(sampling):
    for size in ((1, 1), (33, 31), (200, 90)):
        for options in ({}, {"restart_marker_blocks": 3}, {"optimize": True}):
            data = make(*size, sampling, **options)
            for tile in (0, 1, 64):
                copy = _native.transcode(data, tile)
                np.testing.assert_array_equal(pillow(copy), pillow(data))
                assert (b"\xff\xdd" in copy) == (tile > 0), (
                    "a restart interval without tiles, or none with them"
                )


def test_images_do_not_leave_their_tables_behind():
    flat, pixels = io.BytesIO(), picture(64, 64)
    Image.new("RGB", (64, 64), (9, 8, 7)).save(flat, "JPEG", optimize=True)
    several_scans = three_components(pixels[:8, :8], 3)  # gets new tables
    encoded = _native.encode(pixels, 90)
    for source in [
        flat.getvalue(),
        several_scans,
        make(80, 64, "444"),
        several_scans,
        flat.getvalue(),
    ]:
        np.testing.assert_array_equal(pillow(_native.transcode(source, 16)), pillow(source))
        assert _native.encode(pixels, 90) == encoded


def test_transcode_leaves_metadata_out():
    exif = Image.Exif()
    exif[0x10E] = "x" * 500
    data = make(100, 60, exif=exif, icc_profile=b"y" * 3000)
    copy = _native.transcode(data)
    assert b"x" * 50 not in copy
    assert b"y" * 50 not in copy
    np.testing.assert_array_equal(pillow(copy), pillow(data))


def test_transcode_refuses():
    image, file = Image.fromarray(picture(40, 40)), io.BytesIO()
    image.convert("CMYK").save(file, "JPEG")
    good = make(40, 40)
    for data, text in (
        (make(40, 40, progressive=True), "not a baseline JPEG"),
        (file.getvalue(), "colour space"),
        (good[: len(good) // 2], "truncated or corrupt"),
        (b"GIF89a", "not a JPEG"),
        (b"", "not a JPEG"),
    ):
        with pytest.raises(ValueError, match=text):
            _native.transcode(data)
    for call in (
        lambda: _native.transcode(good, -1),
        lambda: _native.encode(picture(9, 9), 90, -1),
    ):
        with pytest.raises(ValueError, match="tile"):
            call()
    np.testing.assert_array_equal(
        pillow(_native.transcode(good)), pillow(good)
    )  # after failures, too


def test_metadata_and_padding_are_no_obstacle():
    """Comments, other APPn, fill bytes before markers, several DRI: decoders take them, so do
    crops.
    """
    data = make(150, 60, restart_marker_blocks=2)
    whole = pillow(data)
    dri = data.index(b"\xff\xdd")
    comment = b"\xff\xfe\x00\x06\xff\xdd\xff\xd9"
    for variant in (
        data[:2] + comment + data[2:],
        data[:dri] + b"\xff\xff\xff" + data[dri:],
        data[:dri] + b"\xff\xdd\x00\x04\x00\x09" + data[dri:],
        data.replace(b"\xff\xd3", b"\xff\xff\xff\xd3"),
        data[:-2],
        data[:-2] + b"\xff" * 5,
    ):
        for crop in crops_of(150, 60, np.random.default_rng(0), 40):
            check_crop(variant, whole, crop)


def segments_of(data):
    """(header, segments without markers, end) of a JPEG with restart markers."""
    scan = data.index(b"\xff\xda")
    scan += 2 + int.from_bytes(data[scan + 2 : scan + 4], "big")
    cuts = [
        i for i in range(scan, len(data) - 1) if data[i] == 0xFF and 0xD0 <= data[i + 1] <= 0xD9
    ]
    starts = [scan] + [c + 2 for c in cuts[:-1]]
    return data[:scan], [data[a:b] for a, b in zip(starts, cuts, strict=True)], data[cuts[-1] :]


def joined(header, parts, end, numbers=None):
    numbers = numbers or [k % 8 for k in range(len(parts) - 1)]
    body = parts[0] + b"".join(
        bytes([0xFF, 0xD0 + n]) + p for n, p in zip(numbers, parts[1:], strict=True)
    )
    return header + body + end


def test_wrong_markers_are_an_error():
    width, height = 128, 64
    data = _native.transcode(make(width, height), 32)
    header, parts, end = segments_of(data)
    assert len(parts) == 4 * 4, f"{len(parts)} segments"
    assert joined(header, parts, end) == data
    wrong_order = [k % 8 for k in range(15)]
    wrong_order[4], wrong_order[5] = wrong_order[5], wrong_order[4]
    dri = header.index(b"\xff\xdd\x00\x04") + 5
    for bad in (
        joined(header, parts, end, wrong_order),
        joined(header, parts, end, [0] * 15),
        joined(header, parts[:8], end),
        joined(header, [p[: len(p) // 2] for p in parts], end),
        joined(header, [p + b"\x55" * 40 for p in parts], end),
        header[:dri] + b"\x01" + header[dri + 1 :] + joined(b"", parts, end),
        header[:dri] + b"\x04" + header[dri + 1 :] + joined(b"", parts, end),
    ):
        for crop in ((70, 40, 20, 20, 0), (100, 50, 1, 1, 0), (5, 50, 100, 10, 0)):
            _, status = decode([(bad, width, height, crop)], (8, 8))
            assert status.tolist() == [CORRUPT]
    for short in (parts[:5] + parts[6:], [*parts[:5], parts[5] + parts[6], *parts[7:]]):
        # Numbered as if nothing were missing: seen where the count matters.
        _, status = decode(
            [(joined(header, short, end), width, height, (90, 50, 38, 14, 0))], (8, 8)
        )
        assert status.tolist() == [CORRUPT]


def mutated(source, rng):
    """Bytes set, inserted or taken out, whole stretches moved or cut off; often where the structure
    is.
    """
    data = bytearray(source)
    for _ in range(rng.integers(1, 4)):
        reach = 640 if rng.random() < 0.4 else len(data)
        at, n = int(rng.integers(0, reach)) % max(1, len(data)), int(rng.integers(1, 9))
        action = rng.integers(7)
        if action == 6:  # at a marker
            places = [i for i in range(len(data) - 1) if data[i] == 0xFF and data[i + 1] != 0]
            at, action = int(rng.choice(places)) + int(rng.integers(0, 6)), int(rng.integers(3))
        if action == 0:
            data[at : at + n] = rng.bytes(n)
        elif action == 1:
            data[at:at] = (
                rng.bytes(n) if rng.random() < 0.5 else bytes([0xFF, 0xD0 + int(rng.integers(8))])
            )
        elif action == 2:
            del data[at : at + n]
        elif action == 3:
            del data[at:]
        elif action == 4:
            data[at : at + 100] = data[at + 50 : at + 150]
        else:
            data[at : at + 1] = (
                bytes([data[at] ^ (1 << int(rng.integers(8)))]) if at < len(data) else b""
            )
        if len(data) < 4:
            break
    return bytes(data)


@pytest.mark.parametrize("exact", [True, False])
def test_mutated_tiles(exact):
    """3,300 damaged streams each: a known status, and the healthy neighbour as it was.
    MUTATION_ROUNDS for more.
    """
    rounds = int(os.environ.get("MUTATION_ROUNDS", "10"))
    rng = np.random.default_rng(rounds)
    width, height = 160, 96
    kinds = [(s, t) for s in SAMPLINGS for t in (8, 32, 64)]
    sources = [_native.transcode(make(width, height, s), t) for s, t in kinds]
    sources += [make(width, height, s, restart_marker_blocks=7) for s in SAMPLINGS] + [
        make(width, height)
    ]
    good = (sources[6], width, height, (30, 20, 90, 60, 1))
    expected = decode([good], (32, 32), exact)[0][0]
    counts = np.zeros(KNOWN, int)
    for _ in range(rounds):
        samples = []
        for source in [s for s in sources for _ in range(10)]:
            crop = next(crops_of(width, height, rng, 1))
            samples += [(mutated(source, rng), width, height, crop), good]
        out, status = decode(samples, (32, 32), exact)
        assert (out[1::2] == expected).all()
        assert not status[1::2].any()
        counts += np.bincount(status[::2], minlength=KNOWN)  # raises for an unknown status
    assert counts.sum() == 330 * rounds, f"{counts.sum()} streams were decoded"
    assert counts[CORRUPT] > 50 * rounds, f"only {counts[CORRUPT]} were found corrupt"


def photo(width, height, seed=0):
    """Like a photo: energy falls with the frequency, with edges in it."""
    rng = np.random.default_rng(seed)
    spectrum = np.fft.rfft2(rng.normal(size=(3, height, width)))
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    pixels = np.fft.irfft2(
        spectrum / np.maximum(np.hypot(fy, fx), 1 / max(width, height)) ** 1.2, (height, width)
    )
    pixels = 128 + 45 * pixels / pixels.std(axis=(1, 2), keepdims=True)
    pixels[:, height // 3 : height // 2, width // 4 : width // 2] += np.array([60, -40, 20])[
        :, None, None
    ]
    return np.clip(pixels, 0, 255).astype(np.uint8).transpose(1, 2, 0).copy()


def psnr(a, b):
    return 10 * np.log10(255**2 / max(((a.astype(float) - b) ** 2).mean(), 1e-9))


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("kind", ["tiles", "plain", "progressive"])
def test_fast_is_close_to_exact(sampling, kind):
    """Chroma is enlarged only once, 1/2 DCT scale for strong reductions: training does not see the
    difference.
    """
    _, subsampling, factors, *_ = SAMPLINGS[sampling]
    if subsampling is None or (factors is not None and kind == "progressive"):
        kind = "plain"
    options = {} if subsampling is None else {"subsampling": subsampling}
    file = io.BytesIO()
    image = Image.fromarray(photo(500, 375)).convert(SAMPLINGS[sampling][0])
    image.save(file, "JPEG", quality=90, progressive=kind == "progressive", **options)
    data, width, height = bytearray(file.getvalue()), 500, 375
    if factors is not None and subsampling is not None:  # the same blocks as another image
        sof = data.index(b"\xff\xc0")
        mcu, plain = SAMPLINGS[sampling][3:], (16, 8) if subsampling == 1 else (16, 16)
        width, height = 500 // plain[0] * mcu[0] + mcu[0], -(-375 // plain[1]) * mcu[1]
        data[sof + 5 : sof + 9] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
        data[sof + 11] = factors
    data = _native.transcode(bytes(data)) if kind == "tiles" else bytes(data)
    rng = np.random.default_rng(5)
    for size in ((224, 224), (96, 80), (61, 300)):
        crops = [
            (data, width, height, crop)
            for crop in crops_of(width, height, rng, 20)
            if min(crop[2:4]) > 60
        ]
        exact, fast = (decode(crops, size, e) for e in (True, False))
        assert not exact[1].any()
        assert not fast[1].any()
        errors = [psnr(a, b) for a, b in zip(exact[0], fast[0], strict=True)]
        assert min(errors) > (45 if "grey" in sampling else 28 if factors else 35), (
            f"PSNR {min(errors)} dB"
        )
        cast = np.abs(exact[0].astype(float).mean((1, 2)) - fast[0].mean((1, 2))).max()
        assert cast < 1.5, f"a colour cast of {cast} levels"


def test_fast_does_not_depend_on_tiles():
    for sampling in SAMPLINGS:
        plain = make(200, 150, sampling)
        copies = [
            plain,
            *(_native.transcode(plain, t) for t in (0, 8, 64)),
            make(200, 150, sampling, restart_marker_blocks=5),
        ]
        for crop in crops_of(200, 150, np.random.default_rng(1), 60):
            out, status = decode([(c, 200, 150, crop) for c in copies], (48, 40), exact=False)
            assert not status.any()
            assert (out == out[0]).all()


def test_same_size_grey_is_exact_in_both_ways():
    """Without chroma the planes are the image: this checks every block of the fast decoder against
    libjpeg's.
    """
    for quality in (5, 50, 90, 100):
        data = make(301, 203, "grey", quality)
        whole = pillow(data)
        for crop in crops_of(301, 203, np.random.default_rng(quality), 60):
            x, y, w, h, flip = crop
            out, _ = decode([(data, 301, 203, crop)], (h, w), exact=False)
            expected = whole[y : y + h, x : x + w]
            np.testing.assert_array_equal(out[0], expected[:, ::-1] if flip else expected)
