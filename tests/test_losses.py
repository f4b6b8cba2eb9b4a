"""Losses of self-supervised learning against loops typed from the papers' formulas."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matryoshka import losses
from matryoshka.losses import (
    STOP_GRADIENTS,
    byol,
    info_nce,
    lejepa,
    neighbour_divergence,
    neighbourhood_components,
    nt_xent,
    over_prefixes,
    pairwise_similarity,
    prototype_cross_entropy,
    relic,
    relic_small,
    sigreg,
    supervised_contrastive,
    top_k_similarity,
    vicreg,
)

sizes = st.tuples(st.integers(2, 6), st.integers(2, 7), st.integers(0, 5), st.integers(0, 2**31))
T = 0.2


def drawn(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def tensor(values):
    return torch.from_numpy(np.array(values))


def cosine(a, b):
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def cross_entropy(scores, right):
    return math.log(sum(math.exp(s) for s in scores)) - scores[right]


def close(found, wanted):
    assert float(torch.as_tensor(found).detach()) == pytest.approx(wanted, rel=1e-9, abs=1e-9)


# ---------------------------------------------------------------- against loops


@settings(max_examples=25)
@given(sizes)
def test_info_nce(size):
    images, width, queue, seed = size
    q, k, n = (
        drawn(seed, images, width),
        drawn(seed + 1, images, width),
        drawn(seed + 2, queue, width),
    )
    in_batch, moco = 0.0, 0.0
    for i in range(images):
        others = [cosine(q[i], n[j]) / T for j in range(queue)]
        in_batch += cross_entropy([cosine(q[i], k[j]) / T for j in range(images)] + others, i)
        moco += cross_entropy([cosine(q[i], k[i]) / T, *others], 0)
    negatives = tensor(n) if queue else None
    close(info_nce(tensor(q), tensor(k), negatives, temperature=T), in_batch / images)
    found = info_nce(tensor(q), tensor(k), negatives, temperature=T, in_batch=False)
    close(found, moco / images)


@settings(max_examples=25)
@given(sizes)
def test_nt_xent(size):
    images, width, _, seed = size
    views = drawn(seed, 2, images, width)
    z = views.reshape(2 * images, width)
    total = 0.0
    for i in range(2 * images):
        partner = (i + images) % (2 * images)
        others = [j for j in range(2 * images) if j != i]
        total += cross_entropy([cosine(z[i], z[j]) / T for j in others], others.index(partner))
    close(nt_xent(tensor(views), temperature=T), total / (2 * images))


def softmax(scores):
    powers = [math.exp(s) for s in scores]
    return [p / sum(powers) for p in powers]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@settings(max_examples=25)
@given(sizes, st.sampled_from(STOP_GRADIENTS))
def test_relic(size, stop_gradient):
    images, width, _, seed = size
    online, target = drawn(seed, 2, images, width), drawn(seed + 1, 2, images, width)
    scores = [
        [[cosine(online[v][i], target[1 - v][j]) / T for j in range(images)] for i in range(images)]
        for v in range(2)
    ]
    contrast = sum(cross_entropy(scores[v][i], i) for v in range(2) for i in range(images))
    divergence = 0.0
    for i in range(images):
        if stop_gradient == "columns":
            for v in range(2):
                column = [scores[v][j][i] for j in range(images)]
                divergence += kl(softmax(column), softmax(scores[v][i])) / 2
        else:
            divergence += kl(softmax(scores[0][i]), softmax(scores[1][i]))
    wanted = contrast / (2 * images) + 0.7 * divergence / images
    found = relic(
        tensor(online), tensor(target), temperature=T, alpha=0.7, stop_gradient=stop_gradient
    )
    close(found, wanted)


def test_relic_stops_the_gradient_that_it_names():
    """Of the KL term alone: the gradient of one view vanishes, that of the other does not."""
    target = tensor(drawn(1, 2, 5, 4))
    for stop_gradient, stopped in (("first", [True, False]), ("second", [False, True])):
        online = tensor(drawn(0, 2, 5, 4)).requires_grad_()
        settings = {"temperature": T, "stop_gradient": stop_gradient}
        (
            relic(online, target, alpha=1.0, **settings)
            - relic(online, target, alpha=0.0, **settings)
        ).backward()
        assert [float(g.abs().max()) < 1e-12 for g in online.grad] == stopped


@settings(max_examples=25)
@given(sizes)
def test_byol(size):
    images, width, _, seed = size
    p, t = drawn(seed, images, width), drawn(seed + 1, images, width)
    total = 0.0
    for a, b in zip(p, t, strict=True):
        total += float(np.sum((a / np.linalg.norm(a) - b / np.linalg.norm(b)) ** 2))
    close(byol(tensor(p), tensor(t)), total / images)


@settings(max_examples=25)
@given(sizes)
def test_vicreg(size):
    images, width, _, seed = size
    views = [drawn(seed + v, images, width) for v in range(2)]
    spread, mixing = 0.0, 0.0
    for z in views:
        mean = [sum(z[:, j]) / images for j in range(width)]
        for j in range(width):
            variance = sum((z[i, j] - mean[j]) ** 2 for i in range(images)) / (images - 1)
            spread += max(0.0, 1 - math.sqrt(variance + 1e-4)) / width / 2
            for other in range(width):
                if other != j:
                    products = [
                        (z[i, j] - mean[j]) * (z[i, other] - mean[other]) for i in range(images)
                    ]
                    mixing += (sum(products) / (images - 1)) ** 2 / width
    difference = float(np.mean((views[0] - views[1]) ** 2))
    close(vicreg(*map(tensor, views)), 25 * difference + 25 * spread + mixing)


@settings(max_examples=15)
@given(sizes)
def test_sigreg(size):
    images, width, _, seed = size
    x, directions = drawn(seed, images, width), drawn(seed + 1, 3, width)
    t = np.linspace(0, 3, 9)
    total = 0.0
    for direction in directions:
        s = x @ direction / np.linalg.norm(direction)
        values = []
        for point in t:
            empirical = sum(complex(math.cos(point * v), math.sin(point * v)) for v in s) / images
            values.append(
                abs(empirical - math.exp(-(point**2) / 2)) ** 2 * math.exp(-(point**2) / 2)
            )
        total += 2 * images * float(np.trapezoid(values, t)) / len(directions)
    close(sigreg(tensor(x), tensor(directions), knots=9), total)


def test_both_forms_of_sigreg_and_their_gradients():
    """That of a CPU, knot by knot with a gradient of its own, and that of a GPU."""
    projected = tensor(drawn(3, 20, 6)).requires_grad_()
    results = []
    for form in (losses._epps_pulley, losses._EppsPulley.apply):
        value = form(projected, 17, 3.0)
        (gradient,) = torch.autograd.grad(3 * value, projected)
        results.append((value.detach(), gradient))
    (first, first_gradient), (second, second_gradient) = results
    torch.testing.assert_close(first, second, rtol=1e-12, atol=0)
    torch.testing.assert_close(first_gradient, second_gradient, rtol=1e-9, atol=1e-12)
    assert float(first_gradient.abs().max()) > 1e-3


def test_sigreg_knows_a_gaussian():
    directions = tensor(drawn(0, 64, 8))
    gaussian = sigreg(tensor(drawn(1, 4000, 8)), directions)
    narrow = sigreg(tensor(drawn(1, 4000, 8)) / 2, directions)
    collapsed = sigreg(torch.zeros(4000, 8, dtype=torch.float64), directions)
    assert float(gaussian) < 2, "the statistic does not grow with the sample"
    assert 50 < float(narrow) < float(collapsed)
    # Its integral over all t: sqrt(2 pi) (1 - sqrt(2) + 1 / sqrt(3)).
    assert float(collapsed) / 4000 == pytest.approx(0.4089, abs=0.02)


# ---------------------------------------------------------------- several processes


@pytest.mark.parametrize("loss", ["info_nce", "info_nce_queue", "nt_xent", "relic"])
def test_two_processes_are_one(loss):
    """The mean of two halves' losses, and their gradients, are those of the whole batch."""
    queue = tensor(drawn(9, 3, 4))
    keys = tensor(drawn(1, 2, 6, 4))

    def compute(x, everything, first):
        if loss == "nt_xent":
            return nt_xent(x, everything, temperature=T, first=first)
        if loss == "relic":
            return relic(x, keys, temperature=T, first=first)
        negatives = queue if loss == "info_nce_queue" else None
        return info_nce(x[0], keys[0], negatives, temperature=T, first=first)

    x = tensor(drawn(0, 2, 6, 4)).requires_grad_()
    whole = compute(x, x, 0)
    (whole_gradient,) = torch.autograd.grad(whole, x)
    halves = sum(compute(x[:, i : i + 3], x, i) for i in (0, 3)) / 2
    (gradient,) = torch.autograd.grad(halves, x)
    close(halves, float(whole.detach()))
    assert torch.allclose(gradient, whole_gradient, atol=1e-10)


