"""The writer, checked by an independent parser of the documented layout."""

import io
import resource
import struct

import numpy as np
import pytest
from beton_files import Files, encoded, parse, photo, pngs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from matryoshka import json_files
from matryoshka.data import BetonError, BetonFile, layout, write_beton
from matryoshka.data.reader import manifest_path
from matryoshka.data.sources import decode_image, upright
from matryoshka.data.writer import select_subset
from matryoshka.files import FileError


@pytest.mark.parametrize("mode", ["raw", "jpg", "proportion", "smart"])
def test_the_writer_follows_the_layout(tmp_path, mode):
    source, path = pngs(30), tmp_path / "x.beton"
    manifest = write_beton(
        source, path, max_resolution=64, write_mode=mode, num_workers=2, chunk_size=7
    )
    page, fields, records, rows, data = parse(path)
    assert (page, fields) == (8 << 20, [(2, b"image"), (1, b"label")])
    assert ([row[0] for row in rows], rows[0][1]) == (list(range(30)), page)
    assert [r[4] for r in records] == source.labels.tolist()
    for i, ((stored, width, height, pointer, _), (_, at, size)) in enumerate(
        zip(records, rows, strict=True)
    ):
        assert (width, height, pointer) == (40, 30, at)
        want, payload = np.asarray(photo(40, 30, seed=i)), data[at : at + size]
        if stored == 1:
            assert payload == want.tobytes()
        else:
            assert (
                np.abs(np.asarray(Image.open(io.BytesIO(payload))).astype(int) - want).mean() < 4
            ), "mean difference to the source"
    modes = [r[0] for r in records]
    assert set(modes) == {"raw": {1}, "smart": {1}, "jpg": {0}, "proportion": {0, 1}}[mode]
    assert manifest == json_files.decode(manifest_path(path).read_bytes())[0]
    numbers = (manifest["counts"]["jpg"], manifest["num_samples"], manifest["num_bytes"])
    assert numbers == (modes.count(0), 30, len(data))


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), min_size=1, max_size=6),
    limit=st.integers(1, 90),
    mode=st.sampled_from(["raw", "jpg", "proportion"]),
)
def test_sizes_and_modes_round_trip(tmp_path, sizes, limit, mode):
    source = Files([(f"{i}.png", encoded(photo(*size, seed=i)), 0) for i, size in enumerate(sizes)])
    write_beton(source, tmp_path / "x", max_resolution=limit, write_mode=mode, num_workers=1)
    with BetonFile(tmp_path / "x") as data:
        (samples,) = data.fetch(np.arange(len(data)))
        for i, size in enumerate(sizes):
            ratio = min(1, limit / np.array(size).max())  # FFCV's rule
            width, height = np.maximum(1, (ratio * np.array(size)).astype(int)).tolist()
            assert (samples.width[i], samples.height[i]) == (width, height)
            stored = samples.data[samples.offset[i] :][: samples.size[i]].tobytes()
            if samples.mode[i] == layout.JPG:
                assert Image.open(io.BytesIO(stored)).size == (width, height)
            elif (width, height) == size:
                assert stored == photo(width, height, seed=i).tobytes()


def test_the_bytes_depend_on_the_seed_and_on_no_thread(tmp_path):
    def write(**options):
        write_beton(pngs(60), tmp_path / "x", max_resolution=32, write_mode="proportion", **options)
        return (tmp_path / "x").read_bytes(), manifest_path(tmp_path / "x").read_bytes()

    first = write(num_workers=1)
    assert all(
        write(num_workers=w, chunk_size=c) == first for w, c in ((1, 100), (2, 7), (4, 1), (0, 13))
    )
    assert write(seed=1)[0] != first[0]


def test_pages_fill_up_and_grow_with_the_resolution(tmp_path):
    image = encoded(photo(1100, 900), "BMP")  # 2.97 MB of pixels: two to a page
    source = Files([(str(i), image, 0) for i in range(6)])
    write_beton(source, tmp_path / "x", max_resolution=1200, write_mode="raw")
    _, _, _, rows, data = parse(tmp_path / "x")
    assert [pointer >> 23 for _, pointer, _ in rows] == [1, 1, 2, 2, 3, 3]
    assert len(data) == (4 << 23) + 6 * 24, f"a file of {len(data)} bytes"
    write_beton(pngs(1), tmp_path / "y", max_resolution=1673, write_mode="raw")
    assert parse(tmp_path / "y")[0] == 16 << 20


