"""Cascades against plain loops over images and the paper's tables; guarantees by simulation."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from matryoshka.evaluation import cascade

DIMS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
quick = settings(max_examples=60)


@st.composite
def measured(draw, images=12):
    """(confidence [G, N], correct [G, N]); many confidences equal a threshold of the grid."""
    shape = draw(st.integers(1, 5)), draw(st.integers(1, images))
    value = draw(
        st.sampled_from([st.sampled_from(list(cascade.GRID[::9])), st.floats(2**-10, 1, width=32)])
    )
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    return draw(hnp.arrays(float, shape, elements=value)).astype(dtype), draw(
        hnp.arrays(bool, shape)
    )


# ---------------------------------------------------------------- oracles


def thresholds_by_loops(confidence, correct, grid):
    found = []
    for g in range(len(confidence) - 1):
        hits = []
        for t in grid:
            chosen = [
                g if float(confidence[g, i]) > float(t) else g + 1
                for i in range(confidence.shape[1])
            ]
            hits.append(sum(bool(correct[k, i]) for i, k in enumerate(chosen)))
        found.append(
            float(grid[hits.index(max(hits))])
        )  # the grid ascends: the smallest of the best
    return found


def exits_by_loops(confidence, thresholds):
    g, n = confidence.shape
    return [
        next((k for k in range(g - 1) if float(confidence[k, i]) > float(thresholds[k])), g - 1)
        for i in range(n)
    ]


def evaluated_by_loops(exits, correct, dims):
    """(accuracy, expected_dim, cumulative_dim), one of each for every cap."""
    n, rows = len(exits), []
    for cap in range(len(dims)):
        at = [min(k, cap) for k in exits]
        rows.append(
            (
                sum(bool(correct[k, i]) for i, k in enumerate(at)) / n,
                sum(dims[k] for k in at) / n,
                sum(sum(dims[: k + 1]) for k in at) / n,
            )
        )
    return [list(column) for column in zip(*rows, strict=True)]


def assert_evaluated(found, expected):
    for name, values in zip(("accuracy", "expected_dim", "cumulative_dim"), expected, strict=True):
        np.testing.assert_allclose(getattr(found, name), values, rtol=1e-12, err_msg=name)


# ---------------------------------------------------------------- thresholds and exits


def test_the_grid_is_the_papers():
    np.testing.assert_array_equal(cascade.GRID, np.linspace(0.1, 1, 100))


@quick
@given(measured(), st.booleans())
def test_thresholds_equal_loops(case, own_grid):
    confidence, correct = case
    grid = np.array([0.0, 0.3, 0.55, 0.8]) if own_grid else cascade.GRID
    found = (
        cascade.learn_thresholds(confidence, correct, grid)
        if own_grid
        else cascade.learn_thresholds(*case)
    )
    assert found.shape == (len(confidence) - 1,), "expected [G-1]"
    assert found.tolist() == thresholds_by_loops(confidence, correct, grid), (
        "thresholds differ from the loop"
    )


def test_thresholds_of_many_images_equal_loops():
    rng = np.random.default_rng(0)
    correct = rng.random((4, 300)) < np.array([0.5, 0.6, 0.7, 0.75])[:, None]
    confidence = np.clip(0.35 + 0.3 * correct + rng.normal(0, 0.15, correct.shape), 0.01, 1)
    found = cascade.learn_thresholds(confidence, correct)
    assert found.tolist() == thresholds_by_loops(confidence, correct, cascade.GRID), (
        "thresholds differ from the loop"
    )
    assert len(set(found)) > 1, "all thresholds are equal: the test is vacuous"
    assert all(0.1 < t < 1 for t in found), (
        "a threshold is at an end of the grid: the test is vacuous"
    )


@quick
@given(measured(), st.data())
def test_exits_equal_loops(case, data):
    confidence = case[0]
    values = st.sampled_from([*cascade.GRID[::9], math.inf, -math.inf]) | st.floats(0, 1)
    thresholds = data.draw(hnp.arrays(float, len(confidence) - 1, elements=values))
    found = cascade.exits(confidence, thresholds)
    assert found.dtype == np.int64
    assert found.tolist() == exits_by_loops(confidence, thresholds), "exits differ from the loop"


@quick
@given(measured(), st.data())
def test_evaluation_equals_loops(case, data):
    correct = case[1]
    g, n = correct.shape
    exits = data.draw(hnp.arrays(np.int64, n, elements=st.integers(0, g - 1)))
    dims = sorted(data.draw(st.lists(st.integers(1, 3000), min_size=g, max_size=g, unique=True)))
    assert_evaluated(
        cascade.evaluate(exits, correct, dims), evaluated_by_loops(exits.tolist(), correct, dims)
    )


# output of model_analysis/Model_Cascades.ipynb: means over 30 splits of 40,000 images, caps 16 to
# 2048
RECORDED = {
    "expected_dim": [
        13.18502,
        18.02794,
        25.73146,
        35.28671333,
        45.66122,
        62.05503333,
        87.92042,
        121.67231333,
    ],
    "accuracy": [
        0.73790917,
        0.75242666,
        0.76048249,
        0.76273834,
        0.76418666,
        0.76514667,
        0.76533666,
        0.76541667,
    ],
    "thresholds": [
        0.78636364,
        0.70939394,
        0.7930303,
        0.65151515,
        0.55333333,
        0.55636364,
        0.52212121,
        0.44484848,
    ],
}


def test_the_papers_cascade():
    """The table determines its 30 x 40,000 exits and hits; these must reproduce every row."""
    n = 30 * 40_000
    means = [DIMS[0], *RECORDED["expected_dim"]]
    beyond = [n]  # images that reach a prefix
    for (low, high), (d, e) in zip(
        itertools.pairwise(means), itertools.pairwise(DIMS), strict=True
    ):
        count = (high - low) / (e - d) * n
        assert count == pytest.approx(round(count), abs=0.05), (
            f"{count} images is not a whole number"
        )
        beyond.append(round(count))
    leaving = [a - b for a, b in itertools.pairwise([*beyond, 0])]
    assert min(leaving) > 0, "no image exits at some prefix"
    where = np.repeat(np.arange(9), leaving)
    rng = np.random.default_rng(1)
    confidence = np.empty((9, n))
    correct = np.zeros((9, n), bool)
    wanted = [round(a * n) for a in RECORDED["accuracy"]]  # right with a cap at prefix 1, 2, ...
    settled = round(0.95 * leaving[0])  # at prefix 8, about which the table is silent
    correct[0, :settled] = True
    for g in range(1, 9):
        start = (
            n - beyond[g]
        )  # images in the order in which they leave: those that come to g begin here
        right = wanted[g - 1] - settled
        assert 0 <= right <= beyond[g], f"prefix {g}: the table is inconsistent"
        here = min(
            leaving[g], right if g == 8 else round(min(0.9, 1.25 * right / beyond[g]) * leaving[g])
        )
        assert 0 <= right - here <= beyond[g] - leaving[g], f"prefix {g}: the table is inconsistent"
        correct[g, start : start + here] = True
        correct[g, start + leaving[g] : start + leaving[g] + right - here] = True
        settled += here
    for g, t in enumerate(RECORDED["thresholds"]):
        confidence[g] = np.where(
            where > g, t, np.nextafter(t, 1)
        )  # at the threshold an image continues
    confidence[8] = rng.random(n)
    exits = cascade.exits(confidence, np.array(RECORDED["thresholds"]))
    np.testing.assert_array_equal(exits, where)
    found = cascade.evaluate(exits, correct, DIMS)
    np.testing.assert_allclose(found.expected_dim[1:], RECORDED["expected_dim"], atol=5e-8)
    np.testing.assert_allclose(found.accuracy[1:], RECORDED["accuracy"], atol=5e-8)
    assert found.expected_dim[0] == found.cumulative_dim[0] == 8, (
        "a cascade of one prefix has its length"
    )
    # the paper's section 4.2.1: about 37 dimensions for 76.30 %, 62 where every prefix on the way
    # counts
    assert found.cumulative_dim[4] == pytest.approx(62.5, abs=0.5), (
        "cumulative dim differs from the paper's"
    )


# ---------------------------------------------------------------- splits


@quick
@given(st.integers(2, 60), st.integers(1, 8), st.integers(0, 2**31), st.data())
def test_splits_are_partitions(n, splits, seed, data):
    learn = data.draw(st.integers(1, n - 1))
    found = cascade.split_indices(n, splits, learn, seed)
    assert len(found) == splits, "number of splits"
    for own, rest in found:
        assert len(own) == learn, "number of images to learn from"
        assert sorted([*own.tolist(), *rest.tolist()]) == list(range(n)), (
            "a split is not a partition"
        )
    for (a, b), (c, d) in zip(found, cascade.split_indices(n, splits, learn, seed), strict=True):
        assert np.array_equal(a, c), "the same seed gives another split"
        assert np.array_equal(b, d), "the same seed gives another split"


def test_splits_differ_and_reach_every_image():
    def chosen(seed):
        return [frozenset(own.tolist()) for own, _ in cascade.split_indices(100, 30, 20, seed)]

    assert len({*chosen(0), *chosen(1)}) == 60, "two splits are equal"
    counts = np.bincount([i for own in chosen(0) for i in own], minlength=100)
    # 6 expected of each; some image is in no split for 12 % of the seeds, not for this one
    assert counts.min() > 0, "an image is in no split"
    assert counts.max() < 18, "an image is in most splits"
    assert cascade.split_indices(100, 3, 20, 0)[1][0].tolist() != list(range(20))


@pytest.mark.parametrize("options", [{}, {"splits": 4, "learn": 0.5, "seed": 3}])
def test_the_cascade_is_learned_on_one_part_and_tested_on_the_other(options):
    rng = np.random.default_rng(2)
    correct = rng.random((3, 50)) < np.array([0.5, 0.6, 0.8])[:, None]
    confidence = np.clip(0.3 + 0.4 * correct + rng.normal(0, 0.2, correct.shape), 0.01, 1)
    dims = (8, 24, 100)
    found = cascade.cascade(confidence, correct, dims, **options)
    given_options = {"splits": 30, "learn": 0.2, "seed": 0} | options
    splits, learn = given_options["splits"], round(50 * given_options["learn"])
    assert found.thresholds.shape == (splits, 2), "shape of the thresholds"
    parts = cascade.split_indices(50, splits, learn, given_options["seed"])
    for s, (own, rest) in enumerate(parts):
        thresholds = thresholds_by_loops(confidence[:, own], correct[:, own], cascade.GRID)
        assert found.thresholds[s].tolist() == thresholds, (
            f"split {s}: thresholds differ from the loop"
        )
        expected = evaluated_by_loops(
            exits_by_loops(confidence[:, rest], thresholds), correct[:, rest], dims
        )
        for name, values in zip(
            ("accuracy", "expected_dim", "cumulative_dim"), expected, strict=True
        ):
            np.testing.assert_allclose(getattr(found, name)[s], values, rtol=1e-12)
    assert len({tuple(row) for row in found.expected_dim.tolist()}) > 1, (
        "all splits are equal: the test is vacuous"
    )


# ---------------------------------------------------------------- guarantees


@quick
@given(st.integers(1, 400), st.floats(0.001, 0.4), st.data())
def test_bounds_solve_the_binomial_tail(n, alpha, data):
    k = data.draw(st.integers(0, n))
    upper, lower = (
        cascade.clopper_pearson(k, n, alpha, True),
        cascade.clopper_pearson(k, n, alpha, False),
    )
    assert 0 <= lower <= k / n <= upper <= 1, f"{k} of {n}: bounds are out of order"

    def tail(p, counts):
        return (
            math.fsum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in counts)
            if n < 60
            else None
        )

    assert upper == pytest.approx(
        1 if k == n else stats.beta.ppf(1 - alpha, k + 1, n - k), abs=1e-9
    ), f"{k} of {n}: upper bound differs from SciPy"
    assert lower == pytest.approx(0 if k == 0 else stats.beta.ppf(alpha, k, n - k + 1), abs=1e-9), (
        f"{k} of {n}: lower bound differs from SciPy"
    )
    if n < 60 and 0 < k < n:
        assert tail(upper, range(k + 1)) == pytest.approx(alpha, rel=1e-6), (
            f"{k} of {n}: upper bound does not solve the binomial tail"
        )
        assert tail(lower, range(k, n + 1)) == pytest.approx(alpha, rel=1e-6), (
            f"{k} of {n}: lower bound does not solve the binomial tail"
        )
    interval = stats.binomtest(k, n).proportion_ci(1 - 2 * alpha, method="exact")
    assert (lower, upper) == (
        pytest.approx(interval.low, abs=1e-6),
        pytest.approx(interval.high, abs=1e-6),
    ), f"{k} of {n}: bounds differ from binomtest"


def test_bounds_without_any_hit_or_miss():
    assert cascade.clopper_pearson(0, 100, 0.05, True) == pytest.approx(1 - 0.05 ** (1 / 100)), (
        "upper bound of no hit"
    )
    assert cascade.clopper_pearson(0, 100, 0.05, False) == 0, "lower bound of no hit"
    assert cascade.clopper_pearson(100, 100, 0.05, False) == pytest.approx(0.05 ** (1 / 100)), (
        "lower bound without a miss"
    )
    assert cascade.clopper_pearson(100, 100, 0.05, True) == 1, "upper bound without a miss"


def calibrated(rng, n):
    """Four prefixes with calibrated confidences; an easy image is easy for all of them."""
    ease = rng.normal(0.8, 1.5, n)
    chance = 1 / (1 + np.exp(-1.5 * (ease + np.array([-0.4, 0.3, 0.7, 0.9])[:, None])))
    correct = rng.random(n) < chance  # one draw for all prefixes: longer ones lose little
    return np.clip(chance + rng.normal(0, 0.03, chance.shape), 0.01, 1), correct


def overconfident(rng, n):
    """Short prefixes are confident everywhere and lose 3.3 points: at most 90 % may exit early."""
    correct = rng.random((4, n)) < 0.8
    correct[:3] = correct[3] & (rng.random(n) >= 0.033 / 0.8)
    return rng.uniform(0.995, 1, (4, n)), correct


def barely(rng, n):
    """The first prefix loses 3.1 points where it is confident; no other image exits early."""
    sure = rng.random(n) < 0.31
    correct = np.ones((4, n), bool)
    correct[0] = np.where(sure, rng.random(n) >= 0.1, False)
    correct[1:3] = False
    confidence = np.full((4, n), 0.05)
    confidence[0, sure] = 0.95
    return confidence, correct


LOSS_DIMS, EPSILON = (8, 32, 128, 512), 0.03


@pytest.mark.parametrize("population", [calibrated, overconfident, barely])
@pytest.mark.parametrize("delta", [0.05, 0.2])
def test_the_loss_is_rarely_above_the_bound(population, delta):
    """On 300 small draws from a large population."""
    rng = np.random.default_rng(4)
    everything, truth = population(rng, 50_000)
    draws, violations, certified, cheap = 300, 0, 0, 0
    for seed in range(draws):
        own = rng.integers(0, truth.shape[1], 1500)
        found = cascade.certify(
            everything[:, own], truth[:, own], LOSS_DIMS, epsilon=EPSILON, delta=delta, seed=seed
        )
        certified += bool(found.certified)
        if not found.certified:
            assert np.isinf(found.thresholds).all()
            assert found.expected_dim == LOSS_DIMS[-1], (
                "without a certificate the longest prefix answers"
            )
            continue
        assert found.loss_bound <= EPSILON, "the bound exceeds epsilon"
        at = cascade.exits(everything, found.thresholds)
        loss = truth[-1].mean() - truth[at, np.arange(len(at))].mean()
        violations += bool(loss > EPSILON)
        expected = np.array(LOSS_DIMS)[at].mean()
        cheap += bool(expected < LOSS_DIMS[-1] / 2)
        assert found.expected_dim == pytest.approx(expected, rel=0.25), (
            f"seed {seed}: expected dim differs from the population's"
        )
    assert violations / draws <= delta + 3 * math.sqrt(delta * (1 - delta) / draws), (
        f"{violations} of {draws} certificates are violated"
    )
    if population is calibrated:  # not vacuous
        assert certified > 0.9 * draws, (
            f"only {certified} of {draws} are certified: the test is vacuous"
        )
        assert cheap > 0.5 * draws, f"only {cheap} of {draws} save half: the test is vacuous"


@pytest.mark.parametrize("n", [1, 2, 10])
def test_few_images_certify_nothing(n):
    found = cascade.certify(np.full((3, n), 0.9), np.ones((3, n), bool), (8, 16, 32), epsilon=0.05)
    assert not found.certified
    assert found.thresholds.shape == (2,), "shape of the thresholds"
    assert np.isinf(found.thresholds).all()
    assert found.expected_dim == 32, "without a certificate the longest prefix answers"


def test_a_cascade_without_loss_is_certified_with_enough_images():
    """No loss in 200 images for the test: the upper bound is 1 - 0.05 ** (1 / 200), 1.5 %."""
    confidence, correct = np.full((3, 400), 0.9), np.ones((3, 400), bool)
    found = cascade.certify(confidence, correct, (8, 16, 32), epsilon=0.02)
    assert found.certified
    assert found.expected_dim == 8, "the shortest prefix loses nothing"
    assert cascade.exits(confidence, found.thresholds).max() == 0, (
        "every image exits at the first prefix"
    )
    assert 0 < found.loss_bound <= 0.02, "the bound must be positive and within epsilon"
    again = cascade.certify(confidence, correct, (8, 16, 32), epsilon=0.02)
    assert np.array_equal(found.thresholds, again.thresholds), (
        "the same seed gives other thresholds"
    )
    assert not cascade.certify(confidence, correct, (8, 16, 32), epsilon=0.01).certified
