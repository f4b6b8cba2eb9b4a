"""Metrics of retrieval against slow loops, scikit-learn, exact probabilities and the paper's
recorded costs.
"""

import math
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import average_precision_score

from matryoshka.retrieval import ranking_metrics as metrics

quick = settings(max_examples=80)
same = pytest.approx


@st.composite
def searched(draw):
    """(ids int64 [Q, k], labels int64 [N], query_labels int64 [Q]): ids distinct, -1 anywhere;
    classes -1 to 3.
    """
    q, n = draw(st.integers(0, 5)), draw(st.integers(0, 8))
    k = draw(st.integers(1, 10))
    rows = [draw(st.permutations([*range(n), *[-1] * k]))[:k] for _ in range(q)]
    classes = st.integers(-1, 3)
    labels, own = (draw(hnp.arrays(np.int64, size, elements=classes)) for size in (n, q))
    return np.array(rows, np.int64).reshape(q, k), labels, own


@st.composite
def two_lists(draw):
    """(found int64 [Q, a], exact int64 [Q, b]) of few different ids, so that many agree."""
    q = draw(st.integers(0, 4))
    element = st.integers(-1, 6) | st.just(2**62)
    return tuple(
        draw(hnp.arrays(np.int64, (q, draw(st.integers(low, 7))), elements=element))
        for low in (0, 1)
    )


def class_hits(ids, labels, query_labels):
    return [
        [i >= 0 and own >= 0 and labels[i] == own for i in row]
        for row, own in zip(ids.tolist(), query_labels.tolist(), strict=True)
    ]


def average(numbers):
    numbers = list(numbers)
    return same(sum(numbers) / len(numbers) if numbers else math.nan, nan_ok=True)


def summed_precision(row):
    return sum(sum(row[: rank + 1]) / (rank + 1) for rank, hit in enumerate(row) if hit)


# ---------------------------------------------------------------- against the classes


@quick
@given(searched(), st.data())
def test_metrics_equal_loops(case, data):
    ids, labels, own = case
    before = [array.copy() for array in case]
    hit = metrics.class_hits(ids, labels, own)
    expected = class_hits(*case)
    assert hit.dtype == bool
    assert hit.shape == ids.shape
    assert hit.tolist() == expected
    relevant = metrics.relevant_rows(labels, own)
    assert relevant.dtype == np.int64
    assert relevant.tolist() == [sum(c == label for label in labels) if c >= 0 else 0 for c in own]

    k = data.draw(st.integers(1, ids.shape[1]))
    rows = [row[:k] for row in expected]
    pairs = [(row, r) for row, r in zip(rows, relevant.tolist(), strict=True) if r]
    counted = (len(pairs), len(rows) - len(pairs))
    assert metrics.top1(hit) == average(row[0] for row in rows)
    assert metrics.precision_at(hit, k) == average(sum(row) / k for row in rows)
    recall = metrics.recall_at(hit, k, relevant)
    assert recall.value == average(sum(row) / r for row, r in pairs)
    assert recall[1:] == counted
    paper = metrics.mean_average_precision(hit, k)
    assert paper.value == average(summed_precision(row) / k for row in rows)
    assert paper[1:] == (len(rows), 0)
    assert metrics.mean_average_precision(hit, k, relevant, normaliser="k") == same(
        paper, nan_ok=True
    )
    usual = metrics.mean_average_precision(hit, k, relevant, normaliser="min")
    assert usual.value == average(summed_precision(row) / min(k, r) for row, r in pairs)
    assert usual[1:] == counted
    for array, old in zip(case, before, strict=True):
        np.testing.assert_array_equal(array, old)


def test_more_queries_than_one_part():
    rng = np.random.default_rng(0)
    q, n, k = 2 * metrics.BLOCK + 3, 40, 12
    ids = np.argsort(rng.random((q, n)), 1)[:, :k]
    ids[rng.random(ids.shape) < 0.1] = -1
    labels, own = rng.integers(0, 5, n), rng.integers(0, 6, q)
    hit = metrics.class_hits(ids, labels, own)
    assert hit.tolist() == class_hits(ids, labels, own)
    relevant = metrics.relevant_rows(labels, own)
    rows = [(row, r) for row, r in zip(hit.tolist(), relevant.tolist(), strict=True) if r]
    expected = average(summed_precision(row) / min(k, r) for row, r in rows)
    assert metrics.mean_average_precision(hit, k, relevant, normaliser="min").value == expected
    found, exact = ids[::-1], ids
    recall = metrics.recall_against_exact(found, exact)
    for a, b, value in zip(found.tolist(), exact.tolist(), recall.tolist(), strict=True):
        assert value == same(len(set(a) & set(b) - {-1}) / len(set(b) - {-1}))


