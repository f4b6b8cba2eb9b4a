"""Analyses of the predictions of all prefixes: agreement, classes, superclasses, confidence.

Arguments, for G prefixes (shortest first), N images and C classes: scores float [G, N, C],
predictions int64 [G, N], labels int64 [N]. Sources: Kusupati et al., arXiv 2205.13147, section 5
and appendices; Guo et al., arXiv 1706.04599 (calibration).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from matryoshka.arrays import booleans, floats, integers, takes
from matryoshka.report.claims import Paired, holm, mcnemar

# Images at a time: 2 MB of 1000 classes stay in the cache (4096 images take 1.5 times as long).
ROWS = 512
SCALED_ROWS = 4096  # images whose logits `temperature_scaling` reads at a time
TRENDS = ("rising", "rise-dip", "dip-rise", "falling", "flat", "mixed", "absent")
BINS = 15  # of confidence, as in Guo et al.


class AnalysisError(ValueError):
    """Scores that cannot be analysed; the message names prefix and image."""

    user_error = True


@takes(scores=floats("G N C+"))
def top_confidence(
    scores: np.ndarray, *, logits: bool = True, chunk: int = ROWS
) -> tuple[np.ndarray, np.ndarray]:
    """The best class and its confidence: (predictions int64 [G, N], confidence float32 [G, N]).

    Ties go to the first class. The confidence is the softmax probability of logits, or with
    logits=False the score itself. Memory maps are read `chunk` images at a time. Raises
    AnalysisError for scores that are not finite.
    """
    predictions = np.empty(scores.shape[:2], np.int64)
    confidence = np.empty(scores.shape[:2], np.float32)
    for g in range(len(scores)):
        for part, rows in _chunks(scores[g], chunk):
            # A sum is not finite if one of its terms is not: cheaper than isfinite of every score.
            if not np.isfinite(rows.sum(dtype=np.float64)):
                first = part.start + int(np.flatnonzero(~np.isfinite(rows).all(1))[0])
                raise AnalysisError(
                    f"prefix number {g + 1}, image {first}: scores are not finite; the model "
                    "diverged"
                )
            best = rows.argmax(1)
            highest = np.take_along_axis(rows, best[:, None], 1)
            predictions[g, part] = best
            if logits:
                # Softmax of the highest logit, whose shifted exponential is 1; it cannot overflow.
                confidence[g, part] = 1 / np.exp(rows - highest).sum(1)
            else:
                confidence[g, part] = highest[:, 0]
    return predictions, confidence


@takes(scores=floats("G N C+"))
def entropy_confidence(scores: np.ndarray, *, logits: bool = True, chunk: int = ROWS) -> np.ndarray:
    """1 - H / log C, H the entropy of the softmax: float32 [G, N], 0 (even) to 1 (one class).

    Arguments as for `top_confidence`.
    """
    classes = scores.shape[2]
    confidence = np.ones(scores.shape[:2], np.float32)
    if classes == 1:
        return confidence
    for g in range(len(scores)):
        for part, rows in _chunks(scores[g], chunk):
            values = rows.astype(np.float64)
            if logits:
                values = np.exp(values - values.max(1, keepdims=True))
            probabilities = values / values.sum(1, keepdims=True)
            # The limit of p log p at 0 is 0.
            logarithms = np.log(np.maximum(probabilities, np.finfo(np.float64).tiny))
            entropy = -(probabilities * logarithms).sum(1)
            confidence[g, part] = 1 - entropy / np.log(classes)
    return confidence


def _chunks(rows: np.ndarray, size: int) -> Iterator[tuple[slice, np.ndarray]]:
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        yield part, np.asarray(rows[part])


# ---------------------------------------------------------------- all prefixes of an image


class OracleResult(NamedTuple):
    """Bounds of routing images to prefixes.

    first: int64 [N], the first prefix that is right, G if none is. shares: float [G+1], fractions
    of the images by `first`. accuracy: fraction of the images that some prefix classifies right.
    expected_dim: mean length of the first right prefix, the longest one if none is right.
    majority_accuracy: accuracy of a majority vote of the prefixes.
    """

    first: np.ndarray
    shares: np.ndarray
    accuracy: float
    expected_dim: float
    majority_accuracy: float


@takes(predictions=integers("G+ N+"), labels=integers("N"))
def oracle(predictions: np.ndarray, labels: np.ndarray, dims: Sequence[int]) -> OracleResult:
    """Accuracy and cost of an oracle router, which takes the first right prefix (paper, appendix).

    Ties of the majority vote go to the class of the longest prefix among its voters.
    """
    correct = predictions == labels
    some_right = correct.any(0)
    first = np.where(some_right, correct.argmax(0), len(dims))
    shares = np.bincount(first, minlength=len(dims) + 1) / len(labels)
    lengths = np.asarray([*dims, dims[-1]])
    majority = majority_vote(predictions)
    return OracleResult(
        first=first,
        shares=shares,
        accuracy=float(some_right.mean()),
        expected_dim=float(lengths[first].mean()),
        majority_accuracy=float((majority == labels).mean()),
    )


@takes(predictions=integers("G+ N"))
def majority_vote(predictions: np.ndarray) -> np.ndarray:
    """The most frequent prediction of each image, int64 [N].

    Ties go to the class of the longest prefix among its voters.
    """
    # for each prefix, how many prefixes agree with it: [G, N]
    votes = np.stack([(predictions == row).sum(0) for row in predictions])
    # argmax finds the first maximum; reversed, it is the longest prefix with the most votes
    longest = len(votes) - 1 - votes[::-1].argmax(0)
    return np.take_along_axis(predictions, longest[None], 0)[0]


@takes(predictions=integers("G+ N+"))
def agreement(predictions: np.ndarray) -> np.ndarray:
    """Fraction of the images for which two prefixes predict the same class: float [G, G]."""
    return np.stack([(predictions == row).mean(1) for row in predictions])


@takes(first=integers("N", low=0))
def draw_by_first_right(first: np.ndarray, kinds: int, count: int, seed: int) -> np.ndarray:
    """Draw `count` images evenly over their first right prefix, so that rare kinds are included.

    first: int64 [N], 0 .. kinds - 1, as in OracleResult. Returns indices int64 [count], sorted by
    `first`, then by image; fewer if there are fewer images.
    """
    order = np.random.default_rng(seed).permutation(len(first))
    queues = [order[first[order] == kind].tolist() for kind in range(kinds)]
    chosen: list[int] = []
    while len(chosen) < count and any(queues):
        for queue in queues:
            if queue:
                chosen.append(queue.pop(0))
    chosen = sorted(chosen[:count], key=lambda image: (first[image], image))
    return np.array(chosen, np.int64)


# ---------------------------------------------------------------- classes


@takes(predictions=integers("G+ N"), labels=integers("N", low=0))
def class_accuracy(predictions: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Accuracy on the images of each class: float [G, C], NaN for a class without images."""
    images = np.bincount(labels, minlength=num_classes)
    hits = [np.bincount(labels[row == labels], minlength=num_classes) for row in predictions]
    with np.errstate(invalid="ignore"):
        return np.stack(hits) / images


