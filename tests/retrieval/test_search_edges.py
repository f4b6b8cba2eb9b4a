"""Searches where it is tight: equal rows, lengths at the edges of float32, more neighbours than
rows, hostile lists.
"""

import numpy as np
import pytest

from matryoshka.retrieval import (
    InvertedFile,
    PrefixScan,
    RetrievalError,
    Stage,
    _native,
    exact_search,
    rerank,
)
from matryoshka.retrieval.exact import BLOCK_ROWS, MARGIN
from matryoshka.retrieval.hits import empty_bits, pool, set_bits


def positive(n, dim, seed):
    return np.random.default_rng(seed).random((n, dim), np.float32) + np.float32(0.1)


def order_of(rows, query, d):
    """Row numbers by falling cosine in float64, equal rows by number."""
    a, b = rows[:, :d].astype(np.float64), query[:d].astype(np.float64)
    a, b = a / np.abs(a).max(1, keepdims=True), b / np.abs(b).max()
    score = a @ b / np.linalg.norm(a, axis=1)
    return sorted(range(len(rows)), key=lambda i: (-round(float(score[i]), 12), i))


# ---------------------------------------------------------------- equal rows


@pytest.mark.parametrize("dim", [64, 512])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_equal_rows_of_different_blocks_go_by_number(dim, dtype):
    """The last block has one row: BLAS multiplies it by another path, with another last bit."""
    rows = positive(BLOCK_ROWS + 1, dim, 0).astype(dtype)
    rows[BLOCK_ROWS] = rows[0]
    asked = rows[0].astype(np.float32) + 0.05 * positive(30, dim, 1)
    for k in (1, 2, 5):
        hits = exact_search(rows, asked, dim, k)
        assert (hits.ids[:, 0] == 0).all()
        if k > 1:
            assert (hits.ids[:, 1] == BLOCK_ROWS).all()
            np.testing.assert_array_equal(hits.scores[:, 0], hits.scores[:, 1])


