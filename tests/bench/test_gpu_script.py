"""bench/gpu.sh: order and limits of its steps, what it prepares, and what a kill leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from matryoshka.environment import git_state

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "gpu.sh"
PART_A = ["info", "setup", "tests", "train", "eager", "blurpool", "compiled", "graphs"]
PART_A += ["data", "profile", "retrieval"]
PART_B = ["info", "setup", "mrl", "ff512", "ff16", "mrl_e", "cifar", "ssl"]

# In place of Python and all that it runs: notes its words, and behaves as the script expects. The
# variable SLOW names a word with which it takes longer than any limit, BROKEN one with which it
# fails.
FAKE_PYTHON = """#!/usr/bin/env bash
words="$*"
case $words in
*cuda.is_available*) echo "${FAKE_GPUS:-1}" && exit ;;
"-m venv"*) mkdir -p "${!#}/bin" "${!#}/site" && cp "$0" "${!#}/bin/python" && exit ;;
*purelib*) echo "$(dirname "$0")/../site" && exit ;;
"-" | *" -c "*) cat </dev/null && exit ;;
esac
echo "$words" >>"$CALLS"
[ -z "$BROKEN" ] || case $words in *"$BROKEN"*) exit 3 ;; esac
[ -z "$SLOW" ] || case $words in *"$SLOW"*) sleep 100 ;; esac
case $words in
*logging.folder=*)
  folder=${words##*logging.folder=} run=${words##*logging.run_id=}
  mkdir -p "${folder%% *}/${run%% *}" && printf '1\\n2\\n3\\n' >"${folder%% *}/${run%% *}/log" ;;
esac
"""


@pytest.fixture
def start(tmp_path):
    """Starts the script with the fake Python and words: (process, folder)."""
    python = tmp_path / "python3"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)

    def begin(*words, **more):
        env = os.environ | {
            "PYTHON": str(python),
            "WORK": str(tmp_path / "work"),
            "FAST": str(tmp_path),
            "OUT": str(tmp_path / "out"),
            "SHIP": str(tmp_path / "ship"),
            "CALLS": str(tmp_path / "calls"),
            "SLOW": "",
            "BROKEN": "",
            **more,
        }
        return subprocess.Popen(
            ["bash", SCRIPT, *words],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    return begin


def summary(folder):
    """[(step, result)] of the script's summary."""
    lines = (folder / "out" / "summary.txt").read_text().splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines]


@pytest.mark.parametrize(("part", "steps"), [("A", PART_A), ("B", PART_B)])
def test_the_steps_of_a_part(part, steps, start, tmp_path):
    process = start(part)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 0, said
    assert [step for step, _ in summary(tmp_path)] == steps
    assert all(result.startswith("ok, ") for _, result in summary(tmp_path)), said
    calls = (tmp_path / "calls").read_text().splitlines()
    measured = [*4 * ["step.py"], "end_to_end.py", "step.py", "retrieval_device.py"]
    order = {
        "A": ["pytest", "train", "train", "accuracy.py", *measured],
        "B": [*4 * ["train", "accuracy.py"], "cifar", "small_images.py", "ssl", "ssl_runs.py"],
    }[part]
    programs = []
    for call in calls:
        words = [word.rpartition("/")[2] for word in call.split()]
        programs += [word for word in words if word in order][:1]
    assert programs == order


def test_what_hangs_is_stopped_and_what_would_not_end_is_not_begun(start, tmp_path):
    begun = time.monotonic()
    process = start("info", "setup", LIMIT="6", SLOW="--version")
    process.communicate(timeout=60)
    assert time.monotonic() - begun < 15
    steps = dict(summary(tmp_path))
    assert steps["info"].startswith("FAILED: stopped after")
    assert steps["setup"].startswith("skipped: ")
    assert process.returncode == 1


def test_a_failed_step_does_not_stop_the_others(start, tmp_path):
    process = start("info", "setup", "eager", "data", BROKEN="step.py")
    process.communicate(timeout=60)
    steps = dict(summary(tmp_path))
    assert process.returncode == 1
    assert steps["eager"].startswith("FAILED: status 3")
    assert steps["data"].startswith("ok")


def test_without_a_gpu(start, tmp_path):
    process = start("A", FAKE_GPUS="0")
    process.communicate(timeout=60)
    assert process.returncode == 0
    skipped = [(step, "skipped: torch sees no GPU") for step in PART_A[1:]]
    assert summary(tmp_path)[1:] == skipped


def test_rows_survive_a_kill_of_the_script(tmp_path):
    """The programs themselves: SIGKILL to all of them when the first row is there."""
    out = tmp_path / "out"
    env = os.environ | {
        "PYTHON": sys.executable,
        "SMOKE": "1",
        "WORK": str(tmp_path / "work"),
        "FAST": str(tmp_path),
        "OUT": str(out),
        "SHIP": str(tmp_path / "none"),
        "OMP_NUM_THREADS": "1",
        "COMMIT": "c0ffee1",
    }
    process = subprocess.Popen(
        ["bash", SCRIPT, "setup", "heads", "eager"],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    rows = out / "step.jsonl"
    try:
        until = time.monotonic() + 240
        while not rows.exists() or not rows.stat().st_size:
            assert process.poll() is None, (out / "log.txt").read_text()[-2000:]
            assert time.monotonic() < until, (out / "log.txt").read_text()[-2000:]
            time.sleep(0.02)
    finally:
        killed = processes_with(str(tmp_path))
        for pid in [process.pid, *killed]:
            os.kill(pid, signal.SIGKILL)
        process.wait()
    assert killed, "the step that wrote the row"
    assert [step for step, _ in summary(tmp_path)] == ["setup"]
    expected = (git_state() or {"commit": "c0ffee1"})["commit"]
    kept = [json.loads(line) for line in rows.read_text().splitlines()]
    assert {row["git"]["commit"] for row in kept} == {expected}
    assert kept[0]["case"] == "head and loss"


def processes_with(text):
    """Processes whose environment has `text`, as Linux tells it."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if text.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return [pid for pid in found if pid != os.getpid()]


@pytest.mark.slow
@pytest.mark.parametrize(("part", "files"), [("A", 4), ("B", 3)])
def test_a_whole_part_with_tiny_arguments(part, files, tmp_path):
    """The programs themselves, on digits: every step succeeds and leaves its rows."""
    env = os.environ | {
        "PYTHON": sys.executable,
        "SMOKE": "1",
        "LIMIT": "3000",
        "WORK": str(tmp_path / "work"),
        "FAST": str(tmp_path),
        "OUT": str(tmp_path / "out"),
        "SHIP": str(tmp_path / "none"),
        "OMP_NUM_THREADS": "1",
    }
    words = ["bash", SCRIPT, part]
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    steps = {"A": PART_A, "B": PART_B}[part]
    assert [step for step, _ in summary(tmp_path)] == steps
    rows = sorted(path.name for path in (tmp_path / "out").glob("*.jsonl"))
    assert len(rows) == files, rows
    assert (tmp_path / "out" / "runs.tar").exists()