@takes(accuracy=floats("G C"))
def trends(accuracy: np.ndarray) -> list[str]:
    """Trend of each class from the shortest to the longest prefix, one of TRENDS.

    accuracy: float [G, C] of `class_accuracy`. Steps without a change are ignored. All other steps
    up: `rising`; all down: `falling`; one reversal: `rise-dip` or `dip-rise`; more: `mixed`; no
    step: `flat`; a class without images: `absent`. For ImageNet's 1000 classes the paper counts 244
    rising, 177 rise-dip and 49 dip-rise.
    """
    names = {
        (): "flat",
        (1,): "rising",
        (-1,): "falling",
        (1, -1): "rise-dip",
        (-1, 1): "dip-rise",
    }
    trend_of_class = []
    for values in accuracy.T:
        if np.isnan(values).any():
            trend_of_class.append("absent")
            continue
        # Only reversals count: two steps up in a row are one direction.
        directions: list[int] = []
        for sign in np.sign(np.diff(values)).astype(int).tolist():
            if sign and (not directions or directions[-1] != sign):
                directions.append(sign)
        trend_of_class.append(names.get(tuple(directions), "mixed"))
    return trend_of_class


@takes(correct=booleans("G+ N"), labels=integers("N", low=0))
def class_changes(correct: np.ndarray, labels: np.ndarray, num_classes: int) -> tuple[int, int]:
    """Classes that the longest prefix has more often right than the shortest, and less often.

    correct: bool [G, N]. Counted are changes that McNemar's exact test finds, at a level of 5 % for
    all classes together (Holm 1979).
    """
    shortest, longest = correct[0], correct[-1]
    gained = np.bincount(labels[longest & ~shortest], minlength=num_classes)
    lost = np.bincount(labels[shortest & ~longest], minlength=num_classes)
    images = np.bincount(labels, minlength=num_classes)
    present = np.flatnonzero(images)
    p_values = [mcnemar(Paired(int(gained[c]), int(lost[c]), int(images[c]))) for c in present]
    changed = present[holm(np.array(p_values))]
    better = int((gained[changed] > lost[changed]).sum())
    return better, len(changed) - better