@quick
@given(hnp.arrays(bool, st.tuples(st.integers(1, 4), st.integers(1, 12))))
def test_the_usual_map_of_a_whole_ranking_is_scikit_learns(hit):
    """With every row of the database in the list, min(k, R) = R; scikit-learn divides by that."""
    relevant = hit.sum(1)
    k = hit.shape[1]
    scores = -np.arange(k)
    expected = average(average_precision_score(row, scores) for row in hit if row.any())
    assert metrics.mean_average_precision(hit, k, relevant, normaliser="min").value == expected


def test_the_forms_of_map_by_hand():
    hit = np.array([[True, False, True, False], [False, True, False, False]])  # (1 + 2/3) and 1/2
    assert metrics.mean_average_precision(hit, 4).value == same((5 / 3 / 4 + 1 / 2 / 4) / 2)
    usual = metrics.mean_average_precision(hit, 4, np.array([2, 100]), normaliser="min")
    assert usual == (same((5 / 3 / 2 + 1 / 2 / 4) / 2), 2, 0)
    assert metrics.mean_average_precision(hit, 4, np.array([2, 1]), normaliser="min").value == same(
        2 / 3
    )
    assert metrics.recall_at(hit, 2, np.array([2, 50])).value == same((1 / 2 + 1 / 50) / 2)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: metrics.class_hits(np.array([[3]]), np.arange(3), np.array([0])), "row 3 .* 3"),
        (lambda: metrics.class_hits(np.array([[0]]), np.arange(0), np.array([0])), "row 0 .* 0"),
        (
            lambda: metrics.class_hits(np.array([[0]]), np.zeros(1, np.float16), np.array([0])),
            "^labels: float16",
        ),
        (
            lambda: metrics.class_hits(np.array([[0]]), np.arange(1), np.array([0.0])),
            "^query_labels: float64",
        ),
        (
            lambda: metrics.class_hits(np.array([[0.0]]), np.arange(1), np.array([0])),
            "^ids: float64",
        ),
        (
            lambda: metrics.class_hits(np.array([[0]]), np.arange(1), np.array([0, 0])),
            "1 queries.* 2",
        ),
        (lambda: metrics.precision_at(np.ones((2, 3), bool), 0), "k=0: expected 1 to 3"),
        (lambda: metrics.mean_average_precision(np.ones((2, 3), bool), 4), "k=4: expected 1 to 3"),
        (
            lambda: metrics.recall_at(np.ones((2, 3), bool), 3, np.array([3, 2])),
            "more hits than relevant",
        ),
        (
            lambda: metrics.recall_at(np.ones((2, 3), bool), 3, np.array([3])),
            "relevant of 1 queries",
        ),
        (
            lambda: metrics.mean_average_precision(np.ones((1, 3), bool), 3, np.array([2]), "min"),
            "more hits",
        ),
        (
            lambda: metrics.mean_average_precision(np.ones((1, 3), bool), 3, None, "min"),
            "needs `relevant`",
        ),
        (
            lambda: metrics.mean_average_precision(np.ones((1, 3), bool), 3, np.array([3]), "R"),
            "expected k or min",
        ),
        (
            lambda: metrics.recall_against_exact(np.ones((2, 3), int), np.ones((3, 3), int)),
            "2 queries, exact 3",
        ),
        (lambda: metrics.mean_lower_bound(np.array([0.5, 1.01])), "0 to 1"),
        (lambda: metrics.mean_lower_bound(np.array([0.5, math.nan])), "0 to 1"),
        (lambda: metrics.mean_lower_bound(np.ones(3), confidence=1), "confidence=1,"),
        (lambda: metrics.mean_lower_bound(np.ones(3), bonferroni=0), "bonferroni=0"),
    ],
)
def test_arrays_that_do_not_belong_together_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# ---------------------------------------------------------------- against exact search


