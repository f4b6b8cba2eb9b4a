"""Cascades over widths against loops over images; the choice against trying everything."""

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from matryoshka.inference import analyze

from matryoshka.evaluation import width_cascade
from matryoshka.evaluation.analysis import entropy_confidence
from matryoshka.evaluation.width_cascade import (
    Candidate,
    certify_widths,
    choose,
    frontier,
    measure,
)

quick = settings(max_examples=50)


@st.composite
def measured_widths(draw, images=10):
    """(confidence [G, N], correct [G, N], macs [G]); few different confidences, for ties."""
    shape = draw(st.integers(1, 4)), draw(st.integers(1, images))
    confidence = draw(hnp.arrays(np.float32, shape, elements=st.sampled_from([0.25, 0.5, 0.75, 1])))
    correct = draw(hnp.arrays(bool, shape))
    steps = draw(st.lists(st.integers(1, 9), min_size=shape[0], max_size=shape[0]))
    return confidence, correct, list(itertools.accumulate(steps))


def by_loop(confidence, correct, thresholds, macs):
    """(accuracy, shares, mean multiply-adds): image by image, width by width."""
    count, images = confidence.shape
    hits, spent, answered = 0, 0, [0] * count
    for i in range(images):
        for g in range(count):
            is_last = g == count - 1
            if not is_last and thresholds[g] == math.inf:
                continue  # not asked
            spent += macs[g]
            if is_last or confidence[g, i] > thresholds[g]:
                answered[g] += 1
                hits += bool(correct[g, i])
                break
    return hits / images, [n / images for n in answered], spent / images


@quick
@given(
    data=measured_widths(), choice=st.lists(st.sampled_from([0.1, 0.5, 0.8, math.inf]), min_size=3)
)
def test_a_cascade_against_the_loop(data, choice):
    confidence, correct, macs = data
    thresholds = np.array(choice[: len(confidence) - 1], float)
    thresholds = np.resize(thresholds, len(confidence) - 1) if len(thresholds) else thresholds
    found = measure(confidence, correct, thresholds, macs)
    accuracy, shares, cost = by_loop(confidence, correct, thresholds, macs)
    assert found.accuracy == pytest.approx(accuracy)
    assert found.shares == pytest.approx(shares)
    assert found.macs == pytest.approx(cost)
    assert found.right.mean() == pytest.approx(accuracy)


@quick
@given(data=measured_widths(), epsilon=st.sampled_from([0.0, 0.1, 0.3, 1.0]))
def test_the_choice_against_trying_everything(data, epsilon):
    confidence, correct, macs = data
    count = len(confidence)
    grid = sorted(set(confidence[:-1].ravel().tolist())) or [math.inf]
    tried = []
    for size in range(count):
        for widths in itertools.combinations(range(count - 1), size):
            for threshold in grid:
                limits = [threshold if g in widths else math.inf for g in range(count - 1)]
                accuracy, _, cost = by_loop(confidence, correct, limits, macs)
                tried.append((accuracy, cost))
    full = correct[-1].mean()
    cheapest = min(cost for accuracy, cost in tried if accuracy >= full - epsilon - 1e-9)

    best = frontier(confidence, correct, macs)
    for candidate in best:
        accuracy, _, cost = by_loop(confidence, correct, candidate.thresholds, macs)
        assert (candidate.accuracy, candidate.macs) == pytest.approx((accuracy, cost))
        beaten = [a for a, c in tried if c < cost - 1e-9 and a >= accuracy]
        assert not beaten, "a cheaper cascade is as accurate"
    assert best[-1].accuracy == pytest.approx(max(accuracy for accuracy, _ in tried))
    chosen = choose(best, float(full), epsilon)
    cost = macs[-1] if chosen is None else chosen.macs
    assert cost == pytest.approx(cheapest)


def test_few_stages_of_many_widths():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(size=(8, 50))
    correct = rng.uniform(size=(8, 50)) < 0.7
    best = frontier(confidence, correct, [2**g for g in range(8)])
    asked = [np.isfinite(candidate.thresholds).sum() + 1 for candidate in best]
    assert 1 < max(asked) <= width_cascade.MAX_STAGES


def test_the_widest_alone_is_no_cascade():
    alone = Candidate(np.array([math.inf]), 0.8, 10.0)
    assert choose([alone], 0.8, 0.01) is None
    assert choose([], 0.8, 0.01) is None


def simulated(rng, images):
    """Four widths, better and surer of what they know as they grow; 20, 60, 80 and 82 % right."""
    difficulty = rng.uniform(size=images)
    limits = np.array([0.2, 0.6, 0.8, 0.82])[:, None]
    correct = difficulty < limits
    confidence = np.clip(limits - difficulty + rng.normal(0, 0.05, (4, images)), -1, 1)
    return confidence, correct


