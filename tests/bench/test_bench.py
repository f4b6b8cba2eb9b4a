"""The programs of bench/ run through with tiny arguments; their numbers are not tests."""

import io
import json
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
from beton_files import encoded, photo
from PIL import Image

from matryoshka.data import BetonFile

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))


def test_the_loader_bench(capsys, monkeypatch, tmp_path):
    import loader as bench
    import record

    monkeypatch.setattr(record, "RESULTS", tmp_path)
    few = ["--threads", "1", "2", "--blocks", "1", "--images", "20", "--many", "1000"]
    few += ["--peers", "torchvision PIL", "torchvision v2", "simplejpeg + cv2"]
    few += [
        "--cases",
        *[
            name
            for name in (*bench.CASES, *bench.VIEWS, *bench.WRITERS, bench.OPEN)
            if name != "RRC 160"
        ],
    ]
    assert bench.main(few) == 0
    said = capsys.readouterr().out
    for words in (
        "RRC 224 ",
        "centre 224 ",
        "small 32, pad-crop ",
        "torchvision PIL ",
        "physical limit: ",
        "two views 224, no markers: decoding is ",
        "open 1,000",
    ):
        assert words in said
    assert "images/s of wall time from 1 to 2 threads" in said
    rows = [json.loads(line) for line in (tmp_path / "loader.jsonl").read_text().splitlines()]
    ours = [row for row in rows if (row["case"], row["peer"]) == ("RRC 224", "matryoshka")]
    assert [row["threads"] for row in ours] == [1, 2]
    assert ours[0]["cpu"]["n"] == 1
    pil = next(row for row in rows if (row["case"], row["peer"]) == ("RRC 224", "torchvision PIL"))
    assert pil["ratio of matryoshka"] > 0, "images per second: matryoshka against Pillow"


def test_a_peer_that_fails_hangs_or_is_missing_is_named():
    import measure

    def missing():
        raise measure.Missing("x is not installed")

    def fails():
        raise ArithmeticError("no")

    def forever():
        threading.Event().wait()
        return 1

    make = {
        measure.OURS: lambda: lambda: 3,
        "missing": missing,
        "fails": fails,
        "fails later": lambda: fails,
        "hangs": lambda: forever,
    }
    outcome = measure.take_turns(make, 2, limit=0.2)
    assert {name: len(blocks) for name, blocks in outcome.blocks.items()} == {measure.OURS: 2}
    assert outcome.failed["missing"] == "missing: x is not installed"
    assert outcome.failed["fails"] == outcome.failed["fails later"] == "ArithmeticError: no"
    assert outcome.failed["hangs"] == "TimeoutError: not finished after 0 s"


def test_a_file_of_many_samples_is_a_valid_one(tmp_path):
    from material import write_many

    write_many(tmp_path / "x", 500)
    with BetonFile(tmp_path / "x") as data:
        assert (len(data), int(data.size.sum()), int(data.labels.sum())) == (
            500,
            25_000_000,
            sum(range(500)),
        )


