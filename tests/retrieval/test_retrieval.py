"""Searches against loops over rows: native scans of every kernel, inverted file, re-ranking, exact
search.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matryoshka.retrieval import (
    BinaryScan,
    InvertedFile,
    PrefixScan,
    RetrievalError,
    Stage,
    _native,
    exact_search,
    rerank,
)
from matryoshka.retrieval.hits import empty_bits, pool, set_bits, unit
from matryoshka.retrieval.rerank import build_prefix_cache

KERNELS = _native.kernels()


def nested(n, dim, seed, classes=12):
    """float32 [n, dim]: clusters, earlier dimensions vary more, all positive as behind a ReLU."""
    rng = np.random.default_rng(seed)
    spread = (1 + np.arange(dim) / 16) ** -0.6
    centres = np.random.default_rng(99).standard_normal((classes, dim)) * spread
    points = centres[rng.integers(0, classes, n)] + 0.5 * rng.standard_normal((n, dim)) * spread
    return np.log1p(np.exp(points)).astype(np.float32)


def best_of(scores, k):
    """(ids [k] padded with -1, scores) of one query: highest first, equal ones by id; -inf is no
    hit.
    """
    order = sorted(
        (i for i in range(len(scores)) if scores[i] > -np.inf), key=lambda i: (-scores[i], i)
    )[:k]
    return order + [-1] * (k - len(order)), [scores[i] for i in order]


def cosine(row, query, d):
    a, b = np.asarray(row[:d], np.float64), np.asarray(query[:d], np.float64)
    if not np.isfinite(a).all():
        return -np.inf
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b))) if a.any() and b.any() else 0.0


def overlap(a, b):
    return np.mean(
        [len(set(x) & set(y) - {-1}) / len(y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    )


# ---------------------------------------------------------------- native scans


@st.composite
def scans(draw):
    rows, chunks = (
        draw(st.integers(0, 300)),
        draw(st.one_of(st.integers(1, 9), st.integers(15, 17))),
    )
    few = draw(st.sampled_from([2, 128]))  # few different codes: many equal scores
    return (
        rows,
        chunks,
        draw(st.integers(1, 40)),
        draw(st.integers(1, 12)),
        few,
        draw(st.integers(0, 99)),
    )


@pytest.mark.parametrize("kernels", KERNELS)
@given(case=scans())
@settings(max_examples=60)
def test_codes_against_loops(kernels, case):
    rows, chunks, k, queries, few, seed = case
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, few, (rows, 4 * chunks), dtype=np.uint8)
    asked = rng.integers(-127, 128, (queries, 4 * chunks), dtype=np.int8)
    packed = np.full(-(-rows // 64) * 64 * 4 * chunks, 77, np.uint8)
    _native.pack(pool(2), codes, packed)
    deleted = empty_bits(rows)
    gone = rng.permutation(rows)[: rows // 5]
    set_bits(deleted, gone)
    for bits in (None, deleted):
        ids, scores = _native.search_codes(pool(2), packed, rows, asked, k, bits, kernels)
        for q in range(queries):
            expected = [int(row.astype(int) @ asked[q].astype(int)) for row in codes]
            for i in gone if bits is not None else ():
                expected[i] = -np.inf
            best, values = best_of(expected, k)
            assert ids[q].tolist() == best
            assert scores[q, : len(values)].tolist() == values


@pytest.mark.parametrize("kernels", KERNELS)
@given(case=scans())
@settings(max_examples=60)
def test_bits_against_loops(kernels, case):
    rows, words, k, queries, few, seed = case
    rng = np.random.default_rng(seed)
    high = 2**few if few < 64 else 2**63
    bits = rng.integers(0, high, (rows, words), dtype=np.uint64)
    asked = rng.integers(0, high, (queries, words), dtype=np.uint64)
    packed = np.zeros(-(-rows // 64) * 64 * words, np.uint64)
    _native.pack_bits(bits, packed)
    ids, scores = _native.search_bits(pool(2), packed, rows, asked, k, None, kernels)
    for q in range(queries):
        expected = [
            -sum((int(a) ^ int(b)).bit_count() for a, b in zip(row, asked[q], strict=True))
            for row in bits
        ]
        best, values = best_of(expected, k)
        assert ids[q].tolist() == best
        assert scores[q, : len(values)].tolist() == values


@pytest.mark.parametrize("words", [31, 32, 63])
def test_many_words_do_not_overflow(words):
    """Sums of bytes hold 31 words."""
    bits = np.zeros((70, words), np.uint64)
    packed = np.zeros(128 * words, np.uint64)
    _native.pack_bits(bits, packed)
    for kernels in KERNELS:
        _, scores = _native.search_bits(
            pool(1), packed, 70, ~np.zeros((1, words), np.uint64), 3, None, kernels
        )
        assert scores.tolist() == [[-64 * words] * 3]


def test_the_largest_products_do_not_overflow():
    codes = np.full((70, 2048), 127, np.uint8)
    packed = np.zeros(128 * 2048, np.uint8)
    _native.pack(pool(1), codes, packed)
    asked = np.stack([np.full(2048, 127, np.int8), np.full(2048, -127, np.int8)])
    for kernels in KERNELS:
        _, scores = _native.search_codes(pool(1), packed, 70, asked, 2, None, kernels)
        assert scores.tolist() == [[127 * 127 * 2048] * 2, [-127 * 127 * 2048] * 2]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("queries", [1, 7, 40])
def test_any_number_of_threads_and_queries_finds_the_same(threads, queries):
    rng = np.random.default_rng(5)
    codes = rng.integers(0, 128, (20_000, 8), dtype=np.uint8)
    asked = rng.integers(-127, 128, (queries, 8), dtype=np.int8)
    packed = np.zeros(20_032 * 8, np.uint8)
    _native.pack(pool(2), codes, packed)
    ids, scores = _native.search_codes(pool(threads), packed, 20_000, asked, 300)
    for q in range(queries):
        exact = codes.astype(np.int32) @ asked[q].astype(np.int32)
        best = np.lexsort((np.arange(20_000), -exact))[:300]
        np.testing.assert_array_equal(ids[q], best)
        np.testing.assert_array_equal(scores[q], exact[best])


def test_the_native_module_refuses_what_does_not_fit():
    codes, asked = np.zeros(64 * 8, np.uint8), np.zeros((1, 8), np.int8)
    for call in (
        lambda: _native.search_codes(pool(1), codes, 65, asked, 1),
        lambda: _native.search_codes(pool(1), codes, 64, np.zeros((1, 6), np.int8), 1),
        lambda: _native.search_codes(pool(1), codes, 64, asked, 1, np.zeros(0, np.uint64)),
        lambda: _native.search_codes(pool(1), codes, 64, asked, 1, None, "mmx"),
        lambda: _native.pack(pool(1), np.zeros((65, 8), np.uint8), codes),
        lambda: _native.search_bits(
            pool(1), np.zeros(64, np.uint64), 65, np.zeros((1, 1), np.uint64), 1
        ),
        lambda: _native.search_lists(
            pool(1),
            codes,
            np.array([64]),
            np.array([1], np.int32),
            np.zeros(64, np.uint32),
            64,
            asked,
            np.zeros((1, 1), np.int32),
            1,
        ),
    ):
        with pytest.raises(ValueError, match=r"\w"):
            call()
    with pytest.raises(IndexError):
        _native.search_lists(
            pool(1),
            codes,
            np.array([0]),
            np.array([1], np.int32),
            np.zeros(64, np.uint32),
            64,
            asked,
            np.ones((1, 1), np.int32),
            1,
        )
    table, query = np.zeros((3, 8), np.float32), np.zeros((1, 8), np.float32)
    with pytest.raises(IndexError):
        _native.rerank(pool(1), [(table, 0, 8, 1)], query, np.full((1, 1), 3))


# ---------------------------------------------------------------- exact search


@given(
    rows=st.integers(1, 60),
    queries=st.integers(1, 5),
    k=st.integers(1, 70),
    dim=st.integers(1, 6),
    at_once=st.integers(1, 61),
    seed=st.integers(0, 50),
)
@settings(max_examples=80)
def test_exact_search_against_loops(*, rows, queries, k, dim, at_once, seed):
    """Rows of few values: equal rows, zero rows, and NaN."""
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 2, (rows, 6)).astype(np.float32)
    data[rng.random(rows) < 0.1] = np.nan
    asked = rng.integers(0, 2, (queries, 6)).astype(np.float32)
    before = data.copy(), asked.copy()
    hits = exact_search(data, asked, dim, k, rows_at_once=at_once)
    for q in range(queries):
        expected = [round(cosine(row, asked[q], dim), 5) for row in data]
        found = [i for i in hits.ids[q].tolist() if i >= 0]
        assert len(found) == min(k, sum(v > -np.inf for v in expected)), (
            "number of hits: k, or all rows that have a score"
        )
        np.testing.assert_allclose([expected[i] for i in found], best_of(expected, k)[1], atol=2e-5)
        np.testing.assert_allclose(
            hits.scores[q, : len(found)], [expected[i] for i in found], atol=2e-5
        )
        assert hits.ids[q, len(found) :].tolist() == [-1] * (k - len(found))
        scores = hits.scores[q, : len(found)].tolist()
        assert list(zip(scores, found, strict=True)) == sorted(
            zip(scores, found, strict=True), key=lambda hit: (-hit[0], hit[1])
        )  # equal cosines by id
    np.testing.assert_array_equal(before[0], data)
    np.testing.assert_array_equal(before[1], asked)


# ---------------------------------------------------------------- shortlists


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("dim", [8, 18, 64])
def test_a_scan_finds_what_an_exact_prefix_finds(dim, dtype):
    data, asked = nested(5000, 96, 1).astype(dtype), nested(40, 96, 2)
    hits, truth = PrefixScan.build(data, dim).search(asked, 50), exact_search(data, asked, dim, 50)
    assert overlap(hits.ids, truth.ids) > 0.9, "7-bit codes: the 50 best overlap too little"
    assert overlap(hits.ids, truth.ids[:, :10]) > 0.95, "7-bit codes lose exact neighbours"
    own = [
        [cosine(data[i], asked[q], dim) for i in row] for q, row in enumerate(hits.ids[:5].tolist())
    ]
    np.testing.assert_allclose(hits.scores[:5], own, atol=0.02)  # the estimate
    assert (np.diff(hits.scores, axis=1) <= 1e-6).all(), (
        "scores must not increase along a row of hits"
    )


def test_binary_codes_find_neighbours():
    data, asked = nested(5000, 256, 1), nested(40, 256, 2)
    hits, truth = BinaryScan.build(data, 256).search(asked, 200), exact_search(data, asked, 256, 10)
    assert overlap(hits.ids, truth.ids) > 0.6, (
        "bits: the 10 best are not in the shortlist"
    )  # chance: 0.04
    above = unit(data, 256) > np.median(unit(data, 256), axis=0)
    mine = unit(asked[:1], 256)[0] > np.median(unit(data, 256), axis=0)
    differ = (above != mine).sum(1)
    np.testing.assert_allclose(
        hits.scores[0], 1 - 2 * np.sort(differ, kind="stable")[:200] / 256, atol=1e-6
    )


def test_an_inverted_file_of_all_lists_is_the_scan():
    data, asked = nested(3000, 32, 1), nested(30, 32, 2)
    scan, file = PrefixScan.build(data, 16), InvertedFile.build(data, 16, lists=20)
    whole, every = scan.search(asked, 40), file.search(asked, 40, nprobe=20)
    np.testing.assert_array_equal(whole.ids, every.ids)
    np.testing.assert_array_equal(whole.scores, every.scores)
    assert sorted(
        np.concatenate([file.ids[s : s + n] for s, n in zip(file.starts, file.sizes, strict=True)])
    ) == list(range(3000))
    few = file.search(asked, 40, nprobe=2)
    lists = {
        int(i): n
        for n, (s, m) in enumerate(zip(file.starts, file.sizes, strict=True))
        for i in file.ids[s : s + m]
    }
    assert all(len({lists[i] for i in row if i >= 0}) <= 2 for row in few.ids.tolist()), (
        "lists that the hits of a query come from, with 2 probed"
    )
    assert overlap(few.ids, whole.ids[:, :10]) > 0.8, "2 lists lose too many neighbours"


@pytest.mark.parametrize("make", ["scan", "bits", "lists"])
def test_rows_that_are_gone_bad_or_too_few(make):
    data = nested(200, 64, 3)
    data[7] = np.nan
    data[9, 3] = np.inf
    data[11] = 0
    build = {
        "scan": lambda: PrefixScan.build(data, 64),
        "bits": lambda: BinaryScan.build(data, 64),
        "lists": lambda: InvertedFile.build(data, 64, lists=5),
    }[make]
    more = {"nprobe": 5} if make == "lists" else {}
    asked = np.concatenate(
        [data[:2], np.full((1, 64), np.nan, np.float32), np.zeros((1, 64), np.float32)]
    )
    deleted = empty_bits(200)
    set_bits(deleted, np.array([0, 64, 199]))
    hits = build().search(asked, 300, deleted=deleted, **more)
    kept = set(range(200)) - {7, 9, 0, 64, 199}
    assert set(hits.ids[0].tolist()) == kept | {-1}
    assert (hits.ids[0] == -1).sum() == 300 - len(kept)
    assert np.isneginf(hits.scores[0, len(kept) :]).all()
    assert (hits.ids[2] == -1).all()  # a query that is no vector
    assert hits.ids[1, 0] == 1
    empty = build if make == "lists" else None
    if empty is None:
        none = type(build()).build(np.empty((0, 64), np.float32), 64).search(asked, 3)
        assert (none.ids == -1).all()


def test_equal_rows_come_by_id():
    data = np.repeat(nested(3, 64, 4), 50, axis=0)
    for index in (
        PrefixScan.build(data, 64),
        BinaryScan.build(data, 64),
        InvertedFile.build(data, 64, lists=3),
    ):
        found = index.search(data[[120, 10]], 20).ids
        assert found[0].tolist() == list(range(100, 120))
        assert found[1].tolist() == list(range(20))


# ---------------------------------------------------------------- re-ranking


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_stages_against_loops(kernels, dtype):
    data, asked = nested(300, 70, 5).astype(dtype), nested(9, 70, 6)
    data[5], data[6] = 0, np.nan
    rng = np.random.default_rng(0)
    candidates = np.stack([rng.permutation(300)[:60] for _ in asked])
    candidates[0, :5], candidates[1, :] = -1, -1
    candidates[2, :2] = 5, 6
    stages = [Stage(7, 40), Stage(33, 12), Stage(70, 8)]
    for cache in (None, build_prefix_cache(data, 33)):
        hits = rerank(data, asked, candidates, stages, prefix_cache=cache, kernels=kernels)
        for q, query in enumerate(asked):
            left = [i for i in candidates[q].tolist() if i >= 0]
            for dim, keep in stages:
                scores = {i: cosine(data[i], query, dim) for i in left}
                left = sorted(
                    (i for i in left if scores[i] > -np.inf), key=lambda i: (-scores[i], i)
                )[:keep]
            assert hits.ids[q].tolist() == left + [-1] * (8 - len(left))
            np.testing.assert_allclose(
                hits.scores[q, : len(left)], [scores[i] for i in left], atol=2e-6
            )


def test_one_stage_over_every_row_is_the_exact_search():
    data, asked = nested(400, 40, 7), nested(20, 40, 8)
    hits = rerank(data, asked, np.tile(np.arange(400)[::-1], (20, 1)), [Stage(40, 10)])
    np.testing.assert_array_equal(hits.ids, exact_search(data, asked, 40, 10).ids)


def test_rows_of_a_memory_map_and_of_a_view(tmp_path):
    data, asked = nested(200, 48, 9).astype(np.float16), nested(4, 48, 10)
    np.save(tmp_path / "x.npy", data)
    stored = np.lib.format.open_memmap(tmp_path / "x.npy", "r")
    candidates = np.tile(np.arange(200), (4, 1))
    expected = rerank(data, asked, candidates, [Stage(32, 10)])
    wide = np.concatenate([data, data], 1)[:, :48]
    for rows in (stored, wide):
        np.testing.assert_array_equal(
            rerank(rows, asked, candidates, [Stage(32, 10)]).ids, expected.ids
        )
    np.testing.assert_array_equal(
        PrefixScan.build(stored, 16).search(asked, 9).ids,
        PrefixScan.build(data, 16).search(asked, 9).ids,
    )


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: PrefixScan.build(x, 65), "64 dimensions, the search needs a prefix of 65"),
        (lambda x: PrefixScan.build(x.astype(int), 8), "floating point"),
        (lambda x: PrefixScan.build(x[0], 8), "expected floating point"),
        (lambda x: PrefixScan.build(x, 8).search(x[:, :4], 1), "queries: has 4 dimensions"),
        (lambda x: PrefixScan.build(x, 8).search(x, 0), "k=0"),
        (lambda x: BinaryScan.build(x, 8), "multiple of 64"),
        (lambda x: InvertedFile.build(x[:0], 8), "empty"),
        (lambda x: InvertedFile.build(x * np.nan, 8), "every row has NaN"),
        (lambda x: InvertedFile.build(x, 8).search(x, 1, nprobe=0), "nprobe=0"),
        (lambda x: exact_search(x, x, 0, 1), "prefix of 0"),
        (lambda x: exact_search(x, x, 8, 0), "k=0"),
        (lambda x: rerank(x, x, np.zeros((30, 1), int), []), "one or more"),
        (
            lambda x: rerank(x, x, np.zeros((30, 1), int), [Stage(8, 3), Stage(8, 2)]),
            "longer than the one before",
        ),
        (lambda x: rerank(x, x, np.zeros((30, 1), int), [Stage(8, 0)]), "keep"),
        (lambda x: rerank(x, x, np.zeros((30, 1), int), [Stage(65, 1)]), "prefix of 65"),
        (lambda x: rerank(x, x, np.zeros((29, 1), int), [Stage(8, 1)]), "one list for each"),
        (lambda x: rerank(x, x, np.full((30, 1), 30), [Stage(8, 1)]), "row id 30 out of range"),
        (
            lambda x: rerank(x.astype(np.float64), x, np.zeros((30, 1), int), [Stage(8, 1)]),
            "expected float16 or float32",
        ),
    ],
)
def test_mistakes_name_the_remedy(call, words):
    with pytest.raises(RetrievalError, match=words):
        call(nested(30, 64, 0))
