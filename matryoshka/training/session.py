"""A training run from outside of its steps: start or go on, checkpoints, signals, rollbacks, hangs.

with Session(...) as session:
    while session.progress.epoch < epochs:
        with session.rollback():                # a rollback restores an older state and ends the block
            for batch in loader:
                loss, norm, skip = train_step(...)
                session.after_step(loss, norm, skip)
            session.end_epoch()
            ...
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from matryoshka import distributed
from matryoshka.config import check_name
from matryoshka.distributed import World
from matryoshka.training import snapshot
from matryoshka.training.guard import Guard, Report
from matryoshka.training.run_folder import RunExists, RunLog
from matryoshka.training.snapshot import Saved, Snapshots
from matryoshka.training.state import Progress, TrainState
from matryoshka.training.watch import HangWatch, Stopped, StopSignal, Vote

T = TypeVar("T")
FINAL = "model.safetensors"
CALM_STEPS, CALM_RATE = (
    100,
    0.1,
)  # after a rollback: so many steps at this share of the learning rate
MOST_ROLLBACKS = 5


class SessionError(ValueError):
    """A run that cannot be gone on with; the message names the folder and the remedy."""

    user_error = True


class Diverged(ValueError):
    """Training that is not finite in spite of going back and of a lower learning rate."""

    user_error = True


class _RolledBack(Exception):
    pass


@dataclass(frozen=True)
class Start:
    """What a run folder says about how to begin. finished: there is nothing to do."""

    path: Path
    saved: Saved | None = None
    finished: bool = False
    notes: tuple[str, ...] = ()


# ---------------------------------------------------------------- how to begin


def launch_id() -> str | None:
    """A name that every restart of one torchrun shares: its run id, with the agent's own number
    where that is none.
    """
    if not distributed.started_by_torchrun():
        return None
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if name not in ("", "none"):
        return name
    agent = os.getppid()
    try:
        started = (
            Path(f"/proc/{agent}/stat").read_text().rpartition(")")[2].split()[19]
        )  # a number comes back, a time not
    except OSError:
        started = "0"
    return f"torchrun-{agent}-{started}"


def find_start(
    folder: Path,
    run_id: str,
    resume: str | None,
    options: Mapping[str, Any],
    *,
    neutral: Collection[str] = (),
) -> Start:
    """What to begin with in `<folder>/<run_id>`; resume: auto, a run folder or a checkpoint in one,
    or None.

    A folder that the same torchrun has begun is a restart, which implies auto. RunExists without
    resume; SessionError for a path that is no run, and where the options would give another result
    than those of the run. neutral: names of options that may differ, see `config.neutral_options`.
    """
    try:
        check_name(run_id)
    except ValueError as error:
        raise SessionError(f"logging.run_id={run_id!r}: {error}") from None
    path, chosen = folder / run_id, None
    if resume not in (None, "auto"):
        given = Path(resume)
        path, chosen = (given.parent.parent, given) if given.is_file() else (given, None)
        if not path.is_dir():
            raise SessionError(f"training.resume={resume}: no such run folder or checkpoint")
    if not path.exists() or not any(path.iterdir()):
        return Start(path)
    if resume is None and not _is_restart(path):
        raise RunExists(path)
    if chosen is not None:
        saved, notes = snapshot.read(chosen), []
    else:
        saved, notes = snapshot.newest(path / "checkpoints")
    if saved is None and resume not in (None, "auto"):
        raise SessionError(f"training.resume={resume}: has no checkpoint that is whole")
    if saved is not None:
        check_options(saved, options, neutral)
    return Start(path, saved, (path / FINAL).exists() and chosen is None, tuple(notes))


def begin(
    folder: Path,
    run_id: str,
    resume: str | None,
    options: Mapping[str, Any],
    world: World,
    *,
    neutral: Collection[str] = (),
) -> Start:
    """`find_start` by rank 0, for all ranks."""
    found: list[Start] = []

    def look() -> Start:
        found.append(find_start(folder, run_id, resume, options, neutral=neutral))
        return replace(found[0], saved=None)

    start = distributed.on_main(look, world)
    return replace(start, saved=share(found[0].saved if found else None, world))


def _is_restart(path: Path) -> bool:
    launch = launch_id()
    if launch is None:
        return False
    try:
        return json.loads((path / "env.json").read_text()).get("launch") == launch
    except (OSError, ValueError):
        return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def check_options(saved: Saved, options: Mapping[str, Any], neutral: Collection[str]) -> None:
    """SessionError listing options that affect the result and differ from the run's.

    neutral: the names of options that do not affect it.
    """
    before = saved.about["config"]
    now = json.loads(json.dumps(dict(options)))
    names = [
        name
        for name in {**before, **now}
        if name not in neutral and before.get(name) != now.get(name)
    ]
    if names:
        told = ", ".join(f"{name} was {before.get(name)} and is {now.get(name)}" for name in names)
        raise SessionError(
            f"{saved.path}: cannot go on with other options: {told}; start another run for these"
        )


# ---------------------------------------------------------------- while it runs


class Session:
    """One run, on every rank. progress: where it is; log: on rank 0, else None.

    every_steps, every_minutes: checkpoints (0: none of these) beside those of the epochs' ends.
    skip_limit: steps with non-finite gradients in a row after which the last checkpoint is loaded
    again.
    """

    def __init__(
        self,
        state: TrainState,
        guard: Guard,
        world: World,
        start: Start,
        options: Mapping[str, Any],
        config_yaml: str,
        *,
        keep_last: int,
        every_steps: int,
        every_minutes: float,
        skip_limit: int,
        hang_timeout: float,
        say: Callable[[str], None],
        global_batch: int,
        wandb: str | None = None,
    ) -> None:
        self._state, self._guard, self._world, self._start, self._say = (
            state,
            guard,
            world,
            start,
            say,
        )
        self._every_steps, self._every_seconds, self._skip_limit = (
            every_steps,
            60 * every_minutes,
            skip_limit,
        )
        self.path = start.path
        if start.saved is not None:
            self._load(start.saved)
        self.log: RunLog | None = None
        if world.is_main:
            going_on = None if start.saved is None else (self.progress.step, self.progress.epoch)
            self.log = RunLog(self.path, options, config_yaml, going_on, launch_id(), wandb)
            self.event(
                "start" if going_on is None else "go on", step=self.progress.step, ranks=world.size
            )
        about = {"config": dict(options), "global_batch": global_batch, **state.about}
        self.snapshots = Snapshots(self.path / "checkpoints", about, keep_last)
        if world.is_main and start.saved is not None:
            snapshot.forget_after(self.snapshots.folder, self.progress.step)
            self.snapshots.adopt(start.saved)
        self._signal = StopSignal()
        self._vote = Vote(2, world)
        self._watch = HangWatch(self.path / "stacks", world.rank, hang_timeout)
        self._saved_at, self._epoch_totals, self._row = time.monotonic(), None, 0

    @property
    def progress(self) -> Progress:
        return self._state.progress

    @property
    def rate(self) -> float:
        """Factor of the learning rate: lower for a while after a rollback."""
        return CALM_RATE if self.progress.step < self.progress.calm_until else 1.0

    def __enter__(self) -> Session:
        self._open = contextlib.ExitStack()
        self._open.enter_context(self._signal)
        self._open.enter_context(self._watch)
        if self._start.saved is None:
            self.save()  # a first one, to go back to
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.snapshots.wait()
        self._tell_problems()
        if self.log is not None:
            self.log.close()
        self._open.close()

    def event(self, kind: str, **values: Any) -> None:
        """A line in the run's events.jsonl."""
        if self.log is not None:
            self.log.note({"event": kind, **values})

    # -- steps

    def after_step(self, loss: Tensor, norm: Tensor, skip: Tensor) -> list[Report]:
        """The step is done: count it, write a checkpoint where one is due. The reports that have
        arrived.

        Stopped when the run was asked to stop.
        """
        reports = self._guard.after_step(self.progress.step, loss, norm, skip)
        self.progress.step += 1
        self._watch.beat()
        self._look_at(reports)
        minutes = (
            self._world.is_main and 0 < self._every_seconds < time.monotonic() - self._saved_at
        )
        stop, minutes = self._vote(self._signal.asked is not None, minutes)
        if stop or minutes or (self._every_steps and self.progress.step % self._every_steps == 0):
            self.save(always=stop)
        if stop:
            self._stop()
        return reports

    def end_epoch(self) -> list[float]:
        """The sums of the epoch over all ranks; what is still under way is waited for."""
        self._look_at(self._guard.finish())
        self._epoch_totals = distributed.stack_over_ranks(self._state.totals, self._world)
        if self._vote.finish()[0]:
            self.save(totals=self._epoch_totals, always=True)
            self._stop()
        return self._epoch_totals.sum(0).tolist()

    def epoch_is_done(self, top1: float | None) -> None:
        """Trained, evaluated, logged: count it and write a checkpoint, the best one where `top1` is
        the highest.
        """
        best = top1 is not None and top1 > self.progress.best
        if best and top1 is not None:
            self.progress.best = top1
        self.progress.epoch += 1
        self._state.totals.zero_()
        self.save(best=best)

    def watched(self, items: Iterable[T]) -> Iterator[T]:
        """The items of an evaluation; Stopped when the run was asked to stop meanwhile."""
        for item in items:
            self._watch.beat()
            if self._signal.asked is not None:
                self.save(totals=self._epoch_totals, always=True)
                self._stop()
            yield item

    def save(self, best: bool = False, totals: Tensor | None = None, always: bool = False) -> None:
        """Begin a checkpoint of the state as it is; on all ranks, unless `totals` are given.

        Not while steps are skipped, unless `always`: what is wrong with them may be wrong with the
        weights.
        """
        if self._row and not always:
            return
        if totals is None:
            totals = distributed.stack_over_ranks(self._state.totals, self._world)
        self._saved_at = time.monotonic()
        if self._world.is_main:
            self.snapshots.save(
                self.progress.step, self._state.tensors(totals), self._state.values(), best=best
            )
            self._tell_problems()

    def _tell_problems(self) -> None:
        for problem in self.snapshots.problems():
            self._say(f"note     {problem}")
            self.event("problem", text=problem)

    def _stop(self) -> None:
        self.snapshots.wait()
        self._tell_problems()
        self.event("stopped", step=self.progress.step, signal=self._signal.asked)
        self._say(
            f"stopped  after step {self.progress.step}; the same command with "
            "--training.resume=auto goes on"
        )
        raise Stopped(f"{self.path}: stopped after step {self.progress.step}")

    # -- rollbacks

    def _look_at(self, reports: list[Report]) -> None:
        for report in reports:
            self._row = report.row
            if not report.row:
                continue
            self.event("skipped", step=report.step, loss=repr(report.loss), norm=repr(report.norm))
            if report.row == 1:
                self._say(
                    f"note     step {report.step} skipped: loss {report.loss:.4g}, gradient norm "
                    f"{report.norm:.4g}"
                )
            if report.row >= self._skip_limit:
                self._roll_back(report.step)

    def _roll_back(self, step: int) -> None:
        rollbacks = self.progress.rollbacks + 1
        if rollbacks > MOST_ROLLBACKS:
            raise Diverged(
                f"step {step}: not finite again after {MOST_ROLLBACKS} rollbacks; lower lr.lr or "
                "lr.lr_per_256, "
                "or use bf16"
            )
        self.snapshots.wait()
        saved = None
        if self._world.is_main:
            saved, _ = snapshot.newest(self.snapshots.folder)
        saved = share(saved, self._world)
        if saved is None:
            raise Diverged(
                f"step {step}: not finite, and there is no checkpoint to go back to; lower lr.lr"
            )
        self._load(saved)
        if self._world.is_main:
            snapshot.forget_after(self.snapshots.folder, self.progress.step)
            if self.log is not None:
                self.log.cut(self.progress.epoch)
        self.progress.rollbacks, self.progress.calm_until = rollbacks, step + CALM_STEPS
        self._vote.finish()
        self.event(
            "rolled back", step=step, to=self.progress.step, calm_until=self.progress.calm_until
        )
        self._say(
            f"note     {self._skip_limit} steps in a row are not finite: back to step "
            f"{self.progress.step}, "
            f"learning rate x {CALM_RATE} until step {self.progress.calm_until}"
        )
        raise _RolledBack

    def _load(self, saved: Saved) -> None:
        try:
            self._state.restore(
                saved.tensors, saved.about["progress"], self._world.rank, self._world.size
            )
        except (RuntimeError, KeyError) as error:
            raise SessionError(
                f"{saved.path}: does not fit this run: {str(error).splitlines()[0]}"
            ) from None
        self._guard.reset()
        self._row = 0

    @contextlib.contextmanager
    def rollback(self) -> Iterator[None]:
        """A block that ends early when the run goes back to an older state."""
        with contextlib.suppress(_RolledBack):
            yield


def share(saved: Saved | None, world: World) -> Saved | None:
    """Rank 0's checkpoint on all ranks: only rank 0 needs to reach the folder."""
    if world.size == 1:
        return saved
    told = None
    if saved is not None:
        told = (
            saved.path,
            saved.about,
            {k: (v.dtype, tuple(v.shape)) for k, v in saved.tensors.items()},
        )
    told = distributed.broadcast(told, world)
    if told is None:
        return None
    path, about, shapes = told
    tensors = {}
    for name, (dtype, shape) in shapes.items():
        tensor = saved.tensors[name] if saved is not None else torch.empty(shape, dtype=dtype)
        tensor = tensor.to(world.device)
        torch.distributed.broadcast(tensor, src=0)
        tensors[name] = tensor.cpu()
    return Saved(path, about, tensors)