@quick
@given(two_lists())
def test_recall_against_exact_equals_sets(lists):
    found, exact = lists
    recall = metrics.recall_against_exact(found, exact)
    assert recall.shape == (len(exact),)
    for a, b, value in zip(found.tolist(), exact.tolist(), recall.tolist(), strict=True):
        wanted = set(b) - {-1}
        assert value == same(
            len(set(a) & wanted) / len(wanted) if wanted else math.nan, nan_ok=True
        )


@quick
@given(hnp.arrays(np.int64, st.integers(0, 30), elements=st.integers(-1, 10)), st.floats(0.001, 1))
def test_the_distribution_is_counted(number, share):
    """number: how many of 10 each query found, -1 for a query without exact neighbours."""
    recall = np.where(number < 0, np.nan, number / 10)
    summary = metrics.summarise_recall(recall, 10)
    kept = sorted(number[number >= 0].tolist())
    assert (summary.queries, summary.excluded) == (len(kept), len(number) - len(kept))
    assert summary.found.tolist() == [kept.count(c) for c in range(11)]
    assert summary.perfect == average(c == 10 for c in kept)
    assert summary.at_most(2) == average(c <= 2 for c in kept)
    assert summary.mean == average(c / 10 for c in kept)
    if kept:
        assert summary.quantile(share) == next(
            c for c in range(11) if sum(x <= c for x in kept) >= share * len(kept) * (1 - 1e-9)
        )
        assert (
            0
            <= summary.interval[0]
            <= summary.lower
            <= summary.mean
            <= summary.interval[1] + 1e-12
            <= 1 + 1e-12
        ), "the bounds are not in order"
    else:
        assert (summary.interval, summary.lower) == ((0, 1), 0)
    expected = (
        np.std([c / 10 for c in kept], ddof=1) / len(kept) ** 0.5 if len(kept) > 1 else math.nan
    )
    assert summary.standard_error == same(expected, nan_ok=True)


def test_an_imperfect_query_is_never_counted_as_perfect():
    summary = metrics.summarise_recall(np.array([1.0, 0.99, 1 / 3, 0.0]), 10)
    assert summary.found.tolist() == [1, 0, 0, 1, 0, 0, 0, 0, 0, 1, 1]
    assert summary.perfect == 0.25


