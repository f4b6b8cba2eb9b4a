"""Run a sweep file of Weights & Biases on this machine, with Optuna.

    matryoshka sweep sweeps/adan_betas_decay.yaml --trials 30
    matryoshka sweep sweeps/adan_betas_decay.yaml --trials 30 --workers 2 -- --data photos

Words after -- are options of the program that the file names, for every trial. The same command
continues a sweep that was interrupted. `--trials 0` shows the table of a sweep and starts nothing.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from matryoshka import config
from matryoshka.config.limits import MAX_COUNT, MAX_SECONDS
from matryoshka.report.plots import plot_importances
from matryoshka.training.sweep_file import Sweep, read_sweep
from matryoshka.training.sweeps import (
    RUN_FLAGS,
    SweepOptions,
    Trial,
    best_first,
    importances,
    read_study,
    run_sweep,
    short,
)

PLOT = "importance.png"
STUDIES = Path("runs/sweeps")


@dataclass(frozen=True, kw_only=True)
class SweepFlags:
    """The sweep file, the study's folder, and how long and how wide the sweep runs."""

    file: str = config.option(
        help="sweep file, as for `wandb sweep`", metavar="FILE", positional=True, existing=True
    )
    extra: tuple[str, ...] = config.option(
        (),
        help="after --: options for every trial",
        metavar="-- OPTION",
        positional=True,
    )
    study: str | None = config.option(
        None,
        help=f"folder of the study (default {STUDIES}/<name of the file>)",
        metavar="DIR",
        file_name=True,
    )
    trials: int | None = config.option(
        None,
        help="trials of the study, earlier starts included (default: run_cap of the file, or the "
        "points of a grid); 0: only show its table",
        low=0,
        high=MAX_COUNT,
    )
    timeout: float | None = config.option(
        None, help="seconds after which no trial starts", above=0, high=MAX_SECONDS
    )
    workers: int = config.option(1, help="trials at the same time", low=1, high=256)
    top: int = config.option(5, help="rows of the table", low=1, high=MAX_COUNT)
    seed: int = config.option(0, help="seed of the search", low=0, high=2**32 - 1)
    run_flags: str = config.option(
        RUN_FLAGS, help="options by which a program learns its run folder, which has the log"
    )


def parser() -> config.FlagParser:
    return config.flat_parser("matryoshka sweep", __doc__ or "", SweepFlags)


@config.program
def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    sweep = read_sweep(args.file)
    folder = Path(args.study) if args.study else STUDIES / Path(args.file).stem
    stopped: list[int] = []
    if args.trials == 0:
        trials = read_study(sweep, folder)
    else:
        options = SweepOptions(
            trials=args.trials,
            timeout=args.timeout,
            workers=args.workers,
            seed=args.seed,
            extra=args.extra,
            run_flags=args.run_flags,
        )
        with stop_signals(stopped) as stop:
            trials = run_sweep(
                sweep, folder, options, report=lambda line: print(line, flush=True), stop=stop
            )
    print(table(trials, sweep, args.top), flush=True)
    print_importance(sweep, folder)
    if stopped:
        print("interrupted; the same command continues", file=sys.stderr)
        return 128 + stopped[0]
    return 0


@contextlib.contextmanager
def stop_signals(stopped: list[int]) -> Iterator[threading.Event]:
    """An event that SIGINT, SIGTERM and SIGHUP set; their number is appended to `stopped`."""
    stop = threading.Event()

    def handle(number: int, _frame: object) -> None:
        stopped.append(number)
        stop.set()

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handle) for number in heard}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def table(trials: Sequence[Trial], sweep: Sweep, top: int) -> str:
    """The best trials, and how many have ended in each state."""
    names = sweep.varied()
    rows = [["", "trial", sweep.metric, "epochs", "minutes", *names]]
    for rank, trial in enumerate(best_first(trials, sweep)[:top], 1):
        values = [short(trial.values.get(name, "")) for name in names]
        minutes = f"{trial.seconds / 60:.1f}"
        facts = [str(trial.number), short(trial.value), str(trial.epochs), minutes]
        rows.append([str(rank), *facts, *values])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells))
    counts = []
    for state in ("complete", "pruned", "failed"):
        counts.append(f"{sum(trial.state == state for trial in trials)} {state}")
    return "\n".join([f"trials   {', '.join(counts)}", *lines])


def print_importance(sweep: Sweep, folder: Path) -> None:
    """Save and print which options matter, where enough trials are complete."""
    shares = importances(sweep, folder)
    if not shares:
        print("note     the importance of the options needs four complete trials that differ")
        return
    plot_importances(folder / PLOT, shares, f"What matters for {sweep.metric}: {sweep.path.stem}")
    texts = [f"{name} {100 * share:.0f} %" for name, share in shares.items()]
    print(f"matters  {', '.join(texts)}  ({folder / PLOT})")


if __name__ == "__main__":
    raise SystemExit(main())