MACS = [1, 4, 16, 64]


def test_a_certificate_holds_on_new_images_and_saves_cost():
    rng = np.random.default_rng(1)
    losses, costs = [], []
    for seed in range(20):
        confidence, correct = simulated(rng, 2000)
        found = certify_widths(confidence, correct, MACS, epsilon=0.02, delta=0.1, seed=seed)
        assert found.certified == bool(np.isfinite(found.thresholds).any())
        assert found.loss_bound <= 0.02
        new_confidence, new_correct = simulated(rng, 20000)
        measured = measure(new_confidence, new_correct, found.thresholds, MACS)
        losses.append(new_correct[-1].mean() - measured.accuracy)
        costs.append(measured.macs)
    assert np.mean(np.array(losses) > 0.02) <= 0.2, "a guarantee of 90 % is broken too often"
    assert np.mean(costs) < 0.6 * MACS[-1]


def test_nothing_is_certified_from_few_images():
    confidence, correct = simulated(np.random.default_rng(2), 20)
    found = certify_widths(confidence, correct, MACS, epsilon=0.001)
    assert not found.certified
    assert np.isinf(found.thresholds).all()


# ---------------------------------------------------------------- entropy


@quick
@given(
    scores=hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5)),
        elements=st.floats(-30, 30, width=32),
    ),
    are_logits=st.booleans(),
)
def test_entropy_against_its_formula(scores, are_logits):
    given_scores = scores
    if not are_logits:
        exact = np.exp(scores.astype(float) - scores.max(2, keepdims=True))
        given_scores = (exact / exact.sum(2, keepdims=True)).astype(np.float32)
    found = entropy_confidence(given_scores, logits=are_logits, chunk=2)
    for g, n in itertools.product(*map(range, scores.shape[:2])):
        row = [float(score) for score in scores[g, n]]
        total = sum(math.exp(score - max(row)) for score in row)
        entropy = 0.0
        for score in row:
            p = math.exp(score - max(row)) / total
            entropy -= p * math.log(p) if p > 0 else 0.0
        expected = 1 - entropy / math.log(len(row)) if len(row) > 1 else 1.0
        assert found[g, n] == pytest.approx(expected, abs=1e-4)


# ---------------------------------------------------------------- the program

DIMS = [4, 8, 16]
PROGRAM_MACS = [100, 400, 1600]
CLASSES = 5


def write_results(folder, seed, *, images=400, **changes):
    """A results.json with arrays of three widths, as eval writes them; returns its arrays, too."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, images)
    logits = rng.standard_normal((3, images, CLASSES)).astype(np.float32)
    for g, strength in enumerate((1.5, 2.5, 3.0)):
        logits[g, np.arange(images), labels] += strength + rng.standard_normal(images)
    np.save(folder / "logits.npy", logits)
    np.save(folder / "gt.npy", labels)
    results = {
        "prefixes": {str(d): {"top1": 0.0} for d in DIMS},
        "checkpoint": "family.safetensors",
        "data": f"{folder.name}.beton",
        "arrays": {"logits": "logits.npy", "gt": "gt.npy"},
        "macs": dict(zip(map(str, DIMS), PROGRAM_MACS, strict=True)),
        "one_pass": False,
        **changes,
    }
    (folder / "results.json").write_text(json.dumps(results))
    return logits, labels


def refused(options, capsys):
    """The one line with which the program ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        analyze.main(options)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def analysed(*argv, output):
    assert analyze.main([*map(str, argv), "--only=widths", f"--output={output}"]) == 0
    return json.loads(output.read_text())["widths"]


def confidence_and_hits(logits, labels, kind):
    p = np.exp(logits.astype(float) - logits.max(2, keepdims=True))
    p /= p.sum(2, keepdims=True)
    sure = p.max(2) if kind == "softmax" else 1 + (p * np.log(p)).sum(2) / np.log(CLASSES)
    return sure, logits.argmax(2) == labels


