"""`matryoshka retrieve`: what it writes and says against loops over all rows; sweeps and their
certificates.
"""

import json

import numpy as np
import pytest
from embedding_folders import nested, write
from matryoshka.inference import index as index_program
from matryoshka.inference import retrieve

from matryoshka.retrieval import SearchParams, Stage
from matryoshka.retrieval.store import Index
from matryoshka.retrieval.sweep import (
    Measured,
    certified,
    frontier,
    grid,
    queries_needed,
    summarise_recall,
)

N, Q, D = 1500, 120, 96
CLASSES = [f"class {i}" for i in range(13)]  # the last one is in no image


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folder with database and queries; the arrays as float64."""
    folder = tmp_path_factory.mktemp("retrieve")
    rows, labels = nested(N, D, 0)
    queries, asked = nested(Q, D, 1)
    np.random.default_rng(2).shuffle(labels[::3])  # neighbours are not all of one class
    asked[:3] = 12  # of a class that the database lacks
    write(folder / "db", rows, labels, classes=CLASSES)
    write(folder / "q", queries, asked, classes=CLASSES)
    return folder, rows.astype(np.float64), labels, queries.astype(np.float64), asked


def run(folder, *options, output="out", database="db", queries="q"):
    code = retrieve.main(
        [
            f"--database={folder / database}",
            f"--queries={folder / queries}",
            f"--output={folder / output}",
            "--overwrite",
            *options,
        ]
    )
    assert code == 0
    place = folder / output
    return (
        json.loads((place / "results.json").read_text()),
        np.load(place / "ids.npy"),
        np.load(place / "distances.npy"),
    )


def exact(rows, query, d, k):
    """ids and squared distances of the k nearest normalised prefixes."""
    a, b = (
        rows[:, :d] / np.linalg.norm(rows[:, :d], axis=1)[:, None],
        query[:d] / np.linalg.norm(query[:d]),
    )
    distance = ((a - b) ** 2).sum(1)
    order = np.argsort(distance, kind="stable")[:k]
    return order, distance[order]


def test_exact_search_and_all_of_its_numbers(data, capsys):
    folder, rows, labels, queries, asked = data
    results, ids, distances = run(
        folder, "--index=exact", "--at=1,5,20", "--truth=50", "--batches=7"
    )
    expected = [exact(rows, query, D, 20) for query in queries]
    assert (ids.dtype, ids.shape, distances.dtype) == (np.int64, (Q, 20), np.float32)
    assert np.mean(ids != [e[0] for e in expected]) < 0.002, (
        "ids differ from the loop's by more than float32 ties"
    )  # float32: neighbours of nearly the same distance
    np.testing.assert_allclose(distances, [e[1] for e in expected], atol=1e-5)
    scores = {k: [] for k in (1, 5, 20)}
    for found, label in zip(ids, asked, strict=True):
        right = [labels[i] == label for i in found]
        relevant = int((labels == label).sum())
        for k, all_of_k in scores.items():
            summed = sum(sum(right[: r + 1]) / (r + 1) for r in range(k) if right[r])
            hits = sum(right[:k])
            all_of_k.append(
                (
                    summed / k,
                    summed / min(k, relevant) if relevant else None,
                    hits / k,
                    hits / relevant if relevant else None,
                )
            )
    for k, all_of_k in scores.items():
        mean = [np.mean([s[j] for s in all_of_k if s[j] is not None]) for j in range(4)]
        shown = results["classes"]["at"][str(k)]
        got = [shown[name] for name in ("map_over_k", "map_over_min", "precision", "recall")]
        np.testing.assert_allclose(got, mean, rtol=1e-9)
    assert results["classes"]["top1"] == pytest.approx(np.mean([s[2] for s in scores[1]])), (
        "top-1 of the classes against the mean over queries"
    )
    assert results["classes"]["excluded"] == 3
    assert (
        results["exact"]["recall"],
        results["exact"]["perfect"],
        results["exact"]["queries"],
    ) == (1, 1, 50)
    assert 0.5 < results["exact"]["lower"] < 1, "the lower bound of 50 perfect queries"
    assert results["speed"]["batches"]["7"]["median"] > 0, "no speed"
    assert results["speed"]["latency_ms"]["p50"] <= results["speed"]["latency_ms"]["p99"], (
        "percentiles out of order"
    )
    assert results["memory"]["peak_bytes"] > 1e7, "the peak is less than Python needs"
    said = capsys.readouterr().out
    assert "3 queries without a row of their class" in said
    assert "queries/s" in said


@pytest.mark.parametrize(
    "options",
    [
        ["--index=scan", "--shortlist-dim=32", "--k=1500"],
        ["--index=ivf", "--nprobe=99999", "--k=1500"],
        ["--index=binary", "--k=1500"],
        ["--index=exact", "--shortlist-dim=16", "--k=1500"],
        ["--index=scan", "--funnel=16,32,96", "--funnel-k=1500,1500"],
    ],
    ids=" ".join,
)
def test_shortlists_of_everything_are_exact(data, options):
    folder, rows, _, queries, _ = data
    if "ivf" in options[0]:
        pytest.importorskip("faiss")
    results, ids, _ = run(folder, *options, "--no-speed", "--at=10", "--truth=0")
    np.testing.assert_array_equal(ids, [exact(rows, query, D, 10)[0] for query in queries])
    assert "speed" not in results
    assert "exact" not in results


def test_the_papers_funnel_ends_with_ten(data, capsys):
    folder, rows, _, queries, _ = data
    results, ids, distances = run(
        folder, "--index=exact", "--funnel=8,16,32,64,96", "--funnel-k=200,100,50,10", "--no-speed"
    )
    for query, found, near in zip(queries, ids, distances, strict=True):
        kept, _ = exact(rows, query, 8, 200)
        for d, keep in ((16, 100), (32, 50), (64, 10), (96, 10)):
            kept = kept[exact(rows[kept], query, d, keep)[0]]
        assert found.tolist() == kept.tolist()
        np.testing.assert_allclose(
            near,
            exact(rows, query, D, N)[1][
                [list(exact(rows, query, D, N)[0]).index(i) for i in found]
            ],
            atol=1e-5,
        )
    assert results["mflops"] == pytest.approx(
        (8 * N + 16 * 200 + 32 * 100 + 64 * 50 + 96 * 10) / 1e6
    ), "MFLOPs of the funnel"
    assert "--at 25,50,100 left out" in capsys.readouterr().out


def test_arrays_of_upstream_and_bare_ones(data, tmp_path, capsys):
    _, rows, labels, queries, asked = data
    for name, x, y in (("train", rows, labels), ("val", queries, asked)):
        np.save(tmp_path / f"{name}-X.npy", x.astype(np.float32))
        np.save(tmp_path / f"{name}-y.npy", y.astype(np.float16)[:, None])
    results, _, _ = run(
        tmp_path, "--no-speed", "--k=50", database="train-X.npy", queries="val-X.npy"
    )
    folder = data[0]
    same, _, _ = run(folder, "--no-speed", "--k=50")
    assert results["classes"] == same["classes"]
    np.save(tmp_path / "bare.npy", queries)
    results, ids, _ = run(
        tmp_path,
        "--no-speed",
        "--rerank-dim=0",
        "--at=3",
        database="train-X.npy",
        queries="bare.npy",
    )
    assert "classes" not in results
    assert ids.shape == (Q, 3)
    assert "no labels" in capsys.readouterr().out


def test_rows_and_queries_with_nan_and_k_beyond_the_database(tmp_path):
    rows = np.random.default_rng(0).random((7, 16)).astype(np.float32)
    rows[2, 3] = np.nan
    np.save(tmp_path / "db.npy", rows)
    asked = rows[[0, 2]].copy()
    np.save(tmp_path / "q.npy", asked)
    results, ids, distances = run(tmp_path, "--k=100", "--at=7", database="db.npy", queries="q.npy")
    assert sorted(ids[0].tolist()) == [-1, 0, 1, 3, 4, 5, 6]
    assert (ids[0, 0], ids[0, -1], distances[0, -1]) == (0, -1, np.inf)
    assert (ids[1] == -1).all()
    assert results["exact"]["queries"] == 1  # a query of NaN has no neighbours to lose


# ---------------------------------------------------------------- sweeps


def test_a_sweep_certifies_what_holds_on_other_queries(data, tmp_path, capsys):
    pytest.importorskip("faiss")
    folder, rows, _, _, _ = data
    many, labels = nested(1000, D, 5)
    write(tmp_path / "q", many[:700], labels[:700], classes=CLASSES)
    code = retrieve.main(
        [
            f"--database={folder / 'db'}",
            f"--queries={tmp_path / 'q'}",
            f"--output={tmp_path / 'out'}",
            "--sweep",
            "--index=scan,ivf",
            "--shortlist-dim=32",
            "--target-recall=0.95",
        ]
    )
    assert code == 0
    said = capsys.readouterr().out
    swept = json.loads((tmp_path / "out/sweep.json").read_text())
    won = swept["certificate"]
    assert (won["queries"], won["settings_tried"]) == (700, len(swept["settings"]))
    assert won["lower"] >= 0.95, "the certificate misses its target"
    assert f"options:     {won['options']}" in said
    assert (tmp_path / "out/frontier.png").read_bytes()[:4] == b"\x89PNG"
    rates = [one["rate"] for one in swept["frontier"]]
    recalls = [one["recall"] for one in swept["frontier"]]
    assert rates == sorted(rates, reverse=True)
    assert recalls == sorted(recalls)
    assert won["setting"] in [
        one["setting"] for one in swept["settings"] if one["lower"] >= 0.95
    ], "the recommended search must meet the recall bound of 0.95"
    # the options select this setting, and its recall holds on queries that the sweep has not seen
    write(tmp_path / "fresh", many[700:], labels[700:], classes=CLASSES)
    results = retrieve.main(
        [
            f"--database={folder / 'db'}",
            f"--queries={tmp_path / 'fresh'}",
            "--at=10",
            "--no-speed",
            f"--output={tmp_path / 'again'}",
            *won["options"].split(),
        ]
    )
    assert results == 0
    ids = np.load(tmp_path / "again/ids.npy")
    truth = [exact(rows, query.astype(np.float64), D, 10)[0] for query in many[700:]]
    assert (
        np.mean(
            [len(set(a) & set(b.tolist())) / 10 for a, b in zip(ids.tolist(), truth, strict=True)]
        )
        >= 0.95
    ), "the certified recall does not hold on new queries"


def test_a_sweep_without_enough_queries_says_how_many(data, capsys):
    folder = data[0]
    assert (
        retrieve.main(
            [
                f"--database={folder / 'db'}",
                f"--queries={folder / 'q'}",
                f"--output={folder / 'few'}",
                "--sweep",
                "--index=scan",
                "--shortlist-dim=64",
                "--overwrite",
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "no certificate" in said
    needed = int(said.split("needs ")[1].split()[0].replace(",", ""))
    assert "these are all " in said
    tried = len(json.loads((folder / "few/sweep.json").read_text())["settings"])
    bound = summarise_recall(np.ones(needed), 1, bonferroni=tried).lower
    assert bound >= 0.99 > summarise_recall(np.ones(needed - 1), 1, bonferroni=tried).lower, (
        "one query fewer would be enough, or one more is needed"
    )
    assert json.loads((folder / "few/sweep.json").read_text())["certificate"] is None


def test_an_index_is_searched_and_takes_over_what_the_sweep_found(data, tmp_path, capsys):
    folder, _, _, queries, _ = data
    assert (
        index_program.main(["build", str(tmp_path / "index"), f"--embeddings={folder / 'db'}"]) == 0
    )
    args = [
        f"--database={tmp_path / 'index'}",
        f"--queries={folder / 'q'}",
        f"--output={tmp_path / 'out'}",
    ]
    assert retrieve.main([*args, "--no-speed"]) == 0
    indexed = json.loads((tmp_path / "out/results.json").read_text())
    plain, _, _ = run(folder, "--no-speed", "--index=scan", "--k=200")
    assert indexed["classes"]["at"]["10"] == pytest.approx(
        plain["classes"]["at"]["10"], rel=0.02
    ), "metrics at 10 of the index against the exact search"  # float16 rows
    assert retrieve.main([*args, "--sweep", "--target-recall=0.8", "--choose"]) == 0
    chosen = Index(tmp_path / "index")
    swept = json.loads((tmp_path / "out/sweep.json").read_text())
    assert chosen.manifest["certificate"]["lower"] == swept["certificate"]["lower"] >= 0.8, (
        "the index has another certificate than the sweep"
    )
    assert chosen.params.as_dict() == swept["certificate"]["setting"]
    assert chosen.search(queries.astype(np.float32), k=10).ids.shape == (Q, 10)
    capsys.readouterr()
    assert index_program.main(["info", str(tmp_path / "index")]) == 0
    assert "recall   0.8" in capsys.readouterr().out.replace("recall   0.9", "recall   0.8")


def test_frontier_and_certificate_by_hand():
    def one(recall, rate, k):
        lost = round((1 - recall) * 2000)
        values = np.r_[np.ones(2000 - lost), np.zeros(lost)]
        return Measured(
            SearchParams("scan", 16, k, (Stage(64, 10),)),
            summarise_recall(values, 1),
            (rate,),
            1000,
        )

    a, b, c, d = one(0.9, 100, 20), one(0.95, 80, 30), one(0.94, 70, 40), one(1.0, 10, 50)
    assert frontier([c, d, a, b]) == [a, b, d]
    assert certified([a, b, c, d], 0.93) is b
    assert certified([a, b, c, d], 0.95) is d
    assert certified([a, b, c], 0.96) is None
    assert queries_needed(0.99, 1) < queries_needed(0.99, 100) < queries_needed(0.999, 100), (
        "more settings or a higher target need more queries"
    )


def test_the_grid_fits_the_data():
    for columns, rows in ((2048, 1_280_000), (512, 5000), (96, 300), (5, 7)):
        settings = grid(
            ["scan", "ivf", "binary", "hnsw"],
            columns=columns,
            rows=rows,
            neighbours=min(10, rows),
        )
        assert len(settings) == len(set(settings)) > 0, "the grid is empty or has duplicates"
        for setting in settings:
            assert setting.dim <= columns, f"{setting}: longer than the rows"
            assert setting.results >= min(10, rows), f"{setting}: fewer results than neighbours"
            assert setting.k <= rows, f"{setting}: more than the database has"
            assert setting.stages[-1].dim == columns
            assert setting.index != "binary" or setting.dim % 64 == 0


# ---------------------------------------------------------------- mistakes

MISTAKES = [
    (["--k=0"], "--k 0"),
    (["--at=0"], "--at 0"),
    (["--at=1,x"], "--at 1,x"),
    (["--index=tree"], "--index tree: 'tree' is unknown"),
    (["--index=scan,ivf"], "--sweep takes several"),
    (["--shortlist-dim=97"], "--shortlist-dim 97: "),
    (["--rerank-dim=97"], "db has 96 dimensions"),
    (["--index=binary", "--shortlist-dim=32"], "--shortlist-dim 32: binary takes multiples of 64"),
    (["--funnel=16,8", "--funnel-k=10"], "--funnel, --funnel-k: a funnel of dimensions [16, 8]"),
    (["--shortlist-dim=64", "--rerank-dim=32"], "--rerank-dim 32: is below --shortlist-dim 64"),
    (["--index=hnsw", "--ef=3000000000"], "--ef 3000000000"),
    (["--at=1000", "--k=100"], "--at 1000: "),
    (["--funnel=8,16"], "give both"),
    (["--funnel=8,16", "--funnel-k=10", "--k=5"], "leave out --k"),
    (["--funnel=8,16,32", "--funnel-k=10"], "needs 2 k, not 1"),
    (["--funnel=8,32,16", "--funnel-k=20,10"], "longer than the one before"),
    (["--funnel=8,16,32", "--funnel-k=10,20"], "falling"),
    (["--nprobe=0"], "--nprobe 0"),
    (["--sweep", "--k=5"], "--k: --sweep"),
    (["--sweep", "--truth=0"], "--truth must be 1"),
    (["--choose"], "works with --sweep"),
    (["--sweep", "--choose"], "is not an index"),
    (["--target-recall=2"], "--target-recall 2: expected more than 0, at most 1"),
    (["--threads=-1"], "--threads"),
]


@pytest.mark.parametrize(("options", "words"), MISTAKES, ids=[" ".join(o) for o, _ in MISTAKES])
def test_mistakes_are_one_line(data, capsys, options, words):
    folder = data[0]
    wrong(capsys, folder, words, *options)


def wrong(capsys, folder, words, *options, database="db", queries="q", output="never"):
    with pytest.raises(SystemExit) as stop:
        retrieve.main(
            [
                f"--database={folder / database}",
                f"--queries={folder / queries}",
                f"--output={folder / output}",
                *options,
            ]
        )
    said = capsys.readouterr().err
    assert (stop.value.code, said.count("\n")) == (2, 1), said
    assert words in said
    assert not (folder / "never").exists()


def test_tables_that_do_not_go_together(data, tmp_path, capsys):
    rows, labels = nested(20, 32, 0)
    write(tmp_path / "db", rows, labels)
    write(tmp_path / "wide", nested(20, 64, 0)[0], labels)
    write(tmp_path / "other", rows, labels, weights="cd" * 32)
    np.save(tmp_path / "empty.npy", rows[:0])
    np.save(tmp_path / "flat.npy", rows[0])
    np.save(tmp_path / "half-X.npy", rows)
    np.save(tmp_path / "half-y.npy", np.full((20, 1), 3000, np.float16))
    (tmp_path / "torn.npy").write_bytes((tmp_path / "flat.npy").read_bytes()[:50])
    for queries, words in (
        ("wide", "has 64 dimensions"),
        ("other", "another model"),
        ("none", "no such folder"),
        ("none.npy", "No such file"),
        ("empty.npy", "has no rows"),
        ("flat.npy", "expected floating point [rows, dimensions]"),
        ("half-X.npy", "cannot tell classes above 2048 apart"),
        ("torn.npy", "not a complete .npy"),
    ):
        wrong(capsys, tmp_path, words, queries=queries)
    wrong(capsys, tmp_path, "has no rows", database="empty.npy", queries="db")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/results.json").write_text("{}")
    wrong(capsys, tmp_path, "--overwrite", queries="db", output="out")
    assert (tmp_path / "out/results.json").read_text() == "{}"
