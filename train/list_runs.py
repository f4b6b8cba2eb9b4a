"""The training runs below some folders, as a table: the newest first.

    matryoshka runs trainlogs
    matryoshka runs trainlogs runs/demo --sort best
    matryoshka runs trainlogs --json

epochs            that are done / of the run
state             finished: its model is there; running: it wrote something in the last minutes; stopped: it was
                  asked to, and goes on with --training.resume=auto; failed: it ended without a word
short, long, at   top-1 % of the shortest and the longest prefix after the epoch in which the longest was best
img/s, wait       medians over the epochs; wait: share of the time that was spent on waiting for data
skips             steps without finite gradients / returns to an older checkpoint; shown where there are any
"""

from __future__ import annotations

import json
import os
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
from matryoshka.report.tables import Run, RunError, read_run, short_dims

FINAL = "model.safetensors"
COLUMNS = 120
# seconds beyond its interval of checkpoints after which a run that writes nothing is not running
QUIET = 300
NAMED = 8  # folders that the last line names
SORTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "date": lambda run: -datetime.fromisoformat(run["started"]).timestamp(),
    "best": lambda run: -max(list(run["top1"].values())[-1:], default=-1),
    "name": lambda run: run["run"],
}


@dataclass(frozen=True, kw_only=True)
class RunsOptions:
    """Which runs, and how they are shown."""

    folders: tuple[str, ...] = config.option(
        help="a folder of run folders, or a run folder",
        metavar="DIR",
        positional=True,
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
    if not runs:
        why = f" ({left_out(others)})" if others else ""
        raise config.ConfigError(
            f"{', '.join(args.folders)}: no run in it{why}; name the folder that "
            "training wrote to (--logging.folder), or begin a run: matryoshka train"
        )
    rows = sorted(
        sorted((facts(name, run) for name, run in runs), key=SORTS["date"]), key=SORTS[args.sort]
    )
    print("\n".join(map(json.dumps, rows)) if args.json else table(rows), flush=True)
    if others:
        print(left_out(others), file=sys.stderr if args.json else sys.stdout)
    return 0


# ---------------------------------------------------------------- finding


def collect(folders: Iterable[Path]) -> tuple[list[tuple[str, Run]], dict[Path, str]]:
    """([(name, run)], {folder: why it is no run}); a name is the path below its folder, whole where
    that is not one.
    """
    found, others, runs = {}, {}, []
    for root in folders:
        if not root.is_dir():
            raise config.ConfigError(
                f"{root}: no such folder; name the one that training wrote to (--logging.folder)"
            )
        paths, foreign = search(root)
        others |= foreign
        for path in paths:
            name = str(path.relative_to(root)) if path != root else path.resolve().name
            found.setdefault(path.resolve(), (name, path))  # DIRs may overlap
    names = Counter(name for name, _ in found.values())
    for name, path in found.values():
        try:
            runs.append((name if names[name] == 1 else str(path), read_run(path)))
        except RunError as error:
            others[path] = str(error).removeprefix(f"{path}/")
        except OSError as error:
            others[path] = f"{Path(error.filename or path).name}: {error.strerror}"
    return runs, others


def search(root: Path) -> tuple[list[Path], dict[Path, str]]:
    """(folders with a params.json, {folders that should have one, or below which there is none:
    why}).
    """
    runs, others = [], {}
    for name, below, files in os.walk(root):
        folder = Path(name)
        below[:] = sorted(n for n in below if not n.startswith("."))
        if "params.json" in files:
            runs.append(folder)
            below.clear()
        elif folder != root and {"log", "events.jsonl"} & set(files):
            others[folder] = "no params.json"
    if root not in runs:
        known = {path.relative_to(root).parts[0] for path in (*runs, *others)}
        with os.scandir(root) as entries:
            names = sorted(
                e.name
                for e in entries
                if e.is_dir() and not e.name.startswith(".") and e.name not in known
            )
        others |= {root / name: "no params.json" for name in names}
    return runs, others


def left_out(others: Mapping[Path, str]) -> str:
    shown = [f"{path} ({why})" for path, why in list(others.items())[:NAMED]]
    more = [f"{len(others) - NAMED} more"] if len(others) > NAMED else []
    return printable(f"no runs: {', '.join(shown + more)}")


# ---------------------------------------------------------------- reading


def facts(name: str, run: Run) -> dict[str, Any]:
    """What a line of --json holds. top1: {prefix: %} at best_epoch; data_wait: 0 to 1; started: ISO
    8601.
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
    if (run.path / FINAL).exists():
        return "finished"
    if run.events and run.events[-1].get("event") == "stopped":
        return "stopped"
    interval = run.params.get("training.checkpoint_every_minutes")
    quiet = QUIET + (60 * interval if isinstance(interval, int | float) else 0)
    return "running" if now - last_write(run.path) < quiet else "failed"


def last_write(folder: Path) -> float:
    times = []
    for path in (*folder.iterdir(), *folder.glob("checkpoints/*"), *folder.glob("tensorboard/*")):
        try:
            times.append(path.stat().st_mtime)
        except OSError:  # a run that is going on removes and renames
            continue
    return max(times, default=0.0)


def started(run: Run) -> datetime:
    """The time of the first event; of runs without events what the log says, or the age of
    params.json.
    """
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
    """Aligned text of at most COLUMNS columns: the widest names give way."""
    cells = [row_text(row) for row in rows]
    titles = [title for title in cells[0] if title != "skips" or any(row[title] for row in cells)]
    width = {title: max(len(title), *(len(row[title]) for row in cells)) for title in titles}
    kept = {"run": 20, "model": 8, "head": 16}  # they give way in this proportion
    while (
        sum(width.values()) + 2 * (len(titles) - 1) > COLUMNS
        and max(width[name] for name in kept) > 8
    ):
        width[max(kept, key=lambda name: width[name] / kept[name])] -= 1
    lines = [line({title: title for title in titles}, width)]
    lines += [line(row, width) for row in cells]
    return "\n".join([" " * lines[0].index("short") + "top-1 %", *lines])


def row_text(row: Mapping[str, Any]) -> dict[str, str]:
    top1 = list(row["top1"].values())
    wait, speed, when = (
        row["data_wait"],
        row["images_per_s"],
        datetime.fromisoformat(row["started"]),
    )
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
    """Text to the left, numbers to the right; what is too long loses its middle."""
    parts = []
    for title, columns in width.items():
        text = row[title]
        if len(text) > columns:
            text = f"{text[: columns // 2]}…{text[len(text) - (columns - 1) // 2 :]}"
        left = title in ("run", "model", "head", "state", "started")
        parts.append(text.ljust(columns) if left else text.rjust(columns))
    return "  ".join(parts).rstrip()


def printable(text: str) -> str:
    """A folder may be called anything; a line of ours stays a line."""
    return "".join(c if c.isprintable() else "?" for c in text)


if __name__ == "__main__":
    raise SystemExit(main())