def test_a_subset_is_even_over_the_classes(tmp_path):
    labels = np.repeat([0, 1, 2], [50, 3, 50])
    chosen = select_subset(labels, 23, 0).tolist()
    assert np.bincount(labels[chosen]).tolist() == [10, 3, 10]
    assert sorted(set(chosen)) == chosen == select_subset(labels, 23, 0).tolist()
    assert chosen != select_subset(labels, 23, 1).tolist()
    write_beton(pngs(20), tmp_path / "x", max_resolution=32, subset=6, names=True)
    data = BetonFile(tmp_path / "x")
    assert np.bincount(data.labels).tolist() == [3, 3]
    assert data.name(0) == f"sample 0 ({data.manifest['names'][0]})"


def test_odd_sources_are_converted_or_listed(tmp_path):
    rgb, rotated = photo(32, 24), Image.Exif()
    rotated[0x0112] = 6
    palette = Image.fromarray(np.zeros((8, 8), np.uint8), "P")
    palette.putpalette([10, 20, 30] * 256)
    files = {
        "gray.jpg": encoded(rgb.convert("L"), "JPEG"),
        "cmyk.jpg": encoded(rgb.convert("CMYK"), "JPEG"),
        "png.jpg": encoded(rgb),
        "palette.png": encoded(palette, transparency=bytes(256)),
        "alpha.png": encoded(rgb.convert("RGBA")),
        "deep.png": encoded(Image.fromarray(np.full((8, 8), 257 * 200, np.uint16))),
        "rotated.jpg": encoded(rgb, "JPEG", exif=rotated),
        "cut.jpg": encoded(rgb, "JPEG", quality=95)[:900],
        "empty.jpg": b"",
        "text.jpg": b"this is no image",
        "gone.jpg": FileNotFoundError(2, "No such file or directory"),
        "huge.png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + struct.pack(">II", 60000, 60000) + bytes(99),
    }
    source = Files([(name, content, 0) for name, content in files.items()])
    manifest = write_beton(source, tmp_path / "x", max_resolution=64, write_mode="raw", names=True)
    assert manifest["counts"] == {
        "jpg": 0,
        "raw": 7,
        "resized": 0,
        "grayscale": 2,
        "exif_orientation": 1,
    }
    assert manifest["cmyk"] == [{"name": "cmyk.jpg"}]
    assert manifest["other_content"] == [{"name": "png.jpg", "reason": "PNG"}]
    assert [e["name"] for e in manifest["broken"]] == list(files)[7:]
    assert all(e["reason"] and "0x" not in e["reason"] for e in manifest["broken"])
    assert manifest["names"] == list(files)[:7]
    _, _, records, rows, data = parse(tmp_path / "x")
    pixels = [
        np.frombuffer(data, np.uint8, size, at).reshape(height, width, 3)
        for (_, width, height, _, _), (_, at, size) in zip(records, rows, strict=True)
    ]
    for stored, want in zip(
        pixels[2:6], (np.asarray(rgb), (10, 20, 30), np.asarray(rgb), 200), strict=True
    ):
        assert (stored == want).all()
    write_beton(source, tmp_path / "y", max_resolution=64, write_mode="raw", exif_rotate=True)
    assert (BetonFile(tmp_path / "x").width[6], BetonFile(tmp_path / "y").width[6]) == (32, 24)


