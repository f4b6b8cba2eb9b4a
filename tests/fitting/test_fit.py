"""`matryoshka fit`: photos to outputs in one command, resumed, refused, and its lines."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from matryoshka.train import train_imagenet
from PIL import Image

import matryoshka
from matryoshka import cli, fitting
from matryoshka.fitting import choices, output, run, summary
from matryoshka.report.tables import wilson_interval
from matryoshka.retrieval.store import Index

CLASSES = {"red": (200, 40, 40), "green": (40, 200, 40), "grün und blau": (40, 120, 200)}
EACH = 12
FAST = {
    "model.arch": "resnet10",
    "model.dims": (2, 8, 512),
    "training.epochs": 2,
    "training.batch_size": 8,
}
WORDS = [
    f"--{name}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for name, v in FAST.items()
]


def write_photos(root: Path, each: int = EACH) -> Path:
    """Class folders of noisy images of one colour each, 40 x 48 pixels."""
    rng = np.random.default_rng(0)
    for name, colour in CLASSES.items():
        (root / name).mkdir(parents=True)
        for number in range(each):
            small = rng.normal(colour, 40, (5, 6, 3)).clip(0, 255).astype(np.uint8)
            image = Image.fromarray(small).resize((48, 40), Image.Resampling.BICUBIC)
            image.save(root / name / f"photo {number}.jpg", quality=95)
    return root


@pytest.fixture(scope="module", autouse=True)
def _quick():
    """A tenth of a second for each timing: these runs have a given number of epochs."""
    with pytest.MonkeyPatch.context() as patch:
        step = choices.timing.step_seconds

        def briefly(spec, batches, *, seconds):
            return step(spec, batches, seconds=0.05)

        patch.setattr(choices.timing, "step_seconds", briefly)
        yield


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """(photos, result, lines) of one fit."""
    folder = tmp_path_factory.mktemp("fit")
    photos = write_photos(folder / "photos")
    (photos / "red" / "notes.txt").write_text("text")
    (photos / "red" / "broken.jpg").write_text("text")
    (photos / "red" / "again.jpg").write_bytes((photos / "red" / "photo 0.jpg").read_bytes())
    lines: list[str] = []
    result = matryoshka.fit(
        photos, minutes=1, output=folder / "out", options=FAST, report=lines.append
    )
    return photos, result, lines


def test_everything_is_in_the_output_folder(fitted):
    _, result, _ = fitted
    names = {path.name for path in result.folder.iterdir()}
    assert {
        *("model.safetensors", "config.yaml", "results.json", "analysis.json", "report.html"),
        *("index", "embeddings", "gradcam", "data", "images.json", "fit.json", "log"),
    } <= names
    results = json.loads((result.folder / "results.json").read_text())
    assert {"prefixes", "images"} <= set(results)
    for dim, row in results["prefixes"].items():
        assert row["top1"] == result.prefixes[int(dim)]["top1"]
        assert row["top5"] == result.prefixes[int(dim)]["top5"]
    assert list(result.prefixes) == [2, 8, 512]
    assert result.load().dims == (2, 8, 512)
    assert result.seconds > 0


def test_files_left_out_are_counted_by_reason(fitted):
    _, result, lines = fitted
    report = json.loads((result.folder / "images.json").read_text())
    reasons = {file["name"]: file["reason"] for file in report["files_left_out"]}
    assert set(reasons) == {"red/notes.txt", "red/broken.jpg", "red/photo 0.jpg"} or set(
        reasons
    ) == {"red/notes.txt", "red/broken.jpg", "red/again.jpg"}
    assert reasons["red/notes.txt"] == "not an image (.txt)"
    assert reasons["red/broken.jpg"].startswith("unreadable")
    assert sum(report["left_out"].values()) == 3
    assert report["classes"] == sorted(CLASSES)
    # round(0.15 x 12) = 2 of each class
    assert report["counts"] == {"train": [10, 10, 10], "val": [2, 2, 2]}
    text = "\n".join(lines)
    assert "1 file: not an image (.txt)" in text
    assert "red/broken.jpg" in text


def test_the_index_finds_photos_by_their_names(fitted):
    photos, result, _ = fitted
    index = Index(result.index)
    assert len(index) == len(CLASSES) * EACH
    names = {index.name(row) for row in range(len(index))}
    expected = {str(path.relative_to(photos)) for path in photos.rglob("photo *.jpg")}
    assert len(names & expected) >= len(expected) - 1  # of two copies, either is kept
    query = photos / "green" / "photo 3.jpg"
    hits = index.search(result.load().encode_files([query]), k=1)
    assert index.name(int(hits.ids[0, 0])) == "green/photo 3.jpg"
    assert index.class_name(int(hits.ids[0, 0])) == "green"


def test_the_end_shows_intervals_and_three_commands(fitted):
    _, result, lines = fitted
    (row,) = [line.split() for line in lines if line.startswith("     512 ")]
    low, high = wilson_interval(result.prefixes[512]["top1"], result.images)
    assert row[1:5] == [f"{result.prefixes[512]['top1']:.2f}", f"{low:.1f}", "to", f"{high:.1f}"]
    text = "\n".join(lines)
    for command in ("matryoshka retrieve serve", "matryoshka eval --path", "matryoshka fit "):
        assert command in text
    assert text.count("More time would probably bring") == 1
    assert lines[-1].startswith("done")
    assert "size     32 px (the photos' shorter side: 40 px)" in lines, "images are not enlarged"


def test_train_takes_the_config(fitted, capsys):
    _, result, _ = fitted
    with pytest.raises(SystemExit) as end:
        train_imagenet.main([f"--config-file={result.folder / 'config.yaml'}", "--print-config"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "epochs: 2" in shown
    assert "dims: [2, 8, 512]" in shown


def test_the_same_command_again_shows_the_same_result(fitted, monkeypatch, capsys):
    photos, result, _ = fitted
    monkeypatch.setattr(run, "choose", None)  # nothing is timed or trained again
    monkeypatch.setattr(train_imagenet, "main", None)
    words = [str(photos), "--minutes=1", f"--output={result.folder}", *WORDS]
    assert fitting.main(words) == 0
    shown = capsys.readouterr().out
    assert "Accuracy on 6 photos" in shown
    assert shown.strip().splitlines()[-1].startswith("done")


def test_another_command_in_the_same_folder_is_one_line(fitted, capsys):
    photos, result, _ = fitted
    words = [str(photos), "--minutes=2", f"--output={result.folder}", *WORDS]
    line = refused(words, capsys)
    assert "minutes was 1, now 2" in line
    assert "--output" in line
    extra = photos / "red" / "new.jpg"
    extra.write_bytes((photos / "red" / "photo 1.jpg").read_bytes())
    try:
        words[1] = "--minutes=1"
        assert "the files of the photos have changed" in refused(words, capsys)
    finally:
        extra.unlink()


def test_an_interrupted_run_resumes_with_its_choices(tmp_path, monkeypatch):
    photos = write_photos(tmp_path / "photos")

    def killed(self):
        raise KeyboardInterrupt

    settings = {"minutes": 1, "output": tmp_path / "out", "options": FAST}
    with monkeypatch.context() as patch:
        patch.setattr(run.Run, "evaluate", killed)
        with pytest.raises(KeyboardInterrupt):
            matryoshka.fit(photos, **settings)
    before = json.loads((tmp_path / "out" / "fit.json").read_text())
    trained = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    assert not (tmp_path / "out" / "results.json").exists()

    monkeypatch.setattr(run, "choose", None)  # a call would fail
    result = matryoshka.fit(photos, **settings)
    assert result.choices == before["choices"]
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == trained
    assert (tmp_path / "out" / "report.html").exists()


def test_labels_file_test_part_and_start_weights(tmp_path, fitted):
    """Any folder with a table; a test part is evaluated; an earlier model is the start."""
    _, earlier, _ = fitted
    photos = write_photos(tmp_path / "photos", each=8)
    rows = ["path,label,split"]
    for name in CLASSES:
        label = "warm" if name == "red" else "cold"
        for number in range(8):
            part = ("train", "train", "train", "train", "train", "val", "test", "test")[number]
            rows.append(f"{name}/photo {number}.jpg,{label},{part}")
    (tmp_path / "labels.csv").write_text("\n".join(rows), encoding="utf-8")
    lines: list[str] = []
    result = matryoshka.fit(
        photos,
        minutes=1,
        output=tmp_path / "out",
        labels=tmp_path / "labels.csv",
        options={**FAST, "training.epochs": 1, "model.init": str(earlier.model)},
        report=lines.append,
    )
    assert result.load().classes == ["cold", "warm"]
    assert result.images == 3
    assert json.loads((tmp_path / "out" / "test.json").read_text())["images"] == 6
    assert len(Index(result.index)) == 24
    assert any("start weights" in line for line in lines)


def test_too_little_time_is_a_warning_and_one_epoch(tmp_path):
    photos = write_photos(tmp_path / "photos", each=4)
    options = {name: value for name, value in FAST.items() if name != "training.epochs"}
    result = matryoshka.fit(photos, minutes=0.05, output=tmp_path / "out", options=options)
    assert result.choices["training.epochs"] == 1
    assert any("too little time: 1 pass" in warning for warning in result.warnings)
    assert result.report.exists()


def test_a_photo_that_goes_away_is_left_out_with_a_warning(tmp_path, monkeypatch):
    photos = write_photos(tmp_path / "photos")
    look = run.look

    def look_and_delete(*args, **options):
        seen = look(*args, **options)
        seen.parts["train"].path(0).unlink()
        return seen

    monkeypatch.setattr(run, "look", look_and_delete)
    result = matryoshka.fit(photos, minutes=1, output=tmp_path / "out", options=FAST)
    (warning,) = [text for text in result.warnings if "changed while they were read" in text]
    assert warning.startswith("1 images of train")
    assert len(Index(result.index)) == len(CLASSES) * EACH - 1


# ---------------------------------------------------------------- mistakes


def refused(words, capsys) -> str:
    """fit ends with status 2 and one line; the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        fitting.main(words)
    shown = capsys.readouterr()
    assert end.value.code == 2
    assert shown.err.count("\n") == 1, shown.err
    return shown.err


