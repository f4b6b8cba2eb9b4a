"""Which samples make which batch: pure functions of (seed, epoch, rank, world).

A global batch does not depend on the number of ranks: batch k is `epoch_order[k*B : (k+1)*B]`, and
each rank takes a contiguous share of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from matryoshka.data.options import ORDERS


def epoch_order(
    n: int,
    kind: str,
    seed: int,
    epoch: int,
    pages: np.ndarray | None = None,
    window_pages: int = 128,
) -> np.ndarray:
    """Sample indices int64 [n] of an epoch.

    random: the ranks of Philox(seed, epoch)'s raw 64-bit stream. NumPy promises that stream for
    ever, which it does not of `Generator.permutation`; a resumed run must see the order of the run
    that stopped. quasi_random: needs `pages`, int64 [n], the page (not negative) that holds each
    sample. At any point of the epoch, the pages between their first and their last use are at most
    `window_pages`. ValueError for an unknown kind, for quasi_random without pages, and for a window
    without a page.
    """
    if kind == "sequential":
        return np.arange(n, dtype=np.int64)
    stream = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64))
    if kind == "random":
        return _argsort(stream.random_raw(n))
    if kind == "quasi_random":
        if pages is None or len(pages) != n or window_pages < 1:
            raise ValueError(
                f"order='quasi_random' needs the page of every sample and {window_pages=} of 1 "
                "or more"
            )
        return _argsort(_window_keys(pages, stream, window_pages))
    raise ValueError(f"order={kind!r}: expected one of {', '.join(ORDERS)}")


def _window_keys(pages: np.ndarray, stream: np.random.Philox, window: int) -> np.ndarray:
    """uint64 [n]: each sample's random moment in the time for which its page is held.

    Pages come in a random order; the one at place p is held from max(p - window + 1, 0) until p +
    1, or until the moment at which nothing is left to load. So at every moment min(window, all)
    pages are held, also at both ends of the epoch: no batch is drawn from few pages. Integers in
    units of 2^-32: nothing is rounded.
    """
    used = np.flatnonzero(np.bincount(pages))
    count = len(used)
    place = np.zeros(int(used[-1]) + 1 if count else 0, np.int64)
    place[used[_argsort(stream.random_raw(count))]] = np.arange(count)
    begin = np.maximum(place - window + 1, 0).astype(np.uint64)
    end = np.minimum(place + 1, max(count - window, 0) + 1).astype(np.uint64)
    moment = stream.random_raw(len(pages)) >> np.uint64(32)
    keys = (begin[pages] << np.uint64(32)) + moment * (end - begin)[pages]
    return keys << np.uint64(
        64 - ((count + 1) << 32).bit_length()
    )  # equal upper bits cost _argsort time


def _argsort(keys: np.ndarray) -> np.ndarray:
    """A stable argsort of uint64 keys, int64 [n]; four times as fast as NumPy's on random keys.

    Sorting values is faster than sorting indices, so the index takes the place of the key's lowest
    bits; the few keys that are equal without those bits are sorted once more.
    """
    n = len(keys)
    bits = np.uint64(n.bit_length())
    packed = keys >> bits
    packed <<= bits
    packed |= np.arange(n, dtype=np.uint64)
    packed.sort()
    order = (packed & ((np.uint64(1) << bits) - np.uint64(1))).view(np.int64)
    packed >>= bits
    equal = packed[1:] == packed[:-1]
    if equal.any():
        tied = np.zeros(n, bool)
        tied[1:] |= equal
        tied[:-1] |= equal
        order[tied] = order[tied][np.argsort(keys[order[tied]], kind="stable")]
    return order


def share(n: int, rank: int, world: int) -> slice:
    """This rank's part of n items: contiguous, sizes differ by at most one, the first ranks take
    one more.
    """
    small, extra = divmod(n, world)
    start = rank * small + min(rank, extra)
    return slice(start, start + small + (rank < extra))


def num_batches(n: int, batch_size: int, drop_last: bool) -> int:
    """Global batches in an epoch."""
    return n // batch_size if drop_last else -(-n // batch_size)


def batches(
    order: np.ndarray,
    batch_size: int,
    drop_last: bool,
    rank: int = 0,
    world: int = 1,
    first: int = 0,
) -> Iterator[np.ndarray]:
    """This rank's share of every global batch of `batch_size` samples, beginning with the global
    batch `first`.

    A share is empty where ranks outnumber samples.
    """
    for k in range(first, num_batches(len(order), batch_size, drop_last)):
        batch = order[k * batch_size : (k + 1) * batch_size]
        yield batch[share(len(batch), rank, world)]