@pytest.mark.parametrize("k", [1, 10, 49, 100, 200])
def test_rounding_of_shares_moves_no_query(k):
    """1 / 49 * 49 < 1, and 0.07 * 100 > 7."""
    summary = metrics.summarise_recall(np.arange(k + 1) / k, k)
    assert summary.found.tolist() == [1] * (k + 1)
    assert metrics.summarise_recall(np.arange(100) // 7 / 20, 20).quantile(0.07) == 0


# ---------------------------------------------------------------- the bound


def wealth(values, m, stakes):
    return sum(math.prod(1 + s * (Fraction(x) - m) for x in values) for s in stakes) / len(stakes)


@quick
@given(
    hnp.arrays(np.float64, st.integers(1, 25), elements=st.sampled_from([0, 0.25, 0.5, 0.75, 1])),
    st.sampled_from([0.3, 0.5, 0.9, 0.95]),
    st.sampled_from([1, 7]),
)
def test_the_bound_is_where_the_wealth_says(values, confidence, tried):
    bound = metrics.mean_lower_bound(values, confidence, tried)
    needed = tried / (1 - confidence)
    stakes = [Fraction(1)]
    while stakes[-1] > math.sqrt(8 * math.log(needed) / len(values)):
        stakes.append(stakes[-1] / 2)
    assert 0 <= bound <= values.mean(), "the bound is not between 0 and the mean"
    assert wealth(values, Fraction(bound) + Fraction(1, 10**9), stakes) < needed * (1 + 1e-9), (
        "the bound could be higher"
    )
    if bound:
        assert wealth(values, Fraction(bound), stakes) >= needed * (1 - 1e-9), (
            "the bound is too high"
        )


@st.composite
def distribution(draw):
    weights = draw(st.lists(st.integers(1, 50), min_size=2, max_size=3))
    support = draw(
        st.lists(st.sampled_from([0, 0.1, 0.5, 0.9, 1]), unique=True, min_size=len(weights))
    )
    return support[: len(weights)], [w / sum(weights) for w in weights]


@settings(max_examples=25)
@given(st.lists(distribution(), min_size=1, max_size=2), st.sampled_from([0.2, 0.5, 0.8]))
def test_the_bound_holds_exactly(parts, confidence):
    """All samples of 6 queries, 6 or 3 of each distribution, with their probabilities: too high a
    bound is rare.
    """
    each = [parts[i % len(parts)] for i in range(6)]
    mean = sum(sum(x * p for x, p in zip(*part, strict=True)) for part in each) / 6
    known, wrong = {}, 0.0
    for outcome in product(*(list(zip(*part, strict=True)) for part in each)):
        values = tuple(sorted(x for x, _ in outcome))
        if values not in known:
            known[values] = metrics.mean_lower_bound(np.array(values), confidence)
        if known[values] > mean + 1e-12:
            wrong += math.prod(p for _, p in outcome)
    assert wrong <= 1 - confidence + 1e-12, f"the bound is wrong for {wrong:.4f} of the samples"


def cliff(rng, size):
    """Recall@10 of queries: 1 in 250 falls to 0-3 of 10, 1 in 22 misses one."""
    luck = rng.random(size)
    return np.select([luck < 0.004, luck < 0.05], [rng.integers(0, 4, size) / 10, 0.9], 1.0)


MEAN_CLIFF = 0.004 * 0.15 + 0.046 * 0.9 + 0.95


def test_the_bound_covers_where_the_normal_one_does_not():
    samples = cliff(np.random.default_rng(0), (300, 300))
    summaries = [metrics.summarise_recall(sample, 10) for sample in samples]
    normal = np.array([s.mean - 1.645 * s.standard_error for s in summaries])
    assert (normal > MEAN_CLIFF).mean() > 0.2, "the normal bound is expected to fail here"
    assert np.mean([s.lower > MEAN_CLIFF for s in summaries]) <= 0.05, (
        "the one-sided bound fails too often"
    )
    assert np.mean([not s.interval[0] <= MEAN_CLIFF <= s.interval[1] for s in summaries]) <= 0.05, (
        "the interval fails too often"
    )
    assert np.mean([s.lower for s in summaries]) > MEAN_CLIFF - 0.02, "the bound is too loose"


def test_the_bound_is_close_with_many_queries():
    """Not just sound: within 3.5 standard errors at 10,000 queries, where the normal one takes
    1.645.
    """
    for seed in range(5):
        summary = metrics.summarise_recall(cliff(np.random.default_rng(seed), 10_000), 10)
        assert summary.mean - 3.5 * summary.standard_error < summary.lower < MEAN_CLIFF, (
            "the lower bound is out of its range"
        )
    perfect = metrics.mean_lower_bound(np.ones(10_000))
    assert 1 - 5 / 10_000 < perfect < 1 - 3 / 10_000, (
        f"share of perfect queries: {perfect}"
    )  # no miss at all cannot show less than -ln(.05) / n


def test_the_luckiest_of_many_settings_needs_bonferroni():
    """Of 200 settings of equal true recall the one with the highest bound wins, 40 times."""
    rng = np.random.default_rng(1)
    mean, tried, rounds = 0.9, 200, 40
    draws = rng.binomial(1, mean, (rounds, tried, 60)).astype(float)
    best = draws[
        np.arange(rounds), draws.mean(2).argmax(1)
    ]  # equal variance: the highest mean, the highest bound
    chosen = [
        [metrics.summarise_recall(x, 10, 0.5, m).lower > mean for x in best] for m in (1, tried)
    ]
    assert np.mean(chosen[0]) > 0.9, "without the correction the luckiest is expected to be wrong"
    assert np.mean(chosen[1]) <= 0.5, "the corrected bound is wrong too often"
    x = cliff(rng, 2000)
    bounds = [metrics.summarise_recall(x, 10, bonferroni=m) for m in (1, 10, 100)]
    assert bounds[0].lower > bounds[1].lower > bounds[2].lower, (
        "lower bounds do not fall with the number of settings"
    )
    assert bounds[0].interval[1] < bounds[1].interval[1] < bounds[2].interval[1], (
        "upper bounds do not rise with the number of settings"
    )
    half = metrics.mean_lower_bound(x, 0.975), 1 - metrics.mean_lower_bound(1 - x, 0.975)
    assert bounds[0].interval == same(half)
    assert bounds[2].lower == same(metrics.mean_lower_bound(x, 0.9995))


def test_the_bound_does_not_depend_on_the_order():
    x = cliff(np.random.default_rng(2), 3000)
    assert metrics.mean_lower_bound(np.sort(x)) == metrics.mean_lower_bound(np.sort(x)[::-1])
    assert metrics.mean_lower_bound(x.astype(np.float32)) == same(
        metrics.mean_lower_bound(x), abs=1e-6
    )


# ---------------------------------------------------------------- cost

IN_1K, IN_4K = 1_281_167, 4_202_000
DIMS = [2**i for i in range(3, 12)]
LONG, SHORT = (800, 400, 200, 50, 10), (200, 100, 50, 25, 10)  # of the funnels

# Recorded beside the paper's plots: for each dim of the shortlist, re-ranking of 200 at that dim,
# twice that, ... 2048.
ADAPTIVE_1K = {
    8: "10.25 10.25 10.26 10.26 10.27 10.30 10.35 10.45 10.66",
    16: "20.50 20.51 20.51 20.52 20.55 20.60 20.70 20.91",
    32: "41.00 41.01 41.02 41.05 41.10 41.20 41.41",
    64: "82.01 82.02 82.05 82.10 82.20 82.40",
    128: "164.01 164.04 164.09 164.19 164.40",
    256: "328.03 328.08 328.18 328.39",
    512: "656.06 656.16 656.37",
    1024: "1312.12 1312.32",
    2048: "2624.24",
}
ADAPTIVE_4K = {
    8: "33.62 33.62 33.62 33.63 33.64 33.67 33.72 33.82 34.03",
    16: "67.24 67.24 67.24 67.26 67.28 67.33 67.44 67.64",
    32: "134.47 134.48 134.49 134.52 134.57 134.67 134.87",
    64: "268.94 268.95 268.98 269.03 269.13 269.34",
    128: "537.88 537.91 537.96 538.06 538.27",
    256: "1075.76 1075.81 1075.92 1076.12",
    512: "2151.53 2151.63 2151.83",
    1024: "4303.05 4303.26",
    2048: "8606.11",
}


@pytest.mark.parametrize(
    ("size", "table"), [(IN_1K, ADAPTIVE_1K), (IN_4K, ADAPTIVE_4K)], ids=["1K", "4K"]
)
def test_the_papers_costs_of_adaptive_retrieval(size, table):
    for shortlist, line in table.items():
        recorded = [float(word) for word in line.split()]
        dims = [d for d in DIMS if d >= shortlist]
        assert [metrics.mflops(shortlist, size, [(d, 200)]) for d in dims] == same(
            recorded, abs=0.00501, rel=0
        )


def test_costs_are_exact():
    """Whole numbers of operations, recorded for an earlier run."""
    recorded = {
        (8, 8): 10250936,
        (8, 2048): 10658936,
        (16, 2048): 20908272,
        (64, 128): 82020288,
        (2048, 2048): 2624239616,
    }
    for (shortlist, rerank), operations in recorded.items():
        assert metrics.mflops(shortlist, IN_1K, [(rerank, 200)]) == operations / 1e6


def test_the_papers_costs_of_single_shot_and_funnel():
    single = [metrics.mflops(d, IN_1K) for d in DIMS]
    assert single == same([10, 20, 41, 82, 164, 328, 656, 1312, 2624], abs=0.5, rel=0)
    funnels = [
        (8, (16, 32, 64, 128, 2048), LONG, IN_1K, 10.315, 0.0005),
        (16, (32, 64, 128, 256, 2048), SHORT, IN_1K, 20.545, 0.0005),
        (32, (64, 128, 256, 512, 2048), SHORT, IN_1K, 41.069, 0.0005),
        (32, (64, 128, 256, 512, 2048), LONG, IN_4K, 134.66, 0.005),
        (64, (128, 256, 512, 1024, 2048), LONG, IN_4K, 269.31, 0.005),
    ]
    for shortlist, dims, kept, size, recorded, rounding in funnels:
        found = metrics.mflops(shortlist, size, list(zip(dims, kept, strict=True)))
        assert found == same(recorded, abs=rounding, rel=0)
