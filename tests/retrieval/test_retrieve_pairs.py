"""`matryoshka retrieve`: what it makes of a database and queries that do not quite go together."""

import json
import os

import numpy as np
import pytest
from embedding_folders import META, nested, write
from matryoshka.inference import index as program  # pyright: ignore[reportMissingImports]
from matryoshka.inference import retrieve  # pyright: ignore[reportMissingImports]

from matryoshka.retrieval import SearchParams, Stage
from matryoshka.retrieval.store import Index
from matryoshka.retrieval.store_writer import Writer
from matryoshka.retrieval.tables import exact_neighbours, open_pair, open_table

CLASSES = [f"class {i}" for i in range(12)]
FAST = ["--no-speed", "--truth=50"]


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda _: None)


def folders(**queries):
    """db (400 rows), x.index of it, and q (120 rows): 32 dimensions, 12 classes."""
    rows, labels = nested(520, 32, 0)
    write("db", rows[:400], labels[:400], classes=CLASSES)
    write("q", rows[400:], queries.pop("labels", labels[400:]), **{"classes": CLASSES} | queries)
    assert program.main(["build", "x.index", "--embeddings", "db", "--shortlist-dim", "8"]) == 0
    return rows, labels


def results(database, *options, queries="q", output="out"):
    assert (
        retrieve.main(
            [
                f"--database={database}",
                f"--queries={queries}",
                f"--output={output}",
                "--overwrite",
                *FAST,
                *options,
            ]
        )
        == 0
    )
    with open(f"{output}/results.json") as file:
        return json.load(file)


def refused(capsys, *options, status=2):
    with pytest.raises(SystemExit) as stop:
        retrieve.main([*options, *FAST])
    said = capsys.readouterr().err
    assert (stop.value.code, said.count("\n")) == (status, 1), said
    return said


def test_classes_go_by_name_whatever_the_database_is():
    """Shuffled names, and one that the database lacks."""
    _, labels = nested(520, 32, 0)
    order = np.random.default_rng(1).permutation(12)
    names = [CLASSES[i] for i in order]
    names[4] = "elsewhere"
    place = np.argsort(order)
    folders(labels=place[labels[400:]], classes=names)
    same = [results(name, "--at=5")["classes"] for name in ("db", "x.index")]
    assert same[0]["excluded"] == same[1]["excluded"] == (labels[400:] == order[4]).sum()
    assert same[0]["top1"] == pytest.approx(same[1]["top1"], abs=0.02), "top-1 of both directions"
    assert same[0]["top1"] > 0.5, "classes are not matched by name"


@pytest.mark.parametrize(
    ("queries", "words"),
    [
        ({"classes": [f"other {i}" for i in range(12)]}, "none of its classes"),
        ({"classes": None, "labels": np.arange(120) % 30}, "30 classes, x.index 12"),
        ({"labels": np.arange(120) % 30}, "labels outside of its 12 classes"),
    ],
)
def test_classes_that_do_not_fit_an_index_are_refused(capsys, queries, words):
    folders(**queries)
    capsys.readouterr()
    assert words in refused(capsys, "--database=x.index", "--queries=q", "--output=out")
    assert not os.path.exists("out")


def test_an_index_is_measured_as_it_searches(capsys):
    rows, _ = folders()
    own = SearchParams("scan", 8, 30, (Stage(16, 20), Stage(32, 10)))
    with Writer("x.index", 1) as writer:
        writer.choose(own, None)
    found = results("x.index")
    assert found["setting"] == {"index": "scan", "dim": 8, "k": 30, "stages": [[16, 20], [32, 10]]}
    assert list(found["classes"]["at"]) == ["10"]
    np.testing.assert_array_equal(
        np.load("out/ids.npy"), Index("x.index", 1).search(rows[400:], k=10).ids
    )
    longer = results("x.index", "--at=5,15")
    assert longer["setting"]["stages"][-1] == [32, 15]
    assert results("x.index", "--k=100")["setting"]["stages"] == [[32, 100]]
    capsys.readouterr()


def test_deleted_rows_are_not_missed():
    rows, labels = folders()
    gone = np.flatnonzero(labels[:400] == labels[400])[::2]
    assert program.main(["delete", "x.index", *(f"{i:05d}.jpg" for i in gone)]) == 0
    found = results("x.index", "--index=exact", "--at=5")["classes"]["at"]["5"]
    live = np.setdiff1d(np.arange(400), gone)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    recall = []
    for i in range(400, 520):
        best = live[np.argsort(-unit[live] @ unit[i], kind="stable")[:5]]
        recall.append((labels[best] == labels[i]).sum() / (labels[live] == labels[i]).sum())
    assert found["recall"] == pytest.approx(np.mean(recall), abs=1e-3), (
        "recall against the mean over queries"
    )