def folder_of(tmp_path, kind: str) -> Path:
    photos = tmp_path / "photos"
    if kind == "one image":
        write_photos(photos, each=1)
    elif kind == "one class":
        write_photos(photos)
        for name in list(CLASSES)[1:]:
            (photos / name).rename(tmp_path / name)
    elif kind == "unreadable":
        for name in CLASSES:
            (photos / name).mkdir(parents=True)
            for number in range(3):
                (photos / name / f"{number}.jpg").write_bytes(b"\xff\xd8 not a photo")
    elif kind == "loose":
        write_photos(photos)
        for file in photos.rglob("*.jpg"):
            file.rename(photos / f"{file.parent.name}-{file.name}")
    elif kind == "empty":
        photos.mkdir()
    return photos


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("one image", "each of 3 classes has one image"),
        ("one class", "one class only (red)"),
        ("unreadable", "can be read"),
        ("loose", "--labels"),
        ("empty", "has no images"),
        ("missing", "no such folder"),
    ],
)
def test_photos_that_cannot_be_fitted_are_one_line(tmp_path, capsys, kind, expected):
    photos = folder_of(tmp_path, kind)
    assert expected in refused([str(photos), f"--output={tmp_path / 'out'}"], capsys)
    assert not (tmp_path / "out").exists(), "nothing is half-written"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--output=PHOTOS/out"], "inside the photos"),
        (["--output=PHOTOS"], "inside the photos"),
        (["--minutes=0"], "--minutes 0"),
        (["--model.arhc=resnet18"], "did you mean 'model.arch'"),
        (["--model.arch=resnet19"], "resnet19"),
        (["--logging.run_id=x"], "fit sets it itself"),
        (["--labels=missing.csv"], "missing.csv"),
    ],
)
def test_mistyped_options_are_one_line(tmp_path, capsys, words, expected):
    photos = write_photos(tmp_path / "photos", each=3)
    words = [word.replace("PHOTOS", str(photos)) for word in words]
    if not words[0].startswith("--output"):
        words.append(f"--output={tmp_path / 'out'}")
    assert expected in refused([str(photos), *words], capsys)


