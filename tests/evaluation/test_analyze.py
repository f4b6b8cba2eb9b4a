"""`matryoshka analyze` against loops over images; upstream's formats; bad and hostile files."""

import json
import os
import pickle

import numpy as np
import pytest
import torch
from matryoshka.inference import analyze
from scipy.special import log_softmax, softmax

from matryoshka.evaluation import imagenet_sets, superclasses
from matryoshka.evaluation.cascade import GRID

DIMS = [8, 32, 512]
N, C = 300, 40


@pytest.fixture(scope="module")
def arrays():
    """(logits [3, 300, 40], labels): accuracy grows with the prefix; class 39 has no images."""
    rng = np.random.default_rng(3)
    labels = rng.integers(0, C - 1, N)
    logits = rng.standard_normal((3, N, C)).astype(np.float32)
    for g, strength in enumerate((1.5, 2.5, 3.0)):
        logits[g, np.arange(N), labels] += strength + rng.standard_normal(N)
    return logits, labels


@pytest.fixture
def folder(arrays, tmp_path):
    """The output folder of an evaluation with 40 classes of ImageNet."""
    logits, labels = arrays
    np.save(tmp_path / "logits.npy", logits)
    np.save(tmp_path / "gt.npy", labels)
    names = imagenet_sets.wnids()[100:500:10]
    results = {
        "prefixes": {str(d): {"top1": 0.0} for d in DIMS},
        "checkpoint": "m.safetensors",
        "arch": "resnet10",
        "head": "mrl",
        "dataset": "V1",
        "data": "val.beton",
        "class_names": names,
        "arrays": {"logits": "logits.npy", "gt": "gt.npy"},
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    return tmp_path


def run(*argv, output):
    assert analyze.main([*map(str, argv), f"--output={output}"]) == 0
    return json.loads(output.read_text())


def test_the_file_against_loops(folder, arrays, capsys):
    logits, labels = arrays
    found = run(
        f"--results={folder / 'results.json'}",
        "--splits=3",
        "--learn=0.25",
        output=folder / "a.json",
    )
    shown = capsys.readouterr().out
    said = [[int(max(range(C), key=lambda c: (row[c], -c))) for row in prefix] for prefix in logits]
    sure = [
        [softmax(row)[c] for row, c in zip(p, s, strict=True)]
        for p, s in zip(logits, said, strict=True)
    ]
    right = [[c == y for c, y in zip(row, labels, strict=True)] for row in said]
    assert list(found["top1"].values()) == pytest.approx(
        [100 * sum(row) / N for row in right], abs=1e-3
    ), "top-1 differs from the loop"

    first = [next((g for g in range(3) if right[g][i]), 3) for i in range(N)]
    shares = [100 * first.count(g) / N for g in range(4)]
    assert list(found["oracle"]["first_right"].values()) == pytest.approx(shares, abs=1e-3), (
        "oracle shares differ from the loop"
    )
    assert list(found["oracle"]["first_right"]) == ["8", "32", "512", "never"]
    assert found["oracle"]["expected_dim"] == pytest.approx(
        np.mean([[*DIMS, 512][g] for g in first])
    ), "expected dim of the oracle differs"

    rows = found["per_class"]
    assert [r["name"] for r in rows] == imagenet_sets.wnids()[100:500:10]
    for c in (0, 7, 38):
        mine = [i for i in range(N) if labels[i] == c]
        assert rows[c]["images"] == len(mine), f"class {c}: number of images"
        assert rows[c]["top1"] == pytest.approx(
            [100 * np.mean([row[i] for i in mine]) for row in right], abs=1e-3
        ), f"class {c}: top-1 differs from the loop"
        assert rows[c]["shown"] == superclasses.name_of(rows[c]["name"])
    assert (rows[39]["images"], rows[39]["top1"], rows[39]["trend"]) == (0, [None] * 3, "absent")
    assert sum(found["trends"].values()) == C, "every class has one trend"

    same = [
        [100 * np.mean([a == b for a, b in zip(x, y, strict=True)]) for y in said] for x in said
    ]
    np.testing.assert_allclose(found["agreement"], same, atol=1e-3)

    bins = found["calibration"]["32"]["bins"]
    inside = [i for i in range(N) if 0.4 < sure[1][i] <= 7 / 15]
    assert bins["images"][6] == len(inside), "images in bin 6"
    assert bins["top1"][6] == pytest.approx(
        100 * np.mean([right[1][i] for i in inside]), abs=1e-3
    ), "accuracy in bin 6"
    ece = sum(n * abs(a - b) for n, a, b in zip(*bins.values(), strict=True) if n) / N
    assert found["calibration"]["32"]["ece"] == pytest.approx(ece, abs=2e-3), (
        "ECE disagrees with its bins"
    )
    calibrated = found["calibration"]["512"]
    assert calibrated["held_out_ece_after"] <= calibrated["held_out_ece"] + 3, (
        "temperature scaling made calibration worse"
    )

    caps = found["cascade"]["caps"]
    assert [cap["dim"] for cap in caps] == DIMS, "one cap for each prefix"
    assert (found["cascade"]["learn_images"], found["cascade"]["test_images"]) == (75, 225), (
        "a quarter of 300 images is for learning"
    )
    assert caps[0]["expected_dim"] == {"mean": 8.0, "std": 0.0}, (
        "a cascade of one prefix has its length"
    )
    assert 8 <= caps[1]["expected_dim"]["mean"] <= 32, (
        "mean dim outside the lengths of both prefixes"
    )
    assert GRID[0] <= caps[1]["threshold"]["mean"] <= GRID[-1], "threshold outside the grid"
    assert [c["epsilon"] for c in found["cascade"]["certified"]] == [0.5, 1, 2]
    for word in (
        "cascade",
        "oracle",
        "superclasses",
        "trends",
        "calibration",
        "agreement",
        "certified at 95 %",
    ):
        assert word in shown


def test_superclasses_of_the_file(folder, arrays):
    logits, labels = arrays
    only = ["--only=superclasses", "--superclasses=dog,bird"]
    found = run(f"--results={folder / 'results.json'}", *only, output=folder / "a.json")[
        "superclasses"
    ]
    grouping = superclasses.superclasses(imagenet_sets.wnids()[100:500:10], "dog,bird")
    assert found["names"] == ["other", "dog", "bird"]
    for g, dim in enumerate(DIMS):
        confusion = [[0] * 3 for _ in range(3)]
        within: dict[int, list[bool]] = {k: [] for k in range(3)}
        for row, y in zip(logits[g], labels, strict=True):
            k = grouping.groups[y]
            confusion[k][grouping.groups[row.argmax()]] += 1
            allowed = [c for c in range(C) if grouping.groups[c] == k]
            within[k].append(max(allowed, key=lambda c: row[c]) == y)
        assert found["confusion"][str(dim)] == confusion, (
            f"prefix {dim}: confusion differs from the loop"
        )
        assert found["top1"][str(dim)] == pytest.approx(
            100 * sum(confusion[k][k] for k in range(3)) / N, abs=1e-3
        ), f"prefix {dim}: accuracy of the groups differs"
        assert found["within"][str(dim)] == [
            pytest.approx(100 * np.mean(v), abs=1e-3) if v else None for v in within.values()
        ], f"prefix {dim}: accuracy within the groups differs"


def test_every_format_gives_the_same_numbers(folder, arrays):
    """Logits or softmax, .npy or upstream's .pth; the last digits of ECE may differ."""
    logits, labels = arrays
    names = ["cascade", "oracle", "trends", "agreement"]
    whole = run(
        f"--results={folder / 'results.json'}",
        f"--only={','.join(names)}",
        output=folder / "a.json",
    )
    torch.save(torch.from_numpy(softmax(logits, 2)), folder / "softmax.pth")
    torch.save(torch.from_numpy(labels), folder / "gt.pth")
    np.save(folder / "predictions.npy", logits.argmax(2))
    np.save(folder / "log.npy", log_softmax(logits, 2))
    dims = ["--dims=8,32,512", f"--only={','.join(names)}"]
    for files in (["--softmax=softmax.pth", "--gt=gt.pth"], ["--logits=log.npy", "--gt=gt.npy"]):
        given = [file.replace("=", f"={folder}/") for file in files]
        other = run(*given, *dims, output=folder / "b.json")
        assert [other[name] for name in names] == [whole[name] for name in names], (
            "the same scores in another format give other numbers"
        )
    one = run(
        f"--softmax={folder / 'softmax.pth'}",
        f"--gt={folder / 'gt.npy'}",
        *dims,
        output=folder / "b.json",
    )
    assert one["top1"] == whole["top1"], "top-1 of mixed formats differs"
    torch.save(torch.from_numpy(softmax(logits[2], 1)), folder / "ff.pth")
    only = ["--dims=512", "--only=oracle"]
    fixed = run(
        f"--softmax={folder / 'ff.pth'}",
        f"--gt={folder / 'gt.pth'}",
        *only,
        output=folder / "b.json",
    )
    assert fixed["top1"] == {"512": whole["top1"]["512"]}, (
        "top-1 without the axis of prefixes differs"
    )


def test_predictions_alone(folder, arrays, capsys):
    logits, _ = arrays
    np.save(folder / "p.npy", logits.argmax(2))
    given = [f"--predictions={folder / 'p.npy'}", f"--gt={folder / 'gt.npy'}", "--dims=8,32,512"]
    found = run(*given, output=folder / "a.json")
    said = capsys.readouterr().out
    assert "note: no cascade: needs --logits or --softmax" in said
    assert "note: no calibration" in said
    assert {"oracle", "trends", "agreement"} <= set(found)
    assert not {"cascade", "calibration"} & set(found)


def test_a_fixed_feature_has_no_cascade(folder, arrays, capsys):
    np.save(folder / "one.npy", arrays[0][2:])
    found = run(
        f"--logits={folder / 'one.npy'}",
        f"--gt={folder / 'gt.npy'}",
        "--dims=512",
        output=folder / "a.json",
    )
    assert "note: no cascade: needs two prefixes" in capsys.readouterr().out
    assert {"oracle", "trends", "calibration", "agreement"} <= set(found)


def test_the_default_output_is_beside_the_results(folder):
    assert analyze.main([f"--results={folder / 'results.json'}", "--only=oracle"]) == 0
    assert (folder / "analysis.json").is_file()


# ---------------------------------------------------------------- mistakes, hostile files


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def hostile(folder):
    """Files whose contents contradict their names."""
    np.save(folder / "short.npy", np.zeros(N - 1, np.int64))
    np.save(folder / "big.npy", np.full(N, C))
    np.save(folder / "float.npy", np.zeros(N))
    logits = np.load(folder / "logits.npy")
    np.save(folder / "softmax.npy", softmax(logits, 2))
    for name, value in (("nan", np.nan), ("inf", np.inf), ("minus", -np.inf)):
        logits[1, 77, 3] = value
        np.save(folder / f"{name}.npy", logits)
    np.save(folder / "many.npy", np.full((3, N), 10**12))
    np.save(folder / "flat.npy", np.zeros(5))
    (folder / "page.npy").write_text("<!doctype html><title>404</title>")
    content = (folder / "logits.npy").read_bytes()
    (folder / "cut.npy").write_bytes(content[: len(content) // 2])
    (folder / "bomb.pth").write_bytes(pickle.dumps(Bomb(folder / "marker")))
    np.save(folder / "objects.npy", np.array([Bomb(folder / "marker")], object), allow_pickle=True)
    torch.save({"a": torch.zeros(3)}, folder / "dict.pth")
    (folder / "bad.json").write_text("{")
    (folder / "none.json").write_text(json.dumps({"prefixes": {"8": {}}, "arrays": {}}))
    results = json.loads((folder / "results.json").read_text())
    for name, change in (
        ("names", {"class_names": ["a"]}),
        ("digits", {"class_names": [str(c) for c in range(C)]}),
        ("classes", {"class_names": 5}),
        ("lost", {"arrays": {"logits": "nowhere.npy", "gt": "gt.npy"}}),
        ("pair", {"prefixes": {"8": {}, "16": {}}}),
    ):
        (folder / f"{name}.json").write_text(json.dumps(results | change))
    return folder


FILES = ["--logits={}/logits.npy", "--gt={}/gt.npy", "--dims=8,32,512"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["--results", "--logits", "--gt"]),
        (["--results={}/nowhere.json"], ["nowhere.json"]),
        (["--results={}/bad.json"], ["bad.json", "eval --output"]),
        (["--results={}/none.json"], ["none.json", "--save_logits"]),
        (["--results={}/lost.json"], ["nowhere.npy", "no such file"]),
        (["--results={}/names.json"], ["40 classes", "names 1"]),
        (["--results={}/pair.json"], ["has 3 prefixes", "names 2"]),
        (["--results={}/digits.json", "--superclasses=paper"], ["'0'"]),
        ([*FILES, "--gt={}/short.npy"], ["short.npy", "299 labels", "300 images"]),
        ([*FILES, "--gt={}/big.npy"], ["big.npy", "0 to 39"]),
        ([*FILES, "--gt={}/float.npy"], ["float.npy", "integer"]),
        ([*FILES, "--logits={}/flat.npy"], ["flat.npy", "[prefixes, images, classes]"]),
        ([*FILES, "--logits={}/page.npy"], ["page.npy", "not a whole array"]),
        ([*FILES, "--logits={}/cut.npy"], ["cut.npy", "not a whole array"]),
        ([*FILES, "--logits={}/bomb.pth"], ["bomb.pth", "not a whole array"]),
        ([*FILES, "--logits={}/objects.npy"], ["objects.npy", "not a whole array"]),
        ([*FILES, "--logits={}/nan.npy"], ["prefix number 2, image 77", "not finite"]),
        ([*FILES, "--logits={}/inf.npy"], ["prefix number 2, image 77", "not finite"]),
        ([*FILES, "--logits={}/minus.npy"], ["prefix number 2, image 77", "not finite"]),
        ([*FILES, "--logits={}/softmax.npy"], ["softmax.npy", "--softmax"]),
        (
            ["--softmax={}/logits.npy", "--gt={}/gt.npy", "--dims=8,32,512"],
            ["logits.npy", "--logits"],
        ),
        (
            ["--predictions={}/many.npy", "--gt={}/gt.npy", "--dims=8,32,512"],
            ["many.npy", "1000000000000"],
        ),
        (["--results={}/results.json", "--logits={}/logits.npy"], ["--results", "drop --logits"]),
        (["--results={}/classes.json"], ["classes.json", "damaged"]),
        (["--results={}/results.json", "--superclasses="], ["superclasses"]),
        ([*FILES, "--superclasses=paper", "--only=superclasses"], ["--superclasses", "--results"]),
        ([*FILES, "--bins=100000000"], ["--bins"]),
        ([*FILES, "--logits={}/dict.pth"], ["dict.pth", "not a whole array"]),
        ([*FILES, "--dims=8,16"], ["has 3 prefixes", "names 2"]),
        ([*FILES, "--dims=8,512,32"], ["--dims", "increasing"]),
        ([*FILES, "--dims=a"], ["--dims a"]),
        ([*FILES, "--only=cascades"], ["--only cascades", "cascade, oracle"]),
        ([*FILES, "--epsilon=0"], ["--epsilon 0"]),
        ([*FILES, "--epsilon=x"], ["--epsilon x"]),
        ([*FILES, "--delta=1"], ["--delta"]),
        ([*FILES, "--learn=1"], ["--learn"]),
        ([*FILES, "--splits=0"], ["--splits"]),
        ([*FILES, "--output=/nowhere/a.json"], ["--output", "/nowhere"]),
        (
            ["--predictions={}/gt.npy", "--gt={}/gt.npy", "--dims=8", "--only=cascade"],
            ["--only cascade", "--logits"],
        ),
    ],
)
def test_mistakes_are_one_line(hostile, capsys, monkeypatch, argv, words):
    monkeypatch.chdir(hostile)
    before = sorted(hostile.iterdir())
    with pytest.raises(SystemExit) as end:
        analyze.main([word.format(hostile) for word in argv])
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert all(word in lines[0] for word in words), lines[0]
    assert sorted(hostile.iterdir()) == before  # nothing was written, nothing executed
