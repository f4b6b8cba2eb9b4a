"""The linear probe against scikit-learn and SciPy; gradients by finite differences."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import approx_fprime, minimize
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from matryoshka.evaluation import probe as probing
from matryoshka.evaluation.probe import ProbeError, choose_weight_decay, fit

DIMS = (2, 5, 9)


def samples(n=150, width=9, classes=4, seed=0):
    """Overlapping clusters, with very different scales and offsets: (float32 [N, D], int64 [N])."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, n - classes)])
    x = rng.normal(size=(classes, width))[labels] + rng.normal(size=(n, width))
    x = x * 10.0 ** rng.integers(-2, 3, width) + 3 * rng.normal(size=width)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(labels)


def cross_entropy(logits, labels):
    """Mean over the rows, by the formula."""
    return np.mean(
        [
            np.log(np.exp(row - row.max()).sum()) + row.max() - row[y]
            for row, y in zip(logits, labels, strict=True)
        ]
    )


def standardised(x, shared):
    x = x.double().numpy()
    centre = np.zeros(x.shape[1]) if shared else x.mean(0)
    return (x - centre) / np.sqrt(((x - centre) ** 2).mean(0)), centre


def objective(weight, bias, z, labels, *, dims, decay):
    """The objective of one head that serves `dims`: weight [C, max(dims)], bias [C]."""
    losses = [
        cross_entropy(np.stack([weight[:, :d] @ row[:d] + bias for row in z]), labels) for d in dims
    ]
    return sum(losses) + decay / 2 * (weight**2).sum()


def of_z(head, x, shared):
    """Weight and bias of the standardised features."""
    weight, bias = (part.numpy() for part in head)
    _, centre = standardised(x, shared)
    d = weight.shape[1]
    scale = np.sqrt(((x.double().numpy() - centre) ** 2).mean(0))
    return weight * scale[:d], bias + weight @ centre[:d]


# ---------------------------------------------------------------- the minimiser


@pytest.mark.parametrize("decay", [1e-1, 1e-2, 1e-3])
def test_mrl_is_scikit_learns_logistic_regression_on_each_prefix(decay):
    x, y = samples()
    probe = fit(x, y, DIMS, 4, decay, tolerance=1e-7)
    assert probe.converged == [True] * 3, "not converged"
    for g, (d, head) in enumerate(zip(DIMS, probe.heads, strict=True)):
        scaled = StandardScaler().fit_transform(x[:, :d].double().numpy())
        oracle = LogisticRegression(C=1 / (len(x) * decay), tol=1e-10, max_iter=10000).fit(
            scaled, y.numpy()
        )
        expected = oracle.decision_function(scaled)
        logits = x[:, :d].double().numpy() @ head[0].numpy().T + head[1].numpy()
        logits -= logits.mean(1, keepdims=True)  # equal up to a shift of all classes
        np.testing.assert_allclose(logits, expected - expected.mean(1, keepdims=True), atol=2e-4)
        weight, bias = of_z(head, x, False)
        np.testing.assert_allclose(
            weight - weight.mean(0), oracle.coef_ - oracle.coef_.mean(0), atol=1e-4
        )
        ours = objective(weight, bias, scaled, y.numpy(), dims=[d], decay=decay)
        theirs = objective(
            oracle.coef_, oracle.intercept_, scaled, y.numpy(), dims=[d], decay=decay
        )
        assert ours <= theirs + 1e-9, f"prefix {d}: scikit-learn has a lower objective"
        assert probe.loss[g] == pytest.approx(cross_entropy(logits, y.numpy()), abs=1e-9), (
            f"prefix {d}: loss differs from the formula"
        )


