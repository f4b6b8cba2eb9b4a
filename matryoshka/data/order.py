"""Sample order and batches as pure functions of (seed, epoch, rank, world).

Global batches do not depend on the number of ranks: batch k is `epoch_order[k*B : (k+1)*B]`, and
each rank takes a contiguous slice of it.
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
    *,
    pages: np.ndarray | None = None,
    window_pages: int = 128,
) -> np.ndarray:
    """Sample indices of an epoch, int64 [n].

    random: the argsort of Philox(seed, epoch)'s raw 64-bit stream. NumPy guarantees that stream
        across versions, but not the one of `Generator.permutation`; a resumed run must see the
        order of the run that stopped.
    quasi_random: random inside a moving window of pages. `pages`, int64 [n], is the page of each
        sample, 0 or more. At any point of the epoch, at most `window_pages` pages are between their
        first and their last use.
    sequential: 0 to n - 1.

    ValueError for an unknown kind, for quasi_random without pages, and for a window below one page.
    """
    if kind == "sequential":
        return np.arange(n, dtype=np.int64)
    # A counter-based generator: its key is the whole state, so a resumed epoch needs no other.
    stream = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64))
    if kind == "random":
        return _argsort(stream.random_raw(n))
    if kind == "quasi_random":
        if pages is None or len(pages) != n:
            raise ValueError("pages: order='quasi_random' needs the page of every sample")
        if window_pages < 1:
            raise ValueError(f"window_pages={window_pages}: expected 1 or more")
        return _argsort(_window_keys(pages, stream, window_pages))
    raise ValueError(f"order={kind!r}: expected one of {', '.join(ORDERS)}")


def _window_keys(pages: np.ndarray, stream: np.random.Philox, window: int) -> np.ndarray:
    """Sort keys, uint64 [n]: for each sample a random moment in the time that its page is held.

    Pages are loaded in random order. The page at position p of that order is held from
    max(p - window + 1, 0) until p + 1, or until there is nothing left to load. So min(window, all)
    pages are held at every moment, also at both ends of the epoch: no batch is drawn from few
    pages. Times are integers in units of 2^-32, so nothing is rounded.
    """
    used = np.flatnonzero(np.bincount(pages))
    count = len(used)
    position = np.zeros(int(used[-1]) + 1 if count else 0, np.int64)
    position[used[_argsort(stream.random_raw(count))]] = np.arange(count)
    begin = np.maximum(position - window + 1, 0).astype(np.uint64)
    end = np.minimum(position + 1, max(count - window, 0) + 1).astype(np.uint64)

    # The upper half of a key counts pages, the lower half is a fraction: 32 random bits.
    moment = stream.random_raw(len(pages)) >> np.uint64(32)
    keys = (begin[pages] << np.uint64(32)) + moment * (end - begin)[pages]
    # _argsort compares the upper bits first: shifted to the top, few keys are equal in them
    return keys << np.uint64(64 - ((count + 1) << 32).bit_length())


def _argsort(keys: np.ndarray) -> np.ndarray:
    """Stable argsort of uint64 keys, int64 [n]; four times as fast as NumPy's on random keys.

    Sorting values is faster than sorting indices, so the index replaces the lowest bits of its key.
    The few keys that are equal without those bits are sorted once more.
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


def rank_slice(n: int, rank: int, world: int) -> slice:
    """The part of n items that belongs to `rank`: contiguous; the first n % world ranks have one
    item more than the others.
    """
    small, extra = divmod(n, world)
    start = rank * small + min(rank, extra)
    return slice(start, start + small + (rank < extra))


def num_batches(n: int, batch_size: int, drop_last: bool) -> int:
    """Number of global batches in an epoch of n samples."""
    return n // batch_size if drop_last else -(-n // batch_size)


def batches(
    order: np.ndarray,
    batch_size: int,
    drop_last: bool,
    *,
    rank: int = 0,
    world: int = 1,
    first: int = 0,
) -> Iterator[np.ndarray]:
    """Yield this rank's slice of every global batch, from batch number `first` on.

    A slice is empty where ranks outnumber the samples of a batch.
    """
    for k in range(first, num_batches(len(order), batch_size, drop_last)):
        batch = order[k * batch_size : (k + 1) * batch_size]
        yield batch[rank_slice(len(batch), rank, world)]
