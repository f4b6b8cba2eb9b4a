"""`matryoshka data info|verify`: output and exit status for sound and damaged data."""

import io
import json
import struct

import numpy as np
import pytest
from beton_files import Files, build, encoded, photo
from matryoshka.train import check_data
from PIL import Image

from matryoshka import cli
from matryoshka.data import BetonFile, write_beton

SAMPLINGS = {0: "4:4:4", 1: "4:2:2", 2: "4:2:0"}


@pytest.fixture
def mixed(tmp_path):
    """raw and jpg, three classes of which one is empty, one broken file; and its parts."""
    files = Files(
        [(f"{i}.png", encoded(photo(30 + i, 40, seed=i)), i % 2) for i in range(9)], "abc"
    )
    files.files.append(("dead.jpg", b"\xff\xd8\xff", 0))
    files.labels = np.append(files.labels, 0)
    options = {"max_resolution": 40, "write_mode": "proportion", "seed": 2, "names": True}
    write_beton(files, tmp_path / "x.beton", **options)
    return tmp_path / "x.beton"


def run(capsys, *argv):
    """(exit status, stdout, stderr)"""
    try:
        code = cli.main(["data", *map(str, argv)])
    except SystemExit as end:
        code = end.code
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def damaged(path, index):
    """Zeros in the second half of a sample's JPEG."""
    data = BetonFile(path)
    content, start, size = (
        bytearray(path.read_bytes()),
        int(data.offset[index]),
        int(data.size[index]),
    )
    content[start + size // 2 : start + size] = bytes(size - size // 2)
    path.write_bytes(content)


def test_info(mixed, capsys):
    code, out, _ = run(capsys, "info", mixed, "--json")
    facts, data = json.loads(out), BetonFile(mixed)
    assert code == 0
    assert facts["modes"] == {
        "jpg": int((data.mode == 0).sum()),
        "raw": int((data.mode == 1).sum()),
    }
    assert min(facts["modes"].values()) > 0, f"modes {facts['modes']}"
    assert facts["fields"] == [
        {"name": "image", "type": "image"},
        {"name": "label", "type": "integer"},
    ]
    assert (facts["samples"], facts["file_bytes"]) == (9, mixed.stat().st_size)
    assert facts["page_bytes"] == struct.unpack_from("<I", mixed.read_bytes(), 4)[0]
    assert facts["width"] == {"min": 30, "median": 34.0, "max": 38}
    assert facts["height"] == {"min": 40, "median": 40.0, "max": 40}
    assert facts["image_bytes"]["max"] == 3 * 40 * max(data.width[data.mode == 1])
    assert facts["classes"] == ["a", "b", "c"]
    assert facts["labels"]["per_class"] == {"min": 4, "median": 4.5, "max": 5}
    assert (
        facts["labels"]["fewest"],
        facts["labels"]["most"],
        facts["labels"]["without_images"],
    ) == (1, 0, 1)
    assert facts["noticed"]["broken"] == 1
    assert facts["jpeg"]["process"] == {"baseline": facts["modes"]["jpg"]}
    code, out, _ = run(capsys, "info", mixed)
    for text in (
        "9 samples",
        "a, b, c",
        "1 classes have no image",
        "1 left out",
        "write_mode=proportion",
        "baseline",
    ):
        assert text in out
    assert max(len(line) for line in out.splitlines()) <= 120, "a line of more than 120 columns"


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("blocks", [0, 3])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_headers_equal_what_pillow_says(sampling, blocks, progressive):
    options = {"restart_marker_blocks": blocks} if blocks else {}
    data = encoded(photo(70, 50), "JPEG", subsampling=sampling, progressive=progressive, **options)
    image = Image.open(io.BytesIO(data))
    header = check_data.jpeg_header(data)
    assert header is not None
    assert header.process == ("progressive" if "progressive" in image.info else "baseline")
    assert header.sampling == SAMPLINGS[sampling]
    assert header.spacing == blocks * 8 * image.layer[0][1]
    for cut in range(len(data)):
        if (header := check_data.jpeg_header(data[:cut])) is not None:
            assert header.sampling == SAMPLINGS[sampling]


def test_a_grey_header_and_no_header():
    header = check_data.jpeg_header(
        encoded(photo(70, 50).convert("L"), "JPEG", restart_marker_blocks=2)
    )
    assert header == ("baseline", "grayscale", 16)
    rng = np.random.default_rng(0)
    for n in range(500):
        assert check_data.jpeg_header(b"\xff\xd8\xff" + rng.bytes(n)) is None


def test_verify_of_a_sound_file(mixed, capsys):
    for more in ([], ["--workers", "1"]):
        code, out, _ = run(capsys, "verify", mixed, *more)
        assert (code, "sound: all 9 samples decode" in out) == (0, True)
    code, out, _ = run(capsys, "verify", mixed, "--json")
    assert (code, json.loads(out)["broken"]) == (0, [])


def test_verify_lists_what_is_broken(mixed, capsys):
    jpg = np.flatnonzero(BetonFile(mixed).mode == 0)[:2].tolist()
    for index in jpg:
        damaged(mixed, index)
    code, out, _ = run(capsys, "verify", mixed, "--json")
    found = json.loads(out)
    assert (code, found["broken_samples"]) == (1, 2)
    reason = "truncated or corrupt JPEG data"
    assert found["broken"] == [{"index": i, "name": f"{i}.png", "reason": reason} for i in jpg]
    code, out, _ = run(capsys, "verify", mixed)
    assert code == 1
    assert "2 of 9 samples are BROKEN" in out
    assert f"{jpg[0]} {jpg[0]}.png  truncated" in out


def test_verify_looks_at_labels_and_other_fields(tmp_path, capsys):
    samples = [
        ((-1) ** i, 1, 2, 1, b"abcdef", text, len(text))
        for i, text in enumerate([b"{}\0", b"[]\0", b"{\0"])
    ]
    fields = [(1, b"label"), (2, b"image"), (5, b"info")]
    path = build(tmp_path / "x", fields, "<qBHHQQQ3x", samples)
    code, out, _ = run(capsys, "verify", path, "--json")
    found = {entry["index"]: entry["reason"] for entry in json.loads(out)["broken"]}
    assert (code, set(found)) == (1, {1, 2})
    assert found[1] == "label -1 is negative"
    assert "field 'info': sample 2 is not JSON" in found[2]


def test_verify_of_a_folder(folder, tmp_path, capsys):
    code, out, _ = run(capsys, "verify", folder / "train")
    assert (code, "sound: all 20 samples decode" in out) == (0, True)
    (tmp_path / "a").mkdir()
    whole = encoded(photo(60, 50), "JPEG")
    content = {
        "cut.jpg": whole[: len(whole) // 2],
        "empty.png": b"",
        "good.jpg": whole,
        "png.jpg": encoded(photo(9, 9)),
    }
    content["cmyk.jpg"] = encoded(photo(9, 9).convert("CMYK"), "JPEG")
    for name, data in content.items():
        (tmp_path / "a" / name).write_bytes(data)
    (tmp_path / "a" / "gone.jpg").symlink_to("nowhere")
    code, out, _ = run(capsys, "verify", tmp_path, "--json")
    found = json.loads(out)
    assert code == 1
    assert [entry["name"] for entry in found["broken"]] == [
        "a/cut.jpg",
        "a/empty.png",
        "a/gone.jpg",
    ]
    assert [entry["reason"] for entry in found["broken"]][1:] == [
        "the file is empty",
        "No such file or directory",
    ]
    assert [entry["name"] for entry in found["noticed"]] == ["a/cmyk.jpg", "a/png.jpg"]


def test_what_cannot_be_read_is_one_line(mixed, tmp_path, capsys):
    content = mixed.read_bytes()
    (tmp_path / "cut").write_bytes(content[:-5])
    for argv in (
        ("info", tmp_path / "cut"),
        ("verify", tmp_path / "cut"),
        ("info", tmp_path),
        ("verify", tmp_path / "none"),
        ("verify", tmp_path / "none", "--workers", "-1"),
        ("verify", mixed, "--workers", "-1"),
    ):
        code, out, err = run(capsys, *argv)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("error: ")


def test_hostile_names_stay_on_their_line(tmp_path, capsys):
    path = build(
        tmp_path / "x", [(2, b"i\x1b[2J"), (1, b"label")], "<BHHQ3xq", [(0, 2, 1, b"no jpeg", 0)]
    )
    side = {
        "classes": ["a\n\x1b]0;b\x07"],
        "names": ["\ud800\r"],
        "options": {"x\n": "\x1b"},
        "counts": {"resized": []},
    }
    (tmp_path / "x.json").write_text(json.dumps(side | {"broken": 7, "damaged": ["\n"]}))
    code, out, err = run(capsys, "info", path)
    assert (code, err) == (0, "")
    assert all(line.isprintable() for line in out.splitlines())
    code, out, err = run(capsys, "verify", path)
    assert (code, err) == (1, "")
    assert all(line.isprintable() for line in out.splitlines())
    assert "not a JPEG" in out
