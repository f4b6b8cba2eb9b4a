"""Options of `matryoshka retrieve`: what a certificate says selects its setting; what does not
count is refused.
"""

import itertools
import json

import numpy as np
import pytest
from embedding_folders import nested, write
from matryoshka.inference import retrieve

from matryoshka.retrieval import Searcher, SearchParams, Stage, exact_search
from matryoshka.retrieval import sweep as sweep_module
from matryoshka.retrieval.ranking_metrics import recall_against_exact, summarise_recall
from matryoshka.retrieval.sweep import (
    NPROBES,
    TURNS,
    Measured,
    certified,
    frontier,
    grid,
    measure,
    remeasure_frontier,
)
from matryoshka.retrieval.sweep_report import frontier_table
from matryoshka.retrieval.tables import Table, open_table

N, D = 600, 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("sweep")
    write(place / "db", *nested(N, D, 0))
    write(place / "q", *nested(60, D, 1))
    return place


def parsed(folder, *options):
    args = retrieve.parser().parse_args(
        [
            f"--database={folder / 'db'}",
            f"--queries={folder / 'q'}",
            f"--output={folder / 'none'}",
            *options,
        ]
    )
    retrieve.check(args)
    return args


def measured(setting, mean, rate, lower=None, queries=2000):
    lost = round((1 - mean) * queries)
    recall = summarise_recall(np.r_[np.ones(queries - lost), np.zeros(lost)], 1)
    return Measured(
        setting, recall._replace(lower=recall.lower if lower is None else lower), (rate,), 1000
    )


def scan(k):
    return SearchParams("scan", 16, k, (Stage(D, 10),))


# ---------------------------------------------------------------- settings


