"""Rows of bench/results/ are on the disk at once, and name the commit without a checkout, too."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from matryoshka import environment

ROOT = Path(__file__).resolve().parents[2]
KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import record
record.append("some", [{"case": "measured"}])
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_row_survives_a_kill(tmp_path):
    env = os.environ | {"BENCH_RESULTS": str(tmp_path / "rows")}
    words = [sys.executable, "-c", KILLED, str(ROOT / "bench")]
    assert subprocess.run(words, env=env, check=False).returncode == -signal.SIGKILL
    (row,) = [json.loads(line) for line in (tmp_path / "rows" / "some.jsonl").open()]
    assert row["case"] == "measured"
    assert row["versions"]["torch"]


@pytest.mark.parametrize("with_git", [False, True], ids=["no .git", "a .git of elsewhere"])
@pytest.mark.parametrize(("text", "dirty"), [("c0ffee1", False), ("c0ffee1-dirty", True)])
def test_the_commit_of_files_without_a_checkout(tmp_path, monkeypatch, with_git, text, dirty):
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "matryoshka" / "environment.py"))
    if with_git:  # what is left of a worktree that was copied alone
        (tmp_path / ".git").write_text(f"gitdir: {tmp_path / 'nowhere'}")
    monkeypatch.delenv("MATRYOSHKA_COMMIT", raising=False)
    assert environment.git_state() is None
    monkeypatch.setenv("MATRYOSHKA_COMMIT", text)
    assert environment.git_state() == {"commit": "c0ffee1", "dirty": dirty}


@pytest.mark.parametrize("text", ["main", "c0ffee", "c0ffee1 dirty", "C0FFEE1", "$(id)"])
def test_what_is_no_commit(tmp_path, monkeypatch, text):
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "matryoshka" / "environment.py"))
    monkeypatch.setenv("MATRYOSHKA_COMMIT", text)
    with pytest.raises(environment.VariableError, match=r"MATRYOSHKA_COMMIT: .*a git commit"):
        environment.git_state()
