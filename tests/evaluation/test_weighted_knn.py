"""Weighted kNN and few-shot intervals per prefix, against loops and scikit-learn."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.preprocessing import normalize

from matryoshka.evaluation import neighbours
from matryoshka.evaluation.neighbours import (
    NeighbourError,
    draw_shots,
    few_shot,
    mean_interval,
    neighbour_hits,
    weighted_knn,
)

# scikit-learn's NearestCentroid divides by the number of images beyond one a class
pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning:sklearn", "ignore:self.within_class:UserWarning"
)


def unit(v):
    length = math.sqrt(sum(x * x for x in v))
    return [x / length for x in v] if length else list(v)


def by_loops(bank, bank_labels, queries, labels, *, d, k, temperature):
    """Top-1 % as section 3.4 of the paper says it."""
    right = 0
    for query, label in zip(queries, labels, strict=True):
        similarities = []
        for entry in bank:
            products = [a * b for a, b in zip(unit(query[:d]), unit(entry[:d]), strict=True)]
            similarities.append(sum(products))
        order = sorted(range(len(bank)), key=lambda i, s=similarities: -s[i])
        weights = {}
        for i in order[:k]:
            own = math.exp(similarities[i] / temperature)
            weights[bank_labels[i]] = weights.get(bank_labels[i], 0) + own
        right += max(weights, key=weights.__getitem__) == label
    return 100 * right / len(queries)


def blobs(seed, counts, width=12, classes=4):
    """Features [N, width] around class centres and their labels, for each count."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, width))
    sets = []
    for count in counts:
        labels = rng.integers(0, classes, count)
        features = centres[labels] + 1.5 * rng.normal(size=(count, width))
        sets.append((features.astype(np.float32), labels))
    return sets


def tensors(*sets):
    return [torch.from_numpy(array) for pair in sets for array in pair]


@settings(max_examples=25)
@given(st.data())
def test_weighted_votes_equal_loops(data):
    m, n, width = (data.draw(st.integers(2, high)) for high in (30, 8, 6))
    dims = sorted(data.draw(st.sets(st.integers(2, width), min_size=1)))
    k = data.draw(st.integers(1, m))
    temperature = data.draw(st.sampled_from([0.07, 1.0]))
    bank, queries = blobs(data.draw(st.integers(0, 999)), (m, n), width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "_TILE", data.draw(st.sampled_from([512, 512 * 7, 1 << 24])))
        found = weighted_knn(
            *tensors(bank, queries), dims, k=(1, k), temperature=temperature, dtype=torch.float64
        )
    for d in dims:
        for count in {1, k}:
            expected = by_loops(*bank, *queries, d=d, k=count, temperature=temperature)
            assert found[d][count] == pytest.approx(expected), f"prefix {d}, k = {count}"


def test_weighted_votes_are_scikit_learns(monkeypatch):
    bank, queries = blobs(1, (600, 200))
    monkeypatch.setattr(neighbours, "_TILE", 512 * 190)
    found = weighted_knn(*tensors(bank, queries), (3, 12))
    by_majority = []
    for d in (3, 12):
        for k in (20, 200):
            oracle = KNeighborsClassifier(
                k,
                metric="cosine",
                algorithm="brute",
                weights=lambda distance: np.exp((1 - distance) / 0.07),
            )
            oracle.fit(bank[0][:, :d].astype(float), bank[1])
            score = 100 * oracle.score(queries[0][:, :d].astype(float), queries[1])
            assert found[d][k] == pytest.approx(score), f"prefix {d}, k = {k}"
            majority = KNeighborsClassifier(k, metric="cosine").fit(bank[0][:, :d], bank[1])
            by_majority.append(100 * majority.score(queries[0][:, :d], queries[1]))
    weighted = [found[d][k] for d in (3, 12) for k in (20, 200)]
    assert weighted != by_majority, "weights change nothing: the test is vacuous"


def test_top_5_and_mean_precision_equal_loops():
    bank, queries = blobs(5, (90, 40), classes=8)
    found = neighbour_hits(*tensors(bank, queries), d=6, k=(20, 60))
    top_5, precision = 0, 0.0
    for query, label in zip(*queries, strict=True):
        products = []
        for entry in bank[0]:
            pairs = zip(unit(query[:6].tolist()), unit(entry[:6].tolist()), strict=True)
            products.append(sum(a * b for a, b in pairs))
        order = sorted(range(90), key=lambda i, p=products: -p[i])
        weights = {}
        for i in order[:20]:
            own = math.exp(products[i] / 0.07)
            weights[bank[1][i]] = weights.get(bank[1][i], 0) + own
        top_5 += label in sorted(weights, key=lambda c, w=weights: -w[c])[:5]
        right = 0
        for rank, i in enumerate(order[:10], 1):
            if bank[1][i] == label:
                right += 1
                precision += right / rank / 10
    assert found.top_5 == top_5
    assert 0 < top_5 < 40
    assert found.precision == pytest.approx(precision, rel=1e-5)


