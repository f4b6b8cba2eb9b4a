"""`matryoshka write`: its two forms, its mistakes, and the files that it ignores."""

import io
import json

import numpy as np
import pytest
from beton_files import photo
from hypothesis import given
from hypothesis import strategies as st
from matryoshka.train import write_imagenet
from PIL import Image

from matryoshka import cli
from matryoshka.config import ConfigError
from matryoshka.data import BetonError, BetonFile, ImageFolder, image_files, sources, write_beton


def refused(argv, capsys) -> str:
    with pytest.raises(SystemExit, match=r"^2$"):
        cli.main(["write", *map(str, argv)])
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_both_forms_write_the_same_file(folder, tmp_path, capsys):
    short, long = tmp_path / "short.beton", tmp_path / "long.beton"
    assert cli.main(["write", str(folder / "train"), str(short)]) == 0
    options = ["--cfg.write_mode=jpg", "--cfg.max_resolution=500"]
    paths = [f"--cfg.data_dir={folder / 'train'}", f"--cfg.write_path={long}"]
    assert cli.main(["write", *paths, *options]) == 0
    assert short.read_bytes() == long.read_bytes()
    assert f"written: {short}" in capsys.readouterr().out


def test_options_and_files_win_over_the_defaults_of_the_short_form(tmp_path):
    file = tmp_path / "write.yaml"
    file.write_text("cfg: {write_mode: raw, max_resolution: 64}\n")
    words = ["photos", "out.beton"]
    parse = write_imagenet.parser().parse_args
    plain = parse(words).cfg
    assert (plain.write_mode, plain.max_resolution, plain.jpeg_quality) == ("jpg", 500, 90)
    assert (plain.data_dir, plain.write_path) == ("photos", "out.beton")
    given_by_file = parse([*words, "-C", str(file)]).cfg
    assert (given_by_file.write_mode, given_by_file.max_resolution) == ("raw", 64)
    mixed = parse(["--cfg.max_resolution=32", *words, "-C", str(file)]).cfg
    assert (mixed.write_mode, mixed.max_resolution) == ("raw", 32)


def test_the_long_form_keeps_the_defaults_of_the_papers():
    parse = write_imagenet.parser().parse_args
    paths = ["--cfg.data_dir=a", "--cfg.write_path=b"]
    assert parse([*paths, "--cfg.max_resolution=9"]).cfg.write_mode == "smart"
    with pytest.raises(ConfigError, match=r"^cfg\.max_resolution is required"):
        parse(paths)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["photos"], "error: expected PHOTOS OUT.beton, got 'photos'"),
        (["a", "b", "c"], "error: expected PHOTOS OUT.beton, got 'a' 'b' 'c'"),
        (
            ["photos", "--cfg.write_path=b"],
            "error: 'photos' and --cfg.write_path: give PHOTOS OUT.beton as words, or all of them "
            "as options",
        ),
    ],
)
def test_mixing_the_forms_is_one_line(argv, message, capsys):
    assert refused(argv, capsys) == message


def test_splits_are_not_classes(folder, tmp_path, capsys):
    line = refused([folder, tmp_path / "out.beton"], capsys)
    assert f"matryoshka write {folder}/train train.beton" in line
    assert f"matryoshka write {folder}/val val.beton" in line
    assert list(tmp_path.iterdir()) == []
    # Only such names; a class may be called train.
    for names in (("train", "bus"), ("train",), ("val", "test")):
        root = tmp_path / "-".join(names)
        for name in names:
            (root / name).mkdir(parents=True)
            photo(20, 20).save(root / name / "0.jpg")
        assert cli.main(["write", str(root), str(tmp_path / "out.beton")]) == 0