def test_mrl_e_is_the_minimum_of_its_written_objective():
    x, y = samples(n=60, width=5, classes=3)
    dims, decay = (1, 3, 5), 0.01
    probe = fit(x, y, dims, 3, decay, shared=True, tolerance=1e-7)
    z, _ = standardised(x, True)
    assert len(probe.heads) == 1

    def flat(p):
        return objective(p[:15].reshape(3, 5), p[15:], z, y.numpy(), dims=dims, decay=decay)

    best = minimize(flat, np.zeros(18), method="BFGS", options={"gtol": 1e-6})
    weight, bias = of_z(probe.heads[0], x, True)
    assert flat(np.concatenate([weight.ravel(), bias])) <= best.fun + 1e-9, (
        "SciPy has a lower objective"
    )
    np.testing.assert_allclose(weight, best.x[:15].reshape(3, 5), atol=1e-3)
    for loss, d in zip(probe.loss, dims, strict=True):
        logits = (
            x[:, :d].double().numpy() @ probe.heads[0][0][:, :d].numpy().T
            + probe.heads[0][1].numpy()
        )
        assert loss == pytest.approx(cross_entropy(logits, y.numpy()), abs=1e-9), (
            f"prefix {d}: loss differs from the formula"
        )
    apart = fit(x, y, dims, 3, decay, tolerance=1e-7)
    assert not np.allclose(apart.loss, probe.loss, atol=1e-3), (
        "MRL and MRL-E are equal: the test is vacuous"
    )


