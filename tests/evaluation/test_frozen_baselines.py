"""`baselines --protocol frozen` against scikit-learn, from a model and from embeddings."""

import json

import embedding_folders
import numpy as np
import pytest
import torch
from matryoshka.inference import baselines
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler, normalize

from matryoshka.checkpoint.model_file import save_model
from matryoshka.data import CenterCrop, Loader
from matryoshka.data.augment import Preprocessing
from matryoshka.models import ModelSpec, build

DIMS = (4, 16)
DECAY = 1e-2


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """Two folders of embeddings, 240 and 80 rows of 16 numbers, 4 classes, and their arrays."""
    root = tmp_path_factory.mktemp("embedded")
    sets = {}
    for name, count, seed in (("train", 240, 0), ("val", 80, 1)):
        x, y = embedding_folders.nested(count, 16, seed, classes=4)
        classes = ["a", "b", "c", "d"]
        embedding_folders.write(root / name, x, y, classes=classes)
        sets[name] = (x.astype(float), y)
    return root, sets


@pytest.fixture(scope="module")
def results(embedded):
    root, _ = embedded
    return run(root, "--draws=2", f"--weight-decay={DECAY}")


def run(root, *more):
    """baselines.json of the two folders."""
    output = root / "baselines.json"
    assert (
        baselines.main(
            [
                "--protocol=frozen",
                f"--train-data={root}/train",
                f"--val-data={root}/val",
                f"--dims={','.join(map(str, DIMS))}",
                "--shots=1,5",
                "--device=cpu",
                f"--output={output}",
                *more,
            ]
        )
        == 0
    )
    return json.loads(output.read_text())


def knn(train, val, k):
    oracle = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda away: np.exp((1 - away) / 0.07)
    )
    return 100 * oracle.fit(*train).score(*val)


def average_precision(train, val):
    """mAP@10 by loops: the sum of the precisions at the hits, divided by 10."""
    units, queries = normalize(train[0]), normalize(val[0])
    total = 0.0
    for query, label in zip(queries, val[1], strict=True):
        hits = 0
        for rank, row in enumerate(np.argsort(-(units @ query), kind="stable")[:10], 1):
            if train[1][row] == label:
                hits += 1
                total += hits / rank / 10
    return 100 * total / len(queries)


def probe(train, val):
    scaler = StandardScaler().fit(train[0])
    oracle = LogisticRegression(C=1 / (len(train[0]) * DECAY), tol=1e-8, max_iter=5000)
    oracle.fit(scaler.transform(train[0]), train[1])
    return 100 * oracle.score(scaler.transform(val[0]), val[1])


def cut(sets, d):
    return [(x[:, :d], y) for x, y in (sets["train"], sets["val"])]


def test_prefixes_and_pca_are_scikit_learns(embedded, results):
    _, sets = embedded
    pca = PCA(16).fit(sets["train"][0])
    projected = {name: (pca.transform(x), y) for name, (x, y) in sets.items()}
    rows = results["methods"]
    for name, space in (("MRL", sets), ("PCA", projected)):
        for d in DIMS:
            own = cut(space, d)
            expected = {
                "kNN k=20": knn(*own, 20),
                "kNN k=200": knn(*own, 200),
                "mAP@10": average_precision(*own),
                "LP linear": probe(*own),
            }
            for method, value in expected.items():
                # One of 80 queries may be a tie.
                found = rows[f"{name} {method}"]["values"][str(d)]
                assert found == pytest.approx(value, abs=1.3), f"{name} {method}, prefix {d}"
        fit = rows[f"{name} LP linear"]
        assert fit["converged"]
        assert 0 < fit["gradient"] <= 1e-4
        assert set(rows[f"{name} NCM 5-shot"]["values"]) == {"4", "16"}
    assert rows["PCA mAP@10"]["values"] != rows["MRL mAP@10"]["values"]


