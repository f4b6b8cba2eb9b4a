"""The nested head, its loss and the paper's public names, compared with loops that follow the
paper's formulas.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import MRL
from matryoshka.nested import (
    NestedLinear,
    check_dims,
    default_dims,
    nested_cross_entropy,
    nested_logits,
)

dims_strategy = st.lists(st.integers(1, 24), min_size=1, max_size=5, unique=True).map(
    lambda d: tuple(sorted(d))
)


def oracle_logits(x, weights, biases, dims):
    """Eq. 1's W^(1:m) z_(1:m), one multiplication at a time.

    weights, biases: one per prefix, or a single one for all.
    """
    out = np.zeros((len(dims), len(x), len(biases[0])))
    for g, d in enumerate(dims):
        w, b = (weights[g], biases[g]) if len(weights) > 1 else (weights[0], biases[0])
        for n in range(len(x)):
            for c in range(len(b)):
                out[g, n, c] = b[c] + sum(w[c, j] * x[n, j] for j in range(d))
    return out


def oracle_loss(logits, labels, weights, smoothing):
    """sum_g c_g * mean_n of -(1-e) log p_y - e * mean_c log p_c."""
    per_prefix = []
    for g in range(len(logits)):
        losses = []
        for n, y in enumerate(labels):
            z = logits[g, n] - logits[g, n].max()
            log_p = z - np.log(np.exp(z).sum())
            losses.append(-(1 - smoothing) * log_p[y] - smoothing * log_p.mean())
        per_prefix.append(np.mean(losses))
    return float(np.dot(weights, per_prefix)), np.array(per_prefix)


@settings(max_examples=40)
@given(
    dims=dims_strategy,
    classes=st.integers(1, 5),
    batch=st.integers(1, 4),
    extra=st.integers(0, 5),
    shared=st.booleans(),
    bias=st.booleans(),
    fused=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_logits_and_gradients_equal_the_formula(
    *, dims, classes, batch, extra, shared, bias, fused, seed
):
    torch.manual_seed(seed)
    head = NestedLinear(dims, classes, shared, bias).double()
    x = torch.randn(batch, dims[-1] + extra, dtype=torch.float64, requires_grad=True)
    weights = [h.weight.detach().numpy() for h in head.heads]
    biases = [h.bias.detach().numpy() if bias else np.zeros(classes) for h in head.heads]
    logits = nested_logits(x, [(h.weight, h.bias) for h in head.heads], dims, fused)
    assert logits.shape == (len(dims), batch, classes), "logits are not [G, B, C]"
    features = x.detach().numpy()
    np.testing.assert_allclose(
        logits.detach(), oracle_logits(features, weights, biases, dims), rtol=0, atol=1e-12
    )
    assert torch.equal(head(x), nested_logits(x, [(h.weight, h.bias) for h in head.heads], dims))

    # of sum(slope * logits), by the product rule
    slope = torch.randn_like(logits)
    logits.backward(slope)
    to_features, to_weights = np.zeros_like(features), [np.zeros_like(w) for w in weights]
    for g, d in enumerate(dims):
        k = 0 if len(weights) == 1 else g
        to_features[:, :d] += slope[g].numpy() @ weights[k][:, :d]
        to_weights[k][:, :d] += slope[g].numpy().T @ features[:, :d]
    np.testing.assert_allclose(x.grad, to_features, rtol=0, atol=1e-12)
    for k, h in enumerate(head.heads):
        np.testing.assert_allclose(h.weight.grad, to_weights[k], rtol=0, atol=1e-12)
        if bias:
            of = slope if len(weights) == 1 else slope[k : k + 1]
            np.testing.assert_allclose(h.bias.grad, of.numpy().sum((0, 1)), rtol=0, atol=1e-12)


@settings(max_examples=40)
@given(
    g=st.integers(1, 4),
    n=st.integers(1, 4),
    c=st.integers(2, 5),
    smoothing=st.sampled_from([0.0, 0.1, 0.7]),
    weighted=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_loss_equals_the_formula(*, g, n, c, smoothing, weighted, seed):
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(size=(g, n, c)) * 4, rng.integers(0, c, n)
    weights = rng.uniform(0.1, 2, g) if weighted else np.ones(g)
    total, per_prefix = oracle_loss(logits, labels, weights, smoothing)
    ours, ours_each = nested_cross_entropy(
        torch.tensor(logits),
        torch.tensor(labels),
        torch.tensor(weights) if weighted else None,
        smoothing,
    )
    assert ours.item() == pytest.approx(total, rel=1e-12, abs=1e-12), (
        "loss differs from the formula"
    )
    np.testing.assert_allclose(ours_each, per_prefix, rtol=1e-12, atol=1e-12)


def test_gradients_equal_finite_differences():
    torch.manual_seed(0)
    for shared in (False, True):
        head = NestedLinear((2, 5), 3, shared).double()
        params = [p.detach().clone().requires_grad_() for p in head.parameters()]
        x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
        labels = torch.tensor([0, 2, 1, 1])

        def loss(x, *params, labels=labels):
            heads = list(zip(params[::2], params[1::2], strict=True))
            return nested_cross_entropy(
                nested_logits(x, heads, (2, 5)), labels, torch.tensor([2.0, 1.0]), 0.1
            )[0]

        assert torch.autograd.gradcheck(loss, (x, *params))


def test_dims():
    assert default_dims(2048) == (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
    assert default_dims(2048, 16)[0] == 16, "start is not the first prefix"
    assert default_dims(384) == (8, 16, 32, 64, 128, 256, 384)
    assert default_dims(8) == (8,)
    for bad in ((), (0, 8), (8, 8), (16, 8), (8, 4096)):
        with pytest.raises(ValueError, match="dims"):
            check_dims(bad, 2048)
    with pytest.raises(ValueError, match="columns"):
        NestedLinear((4, 8), 2)(torch.zeros(1, 7))


# ---------------------------------------------------------------- the paper's names


@pytest.mark.parametrize("efficient", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_public_layer(efficient, bias):
    torch.manual_seed(1)
    dims = [2, 3, 7]
    layer = MRL.MRL_Linear_Layer(dims, num_classes=4, efficient=efficient, bias=bias).double()
    expected = {f"nesting_classifier_{i}.weight" for i in range(1 if efficient else 3)}
    assert {k for k in layer.state_dict() if k.endswith("weight")} == expected
    assert (layer.nesting_list, layer.num_classes, layer.efficient) == (dims, 4, efficient)
    out = layer(x := torch.randn(5, 7, dtype=torch.float64))
    assert isinstance(out, tuple)
    assert [tuple(o.shape) for o in out] == [(5, 4)] * 3, "shapes of the three outputs"
    heads = (
        [layer.nesting_classifier_0]
        if efficient
        else [getattr(layer, f"nesting_classifier_{i}") for i in range(3)]
    )
    biases = [h.bias.detach().numpy() if bias else np.zeros(4) for h in heads]
    oracle = oracle_logits(x.numpy(), [h.weight.detach().numpy() for h in heads], biases, dims)
    np.testing.assert_allclose(torch.stack(out).detach(), oracle, rtol=0, atol=1e-12)
    before = heads[0].weight.clone()
    layer.reset_parameters()
    assert not torch.equal(before, heads[0].weight)


@pytest.mark.parametrize("importance", [None, [2.0, 1.0, 0.5]])
def test_public_loss(importance):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(3, 6, 5)), rng.integers(0, 5, 6)
    total, _ = oracle_loss(logits, labels, importance or [1, 1, 1], 0.1)
    loss = MRL.Matryoshka_CE_Loss(relative_importance=importance, label_smoothing=0.1)
    output = torch.tensor(logits)
    assert loss(output, torch.tensor(labels)).item() == pytest.approx(total, abs=1e-12), (
        "loss of a tensor"
    )
    assert loss(tuple(output), torch.tensor(labels)).item() == pytest.approx(total, abs=1e-12), (
        "loss of a tuple"
    )
    with pytest.raises(ValueError, match="relative_importance"):
        MRL.Matryoshka_CE_Loss(relative_importance=[1.0])(output, torch.tensor(labels))


def test_fixed_feature_layer():
    layer = MRL.FixedFeatureLayer(3, 2).double()
    assert set(layer.state_dict()) == {"weight", "bias"}
    x = torch.randn(4, 8, dtype=torch.float64)
    oracle = oracle_logits(
        x.numpy(), [layer.weight.detach().numpy()], [layer.bias.detach().numpy()], (3,)
    )[0]
    np.testing.assert_allclose(layer(x).detach(), oracle, rtol=0, atol=1e-12)
