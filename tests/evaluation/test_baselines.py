"""Neighbours, class means and the paper's baselines, against loops and scikit-learn."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matryoshka.inference import baselines
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.preprocessing import StandardScaler, normalize

from matryoshka.checkpoint.model_file import load_model, save_model
from matryoshka.data import CenterCrop, Loader
from matryoshka.data.augment import Preprocessing
from matryoshka.evaluation import neighbours
from matryoshka.evaluation.neighbours import (
    NeighbourError,
    draw_shots,
    knn_accuracy,
    nearest,
    nearest_class_mean,
    vote,
)
from matryoshka.evaluation.predict import extract_features
from matryoshka.models import ModelSpec, build

# scikit-learn's NearestCentroid divides by the number of images beyond one a class
pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning:sklearn", "ignore:self.within_class:UserWarning"
)

# ---------------------------------------------------------------- neighbours


def ranked(database, queries, d):
    """Indices of all entries by distance of the normalised prefixes, ties by index: [N, M]."""

    def unit(v):
        length = np.sqrt((v[:d] ** 2).sum())
        return v[:d] / length if length else v[:d]

    rows = []
    for q in queries:
        distances = [((unit(q) - unit(x)) ** 2).sum() for x in database]
        rows.append(sorted(range(len(database)), key=lambda i, ds=distances: (round(ds[i], 9), i)))
    return np.array(rows)


@settings(max_examples=40)
@given(st.data())
def test_nearest_equals_loops(data):
    """Coordinates of -1, 0, 1 give many equal distances, duplicates and zeros."""
    m, n, width = (data.draw(st.integers(1, high)) for high in (30, 6, 5))
    dims = sorted(data.draw(st.sets(st.integers(1, width), min_size=1)))
    k = data.draw(st.integers(1, m))
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    database, queries = (rng.integers(-1, 2, (size, width)).astype(np.float32) for size in (m, n))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "_TILE", data.draw(st.sampled_from([512, 512 * 7, 1 << 24])))
        found = nearest(torch.tensor(database), torch.tensor(queries), dims, k)
    assert (tuple(found.shape), found.dtype) == ((len(dims), n, k), torch.int64), (
        "expected int64 [G, N, k]"
    )
    for g, d in enumerate(dims):
        np.testing.assert_array_equal(
            found[g], ranked(database.astype(float), queries.astype(float), d)[:, :k]
        )


def test_a_zero_vector_ties_with_a_vector_at_60_degrees():
    """Both are at distance 1 from the query; rounding errors must not break the tie."""
    angles = torch.tensor(
        [[1, 1, 0], [0, 0, 0], [1, 0, 1], [0, 1, 1], [0, 0, 0]], dtype=torch.float32
    )
    assert nearest(angles, torch.tensor([[1.0, 1, 0]]), (3,), 5).tolist() == [[[0, 1, 2, 3, 4]]], (
        "rounding errors decided a tie"
    )


def test_distant_duplicates_stay_in_order(monkeypatch):
    """1,000 copies of three vectors: the first copies are the nearest."""
    rng = np.random.default_rng(0)
    three = torch.tensor(rng.normal(size=(3, 33)), dtype=torch.float32)
    database = three[torch.arange(3000) % 3]
    monkeypatch.setattr(neighbours, "_TILE", 512 * 701)
    found = nearest(database, three, (7, 33), 500)
    for q in range(3):
        assert torch.equal(found[:, q], (torch.arange(500) * 3 + q).expand(2, -1)), (
            f"query {q}: copies are out of order"
        )


@pytest.mark.parametrize("k", [1, 5])
def test_neighbours_are_scikit_learns(k):
    rng = np.random.default_rng(1)
    labels, queries_labels = rng.integers(0, 4, 200), rng.integers(0, 4, 60)
    database = (rng.normal(size=(4, 12))[labels] + 2 * rng.normal(size=(200, 12))).astype(
        np.float32
    )
    queries = (rng.normal(size=(60, 12)) + 1).astype(np.float32)
    dims = (1, 4, 12)
    found = nearest(torch.tensor(database), torch.tensor(queries), dims, k)
    accuracy = knn_accuracy(found, torch.tensor(labels), torch.tensor(queries_labels))
    for g, d in enumerate(dims[1:], 1):  # normalised prefixes of length 1 are 1 or -1: all tie
        oracle = KNeighborsClassifier(k, algorithm="brute").fit(normalize(database[:, :d]), labels)
        expected = oracle.kneighbors(normalize(queries[:, :d]), return_distance=False)
        np.testing.assert_array_equal(found[g], expected)
        if k == 1:
            assert accuracy[g] == pytest.approx(
                100 * oracle.score(normalize(queries[:, :d]), queries_labels)
            ), f"prefix {d}: 1-NN differs from scikit-learn"
    for g in range(3):
        predicted = []
        for row in found[g].numpy():
            votes = Counter(
                labels[row].tolist()
            )  # in the order of the neighbours, as most_common keeps it
            predicted.append(votes.most_common(1)[0][0])
        assert accuracy[g] == pytest.approx(100 * np.mean(np.array(predicted) == queries_labels)), (
            f"prefix {dims[g]}: majority vote differs"
        )


def test_votes():
    assert vote(torch.tensor([[2, 1, 1], [3, 4, 5], [7, 8, 8], [1, 2, 1]])).tolist() == [
        1,
        3,
        8,
        1,
    ], "ties go to the nearest neighbour"


# ---------------------------------------------------------------- class means


@settings(max_examples=25)
@given(st.integers(0, 99), st.integers(2, 5), st.integers(1, 4))
def test_draws_of_shots(seed, classes, shots):
    labels = torch.tensor(
        np.random.default_rng(seed).permutation(np.repeat(np.arange(classes) * 3, shots + 2))
    )
    present, rows = draw_shots(labels, shots, seed, 0)
    assert present.tolist() == [3 * c for c in range(classes)], (
        "classes are not those of the labels"
    )
    assert torch.equal(labels[rows], present[:, None].expand(-1, shots)), (
        "an image of another class was drawn"
    )
    assert len(rows.unique()) == rows.numel(), "an image was drawn twice"
    assert torch.equal(rows, draw_shots(labels, shots, seed, 0)[1]), (
        "the same seed draws other images"
    )
    fewer, few = draw_shots(labels, shots, seed, 0, ways=2)
    assert len(fewer) == 2, "expected two ways"
    assert set(fewer.tolist()) <= set(present.tolist()), "an unknown class was drawn"
    assert torch.equal(labels[few], fewer[:, None].expand(-1, shots)), (
        "an image of another class was drawn"
    )


def test_other_draws_are_other_images():
    labels = torch.arange(4).repeat(50)
    drawn = [draw_shots(labels, 9, seed, draw)[1] for seed, draw in ((0, 0), (0, 1), (1, 0))]
    assert not torch.equal(drawn[0], drawn[1]), "another draw has the same images"
    assert not torch.equal(drawn[0], drawn[2]), "another seed draws the same images"
    counts = torch.zeros(200)
    for draw in range(400):
        counts[draw_shots(labels, 5, 0, draw)[1].flatten()] += 1
    assert counts.min() > 15, f"an image was drawn only {counts.min()} times, 40 expected"
    assert counts.max() < 75, f"an image was drawn {counts.max()} times, 40 expected"


@pytest.mark.parametrize("ways", [None, 2])
def test_class_means_are_scikit_learns(monkeypatch, ways):
    rng = np.random.default_rng(2)
    labels, query_labels = (
        np.repeat(np.arange(4), 12),
        rng.integers(0, 5, 80),
    )  # class 4 has no training images
    centres = rng.normal(size=(5, 6))
    features = (centres[labels] + rng.normal(size=(48, 6))).astype(np.float32)
    queries = (centres[query_labels] + rng.normal(size=(80, 6))).astype(np.float32)
    monkeypatch.setattr(neighbours, "_TILE", 100)
    found = nearest_class_mean(
        torch.tensor(features),
        torch.tensor(labels),
        torch.tensor(queries),
        torch.tensor(query_labels),
        dims=(2, 6),
        shots=(1, 4),
        draws=3,
        seed=7,
        ways=ways,
    )
    assert tuple(found.shape) == (3, 2, 2), "expected [draws, shots, G]"
    for draw in range(3):
        classes, rows = draw_shots(torch.tensor(labels), 4, 7, draw, ways)
        asked = np.isin(query_labels, classes) if ways else np.ones(80, bool)
        for s, n in enumerate((1, 4)):
            for g, d in enumerate((2, 6)):
                few = rows[:, :n].flatten().numpy()
                oracle = NearestCentroid().fit(
                    normalize(features[few, :d].astype(float)), labels[few]
                )
                score = oracle.score(
                    normalize(queries[asked, :d].astype(float)), query_labels[asked]
                )
                assert float(found[draw, s, g]) == pytest.approx(100 * score), (
                    f"draw {draw}, {n} shots, prefix {d}: differs from scikit-learn"
                )
    assert found.std() > 0, "all accuracies are equal: the test is vacuous"


def test_impossible_draws():
    x, labels = torch.randn(6, 3), torch.tensor([0, 0, 0, 1, 1, 2])
    with pytest.raises(NeighbourError, match="2 shots: class 2 has only 1 images"):
        draw_shots(labels, 2, 0, 0)
    with pytest.raises(NeighbourError, match="4 ways: expected 2 to 3"):
        draw_shots(labels, 1, 0, 0, 4)
    with pytest.raises(NeighbourError, match="no query"):
        nearest_class_mean(x, labels, x[:1], torch.tensor([9]), dims=(3,), shots=(1,), ways=2)
    with pytest.raises(NeighbourError, match="7 neighbours"):
        nearest(x, x, (3,), 7)


# ---------------------------------------------------------------- the program


def make(path, dims, digits, classes=10):
    """A checkpoint with a random trunk, whose heads recognise some of the validation digits."""
    torch.manual_seed(0)
    model = build(ModelSpec("resnet10", classes, dims))
    model.preprocessing, model.classes = (
        Preprocessing(size=32, ratio=1.0),
        [str(i) for i in range(classes)],
    )
    if classes == 10:
        x, y = features_of(model, digits["train"])
        with torch.no_grad():
            for head in model.head.heads:
                d = head.in_features
                means = torch.stack([x[y == c, :d].mean(0) for c in range(10)]) - x[:, :d].mean(0)
                head.weight.copy_(means)
                head.bias.copy_(-(means * (means / 2 + x[:, :d].mean(0))).sum(1))
    save_model(model, path)
    return path


def features_of(model, data):
    loader = Loader(data, 64, order="sequential", crop=CenterCrop(32, 1.0))
    return extract_features(model, loader, len(loader.dataset))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, digits):
    root = tmp_path_factory.mktemp("models")
    kinds = {"ff": (512,), "mrl": (4, 32, 512), "ff64": (64,)}
    return {name: make(root / f"{name}.safetensors", dims, digits) for name, dims in kinds.items()}


def run(checkpoint, digits, folder, *more):
    """(baselines.json, {split: (features, labels)} as NumPy arrays)."""
    output = folder / "baselines.json"
    argv = [
        f"--path={checkpoint}",
        f"--train-data={digits['train']}",
        f"--val-data={digits['val']}",
        "--workers=1",
    ]
    assert baselines.main([*argv, "--device=cpu", f"--output={output}", *more]) == 0
    model = load_model(checkpoint)
    sets = {}
    for split in ("train", "val"):
        features, labels = features_of(model, digits[split])
        sets[split] = features[:, : model.dims[-1]].double().numpy(), labels.numpy()
    return json.loads(output.read_text()), sets


def of_one_nn(sets, columns):
    """Top-1 % of scikit-learn's nearest neighbour on some columns; one of 100 may be a tie."""
    (x, y), (queries, labels) = sets["train"], sets["val"]
    oracle = KNeighborsClassifier(1, algorithm="brute").fit(normalize(x[:, columns]), y)
    return pytest.approx(100 * oracle.score(normalize(queries[:, columns]), labels), abs=1.01)