def test_transcode_keeps_the_coefficients_of_what_fits(tmp_path):
    image, turned = photo(96, 64), Image.Exif()
    turned[0x0112] = 6
    files = {
        "plain": encoded(image, "JPEG", quality=97, subsampling=0),
        "grey": encoded(image.convert("L"), "JPEG"),
        "turned": encoded(image, "JPEG", exif=turned),
        "large": encoded(photo(200, 90), "JPEG"),
        "progressive": encoded(image, "JPEG", progressive=True),
        "cmyk": encoded(image.convert("CMYK"), "JPEG"),
        "cut": encoded(photo(96, 64, seed=1), "JPEG", quality=95)[:-700],
        "png": encoded(image),
    }
    source = Files([(name, content, 0) for name, content in files.items()])

    def write(**options):
        manifest = write_beton(source, tmp_path / "x", max_resolution=100, **options)
        _, _, records, rows, data = parse(tmp_path / "x")
        kept = []
        for (mode, width, height, _, _), (_, at, size) in zip(records, rows, strict=True):
            name = list(files)[len(kept)]  # "cut" comes behind all that matter
            stored = (
                np.asarray(Image.open(io.BytesIO(data[at : at + size])).convert("RGB"))
                if mode == 0
                else None
            )
            original = (
                np.asarray(Image.open(io.BytesIO(files[name])).convert("RGB"))
                if name != "cut"
                else None
            )
            kept.append(stored is not None and np.array_equal(stored, original))
            assert max(width, height) <= 100, f"{width}x{height} pixels"
        return [name for name, k in zip(files, kept, strict=False) if k], manifest["counts"]

    names, counts = write(write_mode="jpg", transcode="fit")
    assert names == ["plain", "grey", "turned"]
    assert (counts["transcoded"], counts["grayscale"], counts["exif_orientation"]) == (3, 1, 1)
    assert counts["transcoded_source_bytes"] == sum(len(files[name]) for name in names), (
        "bytes of the transcoded sources"
    )
    assert 0 < counts["transcoded_bytes"] < counts["transcoded_source_bytes"] + 1000, (
        f"{counts['transcoded_bytes']} transcoded bytes"
    )
    assert write(write_mode="jpg", transcode="fit", exif_rotate=True)[0] == ["plain", "grey"]
    assert write(write_mode="raw", transcode="fit")[1]["transcoded"] == 0
    assert write(write_mode="raw", transcode="always")[0] == ["plain", "grey", "turned"]
    assert "transcoded" not in write(write_mode="jpg")[1]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright_is_what_pillow_does(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photo(16, 8), exif=exif)
    decoded = decode_image(data)
    want = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert (decoded.orientation, (upright(decoded.pixels, orientation) == want).all()) == (
        orientation,
        True,
    )


NONSENSE = [
    (
        "compress_probability=0.5 .*write_mode=jpg",
        {"compress_probability": 0.5, "write_mode": "jpg"},
    ),
    ("smart_threshold=5 .*write_mode=raw", {"smart_threshold": 5, "write_mode": "raw"}),
    ("write_mode=png", {"write_mode": "png"}),
    ("jpeg_quality=0", {"jpeg_quality": 0}),
    ("transcode=maybe", {"transcode": "maybe"}),
    ("max_resolution=0", {"max_resolution": 0}),
    ("subset=5.* 1 to 4", {"subset": 5}),
]


@pytest.mark.parametrize(("message", "options"), NONSENSE)
def test_options_that_make_no_sense(tmp_path, options, message):
    with pytest.raises(BetonError, match=message):
        write_beton(pngs(4), tmp_path / "x", **{"max_resolution": 9} | options)


@pytest.mark.parametrize("how", [ArithmeticError, KeyboardInterrupt, "full", "broken"])
@pytest.mark.parametrize("old", [False, True])
def test_an_interrupted_write_changes_nothing(tmp_path, how, old):
    path, source, limit = tmp_path / "x", pngs(40), resource.getrlimit(resource.RLIMIT_FSIZE)
    if old:
        path.write_bytes(b"the old one")
    before = [(p, p.read_bytes()) for p in tmp_path.iterdir()]
    if (
        how == "full"
    ):  # the kernel writes nothing behind this byte: pwrite comes back short, then fails
        resource.setrlimit(resource.RLIMIT_FSIZE, ((9 << 20) + 5, limit[1]))
    elif how == "broken":
        source = Files([("x.jpg", b"nothing", 0)] * 3)
    else:
        source.files[25] = ("25", how(), 0)
    expected = {"full": FileError, "broken": BetonError}.get(how, how)
    options = {"max_resolution": 64, "num_workers": 2, "chunk_size": 3}
    try:
        with pytest.raises(expected) as caught:
            write_beton(source, path, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not isinstance(how, str) or str(path) in str(caught.value)
    assert [(p, p.read_bytes()) for p in tmp_path.iterdir()] == before


def test_the_folder_to_write_to(tmp_path):
    write_beton(pngs(2), tmp_path / "new" / "x", max_resolution=9)
    for place, message in (("far/away/x", "far does not exist"), ("new", "is a folder")):
        with pytest.raises(BetonError, match=message):
            write_beton(pngs(2), tmp_path / place, max_resolution=9)
