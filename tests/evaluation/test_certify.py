"""Certified cascades against the whole procedure in plain loops: splits, path, thresholds, bounds,
where it stops.

The oracle can also make a mistake on purpose, to show that the cases tell it from the right
procedure.
"""

import math
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from matryoshka.evaluation.cascade import ALLOWED_LOSSES, certify, split_indices

MISTAKES = (
    "whole delta",
    "mean gain",
    "no gain",
    "continues after a failure",
    "keeps the last",
    "tests what it learned",
)
SEEDS = (
    *range(36, 52),
    56,
    65,
    94,
    151,
    249,
)  # of cases: none of the mistakes is without effect on them


@cache
def upper(k, n, alpha):
    return float(stats.binomtest(k, n, alternative="less").proportion_ci(1 - alpha).high)


@cache
def lower(k, n, alpha):
    return float(stats.binomtest(k, n, alternative="greater").proportion_ci(1 - alpha).low)


def learned(allowed, confidence, correct, images):
    """At each prefix the smallest threshold at which the exiting images lose at most the share
    `allowed`.
    """
    thresholds = []
    for g in range(len(confidence) - 1):
        sure = sorted({confidence[g][i] for i in images})
        found = math.inf
        for t in [*([math.nextafter(sure[0], -math.inf)] if sure else []), *sure]:
            leavers = [i for i in images if confidence[g][i] > t]
            lost = sum(correct[-1][i] for i in leavers) - sum(correct[g][i] for i in leavers)
            if leavers and lost <= allowed * len(leavers):
                found = t
                break
        thresholds.append(found)
        images = [i for i in images if not confidence[g][i] > found]
    return thresholds


def leaves(confidence, thresholds, i):
    return next((g for g, t in enumerate(thresholds) if confidence[g][i] > t), len(thresholds))