def test_all_methods_of_a_fixed_feature(checkpoints, digits, tmp_path, capsys):
    more = ["--dims=4,8,512", "--draws=2", "--shots=1,5", "--seed=3", "--weight-decay=1e-2"]
    results, sets = run(checkpoints["ff"], digits, tmp_path, *more)
    rows = results["methods"]
    (x, y), (queries, labels) = sets["train"], sets["val"]
    assert list(rows) == [
        "FF512 linear",
        "FF512 1-NN",
        "FF512 NCM 1-shot",
        "FF512 NCM 5-shot",
        "SVD linear",
        "SVD 1-NN",
        "Rand. FS 1-NN",
        "Rand. LP linear",
    ]
    head = load_model(checkpoints["ff"]).head.heads[0]
    weight, bias = head.weight.detach().double().numpy(), head.bias.detach().double().numpy()
    whole = 100 * np.mean((queries @ weight.T + bias).argmax(1) == labels)
    assert rows["FF512 linear"]["values"] == {"512": pytest.approx(whole, abs=1.01)}, (
        "linear accuracy differs from NumPy"
    )
    assert whole > 40, "the classifier must know some digits"
    for d, value in rows["FF512 1-NN"]["values"].items():
        assert value == of_one_nn(sets, slice(int(d))), (
            f"prefix {d}: 1-NN differs from scikit-learn"
        )

    u, s, v = np.linalg.svd(weight, full_matrices=False)
    svd = []
    for k in (4, 8, 512):
        cut = sum(s[i] * np.outer(u[:, i], v[i]) for i in range(min(k, 10)))
        svd.append(100 * np.mean((queries @ cut.T + bias).argmax(1) == labels))
    assert list(rows["SVD linear"]["values"].values()) == [
        pytest.approx(value, abs=1.01) for value in svd
    ], "low-rank classifiers differ from NumPy"
    assert svd[0] < svd[2], "rank 4 is as good as the whole weight: the test is vacuous"
    projected = {split: (features @ v.T, own) for split, (features, own) in sets.items()}
    assert rows["SVD 1-NN"]["values"] == {str(k): of_one_nn(projected, slice(k)) for k in (4, 8)}, (
        "1-NN on the projections differs from scikit-learn"
    )

    orders = [
        torch.randperm(512, generator=torch.Generator().manual_seed(3 * 1_000_003 + i)).numpy()
        for i in (0, 1)
    ]
    for d in (4, 8):
        found = []
        for order in orders:
            scaler = StandardScaler().fit(x[:, order[:d]])
            oracle = LogisticRegression(C=1 / (400 * 1e-2), tol=1e-8, max_iter=5000)
            oracle.fit(scaler.transform(x[:, order[:d]]), y)
            one_nn = KNeighborsClassifier(1, algorithm="brute").fit(normalize(x[:, order[:d]]), y)
            score = oracle.score(scaler.transform(queries[:, order[:d]]), labels)
            found.append(
                (100 * one_nn.score(normalize(queries[:, order[:d]]), labels), 100 * score)
            )
        for name, values in zip(
            ("Rand. FS 1-NN", "Rand. LP linear"), np.array(found).T, strict=True
        ):
            assert rows[name]["values"][str(d)] == pytest.approx(values.mean(), abs=1.01), (
                f"{name}, {d} features: mean over the draws"
            )
            assert rows[name]["std"][str(d)] == pytest.approx(values.std(ddof=1), abs=1.5), (
                f"{name}, {d} features: deviation over the draws"
            )
            assert (rows[name]["draws"], rows[name]["seed"], rows[name]["std"]["512"]) == (
                2,
                3,
                None,
            ), f"{name}: the whole feature has no deviation"
    assert rows["Rand. FS 1-NN"]["values"]["512"] == rows["FF512 1-NN"]["values"]["512"], (
        "the whole feature in another order is the same"
    )
    assert rows["Rand. LP linear"]["converged"]

    for n in (1, 5):
        row, scores = rows[f"FF512 NCM {n}-shot"], []
        for draw in range(2):
            few = draw_shots(torch.tensor(y), 5, 3, draw)[1][:, :n].flatten().numpy()
            oracle = NearestCentroid().fit(normalize(x[few, :8]), y[few])
            scores.append(100 * oracle.score(normalize(queries[:, :8]), labels))
        assert row["values"]["8"] == pytest.approx(np.mean(scores), abs=1.01), (
            f"{n} shots: mean over the draws differs from scikit-learn"
        )
        assert (row["shots"], row["draws"], row["metric"]) == (n, 2, "top1 ncm"), (
            f"{n} shots: settings in the file"
        )

    facts = ("dims", "n_train", "n_val", "seed", "head", "classes")
    assert [results[key] for key in facts] == [[4, 8, 512], 400, 100, 3, "ff512", 10], (
        "settings in the file"
    )
    assert set(results["seconds"]) == {"features_train", "features_val", *baselines.METHODS}
    table = [
        line
        for line in capsys.readouterr().out.splitlines()
        if line.startswith(("top-1", "Rand", "SVD", "FF512"))
    ]
    assert len({len(line) for line in table}) == 1, "the columns are not aligned"
    assert [line.count("±") for line in table] == [0, 0, 0, 3, 3, 0, 0, 2, 2], (
        "deviations in the table"
    )
    assert table[1].split()[2:] == ["-", "-", f"{rows['FF512 linear']['values']['512']:.2f}"]


