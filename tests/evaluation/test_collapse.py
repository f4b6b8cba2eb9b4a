"""Monitors of collapse against loops, and the warnings that they lead to."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matryoshka.evaluation import collapse
from matryoshka.evaluation.collapse import collapse_monitors, effective_rank, fallen


def unit(v):
    return v / np.linalg.norm(v)


def by_loops(view1, view2, d):
    """The four monitors as their papers define them."""
    views = [np.array([unit(row[:d]) for row in view]) for view in (view1, view2)]
    count = len(view1)

    deviations = []
    for z in views:
        for number in range(d):
            mean = sum(z[:, number]) / count
            deviations.append(math.sqrt(sum((x - mean) ** 2 for x in z[:, number]) / count))

    alignment = 0.0
    for a, b in zip(*views, strict=True):
        alignment += np.linalg.norm(a - b) ** 2 / count

    uniformities = []
    for z in views:
        potentials = []
        for i in range(count):
            for j in range(i):
                potentials.append(math.exp(-2 * np.linalg.norm(z[i] - z[j]) ** 2))
        uniformities.append(math.log(sum(potentials) / len(potentials)))

    both = np.concatenate([view1[:, :d], view2[:, :d]])
    values = np.linalg.svd(both, compute_uv=False)
    entropy = 0.0
    for value in values:
        p = value / sum(values) + 1e-7
        entropy -= p * math.log(p)

    return {
        "std": sum(deviations) / len(deviations) * math.sqrt(d),
        "alignment": alignment,
        "uniformity": sum(uniformities) / 2,
        "rank": math.exp(entropy),
    }


@settings(max_examples=25)
@given(st.integers(2, 12), st.integers(1, 9), st.integers(0, 2**31), st.sampled_from([1 << 24, 5]))
def test_monitors_equal_loops(count, width, seed, tile):
    rng = np.random.default_rng(seed)
    view1 = rng.normal(size=(count, width)) + rng.normal(size=width)
    view2 = view1 + 0.3 * rng.normal(size=(count, width))
    dims = sorted({1, (width + 1) // 2, width})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collapse, "_TILE", tile)
        found = collapse_monitors(torch.from_numpy(view1), torch.from_numpy(view2), dims)
    assert list(found) == dims
    for d in dims:
        # Distances from products lose digits of close pairs.
        assert found[d] == pytest.approx(by_loops(view1, view2, d), rel=1e-6, abs=1e-9)


def test_isotropic_embeddings_have_std_1_and_full_rank():
    rng = torch.Generator().manual_seed(0)
    views = torch.randn(2, 2000, 64, generator=rng)
    for d, found in collapse_monitors(views[0], views[1], (8, 64)).items():
        assert found["std"] == pytest.approx(1, abs=0.02)
        assert found["rank"] == pytest.approx(d, rel=0.02)
        assert found["alignment"] == pytest.approx(2, abs=0.05)  # the views are unrelated
    # Uniform on the sphere; the mean squared distance is 2, exp(-4) the first term.
    assert found["uniformity"] == pytest.approx(-4, abs=0.15)


def test_collapsed_embeddings():
    one_point = torch.ones(6, 4)
    found = collapse_monitors(one_point, one_point, (4,))[4]
    assert found == pytest.approx({"std": 0, "alignment": 0, "uniformity": 0, "rank": 1}, abs=1e-4)
    assert effective_rank(torch.zeros(6, 4)) == 0
    zeros = collapse_monitors(torch.zeros(6, 4), torch.zeros(6, 4), (4,))[4]
    assert zeros == {"std": 0, "alignment": 0, "uniformity": 0, "rank": 0}
    broken = one_point.clone()
    broken[2, 3] = math.nan
    found = collapse_monitors(broken, one_point, (2, 4))
    assert math.isfinite(found[2]["rank"]), "the shorter prefix is whole"
    assert all(math.isnan(value) for value in found[4].values())


def test_half_precision_and_what_is_no_pair_of_views():
    view = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    whole = collapse_monitors(view, view, (8,))[8]
    half = collapse_monitors(view.bfloat16(), view.bfloat16(), (8,))[8]
    assert half == pytest.approx(whole, rel=0.02, abs=1e-3)
    for other in (view[:8], view[0], view[:1]):
        with pytest.raises(ValueError, match=r"expected both \[B, D\]"):
            collapse_monitors(other, other if other.ndim == 1 or len(other) == 1 else view, (8,))


# ---------------------------------------------------------------- warnings


def entry(d=64, **changed):
    return {d: {"std": 0.9, "alignment": 0.2, "uniformity": -3.5, "rank": 40.0, **changed}}


@pytest.mark.parametrize(
    ("history", "words"),
    [
        ([entry()], []),
        ([entry(), entry(alignment=0.0)], []),
        ([entry(std=0.05)], ["std of prefix 64 is 0.050, below 0.1"]),
        ([entry(rank=6.3)], ["rank of prefix 64 is 6.3 of 64"]),
        ([entry(8, rank=1.2)], ["rank of prefix 8 is 1.2 of 8"]),
        ([entry(1, rank=1.0)], []),
        ([entry(rank=60.0), entry(rank=29.0)], ["rank of prefix 64 is 29.00, it has been 60.00"]),
        ([entry(rank=60.0), entry(rank=31.0)], []),
        ([entry(rank=60.0), entry(), entry(rank=29.0)], ["it has been 60.00"]),
        ([entry(std=0.9), entry(std=0.4)], ["std of prefix 64 is 0.40, it has been 0.90"]),
        (
            [entry(), entry(uniformity=-1.0)],
            ["uniformity of prefix 64 is -1.00, it has been -3.50"],
        ),
        ([entry(uniformity=-1.0), entry()], []),
        ([entry(std=math.nan)], ["std of prefix 64 is not finite"]),
        ([entry(std=math.inf), entry(rank=math.nan)], ["rank of prefix 64 is not finite"]),
        ([entry(std=0.05), entry(std=0.04)], []),  # said before
        ([entry(std=0.05), entry(std=0.9), entry(std=0.04)], ["below 0.1"]),
        ([entry(std=0.05, rank=2.0)], ["std", "rank"]),
        ([], []),
    ],
)
def test_warnings(history, words):
    lines = fallen(history)
    assert len(lines) == len(words), lines
    for line, word in zip(lines, words, strict=True):
        assert word in line


def test_a_rank_is_judged_by_the_images_that_it_comes_from():
    history = [entry(2048, rank=60.0)]
    assert len(fallen(history)) == 1
    assert fallen(history, images=512) == []


def test_an_encoder_that_collapses_is_noticed_at_every_prefix():
    rng = torch.Generator().manual_seed(2)
    healthy = torch.randn(64, 16, generator=rng)
    direction = torch.randn(16, generator=rng)
    history = []
    warned_at = {}
    for step, share in enumerate((0.0, 1.0, 4.0, 100.0)):
        views = [healthy + share * direction for _ in range(2)]
        history.append(collapse_monitors(*views, (4, 16)))
        for line in fallen(history, images=128):
            warned_at.setdefault(line.split(" is ")[0], step)
    assert set(warned_at) == {
        f"{name} of prefix {d}" for d in (4, 16) for name in ("std", "uniformity", "rank")
    }
    assert min(warned_at.values()) > 0
