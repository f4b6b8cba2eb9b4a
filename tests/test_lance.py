"""An index that follows a LanceDB table: what is in it, edits, filters, tables that are something else."""

import numpy as np
import pytest

from matryoshka.retrieval import RetrievalError
from matryoshka.retrieval.store import FEW, Index
from matryoshka.retrieval.store_writer import Batch

pytest.importorskip("lancedb")
pytest.importorskip("pyarrow")
from matryoshka.retrieval.lance import Change, Record

MODEL = {"weights_sha256": "ab" * 32, "file": "model.safetensors"}


def batch(n, seed=0, prefix=""):
    rng = np.random.default_rng(seed)
    rows = rng.random((n, 24), dtype=np.float32)
    labels = np.arange(n) % 3
    return Batch(rows, [f"{prefix}{i}.jpg" for i in range(n)], labels, MODEL, {"size": 32}, ["cat", "dog", "eel"],
                 [{"path": "photos"}])  # fmt: skip


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
    assert (index.name(row), index.class_name(row), index.origin(row)) == ("17.jpg", "eel", ({"path": "photos"}, 17))
    query = np.random.default_rng(9).random((1, 24), dtype=np.float32)
    best = np.argsort(-cosines(given.rows, query[0]))[:10]
    assert [index.name(r) for r in index.search(query).ids[0].tolist()] == [f"{i}.jpg" for i in best]

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
    assert index.name(int(index.search(np.ones((1, 24), np.float32), 1).ids[0, 0])) == "200.jpg"
    hits = index.search(more.rows[7:8], 1)
    assert index.name(int(hits.ids[0, 0])) == "more/7.jpg"


def test_filters_are_lances_and_the_search_is_ours(tmp_path):
    record = Record.create(str(tmp_path / "lance"), "photos", given := batch(300))
    record.table.add_columns({"size": "item * 2"})
    record.sync(tmp_path / "index")
    index = Index(tmp_path / "index")
    names = record.names("class = 'dog' AND size >= 300")
    assert names == [f"{i}.jpg" for i in range(150, 300) if i % 3 == 1]
    found = index.search(given.rows[:20], 5, only=index.find(names))
    allowed = [int(name.removesuffix(".jpg")) for name in names]
    for query, ids in zip(given.rows[:20], found.ids, strict=True):
        best = sorted(allowed, key=lambda i: -cosines(given.rows, query)[i])[:5]
        assert [index.name(r) for r in ids.tolist()] == [f"{i}.jpg" for i in best]
    assert len(names) <= FEW
    with pytest.raises(RetrievalError, match="filter 'sizzle = 1'"):
        record.names("sizzle = 1")


def test_tables_that_are_something_else(tmp_path):
    uri = str(tmp_path / "lance")
    with pytest.raises(RetrievalError, match="has no table 'photos'"):
        Record(uri, "photos")
    Record.create(uri, "photos", batch(30))
    with pytest.raises(RetrievalError, match="--overwrite replaces it"):
        Record.create(uri, "photos", batch(30))
    Record.create(uri, "photos", batch(20), overwrite=True).sync(tmp_path / "index")
    assert len(Index(tmp_path / "index")) == 20
    Record(uri, "photos").table.drop_columns(["source"])
    with pytest.raises(RetrievalError, match="no column 'source'"):
        Record(uri, "photos")
    other = batch(30)
    other = Batch(other.rows, other.names, other.labels, {"weights_sha256": "cd" * 32, "file": "x"}, {"size": 32})
    with pytest.raises(RetrievalError, match="another model"):
        Record.create(uri, "other", other).sync(tmp_path / "index")