def test_a_full_disk_and_a_folder_of_others_are_one_line(tmp_path, capsys, monkeypatch):
    photos = write_photos(tmp_path / "photos")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert "not made by fit" in refused([str(photos), f"--output={tmp_path / 'mine'}"], capsys)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]

    usage = run.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(run.shutil, "disk_usage", lambda _: usage)
    line = refused([str(photos), f"--output={tmp_path / 'out'}"], capsys)
    assert "GB free" in line


# ---------------------------------------------------------------- lines and advice


def test_a_line_comes_when_nothing_else_does(monkeypatch):
    monkeypatch.setattr(output, "LINE_SECONDS", 0.1)
    lines: list[str] = []
    with output.Progress(lines.append, 60, time.perf_counter()) as progress:
        progress.stage("waiting")
        time.sleep(1.2)
    assert len(lines) >= 1
    assert lines[0].startswith("  waiting, ")
    assert "left" in lines[0]


def test_prints_of_programs_go_to_the_log_and_reports_to_the_user(tmp_path, capsys):
    before = sys.stdout
    with output.Progress(lambda line: print(f"[{line}]"), 60, time.perf_counter()) as progress:
        progress.open_log(tmp_path / "log")
        with pytest.raises(SystemExit):
            progress.call("inference.index", ["--help"], show=True)
        print("mine")
    assert sys.stdout is before
    shown = capsys.readouterr().out
    assert "[  usage: " in shown
    assert shown.endswith("mine\n")
    assert "usage: " in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("known", "new", "epochs", "expected"),
    [(99.0, 60.0, 50, "by heart"), (40.0, 38.0, 5, "still learning"), (99.0, 97.0, 50, "little")],
)
def test_advice_follows_from_both_accuracies(known, new, epochs, expected):
    assert expected in summary.time_advice(known=known, new=new, epochs=epochs)


# ---------------------------------------------------------------- the demo


def test_the_demo(tmp_path, monkeypatch, capsys):
    """The whole path on one epoch; its numbers are shown by `make demo`."""
    monkeypatch.setattr(cli, "DEMO_OPTIONS", {**cli.DEMO_OPTIONS, "training.epochs": 1})
    monkeypatch.setattr(cli, "DEMO_MINUTES", 0.5)
    folder = tmp_path / "demo"
    assert cli.main(["demo", str(folder)]) == 0
    results = json.loads((folder / "results.json").read_text())
    assert list(map(int, results["prefixes"])) == [2**k for k in range(10)]
    assert results["images"] == 360
    shown = capsys.readouterr().out
    assert "A search for" in shown
    page = (folder / "report.html").read_text()
    assert 'id="gradcam"' in page

    (folder / "fit.log").unlink()
    (folder / "fit.json").unlink()
    with pytest.raises(SystemExit) as end:
        cli.main(["demo", str(folder)])
    assert end.value.code == 2, "a folder that is not a demo is not replaced"
    assert (folder / "report.html").exists()