@takes(predictions=integers("N", low=0), labels=integers("N", low=0), groups=integers("C", low=0))
def superclass_confusion(
    predictions: np.ndarray, labels: np.ndarray, groups: np.ndarray, num_groups: int
) -> np.ndarray:
    """Confusion matrix of groups of classes, int64 [K, K]: rows are true, columns predicted.

    predictions int64 [N]; groups int64 [C]: the group of each class.
    """
    # One number for each cell of the matrix: bincount counts them in one pass.
    pairs = groups[labels] * num_groups + groups[predictions]
    return np.bincount(pairs, minlength=num_groups**2).reshape(num_groups, num_groups)


@takes(confusion=integers("K+ K", low=0))
def superclass_accuracy(confusion: np.ndarray) -> tuple[float, np.ndarray]:
    """Accuracy over all images, and of each group, float [K], NaN for a group without images."""
    with np.errstate(invalid="ignore"):
        each = np.diag(confusion) / confusion.sum(1)
    return float(np.trace(confusion) / confusion.sum()), each


@takes(scores=floats("N C"), labels=integers("N", low=0), groups=integers("C", low=0))
def within_superclass(
    scores: np.ndarray, labels: np.ndarray, groups: np.ndarray, num_groups: int
) -> np.ndarray:
    """Accuracy on the images of each group if only its classes compete: float [K].

    scores float [N, C], may be a memory map, which is read once. NaN for a group without images.
    """
    hits = np.zeros(num_groups, np.int64)
    group_of_image = groups[labels]
    for part, rows in _chunks(scores, ROWS):
        for k in np.unique(group_of_image[part]):
            members = np.flatnonzero(groups == k)
            in_group = group_of_image[part] == k
            best = rows[in_group][:, members].argmax(1)
            hits[k] += (members[best] == labels[part][in_group]).sum()
    with np.errstate(invalid="ignore"):
        return hits / np.bincount(group_of_image, minlength=num_groups)


# ---------------------------------------------------------------- unknown classes


class OutOfDistribution(NamedTuple):
    """Detection of images of unknown classes by low confidence, in percent.

    Chance level: 50 for auroc, the share of unknown images for aupr, 95 for fpr95.
    """

    auroc: float
    aupr: float
    fpr95: float


@takes(inside=floats("N+"), outside=floats("M+"))
def out_of_distribution(inside: np.ndarray, outside: np.ndarray) -> OutOfDistribution:
    """Metrics from the confidences of images of known classes [N] and of unknown ones [M].

    Unknown classes are the positives. fpr95: share of the known images that are rejected at the
    threshold that rejects 95 % of the unknown ones. Hendrycks and Gimpel, arXiv 1610.02136;
    Hendrycks et al., arXiv 1907.07174.
    """
    # scikit-learn takes a second to import
    from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

    if not (np.isfinite(inside).all() and np.isfinite(outside).all()):
        raise AnalysisError("unknown classes: confidences are not finite; the model diverged")
    # Unknown classes are the positives, and low confidence detects them.
    unknown = np.repeat([0, 1], [len(inside), len(outside)])
    score = -np.concatenate([inside, outside])
    false_positives, true_positives, _ = roc_curve(unknown, score, drop_intermediate=False)
    return OutOfDistribution(
        auroc=100 * float(roc_auc_score(unknown, score)),
        aupr=100 * float(average_precision_score(unknown, score)),
        fpr95=100 * float(false_positives[true_positives >= 0.95].min()),
    )


