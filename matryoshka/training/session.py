"""Run lifecycle: resume, checkpoints, signals, rollback, hang detection.

with Session(state, guard, world, resume_point, ...) as session:
    while session.loop.epoch < epochs:
        with session.rollback():            # a rollback restores an older state and ends the block
            session.start_epoch()
            for batch in loader:
                loss, norm, skipped = train_step(...)
                session.after_step(loss, norm, skipped)
            metrics = session.end_epoch()
            metrics |= evaluate(...)
            session.log_epoch(metrics)
            session.epoch_done(metrics)
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from matryoshka import distributed
from matryoshka.checkpoint.contents import first_line
from matryoshka.checkpoint.run_files import FINAL
from matryoshka.config import check_name
from matryoshka.distributed import World
from matryoshka.environment import count_in
from matryoshka.files import read_regular
from matryoshka.training import run_lock, snapshot
from matryoshka.training.guard import NonFiniteGuard, StepReport
from matryoshka.training.run_folder import RunExists, RunLog, epoch_scalars, log_line
from matryoshka.training.run_lock import OTHER_FOLDER, RunInUse, RunLock
from matryoshka.training.snapshot import Checkpoint, Snapshots
from matryoshka.training.state import LoopState, TrainState
from matryoshka.training.watch import AnyRankFlags, HangWatch, Stopped, StopSignal

T = TypeVar("T")
ROLLBACK_LR_FACTOR = 0.1  # of the learning rate after a rollback ...
ROLLBACK_LR_STEPS = 100  # ... for this many steps after the bad one
MAX_ROLLBACKS = 5
# A run waits for its disk for at most this share of its time, and these seconds: epochs shorter
# than the writing of a checkpoint then go without one of their own.
DISK_SHARE = 0.05
DISK_SECONDS = 1.0
# Seconds in which the process that torchrun has replaced frees its folder.
RESTART_PATIENCE = 30.0


class SessionError(ValueError):
    """A run that cannot be resumed; the message names the folder and the remedy."""

    user_error = True


class Diverged(ValueError):
    """Non-finite training in spite of rollbacks and a reduced learning rate."""

    user_error = True


class _RolledBack(Exception):
    pass


@dataclass(frozen=True)
class ResumePoint:
    """Start of a run: its folder, and the checkpoint to resume from, if any.

    finished: the run is complete. notes: for the user, such as the damaged checkpoints that were
    skipped. lock: of the folder, on the rank that holds it.
    """

    path: Path
    checkpoint: Checkpoint | None = None
    finished: bool = False
    notes: tuple[str, ...] = ()
    lock: RunLock | None = None


@dataclass(frozen=True)
class SessionOptions:
    """Checkpoints and failure handling of a session.

    best_metric: the metric whose highest value marks the best checkpoint. epochs: of the run; 0:
    unknown, and each has its checkpoint, however long the disk takes. keep_last: step
    checkpoints to keep. checkpoint_every_steps, checkpoint_every_minutes: checkpoints within an
    epoch; 0: none. skip_limit: consecutive steps with non-finite gradients that cause a rollback.
    hang_timeout: seconds without progress until the process ends; 0: never. wandb: project of
    Weights & Biases. tensorboard: whether to write for it. resume_hint: options that resume a
    stopped run, for the message.
    """

    best_metric: str
    epochs: int = 0
    keep_last: int = 3
    checkpoint_every_steps: int = 0
    checkpoint_every_minutes: float = 10.0
    skip_limit: int = 10
    hang_timeout: float = 1800.0
    wandb: str | None = None
    tensorboard: bool = True
    resume_hint: str = "--training.resume=auto"


# ---------------------------------------------------------------- resume


def launch_id() -> str | None:
    """A name shared by all restarts of one torchrun; None without torchrun.

    The name is torchrun's run id. If that is `none`, it is made from the agent process.
    """
    if not distributed.started_by_torchrun():
        return None
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    if name not in ("", "none"):
        # torchrun allows any text; the name of a run folder has no separators and no leading dot.
        return re.sub(r"[^\w.-]+", "-", name).lstrip(".-") or None

    agent = os.getppid()
    try:
        # Field 22 of proc(5) is the start time. The system reuses process ids: only id and start
        # time together identify the agent.
        stat = Path(f"/proc/{agent}/stat").read_text()
        started = stat.rpartition(")")[2].split()[19]
    except OSError:
        started = "0"
    return f"torchrun-{agent}-{started}"


def resolve_run(
    folder: Path,
    run_id: str,
    resume: str | None,
    options: Mapping[str, Any],
    *,
    neutral: Collection[str] = (),
    defaults: Mapping[str, Any] | None = None,
    held: contextlib.ExitStack | None = None,
) -> ResumePoint:
    """Find where the run in `<folder>/<run_id>` starts.

    resume: "auto", a run folder, a checkpoint file in a run folder, or None. A folder created by
    the same torchrun is a restart, which implies "auto". neutral: names of options that may differ,
    see `config.neutral_options`. defaults: values of options that an older run does not have, see
    `config.default_options`. held: receives the lock of the folder, unless the run is finished; it
    is taken before the folder is looked at, so that no other start finds the same.

    Raises RunInUse if another process uses the folder, RunExists if it is not empty and resume is
    None, and SessionError if the path is not a run or if `options` would give another result than
    the run's options.
    """
    path, chosen = _run_path(folder, run_id, resume)
    # Before the lock, too: a start that is refused leaves the folder as it is.
    if (owner := run_lock.holder(path)) is not None and not _is_restart(path):
        raise RunInUse(f"{path}: {owner}; {OTHER_FOLDER}")
    _check_resumable(path, resume)
    lock = None
    if held is not None and not _is_finished(path, chosen):
        patience = RESTART_PATIENCE if _restarts() else run_lock.PATIENCE
        lock = held.enter_context(RunLock(path, patience=patience, remedy=OTHER_FOLDER))
        _check_resumable(path, resume)

    def accept(checkpoint: Checkpoint) -> None:
        check_options(checkpoint, options, neutral, defaults or {})

    notes = [lock.note] if lock is not None and lock.note else []
    if run_lock.is_unused(path):
        return ResumePoint(path, notes=tuple(notes), lock=lock)
    if chosen is not None:
        checkpoint, more = snapshot.chosen(chosen, accept)
    else:
        checkpoint, more = snapshot.newest(path / "checkpoints", accept)
    if checkpoint is None and resume not in (None, "auto"):
        raise SessionError(f"training.resume={resume}: contains no valid checkpoint")
    notes += more
    return ResumePoint(path, checkpoint, _is_finished(path, chosen), tuple(notes), lock)


def _run_path(folder: Path, run_id: str, resume: str | None) -> tuple[Path, Path | None]:
    """(the run folder, the checkpoint file that the user named)."""
    try:
        check_name(run_id)
    except ValueError as error:
        raise SessionError(f"logging.run_id={run_id!r}: {error}") from None
    if resume in (None, "auto"):
        return folder / run_id, None
    named = Path(resume)
    chosen = named if named.is_file() else None
    # <run>/checkpoints/step_N.safetensors
    path = named if chosen is None else named.parent.parent
    if not path.is_dir():
        raise SessionError(f"training.resume={resume}: no such run folder or checkpoint")
    return path, chosen


def _check_resumable(path: Path, resume: str | None) -> None:
    """RunExists if a run is in the folder that was not asked for."""
    if resume is None and not run_lock.is_unused(path) and not _is_restart(path):
        raise RunExists(path)


def _is_finished(path: Path, chosen: Path | None) -> bool:
    # A chosen checkpoint continues a finished run from there.
    return (path / FINAL).exists() and chosen is None


@contextlib.contextmanager
def claim_run(
    folder: Path,
    run_id: str,
    resume: str | None,
    *,
    options: Mapping[str, Any],
    neutral: Collection[str] = (),
    defaults: Mapping[str, Any] | None = None,
    world: World,
) -> Iterator[ResumePoint]:
    """`resolve_run` on rank 0, with the result on all ranks; in the block, the folder is this
    run's alone.
    """
    checkpoint: Checkpoint | None = None  # stays None on all ranks but the main one
    lock: RunLock | None = None

    with contextlib.ExitStack() as held:

        def resolve() -> ResumePoint:
            nonlocal checkpoint, lock
            resolved = resolve_run(
                folder, run_id, resume, options, neutral=neutral, defaults=defaults, held=held
            )
            checkpoint = resolved.checkpoint
            lock = resolved.lock
            # on_main pickles its result; the tensors travel separately, without pickle.
            return replace(resolved, checkpoint=None, lock=None)

        point = distributed.on_main(resolve, world)
        checkpoint = broadcast_checkpoint(checkpoint, world)
        yield replace(point, checkpoint=checkpoint, lock=lock)


def _restarts() -> int:
    """How often torchrun has restarted this process."""
    return count_in("TORCHELASTIC_RESTART_COUNT", 0)


def _is_restart(path: Path) -> bool:
    launch = launch_id()
    if launch is None:
        return False
    try:
        return json.loads(read_regular(path / "env.json")).get("launch") == launch
    except (OSError, ValueError, AttributeError):
        # Killed before it wrote env.json; torchrun counts its restarts.
        return _restarts() > 0


def check_options(
    checkpoint: Checkpoint,
    options: Mapping[str, Any],
    neutral: Collection[str],
    defaults: Mapping[str, Any],
) -> None:
    """Raise SessionError with the options that affect the result and differ from the run's.

    neutral: names of the options that do not affect it. defaults: of all options.
    """
    before = checkpoint.metadata["config"]
    # Through JSON, as the checkpoint's own options went: tuples become lists.
    now = json.loads(json.dumps(dict(options)))
    differences = []
    for name in {**before, **now}:
        # An option of a newer version is missing in an older run, which had its default.
        old = before.get(name, defaults.get(name))
        new = now.get(name)
        # As text, too: data.resident=0 was a number until it also took a word.
        if name not in neutral and old != new and str(old) != str(new):
            differences.append(f"{name} was {old} and is {new}")
    if differences:
        raise SessionError(
            f"{checkpoint.path}: cannot resume with other options: {', '.join(differences)}; "
            "start a new run for these"
        )


def broadcast_checkpoint(checkpoint: Checkpoint | None, world: World) -> Checkpoint | None:
    """Rank 0's checkpoint on all ranks: only rank 0 needs access to the folder."""
    if world.size == 1:
        return checkpoint
    # The other ranks need names, types and shapes before they can receive a tensor.
    header = None
    if checkpoint is not None:
        shapes = {name: (t.dtype, tuple(t.shape)) for name, t in checkpoint.tensors.items()}
        header = (checkpoint.path, checkpoint.metadata, shapes, checkpoint.is_sealed)
    header = distributed.broadcast(header, world)
    if header is None:
        return None

    path, metadata, shapes, is_sealed = header
    tensors = {}
    for name, (dtype, shape) in shapes.items():
        if checkpoint is not None:
            tensor = checkpoint.tensors[name]
        else:
            tensor = torch.empty(shape, dtype=dtype)
        tensor = tensor.to(world.device)  # NCCL sends device memory only
        torch.distributed.broadcast(tensor, src=0)
        tensors[name] = tensor.cpu()
    return Checkpoint(path, metadata, tensors, is_sealed)


