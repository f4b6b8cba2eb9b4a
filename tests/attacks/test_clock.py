"""A clock that is set, a year forwards or back, while programs run: durations are right."""

from __future__ import annotations

import json
import os
import re
import time

import pytest
import small_commands
from attacks.scale import LONG
from matryoshka.train import list_runs

from matryoshka import cli
from matryoshka.training.run_folder import RunLog, new_run_id
from matryoshka.training.run_lock import RunLock

YEAR = 365 * 86400.0
# Where the time of the day is written or shown; every duration is of a clock that cannot be set.
TIME_OF_DAY = {"matryoshka/training/run_folder.py", "train/list_runs.py"}
JUMPS = [0.0, -YEAR, YEAR, -2 * YEAR, 3 * YEAR]


@pytest.fixture
def jumping(monkeypatch):
    """time.time() jumps at each of its calls."""
    truth, calls = time.time, []

    def now():
        calls.append(0)
        return truth() + JUMPS[len(calls) % len(JUMPS)]

    monkeypatch.setattr(time, "time", now)
    return calls


def test_the_time_of_day_is_asked_in_few_places(pytestconfig):
    found = set()
    for folder in ("matryoshka", "train", "inference"):
        for path in (pytestconfig.rootpath / folder).rglob("*.py"):
            if re.search(r"\btime\.time\b|from time import", path.read_text()):
                found.add(str(path.relative_to(pytestconfig.rootpath)))
    assert found == TIME_OF_DAY


def test_the_log_of_a_run(tmp_path, jumping):
    log = RunLog(tmp_path, {}, "", tensorboard=False)
    for epoch in range(5):
        log.write_line({"epoch": epoch})
    log.close()
    lines = (tmp_path / "log").read_text().splitlines()
    times = [json.loads(line)["relative_time"] for line in lines]
    assert times == sorted(times)
    assert all(0 <= seconds < 60 for seconds in times)
    assert len(jumping) >= 5


def test_a_lock_waits_in_seconds(tmp_path, jumping):
    with RunLock(tmp_path / "run"):
        began = time.monotonic()
        with pytest.raises(ValueError, match="in use by process"):
            RunLock(tmp_path / "run", patience=0.2)
        assert 0.2 <= time.monotonic() - began < 20


@pytest.mark.parametrize("offset", [-YEAR, YEAR])
def test_a_run_that_failed_under_another_clock(tmp_path, offset, capsys):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "params.json").write_text('{"model.arch": "resnet18"}')
    for path in (run, run / "params.json", run / "checkpoints"):
        os.utime(path, (time.time() + offset,) * 2)
    assert cli.main(["runs", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "failed"
    assert abs(list_runs.last_write(run) - time.time() - offset) < 60


def test_names_of_runs_differ(jumping):
    names = {new_run_id("net") for _ in range(200)}
    assert len(names) > 195  # two random bytes tell those of the same second apart


@pytest.mark.skipif(not LONG, reason="trains: `make attack`")
@pytest.mark.parametrize("program", ["train", "cifar", "ssl", "probe", "embed", "write", "report"])
def test_programs_end_as_always(program, disk, inputs, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    argv = small_commands.command(program, inputs, out)
    ended = disk.run(argv, below=out, clock=JUMPS)
    assert (ended.status, ended.err) == (0, "")
    if (out / "run" / "log").exists():
        for line in (out / "run" / "log").read_text().splitlines():
            assert 0 <= json.loads(line)["relative_time"] < 120
