"""matryoshka adapt: parts, choice and table, and the programs that take the adapter along."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from embedding_folders import write
from hypothesis import given, settings
from hypothesis import strategies as st
from matryoshka.inference import adapt, embed, export_models, index, retrieve, serve
from PIL import Image

from matryoshka.checkpoint.adapter_file import add_adapter, load_adapter, save_adapter
from matryoshka.checkpoint.model_file import load_model, save_model
from matryoshka.embeddings.reading import adapted_sha256, open_embeddings, trunk_sha256
from matryoshka.evaluation.leave_one_out import Panel, difference_of_means, other_neighbours
from matryoshka.export.graph import Deployed
from matryoshka.export.options import ExportError
from matryoshka.models import ModelSpec, build
from matryoshka.models.adapter import (
    AdapterSpec,
    discriminant_adapter,
    pca_adapter,
    random_adapter,
)
from matryoshka.retrieval.store import Index
from matryoshka.training.adapter import AdapterTraining, Fitted, fit_adapter
from matryoshka.training.adapter_data import split

WIDTH = 16


def hidden_classes(count=900, classes=6, seed=0):
    """(float32 [count, WIDTH], int64 [count]): the classes are in directions of little variance."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    x = rng.standard_normal((count, WIDTH))
    x[:, :6] = 0.2 * rng.standard_normal((count, 6)) + 1.2 * np.eye(6)[labels]
    rotation = np.linalg.qr(np.random.default_rng(9).standard_normal((WIDTH, WIDTH)))[0]
    return (x @ rotation).astype(np.float32), labels


def run(*words, code=0):
    assert adapt.main([*map(str, words), "--threads=1"]) == code


def refused(main, words, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main([*map(str, words)])
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2
    assert len(lines) == 1, lines
    return lines[0]


@pytest.fixture
def arrays(tmp_path):
    """A folder of arrays from elsewhere."""
    rows, labels = hidden_classes()
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    np.save(folder / "embeddings.npy", rows)
    np.save(folder / "labels.npy", labels.astype(np.int32))
    return folder


# ---------------------------------------------------------------- parts


@settings(max_examples=30)
@given(
    st.integers(12, 400),
    st.integers(2, 9),
    st.sampled_from([0.1, 0.15, 0.3]),
    st.sampled_from([0.1, 0.25, 0.4]),
    st.integers(0, 99),
)
def test_parts_are_disjoint_and_have_their_share_of_each_class(count, classes, val, test, seed):
    count = max(count, 20 * classes)
    labels = np.random.default_rng(seed).integers(0, classes, count)
    parts = split(labels, count, "random", validation=val, test=test, seed=seed)
    assert sorted(np.concatenate(parts).tolist()) == list(range(count))
    for part, share in zip(parts, (1 - val - test, val, test), strict=True):
        assert np.all(np.diff(part) > 0)
        for c in range(classes):
            assert abs((labels[part] == c).sum() - share * (labels == c).sum()) <= 2
    again = split(labels, count, "random", validation=val, test=test, seed=seed)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))


def test_parts_by_classes_share_no_class():
    labels = np.repeat(np.arange(10), 7)
    parts = split(labels, 70, "classes", validation=0.2, test=0.3, seed=1)
    found = [set(labels[part]) for part in parts]
    assert [len(classes) for classes in found] == [5, 2, 3]
    assert set.union(*found) == set(range(10))
    assert sum(map(len, parts)) == 70


# ---------------------------------------------------------------- scores


def test_scores_against_loops():
    rows, labels = hidden_classes(60, 3, seed=4)
    rows[7] = rows[3]  # equal rows: a query must leave out itself, not its copy
    panel = Panel(rows, labels, (2, WIDTH), 25)
    scores = panel.scores(None)
    assert scores.right_1nn is not None
    assert scores.precision is not None
    assert len(panel.own) == 25
    for g, d in enumerate((2, WIDTH)):
        cut = rows[:, :d].astype(np.float64)
        unit = cut / np.linalg.norm(cut, axis=1, keepdims=True)
        whole = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        for q, own in enumerate(panel.own):
            others = [j for j in range(60) if j != own]
            near = sorted(others, key=lambda j: -round(float(unit[j] @ unit[own]), 6))
            exact = sorted(others, key=lambda j: -round(float(whole[j] @ whole[own]), 6))[:10]
            hits = [labels[j] == labels[own] for j in near[:10]]
            precision = sum(sum(hits[: i + 1]) / (i + 1) for i in range(10) if hits[i])
            relevant = min(10, (labels == labels[own]).sum() - 1)
            assert scores.right_1nn[g, q] == hits[0]
            assert scores.precision[g, q] == pytest.approx(precision / relevant)
            assert scores.recall[g, q] == pytest.approx(len(set(near[:10]) & set(exact)) / 10)
    assert set(other_neighbours(rows, [WIDTH], 59)[0, 3].tolist()) == set(range(60)) - {3}
    identity = random_adapter(AdapterSpec(WIDTH, (WIDTH,)), 0)
    full = Panel(rows, labels, (WIDTH,), 25)
    assert full.score(identity) == pytest.approx(100 * full.scores(identity).main.mean())


