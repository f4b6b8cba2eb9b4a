"""Distillation from the longest prefix and the sandwich rule, against formulas in NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax

from matryoshka.nested import distilled_cross_entropy, nested_cross_entropy, sandwich


def oracle(logits, labels, weights, *, smoothing, share, temperature):
    """Image by image: the labels' cross-entropy, and KL to the softened answers of the last row."""
    count = len(logits)
    label_losses = np.zeros(count)
    total = 0.0
    for g in range(count):
        combined = []
        for n, label in enumerate(labels):
            log_p = log_softmax(logits[g, n])
            from_label = -(1 - smoothing) * log_p[label] - smoothing * log_p.mean()
            label_losses[g] += from_label / len(labels)
            if g == count - 1:
                combined.append(from_label)
                continue
            p = softmax(logits[-1, n] / temperature)
            q = softmax(logits[g, n] / temperature)
            kl = sum(p_c * np.log(p_c / q_c) for p_c, q_c in zip(p, q, strict=True))
            combined.append((1 - share) * from_label + share * temperature**2 * kl)
        total += weights[g] * np.mean(combined)
    return total, label_losses


@settings(max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(2, 5)),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    temperature=st.sampled_from([0.5, 1.0, 4.0]),
    smoothing=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 99),
)
def test_distillation_against_its_formula(shape, share, temperature, smoothing, seed):
    prefixes, batch, classes = shape
    rng = np.random.default_rng(seed)
    logits = 3 * rng.standard_normal(shape)
    labels = rng.integers(classes, size=batch)
    weights = rng.uniform(0.1, 2, prefixes)
    total, per_prefix = distilled_cross_entropy(
        torch.tensor(logits),
        torch.tensor(labels),
        torch.tensor(weights),
        smoothing,
        share=share,
        temperature=temperature,
    )
    expected, label_losses = oracle(
        logits, labels, weights, smoothing=smoothing, share=share, temperature=temperature
    )
    assert float(total) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert per_prefix.numpy() == pytest.approx(label_losses, rel=1e-9)


def test_the_longest_prefix_learns_from_the_labels_alone():
    torch.manual_seed(0)
    labels = torch.tensor([0, 2, 1])
    logits = torch.randn(3, 3, 4, dtype=torch.float64, requires_grad=True)
    (taught,) = torch.autograd.grad(
        distilled_cross_entropy(logits, labels, share=0.7, temperature=2.0)[0], logits
    )
    (plain,) = torch.autograd.grad(nested_cross_entropy(logits, labels)[0], logits)
    assert torch.equal(taught[-1], plain[-1]), "a gradient flows through the teacher's answers"
    assert not torch.allclose(taught[:-1], plain[:-1])


def test_without_distillation_it_is_the_plain_loss():
    logits, labels = torch.randn(3, 4, 5), torch.tensor([0, 1, 2, 3])
    weights = torch.tensor([1.0, 0.5, 2.0])
    distilled = distilled_cross_entropy(logits, labels, weights, 0.1, share=0.0)
    for found, expected in zip(
        distilled, nested_cross_entropy(logits, labels, weights, 0.1), strict=True
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"share": 1.1}, "share=1.1"), ({"share": 0.5, "temperature": 0.0}, "temperature=0.0")],
)
def test_values_outside_their_ranges(options, message):
    with pytest.raises(ValueError, match=message):
        distilled_cross_entropy(torch.zeros(2, 1, 3), torch.zeros(1, dtype=torch.long), **options)


# ---------------------------------------------------------------- the sandwich rule


@given(count=st.integers(1, 9), extra=st.integers(0, 9), seed=st.integers(0, 99))
def test_a_sandwich_has_both_ends_and_distinct_fillings(count, extra, seed):
    chosen = sandwich(count, extra, np.random.default_rng(seed))
    assert list(chosen) == sorted(set(chosen))
    assert {0, count - 1} <= set(chosen) <= set(range(count))
    ends = len({0, count - 1})
    assert len(chosen) == ends + min(extra, count - ends)


def test_every_filling_is_equally_frequent():
    rng = np.random.default_rng(0)
    draws = 3000
    counts = np.zeros(7)
    for _ in range(draws):
        counts[list(sandwich(7, 2, rng))] += 1
    assert counts[0] == counts[6] == draws
    # binomial: 2 of 5 in each draw; five standard deviations
    deviation = np.sqrt(draws * 0.4 * 0.6)
    assert np.abs(counts[1:6] - 0.4 * draws).max() < 5 * deviation
    assert sandwich(7, 2, np.random.default_rng(5)) == sandwich(7, 2, np.random.default_rng(5))


def test_a_sandwich_of_nothing_is_refused():
    with pytest.raises(ValueError, match="sandwich of 0"):
        sandwich(0, 1, np.random.default_rng(0))