def test_the_options_of_every_setting_select_it(folder):
    """The last stage may keep more than ten, which changes none of the first ten."""
    table = open_table(str(folder / "db"))
    settings = grid(["scan", "ivf", "binary", "hnsw"], columns=D, rows=N)
    assert {s.index for s in settings} == {"scan", "ivf", "binary", "hnsw"}
    assert {len(s.stages) for s in settings} == {1, 2}
    for setting in [
        *settings,
        SearchParams("binary", 128, 400, (Stage(32, 120), Stage(64, 25), Stage(128, 10))),
    ]:
        text = setting.as_options(seed=3)
        selected = retrieve.resolve_params(parsed(folder, *text.split()), table).params
        assert ("--seed 3" in text) == (setting.index == "ivf")
        assert selected.stages[-1].keep >= 10, "the last stage keeps too few"
        last = Stage(selected.stages[-1].dim, 10)
        again = (selected.index, selected.dim, selected.k, (*selected.stages[:-1], last))
        assert again == (setting.index, setting.dim, setting.k, setting.stages)
        assert setting.index != "ivf" or selected.nprobe == setting.nprobe
        assert setting.index != "hnsw" or selected.ef_search == setting.ef_search
    rows, asked = nested(N, D, 0)[0], nested(60, D, 1)[0]
    searcher = Searcher(rows, num_threads=1)
    for setting in settings[:: len(settings) // 12]:
        if setting.index in ("scan", "binary"):
            selected = retrieve.resolve_params(
                parsed(folder, *setting.as_options().split()), table
            ).params
            ids = searcher.search(asked, selected).ids[:, :10]
            np.testing.assert_array_equal(ids, searcher.search(asked, setting).ids)


def test_no_setting_is_tried_twice_under_another_name():
    for rows in (20, 300, 5000, 300_000):
        lists = 2 ** round(np.log2(4 * np.sqrt(rows)))
        nprobes = {s.nprobe for s in grid(["ivf"], columns=256, rows=rows)}
        assert nprobes == {p for p in NPROBES if p <= lists}, (
            f"values of nprobe up to {lists} lists"
        )


# ---------------------------------------------------------------- speeds that decide


def test_speeds_that_decide_are_measured_in_turns(monkeypatch):
    """The luckiest first measurements: those that fall back make room for others, which are
    measured, too.
    """
    names = [scan(k) for k in (20, 30, 40, 50, 60, 70)]
    truth = dict(zip(names, (100.0, 90.0, 80.0, 20.0, 10.0, 5.0), strict=True))
    lucky = dict(zip(names, (100.0, 500.0, 300.0, 200.0, 10.0, 9.0), strict=True))
    recalls = dict(zip(names, (0.5, 0.992, 0.995, 0.991, 0.999, 0.98), strict=True))
    asked = []

    def once(ids, setting, queries, batch):
        asked.append(setting)
        return truth[setting] * (1 + 0.01 * (len(asked) % 3))

    monkeypatch.setattr(sweep_module, "queries_per_second", once)
    first = [measured(s, recalls[s], lucky[s], recalls[s]) for s in names]
    after = remeasure_frontier(lambda *_: None, first, np.zeros((1, D)), batch=1000, target=0.99)
    assert [one.params for one in after] == names
    assert [one.recall for one in after] == [one.recall for one in first]
    won = certified(after, 0.99)
    assert won is not None
    assert won.params == scan(30)
    decided = {one.params for one in (*frontier(after), won)}
    assert scan(20) in decided  # the fastest, beaten by luck alone
    for one in after:
        counted = asked.count(one.params)
        assert counted in (0, TURNS)
        assert len(one.rates) == max(1, counted)
        assert counted or one.params not in decided
    assert asked.count(scan(70)) == 0  # decides nothing


def test_a_certified_setting_off_the_frontier_is_shown():
    """Another one is faster and finds more on average, but its queries differ more: its bound is
    lower.
    """
    faster, sure = measured(scan(20), 0.996, 90, 0.98), measured(scan(30), 0.995, 80, 0.991)
    measurements = [faster, sure, measured(scan(40), 0.5, 100)]
    best, chosen = frontier(measurements), certified(measurements, 0.99)
    assert chosen is sure
    assert chosen not in best
    lines = frontier_table(best, chosen, exact_rate=10.0, rows=N).splitlines()
    shown = [line for line in lines if line.startswith("scan")]
    assert [line.split()[3] for line in shown] == ["40", "20", "30"]
    assert [line.endswith("<- certified") for line in shown] == [False, False, True]
    assert "  9.0 " in shown[1]  # x exact


def test_single_queries_that_take_seconds_are_fewer(monkeypatch, capsys):
    clock = itertools.count()
    monkeypatch.setattr(retrieve.time, "perf_counter", lambda: float(next(clock)))
    queries = Table(None, np.zeros((5000, 4), np.float32), None, None, None)
    sizes = []

    class Engine:
        def search(self, asked, params):
            sizes.append(len(asked))

    found = retrieve.report_speed(Engine(), scan(20), queries, [1, 32])
    assert found["latency_ms"] == {"p50": 1000, "p99": 1000, "queries": retrieve.MIN_SINGLE_QUERIES}
    assert set(sizes) == {1, 32}
    rates = {batch: rate["median"] for batch, rate in found["batches"].items()}
    assert rates["32"] == 32 * rates["1"]
    assert "200 single queries" in capsys.readouterr().out


# ---------------------------------------------------------------- one setting


def run(folder, output, *options):
    assert (
        retrieve.main(
            [
                f"--database={folder / 'db'}",
                f"--queries={folder / 'q'}",
                f"--output={output}",
                "--no-speed",
                *options,
            ]
        )
        == 0
    )
    return json.loads((output / "results.json").read_text()), np.load(output / "ids.npy")


def test_few_neighbours_lower_no_recall(folder, tmp_path):
    """Ten are compared however few are written; of a funnel that ends with five, five."""
    results, ids = run(folder, tmp_path / "3", "--at=3")
    assert ids.shape == (60, 3)
    assert (results["exact"]["k"], len(results["exact"]["found"])) == (10, 11)
    assert results["exact"]["recall"] > 0.9, "recall of the default search"
    results, ids = run(
        folder, tmp_path / "5", "--funnel=32,128", "--funnel-k=5", "--index=exact", "--at=5"
    )
    truth = exact_search(nested(N, D, 0)[0], nested(60, D, 1)[0], D, 5).ids
    shared = np.mean(
        [len(set(a) & set(b)) / 5 for a, b in zip(ids.tolist(), truth.tolist(), strict=True)]
    )
    assert (results["exact"]["k"], results["exact"]["recall"]) == (5, pytest.approx(shared)), (
        "exact search: k and recall"
    )
    assert 0 < shared < 1, "the funnel should lose some, and not all"


def test_more_than_the_database_has(folder, tmp_path, capsys):
    results, _ = run(folder, tmp_path / "k", "--k=99999", "--truth=0", "--at=10")
    assert results["setting"]["k"] == N
    assert results["mflops"] == pytest.approx((64 * N + D * N) / 1e6), (
        "MFLOPs: first scan and rerank of every row"
    )
    results, _ = run(
        folder, tmp_path / "f", "--funnel=8,16,128", "--funnel-k=5000,700", "--truth=0", "--at=10"
    )
    assert results["mflops"] == pytest.approx((8 * N + 16 * N + D * N) / 1e6), (
        "MFLOPs: two scans and rerank of every row"
    )
    assert capsys.readouterr().out.count("no more than 600") == 2


def test_results_are_never_those_of_other_arrays(folder, tmp_path, monkeypatch):
    run(folder, tmp_path / "out", "--truth=0")
    monkeypatch.setattr(retrieve, "write_npy", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(folder, tmp_path / "out", "--truth=0", "--at=5", "--overwrite")
    assert np.load(tmp_path / "out/ids.npy").shape == (60, 100)
    assert not (tmp_path / "out/results.json").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seed=-1"], "--seed -1"),
        (["--seed=2147483648", "--index=ivf"], "--seed 2147483648"),
        (["--index=scan", "--nprobe=8"], "--nprobe 8: works with --index ivf, not scan"),
        (["--index=ivf", "--ef=100"], "--ef 100: works with --index hnsw, not ivf"),
        (["--target-recall=0.9"], "--target-recall: works with --sweep"),
        (["--sweep", "--no-speed", "--at=5", "--nprobe=8"], "--nprobe, --at, --no-speed: --sweep"),
        (["--sweep", "--shortlist-dim=129"], "--shortlist-dim 129"),
        (["--sweep", "--index=exact"], "nothing to try"),
        (["--sweep", "--index=binary", "--shortlist-dim=32"], "multiples of 64"),
        (["--output=file"], "--output file"),
        (["--output=file/below"], "--output file/below"),
    ],
)
def test_options_that_would_not_count_are_refused(
    *, folder, tmp_path, monkeypatch, capsys, options, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        retrieve.main(
            [f"--database={folder / 'db'}", f"--queries={folder / 'q'}", "--output=new", *options]
        )
    said = capsys.readouterr().err
    assert (stop.value.code, said.count("\n")) == (2, 1), said
    assert words in said
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_bounds_hold_for_all_settings_together():
    """The luckiest of 50 is not believed as one alone would be."""
    rng = np.random.default_rng(0)
    exact = np.tile(np.arange(10), (300, 1))
    found = np.where(rng.random((300, 10)) < 0.95, exact, 99 + exact)
    setting = SearchParams("scan", 8, 10)
    one, many = (
        next(
            iter(
                measure(
                    lambda q, _: found[: len(q)],
                    [setting],
                    np.zeros((300, 8), np.float32),
                    exact,
                    batch=300,
                    tried=tried,
                )
            )
        )
        for tried in (1, 50)
    )
    assert one.recall.mean == many.recall.mean
    assert (
        many.recall.lower
        == summarise_recall(recall_against_exact(found, exact), 10, bonferroni=50).lower
    )
    assert many.recall.lower < one.recall.lower - 1e-3, "the corrected bound is not lower"