def test_a_nested_model(checkpoints, digits, tmp_path, capsys):
    results, sets = run(checkpoints["mrl"], digits, tmp_path, "--draws=1", "--shots=2", "--ways=3")
    rows = results["methods"]
    assert list(rows) == [
        "MRL linear",
        "MRL 1-NN",
        "MRL NCM 3-way 2-shot",
        "Rand. FS 1-NN",
        "Rand. LP linear",
    ]
    assert "skipped svd, svd-1nn" in capsys.readouterr().out
    queries, labels = sets["val"]
    for d, head in zip((4, 32, 512), load_model(checkpoints["mrl"]).head.heads, strict=True):
        logits = (
            queries[:, :d] @ head.weight.detach().double().numpy().T
            + head.bias.detach().double().numpy()
        )
        expected = 100 * np.mean(logits.argmax(1) == labels)
        assert rows["MRL linear"]["values"][str(d)] == pytest.approx(expected, abs=1.01), (
            f"prefix {d}: linear accuracy differs from NumPy"
        )
        assert rows["MRL 1-NN"]["values"][str(d)] == of_one_nn(sets, slice(d)), (
            f"prefix {d}: 1-NN differs from scikit-learn"
        )
    assert rows["Rand. FS 1-NN"]["std"] is None  # one draw has no deviation