def test_the_interval_of_a_difference_is_that_of_the_pairs():
    rng = np.random.default_rng(0)
    first, second = rng.random(500) < 0.6, rng.random(500) < 0.5
    found = difference_of_means(first, second)
    differences = 100 * (first.astype(float) - second)
    error = differences.std(ddof=1) / np.sqrt(500)
    expected = (differences.mean() - 1.96 * error, differences.mean() + 1.96 * error)
    np.testing.assert_allclose(found[1:], expected)


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("loss", ["nca", "supcon", "classes", "neighbours", "similarity"])
@pytest.mark.parametrize("hidden", [0, 8])
def test_a_step_of_each_loss_lowers_it(loss, hidden):
    rows, labels = hidden_classes(300)
    wanted = AdapterTraining(loss=loss, epochs=20, batch_size=300, lr=1e-3)
    spec = AdapterSpec(WIDTH, (2, 4, WIDTH), hidden)
    scores = iter([1.0, *range(2, 99)])
    fitted = fit_adapter(rows, labels, spec, wanted, score=lambda _: next(scores))
    losses = [entry["loss"] for entry in fitted.history[1:]]
    assert losses[-1] < losses[0], losses
    assert fitted.best_epoch == 20
    assert fitted.adapter.spec.method == "learnt"
    assert fitted.pca.spec.method == "pca"


def test_the_best_epoch_counts_and_patience_ends_the_training():
    rows, labels = hidden_classes(200)
    wanted = AdapterTraining(loss="supcon", epochs=50, patience=3, batch_size=100)
    spec = AdapterSpec(WIDTH, (2, WIDTH))
    seen = []

    def score(adapter):
        seen.append(adapter.sha256())
        return [5.0, 4.0, 7.0, 7.0, 6.0, 1.0, 0.0][len(seen) - 1]

    fitted = fit_adapter(rows, labels, spec, wanted, score=score)
    # PCA, the discriminant analysis, and four epochs: the first is the best, three are not better.
    assert len(seen) == 6
    assert fitted.best_epoch == 1
    assert fitted.adapter.sha256() == seen[2]
    again = []
    fit_adapter(
        rows, labels, spec, wanted, score=lambda a: (again.append(a.sha256()), -len(again))[1]
    )
    assert again == seen[: len(again)], "the same seed gives the same weights"


# ---------------------------------------------------------------- the program


def test_labels_find_what_pca_cannot_see(arrays, tmp_path, capsys):
    run("--embeddings", arrays, "--output", tmp_path / "out", "--dims=4,8", "--epochs=4")
    said = capsys.readouterr().out
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["chosen"] in ("learnt", "discriminant")
    assert results["parts"] == {"train": 630, "validation": 135, "test": 135}
    one = results["metrics"]["right_1nn"]
    assert set(one) == {"raw prefix", "PCA", "random rotation", "adapter"}
    assert one["PCA"]["4"]["mean"] < 50
    assert one["adapter"]["4"]["mean"] > 80
    assert one["adapter"]["4"]["over_pca"]["low"] > 10
    assert f"{one['adapter']['8']['mean']:.2f}" in said
    adapter = load_adapter(tmp_path / "out/adapter.safetensors")
    assert (adapter.dims, adapter.spec.width, adapter.spec.encoder) == ((4, 8), WIDTH, None)
    assert (tmp_path / "out/accuracy.png").read_bytes()[:4] == b"\x89PNG"
    # The table can be made again from the file alone.
    rows, labels = np.load(arrays / "embeddings.npy"), np.load(arrays / "labels.npy")
    parts = split(labels.astype(np.int64), 900, "random", validation=0.15, test=0.15, seed=0)
    panel = Panel(rows[parts.test], labels[parts.test].astype(np.int64), (4, 8), 10_000)
    assert 100 * panel.scores(adapter).main.mean(1)[0] == pytest.approx(one["adapter"]["4"]["mean"])


