"""Table of the training runs below some folders, newest first.

    matryoshka runs trainlogs
    matryoshka runs trainlogs runs/demo --sort best
    matryoshka runs trainlogs --json

epochs            done / planned
state             finished: its model exists; running: a process holds its folder, or, where no lock
                  says whether one does, has written in the last minutes; stopped: by a signal,
                  resume it with --training.resume=auto; failed: it ended without a message
short, long, at   top-1 % of the shortest and the longest prefix after the epoch in which the
                  longest was best
img/s, wait       medians over the epochs; wait: share of the time spent waiting for data
skips             steps with non-finite gradients / rollbacks; the column is left out if all are 0
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

from matryoshka import config
from matryoshka.checkpoint.run_files import FINAL
from matryoshka.report import Run, RunError, read_run, short_dims
from matryoshka.training import run_lock

COLUMNS = 120
# Seconds beyond the checkpoint interval after which a run that writes nothing has failed.
QUIET = 300
MAX_NAMED = 8  # folders named in the last line
SORTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "date": lambda run: -datetime.fromisoformat(run["started"]).timestamp(),
    "best": lambda run: -max(list(run["top1"].values())[-1:], default=-1),
    "name": lambda run: run["run"],
}


@dataclass(frozen=True, kw_only=True)
class RunsOptions:
    """Folders of the runs, and the form of the table."""

    folders: tuple[str, ...] = config.option(
        help="a folder of run folders, or a run folder",
        metavar="DIR",
        positional=True,
        file_name=True,
    )
    sort: str = config.option(
        "date", help="newest, most accurate or alphabetically first", choices=SORTS
    )
    json: bool = config.option(False, help="print a line of JSON for each run")


def parser() -> config.FlagParser:
    return config.flat_parser("matryoshka runs", __doc__ or "", RunsOptions)


@config.program
def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    runs, others = collect([Path(folder) for folder in args.folders])
    rows = []
    for name, run in runs:
        try:
            rows.append(facts(name, run))
        except OSError as error:  # removed since it was read, or a link that leads nowhere
            others[run.path] = reason(error)
    if not rows:
        why = f" ({left_out(others)})" if others else ""
        raise config.ConfigError(
            f"{', '.join(args.folders)}: contains no run{why}; name the folder that training wrote "
            "to (--logging.folder), or start a run: matryoshka train"
        )
    # Sorting is stable: rows that are equal by the second key stay sorted by date.
    rows.sort(key=SORTS["date"])
    rows.sort(key=SORTS[args.sort])
    print("\n".join(map(json.dumps, rows)) if args.json else table(rows), flush=True)
    if others:
        print(left_out(others), file=sys.stderr if args.json else sys.stdout)
    return 0


# ---------------------------------------------------------------- search for runs


def collect(folders: Iterable[Path]) -> tuple[list[tuple[str, Run]], dict[Path, str]]:
    """([(name, run)], {folder: why it is not a run}).

    A name is the path below its folder, or the whole path if several runs have that name.
    """
    found: dict[Path, tuple[str, Path]] = {}
    others: dict[Path, str] = {}
    runs = []
    for root in folders:
        if not root.is_dir():
            raise config.ConfigError(
                f"{root}: folder not found; name the one that training wrote to (--logging.folder)"
            )
        paths, foreign = search(root)
        others |= foreign
        for path in paths:
            name = str(path.relative_to(root)) if path != root else path.resolve().name
            # The given folders may contain each other.
            found.setdefault(path.resolve(), (name, path))
    names = Counter(name for name, _ in found.values())
    for name, path in found.values():
        try:
            runs.append((name if names[name] == 1 else str(path), read_run(path)))
        except RunError as error:
            others[path] = str(error).removeprefix(f"{path}/")
        except OSError as error:
            others[path] = reason(error)
    return runs, others


def reason(error: OSError) -> str:
    """Why a folder cannot be read, with the name of the file."""
    return f"{Path(error.filename or '').name}: {error.strerror}"


def search(root: Path) -> tuple[list[Path], dict[Path, str]]:
    """(folders with a params.json, {other folder: why it is not a run}).

    Other folders are those that look like a run, and those of `root` that contain no run.
    """
    runs: list[Path] = []
    others: dict[Path, str] = {}
    for name, below, files in os.walk(root):
        folder = Path(name)
        below[:] = sorted(n for n in below if not n.startswith("."))
        if "params.json" in files:
            runs.append(folder)
            below.clear()  # a run contains no runs
        elif folder != root and {"log", "events.jsonl"} & set(files):
            others[folder] = "no params.json"
    # Folders directly below `root` are expected to be runs: name those that contain none.
    if root not in runs:
        known = {path.relative_to(root).parts[0] for path in (*runs, *others)}
        with os.scandir(root) as entries:
            names = sorted(e.name for e in entries if not e.name.startswith("."))
        for name in names:
            why = why_no_run(root / name)
            if why and name not in known:
                others[root / name] = why
    return runs, others


def why_no_run(path: Path) -> str:
    """Why an entry without a run below it has none; "" for a file, which is not expected to."""
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except OSError as error:  # a link that leads nowhere, or to itself
        return error.strerror or str(error)
    return "no params.json" if is_folder else ""


def left_out(others: Mapping[Path, str]) -> str:
    """The line about folders that are not runs."""
    shown = [f"{path} ({why})" for path, why in list(others.items())[:MAX_NAMED]]
    more = [f"{len(others) - MAX_NAMED} more"] if len(others) > MAX_NAMED else []
    return printable(f"no runs: {', '.join(shown + more)}")


# ---------------------------------------------------------------- reading


def facts(name: str, run: Run) -> dict[str, Any]:
    """The values of one run, as --json prints them.

    top1: {prefix: %} at best_epoch; data_wait: 0 to 1; started: ISO 8601.
    """
    best_epoch, top1 = run.best()
    events = Counter(str(event.get("event")) for event in run.events)
    return {
        "run": name,
        "path": str(run.path),
        "arch": run.arch,
        "head": run.head,
        "dims": list(run.dims),
        "epochs_done": max(run.epochs, default=-1) + 1,
        "epochs": run.params.get("training.epochs"),
        "state": state(run, time.time()),
        "best_epoch": best_epoch,
        "top1": {prefix: round(value, 3) for prefix, value in top1.items()},
        "images_per_s": middle(run.column("images_per_s").values()),
        "data_wait": middle(run.column("data_wait").values()),
        "skipped": events["skipped"],
        "rollbacks": events["rolled back"],
        "started": started(run).isoformat(timespec="seconds"),
    }


def state(run: Run, now: float) -> str:
    """finished, stopped, running or failed."""
    if (run.path / FINAL).exists():
        return "finished"
    if run_lock.holder(run.path) is not None:
        return "running"
    if run.events and run.events[-1].get("event") == "stopped":
        return "stopped"
    if run_lock.was_killed(run.path):
        return "failed"
    # A run of another host, of a file system without locks, or of an older version, is alive if it
    # has written within its checkpoint interval.
    interval = run.params.get("training.checkpoint_every_minutes")
    quiet = QUIET + (60 * interval if isinstance(interval, int | float) else 0)
    # Of either sign: the clock may have been set back since.
    return "running" if abs(now - last_write(run.path)) < quiet else "failed"


def last_write(folder: Path) -> float:
    """Time of the last change below a run folder; 0 if it is empty."""
    times = []
    for below in (folder, folder / "checkpoints", folder / "tensorboard"):
        try:
            paths = list(below.iterdir())
        except OSError:  # not there yet, or not a folder
            continue
        for path in paths:
            # A running run deletes and renames files.
            with contextlib.suppress(OSError):
                times.append(path.stat().st_mtime)
    return max(times, default=0.0)


def started(run: Run) -> datetime:
    """Start of a run: from its first event, else from its log, else the age of params.json."""
    for values in (*run.events[:1], *run.epochs.values()):
        try:
            at = datetime.fromtimestamp(values["timestamp"] - values.get("relative_time", 0))
        except (KeyError, TypeError, ValueError, OverflowError, OSError):  # not a time
            continue
        return at.astimezone()
    return datetime.fromtimestamp((run.path / "params.json").stat().st_mtime).astimezone()


def middle(values: Iterable[float]) -> float | None:
    numbers = list(values)
    return median(numbers) if numbers else None


# ---------------------------------------------------------------- the table


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Aligned text of at most COLUMNS columns; long names are shortened."""
    cells = [row_text(row) for row in rows]
    titles = list(cells[0])
    if not any(row["skips"] for row in cells):
        titles.remove("skips")
    width = {}
    for title in titles:
        width[title] = max(len(title), *(len(row[title]) for row in cells))

    # Shorten three columns in this proportion, none below 8 characters.
    share = {"run": 20, "model": 8, "head": 16}
    gaps = 2 * (len(titles) - 1)
    while sum(width.values()) + gaps > COLUMNS and max(width[name] for name in share) > 8:
        widest = max(share, key=lambda name: width[name] / share[name])
        width[widest] -= 1

    lines = [line({title: title for title in titles}, width)]
    lines += [line(row, width) for row in cells]
    return "\n".join([" " * lines[0].index("short") + "top-1 %", *lines])


