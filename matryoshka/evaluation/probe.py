"""Linear classifiers on the prefixes of frozen features: the linear probe, a nested head for any
backbone.

    probe = fit(features, labels, dims=(8, 64, 512), num_classes=10, weight_decay=1e-4)
    model.head = probe.head()                                # a NestedLinear

What is minimised, for features x [N, D], labels y and z = (x - centre) / scale (each feature by its
own):

    MRL     for each prefix d on its own:  mean_i cross_entropy(W_d z_i[:d] + b_d, y_i) + weight_decay / 2 |W_d|^2
    MRL-E   sum over the prefixes d of     mean_i cross_entropy(W[:, :d] z_i[:d] + b, y_i), + weight_decay / 2 |W|^2

|W|: Frobenius norm; biases do not decay. centre: the mean; 0 for MRL-E, whose prefixes share one
bias, which cannot undo a shift. scale: the root mean square of x - centre. For MRL that is
scikit-learn's LogisticRegression with C = 1 / (N weight_decay) behind its StandardScaler. Convex:
the minimum does not depend on the solver, only the distance to it. The classifiers come back for x:
W / scale, and b - (W / scale) centre.

Dimension legend: G prefixes, N images, C classes, D features, H heads (G, or 1 for MRL-E).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from matryoshka.evaluation.probe_options import SOLVERS
from matryoshka.nested import Head, NestedLinear, check_dims, nested_cross_entropy, nested_logits

_TILE = 1 << 25  # numbers in the largest intermediate


class ProbeError(ValueError):
    """Features or labels that nothing can be fitted to."""

    user_error = True


class Probe(NamedTuple):
    """Classifiers of the features as they were given, and how near to the minimum they are.

    heads: H of (weight [C, d], bias [C]). loss: mean cross-entropy of each prefix, without the
    decay. gradient: the largest entry of the gradient of the objective (by W of z, and b), as a
    share of that at zero weights; converged: whether it is at most the tolerance. weight_decay,
    iterations (SGD: steps). Lists have one entry per prefix; of MRL-E, which is one problem, only
    the losses differ.
    """

    dims: tuple[int, ...]
    heads: list[Head]
    loss: list[float]
    gradient: list[float]
    converged: list[bool]
    iterations: list[int]
    weight_decay: list[float]

    def head(self) -> NestedLinear:
        """The classifiers as a module, float32, on the CPU."""
        head = NestedLinear(
            self.dims, len(self.heads[0][0]), shared=len(self.heads) < len(self.dims)
        )
        with torch.no_grad():
            for linear, (weight, bias) in zip(head.heads, self.heads, strict=True):
                linear.get_parameter("weight").copy_(weight)
                linear.get_parameter("bias").copy_(bias)  # type: ignore[arg-type]
        return head


class _Data:
    """Blocks of (z, labels), standardised when they are needed: features are neither copied nor
    changed.
    """

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        subset: Tensor | None,
        shared: bool,
        device: torch.device | None,
        dtype: torch.dtype,
    ) -> None:
        self.features, self.labels, self.subset = features, labels, subset
        self.device, self.dtype = device or features.device, dtype
        self.count = len(features) if subset is None else len(subset)
        width = features.shape[1]
        self.centre = torch.zeros(width, dtype=dtype, device=self.device)
        self.scale = torch.ones(width, dtype=dtype, device=self.device)
        rows = max(1, _TILE // max(width, 1))
        mean, square = torch.zeros_like(self.centre), torch.zeros_like(self.centre)
        for x, _ in self.blocks(rows, width):
            mean += x.sum(0) / self.count
        if not shared:
            self.centre = mean
        for x, _ in self.blocks(rows, width):
            square += x.square().sum(0) / self.count
        size = square.sqrt()
        if not bool(torch.isfinite(size).all()):
            raise ProbeError(
                "the features have numbers that are not finite; use another checkpoint, or "
                "precision fp32"
            )
        # a feature that is constant but for rounding carries nothing: scaled up, it would be noise
        self.scale = torch.where(size > 1e-6 * mean.abs(), size, 1).where(size > 0, 1)

    def take(self, rows: Tensor | slice, width: int) -> tuple[Tensor, Tensor]:
        """(z [B, width], labels [B]); rows count in the subset."""
        if self.subset is not None:
            rows = self.subset[rows]
        x = self.features[rows, :width].to(self.device, self.dtype)
        return (x - self.centre[:width]) / self.scale[:width], self.labels[rows].to(self.device)

    def blocks(self, rows: int, width: int) -> Iterator[tuple[Tensor, Tensor]]:
        for first in range(0, self.count, rows):
            yield self.take(slice(first, min(first + rows, self.count)), width)

    def unscaled(self, weight: Tensor, bias: Tensor) -> Head:
        """The classifier of x for that of z."""
        weight = weight / self.scale[: weight.shape[1]]
        return weight, bias - weight @ self.centre[: weight.shape[1]]


class _Problem:
    """The objective of one head, which serves `dims`, and its minimisers so far: weight [C, d],
    bias [C], of z.
    """

    def __init__(
        self, data: _Data, dims: tuple[int, ...], num_classes: int, weight_decay: float
    ) -> None:
        self.data, self.dims, self.weight_decay = data, dims, weight_decay
        kind = {"dtype": data.dtype, "device": data.device}
        self.weight = torch.zeros(num_classes, dims[-1], **kind).requires_grad_()
        self.bias = torch.zeros(num_classes, **kind).requires_grad_()
        self.rows = max(1, _TILE // (dims[-1] + 4 * len(dims) * num_classes))
        self.iterations = 0

    def evaluate(self) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """(objective, mean cross-entropy of each prefix [G], its gradient by weight and bias), in
        one pass.
        """
        decayed = self.weight.detach()
        losses = torch.zeros(len(self.dims), dtype=decayed.dtype, device=decayed.device)
        by_weight, by_bias = self.weight_decay * decayed, torch.zeros_like(self.bias)
        for z, labels in self.data.blocks(self.rows, self.dims[-1]):
            share = len(labels) / self.data.count
            with torch.enable_grad():
                logits = nested_logits(z, [(self.weight, self.bias)], self.dims, fused=False)
                total, per_prefix = nested_cross_entropy(logits, labels)
                parts = torch.autograd.grad(share * total, (self.weight, self.bias))
            losses += share * per_prefix
            by_weight += parts[0]
            by_bias += parts[1]
        return (
            losses.sum() + self.weight_decay / 2 * decayed.square().sum(),
            losses,
            (by_weight, by_bias),
        )

    def curvature(self, sample: Tensor) -> float:
        """A bound of the objective's second derivatives: half the largest eigenvalue of mean z z^T
        (z with a 1), as softmax's are at most 1/2; summed over the prefixes, plus the decay.
        Estimated on `sample` [n, D].
        """
        bound = self.weight_decay
        for d in self.dims:
            z = torch.cat([sample[:, :d], sample.new_ones(len(sample), 1)], dim=1)
            direction = z.sum(0)
            for _ in range(50):  # power iteration
                direction = z.T @ (z @ (direction / direction.norm())) / len(z)
            bound += float(direction.norm()) / 2
        return bound


def fit(
    features: Tensor,
    labels: Tensor,
    dims: Sequence[int],
    num_classes: int,
    weight_decay: float | Sequence[float] = 0.0,
    *,
    solver: str = "lbfgs",
    shared: bool = False,
    max_iter: int = 1000,
    tolerance: float = 1e-4,
    epochs: int = 20,
    lr: float | None = None,
    batch_size: int = 1024,
    seed: int = 0,
    subset: Tensor | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float64,
) -> Probe:
    """Minimise the objective above from zero weights. Deterministic, on one device.

    features [N, D] float and labels int64 [N] in 0..C-1, on any device; subset: int64 [n], the rows
    that count. weight_decay: one, or one for each prefix (not for MRL-E). shared: MRL-E. lbfgs:
    full batch with a strong Wolfe line search, to `tolerance` (see Probe.gradient) or `max_iter`
    iterations. sgd: `epochs` of mini-batches with Nesterov's momentum 0.9 and a cosine to 0; lr:
    None for 1 / the largest curvature, of each head. For sets that a few hundred passes would take
    too long for. device: where products are computed, default where the features are; blocks travel
    there. dtype: of everything; float32, for devices without fast float64, ends at gradients of
    about 1e-3. ProbeError for features that are not finite, fewer than two classes, or a tolerance
    that is not above 0; ValueError for arguments that do not fit.
    """
    dims = check_dims(dims, features.shape[1])
    shared = shared and len(dims) > 1
    if not tolerance > 0:
        raise ProbeError(f"tolerance={tolerance}: expected more than 0")
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r}: expected one of {', '.join(SOLVERS)}")
    decays: list[float] = (
        list(weight_decay) if isinstance(weight_decay, Sequence) else [weight_decay] * len(dims)
    )
    if len(decays) != len(dims) or (shared and len(set(decays)) > 1) or min(decays) < 0:
        raise ValueError(
            f"weight_decay {decays}: expected one of 0 or more, or, without shared, {len(dims)} "
            "of them"
        )
    _check_labels(labels, len(features), num_classes)
    place = features.device
    data = _Data(
        features,
        labels.to(place),
        None if subset is None else subset.to(place),
        shared,
        device,
        dtype,
    )
    served = [dims] if shared else [(d,) for d in dims]
    problems = [
        _Problem(data, own, num_classes, decay) for own, decay in zip(served, decays, strict=False)
    ]
    starts = [_largest(problem.evaluate()[2]) for problem in problems]
    if solver == "lbfgs":
        for problem, start in zip(problems, starts, strict=True):
            # below the rounding of its terms a gradient says nothing, and in units of less its
            # squares overflow
            _lbfgs(problem, max_iter, max(tolerance, torch.finfo(dtype).eps) * start)
    else:
        _sgd(problems, data, epochs, lr, batch_size, seed)
    losses, gradients = [], []
    for problem, start in zip(problems, starts, strict=True):
        _, loss, gradient = problem.evaluate()
        losses += loss.tolist()
        gradients += [_largest(gradient) / start if start else 0.0] * len(problem.dims)
    return Probe(
        dims,
        [data.unscaled(problem.weight.detach(), problem.bias.detach()) for problem in problems],
        losses,
        gradients,
        [g <= tolerance for g in gradients],
        [problem.iterations for problem in problems for _ in problem.dims],
        decays,
    )


def _check_labels(labels: Tensor, count: int, num_classes: int) -> None:
    if len(labels) != count or count == 0:
        raise ValueError(
            f"{len(labels)} labels for {count} features: expected as many, and at least one"
        )
    if num_classes < 2:
        raise ProbeError(
            "there is only one class, nothing to tell apart; give data with two or more"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(f"labels from {low} to {high}: expected 0 to {num_classes - 1}")


def _largest(gradient: tuple[Tensor, Tensor]) -> float:
    return max(float(part.abs().max()) for part in gradient)


# ---------------------------------------------------------------- solvers


def _lbfgs(problem: _Problem, max_iter: int, goal: float) -> None:
    """Until the largest entry of the gradient is at most `goal`."""
    if goal == 0:  # zero weights are the minimum
        return
    optimizer = torch.optim.LBFGS(
        [problem.weight, problem.bias],
        lr=1,
        max_iter=max_iter,
        max_eval=2 * max_iter + 20,
        tolerance_grad=1,
        tolerance_change=0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        objective, _, (by_weight, by_bias) = problem.evaluate()
        # in units of the goal: the optimizer's own thresholds are absolute, and would end its
        # progress before
        problem.weight.grad, problem.bias.grad = by_weight / goal, by_bias / goal
        return objective / goal

    optimizer.step(closure)  # type: ignore[arg-type]
    problem.iterations = optimizer.state[problem.weight]["n_iter"]


def _sgd(
    problems: list[_Problem], data: _Data, epochs: int, lr: float | None, batch_size: int, seed: int
) -> None:
    """All heads with the same mini-batches: one pass over the features an epoch."""
    rng = torch.Generator().manual_seed(seed)
    place = data.features.device
    sample, _ = data.take(
        torch.randperm(data.count, generator=rng)[:4096].to(place), problems[-1].dims[-1]
    )
    dims = tuple(d for problem in problems for d in problem.dims)
    groups, rates = [], []
    for problem in problems:
        rate = lr or 1 / max(problem.curvature(sample), 1e-12)
        groups += [
            {"params": [problem.weight], "weight_decay": problem.weight_decay},
            {"params": [problem.bias]},
        ]
        rates += [rate, rate]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    steps, step = epochs * math.ceil(data.count / batch_size), 0
    for _ in range(epochs):
        order = torch.randperm(data.count, generator=rng).to(place)
        for rows in order.split(batch_size):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
            z, labels = data.take(rows, dims[-1])
            logits = nested_logits(
                z, [(problem.weight, problem.bias) for problem in problems], dims
            )
            optimizer.zero_grad(set_to_none=True)
            nested_cross_entropy(logits, labels)[0].backward()
            optimizer.step()
            step += 1
    for problem in problems:
        problem.iterations = steps


# ---------------------------------------------------------------- the decay


def choose_weight_decay(
    features: Tensor,
    labels: Tensor,
    dims: Sequence[int],
    num_classes: int,
    candidates: Sequence[float],
    *,
    seed: int = 0,
    shared: bool = False,
    **options,
) -> tuple[list[float], list[list[float]]]:
    """(the best decay for each prefix, held-out top-1 % [candidates][G]); options: those of fit.

    A tenth of the rows, drawn by `seed`, is held out; what is best there in top-1 wins, then in
    cross-entropy, for each prefix; for MRL-E in the sum over the prefixes.
    """
    if len(features) < 2:
        raise ProbeError(
            "one training image is not enough to hold some out; give probe.weight_decay one value"
        )
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed)).to(
        features.device
    )
    labels = labels.to(features.device)
    held_out, rest = order.tensor_split([max(1, len(order) // 10)])
    hits, losses = [], []
    for decay in candidates:
        probe = fit(
            features,
            labels,
            dims,
            num_classes,
            decay,
            subset=rest,
            shared=shared,
            seed=seed,
            **options,
        )
        right, loss = 0, 0
        for rows in held_out.split(
            max(1, _TILE // (features.shape[1] + 4 * len(dims) * num_classes))
        ):
            weight = probe.heads[0][0]
            x, y = features[rows].to(weight.device, weight.dtype), labels[rows].to(weight.device)
            logits = nested_logits(x, probe.heads, probe.dims, fused=False)
            right = right + (logits.argmax(2) == y).sum(1)
            loss = loss + nested_cross_entropy(logits, y)[1] * len(y)
        hits.append(torch.as_tensor(right).tolist())
        losses.append(torch.as_tensor(loss).tolist())
    ranks = [
        [(-h, loss) for h, loss in zip(*rows, strict=True)]
        for rows in zip(hits, losses, strict=True)
    ]
    if shared:
        ranks = [[tuple(map(sum, zip(*row, strict=True)))] * len(dims) for row in ranks]
    best = [min(range(len(candidates)), key=lambda c, g=g: ranks[c][g]) for g in range(len(dims))]
    top1 = [[100 * h / len(held_out) for h in row] for row in hits]
    return [candidates[c] for c in best], top1