def test_recall_is_of_queries_at_random():
    """Queries come in the order of their classes: the first ones would be of one class."""
    folders()
    args = retrieve.parser().parse_args(
        ["--database=db", "--queries=q", "--output=out", "--truth=40"]
    )
    database, queries = open_pair(open_table("db"), open_table("q"))
    chosen = []
    for args.seed in (0, 1, 0):
        asked, exact = exact_neighbours(
            database, queries, count=args.truth, k=retrieve.RECALL_K, seed=args.seed
        )
        chosen.append([int(np.flatnonzero((queries.rows == query).all(1))[0]) for query in asked])
        assert len(set(chosen[-1])) == 40
        assert exact.shape == (40, 10)
    assert chosen[0] == chosen[2] != chosen[1]
    assert max(chosen[0]) > 80, "queries are not drawn from the whole range"
    assert min(chosen[0]) < 40, "queries are not drawn from the whole range"


def test_results_do_not_replace_embeddings_or_an_index(capsys):
    folders()
    os.makedirs("begun/.unfinished")
    capsys.readouterr()
    for name, words in (
        ("q", "contains embeddings (meta.json)"),
        ("x.index", "contains an index (index.json)"),
        ("begun", "contains embeddings (.unfinished)"),
    ):
        before = sorted(os.listdir(name))
        assert words in refused(
            capsys, "--database=db", "--queries=q", f"--output={name}", "--overwrite"
        )
        assert sorted(os.listdir(name)) == before


def test_notes_of_other_preparation_and_of_queries_in_the_database(capsys):
    rows, labels = folders(preprocessing=META["preprocessing"] | {"size": 64})
    write("twice", rows[:50], labels[:50], classes=CLASSES)
    for database in ("db", "x.index"):
        results(database)
        said = capsys.readouterr().out
        assert "another preprocessing ({'name': 'checkpoint', 'size': 64" in said
        results(database, queries="twice")
        assert "each finds itself" in capsys.readouterr().out


def test_arrays_in_any_order_of_memory_and_of_nothing_finite(capsys):
    rows, _ = nested(300, 300, 2)
    np.save("c-X.npy", rows[:250])
    np.save("f-X.npy", np.asfortranarray(rows[:250]))
    np.save("q-X.npy", np.asfortranarray(rows[250:].astype(np.float16)))
    np.save("bad-X.npy", np.full((50, 300), np.nan, np.float32))
    results("c-X.npy", queries="q-X.npy")
    ids = np.load("out/ids.npy")
    results("f-X.npy", queries="q-X.npy")
    np.testing.assert_array_equal(np.load("out/ids.npy"), ids)
    capsys.readouterr()
    for database, queries in (("c-X.npy", "bad-X.npy"), ("bad-X.npy", "c-X.npy")):
        for options in ([], ["--sweep", "--index=scan"]):
            with pytest.raises(SystemExit, match="2"):
                retrieve.main(
                    [
                        f"--database={database}",
                        f"--queries={queries}",
                        "--output=bad",
                        "--truth=20",
                        *(options or ["--no-speed"]),
                    ]
                )
            assert "NaN or infinity in every row" in capsys.readouterr().err


def test_a_certificate_belongs_to_the_rows_that_it_was_measured_on(capsys):
    rows, labels = folders()
    sweep = [
        "--database=x.index",
        "--queries=q",
        "--output=sweep",
        "--overwrite",
        "--sweep",
        "--choose",
    ]
    assert retrieve.main([*sweep, "--target-recall=0.5"]) == 0
    capsys.readouterr()

    def said():
        program.main(["info", "x.index"])
        return next(
            (line for line in capsys.readouterr().out.splitlines() if line.startswith("recall")), ""
        )

    assert "or more, with 95 % confidence (120 queries)" in said()
    chosen = Index("x.index", 1).params
    write("more", rows[:5], labels[:5], classes=CLASSES)
    changes = (
        ["add", "x.index", "--embeddings", "more", "--prefix", "more/"],
        ["delete", "x.index", "00007.jpg"],
        ["compact", "x.index"],
    )
    for change in changes:
        assert program.main(change) == 0
        capsys.readouterr()
        assert "measured before the index changed" in said()
        assert Index("x.index", 1).params == chosen
    assert retrieve.main([*sweep, "--target-recall=0.999999"]) == 1
    assert "is unchanged" in capsys.readouterr().err
    assert retrieve.main([*sweep, "--target-recall=0.5"]) == 0
    capsys.readouterr()
    assert "or more" in said()