def row_text(row: Mapping[str, Any]) -> dict[str, str]:
    """{column: text} of a run."""
    top1 = list(row["top1"].values())
    wait = row["data_wait"]
    speed = row["images_per_s"]
    when = datetime.fromisoformat(row["started"])
    this_year = when.year == datetime.now().year
    texts = {
        "run": row["run"],
        "model": row["arch"],
        "head": f"{row['head']} {short_dims(row['dims'])}".strip(),
        "epochs": f"{row['epochs_done']}/{row['epochs'] or '?'}",
        "state": row["state"],
        "short": f"{top1[0]:.1f}" if len(top1) > 1 else "-",
        "long": f"{top1[-1]:.1f}" if top1 else "-",
        "at": "-" if row["best_epoch"] is None else str(row["best_epoch"]),
        "img/s": "-" if speed is None else f"{speed:.0f}",
        "wait": "-" if wait is None else f"{100 * wait:.0f}%",
        "skips": "/".join(str(n) for n in (row["skipped"], row["rollbacks"]) if n),
        "started": f"{when:%m-%d %H:%M}" if this_year else f"{when:%Y-%m-%d}",
    }
    return {title: printable(text) for title, text in texts.items()}


def line(row: Mapping[str, str], width: Mapping[str, int]) -> str:
    """A line of the table: text left-aligned, numbers right-aligned, long text shortened."""
    parts = []
    for title, columns in width.items():
        text = row[title]
        if len(text) > columns:
            text = f"{text[: columns // 2]}…{text[len(text) - (columns - 1) // 2 :]}"
        left = title in ("run", "model", "head", "state", "started")
        parts.append(text.ljust(columns) if left else text.rjust(columns))
    return "  ".join(parts).rstrip()


def printable(text: str) -> str:
    """Replace control characters, which the name of a folder may contain."""
    return "".join(c if c.isprintable() else "?" for c in text)


if __name__ == "__main__":
    raise SystemExit(main())
