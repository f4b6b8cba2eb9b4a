"""An index that follows a LanceDB table: what is in it, edits, filters, tables that are something
else.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from matryoshka.retrieval import RetrievalError, store_part
from matryoshka.retrieval.store import MAX_EXACT_FILTER_ROWS, Index
from matryoshka.retrieval.store_writer import IndexRows, Writer

pytest.importorskip("lancedb")
pytest.importorskip("pyarrow")
from matryoshka.retrieval.lance import Change, Record

MODEL = {"weights_sha256": "ab" * 32, "file": "model.safetensors"}


def batch(n, seed=0, prefix=""):
    rng = np.random.default_rng(seed)
    rows = rng.random((n, 24), dtype=np.float32)
    labels = np.arange(n) % 3
    return IndexRows(
        rows,
        [f"{prefix}{i}.jpg" for i in range(n)],
        labels,
        MODEL,
        {"size": 32},
        classes=["cat", "dog", "eel"],
        data=[{"path": "photos"}],
    )


def cosines(rows, query):
    rows, query = np.asarray(rows, np.float64), np.asarray(query, np.float64)
    return rows @ query / np.linalg.norm(rows, axis=1) / np.linalg.norm(query)


def test_the_index_follows_the_table(tmp_path):
    uri, folder = str(tmp_path / "lance"), tmp_path / "index"
    given = batch(500)
    record = Record.create(uri, "photos", given)
    assert record.sync(folder) == Change(500, 0, 0)
    assert record.sync(folder) == Change(0, 0, 0)
    index = Index(folder)
    row = int(index.find(["17.jpg"])[0])
    assert (index.name(row), index.class_name(row), index.origin(row)) == (
        "17.jpg",
        "eel",
        ({"path": "photos"}, 17),
    )
    query = np.random.default_rng(9).random((1, 24), dtype=np.float32)
    best = np.argsort(-cosines(given.rows, query[0]))[:10]
    assert [index.name(r) for r in index.search(query).ids[0].tolist()] == [
        f"{i}.jpg" for i in best
    ]

    record.table.delete("item < 100")
    record.table.update(where="item = 200", values={"vector": [1.0] * 24})
    more = batch(50, 1, "more/")
    extra = Record.create(uri, "more", more).table.to_arrow()
    record.table.add(extra)
    assert Record(uri, "photos").sync(folder) == Change(50, 1, 100)
    assert not index.is_current()
    index = Index(folder)
    assert len(index) == 450
    assert index.find(["99.jpg"]).tolist() == [-1]
    assert index.name(int(index.search(np.ones((1, 24), np.float32), k=1).ids[0, 0])) == "200.jpg"
    hits = index.search(more.rows[7:8], k=1)
    assert index.name(int(hits.ids[0, 0])) == "more/7.jpg"


def test_filters_are_lances_and_the_search_is_ours(tmp_path):
    record = Record.create(str(tmp_path / "lance"), "photos", given := batch(300))
    record.table.add_columns({"size": "item * 2"})
    record.sync(tmp_path / "index")
    index = Index(tmp_path / "index")
    names = record.names("class = 'dog' AND size >= 300")
    assert names == [f"{i}.jpg" for i in range(150, 300) if i % 3 == 1]
    found = index.search(given.rows[:20], k=5, only=index.find(names))
    allowed = [int(name.removesuffix(".jpg")) for name in names]
    for query, ids in zip(given.rows[:20], found.ids, strict=True):
        best = sorted(allowed, key=lambda i: -cosines(given.rows, query)[i])[:5]
        assert [index.name(r) for r in ids.tolist()] == [f"{i}.jpg" for i in best]
    assert len(names) <= MAX_EXACT_FILTER_ROWS, "the filter is too long to be compared in full"
    with pytest.raises(RetrievalError, match="filter 'sizzle = 1'"):
        record.names("sizzle = 1")


def test_tables_that_are_something_else(tmp_path):
    uri = str(tmp_path / "lance")
    with pytest.raises(RetrievalError, match=r"has no table 'photos'.*index record"):
        Record(uri, "photos")
    assert not list(tmp_path.iterdir())  # nothing is made there
    Record.create(uri, "photos", batch(30))
    with pytest.raises(RetrievalError, match="has no table 'x'"):
        Record(uri, "x")
    with pytest.raises(RetrievalError, match="--overwrite replaces it"):
        Record.create(uri, "photos", batch(30))
    Record.create(uri, "photos", batch(20), overwrite=True).sync(tmp_path / "index")
    assert len(Index(tmp_path / "index")) == 20
    Record(uri, "photos").table.drop_columns(["source"])
    with pytest.raises(RetrievalError, match="no column 'source'"):
        Record(uri, "photos")
    other = batch(30)
    other = IndexRows(
        other.rows,
        other.names,
        other.labels,
        {"weights_sha256": "cd" * 32, "file": "x"},
        {"size": 32},
    )
    with pytest.raises(RetrievalError, match="another model"):
        Record.create(uri, "other", other).sync(tmp_path / "index")
    (tmp_path / "file").write_bytes(b"")
    for path in ("file", "file/deeper"):
        with pytest.raises(
            RetrievalError, match=f"{path}: is a file, or in one; --lancedb takes a folder"
        ):
            Record.create(str(tmp_path / path), "photos", batch(30))
    with pytest.raises(RetrievalError, match="file: is a file"):
        Record(str(tmp_path / "file"), "photos")


def said(index):
    """{name: (class, data set, number there)} of the rows that are not deleted."""
    rows = [row for row in range(index.total) if not index.is_deleted(np.array([row]))[0]]
    return {index.name(row): (index.class_name(row), *index.origin(row)) for row in rows}


def test_edits_of_anything_reach_the_index(tmp_path):
    folder = tmp_path / "index"
    record = Record.create(str(tmp_path / "lance"), "photos", batch(300))
    record.table.update(
        where="id = '2.jpg'", values={"class": None, "label": 1}
    )  # not the second of the named classes
    record.sync(folder)
    expected = said(Index(folder))
    assert expected["2.jpg"] == (None, {"path": "photos"}, 2)
    for where, values, of in (
        ("id = '3.jpg'", {"class": "dog"}, lambda row: ("dog", *row[1:])),
        ("id = '4.jpg'", {"class": "newt", "label": 9}, lambda row: ("newt", *row[1:])),
        (
            "id = '5.jpg'",
            {"source": "elsewhere"},
            lambda row: (row[0], {"path": "elsewhere"}, row[2]),
        ),
        ("id = '6.jpg'", {"item": 4_000_000_000}, lambda row: (*row[:2], 4_000_000_000)),
        ("id = '7.jpg'", {"class": None}, lambda row: (None, *row[1:])),
        ("id = '8.jpg'", {"class": None, "label": -1}, lambda row: (None, *row[1:])),
    ):
        record.table.update(where=where, values=values)
        name = where.split("'")[1]
        expected[name] = of(expected[name])
        assert record.sync(folder) == Change(0, 1, 0)
        assert said(Index(folder)) == expected
        assert record.sync(folder) == Change(0, 0, 0)
    record.table.update(where="id = '7.jpg'", values={"label": 0})  # all that is known of its class
    assert record.sync(folder) == Change(0, 1, 0)
    assert said(Index(folder)) == expected
    record.table.update(
        where="id = '9.jpg'", values={"label": 2}
    )  # its class has a name, which decides
    assert record.sync(folder) == Change(0, 0, 0)
    with Writer(folder) as writer:
        assert said(writer.compact()) == expected
    assert record.sync(folder) == Change(0, 0, 0)
    record.table.update(where="id = '10.jpg'", values={"item": -1})
    with pytest.raises(RetrievalError, match="'photos' has items outside 0 to 2\\^32"):
        record.sync(folder)


def test_labels_without_classes_and_rows_that_say_nothing(tmp_path):
    given = batch(60)
    plain = IndexRows(given.rows, given.names, np.arange(60) - 1, MODEL, {"size": 32})
    with Writer(tmp_path / "built") as writer:
        built = writer.build(plain)
    record = Record.create(str(tmp_path / "lance"), "photos", plain)
    assert record.sync(tmp_path / "built") == Change(0, 0, 0)
    record.sync(tmp_path / "index")
    index = Index(tmp_path / "index")
    assert said(index) == said(built)
    np.testing.assert_array_equal(index.parts[0].labels, np.arange(60) - 1)
    record.table.update(where="id = '3.jpg'", values={"label": 7})
    assert record.sync(tmp_path / "index") == Change(0, 1, 0)
    index = Index(tmp_path / "index")
    assert index.parts[1].labels.tolist() == [7]
    record.table.update(where="id = '4.jpg'", values={"label": None, "source": None, "item": None})
    assert record.sync(tmp_path / "index") == Change(0, 1, 0)
    assert Index(tmp_path / "index").parts[2].labels.tolist() == [-1]
    assert record.sync(tmp_path / "index") == Change(0, 0, 0)


def test_the_index_of_before_is_closed_when_that_of_after_is_opened(tmp_path, monkeypatch):
    """As in test_store_limits.py."""
    monkeypatch.setattr(store_part, "MMAP_MIN_BYTES", 1)
    most, opened = 0, store_part.Part.__init__

    def counted(part, *args, **options):
        nonlocal most
        opened(part, *args, **options)
        with open("/proc/self/maps") as maps:
            most = max(most, sum(f"{tmp_path}/index/part-" in line for line in maps))

    record = Record.create(str(tmp_path / "lance"), "photos", batch(60))
    monkeypatch.setattr(store_part.Part, "__init__", counted)
    record.sync(tmp_path / "index")
    one, most = most, 0
    record.table.update(where="id = '3.jpg'", values={"class": "dog"})
    record.table.delete("id = '4.jpg'")
    assert record.sync(tmp_path / "index") == Change(0, 1, 1)
    assert one < most <= 2 * one, f"{most} maps are open, one index has {one}"


def test_an_index_that_follows_names_the_data_of_one_that_was_built(tmp_path):
    """Two data sets, classes in another order than the rows, labels without a name: as if built
    directly.
    """
    one, n = batch(90), 90
    data = [
        {"path": "photos", "fingerprint": "aa", "num_classes": 3},
        {"path": "more", "fingerprint": "bb"},
    ]
    origins = np.stack([np.arange(n) % 2, np.arange(n)[::-1]], 1).astype(np.uint32)
    given = IndexRows(
        one.rows,
        one.names,
        (np.arange(n)[::-1] % 5) - 1,
        MODEL,
        {"size": 32},
        classes=one.classes,
        data=data,
        origins=origins,
    )
    with Writer(tmp_path / "built") as writer:
        built = writer.build(given)
    record = Record.create(str(tmp_path / "lance"), "photos", given)
    assert record.data == data
    record.sync(tmp_path / "synced")
    index = Index(tmp_path / "synced")
    assert said(index) == said(built)
    assert {row[1]["fingerprint"] for row in said(index).values()} == {"aa", "bb"}
    before = said(built)
    record.sync(tmp_path / "built")  # what is there already stays
    assert said(Index(tmp_path / "built")) == before


def test_a_new_table_is_made_without_a_warning(tmp_path):
    code = (
        "import sys\n"
        f"sys.path[:0] = [{str(Path(__file__).parent)!r}, "
        f"{str(Path(__file__).parents[1] / 'builders')!r}]\n"
        "from test_lance import Record, batch\n"
        f"for overwrite in (False, True): Record.create({str(tmp_path / 'lance')!r}, 'photos', "
        "batch(9), overwrite)\n"
        f"Record.create({str(tmp_path / 'lance')!r}, 'more', batch(9), True)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARN" not in done.stderr
