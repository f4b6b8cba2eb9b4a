"""A map behind a frozen encoder, after which the prefixes of its embeddings are good.

    adapter = pca_adapter(rows, AdapterSpec(width=512, dims=(16, 64, 256)))  # a start of training
    short = adapter.apply_to(rows)[:, :16]

Embeddings are scaled to length 1 first, so that those of `matryoshka embed` and of `embed
--normalize` give the same. Then comes a linear map of the differences to the mean, which starts as
the rotation of PCA, and, in a residual adapter, a small network that is added to its result. The
idea of fitting such a map to finished embeddings is that of Matryoshka-Adaptor (Yoon et al., arXiv
2407.20243). Legend: N embeddings of D numbers, E numbers behind the adapter.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matryoshka.arrays import floats, integers, takes
from matryoshka.nested import check_dims

MAPS = ("linear", "residual")
METHODS = ("learnt", "pca", "discriminant", "random")
ROWS = 8192  # embeddings in one step of a pass over all of them


class AdapterError(ValueError):
    """An adapter that does not fit its input, or embeddings that none can be fitted to."""

    user_error = True


@dataclass(frozen=True)
class AdapterSpec:
    """What an adapter is, but for its weights.

    width: D. dims: the prefixes that it was fitted for; the longest is E, at most D. hidden: width
    of the residual network, 0 for a linear map. method: where the weights come from. encoder: of
    the embeddings that it was fitted to, as meta.json of `matryoshka embed` has it; None if
    unknown.
    """

    width: int
    dims: tuple[int, ...]
    hidden: int = 0
    method: str = "learnt"
    encoder: dict[str, Any] | None = None

    @property
    def map_name(self) -> str:
        return "residual" if self.hidden else "linear"


class Adapter(nn.Module):
    """embeddings float [B, D] -> float [B, E], whose prefixes are compared by their cosines."""

    mean: Tensor

    def __init__(self, spec: AdapterSpec) -> None:
        super().__init__()
        dims = check_dims(spec.dims, spec.width)
        longest = dims[-1]
        self.spec = spec
        self.register_buffer("mean", torch.zeros(spec.width))
        self.weight = nn.Parameter(torch.eye(longest, spec.width))
        if spec.hidden:
            self.first = nn.Linear(longest, spec.hidden)
            self.second = nn.Linear(spec.hidden, longest)
            # Zero: the adapter starts as its linear map alone.
            nn.init.zeros_(self.second.weight)
            nn.init.zeros_(self.second.bias)

    @property
    def dims(self) -> tuple[int, ...]:
        return self.spec.dims

    @property
    def width(self) -> int:
        """Numbers of an adapted embedding."""
        return self.spec.dims[-1]

    def forward(self, embeddings: Tensor) -> Tensor:
        return self.refine(F.linear(F.normalize(embeddings, dim=-1) - self.mean, self.weight))

    def refine(self, mapped: Tensor) -> Tensor:
        """What the network adds to the linear map's result [B, E]."""
        if not self.spec.hidden:
            return mapped
        # The numbers of an embedding of length 1 are about 1 / sqrt(E); the network sees about 1.
        scale = self.width**0.5
        return mapped + self.second(F.gelu(self.first(mapped * scale))) / scale

    def summary(self) -> str:
        """One line for the user."""
        dims = ", ".join(map(str, self.dims))
        how = {
            "pca": "PCA",
            "discriminant": "discriminant analysis",
            "random": "random rotation",
            "learnt": f"learnt {self.spec.map_name} map",
        }
        return f"adapter, {how[self.spec.method]}, {self.spec.width} -> {dims}"

    def check_width(self, width: int, what: str) -> None:
        """AdapterError, which begins with `what`, unless embeddings have the width D."""
        if width != self.spec.width:
            raise AdapterError(
                f"{what}: {width:,} numbers, but the adapter was fitted to embeddings of "
                f"{self.spec.width:,}"
            )

    @takes(AdapterError, rows=floats("N D"))
    @torch.no_grad()
    def apply_to(self, rows: np.ndarray) -> np.ndarray:
        """Adapted rows, float32 [N, E], of an array or memory map [N, D], block by block.

        AdapterError for rows of another width.
        """
        self.check_width(rows.shape[1], "embeddings")
        out = np.empty((len(rows), self.width), np.float32)
        device = self.weight.device
        for first in range(0, len(rows), ROWS):
            part = torch.from_numpy(np.array(rows[first : first + ROWS], np.float32))
            out[first : first + ROWS] = self(part.to(device)).cpu().numpy()
        return out

    def sha256(self) -> str:
        """Hex digest of what determines the output: the kind, and names, shapes and bytes of the
        weights.
        """
        digest = hashlib.sha256(f"{self.spec.map_name} {self.spec.hidden}\n".encode())
        for name, value in sorted(self.state_dict().items()):
            digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()


