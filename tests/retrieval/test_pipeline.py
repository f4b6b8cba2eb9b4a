"""SearchParams, and searches by them against loops, where the shortlist holds every row."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matryoshka.retrieval import RetrievalError, Searcher, SearchParams, Stage, exact_search
from matryoshka.retrieval.hits import empty_bits, set_bits
from matryoshka.retrieval.params import INDEXES, PREFIX_CACHE_DIMS, default_params
from matryoshka.retrieval.pipeline import BUILDERS
from matryoshka.retrieval.ranking_metrics import mflops

ONE_K, FOUR_K = 1_281_167, 4_202_000
KINDS = ("exact", "scan", "ivf", "binary")


def rows_of(n, columns=64, seed=0, noise=0.5):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(7).standard_normal((10, columns))
    points = centres[rng.integers(0, 10, n)] + noise * rng.standard_normal((n, columns))
    return np.log1p(np.exp(points)).astype(np.float32)


def cosines(rows, query, dim):
    out = []
    for row in rows:
        a, b = row[:dim].astype(np.float64), query[:dim].astype(np.float64)
        if not np.isfinite(a).all():
            out.append(-np.inf)
        else:
            out.append(
                a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) if a.any() and b.any() else 0.0
            )
    return np.array(out)


def staged(rows, query, setting, left_out=()):
    """The ids that a search finds whose shortlist is exact: loops over stages."""
    left = [i for i in range(len(rows)) if i not in left_out]
    for dim, keep in [(setting.dim, setting.k), *setting.stages]:
        scores = {i: cosines(rows[i : i + 1], query, dim)[0] for i in left}
        left = sorted((i for i in left if scores[i] > -np.inf), key=lambda i: (-scores[i], i))[
            :keep
        ]
    return left


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SearchParams("ivfpq", 8, 5), "unknown; known: exact, scan, ivf, binary, hnsw"),
        (lambda: SearchParams("scan", 8, 0), "k=0"),
        (lambda: SearchParams("scan", 0, 5), r"dimensions \[0\]"),
        (lambda: SearchParams("scan", 8, 5, (Stage(0, 3), Stage(8, 3))), r"dimensions \[8, 0, 8\]"),
        (
            lambda: SearchParams("scan", 8, 5, (Stage(8, 3), Stage(8, 3))),
            "longer than the one before",
        ),
        (
            lambda: SearchParams("scan", 8, 5, (Stage(16, 3), Stage(8, 3))),
            "longer than the one before",
        ),
        (lambda: SearchParams("scan", 8, 5, (Stage(16, 0),)), r"stages keep \[0\]"),
        (lambda: SearchParams("ivf", 8, 5, nprobe=0), "nprobe=0: expected 1 or more"),
        (lambda: SearchParams.funnel("scan", [8, 16], [5, 3]), "2 dimensions needs 1 k, not 2"),
        (lambda: SearchParams.funnel("scan", [8], []), "needs 1 k, not 0"),
        (lambda: SearchParams.funnel("scan", [8, 16, 32], [5, 6]), "falling"),
        (lambda: SearchParams.funnel("scan", [8, 16, 16], [5, 5]), "longer than the one before"),
        (lambda: SearchParams("scan", 8, 5).with_k(0), "k=0"),
        (lambda: Searcher(rows_of(5)[:0]), "database: is empty"),
        (lambda: Searcher(rows_of(5).astype(int)), "floating point"),
        (lambda: Searcher(rows_of(5)).prepare(SearchParams("scan", 65, 5)), "prefix of 65"),
        (
            lambda: Searcher(rows_of(5)).prepare(SearchParams("exact", 8, 5, (Stage(65, 5),))),
            "prefix of 65",
        ),
        (
            lambda: Searcher(rows_of(5)).search(
                rows_of(1, 32), SearchParams("exact", 8, 5, (Stage(64, 5),))
            ),
            "prefix of 64",
        ),
    ],
)
def test_mistakes_name_the_remedy(make, words):
    with pytest.raises(RetrievalError, match=words):
        make()


def test_settings_are_whole_numbers():
    for numbers in ((8.5, 5, 1), (8, 5.5, 1), (8, 5, 1.5), ("8", 5, 1)):
        with pytest.raises(TypeError):
            SearchParams("ivf", numbers[0], numbers[1], (), nprobe=numbers[2])
    made = SearchParams("ivf", np.int64(8), np.int32(5), ((np.int64(16), 3),), nprobe=np.int64(4))
    assert made == SearchParams("ivf", 8, 5, (Stage(16, 3),), nprobe=4)
    assert {type(n) for n in (made.dim, made.k, made.nprobe, *made.stages[0])} == {int}
    assert len({made, SearchParams("ivf", 8, 5, (Stage(16, 3),), nprobe=4)}) == 1


@pytest.mark.parametrize(
    ("dims", "ks", "database", "expected"),
    [  # the paper's appendix, tables of funnel retrieval
        ([8, 16, 32, 64, 128, 2048], [800, 400, 200, 50, 10], ONE_K, 10.315),
        ([16, 32, 64, 128, 256, 2048], [200, 100, 50, 25, 10], ONE_K, 20.545),
        ([32, 64, 128, 256, 512, 2048], [200, 100, 50, 25, 10], ONE_K, 41.07),
        ([32, 64, 128, 256, 512, 2048], [200, 100, 50, 25, 10], FOUR_K, 134.535),
    ],
)
def test_the_papers_funnels(dims, ks, database, expected):
    setting = SearchParams.funnel("exact", dims, ks)
    by_hand = (dims[0] * database + sum(d * k for d, k in zip(dims[1:], ks, strict=True))) / 1e6
    assert setting.mflops(database) == pytest.approx(by_hand, abs=1e-12), (
        "MFLOPs of the search against the sum by hand"
    )
    assert by_hand == pytest.approx(expected, abs=6e-3), (
        "MFLOPs by hand against the paper's rounded number"
    )
    assert (setting.dim, setting.k, setting.results) == (dims[0], ks[0], 10)
    assert [stage.dim for stage in setting.stages] == dims[1:]
    assert [stage.keep for stage in setting.stages] == [*ks[1:], 10]


@pytest.mark.parametrize(
    ("dim", "last", "database", "expected"),
    [
        (2048, 2048, ONE_K, 2624.24),
        (16, 2048, ONE_K, 20.91),
        (64, 2048, FOUR_K, 269.34),
        (2048, 2048, FOUR_K, 8606.11),
    ],
)
def test_the_papers_adaptive_retrieval(dim, last, database, expected):
    assert SearchParams("exact", dim, 200, (Stage(last, 10),)).mflops(database) == pytest.approx(
        expected, abs=5e-3
    ), f"MFLOPs of the paper's pipeline from {dim} dimensions"
    assert SearchParams("exact", dim, 200).mflops(database) == mflops(dim, database)


@given(
    st.integers(1, 500),
    st.lists(st.integers(1, 300), max_size=3),
    st.integers(1, 200),
    st.sampled_from(["scan", "ivf"]),
)
def test_giving_another_number_of_neighbours(k, keeps, wanted, kind):
    setting = SearchParams(
        kind, 8, k, tuple(Stage(16 << i, keep) for i, keep in enumerate(keeps)), nprobe=7
    )
    changed = setting.with_k(wanted)
    assert (changed.index, changed.dim, changed.nprobe) == (kind, 8, 7)
    assert [s.dim for s in changed.stages] == [s.dim for s in setting.stages]
    before, after = [k, *keeps], [changed.k, *(s.keep for s in changed.stages)]
    assert after[-1] == changed.results == wanted
    for old, new in zip(before[:-1], after[:-1], strict=True):
        assert new == (old if min(before) == wanted else max(old, 4 * wanted))
    assert changed.with_k(wanted) == changed


def test_settings_as_text():
    assert (
        str(SearchParams("ivf", 64, 200, (Stage(256, 40), Stage(2048, 10))))
        == "ivf 64 nprobe 32 k 200 -> 256 (40) -> 2048"
    )
    assert str(SearchParams("hnsw", 64, 200, ef_search=300)) == "hnsw 64 ef 300 k 200"
    assert str(SearchParams("scan", 8, 5, (Stage(16, 5),))) == "scan 8 k 5 -> 16"


def test_the_default_setting_fits_any_width():
    assert default_params(2048, 64) == SearchParams(
        "ivf", 64, 200, (Stage(PREFIX_CACHE_DIMS, 40), Stage(2048, 10)), nprobe=32
    )
    for columns, dim in (
        (64, 64),
        (64, 8),
        (PREFIX_CACHE_DIMS, 64),
        (PREFIX_CACHE_DIMS + 1, PREFIX_CACHE_DIMS),
        (300, 300),
        (1, 1),
    ):
        setting = default_params(columns, dim)
        assert setting.stages[-1].dim == columns
        assert setting.results == 10


# ---------------------------------------------------------------- searches


@pytest.fixture(scope="module")
def data():
    """150 rows of 64 dimensions: equal ones, a zero, NaN in the prefix, NaN behind it."""
    rows = rows_of(150)
    rows[20:25] = rows[20]
    rows[30] = 0
    rows[40, 3] = np.nan
    rows[50, 60] = np.inf
    return rows


ASKED = np.concatenate(
    [rows_of(6, seed=1), np.zeros((1, 64), np.float32), np.full((1, 64), np.nan, np.float32)]
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_a_shortlist_of_everything_is_the_exact_search(data, kind, dtype):
    rows, dim = data.astype(dtype), 64 if kind == "binary" else 10
    searcher = Searcher(rows, num_threads=1)
    before, asked = rows.copy(), ASKED.copy()
    deleted = empty_bits(150)
    gone = [0, 63, 64, 149]
    set_bits(deleted, np.array(gone))
    for stages in ((Stage(64, 12),), (Stage(16, 150), Stage(64, 12)), (Stage(64, 400),)):
        setting = SearchParams(kind, dim, 200, stages, nprobe=1000)
        for bits, out in ((None, ()), (deleted, gone)):
            hits = searcher.search(asked, setting, deleted=bits)
            for q in range(7):
                expected = cosines(rows, asked[q], 64)
                expected[list(out)] = -np.inf
                if dim < 64 and len(stages) > 1 and q < 6:
                    assert 50 not in hits.ids[q]
                best = np.sort(expected[expected > -np.inf])[::-1][: stages[-1].keep]
                found = [i for i in hits.ids[q].tolist() if i >= 0]
                assert len(found) == len(set(found)) == len(best)
                np.testing.assert_allclose(expected[found], best, atol=2e-6)
                np.testing.assert_allclose(hits.scores[q, : len(found)], best, atol=2e-6)
                same = [i for i in found if 20 <= i < 25]
                assert same == sorted(same)
                assert np.isneginf(hits.scores[q, len(found) :]).all()
            assert (hits.ids[7] == -1).all()
    np.testing.assert_array_equal(before, rows)
    np.testing.assert_array_equal(asked, ASKED)
    assert set(searcher.indexes) == ({(kind, dim)} if kind != "exact" else set())
    assert searcher.memory_bytes > 0, "the index reports no memory"


@pytest.mark.parametrize(
    "stages", [(), (Stage(16, 20),), (Stage(16, 40), Stage(40, 15)), (Stage(4, 9),)]
)
def test_stages_after_an_exact_shortlist(data, stages):
    setting = SearchParams("exact", 8, 50, stages)
    searcher = Searcher(data[:, :40], num_threads=1)
    hits = searcher.search(ASKED, setting)
    assert hits.ids.shape == (8, setting.results)
    for q in range(6):
        expected = staged(data[:, :40], ASKED[q], setting)
        assert len(set(hits.ids[q].tolist()) & set(expected)) >= len(expected) - 1, (
            "float32 moves more than one row across the edge"
        )  # float32
        dim = stages[-1].dim if stages else 8
        np.testing.assert_allclose(
            hits.scores[q], cosines(data[expected], ASKED[q], dim), atol=2e-6
        )


@pytest.mark.parametrize("kind", [*KINDS, "hnsw"])
def test_every_index_finds_neighbours(kind):
    rows, asked = rows_of(2000, 128, 3), rows_of(50, 128, 4)
    searcher = Searcher(rows, num_threads=1)
    truth = exact_search(rows, asked, 128, 10).ids
    setting = SearchParams(kind, 64, 200, (Stage(128, 10),), nprobe=16, ef_search=200)
    searcher.prepare(setting)
    made = dict(searcher.indexes)
    hits = searcher.search(asked, setting)
    recall = np.mean(
        [len(set(a) & set(b)) / 10 for a, b in zip(hits.ids.tolist(), truth.tolist(), strict=True)]
    )
    assert recall > (0.75 if kind == "binary" else 0.95), f"{kind}: recall@10 {recall:.3f}"
    assert searcher.indexes == made  # built once
    shortlist = searcher.shortlist(asked, setting)
    assert shortlist.ids.shape == (50, 200)
    assert all(
        set(a) <= set(b) for a, b in zip(hits.ids.tolist(), shortlist.ids.tolist(), strict=True)
    )
    own = [
        cosines(rows[ids[:5]], query, 64) for ids, query in zip(shortlist.ids, asked, strict=True)
    ]
    atol = {"binary": 1.0, "scan": 0.02, "ivf": 0.02}.get(kind, 1e-5)
    np.testing.assert_allclose(shortlist.scores[:, :5], own, atol=atol)


def test_a_graph_has_zero_vectors_and_too_few_rows():
    rows = rows_of(30, seed=5) - 0.7  # some cosines are negative
    rows[3] = 0
    searcher = Searcher(rows, num_threads=1)
    hits = searcher.search(ASKED, SearchParams("hnsw", 64, 40, ef_search=64))
    for q in range(6):
        expected = cosines(rows, ASKED[q], 64)
        order = np.argsort(-expected, kind="stable")
        assert hits.ids[q, :30].tolist() == order.tolist()
        np.testing.assert_allclose(hits.scores[q, :30], expected[order], atol=1e-5)
        assert (hits.ids[q, 30:] == -1).all()
        assert np.isneginf(hits.scores[q, 30:]).all()
    assert (hits.scores[6, :30] == 0).all()  # no direction is nearer to a zero vector
    assert (hits.ids[7] == -1).all()
    bits = empty_bits(30)
    searcher.search(ASKED, SearchParams("hnsw", 64, 5), deleted=bits)
    set_bits(bits, np.array([1]))
    with pytest.raises(RetrievalError, match="cannot leave rows out"):
        searcher.search(ASKED, SearchParams("hnsw", 64, 5), deleted=bits)
    rows[7, 1] = np.nan
    with pytest.raises(RetrievalError, match="row 7 has NaN"):
        Searcher(rows).prepare(SearchParams("hnsw", 64, 5))


def test_the_prefix_cache_changes_nothing():
    rows, asked = (
        rows_of(300, PREFIX_CACHE_DIMS + 40, 6).astype(np.float16),
        rows_of(9, PREFIX_CACHE_DIMS + 40, 7),
    )
    staged_ = SearchParams(
        "scan", 64, 300, (Stage(PREFIX_CACHE_DIMS, 50), Stage(PREFIX_CACHE_DIMS + 40, 5))
    )
    with_cache, without = Searcher(rows, 1), Searcher(rows, 1)
    without.prepare(SearchParams("scan", 64, 300))
    assert without.prefix_cache is None
    hits = with_cache.search(asked, staged_)
    assert with_cache.prefix_cache is not None
    assert with_cache.prefix_cache.shape == (300, PREFIX_CACHE_DIMS)
    whole = without.search(
        asked, SearchParams("scan", 64, 300, (Stage(PREFIX_CACHE_DIMS + 40, 5),))
    )
    np.testing.assert_array_equal(hits.ids, whole.ids)
    np.testing.assert_allclose(hits.scores, whole.scores, atol=1e-6)


@given(st.integers(1, 40), st.integers(1, 60), st.sampled_from(KINDS[:3]), st.integers(0, 20))
@settings(max_examples=30)
def test_any_number_of_rows_and_neighbours(n, k, kind, seed):
    rows, asked = (
        np.random.default_rng(seed).standard_normal((n, 12)).astype(np.float32),
        rows_of(2, 12, seed),
    )
    hits = Searcher(rows, num_threads=1).search(
        asked, SearchParams(kind, 5, max(n, k), (Stage(12, k),), nprobe=n)
    )
    for q in range(2):
        expected = cosines(rows, asked[q], 12)
        assert (hits.ids[q] >= 0).sum() == min(n, k), f"hits of query {q}: all rows or k"
        np.testing.assert_allclose(
            hits.scores[q, : min(n, k)], np.sort(expected)[::-1][:k], atol=3e-6
        )


def test_every_kind_is_known():
    assert set(INDEXES) == {*KINDS, "hnsw"} == {"exact", *BUILDERS}