# ---------------------------------------------------------------- calibration


class Reliability(NamedTuple):
    """Calibration in bins of confidence.

    ece: expected calibration error, a fraction. counts: images of each bin. confidence, accuracy:
    their means in each bin, NaN if it is empty.
    """

    ece: float
    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray


@takes(confidence=floats("N+", finite=True), correct=booleans("N"))
def calibration(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> Reliability:
    """Compare confidence [N] and correct [N] in equal bins (a, b] of (0, 1].

    Guo et al. 2017, equation 3.
    """
    # In the dtype of the confidence: an edge in float64 could lie beside an equal float32.
    edges = np.linspace(0, 1, bins + 1, dtype=confidence.dtype)
    bin_of_image = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    counts = np.bincount(bin_of_image, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(bin_of_image, confidence.astype(np.float64), bins) / counts
        accuracy = np.bincount(bin_of_image, correct, bins) / counts
    gaps = np.nan_to_num(np.abs(mean - accuracy))
    return Reliability(
        ece=float((gaps * counts).sum() / len(confidence)),
        counts=counts,
        confidence=mean,
        accuracy=accuracy,
    )


@takes(logits=floats("N+ C+", finite=True), labels=integers("N", low=0))
def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The T > 0 that minimises the mean negative log-likelihood of softmax(logits / T).

    logits [N, C]. Newton's method on 1/T, in which the likelihood is concave, with a bracket of
    0.001 to 1000. The bracket is also the answer if the likelihood has no maximum (every image
    right, or chance level).
    """
    low, high = 1e-3, 1e3  # bracket of 1/T
    shifted = np.asarray(logits, np.float64)
    shifted = shifted - shifted.max(1, keepdims=True)  # no exponential overflows
    own = np.take_along_axis(shifted, labels[:, None], 1)[:, 0]
    inverse = 1.0
    for _ in range(100):
        weights = np.exp(inverse * shifted)
        weights /= weights.sum(1, keepdims=True)
        # The derivatives by 1/T come from the mean and variance of the logits under the softmax.
        mean = (weights * shifted).sum(1)
        slope = (mean - own).mean()
        if slope > 0:  # the loss grows: its minimum is at a smaller 1/T
            high = inverse
        else:
            low = inverse

        curvature = ((weights * shifted**2).sum(1) - mean**2).mean()
        following = inverse - slope / curvature if curvature > 0 else -1.0  # -1: no Newton step
        if not low < following < high:
            following = (low * high) ** 0.5  # bisection, in the logarithm
        if abs(following - inverse) <= 1e-7 * inverse:
            break
        inverse = following
    return float(1 / inverse)


class ScaledConfidence(NamedTuple):
    """temperature: fitted on one part of the images. confidence: float32 [n] of the other part."""

    temperature: float
    confidence: np.ndarray


@takes(labels=integers("N", low=0), fit=integers("n", low=0), rest=integers("m", low=0))
def temperature_scaling(
    logits_of: Callable[[np.ndarray], np.ndarray],
    labels: np.ndarray,
    fit: np.ndarray,
    rest: np.ndarray,
) -> ScaledConfidence:
    """Fit a temperature on the images `fit` and scale the confidence of the images `rest`.

    logits_of(images) returns the logits [n, C] of some images; it reads a part of `rest` at a time.
    """
    temperature = fit_temperature(logits_of(fit), labels[fit])
    parts = []
    for part in np.array_split(rest, max(1, len(rest) // SCALED_ROWS)):
        scaled = logits_of(part)[None] / np.float32(temperature)
        _, confidence = top_confidence(scaled)
        parts.append(confidence[0])
    return ScaledConfidence(temperature, np.concatenate(parts))
