"""`matryoshka runs`: what a table of runs says, what it does with folders that are none."""

import json
import os
import shutil
import time
from types import SimpleNamespace

import pytest
from matryoshka.train import list_runs

from matryoshka import cli
from matryoshka.training import run_folder as log
from matryoshka.training.run_folder import RunLog

DAY = 1_600_000_000  # 2020-09-13, UTC


def age(folder, seconds):
    """Set the modification times of a folder to `seconds` ago."""
    for path in [folder, *folder.rglob("*")]:
        os.utime(path, (time.time() - seconds,) * 2)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """A run written by RunLog; params and top-1 as fractions, by epoch."""
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    clock = SimpleNamespace(now=0.0)

    def now():
        return clock.now

    monkeypatch.setattr(log, "time", SimpleNamespace(time=now, monotonic=now))

    def make(name, started, params, epochs, *, events=(), written=86400):
        clock.now = started
        path = tmp_path / "logs" / name
        run = RunLog(path, {"model.arch": "resnet18", "training.epochs": 3, **params}, "")
        run.write_event({"event": "start", "step": 0})
        for epoch, top1 in enumerate(epochs):
            clock.now += 60
            speed = {"images_per_s": 100.0 * (epoch + 1), "data_wait": 0.1 * (epoch + 1)}
            run.write_line({"current_lr": 0.1, **top1, "train_loss": 1.0, "epoch": epoch} | speed)
        for event in events:
            run.write_event({"event": event})
        run.close()
        age(path, written)
        return path

    yield make
    monkeypatch.undo()
    time.tzset()


@pytest.fixture
def logs(write):
    """A folder of five runs: one of each state, one that has written nothing yet."""
    mrl = {"model.mrl": 1}
    epochs = [
        {"top_1_8": 0.5, "top_1_16": 0.625},
        {"top_1_8": 0.6, "top_1_16": 0.75},
        {"top_1_8": 0.7, "top_1_16": 0.75},
    ]
    done = write(
        "20200913-122640-resnet18-0000",
        DAY,
        mrl,
        epochs,
        events=["skipped"] * 3 + ["rolled back"],
    )
    (done / "model.safetensors").write_bytes(b"its header is damaged")
    write(
        "asked",
        DAY + 86400,
        {"model.fixed_feature": 8},
        [{"top_1": 0.9}, {}],
        events=["stopped"],
    )
    write("crashed", DAY + 2 * 86400, {"model.efficient": 1}, [{"top_1_8": 0.1, "top_1_16": 0.3}])
    write("new", DAY + 4 * 86400, mrl, [], written=0)
    interval = {"training.checkpoint_every_minutes": 30.0}
    write(
        "busy", DAY + 3 * 86400, mrl | interval, [{"top_1_8": 0.01, "top_1_16": 0.02}], written=1800
    )
    return done.parent


TABLE = """
                                                                       top-1 %
run                            model     head        epochs  state     short  long  at  img/s  wait  skips  started
new                            resnet18  mrl            0/3  running       -     -   -      -     -         2020-09-17
busy                           resnet18  mrl 8-16       1/3  running     1.0   2.0   0    100   10%         2020-09-16
crashed                        resnet18  mrl-e 8-16     1/3  failed     10.0  30.0   0    100   10%         2020-09-15
asked                          resnet18  ff8            2/3  stopped       -  90.0   0    150   15%         2020-09-14
20200913-122640-resnet18-0000  resnet18  mrl 8-16       3/3  finished   60.0  75.0   1    200   20%    3/1  2020-09-13
"""


def test_the_table(logs, capsys):
    assert cli.main(["runs", str(logs)]) == 0
    assert capsys.readouterr().out == TABLE.lstrip("\n")


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("date", "new busy crashed asked 2020"),
        ("best", "asked 2020 crashed busy new"),
        ("name", "2020 asked busy crashed new"),
    ],
)
def test_the_order(logs, capsys, order, expected):
    assert list_runs.main([str(logs), f"--sort={order}"]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[0].partition("0913")[0] for line in lines] == expected.split()


def test_json_says_the_same(logs, capsys):
    (logs / "notes").mkdir()
    assert list_runs.main([str(logs), "--json"]) == 0
    said = capsys.readouterr()
    rows = [json.loads(line) for line in said.out.splitlines()]
    assert list_runs.table(rows) == TABLE.strip("\n")
    assert rows[-1] == {
        "run": "20200913-122640-resnet18-0000",
        "path": str(logs / "20200913-122640-resnet18-0000"),
        "arch": "resnet18",
        "head": "mrl",
        "dims": [8, 16],
        "epochs_done": 3,
        "epochs": 3,
        "state": "finished",
        "best_epoch": 1,
        "top1": {"8": 60.0, "16": 75.0},
        "images_per_s": 200.0,
        "data_wait": pytest.approx(0.2),
        "skipped": 3,
        "rollbacks": 1,
        "started": "2020-09-13T12:26:40+00:00",
    }
    assert said.err == f"no runs: {logs / 'notes'} (no params.json)\n"


