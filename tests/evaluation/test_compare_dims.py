"""`matryoshka dims`: its numbers against `eval` and loops over images, its files, its mistakes."""

import contextlib
import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matryoshka.inference import compare_dims, pytorch_inference
from PIL import Image
from safetensors import safe_open
from training_commands import refused

from matryoshka.checkpoint import load_model
from matryoshka.data import CenterCrop, Loader
from matryoshka.evaluation.dim_answers import DimAnswers, answer, most_confused, sample_of
from matryoshka.report.dims import dims_csv, dims_rows, dims_table, in_short

DIMS = (8, 16)
FAST = ["--no-latency", "--map=none", "--workers=1"]


@pytest.fixture(scope="module")
def run(small_nested):
    (folder,) = (small_nested / "runs").glob("*/*")
    return folder


@pytest.fixture(scope="module")
def compared(run, small_nested):
    """dims.json of the run folder, with a latency and maps."""
    options = ["--batches=1", "--max_samples=40", "--tensorboard", str(run / "board")]
    with contextlib.chdir(small_nested):
        assert compare_dims.main(["--path", str(run), *options, "--workers=1"]) == 0
    return json.loads((run / "dims/dims.json").read_text())


@pytest.fixture(scope="module")
def evaluated(run, digits, tmp_path_factory):
    """results.json of `eval` on the same images, its predictions [G, N] and labels [N]."""
    folder = tmp_path_factory.mktemp("evaluated")
    options = ["--save_predictions", "--save_gt", f"--output={folder / 'results.json'}"]
    path = f"--path={run / 'model.safetensors'}"
    assert pytorch_inference.main([path, f"--data-root={digits['val']}", *options]) == 0
    results = json.loads((folder / "results.json").read_text())
    arrays = [np.load(folder / results["arrays"][kind]) for kind in ("predictions", "gt")]
    return results, *arrays


def test_numbers_are_those_of_eval(compared, evaluated):
    results, predictions, labels = evaluated
    assert compared["prefixes"] == results["prefixes"]
    assert compared["macs"] == results["macs"]
    assert compared["images"] == results["images"] == 100
    for g, dim in enumerate(DIMS):
        matrix = [[0] * 10 for _ in range(10)]
        for label, prediction in zip(labels, predictions[g], strict=True):
            matrix[label][prediction] += 1
        assert compared["confusion"][str(dim)] == matrix
    small, large = (row == labels for row in predictions)
    assert compared["paired"]["8"] == {
        "first_only": sum(a and not b for a, b in zip(small, large, strict=True)),
        "second_only": sum(b and not a for a, b in zip(small, large, strict=True)),
        "images": 100,
    }


def test_costs_are_those_of_the_exports(compared, run):
    for dim in DIMS:
        (export,) = (run / "nested_models").glob(f"*_dim{dim}.safetensors")
        with safe_open(export, "numpy") as file:
            count = sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
        cost = compared["costs"][str(dim)]
        assert cost["parameters"] == count
        # The export also holds the options of its training.
        assert 4 * count < cost["bytes"] <= export.stat().st_size
        assert cost["seconds"]["1"] > 0
    assert compared["threads"] == torch.get_num_threads()


def test_exports_give_the_numbers_of_the_family(compared, small_nested, tmp_path, capsys):
    """From their folder, as .safetensors, and as .pth."""
    folder = small_nested / "checkpoint/nested_models"
    files = [str(path) for path in folder.glob("*.pth")]
    for number, paths in enumerate(([str(folder)], files)):
        output = tmp_path / str(number)
        options = ["--path", *paths, "--data-root", compared["data"], "--output", str(output)]
        assert compare_dims.main([*options, *FAST, "--map=tsne", "--max_samples=0"]) == 0
        found = json.loads((output / "dims.json").read_text())
        assert found["dims"] == list(DIMS)
        assert found["prefixes"] == compared["prefixes"]
        for dim in DIMS:
            assert found["loss"][str(dim)] == pytest.approx(compared["loss"][str(dim)], rel=1e-4)
            path = Path(found["costs"][str(dim)]["file"])
            assert found["costs"][str(dim)]["bytes"] == path.stat().st_size
    assert "ms:" not in capsys.readouterr().out