def test_pca_is_the_adapter_when_the_labels_tell_nothing(arrays, tmp_path, capsys):
    noise = np.random.default_rng(5).integers(0, 6, 900)
    np.save(tmp_path / "noise.npy", noise)
    words = ("--embeddings", arrays, "--labels", tmp_path / "noise.npy", "--dims=4,8")
    run(*words, "--output", tmp_path / "out", "--epochs=2")
    assert "adapter: PCA" in capsys.readouterr().out
    results = json.loads((tmp_path / "out/results.json").read_text())
    adapter = load_adapter(tmp_path / "out/adapter.safetensors")
    assert results["chosen"] == adapter.spec.method == "pca"
    one = results["metrics"]["right_1nn"]
    assert one["adapter"]["4"]["mean"] == one["PCA"]["4"]["mean"]


def test_a_map_that_is_better_by_chance_alone_is_not_chosen():
    rows, labels = hidden_classes(400)
    spec = AdapterSpec(WIDTH, (4, 8))
    pca = pca_adapter(rows[:200], spec)
    panel = Panel(rows[200:], labels[200:], (4, 8), 999)
    near = replace_weight(pca, pca.weight + 1e-3 * torch.randn(8, WIDTH, generator=seeded(2)))
    better = discriminant_adapter(rows[:200], labels[:200], spec)
    for adapter, expected in ((pca, pca), (near, pca), (better, better)):
        choice = adapt.choose(Fitted(adapter, pca, 3, []), panel)
        assert choice.adapter is expected
        assert ("adapter: PCA" in choice.text) == (expected is pca)


def replace_weight(adapter, weight):
    other = copy.deepcopy(adapter)
    other.weight = torch.nn.Parameter(weight.detach())
    return other


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_without_labels_the_neighbours_of_the_full_width_are_kept(arrays, tmp_path):
    words = ("--embeddings", arrays / "embeddings.npy", "--dims=4,16", "--output", tmp_path / "o")
    run(*words, "--epochs=2", "--map=residual")
    results = json.loads((tmp_path / "o/results.json").read_text())
    assert list(results["metrics"]) == ["recall"]
    assert results["classes"] is None
    assert results["settings"]["loss"] == "neighbours"
    assert results["metrics"]["recall"]["raw prefix"]["16"]["mean"] == 100


BAD = {
    "a NaN row": (lambda x, y: x.__setitem__((5, 2), np.nan), [], "row 5 has NaN"),
    "beyond float32": (
        lambda x, y: np.where(x == x[7, 0], np.float64(1e300), x),
        [],
        "row 7 has NaN",
    ),
    "too many labels": (lambda x, y: np.append(y, 0), [], "901 labels for 900"),
    "a negative label": (lambda x, y: y.__setitem__(3, -1), [], "label of row 3 is -1"),
    "one class": (lambda x, y: y.fill(2), [], "one class only"),
    "fewer rows than numbers": (lambda x, y: x[:20], ["--loss=similarity"], "14 embeddings"),
    "labels of text": (lambda x, y: y.astype(str), [], "expected integer classes"),
    "dims beyond": (lambda x, y: None, ["--dims=8,32"], "--dims"),
    "nothing left": (lambda x, y: None, ["--test=0.9", "--validation=0.1"], "leave nothing"),
    "classes of one part": (lambda x, y: y.__ifloordiv__(3), ["--split=classes"], "more classes"),
    "hidden alone": (lambda x, y: None, ["--hidden=3"], "--map residual"),
    "temperature": (lambda x, y: None, ["--loss=similarity", "--temperature=1"], "--temperature"),
}


