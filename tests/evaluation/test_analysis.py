"""Analyses of predictions against plain loops over images, and the paper's recorded oracle."""

import math
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import minimize_scalar
from torchmetrics.functional.classification import multiclass_calibration_error

from matryoshka.evaluation import analysis

DIMS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
quick = settings(max_examples=60)
nothing = pytest.approx(float("nan"), nan_ok=True)


@st.composite
def scored(draw, groups=3, images=7, classes=5):
    """float [G, N, C]: drawn from few values, so that ties are common, or from many."""
    shape = [draw(st.integers(low, high)) for low, high in ((1, groups), (1, images), (2, classes))]
    few = st.sampled_from([-3.0, 0.0, 0.5, 2.0])
    many = st.floats(-80, 80, width=32, allow_subnormal=False)
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    return draw(hnp.arrays(dtype, tuple(shape), elements=draw(st.sampled_from([few, many]))))


@st.composite
def predicted(draw, classes=4):
    """(predictions int64 [G, N], labels int64 [N], C)."""
    g, n, c = draw(st.integers(1, 6)), draw(st.integers(1, 12)), draw(st.integers(2, classes))
    index = st.integers(0, c - 1)
    return (
        draw(hnp.arrays(np.int64, (g, n), elements=index)),
        draw(hnp.arrays(np.int64, n, elements=index)),
        c,
    )


def best(row):
    """Index of the largest value, the first of several."""
    return max(range(len(row)), key=lambda c: (row[c], -c))


def same(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)  # NaN equals NaN


# ---------------------------------------------------------------- confidence


@quick
@given(scored(), st.booleans(), st.sampled_from([None, 1, 2, 3, 1000]))
def test_top_confidence_equals_loops(scores, logits, chunk):
    more = {} if chunk is None else {"chunk": chunk}
    predictions, confidence = analysis.top_confidence(scores, logits=logits, **more)
    assert (predictions.dtype, confidence.dtype) == (np.int64, np.float32)
    assert predictions.shape == confidence.shape == scores.shape[:2], "expected [G, N]"
    for g, n in np.ndindex(scores.shape[:2]):
        row = [float(value) for value in scores[g, n]]
        assert predictions[g, n] == best(row), f"prefix {g}, image {n}: another prediction"
        share = 1 / sum(math.exp(value - max(row)) for value in row) if logits else max(row)
        assert confidence[g, n] == pytest.approx(share, rel=1e-5), (
            f"prefix {g}, image {n}: another confidence"
        )


def test_logits_are_the_default_and_large_ones_do_not_overflow():
    scores = np.array([[[10_000.0, 9_999.0], [-10_000.0, -10_000.0]]], np.float32)
    predictions, confidence = analysis.top_confidence(scores)
    assert predictions.tolist() == [[0, 0]], "ties go to the first class"
    np.testing.assert_allclose(confidence, [[1 / (1 + math.exp(-1)), 0.5]], rtol=1e-6)


@pytest.mark.parametrize("logits", [True, False])
def test_a_memory_map_is_read_in_parts(tmp_path, logits):
    scores = np.random.default_rng(0).normal(size=(4, 1000, 500)).astype(np.float32)  # 8 MB
    np.save(tmp_path / "scores.npy", scores)
    mapped = np.lib.format.open_memmap(tmp_path / "scores.npy", mode="r")
    expected = analysis.top_confidence(scores, logits=logits)
    analysis.top_confidence(mapped[:, :2], logits=logits, chunk=1)  # imports must not count
    tracemalloc.start()
    found = analysis.top_confidence(mapped, logits=logits, chunk=64)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < scores.nbytes / 4, f"{most} bytes allocated: the memory map was read as a whole"
    assert all(
        isinstance(array, np.ndarray) and not isinstance(array, np.memmap) for array in found
    )
    for array, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(array, other, rtol=1e-6)


@st.composite
def graded(draw):
    """(confidence [N], correct [N], bins). For powers of two, whose edges are exact, edges are
    common.
    """
    bins = draw(st.sampled_from([1, 2, 4, 8, 10, 15]))
    # the edges of 10 or 15 bins are rounded: values on an edge depend on the precision
    value = st.floats(2**-10, 1, width=32).filter(
        lambda v: v == 1 or abs(v * bins - round(v * bins)) > 1e-5
    )
    if bins in (1, 2, 4, 8):
        value = st.sampled_from([k / 8 for k in range(1, 9)]) | value
    n = draw(st.integers(1, 30))
    confidence = draw(
        hnp.arrays(draw(st.sampled_from([np.float32, np.float64])), n, elements=value)
    )
    return confidence, draw(hnp.arrays(bool, n)), bins