# ---------------------------------------------------------------- without training


@takes(AdapterError, rows=floats("N D+", finite=True))
@torch.no_grad()
def pca_adapter(rows: np.ndarray, spec: AdapterSpec) -> Adapter:
    """The rotation of PCA of rows [N, D], as an adapter: the mean is removed, and the directions of
    the largest variance come first.

    A residual adapter gets a network that adds nothing yet. AdapterError for fewer rows than
    numbers, whose last directions would be arbitrary.
    """
    mean, covariance, _ = _moments(rows)
    spec = replace(spec, method="pca")
    return _with_weights(spec, mean, _largest_first(covariance))


SHRINKAGE = 0.3  # of the covariance inside classes towards the same variance in all directions


@takes(AdapterError, rows=floats("N D+", finite=True), labels=integers("N"))
@torch.no_grad()
def discriminant_adapter(rows: np.ndarray, labels: np.ndarray, spec: AdapterSpec) -> Adapter:
    """Linear discriminant analysis of rows [N, D] with classes [N]: the directions in which the
    means of classes differ most, in units of the spread inside classes, come first.

    The spread inside classes becomes the same in all directions (Fisher 1936), but for a shrinkage
    (Friedman 1989, equation 18). Only as many directions as classes, less one, tell classes apart;
    the variance inside classes orders the rest. AdapterError as of `pca_adapter`.
    """
    mean, covariance, unit = _moments(rows)
    classes, numbers = np.unique(labels, return_inverse=True)
    means = np.zeros((len(classes), rows.shape[1]))
    np.add.at(means, numbers.reshape(-1), unit)
    counts = np.bincount(numbers.reshape(-1))[:, None]
    offsets = means / counts - mean
    between = (offsets * counts).T @ offsets / len(rows)
    within = covariance - between
    if np.bincount(numbers.reshape(-1)).max() < 2 or np.trace(within) <= 0:
        raise AdapterError(
            "no class has two different embeddings: labels tell nothing; fit without them"
        )
    even = SHRINKAGE * np.trace(within) / len(within) * np.eye(len(within))
    values, axes = np.linalg.eigh(within + even)
    whitening = (axes / np.sqrt(values)) @ axes.T
    ordered = _largest_first(whitening @ (between + 1e-3 * within) @ whitening)
    spec = replace(spec, method="discriminant")
    return _with_weights(spec, mean, ordered @ whitening)


def _moments(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean [D] and covariance [D, D], float64, of rows scaled to length 1, and these, float32."""
    count, width = rows.shape
    if count <= width:
        raise AdapterError(
            f"{count:,} embeddings to fit to, of {width:,} numbers: a rotation needs more "
            "embeddings than numbers"
        )
    unit = unit_rows(rows)
    total = np.zeros(width)
    products = np.zeros((width, width))
    for first in range(0, count, ROWS):
        part = unit[first : first + ROWS].astype(np.float64)
        total += part.sum(0)
        products += part.T @ part
    mean = total / count
    return mean, products / count - np.outer(mean, mean), unit


def _largest_first(symmetric: np.ndarray) -> np.ndarray:
    """Eigenvectors as rows [D, D], that of the largest eigenvalue first."""
    axes = np.linalg.eigh(symmetric)[1].T[::-1]
    # The sign of an eigenvector is arbitrary: its largest number is positive, on every machine.
    largest = np.take_along_axis(axes, np.abs(axes).argmax(1)[:, None], 1)
    return axes * np.sign(largest)


@torch.no_grad()
def random_adapter(spec: AdapterSpec, seed: int) -> Adapter:
    """A random rotation, uniform among all; no mean is removed. The same for a seed."""
    drawn = np.random.default_rng(seed).standard_normal((spec.width, spec.width))
    rotation, upper = np.linalg.qr(drawn)
    # With these signs the rotation is uniform (Mezzadri, arXiv math-ph/0609050).
    spec = replace(spec, method="random")
    return _with_weights(spec, np.zeros(spec.width), (rotation * np.sign(np.diag(upper))).T)


def _with_weights(spec: AdapterSpec, mean: np.ndarray, axes: np.ndarray) -> Adapter:
    adapter = Adapter(spec)
    adapter.mean.copy_(torch.from_numpy(mean))
    adapter.weight.copy_(torch.from_numpy(np.ascontiguousarray(axes[: adapter.width])))
    return adapter


@takes(AdapterError, rows=floats("n D"))
def unit_rows(rows: np.ndarray) -> np.ndarray:
    """Rows [n, D] scaled to length 1, float32; zeros stay zeros."""
    return F.normalize(torch.from_numpy(np.array(rows, np.float32)), dim=1).numpy()