def test_a_feature_narrower_than_its_trunk(checkpoints, digits, tmp_path):
    results, sets = run(checkpoints["ff64"], digits, tmp_path, "--only=1nn,linear")
    assert results["dims"] == [8, 16, 32, 64], "powers of two up to the width of the feature"
    assert list(results["methods"]) == ["FF64 linear", "FF64 1-NN"]
    assert results["methods"]["FF64 1-NN"]["values"]["64"] == of_one_nn(sets, slice(64)), (
        "1-NN must use the 64 features of the head"
    )


def test_other_classes_than_the_models(digits, tmp_path, capsys):
    path = make(tmp_path / "m.safetensors", (512,), digits, classes=7)
    results, _ = run(path, digits, tmp_path, "--dims=8", "--draws=1", "--shots=1")
    assert list(results["methods"]) == [
        "FF512 1-NN",
        "FF512 NCM 1-shot",
        "Rand. FS 1-NN",
        "Rand. LP linear",
    ]
    assert "skipped linear, svd, svd-1nn" in capsys.readouterr().out


def test_the_largest_seed(checkpoints, digits, tmp_path):
    results, _ = run(
        checkpoints["ff"], digits, tmp_path, f"--seed={2**63 - 1}", "--dims=4", "--only=ncm,rand-fs"
    )
    assert {row["seed"] for row in results["methods"].values()} == {2**63 - 1}
    assert results["methods"]["Rand. FS 1-NN"]["std"]["4"] > 0, "all draws are equal"


