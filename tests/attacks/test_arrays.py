"""Hostile arrays at every public function that takes arrays: an error, or the right result."""

import importlib
import inspect
import pkgutil
import warnings

import numpy as np
import pytest
import torch
from attacks.scale import scaled
from stored_indexes import batch, built, random_rows

import matryoshka
from matryoshka.arrays import ArrayError, Expected, as_float32, integers, takes
from matryoshka.data import Digits, Subset
from matryoshka.retrieval import (
    BinaryScan,
    InvertedFile,
    PrefixScan,
    RetrievalError,
    Searcher,
    SearchParams,
    Stage,
    exact_search,
    rerank,
)
from matryoshka.retrieval.device import DeviceSearcher
from matryoshka.retrieval.hits import empty_bits, set_bits, unit
from matryoshka.retrieval.rerank import build_prefix_cache
from matryoshka.retrieval.store import Index
from matryoshka.retrieval.store_writer import IndexRows, Writer, to_float16

# Modules whose functions of arrays are meant to be called from outside.
PUBLIC = (
    "data.crops",
    "data.images",
    "data.split",
    "evaluation.analysis",
    "evaluation.cascade",
    "evaluation.dim_answers",
    "evaluation.embedding_map",
    "evaluation.width_cascade",
    "models.adapter",
    "report.claims",
    "retrieval.ranking_metrics",
    "training.adapter",
)
# They check what they take by themselves: the tests below call each.
CALLED = {
    "retrieval.device.DeviceSearcher",
    "retrieval.exact.exact_search",
    "retrieval.ivf.InvertedFile",
    "retrieval.pipeline.Engine",
    "retrieval.pipeline.Searcher",
    "retrieval.rerank.build_prefix_cache",
    "retrieval.rerank.rerank",
    "retrieval.scan.BinaryScan",
    "retrieval.scan.PrefixScan",
    "retrieval.store.Index",
    "retrieval.store_writer.IndexRows",
    "data.subset.Subset.__init__",
}
# They move arrays that their caller has made: no number of these becomes an index or a result.
MOVED = {
    "data.crops.PadCrop.shift",
    "data.order.batches",
    "data.dataset.Dataset",
    "data.slots.Batch",
    "data.pages.ImageFeed",
    "embeddings.reading.Embeddings",
    "evaluation.dim_answers.DimAnswers",
}
ROWS, COLUMNS = 70, 64


def functions_of(thing, name):
    """(full name, function) of a function, or of the methods of a class."""
    if inspect.isfunction(thing):
        return [(name, thing)]
    found = []
    for attribute, value in vars(thing).items():
        function = inspect.unwrap(getattr(value, "__func__", value))
        is_public = not attribute.startswith("_") or attribute == "__init__"
        if is_public and inspect.isfunction(function):
            found.append((f"{name}.{attribute}", getattr(value, "__func__", value)))
    return found


def is_array(parameter):
    return str(parameter.annotation).startswith("np.ndarray")


def public_functions():
    """(full name, function) of all public functions and methods with an array among the arguments.

    Public is what the packages of `matryoshka` name, and every function of PUBLIC.
    """
    things = {}
    for module in pkgutil.iter_modules(matryoshka.__path__):
        if not module.ispkg or module.name in ("train", "inference", "matryoshka"):
            continue
        wing = importlib.import_module(f"matryoshka.{module.name}")
        for name in getattr(wing, "__all__", ()):
            thing = getattr(wing, name)
            if inspect.isclass(thing) or inspect.isfunction(thing):
                things[thing] = f"{thing.__module__}.{thing.__name__}"
    for name in PUBLIC:
        module = importlib.import_module(f"matryoshka.{name}")
        for key, thing in vars(module).items():
            is_own = getattr(thing, "__module__", "") == module.__name__
            if is_own and not key.startswith("_") and inspect.isfunction(thing):
                things[thing] = f"{module.__name__}.{key}"
    things[Index] = "matryoshka.retrieval.store.Index"
    found = []
    for thing, name in things.items():
        for full, function in functions_of(thing, name.removeprefix("matryoshka.")):
            parameters = inspect.signature(function).parameters.values()
            if any(map(is_array, parameters)):
                found.append((full, function))
    return sorted(found, key=lambda item: item[0])


FOUND = public_functions()
DECLARED = [(name, function) for name, function in FOUND if hasattr(function, "takes")]


