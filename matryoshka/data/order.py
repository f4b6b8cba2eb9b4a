"""Which samples make which batch: pure functions of (seed, epoch, rank, world).

A global batch does not depend on the number of ranks: batch k is `epoch_order[k*B : (k+1)*B]`, and each rank
takes a contiguous share of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

ORDERS = ("random", "sequential")


def epoch_order(n: int, kind: str, seed: int, epoch: int) -> np.ndarray:
    """Sample indices int64 [n] of an epoch. ValueError for an unknown kind.

    random: the ranks of Philox(seed, epoch)'s raw 64-bit stream. NumPy promises that stream for ever, which
    it does not of `Generator.permutation`; a resumed run must see the order of the run that stopped.
    """
    if kind == "sequential":
        return np.arange(n, dtype=np.int64)
    if kind == "random":
        keys = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(n)
        return np.argsort(keys, kind="stable").astype(np.int64, copy=False)
    raise ValueError(f"order={kind!r}: expected one of {', '.join(ORDERS)}")


def share(n: int, rank: int, world: int) -> slice:
    """This rank's part of n items: contiguous, sizes differ by at most one, the first ranks take one more."""
    small, extra = divmod(n, world)
    start = rank * small + min(rank, extra)
    return slice(start, start + small + (rank < extra))


def num_batches(n: int, batch_size: int, drop_last: bool) -> int:
    """Global batches in an epoch."""
    return n // batch_size if drop_last else -(-n // batch_size)


def batches(order: np.ndarray, batch_size: int, drop_last: bool, rank: int = 0, world: int = 1) -> Iterator[np.ndarray]:
    """This rank's share of every global batch of `batch_size` samples; empty where ranks outnumber samples."""
    for k in range(num_batches(len(order), batch_size, drop_last)):
        batch = order[k * batch_size : (k + 1) * batch_size]
        yield batch[share(len(batch), rank, world)]