def test_a_method_without_values_is_reported(checkpoints, digits, tmp_path, capsys):
    results, _ = run(checkpoints["ff"], digits, tmp_path, "--dims=16", "--only=linear,svd-1nn")
    assert results["methods"] == {}
    shown = capsys.readouterr().out
    assert "linear: no value for the prefixes [16]" in shown
    assert "svd-1nn: no value for the prefixes [16]" in shown


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--dims=8,1024"], ["--dims 8,1024", "width 512"]),
        (["--dims=8,4"], ["--dims 8,4", "increasing"]),
        (["--dims=eight"], ["--dims eight", "expected int,..."]),
        (["--shots=0"], ["--shots 0"]),
        (["--shots=500"], ["500 shots", "only"]),
        (["--ways=11", "--only=ncm"], ["11 ways", "2 to 10"]),
        (["--only=1nn,5nn"], ["--only 1nn,5nn", "'5nn' is unknown", "1nn, ncm"]),
        (["--only="], ["--only '': expected one or more values", "1nn, ncm"]),
        (["--dims="], ["--dims '': expected one or more values"]),
        (["--only=svd", "--path={mrl}"], ["--only svd", "one classifier", "mrl"]),
        (["--only=linear", "--path={other}"], ["10 classes", "the model 7"]),
        (["--val-data={folder}/val"], ["--val-data", "3 classes", "10"]),
        (
            ["--train-data={tmp}/single", "--val-data={tmp}/single"],
            ["--train-data", "only one class"],
        ),
        (["--train-data={tmp}/none"], ["none", "no such file"]),
        (["--path={tmp}/none.pt"], ["none.pt", "no such checkpoint"]),
        (["--path=torchvision:resnet50", "--mrl"], ["torchvision:resnet50", "mrl"]),
        (["--mrl"], ["mrl was requested", "ff512"]),
        (["--draws=0"], ["--draws 0"]),
        (["--seed=-1"], ["--seed -1"]),
        ([f"--seed={2**63}"], [f"--seed {2**63}: expected 0 to {2**63 - 1}"]),
        (["--workers=1025"], ["--workers 1025: expected 0 to 1024"]),
        (["--workers=-1"], ["--workers -1: expected 0 to 1024"]),
        (["--weight-decay=nan"], ["--weight-decay nan"]),
        (["--weight-decay=inf"], ["--weight-decay inf"]),
        (["--batch-size=0"], ["--batch-size 0"]),
        (["--output={tmp}/nowhere/b.json"], ["--output", "nowhere"]),
        (["--output={tmp}/single"], ["--output", "single: is a folder"]),
    ],
)
def test_mistakes_are_one_line(checkpoints, digits, folder, tmp_path, capsys, *, more, words):
    shutil.copytree(folder / "train" / "ant", tmp_path / "single" / "ant")
    other = make(tmp_path / "other.safetensors", (512,), digits, classes=7)
    given = [
        word.format(tmp=tmp_path, folder=folder, mrl=checkpoints["mrl"], other=other)
        for word in more
    ]
    with pytest.raises(SystemExit) as end:
        run(checkpoints["ff"], digits, tmp_path, *given)
    lines = capsys.readouterr().err.strip().splitlines()
    assert (end.value.code, len(lines)) == (2, 1), lines
    assert lines[0].startswith("error: ")
    assert all(word in lines[0] for word in words), lines[0]
    assert not (tmp_path / "baselines.json").exists()