def test_every_public_function_of_arrays_says_what_it_takes():
    lacking = []
    for name, function in FOUND:
        if any(name == known or name.startswith(f"{known}.") for known in CALLED | MOVED):
            continue
        for parameter in inspect.signature(function).parameters.values():
            declared = getattr(function, "takes", {})
            if is_array(parameter) and parameter.name not in declared:
                lacking.append(f"{name}({parameter.name})")
    assert lacking == []
    assert len(DECLARED) > 40, "the walk has lost its way"


# ---------------------------------------------------------------- what `takes` declares


def fitting(expected: Expected, sizes):
    """A valid array for a declaration."""
    shape = [
        int(size) if size.isdigit() else sizes.setdefault(size.removesuffix("+"), 2 + len(sizes))
        for size in expected.sizes or ("n",)
    ]
    if "b" in expected.kinds:
        return np.ones(shape, bool)
    if expected.itemsize == 1:
        return np.ones(shape, np.uint8)
    return np.ones(shape, np.int64 if "f" not in expected.kinds else np.float32)


def hostile(expected: Expected, good):
    """(what it is, array) of arrays that a declaration excludes."""
    yield "complex", good.astype(np.complex64)
    yield "objects", good.astype(object)
    yield "texts", good.astype(str)
    yield "bytes", good.astype("S4")
    yield "dates", good.astype("M8[s]")
    yield "a scalar", good.reshape(-1)[0]
    yield "one axis more", good[None]
    yield "None inside", np.full(good.shape, None)
    if "b" not in expected.kinds:
        yield "a mask", good.astype(bool)
    if "f" not in expected.kinds:
        yield "floats", good.astype(np.float64)
        yield "halves", good.astype(np.float64) + 0.5
        yield "NaN", np.full(good.shape, np.nan)
    if "i" not in expected.kinds:
        yield "integers", good.astype(np.int64)
    elif not expected.itemsize:
        yield "2^64 - 1", np.full(good.shape, 2**64 - 1, np.uint64)
    if expected.itemsize == 1:
        yield "wider integers", good.astype(np.uint16)
    if expected.finite:
        yield "NaN", np.full(good.shape, np.nan, np.float32)
        yield "infinity", np.full(good.shape, -np.inf)
    if expected.low is not None:
        yield "below", np.full(good.shape, expected.low - 1)
    for axis, size in enumerate(expected.sizes or ()):
        if size.endswith("+"):
            yield f"axis {axis} empty", np.take(good, [], axis)


@pytest.mark.parametrize(("name", "function"), DECLARED, ids=[name for name, _ in DECLARED])
def test_a_declared_array_is_all_that_a_function_takes(name, function):
    sizes = {}
    good = {key: fitting(expected, sizes) for key, expected in function.takes.items()}
    others = {}
    for key, parameter in inspect.signature(function).parameters.items():
        is_required = parameter.default is parameter.empty and key not in good
        if is_required and parameter.kind is not parameter.VAR_KEYWORD:
            others[key] = None  # nothing of the function runs
    for key, expected in function.takes.items():
        for what, array in hostile(expected, good[key]):
            with pytest.raises(ValueError, match=rf"^{key}: ") as caught:
                function(**{**good, **others, key: array})
            assert getattr(caught.value, "user_error", False), (what, caught.value)
            assert "\n" not in str(caught.value)
        # A size that another argument has, too.
        shared = [size for size in expected.sizes or () if size[0].isalpha()]
        others_sizes = {
            size.removesuffix("+")
            for other, theirs in function.takes.items()
            if other != key
            for size in theirs.sizes or ()
        }
        for axis, size in enumerate(expected.sizes or ()):
            if size in shared and size.removesuffix("+") in others_sizes:
                longer = np.concatenate([good[key], np.take(good[key], [0], axis)], axis)
                with pytest.raises(ValueError, match="has"):
                    function(**{**good, **others, key: longer})


def test_takes_leaves_the_rest_to_the_function():
    @takes(rows=integers("N"), more=integers("N"))
    def total(rows, more: "np.ndarray | None" = None, *, times=1):
        return int(rows.sum()) * times + (0 if more is None else int(more.sum()))

    assert total([1, 2], times=2) == 6
    assert total(np.array([1, 2], np.uint64), more=[5, 5]) == 13
    assert total(torch.tensor([1, 2])) == 3
    assert total([]) == 0
    with pytest.raises(TypeError, match="missing"):
        total()
    with pytest.raises(ArrayError, match=r"^rows: "):
        total([[1], [2, 3]])
    with pytest.raises(ArrayError, match=r"^rows: has 9223372036854775808"):
        total(np.array([1 << 63], np.uint64))