@quick
@given(graded())
def test_calibration_equals_loops(case):
    confidence, correct, bins = case
    found = analysis.calibration(confidence, correct, bins=bins)
    assert found.counts.dtype == np.int64
    members = [[] for _ in range(bins)]
    for value, right in zip(confidence.tolist(), correct.tolist(), strict=True):
        members[next(b for b in range(bins) if value <= (b + 1) / bins or b == bins - 1)].append(
            (value, right)
        )
    assert found.counts.tolist() == [len(inside) for inside in members], "other images in the bins"
    ece = 0.0
    for b, inside in enumerate(members):
        if not inside:
            assert math.isnan(found.confidence[b])
            assert math.isnan(found.accuracy[b])
            continue
        mean, share = (sum(column) / len(inside) for column in zip(*inside, strict=True))
        assert (found.confidence[b], found.accuracy[b]) == (
            pytest.approx(mean, rel=1e-5),
            pytest.approx(share),
        ), f"bin {b}: mean confidence or accuracy differs"
        ece += len(inside) / len(confidence) * abs(mean - share)
    assert found.ece == pytest.approx(ece, abs=1e-6), "ECE differs from the loop"


def test_calibration_has_15_bins_and_torchmetrics_error():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(700, 6)) * 2
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = rng.integers(0, 6, 700)
    found = analysis.calibration(shares.max(1), shares.argmax(1) == labels)
    theirs = multiclass_calibration_error(
        torch.tensor(shares), torch.tensor(labels), num_classes=6, n_bins=15, norm="l1"
    )
    assert len(found.counts) == 15, "expected 15 bins by default"
    assert found.counts.sum() == 700, "an image is missing or counted twice"
    assert found.ece == pytest.approx(float(theirs), abs=1e-5), "ECE differs from torchmetrics"
    assert found.ece > 0.1, "labels are independent of the logits: ECE must be large"


def nll(logits, labels, temperature):
    """Mean negative log-likelihood, image by image."""
    total = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        scaled = [value / temperature for value in row]
        total += (
            max(scaled) + math.log(sum(math.exp(v - max(scaled)) for v in scaled)) - scaled[label]
        )
    return total / len(labels)


