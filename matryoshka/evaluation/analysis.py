"""What the predictions of all prefixes tell together: arrays in, numbers out.

G prefixes, shortest first; N images; C classes. scores float [G, N, C], predictions int64 [G, N],
labels int64 [N]. Sources: Kusupati et al., arXiv 2205.13147, section 5 and appendices; Guo et al.,
arXiv 1706.04599 (calibration).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

ROWS = (
    512  # images at a time: 2 MB of 1000 classes stay in the cache (4096 rows: 1.5 times as long)
)
TRENDS = ("rising", "rise-dip", "dip-rise", "falling", "flat", "mixed", "absent")
BINS = 15  # of confidence, as Guo et al.


class AnalysisError(ValueError):
    """Numbers that no analysis can use; the message says where they are."""

    user_error = True


def top_confidence(
    scores: np.ndarray, logits: bool = True, chunk: int = ROWS
) -> tuple[np.ndarray, np.ndarray]:
    """(predictions int64 [G, N], confidence float32 [G, N]): the class that scores highest, the
    first of equals, and its softmax probability; with logits=False the score itself. Reads a memory
    map part by part. AnalysisError for scores that are not finite.
    """
    predictions = np.empty(scores.shape[:2], np.int64)
    confidence = np.empty(scores.shape[:2], np.float32)
    for g in range(len(scores)):
        for part, rows in _parts(scores[g], chunk):
            if not np.isfinite(rows.sum(dtype=np.float64)):
                first = part.start + int(np.flatnonzero(~np.isfinite(rows).all(1))[0])
                raise AnalysisError(
                    f"prefix number {g + 1}, image {first}: scores are not finite; the model "
                    "diverged"
                )
            best = rows.argmax(1)
            highest = np.take_along_axis(rows, best[:, None], 1)
            predictions[g, part] = best
            confidence[g, part] = 1 / np.exp(rows - highest).sum(1) if logits else highest[:, 0]
    return predictions, confidence


def _parts(rows: np.ndarray, chunk: int) -> Iterator[tuple[slice, np.ndarray]]:
    for start in range(0, len(rows), chunk):
        part = slice(start, start + chunk)
        yield part, np.asarray(rows[part])


# ---------------------------------------------------------------- all prefixes of an image


class OracleResult(NamedTuple):
    """first: int64 [N], the first prefix that is right, G where none is. shares: float [G+1],
    fractions of the images by `first`. accuracy: fraction that some prefix has right. expected_dim:
    mean length of the first right prefix, the longest where none is. majority_accuracy: of the
    class that most prefixes say.
    """

    first: np.ndarray
    shares: np.ndarray
    accuracy: float
    expected_dim: float
    majority_accuracy: float


def oracle(predictions: np.ndarray, labels: np.ndarray, dims: Sequence[int]) -> OracleResult:
    """The bounds of routing: a router that knew the answer would take the first right prefix
    (appendix of the paper).

    Equal votes of a majority go to the class that the longest prefix among its voters says.
    """
    correct = predictions == labels
    right = correct.any(0)
    first = np.where(right, correct.argmax(0), len(dims))
    shares = np.bincount(first, minlength=len(dims) + 1) / len(labels)
    lengths = np.asarray([*dims, dims[-1]])
    return OracleResult(
        first,
        shares,
        float(right.mean()),
        float(lengths[first].mean()),
        float((_majority(predictions) == labels).mean()),
    )


def _majority(predictions: np.ndarray) -> np.ndarray:
    votes = np.stack(
        [(predictions == said).sum(0) for said in predictions]
    )  # [G, N]: for what each prefix says
    last = (
        len(votes) - 1 - votes[::-1].argmax(0)
    )  # the longest prefix among those with the most votes
    return np.take_along_axis(predictions, last[None], 0)[0]


def agreement(predictions: np.ndarray) -> np.ndarray:
    """float [G, G]: the fraction of images for which two prefixes say the same class."""
    return np.stack([(predictions == row).mean(1) for row in predictions])


# ---------------------------------------------------------------- classes


def class_accuracy(predictions: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """float [G, C]: accuracy over the images of each class; NaN where there are none."""
    images = np.bincount(labels, minlength=num_classes)
    hits = [np.bincount(labels[row == labels], minlength=num_classes) for row in predictions]
    with np.errstate(invalid="ignore"):
        return np.stack(hits) / images


def trends(accuracy: np.ndarray) -> list[str]:
    """For each class of `class_accuracy`, how it goes from the shortest to the longest prefix; one
    of TRENDS.

    By the signs of the steps that change anything: all up (`rising`), all down (`falling`), one
    turn (`rise-dip`, `dip-rise`), more (`mixed`), none (`flat`). `absent` has no images. The paper
    counts 244, 177 (rise-dip) and 49 (dip-rise) of ImageNet's 1000 classes.
    """
    names = {(): "flat", (1,): "rising", (-1,): "falling", (1, -1): "rise-dip", (-1, 1): "dip-rise"}
    found = []
    for values in accuracy.T:
        if np.isnan(values).any():
            found.append("absent")
            continue
        signs = [int(step) for step in np.sign(np.diff(values)) if step]
        runs = tuple(s for i, s in enumerate(signs) if i == 0 or s != signs[i - 1])
        found.append(names.get(runs, "mixed"))
    return found


def superclass_confusion(
    predictions: np.ndarray, labels: np.ndarray, groups: np.ndarray, num_groups: int
) -> np.ndarray:
    """int64 [K, K]: images by the group of their class (row) and of the predicted class (column).

    predictions int64 [N]; groups int64 [C]: the group of each class.
    """
    pairs = groups[labels] * num_groups + groups[predictions]
    return np.bincount(pairs, minlength=num_groups**2).reshape(num_groups, num_groups)


def within_superclass(
    scores: np.ndarray, labels: np.ndarray, groups: np.ndarray, num_groups: int
) -> np.ndarray:
    """float [K]: accuracy on the images of a group if only its classes could be said; NaN where
    there are none.

    scores float [N, C], also a memory map: read once.
    """
    hits = np.zeros(num_groups, np.int64)
    of_image = groups[labels]
    for part, rows in _parts(scores, ROWS):
        for k in np.unique(of_image[part]):
            columns = np.flatnonzero(groups == k)
            mine = of_image[part] == k
            said = columns[rows[mine][:, columns].argmax(1)]
            hits[k] += (said == labels[part][mine]).sum()
    with np.errstate(invalid="ignore"):
        return hits / np.bincount(of_image, minlength=num_groups)


# ---------------------------------------------------------------- confidence


class OutOfDistribution(NamedTuple):
    """How well low confidence tells images of unknown classes, in percent; chance is 50, their
    share, 95.
    """

    auroc: float
    aupr: float
    fpr95: float


def out_of_distribution(inside: np.ndarray, outside: np.ndarray) -> OutOfDistribution:
    """confidence [N] of images of known classes, [M] of unknown ones, which count as the positive.

    fpr95: share of known images lost where 95 % of the unknown are found. Hendrycks and Gimpel,
    arXiv 1610.02136; Hendrycks et al., arXiv 1907.07174.
    """
    from sklearn.metrics import (
        average_precision_score,
        roc_auc_score,
        roc_curve,
    )  # a second to import

    if not (np.isfinite(inside).all() and np.isfinite(outside).all()):
        raise AnalysisError("unknown classes: confidences are not finite; the model diverged")
    unknown = np.repeat([0, 1], [len(inside), len(outside)])
    score = -np.concatenate([inside, outside])
    lost, found, _ = roc_curve(unknown, score, drop_intermediate=False)
    numbers = (
        roc_auc_score(unknown, score),
        average_precision_score(unknown, score),
        lost[found >= 0.95].min(),
    )
    return OutOfDistribution(*(100 * float(x) for x in numbers))


class Reliability(NamedTuple):
    """ece: expected calibration error, a fraction. Of each bin of confidence: the number of images,
    their mean confidence and their accuracy, NaN where it is empty.
    """

    ece: float
    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray


def calibration(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> Reliability:
    """How far confidence [N] is from accuracy, in equal bins (a, b] of (0, 1] (Guo et al. 2017, eq.
    3).
    """
    edges = np.linspace(0, 1, bins + 1, dtype=confidence.dtype)
    place = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    counts = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(place, confidence.astype(np.float64), bins) / counts
        accuracy = np.bincount(place, correct, bins) / counts
    gaps = np.nan_to_num(np.abs(mean - accuracy))
    return Reliability(float((gaps * counts).sum() / len(confidence)), counts, mean, accuracy)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """T > 0 that minimises the mean negative log-likelihood of softmax(logits / T); logits [N, C].

    Newton's method on 1/T, in which the likelihood is concave, kept inside a bracket: 0.001 to
    1000, also the answer where the likelihood has no maximum (every image right, or chance).
    """
    low, high = 1e-3, 1e3  # of 1/T
    shifted = np.asarray(logits, np.float64)
    shifted = shifted - shifted.max(1, keepdims=True)
    own = np.take_along_axis(shifted, labels[:, None], 1)[:, 0]
    inverse = 1.0
    for _ in range(100):
        weights = np.exp(inverse * shifted)
        weights /= weights.sum(1, keepdims=True)
        mean = (weights * shifted).sum(1)
        slope = (mean - own).mean()
        if slope > 0:
            high = inverse
        else:
            low = inverse
        curvature = ((weights * shifted**2).sum(1) - mean**2).mean()
        step = inverse - slope / curvature if curvature > 0 else -1.0
        following = step if low < step < high else (low * high) ** 0.5
        if abs(following - inverse) <= 1e-7 * inverse:
            break
        inverse = following
    return float(1 / inverse)
