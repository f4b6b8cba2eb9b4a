"""The index on disk against a list of rows: what is built, added, replaced, deleted and compacted
is what is found.
"""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from stored_indexes import batch, built, random_rows

from matryoshka.retrieval import (
    RetrievalError,
    SearchParams,
    Stage,
    store,
    store_part,
    store_writer,
)
from matryoshka.retrieval.hits import empty_bits, get_bits, set_bits
from matryoshka.retrieval.store import MAX_EXACT_FILTER_ROWS, Index, slice_bits
from matryoshka.retrieval.store_part import MMAP_MIN_BYTES
from matryoshka.retrieval.store_writer import Writer, to_float16

NAN = float("nan")


@pytest.fixture(autouse=True, scope="module")
def _without_waiting_for_the_disk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        patch.setattr(store_part, "MMAP_MIN_BYTES", MMAP_MIN_BYTES)  # restored at exit
        yield


def cosines(rows, query, dim=None):
    """float64 [n]; -inf for rows with NaN or infinity, 0 for zeros."""
    out = []
    for row in np.asarray(rows, np.float64):
        a, b = row[:dim], np.asarray(query, np.float64)[:dim]
        if not np.isfinite(row).all():
            out.append(-np.inf)
            continue
        a = a / max(np.abs(a).max(), 1e-300)  # squares of 1e200 overflow
        length = np.linalg.norm(a) * np.linalg.norm(b)
        out.append(a @ b / length if length else 0.0)
    return np.array(out)


def check_hits(ids, scores, expected, stored):
    """One query's hits: of the highest expected scores, the ids that have them, equal stored rows
    by number.
    """
    found = [i for i in ids.tolist() if i >= 0]
    assert len(set(found)) == len(found)
    assert ids[len(found) :].tolist() == [-1] * (len(ids) - len(found))
    assert np.isneginf(scores[len(found) :]).all()
    best = sorted((v for v in expected if v > -np.inf), reverse=True)[: len(ids)]
    np.testing.assert_allclose([expected[i] for i in found], best, atol=3e-5)
    np.testing.assert_allclose(scores[: len(found)], [expected[i] for i in found], atol=3e-5)
    last = {}
    for i in found:
        assert last.get(stored[i], -1) < i, "equal rows are not ordered by id"
        last[stored[i]] = i
    for i, value in enumerate(expected):  # of equal rows, the first ones
        if value > -np.inf and stored[i] in last and i not in found:
            assert i > last[stored[i]], "an equal row with a lower id is missing"


# ---------------------------------------------------------------- any order of changes

COLUMNS = 6
NAMES = st.one_of(
    st.sampled_from(
        [
            "",
            "a",
            "b",
            "a/b.jpg",
            "new\nline",
            "\udc80.jpg",
            "\ud800",
            "é",
            "e\u0301",
            "x" * 300,
            "\0",
        ]
    ),
    st.text(st.characters(), max_size=3),
)
VALUES = st.one_of(
    st.sampled_from([[1] * COLUMNS, [0] * COLUMNS, [1, 2, 3] * 2, [3, -1] * 3]),  # equal rows
    st.lists(st.integers(-1, 3), min_size=COLUMNS, max_size=COLUMNS),
)


@st.composite
def additions(draw, most=40):
    """(names, rows of small integers times a power of two, classes, labels): float16 holds their
    directions exactly.
    """
    names = draw(st.lists(NAMES, min_size=1, max_size=most, unique=True))
    rows = np.array([draw(VALUES) for _ in names], np.float32)
    scale = np.array([draw(st.integers(-140, 120)) for _ in names])
    rows = np.ldexp(rows, scale[:, None])
    for i in draw(st.lists(st.integers(0, len(names) - 1), max_size=2)):
        rows[i, draw(st.integers(0, COLUMNS - 1))] = draw(
            st.sampled_from([np.nan, np.inf, -np.inf])
        )
    classes = draw(st.sampled_from([None, ["ant", "bee"], ["bee", "cat", "dog"]]))
    return (
        names,
        rows,
        classes,
        draw(st.lists(st.integers(-1, 3), min_size=len(names), max_size=len(names))),
    )