# ---------------------------------------------------------------- searches


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return built(tmp_path_factory.mktemp("index"), short_rows(), dim=COLUMNS)


def short_rows():
    """Rows of numbers with float16's 11 bits: an index, whose rows are float16, changes none."""
    return random_rows(ROWS, COLUMNS).astype(np.float16).astype(np.float32)


def wrong_ids(shape):
    """Arrays that are no row numbers, of a shape with ROWS columns at most."""
    zeros = np.zeros(shape)
    yield zeros  # floats, even whole ones
    yield zeros + 0.5
    yield zeros + np.nan
    yield zeros.astype(np.complex64)
    yield zeros.astype(np.int64).astype(object)
    yield zeros.astype(str)
    yield zeros.astype("M8[s]")
    yield np.full(shape, 2**64 - 1, np.uint64)
    yield np.full(shape, 2**63, np.uint64)
    yield np.full(shape, ROWS)
    yield zeros.astype(np.int64)[None]
    yield np.int64(3)
    yield None if len(shape) == 2 else "rows"
    yield [1, [2, 3]]


def wrong_rows(good):
    """Arrays that are no rows of floating point numbers."""
    yield good.astype(np.int64)
    yield good > 0
    yield good.astype(np.complex64)
    yield good.astype(object)
    yield good.astype(str)
    yield good[0]
    yield good[None]
    yield good[:, :0]
    yield np.float32(3)
    yield None
    yield "photos"
    yield [[1.0, 2.0], [3.0]]
    yield {"a": 1}


def test_a_mask_selects_rows(index):
    rows = short_rows().astype(np.float64)
    rng = np.random.default_rng(0)
    turns = scaled(20, 500)
    near_ties = 0
    for turn in range(turns):
        asked = rng.standard_normal((3, COLUMNS))
        mask = rng.random(ROWS) < rng.choice([0, 0.03, 0.5, 1])
        cosines = asked @ rows.T / np.linalg.norm(rows, axis=1)
        expected = np.argsort(np.where(mask, -cosines, np.inf), kind="stable")[:, :5]
        expected = np.where(mask[expected], expected, -1)
        # What the order may change by: a few units of float32 in each of the sums.
        slack = 8 * 2.0**-24 * (abs(asked) @ abs(rows).T / np.linalg.norm(rows, axis=1)).max()
        for only in (mask, mask.tolist(), np.flatnonzero(mask), np.flatnonzero(mask).tolist()):
            found = index.search(asked, k=5, only=only).ids
            for query, (these, those) in enumerate(zip(found, expected, strict=True)):
                differ = these != those
                near_ties += differ.any()
                gaps = abs(cosines[query, these[differ]] - cosines[query, those[differ]])
                assert (these >= 0).sum() == (those >= 0).sum(), f"turn {turn}"
                assert len(set(these[these >= 0])) == (these >= 0).sum(), f"turn {turn}"
                assert mask[these[these >= 0]].all(), f"turn {turn}"
                assert (gaps <= slack).all(), f"turn {turn}: {these} instead of {those}"
    assert near_ties <= turns / 100, "two rows of 64 random numbers are hardly ever as near"
    unsigned = np.array([3, 4], np.uint64)
    assert sorted(index.search(asked, k=5, only=unsigned).ids[0].tolist()) == [-1, -1, -1, 3, 4]


def test_no_other_filter_is_taken(index):
    asked = random_rows(2, COLUMNS)
    for only in (*wrong_ids((4,)), np.ones(ROWS - 1, bool), np.ones((ROWS, 1), bool)):
        with pytest.raises(RetrievalError, match=r"^only: "):
            index.search(asked, k=3, only=only)
    for deleted in (
        np.zeros(ROWS, bool),
        np.zeros(2, np.int64),
        np.zeros(2),
        empty_bits(ROWS + 64),
        empty_bits(ROWS)[None],
        [0, 0],
        "rows",
    ):
        for search in (
            lambda d: index.search(asked, k=3, deleted=d),
            lambda d: exact_search(asked.repeat(35, 0), asked, 8, 3, deleted=d),
            lambda d: Searcher(asked.repeat(35, 0), 1).search(
                asked, SearchParams("scan", 8, 3), deleted=d
            ),
            lambda d: DeviceSearcher(asked.repeat(35, 0), "cpu").search(
                asked, SearchParams("exact", 8, 3), deleted=d
            ),
            lambda d: PrefixScan.build(asked.repeat(35, 0), 8, 1).search(asked, 3, deleted=d),
        ):
            with pytest.raises(RetrievalError, match=r"^deleted: "):
                search(deleted)
    for rows in wrong_ids((4,)):
        if isinstance(rows, np.ndarray) and rows.ndim == 2:
            continue  # an answer for each
        if isinstance(rows, np.integer):
            continue
        with pytest.raises(RetrievalError, match=r"^rows: "):
            index.is_deleted(rows)


