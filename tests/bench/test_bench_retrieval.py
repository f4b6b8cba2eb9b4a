"""The bench of retrieval runs through on a few rows; its data and truth are what it says."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("faiss")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _bench(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import record

    monkeypatch.setattr(record, "RESULTS", tmp_path)


def test_the_retrieval_bench(capsys, tmp_path):
    import retrieval as bench

    few = [
        f"--work={tmp_path / 'work'}",
        "--rows=1500",
        "--truth=60",
        "--turns=1",
        "--seconds=0",
        "--lists=16",
    ]
    without_graphs = ["--only", "scans", "rerank", "pipelines"]
    assert bench.main([*few, "--threads=1", *without_graphs]) == 0
    said = capsys.readouterr().out
    for words in (
        "int8 scan, 16 dims",
        "binary scan, 256 bits",
        "IVF int8-64 np8 k130 -> 256 -> 2048",
        "faiss IVF,SQ8",
        "re-rank of 200 x 2048, one step",
        "funnel over one step",
    ):
        assert words in said
    rows = [json.loads(line) for line in (tmp_path / "retrieval.jsonl").read_text().splitlines()]
    scan = [row for row in rows if row["case"].startswith("int8 scan")]
    assert [row["batch"] for row in scan] == 3 * [1, 32, 60]
    assert scan[0]["ratio"]["n"] == 1
    pipelines = [row for row in rows if "lower" in row]
    ours = [
        row for row in pipelines if not row["case"].startswith(("upstream", "usearch", "faiss"))
    ]
    assert all(0.9 < row["recall"] <= 1 for row in ours), (
        "recall of every search of the library"
    )  # 1500 rows: nearly all are in every shortlist
    assert {"upstream: FlatL2 16 k200 -> 2048 (NumPy)"} < {row["case"] for row in pipelines} - {
        row["case"] for row in ours
    }
    assert all(row["lower"] < row["recall"] for row in pipelines), (
        "lower bounds of recall against recall"
    )

    stored = np.lib.format.open_memmap(tmp_path / "work" / "rows_1500_60.npy", "r")
    queries, truth = (
        np.load(tmp_path / "work" / f"{name}_1500_60.npy") for name in ("queries", "truth")
    )
    assert (stored.shape, stored.dtype) == ((1500, 2048), np.float16)
    rows64, query = stored.astype(np.float64), queries[7].astype(np.float64)
    cosines = rows64 @ query / np.linalg.norm(rows64, axis=1)
    assert set(truth[7]) == set(np.argsort(-cosines)[:10])
    assert (stored > 0).all(), "stored rows must not be empty"  # as behind a ReLU


def test_on_real_embeddings(capsys, tmp_path):
    import retrieval as bench
    from embedding_folders import nested, write

    rows, labels = nested(1400, 512, 0)
    database = write(tmp_path / "train", rows[:800], labels[:800])
    queries = write(tmp_path / "val", rows[800:], labels[800:])
    few = [
        f"--work={tmp_path / 'work'}",
        "--turns=1",
        "--seconds=0",
        "--lists=8",
        "--threads=1",
        "--only",
        "pipelines",
    ]
    assert bench.main([*few, f"--database={database}", f"--queries={queries}"]) == 0
    said = capsys.readouterr().out
    assert "train: 800 x 512" in said
    assert (
        "fastest with recall of at least 0.985" in said
    )  # all of the 8 lists: next to nothing is lost
    assert not list((tmp_path / "work").iterdir())
    with pytest.raises(SystemExit, match="2"):
        bench.main([*few, f"--database={database}"])