class Changes(RuleBasedStateMachine):
    """`rows`: (name, vector, class, origin, alive) of every row number, as the index is expected to
    be.
    """

    folder_maker = None

    @initialize(
        given=additions(),
        dim=st.sampled_from([0, 3, 6]),
        lists=st.sampled_from([0, 0, 3]),
        mapped=st.sampled_from([1, MMAP_MIN_BYTES]),
    )
    def build(self, given, dim, lists, mapped):
        store_part.MMAP_MIN_BYTES = mapped  # all files, or none of so few rows
        self.folder = self.folder_maker.mktemp("index") / "deep" / "folder"
        self.count, self.rows = 0, []
        if lists and not np.isfinite(given[1]).all(1).any():
            lists = 0
        made = self.changed(lambda writer: writer.build(self.next_batch(given), dim, lists=lists))
        assert made.dim == (dim or COLUMNS)
        self.remember(given)

    def next_batch(self, given):
        names, rows, classes, labels = given
        return batch(rows, names, classes, labels, path=f"set {self.count}")

    def remember(self, given):
        for i, (name, row, label) in enumerate(zip(given[0], given[1], given[3], strict=True)):
            named = given[2][label] if given[2] and 0 <= label < len(given[2]) else None
            self.rows.append([name, row, named, ({"path": f"set {self.count}"}, i), True])
        self.count += 1

    def changed(self, change):
        with Writer(self.folder, 1) as writer:
            self.index = change(writer)
        return self.index

    def alive(self):
        return {row[0]: i for i, row in enumerate(self.rows) if row[4]}

    @rule(given=additions(), replace=st.booleans())
    def add(self, given, replace):
        clash = set(given[0]) & set(self.alive())
        before = self.index
        if clash and not replace:
            with pytest.raises(RetrievalError, match="--replace"):
                self.changed(lambda writer: writer.add(self.next_batch(given)))
            assert before.is_current()
            return
        self.changed(lambda writer: writer.add(self.next_batch(given), replace))
        assert not before.is_current()
        assert len(before) == len(self.alive())  # a reader keeps what it had
        for name in clash:
            self.rows[self.alive()[name]][4] = False
        self.remember(given)

    @rule(data=st.data(), unknown=st.lists(NAMES, max_size=2))
    def delete(self, data, unknown):
        alive = self.alive()
        names = data.draw(st.lists(st.sampled_from(sorted(alive)), max_size=15)) if alive else []
        names += unknown
        if set(names) - set(alive):
            with pytest.raises(RetrievalError, match="--missing-ok"):
                self.changed(lambda writer: writer.delete(names))
            assert self.index.is_current()
        self.changed(lambda writer: writer.delete(names, missing_ok=True))
        for name in set(names) & set(alive):
            self.rows[alive[name]][4] = False

    @precondition(lambda self: self.alive())
    @rule()
    def compact(self):
        if self.index.manifest["lists"] and not any(
            np.isfinite(row[1]).all() for row in self.rows if row[4]
        ):
            return
        old = self.index
        self.changed(lambda writer: writer.compact())
        for name, row in self.alive().items():  # the files are gone, not what is open
            assert old.name(row) == name
        old.search(np.ones((1, COLUMNS), np.float32), k=3)
        self.rows = [row for row in self.rows if row[4]]
        assert len(self.index.parts) == 1
        assert self.index.total == len(self.rows)

    @invariant()
    def the_index_is_the_list(self):
        alive = self.alive()
        fresh = Index(self.folder, 1)
        names = [*dict.fromkeys(row[0] for row in self.rows), "no such name"]
        for index in (self.index, fresh):
            assert (len(index), index.total) == (len(alive), len(self.rows))
            assert index.find(names).tolist() == [alive.get(name, -1) for name in names]
            assert index.is_deleted(np.arange(index.total)).tolist() == [
                not row[4] for row in self.rows
            ]
        for i, (name, row, label, origin, _) in enumerate(self.rows):
            assert (fresh.name(i), fresh.class_name(i), fresh.origin(i)) == (name, label, origin)
            same = cosines(fresh.vector(i)[None], row)[0]
            expected = cosines(row[None], row)[0] if np.isfinite(row).all() else -np.inf
            assert same == pytest.approx(expected, abs=1e-9), (
                "scores of the stored index against the oracle"
            )
        on_disk = {f for f in os.listdir(self.folder) if f not in ("index.json", "writer.lock")}
        entry = fresh.manifest["deleted"]
        assert on_disk == {*fresh.manifest["parts"], *([entry["file"]] if entry else [])}

    @rule(query=VALUES, k=st.integers(1, 50), data=st.data())
    def search(self, query, k, data):
        index, asked = self.index, np.array([query, [NAN] * COLUMNS], np.float32)
        more = data.draw(st.lists(st.integers(0, index.total - 1), max_size=5))
        only = data.draw(st.none() | st.lists(st.integers(-1, index.total - 1), max_size=20))
        bits = empty_bits(index.total)
        set_bits(bits, np.array(more, np.int64))
        dim = data.draw(st.sampled_from([index.dim, COLUMNS]))
        last = (Stage(COLUMNS, k),)
        whole = SearchParams("ivf", index.dim, index.total, last, nprobe=1 << 20)
        vectors = [index.vector(i) for i in range(index.total)]
        default = None if index.total <= index.params.k else whole
        for setting, d in (
            (SearchParams("exact", dim, k), dim),
            (whole, COLUMNS),
            (default, COLUMNS),
        ):
            kept = [
                row[4] and i not in more and (only is None or i in only)
                for i, row in enumerate(self.rows)
            ]
            expected = np.where(kept, cosines([row[1] for row in self.rows], query, d), -np.inf)
            before = asked.copy()
            allowed = None if only is None else np.array(only, np.int64)
            hits = index.search(asked, setting, k=k, deleted=bits, only=allowed)
            check_hits(
                hits.ids[0], hits.scores[0], expected.tolist(), [v[:d].tobytes() for v in vectors]
            )
            assert (hits.ids[1] == -1).all()
            np.testing.assert_array_equal(asked, before)