# ---------------------------------------------------------------- prefixes


def test_prefixes_are_cut_before_they_are_normalised():
    q, k = tensor(drawn(0, 5, 8)), tensor(drawn(1, 5, 8))
    nested = over_prefixes(info_nce, (2, 8), (3.0, 0.5), {"temperature": [0.1, 0.4]})
    total, per_prefix = nested(q, k)
    wanted = [info_nce(q[:, :d], k[:, :d], temperature=t) for d, t in ((2, 0.1), (8, 0.4))]
    assert per_prefix.tolist() == pytest.approx([float(w) for w in wanted])
    close(total, 3 * float(wanted[0]) + 0.5 * float(wanted[1]))
    plain, _ = over_prefixes(byol, (8,))(q, k)
    close(plain, float(byol(q, k)))


def test_mistakes_are_refused():
    q = tensor(drawn(0, 5, 4))
    with pytest.raises(ValueError, match="the longest prefix has 8"):
        over_prefixes(byol, (2, 8))(q, q)
    with pytest.raises(ValueError, match="weights: 1 values for 2 prefixes"):
        over_prefixes(byol, (2, 4), (1.0,))
    with pytest.raises(ValueError, match="strictly increasing"):
        over_prefixes(byol, (4, 2))
    with pytest.raises(ValueError, match="stop_gradient=both"):
        relic(q[None].expand(2, 5, 4), q[None].expand(2, 5, 4), temperature=T, stop_gradient="both")
    with pytest.raises(ValueError, match="knots=1"):
        sigreg(q, q, knots=1)