@pytest.mark.parametrize(("change", "words", "said"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, capsys, change, words, said):
    rows, labels = hidden_classes()
    changed = change(rows, labels)
    if changed is not None and changed.ndim == 2:
        rows, labels = changed, labels[: len(changed)]
    elif changed is not None:
        labels = changed
    (tmp_path / "given").mkdir()
    np.save(tmp_path / "given/embeddings.npy", rows)
    np.save(tmp_path / "given/labels.npy", labels)
    argv = ["--embeddings", tmp_path / "given", "--output", tmp_path / "out", *words]
    assert said in refused(adapt.main, argv, capsys)
    assert not (tmp_path / "out").exists()


def test_places_that_hold_no_embeddings(tmp_path, capsys, arrays):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.npy").write_text("no array")
    np.save(tmp_path / "flat.npy", np.zeros(9, np.float32))
    rest = ["--output", tmp_path / "out"]
    for place, said in (("empty", "neither"), ("text.npy", "not a whole"), ("flat.npy", "[9]")):
        assert said in refused(adapt.main, ["--embeddings", tmp_path / place, *rest], capsys)
    bare = ["--embeddings", arrays / "embeddings.npy", *rest]
    assert "needs labels" in refused(adapt.main, [*bare, "--loss=supcon"], capsys)
    assert "needs labels" in refused(adapt.main, [*bare, "--split=classes"], capsys)
    run(*bare, "--epochs=0", "--dims=4")
    assert "exists" in refused(adapt.main, bare, capsys)


# ---------------------------------------------------------------- the programs behind it


@pytest.fixture(scope="module")
def made(tmp_path_factory, folder):
    """A model, its embeddings, an adapter, and embeddings and indexes behind it."""
    root = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    model = build(ModelSpec(arch="resnet10", num_classes=3, dims=(8, 16, 512)))
    model.classes = ["ant", "bee", "cat"]
    model.preprocessing = model.preprocessing.__class__(size=32)
    save_model(model.eval(), root / "m.safetensors")
    encoder = {"file": "m", "weights_sha256": trunk_sha256(model)}
    adapter = random_adapter(AdapterSpec(512, (8, 24), method="learnt", encoder=encoder), 3)
    save_adapter(root / "a.safetensors", adapter, {})
    at = ["--path", str(root / "m.safetensors"), "--data", str(folder / "train")]
    with_it = [f"--adapter={root / 'a.safetensors'}"]
    assert embed.main([*at, "--workers=1", "--output", str(root / "raw")]) == 0
    assert embed.main([*at, "--workers=1", "--output", str(root / "short"), *with_it]) == 0
    for name, source, more in (("of-raw", "raw", with_it), ("of-short", "short", [])):
        words = ["build", str(root / name), "--embeddings", str(root / source), "--map=none"]
        assert index.main([*words, *more]) == 0
    return root


def test_embeddings_and_indexes_are_behind_the_adapter(made):
    adapter = load_adapter(made / "a.safetensors")
    raw, short = open_embeddings(made / "raw"), open_embeddings(made / "short")
    np.testing.assert_allclose(short.X, adapter.apply_to(raw.X), atol=1e-5)
    model = short.meta["model"]
    assert model["dims"] == [8, 24]
    assert model["adapter"]["sha256"] == adapter.sha256()
    identity = adapted_sha256(raw.meta["model"]["weights_sha256"], adapter.sha256())
    assert model["weights_sha256"] == identity != raw.meta["model"]["weights_sha256"]
    for name in ("of-raw", "of-short"):
        found = Index(made / name)
        assert found.columns == 24
        assert found.model["weights_sha256"] == identity
        assert found.search(short.X[:5], k=1).ids[:, 0].tolist() == list(range(5))


def test_a_query_without_the_adapter_is_refused(made, capsys, tmp_path):
    words = ["--no-speed", "--threads=1", "--at=1", "--output"]
    for database in ("of-short", "short"):
        pair = ["--database", made / database, "--queries", made / "raw"]
        # The width differs; of the same width, the identity does.
        assert "dimensions" in refused(retrieve.main, [*pair, *words, tmp_path / "n"], capsys)
        adapted = [*pair, "--adapter", made / "a.safetensors", *words, tmp_path / database]
        assert retrieve.main([str(word) for word in adapted]) == 0
        ids = np.load(tmp_path / database / "ids.npy")
        assert ids[:, 0].tolist() == list(range(20)), "each finds itself"


def test_an_identity_without_the_adapter_is_refused_at_the_same_width(made, capsys, tmp_path):
    raw = open_embeddings(made / "raw")
    adapter = random_adapter(AdapterSpec(512, (8, 512)), 1)
    save_adapter(tmp_path / "wide", adapter, {})
    words = ["build", tmp_path / "i", "--embeddings", made / "raw", "--adapter", tmp_path / "wide"]
    assert index.main([*map(str, words), "--map=none"]) == 0
    pair = ["--database", tmp_path / "i", "--queries", made / "raw", "--output", tmp_path / "n"]
    assert "is not behind the adapter" in refused(retrieve.main, pair, capsys)
    more = ["add", tmp_path / "i", "--embeddings", made / "raw", "--prefix=x"]
    assert "is not behind the adapter" in refused(index.main, more, capsys)
    np.save(tmp_path / "q-X.npy", np.asarray(raw.X))
    pair[3] = tmp_path / "q-X.npy"
    assert retrieve.main([str(word) for word in [*pair, "--no-speed", "--at=1"]]) == 0
    assert "must be, too" in capsys.readouterr().out


def test_an_adapter_that_does_not_fit_is_refused(made, capsys, tmp_path):
    save_adapter(tmp_path / "narrow", random_adapter(AdapterSpec(16, (8,)), 0), {})
    other = AdapterSpec(512, (8,), encoder={"file": "x", "weights_sha256": "00" * 32})
    save_adapter(tmp_path / "other", random_adapter(other, 0), {})
    (tmp_path / "text").write_text("no adapter")
    at = ["--path", made / "m.safetensors", "--data", made, "--output", tmp_path / "e"]
    build_words = ["build", tmp_path / "i", "--embeddings", made / "raw"]
    export_words = ["--checkpoint", made / "m.safetensors", "--output_dir", tmp_path / "x"]
    said = {"narrow": "512", "other": "was fitted to embeddings of x", "text": "whole adapter"}
    for name, text in said.items():
        option = ["--adapter", tmp_path / name]
        for main, words in ((index.main, build_words), (export_models.main, export_words)):
            assert text in refused(main, [*words, *option], capsys)
    again = ["build", tmp_path / "i", "--embeddings", made / "short"]
    narrow = [*again, "--adapter", made / "a.safetensors"]
    assert "24" in refused(index.main, narrow, capsys)
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "i" / "index.json").exists()
    already = ["--embeddings", made / "short", "--output", tmp_path / "o"]
    assert "behind an adapter already" in refused(adapt.main, already, capsys)
    assert at[0] == "--path"