def test_any_order_of_changes(tmp_path_factory):
    from hypothesis.stateful import run_state_machine_as_test

    machine = type("Machine", (Changes,), {"folder_maker": tmp_path_factory})
    run_state_machine_as_test(machine, settings=settings(max_examples=20, stateful_step_count=12))


# ---------------------------------------------------------------- searches over parts


@pytest.mark.parametrize("lists", [0, 5])
def test_parts_of_any_size_are_one_index(tmp_path, lists):
    """Parts of 130, 1, 64 and 77 rows, some deleted: against the same rows as one part, and against
    loops.
    """
    rows, asked = random_rows(272), random_rows(15, seed=1)
    gone = [0, 63, 64, 129, 130, 131, 195, 271]
    with Writer(tmp_path, 1) as writer:
        writer.build(batch(rows[:130], [str(i) for i in range(130)]), lists=lists)
        for a, b in ((130, 131), (131, 195), (195, 272)):
            writer.add(batch(rows[a:b], [str(i) for i in range(a, b)]))
        index = writer.delete([str(i) for i in gone])
    assert [part.count for part in index.parts] == [130, 1, 64, 77]
    out = {}
    for k in (1, 10, 272):
        for setting in (
            None,
            SearchParams("scan", 24, 272, (Stage(24, 300),)),
            SearchParams("exact", 24, k),
        ):
            hits = out[k, setting and setting.index] = index.search(asked, setting, k=k)
            for q, query in enumerate(asked):
                expected = cosines(rows, query)
                expected[gone] = -np.inf
                if setting is not None:
                    np.testing.assert_allclose(
                        hits.scores[q], np.sort(expected)[::-1][:k], atol=1e-3
                    )
                    best = [i for i in np.argsort(-expected)[:k].tolist() if expected[i] > -np.inf]
                    assert len(set(best) ^ set(hits.ids[q].tolist()) - {-1}) <= 2, (
                        "more than one neighbour differs"
                    )  # float16
    index.warm()
    np.testing.assert_array_equal(index.search(asked, k=10).ids, out[10, None].ids)
    np.testing.assert_array_equal(
        Index(tmp_path, 2).search(asked, k=10).scores, out[10, None].scores
    )
    names = [[index.name(i) for i in row] for row in out[10, "exact"].ids.tolist()]
    with Writer(tmp_path, 1) as writer:
        after = writer.compact()
    found = after.search(asked, SearchParams("exact", 24, 10))
    assert [[after.name(i) for i in row] for row in found.ids.tolist()] == names
    np.testing.assert_allclose(found.scores, out[10, "exact"].scores, atol=1e-6)
    assert bool(after.manifest["lists"]) == (after.parts[0].metadata["lists"] > 0) == bool(lists)


def test_few_lists_and_narrow_filters(tmp_path, monkeypatch):
    rows = random_rows(1500, seed=2)
    index = built(tmp_path, rows, lists=50)
    assert index.parts[0].metadata["lists"] == 50
    few = SearchParams("ivf", 24, 100, (Stage(24, 5),), nprobe=2)
    near = [int(np.argmax(cosines(rows, row))) for row in rows[:40]]
    assert (
        near == index.search(rows[:40], few, k=1).ids[:, 0].tolist()
    )  # a row is in its own centroid's list
    asked, only = random_rows(20, seed=3), np.arange(0, 1500, 100)
    truth = [only[np.argsort(-cosines(rows[only], query))[:5]].tolist() for query in asked]
    full = index.search(
        asked, few, k=5, only=only
    )  # up to MAX_EXACT_FILTER_ROWS rows: compared in full
    assert len(only) <= MAX_EXACT_FILTER_ROWS, "the filter is too long to be compared in full"
    assert full.ids.tolist() == truth
    monkeypatch.setattr(store, "MAX_EXACT_FILTER_ROWS", 0)  # more: 2 lists of 50 become all of them
    assert index.search(asked, few, k=5, only=only).ids.tolist() == truth
    assert (index.search(asked, few, k=5, only=np.array([], np.int64)).ids == -1).all()