# ---------------------------------------------------------------- the session


class Session:
    """One run, on every rank.

    config: the flat options of the run; config_yaml: the same as text. print0: prints on rank 0.
    loop: position of the run. log: the run folder on rank 0, None on other ranks.
    """

    def __init__(
        self,
        state: TrainState,
        guard: NonFiniteGuard,
        world: World,
        resume_point: ResumePoint,
        *,
        options: SessionOptions,
        config: Mapping[str, Any],
        config_yaml: str,
        print0: Callable[[str], None],
    ) -> None:
        self._state = state
        self._guard = guard
        self._world = world
        self._options = options
        self._print0 = print0
        self.path = resume_point.path
        self._lock = resume_point.lock
        folder = self.path / "checkpoints"
        resumed: Checkpoint | None = None
        if resume_point.checkpoint is not None:
            resumed = self._resume(resume_point.checkpoint, folder)
        self._resumed = resumed is not None

        self.log: RunLog | None = None
        if world.is_main:
            resumed_at = (self.loop.step, self.loop.epoch) if self._resumed else None
            self.log = RunLog(
                self.path,
                config,
                config_yaml,
                resumed_at=resumed_at,
                launch=launch_id(),
                wandb=options.wandb,
                tensorboard=options.tensorboard,
            )
            kind = "go on" if self._resumed else "start"  # names of the events.jsonl format
            self.event(kind, step=self.loop.step, ranks=world.size)

        metadata = {
            "config": dict(config),
            "global_batch": state.loader.batch_size,
            **state.metadata,
        }
        self.snapshots = Snapshots(folder, metadata, options.keep_last)
        if world.is_main and resumed is not None:
            # Later checkpoints belong to a continuation that this one replaces.
            snapshot.delete_after(folder, self.loop.step)
            self.snapshots.adopt(resumed)

        self._signal = StopSignal()
        self._flags = AnyRankFlags(2, world)  # stop, checkpoint
        self._watch = HangWatch(self.path / "stacks", world.rank, options.hang_timeout)
        self._saved_at = time.monotonic()
        self._began = time.monotonic()
        self._is_postponed = False  # an epoch's checkpoint, until the disk is free
        self._epoch_totals: Tensor | None = None  # of all ranks, once an epoch is trained
        self._consecutive_skips = 0

    @property
    def loop(self) -> LoopState:
        return self._state.loop

    @property
    def lr_factor(self) -> float:
        """Factor of the learning rate: reduced for some steps after a rollback."""
        return ROLLBACK_LR_FACTOR if self.loop.step < self.loop.reduced_lr_until else 1.0

    def __enter__(self) -> Session:
        with contextlib.ExitStack() as opened:
            opened.enter_context(self._signal)
            opened.enter_context(self._watch)
            if not self._resumed:
                self.save()  # step 0: a checkpoint to roll back to exists from the start
            self._open = opened.pop_all()
        return self

    def __exit__(self, kind, error, trace) -> None:
        with self._open:  # closed also if the disk takes no line of the log any more
            self.snapshots.wait()
            try:
                self._report_problems()
            finally:
                if self.log is not None:
                    self.log.close()

    def event(self, kind: str, **values: Any) -> None:
        """Append a line to the run's events.jsonl."""
        if self.log is not None:
            self.log.write_event({"event": kind, **values})

    # -- steps and epochs

    def start_epoch(self) -> None:
        """Move the loader to the first step of the current epoch that is not done."""
        loader = self._state.loader
        # Every epoch has the same number of steps, so the step alone gives the position.
        batch = self.loop.step - self.loop.epoch * len(loader)
        position = {"epoch": self.loop.epoch, "batch": batch}
        loader.load_state_dict(loader.state_dict() | position)

    def after_step(
        self, loss: Tensor, norm: Tensor, skip: Tensor, *, prefix_losses: Tensor | None = None
    ) -> list[StepReport]:
        """Count the step and write a checkpoint if one is due; return the reports that arrived.

        prefix_losses: for the reports, float [G]. Raises Stopped if any rank received a stop
        signal.
        """
        reports = self._guard.after_step(
            self.loop.step, loss, norm, skip, prefix_losses=prefix_losses
        )
        self.loop.step += 1
        self._watch.beat()
        self._handle_reports(reports)

        # Ranks must agree on the step at which they save or stop: both gather tensors of all ranks.
        every_steps = self._options.checkpoint_every_steps
        stop, save = self._flags.exchange(self._signal.received is not None, self._minutes_passed())
        if every_steps and self.loop.step % every_steps == 0:
            save = True
        if stop or save:
            self.save(always=stop)
        if stop:
            self._stop()
        return reports

    def _minutes_passed(self) -> bool:
        """Whether rank 0, which writes, has not written for checkpoint_every_minutes, or has a
        checkpoint to write that it has postponed.
        """
        if self._is_postponed and not self.snapshots.is_writing:
            return True
        seconds = 60 * self._options.checkpoint_every_minutes
        return self._world.is_main and 0 < seconds < time.monotonic() - self._saved_at

    def end_epoch(self) -> dict[str, Any]:
        """Wait for pending reports; return the epoch's means over all ranks (`Sums.means`)."""
        self._handle_reports(self._guard.finish())
        self._epoch_totals = distributed.stack_over_ranks(self._state.sums.totals, self._world)
        if self._flags.finish()[0]:
            self.save(totals=self._epoch_totals, always=True)
            self._stop()
        return self._state.sums.means(self._epoch_totals.sum(0))

    def interruptible(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the parts of an evaluation; raise Stopped if any rank received a stop signal.

        Use it to its end, on every rank, before ranks exchange results.
        """
        for batch in batches:
            self._watch.beat()
            if self._signal.received is not None:
                break
            yield batch
        # Here ranks agree: one that stopped by itself would leave the others waiting for its
        # results.
        if self._flags.agree(self._signal.received is not None):
            self.save(totals=self._epoch_totals, always=True)
            self._stop()

    def log_epoch(self, metrics: Mapping[str, float]) -> None:
        """Write the epoch's metrics to the log and to TensorBoard; list the images left out.

        metrics: names and values as `run_folder.log_line` and `epoch_scalars` expect them.
        """
        loader = self._state.loader
        skipped = distributed.gather(getattr(loader, "skipped", []), self._world)
        if skipped:
            loader.skipped.clear()
        self._keep_folder()
        if self.log is not None:
            self.log.write_line(log_line(metrics, self.loop.epoch))
            self.log.write_scalars(epoch_scalars(metrics), self.loop.step)
            for sample in sorted(skipped):
                self.log.write_skipped({"epoch": self.loop.epoch} | sample._asdict())
        if skipped:
            self._print0(
                f"note     {len(skipped)} images were left out of this epoch, see skipped.jsonl"
            )

    def epoch_done(self, metrics: Mapping[str, float]) -> None:
        """Count the epoch and write its checkpoint; the best one if best_metric is a new maximum.

        An epoch without best_metric in its metrics was not evaluated and is never the best. If the
        run has waited much for its disk and the last checkpoint is still being written, that of an
        epoch which is neither the best nor the last follows as soon as it is done.
        """
        value = metrics.get(self._options.best_metric)
        is_best = value is not None and value > self.loop.best
        if value is not None and is_best:
            self.loop.best = value
        # Before saving: the checkpoint must start the next epoch, not repeat this one.
        self.loop.epoch += 1
        self._state.sums.reset()
        is_last = self.loop.epoch >= self._options.epochs
        self.save(best=is_best, may_wait=not is_best and not is_last)

    # -- checkpoints

    def save(
        self,
        best: bool = False,
        totals: Tensor | None = None,
        always: bool = False,
        *,
        may_wait: bool = False,
    ) -> None:
        """Start writing a checkpoint of the current state. Collective unless `totals` are given.

        Skipped while gradients are non-finite, because the weights may be corrupt too; `always`
        overrides this. may_wait: it may be written after a later step instead.
        """
        if self._consecutive_skips and not always:
            return
        if totals is None:
            totals = distributed.stack_over_ranks(self._state.sums.totals, self._world)
        if self._world.is_main and may_wait and self._disk_is_slow():
            self._is_postponed = True
            return
        self._is_postponed = False
        self._saved_at = time.monotonic()
        if self._world.is_main:
            self._keep_folder()
            tensors = self._state.tensors(totals)
            self.snapshots.save(self.loop.step, tensors, self._state.values(), best=best)
            self._report_problems()

    def _disk_is_slow(self) -> bool:
        """Whether another wait for the writer would cost too much of the run's time."""
        allowed = max(DISK_SECONDS, DISK_SHARE * (time.monotonic() - self._began))
        return self.snapshots.is_writing and self.snapshots.waited > allowed

    def _keep_folder(self) -> None:
        """RunInUse if the folder was removed, and another run has it now."""
        if self._lock is not None:
            self._lock.renew()

    def _report_problems(self) -> None:
        for problem in self.snapshots.problems():
            self._print0(f"note     {problem}")
            self.event("problem", text=problem)

    def _stop(self) -> None:
        self.snapshots.wait()
        self._report_problems()
        self.event("stopped", step=self.loop.step, signal=self._signal.received)
        self._print0(
            f"stopped  after step {self.loop.step}; resume with the same command and "
            f"{self._options.resume_hint}"
        )
        raise Stopped(f"{self.path}: stopped after step {self.loop.step}")

    # -- rollbacks

    @contextlib.contextmanager
    def rollback(self) -> Iterator[None]:
        """A block that ends early if the session rolls back to an older checkpoint."""
        with contextlib.suppress(_RolledBack):
            yield

    def _handle_reports(self, reports: list[StepReport]) -> None:
        for report in reports:
            self._consecutive_skips = report.consecutive_skips
            if not report.consecutive_skips:
                continue
            # repr: JSON has no nan and no inf
            self.event("skipped", step=report.step, loss=repr(report.loss), norm=repr(report.norm))
            if report.consecutive_skips == 1:
                self._print0(
                    f"note     step {report.step} skipped: loss {report.loss:.4g}, gradient norm "
                    f"{report.norm:.4g}"
                )
            if report.consecutive_skips >= self._options.skip_limit:
                self._roll_back(report.step)

    def _roll_back(self, step: int) -> None:
        rollbacks = self.loop.rollbacks + 1
        if rollbacks > MAX_ROLLBACKS:
            raise Diverged(
                f"step {step}: still non-finite after {MAX_ROLLBACKS} rollbacks; lower lr.lr or "
                "lr.lr_per_256, or use bf16"
            )

        self.snapshots.wait()
        checkpoint = None
        if self._world.is_main:
            checkpoint, _ = snapshot.newest(self.snapshots.folder)
        checkpoint = broadcast_checkpoint(checkpoint, self._world)
        if checkpoint is None:
            raise Diverged(
                f"step {step}: non-finite, and no checkpoint exists to roll back to; lower lr.lr"
            )

        self._load(checkpoint)
        if self._world.is_main:
            snapshot.delete_after(self.snapshots.folder, self.loop.step)
            if self.log is not None:
                self.log.truncate(self.loop.epoch)
        # Loading has restored older values of these two; a rollback must still count, or a run that
        # diverges again and again would never end.
        self.loop.rollbacks = rollbacks
        self.loop.reduced_lr_until = step + ROLLBACK_LR_STEPS
        self._flags.finish()  # flags of a step that is undone
        self.event(
            "rolled back", step=step, to=self.loop.step, calm_until=self.loop.reduced_lr_until
        )
        self._print0(
            f"note     {self._options.skip_limit} consecutive steps are not finite: back to step "
            f"{self.loop.step}, learning rate x {ROLLBACK_LR_FACTOR} until step "
            f"{self.loop.reduced_lr_until}"
        )
        raise _RolledBack

    def _resume(self, checkpoint: Checkpoint, folder: Path) -> Checkpoint:
        """Load a checkpoint and return it.

        A file of an older version may be damaged in its header: if it does not fit, the one before
        it is tried.
        """
        while True:
            try:
                self._load(checkpoint)
                return checkpoint
            except ValueError as error:  # SessionError, and the loader's StateError
                if checkpoint.is_sealed:
                    raise
                older: Checkpoint | None = None
                if self._world.is_main:
                    older, _ = snapshot.newest(folder, before=checkpoint.metadata["step"])
                older = broadcast_checkpoint(older, self._world)
                if older is None:
                    raise
                self._print0(f"note     {error}; resuming from {older.path.name}")
                checkpoint = older

    def _load(self, checkpoint: Checkpoint) -> None:
        try:
            self._state.restore(
                checkpoint.tensors,
                checkpoint.metadata["progress"],
                self._world.rank,
                self._world.size,
            )
        except (RuntimeError, LookupError, TypeError, AttributeError) as error:
            raise SessionError(
                f"{checkpoint.path}: does not fit this run: {first_line(error)}"
            ) from None
        # What the loader could not compare, because an older version wrote the checkpoint.
        for note in self._state.loader.notes:
            self._print0(f"note     {note}")
        self._state.loader.notes.clear()
        self._guard.reset()
        self._consecutive_skips = 0
