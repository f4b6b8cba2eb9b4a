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
PART_A = "info setup tests train eager blurpool compiled graphs data profile retrieval".split()
PART_B = "info setup mrl ff512 ff16 mrl_e cifar ssl".split()

# In place of Python and all that it runs: notes its words, and behaves as the script expects. The variable SLOW names
# a step's word that takes longer than any limit, BROKEN one that fails.
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
    order = {
        "A": ["pytest", "train", "train", "accuracy.py", *5 * ["step.py"]]
        + ["end_to_end.py", "step.py", "retrieval_device.py"],
        "B": [*4 * ["train", "accuracy.py"], "cifar", "small_images.py", "ssl", "ssl_runs.py"],
    }[part]
    programs = []
    for call in calls:
        words = [word.rpartition("/")[2] for word in call.split()]
        known = [word for word in words if word in order]
        programs += known[:1]
    # The profile is a step.py as well, after end_to_end.py.
    assert programs == (order[:8] + order[9:] if part == "A" else order)


def test_a_part_ends_in_time_and_says_what_it_left_out(start, tmp_path):
    """A step that hangs is stopped; steps that would not end before the limit are not begun."""
    begun = time.monotonic()
    process = start("info", "heads", "eager", "compiled", LIMIT="23", SLOW="step.py")
    # `setup` made no environment here: the steps run without one
    (tmp_path / "work" / "venv" / "bin").mkdir(parents=True)
    process.communicate(timeout=60)
    assert time.monotonic() - begun < 35
    steps = dict(summary(tmp_path))
    assert steps["info"].startswith("ok")
    assert list(steps) == ["info", "heads", "eager", "compiled"]


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