@given(st.integers(0, 200), st.integers(1, 200), st.integers(0, 100), st.integers(0, 99))
@settings(max_examples=150)
def test_bits_of_a_part(first, count, after, seed):
    bits = (np.random.default_rng(seed).random(first + count + after) < 0.5).tolist()
    packed = empty_bits(len(bits))
    set_bits(packed, np.flatnonzero(bits))
    cut = slice_bits(packed, first, count)
    assert len(cut) == len(empty_bits(count))
    assert get_bits(cut, 0, count).tolist() == bits[first : first + count]
    assert sum(int(word).bit_count() for word in cut) == sum(bits[first : first + count])


def test_mistakes_of_a_search(tmp_path):
    index = built(tmp_path, random_rows(10), dim=8)
    asked = random_rows(1)
    for change, words in (
        ({"queries": asked[:, :23]}, "23 dimensions"),
        ({"queries": np.ones((1, 25), np.float32)}, "25 dimensions"),
        ({"queries": asked[0]}, "expected floating point"),
        ({"k": 0}, "k=0"),
        ({"params": SearchParams("binary", 8, 5)}, "codes of 8 dimensions"),
        ({"params": SearchParams("scan", 16, 5)}, "codes of 8 dimensions"),
        ({"params": SearchParams("exact", 25, 5)}, "prefix of 25"),
        ({"params": SearchParams("scan", 8, 5, (Stage(25, 5),))}, "prefix of 25"),
        ({"only": np.array([3, 10])}, "row 10 out of range, .* has 10 rows"),
        ({"deleted": empty_bits(100)}, "bits for 128 rows"),
    ):
        with pytest.raises(RetrievalError, match=words):
            index.search(**{"queries": asked, "k": 3, **change})
    for row in (-1, 10):
        with pytest.raises(IndexError):
            index.name(row)


# ---------------------------------------------------------------- rows and names


@given(
    st.lists(
        st.lists(
            st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=4, max_size=4
        ),
        min_size=1,
        max_size=5,
    ),
)
@settings(max_examples=150)
def test_rows_are_stored_as_far_as_their_largest_number_allows(values):
    rows = np.array(values, np.float32)
    before = rows.copy()
    stored = to_float16(rows)
    np.testing.assert_array_equal(rows, before)
    assert stored.dtype == np.float16
    for row, out in zip(rows.astype(np.float64), stored.astype(np.float64), strict=True):
        top = np.abs(row).max()
        if not top:
            assert not out.any()
            continue
        scale = 2.0 ** (9 - np.frexp(top)[1])
        assert 256 <= np.abs(out).max() <= 512, "the largest number is not scaled to 256 .. 512"
        np.testing.assert_allclose(out, row * scale, rtol=2**-11, atol=2**-25)


def test_rows_that_float16_cannot_hold(tmp_path):
    rows = np.array(
        [[1e38, 1e38], [1e-38, 3e-38], [1e-45, 0], [0, 0], [NAN, 1], [np.inf, 1]], np.float32
    )
    index = built(tmp_path, rows)
    hits = index.search(np.array([[1, 1], [1, 3], [1, 0]], np.float32), k=6)
    assert hits.ids[:, 0].tolist() == [0, 1, 2]
    np.testing.assert_allclose(hits.scores[:, 0], 1, atol=1e-3)
    assert [sorted(ids) for ids in hits.ids.tolist()] == [[-1, -1, 0, 1, 2, 3]] * 3
    assert hits.scores[0, 3] == 0  # the zero vector


def test_names_of_the_same_hash(tmp_path, monkeypatch):
    for module in (store, store_part, store_writer):
        monkeypatch.setattr(module, "name_hash", len)
    names = ["a", "b", "c", "aa", "bb", ""]
    index = built(tmp_path, random_rows(6), names)
    assert index.find([*names, "d", "ab", "abc"]).tolist() == [0, 1, 2, 3, 4, 5, -1, -1, -1]
    with Writer(tmp_path, 1) as writer:
        writer.add(batch(random_rows(2), ["d", "b"]), replace=True)
        index = writer.delete(["aa", ""])
    assert index.find([*names, "d"]).tolist() == [0, 7, 2, -1, 4, -1, 6]