@pytest.mark.parametrize("confidence", ["softmax", "entropy"])
def test_thresholds_of_validation_images_are_measured_on_the_test(tmp_path, capsys, confidence):
    validation = write_results(tmp_path / "val", 1)
    arrays = write_results(tmp_path / "test", 2, images=300)
    found = analysed(
        f"--results={tmp_path / 'test/results.json'}",
        f"--validation={tmp_path / 'val/results.json'}",
        f"--confidence={confidence}",
        "--epsilon=1,5",
        output=tmp_path / "a.json",
    )
    assert (found["learn_images"], found["test_images"]) == (400, 300)
    assert found["macs"] == dict(zip(map(str, DIMS), PROGRAM_MACS, strict=True))
    sure, correct = confidence_and_hits(*arrays, confidence)
    rows = [*found["rows"], *found["chosen"], *found["certified"]]
    assert len(rows) > 6
    for row in rows:
        limits = [math.inf if t is None else t for t in row["thresholds"].values()]
        accuracy, shares, cost = by_loop(sure, correct, limits, PROGRAM_MACS)
        # A confidence may equal a threshold up to rounding: one image in 300.
        assert row["top1"] == pytest.approx(100 * accuracy, abs=0.4)
        assert list(row["shares"].values()) == pytest.approx([100 * s for s in shares], abs=0.4)
        assert row["macs"] == pytest.approx(cost, abs=10)
        assert row["macs_share"] == pytest.approx(100 * row["macs"] / 1600, abs=0.1)
        assert row["loss"] == pytest.approx(100 * correct[-1].mean() - row["top1"], abs=1e-2)
    costs = [row["macs"] for row in found["rows"]]
    assert costs[0] < 110, "the cheapest cascade asks the smallest width alone, or nearly"
    sure, correct = confidence_and_hits(*validation, confidence)
    for row in found["chosen"]:
        limits = [math.inf if t is None else t for t in row["thresholds"].values()]
        accuracy, _, _ = by_loop(sure, correct, limits, PROGRAM_MACS)
        assert 100 * accuracy >= 100 * correct[-1].mean() - row["epsilon"] - 0.3
    shown = capsys.readouterr().out
    assert f"thresholds from 400 images ({tmp_path / 'val/results.json'}), measured on 300" in shown
    assert "at most 1 points lost on the images of the thresholds" in shown
    assert "certified at 95 %" in shown


def test_without_validation_a_share_of_the_images_is_for_the_thresholds(tmp_path):
    write_results(tmp_path / "test", 3)
    found = analysed(
        f"--results={tmp_path / 'test/results.json'}", "--learn=0.25", output=tmp_path / "a.json"
    )
    assert (found["learn_images"], found["test_images"]) == (100, 300)
    assert found["validation"] is None


def test_costs_of_arrays_are_an_option(tmp_path):
    write_results(tmp_path / "test", 4)
    arrays = [
        f"--logits={tmp_path / 'test/logits.npy'}",
        f"--gt={tmp_path / 'test/gt.npy'}",
        "--dims=4,8,16",
    ]
    found = analysed(*arrays, "--macs=1,2,3", output=tmp_path / "a.json")
    assert found["macs"] == {"4": 1, "8": 2, "16": 3}


def test_prefixes_of_one_trunk_have_no_such_cascade(tmp_path, capsys):
    write_results(tmp_path / "test", 5, one_pass=True)
    file = tmp_path / "test/results.json"
    assert analyze.main([f"--results={file}", "--splits=1"]) == 0
    assert "widths" not in json.loads((tmp_path / "test/analysis.json").read_text())
    assert "widths" not in capsys.readouterr().out
    line = refused([f"--results={file}", "--only=widths"], capsys)
    assert "is for a family of widths" in line


MISTAKES = {
    "same data": ({"data": "test.beton"}, "is of the same images, test.beton"),
    "another model": ({"checkpoint": "other.pt"}, "is of another model, other.pt"),
    "damaged": ({"macs": {"4": -1}}, "damaged: macs must hold"),
    "other widths": ({"prefixes": {"4": {}, "8": {}, "32": {}}, "one_pass": True}, "has widths"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_validation_must_be_of_the_same_model_on_other_images(tmp_path, capsys, name):
    changes, message = MISTAKES[name]
    write_results(tmp_path / "val", 1, **changes)
    write_results(tmp_path / "test", 2)
    options = [
        f"--{part}={tmp_path / folder / 'results.json'}"
        for part, folder in (("results", "test"), ("validation", "val"))
    ]
    assert message in refused(options, capsys)
    assert not (tmp_path / "test/analysis.json").exists()


def test_options_that_do_not_fit(tmp_path, capsys):
    write_results(tmp_path / "one", 1, one_pass=True)
    write_results(tmp_path / "test", 2)
    one, test = (f"{tmp_path / name / 'results.json'}" for name in ("one", "test"))
    for options, message in (
        ([f"--results={one}", f"--validation={test}"], "is for the analysis `widths`"),
        ([f"--results={test}", f"--validation={one}", "--only=oracle"], "is for the analysis"),
        ([f"--results={test}", "--macs=1,2,3"], "drop --macs"),
        (
            [
                f"--logits={tmp_path / 'test/logits.npy'}",
                f"--gt={tmp_path / 'test/gt.npy'}",
                "--dims=4,8,16",
                "--macs=1,2",
            ],
            "--macs names 2 costs, --dims 3 widths",
        ),
    ):
        assert message in refused(options, capsys)