def test_no_other_candidates_are_taken():
    rows = random_rows(ROWS, COLUMNS)
    for candidates in wrong_ids((2, 4)):
        if isinstance(candidates, np.integer) or candidates is None:
            continue
        with pytest.raises(RetrievalError, match=r"^candidates"):
            rerank(rows, rows[:2], candidates, [Stage(COLUMNS, 3)])
    with pytest.raises(RetrievalError, match=r"^candidates"):
        rerank(rows, rows[:2], np.ones((2, ROWS), bool), [Stage(COLUMNS, 3)])
    for cache in (rows[:5], rows.astype(np.float16), rows > 0):
        with pytest.raises(RetrievalError, match=r"^prefix_cache: "):
            rerank(rows, rows[:2], [[1], [2]], [Stage(COLUMNS, 3)], prefix_cache=cache)


def test_no_other_rows_are_taken(index, tmp_path):
    rows = random_rows(ROWS, COLUMNS)
    scan = PrefixScan.build(rows, 8, 1)
    bits = BinaryScan.build(rows, 64, 1)
    lists = InvertedFile.build(rows, 8, lists=2, num_threads=1)
    searcher = Searcher(rows, 1)
    params = SearchParams("scan", 8, 3)
    candidates = np.zeros((ROWS, 1), np.int64)
    for wrong in wrong_rows(rows):
        for call in (
            lambda x: index.search(x, k=3),
            lambda x: exact_search(x, rows, 8, 3),
            lambda x: exact_search(rows, x, 8, 3),
            lambda x: rerank(x, rows, candidates, [Stage(8, 1)]),
            lambda x: rerank(rows, x, candidates, [Stage(8, 1)]),
            lambda x: build_prefix_cache(x, 8),
            lambda x: PrefixScan.build(x, 8, 1),
            lambda x: BinaryScan.build(x, 64, 1),
            lambda x: InvertedFile.build(x, 8, num_threads=1),
            lambda x: Searcher(x, 1),
            lambda x: DeviceSearcher(x, "cpu"),
            lambda x: DeviceSearcher(rows, "cpu").search(x, params),
            lambda x: scan.search(x, 3),
            lambda x: bits.search(x, 3),
            lambda x: lists.search(x, 3),
            lambda x: searcher.search(x, params),
            lambda x: searcher.shortlist(x, params),
        ):
            with pytest.raises(RetrievalError, match=r"^(queries|database|prefix_cache): "):
                call(wrong)
    for k in (1.5, np.nan, "3", None, True, [3], -1, 2**64):
        for call in (scan.search, bits.search, lists.search, lambda q, k: exact_search(q, q, 8, k)):
            with pytest.raises((RetrievalError, TypeError), match=r"k=|int"):
                call(rows, k)


def test_no_other_rows_are_stored(tmp_path):
    rows = random_rows(6, 8)
    good = batch(rows)
    fields = ("names", "model", "preprocessing")
    same = {field: getattr(good, field) for field in fields}
    for wrong in (*wrong_rows(rows), rows[:0]):
        with (
            Writer(tmp_path / "a") as writer,
            pytest.raises(RetrievalError, match=r"^embeddings: "),
        ):
            writer.build(IndexRows(rows=wrong, labels=good.labels, **same))
    for labels in (*wrong_ids((6,)), np.ones(6, bool), np.arange(5)):
        if isinstance(labels, np.ndarray) and labels.dtype == np.int64 and labels.shape == (6,):
            continue  # any integer is a label
        with (
            Writer(tmp_path / "a") as writer,
            pytest.raises(RetrievalError, match=r"^embeddings: "),
        ):
            writer.build(IndexRows(rows=rows, labels=labels, **same))
    for origins in (*wrong_ids((6, 2)), np.zeros((6, 2), bool), np.full((6, 2), -1)):
        if origins is None:
            continue
        with (
            Writer(tmp_path / "a") as writer,
            pytest.raises(RetrievalError, match=r"^embeddings: "),
        ):
            writer.build(
                IndexRows(rows=rows, labels=good.labels, data=good.data, origins=origins, **same)
            )
    assert not (tmp_path / "a" / "index.json").exists()