@settings(max_examples=25)
@given(sizes)
def test_relic_small(size):
    images, width, _, seed = size
    small, large, target = (drawn(seed + k, images, width) for k in range(3))
    total = 0.0
    for i in range(images):
        of_small = [cosine(small[i], target[j]) / T for j in range(images)]
        of_large = [cosine(large[i], target[j]) / T for j in range(images)]
        total += cross_entropy(of_small, i)
        for j in range(images):
            log_q, log_p = -cross_entropy(of_small, j), -cross_entropy(of_large, j)
            total += 0.7 * math.exp(log_p) * (log_p - log_q)
    found = relic_small(tensor(small), tensor(large), tensor(target), temperature=T, alpha=0.7)
    close(found, total / images)


@settings(max_examples=10)
@given(sizes, st.integers(0, 2))
def test_lejepa(size, small):
    images, width, _, seed = size
    views = [drawn(seed + k, images, width) for k in range(2 + small)]
    directions = drawn(seed + 9, 4, width)
    centre = (views[0] + views[1]) / 2
    distance, irregular = 0.0, 0.0
    for view in views:
        for i in range(images):
            for d in range(width):
                distance += (view[i, d] - centre[i, d]) ** 2
        irregular += float(sigreg(tensor(view), tensor(directions))) / len(views)
    distance /= len(views) * images * width
    found = lejepa(tensor(directions), *map(tensor, views), gaussian=0.1)
    close(found, 0.9 * distance + 0.1 * irregular)


def test_slices_are_blocks_of_columns():
    x = torch.randn(4, 10, dtype=torch.float64)
    y = torch.randn(4, 10, dtype=torch.float64)
    blocks = [slice(0, 4), slice(4, 10)]
    total, per_prefix = over_prefixes(byol, blocks)(x, y)
    close(per_prefix[0], float(byol(x[:, :4], y[:, :4])))
    close(per_prefix[1], float(byol(x[:, 4:], y[:, 4:])))
    close(total, float(per_prefix.sum()))
    with pytest.raises(ValueError, match="no prefixes"):
        over_prefixes(byol, [])
    with pytest.raises(ValueError, match="longest prefix has 10"):
        over_prefixes(byol, blocks)(x[:, :9], y)


# ---------------------------------------------------------------- of adapters


