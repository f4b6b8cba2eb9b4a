"""A trial of a sweep: a program in a process of its own, followed through its run folder's log."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from matryoshka.files import open_regular, read_regular
from matryoshka.training.sweep_file import SweepError

ROOT = Path(__file__).resolve().parents[2]  # the repository, or site-packages
GRACE = 60.0  # seconds from SIGTERM to SIGKILL: enough for a last checkpoint


def find_program(name: str, sweep_file: Path) -> list[str]:
    """The words that stand for ${program}: a script's path, or `-m matryoshka.cli COMMAND`.

    A name that ends in .py is looked up in the current folder, beside the sweep file, and in the
    repository. Any other name is a command of `matryoshka`. SweepError if a script does not exist.
    """
    if not name.endswith(".py"):
        return ["-m", "matryoshka.cli", *name.removeprefix("matryoshka ").split()]
    places = [Path(), sweep_file.resolve().parent, ROOT, ROOT / "train", ROOT / "inference"]
    installed = ROOT / "matryoshka"
    places += [installed, installed / "train", installed / "inference"]
    for place in places:
        if (place / name).is_file():
            return [str(place / name)]
    raise SweepError(
        f"{sweep_file}: program: {name} is not in the current folder, beside the sweep file, or in "
        "the repository; or give the name of a command of matryoshka, such as train"
    )


# Waits for a line, then becomes the program; without one, when the sweep was killed, it ends.
GATE = ("/bin/sh", "-c", 'read -r line && exec "$@" </dev/null', "sh")


class Process:
    """A program whose output goes to a file. It is started, but waits for `begin`.

    A sweep can be killed at any time. It notes the `identity` of the process before `begin`, so
    that no program runs that the next start of the sweep does not know of.
    """

    def __init__(self, words: Sequence[str], output: Path) -> None:
        if shutil.which(words[0]) is None:
            raise SweepError(f"cannot start {words[0]}: no such program")
        try:
            with open(output, "wb") as file:
                # A session of its own: an interrupt of the terminal must reach the sweep alone,
                # which then ends its trials.
                self._process = subprocess.Popen(
                    [*GATE, *words],
                    stdin=subprocess.PIPE,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            raise SweepError(f"cannot start {words[0]}: {error.strerror}") from None
        self._output = output

    def begin(self) -> None:
        """Let the program run."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError), self._process.stdin as gate:  # broken: it was killed
            gate.write(b"\n")

    def identity(self) -> str:
        """See `identity`."""
        return identity(self._process.pid)

    def status(self) -> int | None:
        """The exit status; None while it runs."""
        return self._process.poll()

    def stop(self) -> None:
        """End it: SIGTERM, and SIGKILL after GRACE seconds; wait until it has ended."""
        if self._process.poll() is None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE)
        # Also what it has started itself.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()  # waits, and closes the pipe

    def last_words(self) -> str:
        """The last line of its output, to explain a failure."""
        text = read_regular(self._output)[-10_000:].decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        line = lines[-1] if lines else "no output"
        return re.sub(r"[^\x20-\x7e]+", " ", line)[:300]


# ---------------------------------------------------------------- processes of an earlier start


def identity(pid: int) -> str:
    """`host pid start`: names a process for ever, as the system reuses its ids."""
    return f"{os.uname().nodename} {pid} {_start_time(pid)}"


def is_alive(known: str) -> bool:
    """Whether the process of an `identity` still runs; True for one of another machine."""
    host, pid, start = known.split(" ", 2)
    if host != os.uname().nodename:
        return True
    return _start_time(int(pid)) == start != ""


def end_process(known: str) -> None:
    """End a process of this machine that an earlier, killed start has left behind."""
    host, pid, _ = known.split(" ", 2)
    if host != os.uname().nodename or not is_alive(known):
        return
    # It has a session, and so a group, of its own. It belongs to no one who would need its last
    # checkpoint: its trial is repeated.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(int(pid), signal.SIGKILL)


def _start_time(pid: int) -> str:
    """When a process started, in the system's words; empty if it has ended."""
    if sys.platform == "linux":
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return ""
        # proc(5): state is field 3, the start time field 22. A zombie has ended.
        return "" if fields[0] == "Z" else fields[19]
    words = ["ps", "-o", "lstart=", "-p", str(pid)]
    found = subprocess.run(words, capture_output=True, text=True, check=False)
    return "-".join(found.stdout.split())


# ---------------------------------------------------------------- the log


class Log:
    """The lines that a program adds to its `log`, which need not exist yet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at = 0  # bytes that were read
        self.names: set[str] = set()  # the metrics that were seen

    def new_lines(self) -> list[dict[str, Any]]:
        """The whole lines since the last call."""
        try:
            with open_regular(self._path) as file:
                file.seek(self._at)
                content = file.read()
        except FileNotFoundError:
            return []
        whole = content[: content.rfind(b"\n") + 1]  # the last line may still be written
        self._at += len(whole)
        lines = []
        for text in whole.splitlines():
            with suppress(ValueError, RecursionError):
                line = json.loads(text)
                if isinstance(line, dict):
                    self.names |= line.keys()
                    lines.append(line)
        return lines


def metric_of(line: Mapping[str, Any], name: str) -> float | None:
    """A metric of a line of `log`; None if the line does not have it.

    `val_acc` is the name of the papers' programs: percent, and of the longest prefix. Where a
    program does not log it, it is 100 x top_1, or top_1_<length> of the longest.
    """
    value = line.get(name)
    factor = 1.0
    if value is None and name == "val_acc":
        factor = 100.0
        value = line.get("top_1")
        if value is None:
            matches = [re.fullmatch(r"top_1_(\d+)", key) for key in line]
            lengths = [int(match[1]) for match in matches if match]
            value = line.get(f"top_1_{max(lengths)}") if lengths else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return factor * value
