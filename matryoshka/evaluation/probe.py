"""Linear probe: nested linear classifiers fitted to frozen features of any backbone.

    probe = fit(features, labels, dims=(8, 64, 512), num_classes=10, weight_decay=1e-4)
    model.head = probe.head()                                # a NestedLinear

For features x [N, D], labels y and z = (x - centre) / scale (per feature), minimises

    MRL     separately for each prefix d:
            mean_i cross_entropy(W_d z_i[:d] + b_d, y_i) + weight_decay / 2 |W_d|^2
    MRL-E   sum over the prefixes d of mean_i cross_entropy(W[:, :d] z_i[:d] + b, y_i),
            + weight_decay / 2 |W|^2

|W|: Frobenius norm; biases do not decay. centre: the mean, but 0 for MRL-E, whose prefixes share
one bias, which cannot compensate a shift for each of them. scale: root mean square of x - centre.
For MRL this equals scikit-learn's LogisticRegression with C = 1 / (N weight_decay) after its
StandardScaler. The objective is convex: the minimum does not depend on the solver. The returned
classifiers are for x: W / scale, and b - (W / scale) centre.

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

_TILE = 1 << 25  # numbers in the largest intermediate: 256 MB of float64
CURVATURE_SAMPLE = 4096  # images on which SGD estimates the largest curvature

Gradient = tuple[Tensor, Tensor]  # by weight [C, d] and by bias [C]


class ProbeError(ValueError):
    """Features or labels that cannot be fitted; the message gives the remedy."""

    user_error = True


class Probe(NamedTuple):
    """Fitted classifiers and their distance from the minimum.

    heads: H of (weight [C, d], bias [C]), for the features as given. loss: mean cross-entropy of
    each prefix, without the decay. gradient: largest entry of the objective's gradient (by W of z
    and by b), relative to that at zero weights. converged: whether it is at most the tolerance.
    iterations: of L-BFGS, or steps of SGD. Lists have one entry per prefix; for MRL-E, which is one
    problem, only the losses differ.
    """

    dims: tuple[int, ...]
    heads: list[Head]
    loss: list[float]
    gradient: list[float]
    converged: list[bool]
    iterations: list[int]
    weight_decay: list[float]

    def head(self) -> NestedLinear:
        """The classifiers as a float32 module on the CPU."""
        num_classes = len(self.heads[0][0])
        head = NestedLinear(self.dims, num_classes, shared=len(self.heads) < len(self.dims))
        with torch.no_grad():
            for linear, (weight, bias) in zip(head.heads, self.heads, strict=True):
                linear.get_parameter("weight").copy_(weight)
                linear.get_parameter("bias").copy_(bias)  # type: ignore[arg-type]
        return head


# ---------------------------------------------------------------- data


class _Standardised:
    """Blocks of (z, labels); features are standardised block by block, never copied as a whole."""

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        *,
        subset: Tensor | None = None,
        centred: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.features = features
        self.labels = labels
        self.subset = subset
        self.device = device or features.device
        self.dtype = dtype
        self.count = len(features) if subset is None else len(subset)

        width = features.shape[1]
        rows = max(1, _TILE // max(width, 1))
        # zeros and ones until both are known: the passes below read the features unchanged
        self.centre = torch.zeros(width, dtype=dtype, device=self.device)
        self.scale = torch.ones(width, dtype=dtype, device=self.device)
        mean = torch.zeros_like(self.centre)
        for x, _ in self.blocks(rows, width):
            mean += x.sum(0) / self.count
        if centred:
            self.centre = mean  # the second pass below reads x - centre
        square = torch.zeros_like(self.centre)
        for x, _ in self.blocks(rows, width):
            square += x.square().sum(0) / self.count
        size = square.sqrt()
        if not bool(torch.isfinite(size).all()):
            raise ProbeError(
                "the features are not finite; use another checkpoint, or precision fp32"
            )
        # a feature that is constant except for rounding would be noise if it were scaled up
        self.scale = torch.where(size > 1e-6 * mean.abs(), size, 1).where(size > 0, 1)

    def take(self, rows: Tensor | slice, width: int) -> tuple[Tensor, Tensor]:
        """(z [B, width], labels [B]); rows index the subset."""
        if self.subset is not None:
            rows = self.subset[rows]
        x = self.features[rows, :width].to(self.device, self.dtype)
        return (x - self.centre[:width]) / self.scale[:width], self.labels[rows].to(self.device)

    def blocks(self, rows: int, width: int) -> Iterator[tuple[Tensor, Tensor]]:
        for first in range(0, self.count, rows):
            yield self.take(slice(first, min(first + rows, self.count)), width)

    def unscaled(self, weight: Tensor, bias: Tensor) -> Head:
        """The classifier of x that equals a classifier of z."""
        weight = weight / self.scale[: weight.shape[1]]
        return weight, bias - weight @ self.centre[: weight.shape[1]]


# ---------------------------------------------------------------- objective


class Objective(NamedTuple):
    """Value, mean cross-entropy of each prefix [G], and gradient at the current weights."""

    value: Tensor
    losses: Tensor
    gradient: Gradient


class _Problem:
    """The objective of one head, which serves `dims`, and its current weights for z.

    weight [C, d], bias [C].
    """

    def __init__(
        self,
        data: _Standardised,
        dims: tuple[int, ...],
        num_classes: int,
        weight_decay: float,
    ) -> None:
        self.data = data
        self.dims = dims
        self.weight_decay = weight_decay
        kind = {"dtype": data.dtype, "device": data.device}
        self.weight = torch.zeros(num_classes, dims[-1], **kind).requires_grad_()
        self.bias = torch.zeros(num_classes, **kind).requires_grad_()
        # In memory at a time: z, and for each prefix logits, softmax and their gradients.
        self.rows = max(1, _TILE // (dims[-1] + 4 * len(dims) * num_classes))
        self.iterations = 0

    def evaluate(self) -> Objective:
        """Evaluate the objective and its gradient in one pass over the data."""
        weight = self.weight.detach()
        losses = torch.zeros(len(self.dims), dtype=weight.dtype, device=weight.device)
        by_weight = self.weight_decay * weight
        by_bias = torch.zeros_like(self.bias)
        for z, labels in self.data.blocks(self.rows, self.dims[-1]):
            # Block means, weighted by their share of the images, add up to the mean over all.
            share = len(labels) / self.data.count
            with torch.enable_grad():
                logits = nested_logits(z, [(self.weight, self.bias)], self.dims, fused=False)
                total, per_prefix = nested_cross_entropy(logits, labels)
                parts = torch.autograd.grad(share * total, (self.weight, self.bias))
            losses += share * per_prefix
            by_weight += parts[0]
            by_bias += parts[1]
        value = losses.sum() + self.weight_decay / 2 * weight.square().sum()
        return Objective(value, losses, (by_weight, by_bias))

    def curvature(self, sample: Tensor) -> float:
        """Upper bound of the objective's second derivatives, estimated on `sample` [n, D] of z.

        Softmax's second derivatives are at most 1/2: for each prefix, half the largest eigenvalue
        of mean z z^T (z with a 1 for the bias). Summed over the prefixes, plus the decay.
        """
        bound = self.weight_decay
        for d in self.dims:
            z = torch.cat([sample[:, :d], sample.new_ones(len(sample), 1)], dim=1)
            direction = z.sum(0)
            for _ in range(50):  # power iteration
                direction = z.T @ (z @ (direction / direction.norm())) / len(z)
            bound += float(direction.norm()) / 2
        return bound


# ---------------------------------------------------------------- the fit


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
    """Minimise the objective above from zero weights. Deterministic on one device.

    features: float [N, D], on any device. labels: int64 [N], 0..C-1. subset: int64 [n], the rows
    to fit to. weight_decay: one value, or (not for MRL-E) one for each prefix. shared: MRL-E.

    solver lbfgs: full batches with a strong Wolfe line search, until the relative gradient (see
    Probe.gradient) is at most `tolerance`, or for `max_iter` iterations. solver sgd: `epochs` of
    mini-batches with Nesterov momentum 0.9 and a cosine schedule to 0, for data on which a few
    hundred passes take too long. lr: by default 1 / the largest curvature of each head.

    device: of the computation, by default that of the features, which are copied block by block.
    dtype: of the computation; float32, for devices without fast float64, reaches gradients of about
    1e-3. Raises ProbeError for features that are not finite, fewer than two classes or a tolerance
    of 0 or less; ValueError for inconsistent arguments.
    """
    dims = check_dims(dims, features.shape[1])
    shared = shared and len(dims) > 1
    if not tolerance > 0:
        raise ProbeError(f"tolerance={tolerance}: expected more than 0")
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r}: expected one of {', '.join(SOLVERS)}")
    decays = _decay_of_each_prefix(weight_decay, len(dims), shared)
    _check_labels(labels, len(features), num_classes)

    # ---- one problem for each head ----
    # Labels and subset are indexed together with the features, on the features' device.
    data = _Standardised(
        features,
        labels.to(features.device),
        subset=None if subset is None else subset.to(features.device),
        centred=not shared,
        device=device,
        dtype=dtype,
    )
    if shared:
        problems = [_Problem(data, dims, num_classes, decays[0])]
    else:
        problems = [
            _Problem(data, (d,), num_classes, decay) for d, decay in zip(dims, decays, strict=True)
        ]
    starts = [_largest(problem.evaluate().gradient) for problem in problems]

    # ---- minimise ----
    if solver == "lbfgs":
        # A gradient below the rounding errors of its terms is meaningless, and the squares of a
        # gradient in smaller units would overflow.
        reachable = max(tolerance, torch.finfo(dtype).eps)
        for problem, start in zip(problems, starts, strict=True):
            _lbfgs(problem, max_iter, reachable * start)
    else:
        _sgd(problems, data, epochs=epochs, lr=lr, batch_size=batch_size, seed=seed)

    # ---- how far from the minimum ----
    losses: list[float] = []
    gradients: list[float] = []
    iterations: list[int] = []
    for problem, start in zip(problems, starts, strict=True):
        objective = problem.evaluate()
        relative = _largest(objective.gradient) / start if start else 0.0
        losses += objective.losses.tolist()
        gradients += [relative] * len(problem.dims)
        iterations += [problem.iterations] * len(problem.dims)
    return Probe(
        dims=dims,
        heads=[
            data.unscaled(problem.weight.detach(), problem.bias.detach()) for problem in problems
        ],
        loss=losses,
        gradient=gradients,
        converged=[gradient <= tolerance for gradient in gradients],
        iterations=iterations,
        weight_decay=decays,
    )


def _decay_of_each_prefix(
    weight_decay: float | Sequence[float], prefixes: int, shared: bool
) -> list[float]:
    decays: list[float]
    if isinstance(weight_decay, Sequence):
        decays = list(weight_decay)
    else:
        decays = [weight_decay] * prefixes
    if len(decays) != prefixes or (shared and len(set(decays)) > 1) or min(decays) < 0:
        raise ValueError(
            f"weight_decay {decays}: expected one value of 0 or more, or, without shared, "
            f"{prefixes} of them"
        )
    return decays


def _check_labels(labels: Tensor, count: int, num_classes: int) -> None:
    if len(labels) != count or count == 0:
        raise ValueError(
            f"{len(labels)} labels for {count} features: expected equal numbers of 1 or more"
        )
    if num_classes < 2:
        raise ProbeError("the data has only one class; expected two or more")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        raise ValueError(f"labels from {low} to {high}: expected 0 to {num_classes - 1}")


def _largest(gradient: Gradient) -> float:
    return max(float(part.abs().max()) for part in gradient)


# ---------------------------------------------------------------- solvers


def _lbfgs(problem: _Problem, max_iter: int, goal: float) -> None:
    """Minimise until the largest entry of the gradient is at most `goal`."""
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
        objective = problem.evaluate()
        by_weight, by_bias = objective.gradient
        # In units of the goal: PyTorch's L-BFGS has further, absolute thresholds, which would stop
        # it too early.
        problem.weight.grad = by_weight / goal
        problem.bias.grad = by_bias / goal
        return objective.value / goal

    optimizer.step(closure)  # type: ignore[arg-type]
    problem.iterations = optimizer.state[problem.weight]["n_iter"]


def _sgd(
    problems: list[_Problem],
    data: _Standardised,
    *,
    epochs: int,
    lr: float | None,
    batch_size: int,
    seed: int,
) -> None:
    """Minimise all problems on the same mini-batches: one pass over the features per epoch."""
    rng = torch.Generator().manual_seed(seed)
    device = data.features.device
    width = problems[-1].dims[-1]
    dims = tuple(d for problem in problems for d in problem.dims)

    # ---- a group of parameters, and a peak rate, for each weight and bias ----
    chosen = torch.randperm(data.count, generator=rng)[:CURVATURE_SAMPLE]
    sample, _ = data.take(chosen.to(device), width)
    groups = []
    peak_rates = []
    for problem in problems:
        rate = lr or 1 / max(problem.curvature(sample), 1e-12)
        groups.append({"params": [problem.weight], "weight_decay": problem.weight_decay})
        groups.append({"params": [problem.bias]})
        peak_rates += [rate, rate]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)

    # ---- steps ----
    steps = epochs * math.ceil(data.count / batch_size)
    step = 0
    for _ in range(epochs):
        order = torch.randperm(data.count, generator=rng).to(device)
        for rows in order.split(batch_size):
            schedule = (1 + math.cos(math.pi * step / steps)) / 2
            for group, rate in zip(optimizer.param_groups, peak_rates, strict=True):
                group["lr"] = rate * schedule
            z, labels = data.take(rows, width)
            heads = [(problem.weight, problem.bias) for problem in problems]
            logits = nested_logits(z, heads, dims)
            optimizer.zero_grad(set_to_none=True)
            nested_cross_entropy(logits, labels)[0].backward()
            optimizer.step()
            step += 1
    for problem in problems:
        problem.iterations = steps


# ---------------------------------------------------------------- choice of the weight decay


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
    """Choose the weight decay of each prefix on a held-out tenth of the rows, drawn by `seed`.

    The candidate with the best top-1 wins; ties go to the lower cross-entropy, then to the first
    candidate. For MRL-E both are summed over the prefixes. options: of `fit`. Returns the decays
    [G] and the held-out top-1 % [candidates][G].
    """
    if len(features) < 2:
        raise ProbeError(
            "one training image cannot be split into training and held-out images; give "
            "probe.weight_decay one value"
        )
    rng = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(features), generator=rng).to(features.device)
    # The same tenth for every candidate.
    held_out, rest = order.tensor_split([max(1, len(order) // 10)])
    labels = labels.to(features.device)

    hits = []
    losses = []
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
        right, loss = _held_out_sums(probe, features, labels, held_out)
        hits.append(right)
        losses.append(loss)
    hits = torch.stack(hits)  # [candidates, G]
    losses = torch.stack(losses).double()
    top1 = (100 * hits.double() / len(held_out)).tolist()

    if shared:  # one decay for all prefixes
        hits = hits.sum(1, keepdim=True).expand(-1, len(dims))
        losses = losses.sum(1, keepdim=True).expand(-1, len(dims))
    chosen = []
    for g in range(len(dims)):
        best = max(range(len(candidates)), key=lambda c: (hits[c, g].item(), -losses[c, g].item()))
        chosen.append(candidates[best])
    return chosen, top1


def _held_out_sums(
    probe: Probe, features: Tensor, labels: Tensor, images: Tensor
) -> tuple[Tensor, Tensor]:
    """Number of right predictions [G] and summed cross-entropy [G] on some images, on the CPU."""
    weight = probe.heads[0][0]
    num_classes = len(weight)
    rows = max(1, _TILE // (features.shape[1] + 4 * len(probe.dims) * num_classes))
    hits = torch.zeros(len(probe.dims), dtype=torch.int64, device=weight.device)
    losses = torch.zeros(len(probe.dims), dtype=weight.dtype, device=weight.device)
    for part in images.split(rows):
        x = features[part].to(weight.device, weight.dtype)
        y = labels[part].to(weight.device)
        logits = nested_logits(x, probe.heads, probe.dims, fused=False)
        hits += (logits.argmax(2) == y).sum(1)
        losses += nested_cross_entropy(logits, y)[1] * len(y)
    return hits.cpu(), losses.cpu()