@settings(max_examples=25)
@given(st.data())
def test_objective_and_gradient_by_finite_differences(data):
    n, width, classes = (
        data.draw(st.integers(low, high)) for low, high in ((3, 9), (1, 5), (2, 4))
    )
    dims = sorted(data.draw(st.sets(st.integers(1, width), min_size=1)))
    shared = data.draw(st.booleans()) and len(dims) > 1
    decay = data.draw(st.sampled_from([0.0, 0.3]))
    x, y = samples(
        n=max(n, classes), width=width, classes=classes, seed=data.draw(st.integers(0, 99))
    )
    parts = probing._Standardised(x, y, centred=not shared)
    problem = probing._Problem(parts, tuple(dims) if shared else (dims[-1],), classes, decay)
    problem.rows = data.draw(st.integers(1, 5))
    rng = np.random.default_rng(0)
    point = rng.normal(size=classes * (dims[-1] + 1))
    with torch.no_grad():
        problem.weight.copy_(torch.tensor(point[classes:].reshape(classes, -1)))
        problem.bias.copy_(torch.tensor(point[:classes]))
    z, _ = standardised(x, shared)

    def flat(p):
        return objective(
            p[classes:].reshape(classes, -1),
            p[:classes],
            z,
            y.numpy(),
            dims=problem.dims,
            decay=decay,
        )

    value, losses, (by_weight, by_bias) = problem.evaluate()
    assert float(value) == pytest.approx(flat(point), rel=1e-9), (
        "objective differs from the formula"
    )
    assert float(losses.sum()) == pytest.approx(
        float(value) - decay / 2 * (point[classes:] ** 2).sum(), rel=1e-9
    ), "losses differ from the objective without decay"
    gradient = np.concatenate([by_bias.numpy(), by_weight.numpy().ravel()])
    np.testing.assert_allclose(gradient, approx_fprime(point, flat, 1e-7), atol=1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_the_reported_gradient(shared):
    x, y = samples(n=40, width=4, classes=3)
    dims, decay = (2, 4), 0.05
    probe = fit(x, y, dims, 3, decay, shared=shared, max_iter=3, tolerance=1e-9)
    assert probe.converged == [False, False]
    assert probe.iterations == [3, 3], "max_iter is not kept"
    z, _ = standardised(x, shared)
    for head, served in zip(probe.heads, [dims] if shared else [(d,) for d in dims], strict=True):
        weight, bias = of_z(head, x, shared)
        d = served[-1]

        def flat(p, served=served, d=d):
            return objective(p[:-3].reshape(3, d), p[-3:], z, y.numpy(), dims=served, decay=decay)

        here = np.abs(approx_fprime(np.concatenate([weight.ravel(), bias]), flat, 1e-7)).max()
        start = np.abs(approx_fprime(np.zeros(3 * d + 3), flat, 1e-7)).max()
        assert probe.gradient[dims.index(d)] == pytest.approx(here / start, abs=1e-5), (
            f"prefix {d}: gradient differs from finite differences"
        )
    enough = fit(x, y, dims, 3, decay, shared=shared, tolerance=1e-6)
    assert enough.converged == [True, True]
    assert max(enough.gradient) <= 1e-6, "gradient above the tolerance"


def test_each_prefix_has_its_own_decay():
    x, y = samples()
    both = fit(x, y, (3, 9), 4, [1e-1, 1e-3])
    for g, (d, decay) in enumerate(((3, 1e-1), (9, 1e-3))):
        alone = fit(x, y, (d,), 4, decay)
        torch.testing.assert_close(both.heads[g][0], alone.heads[0][0])
        assert both.weight_decay[g] == decay, f"prefix {d}: another decay"


def test_blocks_and_subsets_do_not_change_it(monkeypatch):
    x, y = samples()
    kept = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))[:70]
    before = x.clone()
    rows = max(1, 100 // (DIMS[-1] + 4 * 4))
    whole = [
        fit(x[kept], y[kept], DIMS, 4, 0.01, tolerance=1e-8, shared=shared)
        for shared in (False, True)
    ]
    monkeypatch.setattr(probing, "_TILE", 100)
    assert probing._Problem(probing._Standardised(x, y), (9,), 4, 0).rows == rows, "rows in a block"
    for shared in (False, True):
        part = fit(x, y, DIMS, 4, 0.01, subset=kept, tolerance=1e-8, shared=shared)
        for a, b in zip(part.heads, whole[shared].heads, strict=True):
            torch.testing.assert_close(a[0], b[0], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(a[1], b[1], atol=1e-4, rtol=1e-4)
    assert torch.equal(x, before), "the features were changed"


@pytest.mark.parametrize("shared", [False, True])
def test_sgd_approaches_the_same_minimum(shared):
    x, y = samples(n=400)
    exact = fit(x, y, DIMS, 4, 0.01, shared=shared, tolerance=1e-7)
    one = fit(x, y, DIMS, 4, 0.01, shared=shared, solver="sgd", epochs=60, batch_size=100, seed=1)
    again = fit(x, y, DIMS, 4, 0.01, shared=shared, solver="sgd", epochs=60, batch_size=100, seed=1)
    other = fit(x, y, DIMS, 4, 0.01, shared=shared, solver="sgd", epochs=60, batch_size=100, seed=2)
    z, _ = standardised(x, shared)
    for a, b, served in zip(
        one.heads, exact.heads, [DIMS] if shared else [(d,) for d in DIMS], strict=True
    ):
        near, least = (
            objective(*of_z(head, x, shared), z, y.numpy(), dims=served, decay=0.01)
            for head in (a, b)
        )
        assert least - 1e-9 <= near < least + 0.02 * len(served), "SGD is far from the minimum"
    assert all(torch.equal(a[0], b[0]) for a, b in zip(one.heads, again.heads, strict=True)), (
        "the same seed gives other weights"
    )
    assert not torch.equal(one.heads[0][0], other.heads[0][0]), (
        "another seed gives the same weights"
    )
    assert one.iterations == [240] * 3, "number of steps"
    assert all(small < large for small, large in zip(exact.gradient, one.gradient, strict=True)), (
        "SGD has a smaller gradient than L-BFGS"
    )
    slow = fit(x, y, DIMS, 4, 0.01, shared=shared, solver="sgd", epochs=1, batch_size=100, lr=1e-6)
    assert min(slow.gradient) > 0.99, "a tiny rate must leave the gradient as it was"


def test_the_curvature_bounds_the_hessian():
    """The largest eigenvalue of the Hessian at random points, by autograd."""
    x, y = samples(n=80, width=6, classes=3)
    problem = probing._Problem(probing._Standardised(x, y, centred=False), (3, 6), 3, 0.1)
    z = problem.data.take(slice(None), 6)[0]
    for seed in range(5):
        p = torch.randn(
            21, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        ) * 10.0 ** (seed - 4)

        def flat(p):
            weight, bias = p[:18].view(3, 6), p[18:]
            loss = sum(
                torch.nn.functional.cross_entropy(z[:, :d] @ weight[:, :d].T + bias, y)
                for d in (3, 6)
            )
            return loss + 0.05 * weight.square().sum()

        hessian = torch.autograd.functional.hessian(flat, p)
        assert torch.linalg.eigvalsh(hessian)[-1] <= problem.curvature(z) * (1 + 1e-6), (
            f"seed {seed}: the bound is below the largest eigenvalue"
        )


def test_single_precision_is_close():
    x, y = samples()
    single = fit(x, y, DIMS, 4, 0.01, dtype=torch.float32, tolerance=1e-3)
    exact = fit(x, y, DIMS, 4, 0.01)
    np.testing.assert_allclose(single.loss, exact.loss, atol=1e-3)
    assert single.heads[0][0].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_unreachable_tolerance_does_no_harm(dtype):
    x, y = samples()
    least = fit(x, y, DIMS, 4, 0.01, dtype=dtype, tolerance=1e-300, max_iter=200)
    exact = fit(x, y, DIMS, 4, 0.01)
    assert least.converged == [False] * 3
    assert min(least.iterations) > 5, "stopped too early"
    np.testing.assert_allclose(least.loss, exact.loss, atol=1e-3)


def test_constant_features_get_no_weight():
    x, y = samples()
    x[:, 1], x[:, 4] = 0.1, 0.0
    probe = fit(x, y, DIMS, 4, 0.01)
    assert all(bool(torch.isfinite(weight).all()) for weight, _ in probe.heads)
    assert float(probe.heads[-1][0][:, [1, 4]].abs().max()) < 1e-6, (
        "a constant feature has a weight"
    )
    nothing = fit(torch.ones(8, 2), torch.arange(8) % 4, (1, 2), 4)
    assert (nothing.converged, nothing.loss) == ([True] * 2, [pytest.approx(np.log(4))] * 2), (
        "constant features give chance level"
    )


def test_the_head_is_a_module():
    x, y = samples()
    for shared in (False, True):
        probe = fit(x, y, DIMS, 4, 0.1, shared=shared)
        head = probe.head()
        assert (head.dims, head.shared, len(head.heads)) == (DIMS, shared, 1 if shared else 3)
        logits = head(x).detach()
        for g, d in enumerate(DIMS):
            weight, bias = probe.heads[0 if shared else g]
            torch.testing.assert_close(
                logits[g],
                (x[:, :d].double() @ weight[:, :d].T + bias).float(),
                atol=1e-3,
                rtol=1e-3,
            )


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"num_classes": 1, "labels": torch.zeros(20, dtype=torch.int64)},
            ProbeError,
            "only one class",
        ),
        ({"nan": True}, ProbeError, "not finite"),
        ({"tolerance": 0}, ProbeError, "tolerance=0: expected more than 0"),
        ({"tolerance": -1.0}, ProbeError, "tolerance=-1.0"),
        ({"tolerance": float("nan")}, ProbeError, "tolerance=nan"),
        ({"num_classes": 3}, ValueError, "labels from 0 to 3"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, ValueError, "3 labels for 20"),
        ({"dims": (4, 10)}, ValueError, "beyond the feature width 9"),
        ({"solver": "newton"}, ValueError, "lbfgs, sgd"),
        ({"weight_decay": [0.1, 0.2]}, ValueError, "weight_decay"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay"),
        ({"weight_decay": [0.1, 0.2, 0.3], "shared": True}, ValueError, "weight_decay"),
    ],
)
def test_inconsistent_arguments(change, error, words):
    x, y = samples(n=20)
    if change.pop("nan", False):
        x[3, 2] = float("nan")
    call = {"features": x, "labels": y, "dims": DIMS, "num_classes": 4} | change
    with pytest.raises(error, match=words):
        fit(**call)


@pytest.mark.parametrize("shared", [False, True])
def test_the_decay_is_chosen_on_a_held_out_tenth(shared):
    x, y = samples(n=200)
    candidates = (1e-3, 3e-2, 1.0)
    chosen, top1 = choose_weight_decay(x, y, DIMS, 4, candidates, seed=5, shared=shared)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(5))
    held_out, rest = order[:20], order[20:]
    for c, decay in enumerate(candidates):
        probe = fit(x[rest], y[rest], DIMS, 4, decay, shared=shared)
        logits = probe.head()(x[held_out])
        assert top1[c] == [
            pytest.approx(100 * float((row.argmax(1) == y[held_out]).float().mean()))
            for row in logits
        ], f"decay {decay}: held-out accuracy differs"
    best = np.array(top1).sum(1, keepdims=True).repeat(3, 1) if shared else np.array(top1)
    assert len(chosen) == 3, "one decay for each prefix"
    for g, decay in enumerate(chosen):
        assert best[candidates.index(decay), g] == best[:, g].max(), (
            f"prefix {g}: a better decay was not chosen"
        )
    with pytest.raises(ProbeError, match="one training image"):
        choose_weight_decay(x[:1], y[:1], DIMS, 4, candidates)