def test_no_other_names_and_rows_are_looked_up(index):
    for names in ([1], [b"photos/1"], [None], np.array([1.5]), "photos/1"):
        with pytest.raises(TypeError):
            index.find(names)
    for row in (1.0, np.nan, True, "1", None, np.array([1.5])):
        for look in (index.name, index.vector, index.origin, index.class_name):
            with pytest.raises(TypeError):
                look(row)


def test_no_other_samples_are_a_subset():
    digits = Digits("val")
    for indices in wrong_ids((4,)):
        if isinstance(indices, np.ndarray) and np.array_equal(indices, np.full(4, ROWS)):
            continue
        with pytest.raises(ArrayError, match=r"^indices: "):
            Subset(digits, indices)
    for indices in ([len(digits.labels)], [-1], np.ones(len(digits.labels), bool)):
        with pytest.raises(ArrayError, match=r"^indices: "):
            Subset(digits, indices)


# ---------------------------------------------------------------- numbers at the ends of a type


def test_rows_of_any_size_are_found_without_a_warning(tmp_path):
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((ROWS, COLUMNS))
    asked = rng.standard_normal((5, COLUMNS))
    cosines = asked @ rows.T / np.linalg.norm(rows, axis=1)
    expected = np.argsort(-cosines, kind="stable")[:, :5]
    # Cosines do not depend on the lengths, so that no length may change the result.
    huge = rows * 10.0 ** rng.uniform(-290, 290, (ROWS, 1))
    long_queries = asked * 10.0 ** rng.uniform(-290, 290, (5, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stored = built_of(tmp_path / "huge", huge)
        for search in (
            lambda q: stored.search(q, SearchParams("exact", COLUMNS, 5)),
            lambda q: stored.search(q, SearchParams("scan", COLUMNS, 60, (Stage(COLUMNS, 5),))),
            lambda q: stored.search(q, k=5, only=np.ones(ROWS, bool)),
            lambda q: exact_search(huge, q, COLUMNS, 5),
            lambda q: DeviceSearcher(as_float32(huge), "cpu").search(
                q, SearchParams("exact", COLUMNS, 5)
            ),
            lambda q: rerank(
                as_float32(huge), q, np.tile(np.arange(ROWS), (5, 1)), [Stage(COLUMNS, 5)]
            ),
        ):
            for queries in (asked, long_queries, long_queries.astype(np.longdouble)):
                np.testing.assert_array_equal(search(queries).ids, expected)


def built_of(folder, rows):
    made = batch(np.zeros((len(rows), 1)))
    with Writer(folder, 1) as writer:
        return writer.build(
            IndexRows(rows, made.names, made.labels, made.model, made.preprocessing, data=made.data)
        )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300, -1e300, 1e-300, 0.0, 5e-324])
def test_one_number_at_the_end_of_a_type(tmp_path, value):
    rng = np.random.default_rng(5)
    rows = rng.standard_normal((20, 8))
    rows[7, 3] = value
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        index = built_of(tmp_path, rows)
        found = index.search(rng.standard_normal((4, 8)), k=20)
        unit(rows, 8)
        to_float16(rows)
        asked = rng.standard_normal((1, 8))
        asked[0, 2] = value
        own = index.search(asked, k=20)
        exact = index.search(asked, SearchParams("exact", 8, 20))
    is_valid = np.isfinite(value)
    assert all((7 in row) == is_valid for row in found.ids.tolist())
    assert np.isfinite(found.scores).sum() == 4 * (19 + is_valid)
    assert (own.ids >= 0).sum() == 20 * is_valid
    np.testing.assert_array_equal(own.ids, exact.ids)


def test_bits_are_set_for_row_numbers_only():
    bits = empty_bits(100)
    for rows in (*wrong_ids((3,)), [-1], [100 + 64]):
        if isinstance(rows, np.ndarray) and np.array_equal(rows, np.full(3, ROWS)):
            continue
        with pytest.raises((RetrievalError, IndexError)):
            set_bits(bits, rows)
    assert not bits.any()