def test_similarities_that_would_overflow_still_vote():
    bank = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.1]])
    found = weighted_knn(
        bank, torch.tensor([1, 0, 0]), bank[:1], torch.tensor([1]), (2,), k=(3,), temperature=1e-4
    )
    assert found == {2: {3: 100.0}}


def test_a_zero_prefix_has_similarity_0():
    """As in the paper: it stands behind an image at 80 degrees, and before one at 100."""
    angles = torch.tensor([80.0, 100.0]).deg2rad()
    bank = torch.zeros(3, 2)
    bank[:2] = torch.stack([angles.cos(), angles.sin()], 1)
    query = torch.tensor([[1.0, 0.0]])
    labels = torch.tensor([0, 1, 2])
    for own, k, right in ((0, 1, 100.0), (2, 1, 0.0)):
        found = weighted_knn(bank, labels, query, torch.tensor([own]), (2,), k=(k,))
        assert found[2][k] == right
    found = weighted_knn(bank[1:], labels[1:], query, torch.tensor([2]), (2,), k=(1,))
    assert found == {2: {1: 100.0}}


def test_k_beyond_the_bank_is_cut_and_images_without_labels_are_left_out():
    bank, queries = blobs(2, (50, 30))
    whole = weighted_knn(*tensors(bank, queries), (12,))
    assert list(whole[12]) == [20, 50], "the keys say how many voted"
    padded = []
    for features, labels in (bank, queries):
        noise = np.random.default_rng(0).normal(size=(7, 12)).astype(np.float32)
        padded.append((np.concatenate([noise, features]), np.concatenate([[-1] * 7, labels])))
    assert weighted_knn(*tensors(*padded), (12,)) == whole


def test_what_cannot_vote():
    x, labels = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    with pytest.raises(NeighbourError, match="the bank: 4 images with 0 labels"):
        weighted_knn(x, labels * 0 - 1, x, labels, (3,))
    with pytest.raises(NeighbourError, match="the queries: 4 images with 3 labels"):
        weighted_knn(x, labels, x, labels[:3], (3,))
    for arguments in ({"k": ()}, {"k": (0,)}, {"temperature": 0.0}):
        with pytest.raises(NeighbourError, match="all above 0"):
            weighted_knn(x, labels, x, labels, (3,), **arguments)
    with pytest.raises(ValueError, match="beyond the feature width 3"):
        weighted_knn(x, labels, x, labels, (4,))


# ---------------------------------------------------------------- few shots


@given(st.lists(st.integers(0, 10_000), min_size=2, max_size=20, unique=True))
def test_intervals_are_scipys(hundredths):
    values = [count / 100 for count in hundredths]  # percent
    mean, low, high = mean_interval(values)
    expected = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
    assert (low, high) == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert mean == pytest.approx(np.mean(values))


def test_one_draw_has_no_interval():
    mean, low, high = mean_interval([3.0])
    assert mean == 3.0
    assert math.isnan(low)
    assert math.isnan(high)


def test_few_shots_are_scikit_learns_class_means():
    bank, queries = blobs(3, (200, 100))
    bank[1][:5] = -1  # without a label
    found = few_shot(*tensors(bank, queries), (3, 12), shots=(1, 5), draws=4, seed=5)
    labelled = bank[1] >= 0
    features, labels = bank[0][labelled], bank[1][labelled]
    for d in (3, 12):
        for shots in (1, 5):
            scores = []
            for draw in range(4):
                _, rows = draw_shots(torch.from_numpy(labels), 5, 5, draw)
                few = rows[:, :shots].flatten().numpy()
                oracle = NearestCentroid().fit(normalize(features[few, :d]), labels[few])
                scores.append(100 * oracle.score(normalize(queries[0][:, :d]), queries[1]))
            assert found[d][shots] == pytest.approx(mean_interval(scores)), (d, shots)
            assert found[d][shots].low < found[d][shots].mean < found[d][shots].high