def test_a_run_that_is_killed_is_read(logs, capsys):
    for name in ("log", "events.jsonl"):
        with open(logs / "crashed" / name, "a") as file:
            file.write('{"timestamp": 16000')
    age(logs / "crashed", 86400)
    list_runs.main([str(logs)])
    assert capsys.readouterr().out == TABLE.lstrip("\n")


def test_a_resumed_run_is_running(logs, capsys):
    run = RunLog(
        logs / "asked",
        json.loads((logs / "asked" / "params.json").read_text()),
        "",
        resumed_at=(5, 2),
    )
    run.write_event({"event": "go on"})
    run.close()
    list_runs.main([str(logs / "asked"), "--json"])
    row = json.loads(capsys.readouterr().out)
    assert (row["run"], row["state"], row["epochs_done"]) == ("asked", "running", 2)
    (logs / "asked" / "checkpoints").mkdir()
    age(logs / "asked", 86400)
    (logs / "asked" / "checkpoints" / "last.safetensors").write_bytes(b"")
    list_runs.main([str(logs / "asked"), "--json"])
    assert json.loads(capsys.readouterr().out)["state"] == "running"


def test_what_is_no_run_is_named_in_one_line(logs, capsys):
    for name, params in (("damaged", "{"), ("foreign", '{"lr": 1}'), ("list", "[]")):
        (logs / name).mkdir()
        (logs / name / "params.json").write_text(params)
    (logs / "crashed" / "params.json").unlink()
    (logs / "new\nline").mkdir()
    (logs / ".hidden").mkdir()
    (logs / "log").write_text("what somebody redirected")
    assert list_runs.main([str(logs)]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == [
        "new",
        "busy",
        "asked",
        "20200913-122640-resnet18-0000",
    ]
    foreign = "params.json: not the options of a training run: model.arch is missing"
    assert last == "no runs: " + ", ".join(
        [
            f"{logs}/crashed (no params.json)",
            f"{logs}/new?line (no params.json)",
            f"{logs}/damaged (params.json: damaged: not valid JSON)",
            f"{logs}/foreign ({foreign})",
            f"{logs}/list ({foreign})",
        ]
    )
    for i in range(20):
        (logs / f"empty{i}").mkdir()
    list_runs.main([str(logs)])
    assert capsys.readouterr().out.splitlines()[-1].endswith(", 17 more")


def test_several_folders_may_overlap(logs, tmp_path, capsys):
    shutil.copytree(logs / "asked", tmp_path / "other" / "deep" / "asked")
    shutil.copytree(logs / "asked", tmp_path / "other" / "busy")
    list_runs.main([str(tmp_path / "other"), str(logs), str(logs / "new"), "--json", "--sort=name"])
    names = [json.loads(line)["run"] for line in capsys.readouterr().out.splitlines()]
    same = [str(tmp_path / "logs" / "busy"), str(tmp_path / "other" / "busy")]
    assert names == [
        *same,
        "20200913-122640-resnet18-0000",
        "asked",
        "crashed",
        "deep/asked",
        "new",
    ]


def test_a_table_has_120_columns_at_most(write, tmp_path, capsys):
    dims = {f"top_1_{d}": 1.0 for d in (8, 12, 1024, 2048)}
    name, params = (
        "20260101-120000-" + "x" * 100 + "-abcd",
        {"model.arch": "timm:" + "y" * 50, "model.mrl": 1},
    )
    write(name, time.time(), params, [dims], events=["skipped"] * 1000 + ["rolled back"])
    write("short", time.time(), {"training.epochs": None}, [])
    list_runs.main([str(tmp_path / "logs")])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120, "wider than the columns it may use"
    assert lines[2 if "x" in lines[2] else 3].startswith("20260101-")
    assert any(
        "xx-abcd " in line and " timm" in line and " mrl 8,12..2048 " in line for line in lines
    )
    assert any(line.startswith("short ") and " 0/? " in line for line in lines)
    assert time.strftime(" %m-%d %H:") in lines[2]


@pytest.mark.parametrize("folders", [["empty"], ["empty", "damaged"], ["nowhere"]])
def test_no_run_is_an_error_of_one_line(tmp_path, capsys, folders):
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged" / "run").mkdir(parents=True)
    (tmp_path / "damaged" / "run" / "params.json").write_text("{")
    with pytest.raises(SystemExit) as end:
        cli.main(["runs", *(str(tmp_path / name) for name in folders)])
    said = capsys.readouterr()
    assert (end.value.code, said.out, said.err.count("\n")) == (2, "", 1)
    assert all(str(tmp_path / name) in said.err for name in folders)
    assert "--logging.folder" in said.err
    assert ("params.json: damaged" in said.err) == ("damaged" in folders)
