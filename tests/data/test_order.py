"""quasi_random: every sample once, from a bounded window of pages, for any number of ranks."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matryoshka.data import order as rooms
from matryoshka.data.order import batches, epoch_order


def files():
    """The page of every sample, with gaps and in any order, as FFCV's workers leave them."""
    counts = st.lists(st.integers(0, 12), min_size=0, max_size=40)
    shuffled = st.tuples(counts, st.randoms(use_true_random=False), st.booleans())

    def build(drawn):
        counts, random, mix = drawn
        pages = [page + 3 for page, count in enumerate(counts) for _ in range(count)]
        if mix:
            random.shuffle(pages)
        return np.array(pages, np.int64)

    return shuffled.map(build)


def most_at_a_time(groups):
    """Largest number of pages between first and last use, at any of the groups (lists of pages).
    Slow on purpose.
    """
    most = 0
    for k in range(len(groups)):
        before = {page for group in groups[: k + 1] for page in group}
        after = {page for group in groups[k:] for page in group}
        most = max(most, len(before & after))
    return most


@settings(max_examples=150)
@given(
    pages=files(), window=st.integers(1, 50), seed=st.integers(0, 2**63), epoch=st.integers(0, 1000)
)
def test_every_sample_once_and_few_pages_at_a_time(pages, window, seed, epoch):
    order = epoch_order(len(pages), "quasi_random", seed, epoch, pages=pages, window_pages=window)
    assert order.dtype == np.int64
    assert sorted(order) == list(range(len(pages)))
    assert most_at_a_time([[page] for page in pages[order].tolist()]) <= window, (
        "more pages are held than the window"
    )


@settings(max_examples=100)
@given(
    pages=files(),
    window=st.integers(1, 20),
    batch=st.integers(1, 30),
    world=st.integers(1, 5),
    drop=st.booleans(),
)
def test_a_rank_needs_the_window_and_one_batch(pages, window, batch, world, drop):
    order = epoch_order(len(pages), "quasi_random", 1, 2, pages=pages, window_pages=window)
    alone = list(batches(order, batch, drop))
    ranks = [list(batches(order, batch, drop, rank=rank, world=world)) for rank in range(world)]
    for k, whole in enumerate(alone):
        assert np.concatenate([rank[k] for rank in ranks]).tolist() == whole.tolist()
    for rank in ranks:
        assert most_at_a_time([pages[share].tolist() for share in rank]) <= window + batch, (
            "more pages are held than window and batch allow"
        )


def test_batches_are_mixed_from_many_pages():
    """Also at both ends of an epoch; and one page is not followed by the same ones every time."""
    pages = np.repeat(np.arange(64), 50)
    for epoch in range(3):
        order = epoch_order(len(pages), "quasi_random", 0, epoch, pages=pages, window_pages=16)
        for start in range(0, len(order), 40):
            assert len(set(pages[order[start : start + 40]].tolist())) >= 9, (
                f"samples {start} to {start + 39} come from few pages"
            )
    whole = epoch_order(
        len(pages), "quasi_random", 0, 0, pages=pages, window_pages=64
    )  # a window for all: any sample anywhere
    assert abs(np.corrcoef(whole, np.arange(len(whole)))[0, 1]) < 0.05, "the order follows the file"
    first = [
        epoch_order(len(pages), "quasi_random", s, e, pages=pages, window_pages=16)[:8].tolist()
        for s in (0, 1)
        for e in (0, 1)
    ]
    assert len({tuple(f) for f in first}) == 4, "epochs or seeds repeat an order"


def test_quasi_random_is_pinned():
    """The order of a seed and epoch must never change: resumed runs rely on it."""
    pages = np.repeat(np.arange(4), 3)
    stream = (
        np.random.Philox(key=[0, 0]).random_raw(4 + 12).tolist()
    )  # first the order of the pages
    place = {page: p for p, page in enumerate(sorted(range(4), key=lambda page: stream[page]))}
    begin = {page: max(place[page] - 1, 0) for page in range(4)}
    end = {page: min(place[page] + 1, 3) for page in range(4)}
    moment = [
        begin[i // 3] + Fraction(stream[4 + i] >> 32, 2**32) * (end[i // 3] - begin[i // 3])
        for i in range(12)
    ]
    order = epoch_order(12, "quasi_random", 0, 0, pages=pages, window_pages=2).tolist()
    assert order == sorted(range(12), key=lambda i: moment[i])
    assert order == [7, 1, 0, 2, 8, 5, 6, 4, 9, 11, 10, 3]
    with pytest.raises(ValueError, match="quasi_random"):
        epoch_order(12, "quasi_random", 0, 0)
    with pytest.raises(ValueError, match="window_pages=0"):
        epoch_order(12, "quasi_random", 0, 0, pages=pages, window_pages=0)


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=80))
def test_argsort_of_keys_that_share_their_upper_bits(drawn):
    keys = np.array([(high << 62) | low for high, low in drawn], np.uint64)
    assert rooms._argsort(keys).tolist() == np.argsort(keys, kind="stable").tolist()


def test_random_is_the_ranks_of_the_stream():
    for n in (0, 1, 2, 1000, 70_000):
        stream = np.random.Philox(key=np.array([7, 3], np.uint64)).random_raw(n)
        assert np.array_equal(epoch_order(n, "random", 7, 3), np.argsort(stream, kind="stable"))


def test_batches_from_any_place():
    order = epoch_order(50, "random", 0, 0)
    whole = list(batches(order, 7, False, rank=1, world=3))
    for first in range(9):
        rest = list(batches(order, 7, False, rank=1, world=3, first=first))
        assert [r.tolist() for r in rest] == [w.tolist() for w in whole[first:]]