@pytest.mark.parametrize("copies", [MARGIN // 2, 5 * MARGIN])
def test_more_equal_rows_than_a_pass_hands_on(copies):
    rows = positive(3000, 48, 2)
    places = np.sort(np.random.default_rng(3).permutation(3000)[:copies])
    rows[places] = rows[places[0]]
    asked = np.stack([rows[places[0]], positive(1, 48, 4)[0]])
    deleted = empty_bits(3000)
    set_bits(deleted, places[:2])
    for bits, expected in ((None, places), (deleted, places[2:])):
        hits = exact_search(rows, asked, 48, 7, rows_at_once=100, deleted=bits)
        assert hits.ids[0].tolist() == expected[:7].tolist()
        kept = np.setdiff1d(np.arange(3000), [] if bits is None else places[:2])
        assert hits.ids[1].tolist() == kept[order_of(rows[kept], asked[1], 48)[:7]].tolist()
    zero = exact_search(rows, np.zeros((1, 48), np.float32), 48, 3)
    assert zero.ids.tolist() == [[0, 1, 2]]
    assert (zero.scores == 0).all()


# ---------------------------------------------------------------- lengths


@pytest.mark.parametrize(
    ("rows_by", "queries_by"), [(1e-23, 1), (1e19, 1), (1, 1e-23), (1, 1e19), (1e-38, 1e37)]
)
def test_any_length_gives_the_same_order(rows_by, queries_by):
    data, asked = positive(300, 64, 5), positive(4, 64, 6)
    rows, queries = data * np.float32(rows_by), asked * np.float32(queries_by)
    candidates = np.tile(np.arange(300), (4, 1))
    for stages in ([Stage(64, 9)], [Stage(16, 60), Stage(64, 9)]):
        hits = rerank(rows, queries, candidates, stages)
        same = rerank(data, asked, candidates, stages)
        np.testing.assert_array_equal(hits.ids, same.ids)
        np.testing.assert_allclose(hits.scores, same.scores, atol=1e-6)
    for q in range(4):
        expected = order_of(rows, queries[q], 64)[:9]
        assert rerank(rows, queries, candidates, [Stage(64, 9)]).ids[q].tolist() == expected
        assert exact_search(rows, queries, 64, 9).ids[q].tolist() == expected


def test_lengths_of_one_table_may_differ():
    data = positive(200, 32, 7)
    rows = data * (10.0 ** np.random.default_rng(8).integers(-30, 30, 200)[:, None]).astype(
        np.float32
    )
    candidates = np.arange(200)[None]
    for stages in ([Stage(32, 20)], [Stage(8, 100), Stage(32, 20)]):
        expected = rerank(data, data[:1], candidates, stages)
        found = rerank(rows, data[:1], candidates, stages)
        assert found.ids[0].tolist() == expected.ids[0].tolist()


# ---------------------------------------------------------------- more than there is


def test_more_neighbours_than_rows():
    rows, asked = positive(300, 16, 9), positive(70, 16, 10)
    scan, file = PrefixScan.build(rows, 16), InvertedFile.build(rows, 16, lists=8)
    for search in (scan.search, lambda q, k: file.search(q, k, 8)):
        all_of_them = search(asked, 300)
        more = search(asked, 40_000)
        assert more.ids.shape == (70, 40_000)
        np.testing.assert_array_equal(more.ids[:, :300], all_of_them.ids)
        assert (more.ids[:, 300:] == -1).all()
        assert sorted(all_of_them.ids[3].tolist()) == list(range(300))
        for k in (1 << 31, 1 << 61, 1 << 62):
            with pytest.raises(RetrievalError, match="expected 1 to 2147483647"):
                search(asked, k)
    with pytest.raises(RetrievalError, match="expected 1 to 2147483647"):
        rerank(rows, asked, scan.search(asked, 5).ids, [Stage(16, 1 << 61)])
    with pytest.raises(ValueError, match="more results"):
        _native.search_codes(pool(1), scan.packed, 300, np.zeros((8, 16), np.int8), 1 << 61)


def test_queries_of_long_shortlists_are_taken_a_few_at_a_time():
    """150,000 keys a query: 64 MB hold those of 55."""
    codes = np.random.default_rng(11).integers(0, 128, (150_000, 4), dtype=np.uint8)
    asked = np.random.default_rng(12).integers(-127, 128, (130, 4), dtype=np.int8)
    packed = np.zeros(-(-len(codes) // 64) * 64 * 4, np.uint8)
    _native.pack(pool(1), codes, packed)
    ids, scores = _native.search_codes(pool(2), packed, len(codes), asked, 40_000)
    for q in (0, 54, 55, 64, 65, 129):
        expected = codes.astype(int) @ asked[q].astype(int)
        order = np.lexsort((np.arange(len(codes)), -expected))[:40_000]
        np.testing.assert_array_equal(ids[q], order)
        np.testing.assert_array_equal(scores[q], expected[order])


# ---------------------------------------------------------------- lists that no InvertedFile makes


def listed(probes, *, starts=(0, 64), sizes=(60, 50), ids=None, k=50, num_ids=128):
    codes = np.random.default_rng(13).integers(0, 128, (128, 8), dtype=np.uint8)
    packed = np.zeros(128 * 8, np.uint8)
    _native.pack(pool(1), codes, packed)
    asked = np.random.default_rng(14).integers(-127, 128, (len(probes), 8), dtype=np.int8)
    ids = np.arange(128, dtype=np.uint32) if ids is None else np.asarray(ids, np.uint32)
    return _native.search_lists(
        pool(1),
        packed,
        np.array(starts),
        np.array(sizes, np.int32),
        ids,
        num_ids,
        asked,
        np.asarray(probes, np.int32),
        k,
    )


def test_a_list_that_is_named_again():
    """No search does so: hits may come again, but nothing is written where it does not belong."""
    once, often = listed(np.zeros((8, 1)), k=60), listed(np.zeros((8, 16)), k=120)
    for a, b in zip(once[0], often[0], strict=True):
        assert set(a.tolist()) == set(b.tolist()) - {-1}


def test_lists_outside_of_the_codes():
    for starts, sizes in (
        ((0, 2**63 - 64), (1, 2**31 - 1)),
        ((0, -64), (1, 1)),
        ((0, 64), (1, 65)),
        ((0, 63), (1, 1)),
    ):
        with pytest.raises(ValueError, match="outside of the packed codes"):
            listed(np.zeros((1, 1)), starts=starts, sizes=sizes)
    slots = np.arange(128)
    slots[7] = 128
    with pytest.raises(IndexError, match="row id out of range"):
        listed(np.zeros((1, 1)), ids=slots)


# ---------------------------------------------------------------- equal scores


def test_equal_scores_of_lists_and_of_stages_go_by_number():
    """Few different codes, numbers scattered over the lists: what was found first is not what
    counts.
    """
    rng = np.random.default_rng(15)
    for seed in range(20):
        codes = np.random.default_rng(seed).integers(0, 2, (1920, 4), dtype=np.uint8)
        packed = np.zeros(1920 * 4, np.uint8)
        _native.pack(pool(1), codes, packed)
        numbers = rng.permutation(1920).astype(np.uint32)
        asked = rng.integers(-127, 128, (3, 4), dtype=np.int8)
        probes = np.tile(rng.permutation(30), (3, 1)).astype(np.int32)
        starts, sizes = np.arange(30) * 64, np.full(30, 64, np.int32)
        ids, _ = _native.search_lists(
            pool(1), packed, starts, sizes, numbers, 1920, asked, probes, 70
        )
        for q in range(3):
            score = codes.astype(int) @ asked[q].astype(int)
            assert ids[q].tolist() == numbers[np.lexsort((numbers, -score))[:70]].tolist()
    rows = np.repeat(positive(4, 32, 16), 50, 0)[np.random.default_rng(17).permutation(200)]
    candidates = np.random.default_rng(18).permutation(200)[None]
    for stages in ([Stage(32, 30)], [Stage(8, 60), Stage(32, 30)]):
        hits = rerank(rows, rows[:1], candidates, stages)
        assert hits.ids[0].tolist() == np.flatnonzero((rows == rows[0]).all(1))[:30].tolist()