def certified_by_loops(confidence, correct, dims, *, epsilon, delta, seed, mistake=None):
    """Certificates of the shortest cascade that passes, as tuples; several if they tie."""
    confidence, correct = confidence.tolist(), correct.astype(int).tolist()
    n, last = len(correct[0]), len(dims) - 1
    ((path, test),) = split_indices(n, 1, n // 2, seed)
    path, test = path.tolist(), test.tolist()
    if mistake == "tests what it learned":
        path = test
    alpha = delta if mistake == "whole delta" else delta / 2
    full = sum(correct[-1][i] for i in test) / len(test)
    passed = []
    for allowed in ALLOWED_LOSSES.tolist():
        thresholds = learned(allowed, confidence, correct, path)
        at = {i: leaves(confidence, thresholds, i) for i in test}
        harmed = sum(correct[-1][i] > correct[at[i]][i] for i in test)
        gained = sum(correct[-1][i] < correct[at[i]][i] for i in test)
        gain = {"mean gain": gained / len(test), "no gain": 0.0}.get(
            mistake or "", lower(gained, len(test), alpha)
        )
        bound = upper(harmed, len(test), alpha) - gain
        if bound > epsilon:
            if mistake == "continues after a failure":
                continue
            break
        expected = sum(dims[k] for k in at.values()) / len(test)
        right = sum(correct[k][i] for i, k in at.items()) / len(test)
        if set(at.values()) != {last}:
            passed.append((tuple(thresholds), True, bound, expected, right, full))
    if not passed:
        return [((math.inf,) * last, False, 0.0, dims[-1], full, full)]
    if mistake == "keeps the last":
        return passed[-1:]
    return [row for row in passed if row[3] == min(other[3] for other in passed)]


def is_among(found, expected):
    """Thresholds and counts are equal; the bound, a numerical root, agrees to 1e-9."""
    thresholds, certified, bound, *counted = found
    return any(
        (tuple(thresholds), certified, counted) == (row[0], row[1], list(row[3:]))
        and abs(bound - row[2]) < 1e-9
        for row in expected
    )


def drawn(seed) -> tuple[np.ndarray, np.ndarray, tuple[int, ...], dict]:
    """(confidence [G, N], correct, dims, options): easy and hard images, prefixes that gain and
    lose.
    """
    rng = np.random.default_rng(seed)
    g, n = int(rng.integers(2, 5)), int(rng.integers(60, 141))
    ease = rng.normal(0.5, 1.5, n)
    level = np.sort(rng.normal(0, 0.8, g))[:, None]
    chance = 1 / (1 + np.exp(-1.5 * (ease + level)))
    correct = rng.random(n if seed % 2 else (g, n)) < chance
    confidence = np.clip(chance + rng.normal(0, rng.choice([0.02, 0.2]), (g, n)), 0.01, 1)
    if seed % 3 == 0:
        confidence = confidence.round(1)  # many are equal
    dims = tuple(8 * 4**k for k in range(g))
    options = {
        "epsilon": float(rng.choice([0.05, 0.1, 0.2])),
        "delta": float(rng.choice([0.05, 0.2, 0.5])),
        "seed": seed,
    }
    return confidence, correct, dims, options


@pytest.mark.parametrize("seed", SEEDS)
def test_the_certificate_equals_loops(seed):
    confidence, correct, dims, options = drawn(seed)
    case = confidence, correct, dims
    assert is_among(certify(*case, **options), certified_by_loops(*case, **options)), (
        f"case {seed}: another certificate than the loop"
    )


def test_the_cases_detect_mistakes():
    """Each mistake changes the certificate of some of the cases above."""
    noticed = set()
    for seed in SEEDS:
        confidence, correct, dims, options = drawn(seed)
        case = confidence, correct, dims
        expected = certified_by_loops(*case, **options)
        for mistake in {*MISTAKES} - noticed:
            if not {*certified_by_loops(*case, **options, mistake=mistake)} & {*expected}:
                noticed.add(mistake)
    assert noticed == {*MISTAKES}, "some mistake changes no certificate"


def lucky_half():
    """Two prefixes. In the half of the path, exits at 0.9 lose nothing and exits at 0.7 lose 8 %;
    in the half of the test, exits at 0.9 lose everything and exits at 0.7 gain more.
    """
    ((path, test),) = split_indices(400, 1, 200, 0)
    confidence, correct = np.full((2, 400), 0.1), np.zeros((2, 400), bool)
    for half, rows in (
        (path, [(0.9, True, True)] * 20 + [(0.8, False, True)] * 10 + [(0.7, True, True)] * 100),
        (test, [(0.9, False, True)] * 20 + [(0.7, True, False)] * 100),
    ):
        rest = [(0.1, False, True)] * (200 - len(rows))
        for i, (sure, short, long) in zip(half, rows + rest, strict=True):
            confidence[0, i], correct[:, i] = sure, (short, long)
    return confidence, correct, (8, 64)


def test_it_stops_at_the_first_failure():
    case, options = lucky_half(), {"epsilon": 0.05, "delta": 0.05, "seed": 0}
    found = certify(*case, **options)
    assert not found.certified, "the first cascade loses too much"
    assert is_among(found, certified_by_loops(*case, **options)), (
        "another certificate than the loop"
    )
    later = certified_by_loops(*case, **options, mistake="continues after a failure")
    assert later[0][1], "no later cascade passes: the test is vacuous"


@settings(max_examples=60)
@given(st.data(), st.integers(1, 3), st.integers(2, 24), st.integers(0, 99))
def test_few_images_equal_loops(data, g, n, seed):
    """The bounds are so loose that even a test on three images passes."""
    confidence = data.draw(
        hnp.arrays(float, (g, n), elements=st.sampled_from([0.2, 0.5, 0.9, 1.0]))
    )
    correct = data.draw(hnp.arrays(bool, (g, n)))
    options = {
        "epsilon": data.draw(st.floats(0.3, 0.9)),
        "delta": data.draw(st.floats(0.1, 0.9)),
        "seed": seed,
    }
    dims = (8, 16, 64)[:g]
    assert is_among(
        certify(confidence, correct, dims, **options),
        certified_by_loops(confidence, correct, dims, **options),
    ), "another certificate than the loop"
