"""A validation part cut off a training set."""

from __future__ import annotations

import numpy as np

from matryoshka.arrays import integers, takes
from matryoshka.data.dataset import Dataset
from matryoshka.data.subset import Subset


def held_out(train: Dataset, share: float, seed: int) -> tuple[Subset, Subset]:
    """(training part, validation part) of a training set; see stratified_split."""
    kept, taken = stratified_split(train.labels, share, seed)
    return Subset(train, kept), Subset(train, taken)


@takes(labels=integers("N"))
def stratified_split(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of (training, validation) samples, int64, both sorted: a part of every class.

    labels: int64 [N]. share: of the samples to validate on. round(share x N) samples are taken; a
    class gives share x its count, rounded so that the sum is right (largest remainders first), and
    keeps at least one sample for training. A pure function of its arguments.

    ValueError for a share that is not between 0 and 1, or that leaves a part empty.
    """
    if not 0 < share < 1:
        raise ValueError(f"share={share}: expected more than 0 and less than 1")
    labels = np.asarray(labels)
    _, class_of, counts = np.unique(labels, return_inverse=True, return_counts=True)
    taken = _counts(counts, share, len(labels))
    if not 0 < taken.sum() < len(labels):
        raise ValueError(
            f"share={share}: leaves no sample to {'train' if taken.any() else 'validate'} on, of "
            f"{len(labels)} samples in {len(counts)} classes"
        )
    # The raw stream, which NumPy guarantees across versions, as in order.py.
    shuffled = np.argsort(np.random.Philox(key=seed).random_raw(len(labels)), kind="stable")
    by_class = shuffled[np.argsort(class_of[shuffled], kind="stable")]
    turn = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    is_taken = turn < np.repeat(taken, counts)
    return np.sort(by_class[~is_taken]), np.sort(by_class[is_taken])


def _counts(counts: np.ndarray, share: float, n: int) -> np.ndarray:
    """How many samples each class gives, int64 [classes]."""
    exact = share * counts
    taken = np.minimum(np.floor(exact).astype(np.int64), counts - 1)
    missing = round(share * n) - int(taken.sum())
    for k in np.argsort(-(exact - taken), kind="stable").tolist():
        if missing > 0 and taken[k] < counts[k] - 1:
            taken[k] += 1
            missing -= 1
    return taken