def test_random_features_are_means_over_draws(embedded, results):
    _, sets = embedded
    scores = []
    for draw in range(2):
        chosen = torch.randperm(16, generator=torch.Generator().manual_seed(draw))[:4].numpy()
        train, val = ((x[:, chosen], y) for x, y in (sets["train"], sets["val"]))
        scores.append(knn(train, val, 20))
    row = results["methods"]["Rand. kNN k=20"]
    assert row["values"]["4"] == pytest.approx(np.mean(scores), abs=1.3)
    assert row["std"]["4"] == pytest.approx(np.std(scores, ddof=1), abs=1.5)
    assert row["values"]["16"] == results["methods"]["MRL kNN k=20"]["values"]["16"]
    assert row["std"]["16"] is None
    assert (row["draws"], row["k"]) == (2, 20)


def test_what_embeddings_cannot_show_is_skipped(embedded, tmp_path, capsys):
    root, _ = embedded
    found = run(root, "--draws=1")
    shown = capsys.readouterr().out
    assert "skipped pixels-knn, pixels-map, pixels-ncm: they need a model with images" in shown
    assert "MRL LP linear: gradient" in shown
    assert (found["n_train"], found["n_val"], found["protocol"]) == (240, 80, "frozen")


def test_a_model_with_images(digits, tmp_path):
    torch.manual_seed(0)
    model = build(ModelSpec("resnet10", 10, (8, 32)))
    model.preprocessing = Preprocessing(size=32, ratio=1.0)
    save_model(model, tmp_path / "m.safetensors")
    output = tmp_path / "baselines.json"
    code = baselines.main(
        [
            *("--protocol=frozen", f"--path={tmp_path}/m.safetensors", "--only=knn,pixels-knn"),
            *(f"--train-data={digits['train']}", f"--val-data={digits['val']}"),
            *("--workers=1", "--device=cpu", f"--output={output}"),
        ]
    )
    assert code == 0
    rows = json.loads(output.read_text())["methods"]
    assert list(rows) == ["MRL kNN k=20", "MRL kNN k=200", "Pixels kNN k=20", "Pixels kNN k=200"]
    sets = []
    for part in ("train", "val"):
        loader = Loader(digits[part], 64, order="sequential", crop=CenterCrop(32, 1.0))
        batches = list(loader)
        pixels = torch.cat([batch.images.flatten(1) for batch in batches]).numpy() / 255
        sets.append((pixels, torch.cat([batch.labels for batch in batches]).numpy()))
    mean = sets[0][0].mean(0)
    sets = [(pixels - mean, labels) for pixels, labels in sets]
    assert rows["Pixels kNN k=20"]["values"] == {"3072": pytest.approx(knn(*sets, 20), abs=1.01)}
    assert set(rows["MRL kNN k=20"]["values"]) == {"8", "32"}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--only=linear,knn"], ["--only linear", "give --path"]),
        (["--only=pixels-map"], ["--only pixels-map", "give --path"]),
        (["--dims=4,17"], ["--dims 4,17", "width 16"]),
        (["--val-data={other}"], ["--val-data", "another model"]),
        (["--val-data={nan}"], ["nan", "not finite"]),
        (["--train-data={tmp}"], ["has no embeddings"]),
        (["--train-data={single}"], ["--train-data", "only one class"]),
        (["--protocol=knn"], ["--protocol knn"]),
    ],
)
def test_mistakes_are_one_line(embedded, tmp_path, capsys, more, words):
    root, sets = embedded
    x, y = sets["val"]
    x = x.astype(np.float32)
    broken = x.copy()
    broken[3, 2] = np.nan
    places = {"tmp": tmp_path}
    for name, rows, labels, weights in (
        ("other", x, y, "cd" * 32),
        ("nan", broken, y, None),
        ("single", x, y * 0, None),
    ):
        classes = ["a"] if name == "single" else ["a", "b", "c", "d"]
        places[name] = embedding_folders.write(
            tmp_path / name, rows, labels, weights=weights, classes=classes
        )
    (root / "baselines.json").unlink(missing_ok=True)
    with pytest.raises(SystemExit) as end:
        run(root, *(word.format(**places) for word in more))
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2
    assert all(word in line for word in words), line
    assert not (root / "baselines.json").exists()