def test_a_query_image_goes_through_the_adapter(made, folder, photo):
    found = Index(made / "of-short")
    args = SimpleNamespace(
        model=None, adapter=None, index=str(made / "of-short"), threads=1, device="cpu"
    )
    model = serve.load(args, found)  # index and model name the files
    file = sorted((folder / "train" / "ant").glob("*.jpg"))[2]
    pixels = np.asarray(Image.open(file))
    vector = serve.encoder(model, found.preprocessing)(pixels)
    short = open_embeddings(made / "short")
    row = next(i for i in range(20) if short.ids[i] == "ant/2.jpg")
    np.testing.assert_allclose(vector, short.X[row], atol=1e-3)
    assert serve.classifier(model) is None, "the classifier sees other numbers"


def test_what_is_exported_is_behind_the_adapter(made):
    model, adapter = load_model(made / "m.safetensors"), load_adapter(made / "a.safetensors")
    plain = model(torch.zeros(2, 3, 32, 32)).detach()
    add_adapter(model, made / "a.safetensors", "the model")
    source = Deployed(model, 8)
    images = torch.randn(2, 3, 32, 32, generator=seeded(0))
    with torch.no_grad():
        embedding, logits = source(images)
        expected = adapter.apply_to(model.features(images).numpy())[:, :8]
    np.testing.assert_allclose(embedding, expected, atol=1e-5)
    assert logits.shape == plain.shape, "all prefixes of the model"
    assert torch.equal(model(torch.zeros(2, 3, 32, 32)), plain), "before the adapter"
    assert json.loads(source.metadata()["adapter"])["dims"] == [8]
    with pytest.raises(ExportError, match="not a prefix of the adapter, which has 8, 24"):
        Deployed(model, 16)


@pytest.mark.slow
def test_an_exported_file_has_the_adapter(made):
    import onnxruntime

    out = made / "exported"
    words = ["--checkpoint", made / "m.safetensors", "--adapter", made / "a.safetensors"]
    words += ["--format=onnx", "--output_dir", out, "--truncate-dim=8", "--no-latency"]
    assert export_models.main([*map(str, words), "--verify"]) == 0
    session = onnxruntime.InferenceSession(out / "resnet10_adapted_d8.onnx")
    model = load_model(made / "m.safetensors")
    adapter = load_adapter(made / "a.safetensors")
    images = torch.randn(3, 3, 32, 32)
    embedding, logits = session.run(None, {"input": images.numpy()})
    with torch.no_grad():
        expected = adapter.apply_to(model.features(images).numpy())[:, :8]
        np.testing.assert_allclose(np.asarray(embedding), expected, atol=1e-4)
        np.testing.assert_allclose(np.asarray(logits), model(images), atol=1e-3)
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["adapter"]) == {"sha256": adapter.sha256(), "dims": [8]}


def test_embeddings_of_matryoshka_name_their_encoder(tmp_path):
    rows, labels = hidden_classes(300)
    folder = write(tmp_path / "e", rows, labels)
    run("--embeddings", folder, "--output", tmp_path / "out", "--epochs=1", "--dims=4")
    adapter = load_adapter(tmp_path / "out/adapter.safetensors")
    assert adapter.spec.encoder is not None
    assert adapter.spec.encoder["weights_sha256"] == "ab" * 32