@settings(max_examples=25)
@given(sizes)
def test_supervised_contrastive(size):
    images, width, classes, seed = size
    z = drawn(seed, images, width)
    labels = np.random.default_rng(seed).integers(0, classes + 1, images)
    total, counted = 0.0, 0
    for i in range(images):
        others = [j for j in range(images) if j != i]
        scores = [cosine(z[i], z[j]) / T for j in others]
        found = [cross_entropy(scores, at) for at, j in enumerate(others) if labels[j] == labels[i]]
        if found:
            total += sum(found) / len(found)
            counted += 1
    wanted = total / counted if counted else 0.0
    close(supervised_contrastive(tensor(z), labels=tensor(labels), temperature=T), wanted)


@settings(max_examples=25)
@given(sizes)
def test_neighbourhood_components(size):
    images, width, classes, seed = size
    z = drawn(seed, images, width)
    labels = np.random.default_rng(seed).integers(0, classes + 1, images)
    total, counted = 0.0, 0
    for i in range(images):
        others = [j for j in range(images) if j != i]
        weights = [math.exp(cosine(z[i], z[j]) / T) for j in others]
        own = sum(w for w, j in zip(weights, others, strict=True) if labels[j] == labels[i])
        if own:
            total -= math.log(own / sum(weights))
            counted += 1
    wanted = total / counted if counted else 0.0
    close(neighbourhood_components(tensor(z), labels=tensor(labels), temperature=T), wanted)


@pytest.mark.parametrize("loss_of", [supervised_contrastive, neighbourhood_components])
def test_images_without_others_of_their_class_change_nothing(loss_of):
    z = tensor(drawn(0, 5, 3)).requires_grad_()
    loss = loss_of(z, labels=torch.arange(5), temperature=T)
    loss.backward()
    assert loss.item() == 0
    assert z.grad is not None
    assert not z.grad.any(), "there is nothing to learn from"


@settings(max_examples=25)
@given(sizes)
def test_prototype_cross_entropy(size):
    images, width, more, seed = size
    classes = more + 1
    z, prototypes = drawn(seed, images, width), drawn(seed + 1, classes, width)
    labels = np.random.default_rng(seed).integers(0, classes, images)
    total = 0.0
    for i in range(images):
        scores = [cosine(z[i], prototypes[c]) / T for c in range(classes)]
        total += cross_entropy(scores, labels[i])
    found = prototype_cross_entropy(
        tensor(z), tensor(prototypes), labels=tensor(labels), temperature=T
    )
    close(found, total / images)


@settings(max_examples=25)
@given(sizes)
def test_similarities_that_are_kept(size):
    images, width, k, seed = size
    z, full = drawn(seed, images, width), drawn(seed + 1, images, width + 3)
    wanted = [[cosine(a, b) for b in full] for a in full]
    pairs, nearest = [], []
    for i in range(images):
        others = [j for j in range(images) if j != i]
        pairs += [abs(cosine(z[i], z[j]) - wanted[i][j]) for j in others]
        best = sorted(others, key=lambda j: -wanted[i][j])[: k + 1]
        nearest += [abs(cosine(z[i], z[j]) - wanted[i][j]) for j in best]
    close(pairwise_similarity(tensor(z), wanted=tensor(wanted)), sum(pairs) / len(pairs))
    found = top_k_similarity(tensor(z), wanted=tensor(wanted), k=k + 1)
    close(found, sum(nearest) / len(nearest))


@settings(max_examples=25)
@given(sizes)
def test_neighbours_that_are_kept(size):
    images, width, _, seed = size
    z, full = drawn(seed, images, width), drawn(seed + 1, images, width + 3)
    wanted = [[cosine(a, b) for b in full] for a in full]
    total = 0.0
    for i in range(images):
        others = [j for j in range(images) if j != i]
        goal = [wanted[i][j] / T for j in others]
        found = [cosine(z[i], z[j]) / T for j in others]
        for at in range(len(others)):
            log_p = -cross_entropy(goal, at)
            total += math.exp(log_p) * (log_p + cross_entropy(found, at))
    loss = neighbour_divergence(tensor(z), wanted=tensor(wanted), temperature=T)
    close(loss, total / images)


def test_losses_of_adapters_are_nested_like_all_others():
    z, prototypes = tensor(drawn(0, 6, 8)), tensor(drawn(1, 3, 8))
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    nested = over_prefixes(prototype_cross_entropy, (2, 8))
    total, each = nested(z, prototypes, labels=labels, temperature=T)
    short = prototype_cross_entropy(z[:, :2], prototypes[:, :2], labels=labels, temperature=T)
    close(each[0], float(short))
    close(total, float(each.sum()))