@pytest.mark.parametrize("scale", [0.1, 0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_temperature_minimises_the_likelihood(scale, dtype):
    """Labels are drawn from softmax(clean), and the logits are scale x clean: the temperature is
    about the scale.
    """
    rng = np.random.default_rng(2)
    clean = rng.normal(size=(400, 4)) * 1.5
    shares = np.exp(clean) / np.exp(clean).sum(1, keepdims=True)
    labels = np.array([rng.choice(4, p=row) for row in shares])
    logits = (scale * clean).astype(dtype)
    found = analysis.fit_temperature(logits, labels)
    best_of_all = minimize_scalar(
        lambda log: nll(logits, labels, math.exp(log)),
        bounds=(-5, 5),
        method="bounded",
        options={"xatol": 1e-6},
    )
    assert isinstance(found, float)
    assert found == pytest.approx(math.exp(best_of_all.x), rel=5e-3), (
        "temperature differs from SciPy's minimum"
    )
    assert found == pytest.approx(scale, rel=0.35), (
        "temperature is far from the scale of the logits"
    )
    assert nll(logits, labels, found) <= best_of_all.fun + 1e-6, (
        "likelihood is worse than SciPy's minimum"
    )
    grid = [nll(logits, labels, found * factor) for factor in (0.5, 0.9, 0.98, 1.02, 1.1, 2)]
    assert min(grid) > nll(logits, labels, found) - 1e-9, "a nearby temperature is better"


@pytest.mark.parametrize("labels", [[0, 1, 0], [1, 0, 1], [0, 0, 0]])
def test_a_temperature_is_positive_for_all_labels(labels):
    """All right, all wrong (no finite optimum), and one image of each kind."""
    logits, labels = np.array([[2.0, 0.0], [0.0, 1.0], [0.5, 0.0]]), np.array(labels)
    found = analysis.fit_temperature(logits, labels)
    assert found > 0, "temperature must be positive"
    assert nll(logits, labels, found) <= nll(logits, labels, 1.0) + 1e-9, (
        "worse than no temperature"
    )
    assert analysis.fit_temperature(logits[:1], labels[:1]) > 0, (
        "temperature of one image must be positive"
    )


# ---------------------------------------------------------------- prefixes


def oracle_by_loops(predictions, labels, dims):
    g, n = predictions.shape
    first, hits, most = [], 0, 0
    for i in range(n):
        votes = [int(predictions[k, i]) for k in range(g)]
        first.append(next((k for k in range(g) if votes[k] == labels[i]), g))
        hits += first[-1] < g
        highest = max(votes.count(v) for v in votes)
        tied = [v for v in votes if votes.count(v) == highest]
        most += tied[-1] == labels[i]  # the last prefix that votes for one of them
    expected = sum(dims[min(k, g - 1)] for k in first) / n
    return first, [first.count(k) / n for k in range(g + 1)], hits / n, expected, most / n


@quick
@given(predicted())
def test_oracle_equals_loops(case):
    predictions, labels, _ = case
    dims = DIMS[: len(predictions)]
    found = analysis.oracle(predictions, labels, dims)
    first, shares, accuracy, expected, majority = oracle_by_loops(predictions, labels, dims)
    assert found.first.dtype == np.int64
    assert found.first.tolist() == first, "first right prefix differs from the loop"
    same(found.shares, shares)
    assert found.accuracy == pytest.approx(accuracy), "oracle accuracy differs from the loop"
    assert found.expected_dim == pytest.approx(expected), "expected dim differs from the loop"
    assert found.majority_accuracy == pytest.approx(majority), "majority vote differs from the loop"


@pytest.mark.parametrize(
    ("votes", "winner"),
    [
        ([0, 1], 1),
        ([1, 0], 0),
        ([0, 0, 1], 0),
        ([0, 1, 2], 2),
        ([0, 1, 1, 0, 2], 0),
        ([3, 3, 0, 0, 1, 1], 1),
    ],
)
def test_the_longest_prefix_decides_between_majorities(votes, winner):
    column = np.array(votes)[:, None]
    for label in range(4):
        found = analysis.oracle(column, np.array([label]), DIMS[: len(votes)])
        assert found.majority_accuracy == (label == winner), label


# output of model_analysis/Oracle_Upper_Bound_Performance.ipynb, ImageNet's 50,000 validation images
RECORDED = {
    "shares": [67.462, 8.782, 2.588, 1.358, 0.642, 0.318, 0.204, 0.128, 18.518],
    "accuracy": 81.542,
    "expected_dim": 391.73904,
    "majority": 76.77,
}


def test_the_papers_oracle():
    """Predictions with the recorded shares; the accuracy splits the last one, 2048 or never."""
    n, rng = 50_000, np.random.default_rng(3)
    counts = [round(n * share / 100) for share in RECORDED["shares"]]
    never = n - round(n * RECORDED["accuracy"] / 100)
    counts = [*counts[:-1], counts[-1] - never, never]
    assert sum(counts) == n, "the recorded shares do not add up"
    assert counts[-2] == 30, "expected 30 images that only the longest prefix has right"
    first = rng.permutation(np.repeat(np.arange(10), counts))
    labels = rng.integers(0, 1000, n)
    wrong = (labels + 1) % 1000
    right = np.zeros((9, n), bool)
    for g in range(9):
        right[g] = first == g
    wanted = round(
        n * RECORDED["majority"] / 100
    )  # as many images of those that are right early stay right later on
    settled = np.argsort(first, kind="stable")[:wanted]
    right[:, settled] |= np.arange(9)[:, None] >= first[settled]
    found = analysis.oracle(np.where(right, labels, wrong), labels, DIMS)
    np.testing.assert_array_equal(found.first, first)
    np.testing.assert_allclose(100 * found.shares[:8], RECORDED["shares"][:8], atol=1e-9)
    assert 100 * (found.shares[8] + found.shares[9]) == pytest.approx(RECORDED["shares"][8]), (
        "share of 2048 and never differs from the paper's"
    )
    assert 100 * found.accuracy == pytest.approx(RECORDED["accuracy"]), (
        "oracle accuracy differs from the paper's"
    )
    assert found.expected_dim == pytest.approx(RECORDED["expected_dim"], abs=1e-6), (
        "expected dim differs from the paper's"
    )
    assert 100 * found.majority_accuracy == pytest.approx(RECORDED["majority"], abs=5e-3), (
        "majority accuracy differs from the paper's"
    )


@quick
@given(predicted())
def test_class_accuracy_and_agreement_equal_loops(case):
    predictions, labels, c = case
    g, n = predictions.shape
    found = analysis.class_accuracy(predictions, labels, c)
    assert found.shape == (g, c), "expected [G, C]"
    for k in range(g):
        for label in range(c):
            hits = [predictions[k, i] == label for i in range(n) if labels[i] == label]
            assert found[k, label] == (pytest.approx(sum(hits) / len(hits)) if hits else nothing), (
                f"prefix {k}, class {label}: accuracy differs"
            )
    agree = [
        [sum(predictions[a, i] == predictions[b, i] for i in range(n)) / n for b in range(g)]
        for a in range(g)
    ]
    same(analysis.agreement(predictions), agree)


def trend_by_loops(values):
    if any(math.isnan(v) for v in values):
        return "absent"
    steps = [b - a for a, b in pairwise(values) if b != a]
    runs = []
    for step in steps:
        if not runs or runs[-1] != (step > 0):
            runs.append(step > 0)
    kinds = {
        (): "flat",
        (True,): "rising",
        (False,): "falling",
        (True, False): "rise-dip",
        (False, True): "dip-rise",
    }
    return kinds.get(tuple(runs), "mixed")


@quick
@given(
    st.tuples(st.integers(1, 7), st.integers(1, 6)).flatmap(
        lambda shape: hnp.arrays(float, shape, elements=st.sampled_from([0.0, 0.25, 0.5, 1.0]))
    ),
    st.data(),
)
def test_trends_equal_loops(accuracy, data):
    for c in range(accuracy.shape[1]):
        if data.draw(st.integers(0, 5)) == 0:
            accuracy[:, c] = np.nan
    assert list(analysis.trends(accuracy)) == [
        trend_by_loops(column) for column in accuracy.T.tolist()
    ]


def test_every_trend():
    examples = {
        "flat": [0.5, 0.5, 0.5, 0.5],
        "rising": [0.1, 0.1, 0.2, 0.3],
        "falling": [0.4, 0.4, 0.1, 0.1],
        "rise-dip": [0.1, 0.5, 0.5, 0.3],
        "dip-rise": [0.5, 0.1, 0.1, 0.3],
        "mixed": [0.1, 0.5, 0.1, 0.5],
        "absent": [np.nan] * 4,
    }
    assert list(analysis.trends(np.array(list(examples.values())).T)) == list(examples)


# ---------------------------------------------------------------- superclasses


@st.composite
def grouped(draw):
    """(scores [N, C], labels [N], groups [C], K): groups without images or classes too."""
    scores = draw(scored(groups=1))[0]
    n, c = scores.shape
    k = draw(st.integers(1, 4))
    labels = draw(hnp.arrays(np.int64, n, elements=st.integers(0, c - 1)))
    return scores, labels, draw(hnp.arrays(np.int64, c, elements=st.integers(0, k - 1))), k


@quick
@given(grouped())
def test_superclasses_equal_loops(case):
    scores, labels, groups, k = case
    predictions = np.array([best(row) for row in scores.tolist()])
    confusion = [[0] * k for _ in range(k)]
    hits = [[] for _ in range(k)]
    for row, prediction, label in zip(
        scores.tolist(), predictions.tolist(), labels.tolist(), strict=True
    ):
        own = groups[label]
        confusion[own][groups[prediction]] += 1
        inside = [c for c in range(len(groups)) if groups[c] == own]
        hits[own].append(inside[best([row[c] for c in inside])] == label)
    found = analysis.superclass_confusion(predictions, labels, groups, k)
    assert found.dtype == np.int64
    assert found.tolist() == confusion, "confusion differs from the loop"
    within = analysis.within_superclass(scores, labels, groups, k)
    same(within, [sum(h) / len(h) if h else np.nan for h in hits])


def test_rows_are_true_groups():
    groups = np.array([0, 0, 1])
    found = analysis.superclass_confusion(np.array([2, 2, 1]), np.array([0, 1, 0]), groups, 2)
    assert found.tolist() == [[1, 2], [0, 0]], "rows must be true groups"