@pytest.mark.parametrize(
    "crop", [(100, 50, 20, 9), (0, 0, 7, 80), (3, 70, 140, 20), (0, 0, 150, 90)]
)
@pytest.mark.parametrize("markers", [{}, {"restart_marker_blocks": 3}, {"restart_marker_rows": 1}])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_bytes_that_a_crop_needs(subsampling, markers, crop):
    """Destroying all the others leaves the crop as it was."""
    from entropy import needed_parts

    stream = encoded(photo(150, 90), "JPEG", quality=90, subsampling=subsampling, **markers)
    parts = needed_parts(stream, crop)
    needed, whole = (
        sum(b - a for a, b in found) for found in (parts, needed_parts(stream, (0, 0, 150, 90)))
    )
    assert stream[: len(stream) - whole].rfind(b"\xff\xda") == len(stream) - whole - 14
    assert 0 < needed <= whole, f"bytes that the crop needs: {needed} of {whole}"
    if not markers:
        unit = 8 if subsampling == 0 else 16
        rows = (min(crop[1] + crop[3] + 1, 89) // unit + 1) / -(-90 // unit)
        assert needed == pytest.approx(rows * whole, abs=1), (
            f"bytes of a fraction {rows:.2f} of the MCU rows: {needed} of {whole}"
        )
        return

    def shown(stream):
        return np.asarray(
            Image.open(io.BytesIO(stream)).crop((*crop[:2], crop[0] + crop[2], crop[1] + crop[3]))
        )

    damaged = bytearray(stream)
    for at in range(len(stream) - whole, len(stream) - 2):
        if not any(a <= at < b for a, b in parts) and stream[at] != 0xFF and stream[at - 1] != 0xFF:
            damaged[at] = 0x55
    assert (damaged == stream) == (needed == whole)
    assert (shown(stream) == shown(bytes(damaged))).all()


FAKE_CIFAR = """
import json, sys
from pathlib import Path
given = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:] if "=" in word)
run = Path(given["logging.folder"], given["logging.run_id"])
run.mkdir(parents=True)
images = len(list(Path(given["data"], "train").glob("*/*.png")))
test = len(list(Path(given["data"], "test").glob("*/*.png")))
top1 = {"adan": 50, "adam": 40, "adamw": 45}[given["opt"]] + 2 * int(given["seed"])
result = {"8": 1.0, "512": top1 + images / 100 + test / 1000}
(run / "results.json").write_text(json.dumps({"test": {"top_1": result}}))
(run / "flags").write_text(json.dumps(given))
"""


def test_the_study_of_adan(tmp_path, capsys, monkeypatch):
    import adan_study
    import record

    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    program = tmp_path / "program.py"
    program.write_text(FAKE_CIFAR)
    monkeypatch.setattr(adan_study, "PROGRAM", program)
    for part, count in (("train", 4), ("test", 1)):
        for name in ("bird", "cat"):
            folder = tmp_path / "data" / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"{number}.png").touch()
    argv = [f"--data={tmp_path / 'data'}", f"--output={tmp_path / 'runs'}", "--images=3"]
    argv += ["--record", "--adam=--lr=0.5"]
    assert adan_study.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    # 50, 52, 54: standard deviation 2, Student's t with two degrees of freedom is 4.303
    assert "adan      52.03 +- 4.97" in lines
    assert "adam      42.03 +- 4.97   against adan, paired: -10.00 +- 0.00" in lines
    (run,) = (tmp_path / "runs").glob("adan-1-*")
    flags = json.loads((run / "flags").read_text())
    assert (flags["adan_beta2"], flags["weight_decay"], flags["seed"]) == ("0.11", "0.02", "1")
    (run,) = (tmp_path / "runs").glob("adam-0-*")
    flags = json.loads((run / "flags").read_text())
    assert (flags["lr"], flags["n_epochs"]) == ("0.5", "5")
    rows = (tmp_path / "results" / "adan_study.jsonl").read_text().splitlines()
    assert [json.loads(row)["optimizer"] for row in rows] == ["adan", "adam", "adamw"]
    program.unlink()  # the runs are there: none starts again
    assert adan_study.main(argv) == 0
    with pytest.raises(subprocess.CalledProcessError):  # other settings are other runs
        adan_study.main([*argv, "--epochs=6"])
    with pytest.raises(SystemExit, match="lower --images"):
        adan_study.main([*argv, "--images=30"])


def test_runs_of_small_images_are_kept(small_nested, monkeypatch, tmp_path, capsys):
    import record
    import small_images as bench

    monkeypatch.setattr(record, "RESULTS", tmp_path)
    (run,) = (small_nested / "runs").glob("*/*")
    words = [str(run), "--recipe", "tiny", "--data", "digits", "--record"]
    assert bench.main(words) == 0
    row = json.loads((tmp_path / "small_images.jsonl").read_text())
    results = json.loads((run / "results.json").read_text())
    assert row["top1"] == results["test"]["top_1"]
    assert row["images"] == 100
    for dim, value in row["top1"].items():
        low, high = row["interval"][dim]
        assert low <= value <= high
    assert [point["epoch"] for point in row["curve"]] == [0]
    assert row["git"]["commit"] == json.loads((run / "env.json").read_text())["git"]["commit"]
    assert "100 images" in capsys.readouterr().out


def test_the_time_of_a_resumed_run_is_that_of_its_parts():
    import small_images as bench

    assert bench.last_of_each_start([10.0, 20.0, 7.0, 14.0, 3.0]) == [20.0, 14.0, 3.0]