def test_answers_are_those_of_single_images(run, digits):
    model = load_model(run / "model.safetensors")
    size = model.preprocessing.size
    options = {"order": "sequential", "crop": CenterCrop(size, 1.0), "num_workers": 1}
    labels = np.arange(100) % 10
    rows = np.array([3, 50, 99])
    found = DimAnswers(labels, rows)
    answer(model, Loader(digits["val"], 64, **options), found)
    for batch in Loader(digits["val"], 1, **options):
        k = int(batch.index)
        mean, std = torch.tensor(model.preprocessing.mean), torch.tensor(model.preprocessing.std)
        image = ((batch.images / 255 - mean) / std).permute(0, 3, 1, 2)
        with torch.no_grad():
            logits = model(image)[:, 0]  # [G, C]
        for g, dim in enumerate(DIMS):
            assert found.predictions[dim][k] == logits[g].argmax()
            if k in rows:
                with torch.no_grad():
                    features = model.features_of(image, dim)[0].numpy()
                ours = found.features[dim][list(rows).index(k)]
                np.testing.assert_allclose(ours, features, atol=1e-4)


def test_files(compared, run, small_nested):
    folder = run / "dims"
    pictures = ["accuracy", "cost"]
    for dim in DIMS:
        pictures += [f"confusion_dim{dim}", f"tsne_dim{dim}"]
        table = list(csv.reader((folder / f"confusion_dim{dim}.csv").open()))
        assert table[0][1:] == [row[0] for row in table[1:]] == compared["class_names"]
        assert [[int(n) for n in row[1:]] for row in table[1:]] == compared["confusion"][str(dim)]
        assert np.array(compared["map"]["points"][str(dim)]).shape == (40, 2)
    for name in pictures:
        with Image.open(folder / f"{name}.png") as picture:
            assert picture.width > 500
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 10, "nothing is drawn"
    assert len(list(folder.iterdir())) == len(pictures) + len(DIMS) + 2
    assert list((run / "board").iterdir())


# ---------------------------------------------------------------- parts


def test_most_confused():
    matrix = np.array([[9, 1, 4], [0, 9, 0], [4, 5, 0]])
    assert most_confused(matrix, 3) == [(2, 1, 5), (0, 2, 4), (2, 0, 4)]
    assert most_confused(matrix, 9) == [(2, 1, 5), (0, 2, 4), (2, 0, 4), (0, 1, 1)]
    assert matrix[0, 0] == 9, "the argument is not changed"


@given(images=st.integers(0, 300), most=st.integers(-1, 300), seed=st.integers(0, 2**31))
def test_a_sample_is_sorted_unique_and_of_the_right_size(images, most, seed):
    rows = sample_of(images, most, seed)
    assert len(rows) == (images if most < 0 else min(images, most))
    assert (np.diff(rows) > 0).all()
    assert all(0 <= row < images for row in rows)


@given(st.floats(0, 9e11))
def test_short_numbers_have_three_digits(count):
    text, unit = in_short(count)[:-1].split(" ") if count >= 999.5 else (in_short(count), "")
    size = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[in_short(count)[-1].strip()]
    value = float(text.split(" ")[0]) * size
    assert value == pytest.approx(count, rel=0.0051, abs=0.5)
    assert unit == ""


def test_the_table_and_the_csv_have_the_same_rows(compared):
    read = list(csv.DictReader(io.StringIO(dims_csv(compared))))
    lines = dims_table(compared).splitlines()
    assert len(read) == len(DIMS) == len(lines) - 2
    for row, line, known in zip(read, lines[1:], dims_rows(compared), strict=False):
        assert {key: float(value) for key, value in row.items()} == known
        cells = line.split()
        assert int(cells[0]) == int(row["dim"])
        assert float(cells[1]) == pytest.approx(float(row["top1"]), abs=0.005)
    assert "1 image" in lines[-1]


# ---------------------------------------------------------------- mistakes


def test_mistakes_are_one_line(run, small_nested, tmp_path, capsys):
    model = str(run / "model.safetensors")
    exports = [str(path) for path in (run / "nested_models").glob("*_dim8.safetensors")]
    (tmp_path / "file").write_text("")
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(Path(exports[0]).read_bytes())
    cases = {
        "both have dim 8; give one": ["--path", model, *exports],
        "has no model.safetensors and no exports": ["--path", str(tmp_path / "empty")],
        "or a path of your own": ["--path", model, "--dataset", "V1"],
        "has the parts test and validation": ["--path", model, "--split", "train"],
        "alone.safetensors: --dataset cifar10, or --data-root": ["--path", str(alone)],
        "--output": ["--path", model, "--output", str(tmp_path / "file")],
        "no such file or folder": ["--path", model, "--data-root", str(tmp_path / "none")],
        "no such checkpoint": ["--path", str(tmp_path / "none.pth")],
    }
    (tmp_path / "empty").mkdir()
    for text, words in cases.items():
        assert text in refused(compare_dims.main, [*words, *FAST], capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "alone.safetensors",
        "empty",
        "file",
    ]