@pytest.fixture
def mixed_folder(tmp_path):
    root = tmp_path / "mixed"
    (root / "ant" / "more").mkdir(parents=True)
    photo(20, 16).save(root / "ant" / "0.jpg")
    photo(20, 16).save(root / "ant" / "1.avif")
    for name in ("ant/a.HEIC", "ant/more/b.heic", "ant/notes.txt", "ant/README", "list.csv"):
        (root / name).write_bytes(b"-")
    (root / "ant" / ".DS_Store").touch()
    return root


def test_ignored_files_are_counted(mixed_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sources, "HAS_HEIF", False)
    monkeypatch.setattr(sources, "EXTENSIONS", (".jpg", ".avif"))
    output = tmp_path / "out.beton"
    assert cli.main(["write", str(mixed_folder), str(output)]) == 0
    manifest = json.loads((tmp_path / "out.beton.json").read_text())
    assert manifest["ignored"] == {
        ".csv beside the class folders": 1,
        ".heic": 2,
        ".txt": 1,
        "no extension": 1,
    }
    remedy = "pip install pillow-heif"
    assert manifest["heif"] == [
        {"name": "ant/a.HEIC", "reason": remedy},
        {"name": "ant/more/b.heic", "reason": remedy},
    ]
    assert manifest["num_samples"] == 2
    shown = capsys.readouterr().out
    assert "5 other files ignored: 1 .csv beside the class folders, 2 .heic, 1 .txt" in shown
    assert f"  ant/more/b.heic: {remedy}" in shown


def test_a_folder_of_images_alone_has_no_list_of_ignored_files(folder, tmp_path):
    manifest = write_beton(ImageFolder(folder / "val"), tmp_path / "a.beton", max_resolution=64)
    assert not {"ignored", "heif"} & set(manifest)


def test_a_class_of_heic_alone_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "HAS_HEIF", False)
    monkeypatch.setattr(sources, "EXTENSIONS", (".jpg",))
    (tmp_path / "ant").mkdir()
    (tmp_path / "ant" / "a.heic").touch()
    with pytest.raises(BetonError, match="pip install pillow-heif"):
        ImageFolder(tmp_path)


@pytest.mark.parametrize("kind", ["AVIF", "HEIF"])
def test_formats_of_phones_are_read(kind, tmp_path):
    if kind == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    image = photo(40, 24)
    content = io.BytesIO()
    image.save(content, kind, quality=95)
    decoded = sources.decode_image(content.getvalue())
    assert decoded.content == kind
    assert decoded.pixels.shape == (24, 40, 3)
    expected = np.asarray(Image.open(content).convert("RGB"))  # Pillow's own reading
    assert np.array_equal(decoded.pixels, expected)
    (tmp_path / "ant").mkdir()
    (tmp_path / "ant" / f"a.{kind.lower()}").write_bytes(content.getvalue())
    write_beton(ImageFolder(tmp_path), tmp_path / "a.beton", max_resolution=64, write_mode="raw")
    with BetonFile(tmp_path / "a.beton") as data:
        assert (data.width.tolist(), data.height.tolist()) == ([40], [24])


@given(st.binary(max_size=200))
def test_hostile_bytes_behind_the_signature_are_one_error(tail):
    for brand in (b"heic", b"avif", b"mif1", b"isom"):
        data = b"\0\0\0\x18ftyp" + brand + tail
        with pytest.raises(ValueError, match=r".+"):
            sources.decode_image(data)


def test_files_of_paths(folder, tmp_path):
    ant = folder / "val" / "ant"
    inside = sorted(ant.iterdir())
    assert image_files(ant) == image_files(str(ant)) == image_files([ant]) == inside
    assert image_files(inside[1]) == [inside[1]]
    assert image_files([inside[2], folder / "val"]) == [
        inside[2],
        *sorted((folder / "val").rglob("*.jpg")),
    ]
    (tmp_path / ".hidden").mkdir()
    photo(9, 9).save(tmp_path / ".hidden" / "a.jpg")
    with pytest.raises(BetonError, match="has no images"):
        image_files(tmp_path)