def test_families_are_compared_on_the_same_images(
    small_nested, digits, tmp_path, capsys, monkeypatch
):
    """Against counting by hand; the first family is compared with itself and with other answers."""
    import record
    import width_families
    from matryoshka.inference import pytorch_inference

    monkeypatch.setattr(record, "RESULTS", tmp_path / "kept")
    (model,) = (small_nested / "runs").glob("*/*/model.safetensors")
    words = [f"--path={model}", "--save_logits", "--save_gt", "--workers=1"]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        output = f"--output={tmp_path / name / 'test.json'}"
        assert pytorch_inference.main([*words, output]) == 0
    other = json.loads((tmp_path / "b" / "test.json").read_text())
    path = tmp_path / "b" / other["arrays"]["logits"]
    logits, labels = np.load(path), np.load(tmp_path / "b" / other["arrays"]["gt"])
    np.save(path, np.roll(logits, 1, axis=2))  # every answer is the next class
    widths = {"rows": [], "dims": [8, 16]}
    for share, loss in ((40.0, 2.0), (50.0, 1.0), (60.0, 0.0)):
        pair = {"first_only": 1, "second_only": 2, "images": 100}
        widths["rows"].append(
            {"asked": [8, 16], "top1": 5, "loss": loss, "macs_share": share, "shares": {}}
            | {"against_widest": pair}
        )
    (tmp_path / "widths.json").write_text(json.dumps({"widths": widths}))
    files = [str(tmp_path / name / "test.json") for name in ("a", "b")]
    capsys.readouterr()
    argv = [*files, f"--cascade={tmp_path / 'widths.json'}", "--record"]
    assert width_families.main(argv) == 0
    (row,) = [json.loads(line) for line in (tmp_path / "kept" / "width_families.jsonl").open()]
    for g, dim in enumerate(("8", "16")):
        first = logits[g].argmax(1) == labels
        second = (logits[g].argmax(1) + 1) % 10 == labels
        found = row["dims"][dim]
        assert found["difference"] == pytest.approx(100 * (first.mean() - second.mean()))
        differences = first.astype(float) - second
        error = 100 * 1.959964 * differences.std() / 10  # of the mean of 100 differences
        assert found["interval"] == pytest.approx(
            [found["difference"] - error, found["difference"] + error]
        )
    assert (row["cascade"]["loss"], row["cascade"]["macs_share"]) == (1.0, 50.0)


def test_the_bench_of_self_supervised_steps(capsys, monkeypatch, tmp_path):
    import record
    import ssl_steps

    monkeypatch.setattr(record, "RESULTS", tmp_path)
    few = [
        "--arch-options",
        '{"dim":16}',
        "--batch",
        "8",
        "--size",
        "16",
        "--blocks",
        "1",
        "--seconds",
        "0.01",
    ]
    assert ssl_steps.main(["--method", "moco", "sigreg", *few]) == 0
    rows = [json.loads(line) for line in (tmp_path / "ssl_steps.jsonl").read_text().splitlines()]
    assert [row["method"] for row in rows] == ["moco", "sigreg"]
    assert all(row["time / plain"]["n"] == 1 for row in rows)
    assert "goal 1.05" in capsys.readouterr().out


def test_the_adapter_bench(capsys, monkeypatch, tmp_path):
    import adapter as bench
    import record
    import results_page
    from embedding_folders import nested, write

    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(results_page, "RESULTS", tmp_path)
    rows, labels = nested(400, 16, 0)
    few = ["--threads=1", "--more=--epochs=1", "--record"]
    given = write(tmp_path / "embeddings", rows, labels)
    assert bench.main([given, "--data=clusters", "--dims=4,8", *few]) == 0
    assert bench.main(["--time=2500x16", *few]) == 0
    kept = results_page.read("adapter")
    assert [row["case"] for row in kept] == [*bench.CASES, "time"]
    assert all(set(row["metrics"]["right_1nn"]["PCA"]) == {"4", "8"} for row in kept[:3])
    page = "\n".join(results_page.adapters())
    mean = kept[0]["metrics"]["right_1nn"]["adapter"]["8"]["mean"]
    assert f"{mean:.2f}" in page
    assert "2500x16" in page
