"""Sweeps: an Optuna study whose trials are runs of a program.

The study is a folder: study.db (SQLite), sweep.json (what is searched), and trials/ with a run
folder, and the output, of each trial. Several processes may work on one study. A trial that was
RUNNING when its worker was killed is failed, and its values are tried again.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import math
import os
import shlex
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from matryoshka import json_files
from matryoshka.files import open_append, read_regular, sync_folder, write_atomically
from matryoshka.training.sweep_file import Sweep, SweepError, command_line
from matryoshka.training.sweep_trial import (
    Log,
    Process,
    end_process,
    find_program,
    identity,
    is_alive,
    metric_of,
)

if TYPE_CHECKING:
    import optuna

STUDY = "sweep"
DATABASE = "study.db"  # in the folder of a sweep
RUN_FLAGS = "--logging.folder={folder} --logging.run_id={name}"
MAX_FAILURES = 3  # in a row
MIN_FOR_IMPORTANCE = 4  # complete trials
POLL = 0.2  # seconds between two looks at a trial


@dataclass(frozen=True)
class SweepOptions:
    """How a sweep runs. trials: of the whole study, earlier starts included; None: see `run_sweep`.

    timeout: seconds after which no trial starts; None: no limit. workers: trials at the same time.
    extra: words for every trial's command line. run_flags: the words by which a program learns its
    run folder, {folder}/{name}.
    """

    trials: int | None = None
    timeout: float | None = None
    workers: int = 1
    seed: int = 0
    extra: tuple[str, ...] = ()
    run_flags: str = RUN_FLAGS


@dataclass(frozen=True)
class Trial:
    """A trial that has ended. state: complete, pruned or failed. value: the metric, at its end.

    values: {option: value}. folder: its run folder.
    """

    number: int
    state: str
    value: float | None
    epochs: int
    seconds: float
    values: dict[str, Any]
    folder: Path


@dataclass
class _Shared:
    """What the workers of one process share."""

    stop: threading.Event
    deadline: float
    goal: int | None  # trials of the whole study
    error: BaseException | None = None
    failures: int = 0  # in a row
    lock: threading.Lock = field(default_factory=threading.Lock)


def run_sweep(
    sweep: Sweep,
    folder: str | Path,
    options: SweepOptions | None = None,
    *,
    report: Callable[[str], None] = lambda line: None,
    stop: threading.Event | None = None,
) -> list[Trial]:
    """Run a sweep in its folder, or continue it; return all its trials that have ended.

    Without a number of trials, the sweep's run_cap counts, and a grid ends with its points. stop:
    ends the running trials when it is set; the next start repeats them. Raises SweepError: no
    Optuna, a folder of another sweep, a program or a metric that does not exist.
    """
    options = options or SweepOptions()
    folder = Path(folder)
    goal = options.trials or sweep.run_cap
    if (points := sweep.points()) is not None:
        goal = min(goal or points, points)  # a grid has no further points
    if goal is None and options.timeout is None:
        raise SweepError(
            f"{sweep.path}: without run_cap, give the number of trials (--trials) or a time "
            "(--timeout)"
        )
    _optuna()
    program = find_program(sweep.program, sweep.path)
    command_line(sweep, program, {}, options.extra)  # raises for an unknown macro
    _run_words(options.run_flags, folder, "trial_00000")

    with _named_errors(folder):
        return _run_workers(sweep, folder, program, options, goal=goal, report=report, stop=stop)


def _run_workers(
    sweep: Sweep,
    folder: Path,
    program: Sequence[str],
    options: SweepOptions,
    *,
    goal: int | None,
    report: Callable[[str], None],
    stop: threading.Event | None,
) -> list[Trial]:
    storage = _open(sweep, folder)
    seconds = math.inf if options.timeout is None else options.timeout
    shared = _Shared(stop or threading.Event(), time.monotonic() + seconds, goal)
    workers = [
        _Worker(sweep, folder, program, options, storage=storage, shared=shared, report=report)
        for _ in range(options.workers)
    ]
    with _locked(folder):
        workers[0].recover()
        if sweep.method == "grid":
            workers[0].enqueue_grid()
    threads = [threading.Thread(target=worker.run) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if shared.error is not None:
        raise shared.error
    return _ended(workers[0].study, sweep, folder)


def read_study(sweep: Sweep, folder: str | Path) -> list[Trial]:
    """The trials of a study that have ended. SweepError if the folder is not one of this sweep."""
    folder = Path(folder)
    if not (folder / DATABASE).exists():
        raise SweepError(f"{folder}: not the folder of a sweep")
    with _named_errors(folder):
        return _ended(_load(_open(sweep, folder)), sweep, folder)


def best_first(trials: Sequence[Trial], sweep: Sweep) -> list[Trial]:
    """The complete trials, the best metric first."""
    complete = [t for t in trials if t.state == "complete" and t.value is not None]
    return sorted(complete, key=lambda t: t.value or 0.0, reverse=sweep.maximise)


def importances(sweep: Sweep, folder: str | Path) -> dict[str, float]:
    """{option: share of the metric's variance}, largest first, by fANOVA (Hutter et al. 2014).

    Empty where it cannot be known: fewer than 4 complete trials, or a metric that never varies.
    """
    optuna = _optuna()
    folder = Path(folder)
    with _named_errors(folder):
        study = _load(_open(sweep, folder))
        complete = study.get_trials(states=[optuna.trial.TrialState.COMPLETE])
    if len(complete) < MIN_FOR_IMPORTANCE or len({t.value for t in complete}) == 1:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    try:
        return optuna.importance.get_param_importances(study, evaluator=evaluator)
    except (RuntimeError, ValueError):  # every option has one value in all trials
        return {}


# ---------------------------------------------------------------- the study on disk


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise SweepError("sweeps need optuna: pip install 'matryoshka-vision[sweep]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One worker of one process at a time. The system frees the lock of a killed process."""
    with open_append(folder / "lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _open(sweep: Sweep, folder: Path) -> Any:
    """The storage of a study, a new one where the folder does not exist or is empty."""
    known = folder / "sweep.json"
    searched = json.loads(json.dumps(sweep.search()))
    # A start that was killed early has left these two, and hidden temporary files.
    strangers = {path.name for path in folder.glob("[!.]*")} - {"lock", "trials"}
    if strangers and not known.exists():
        raise SweepError(f"{folder}: exists and is not a sweep; give another folder (--study)")
    (folder / "trials").mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        if known.exists():
            try:
                before, _ = json_files.decode(read_regular(known))
            except json_files.JsonFileError as error:
                raise SweepError(f"{known}: damaged: {error}") from None
            changed = [key for key in searched if before.get(key) != searched[key]]
            if changed:
                raise SweepError(
                    f"{folder}: its sweep has another {', '.join(changed)} than {sweep.path}; "
                    "give another folder (--study), or delete this one"
                )
        else:
            write_atomically(known, json_files.encode(searched))
        database = folder / DATABASE
        if not database.exists():
            _create(sweep, database)
    return _storage(database)


def _create(sweep: Sweep, database: Path) -> None:
    """Make the database of a study, whole or not at all.

    Optuna makes its tables one by one. Killed meanwhile, it would later take a database without the
    constraint that a name is that of one study.
    """
    new = database.with_name(f".{database.name}")

    def remove() -> None:
        for path in database.parent.glob(f"{new.name}*"):  # with SQLite's journal
            path.unlink()

    remove()  # of a process that was killed
    try:
        storage = _storage(new)
        _optuna().create_study(
            study_name=STUDY,
            storage=storage,
            direction="maximize" if sweep.maximise else "minimize",
        )
        storage.engine.dispose()
        os.replace(new, database)
        sync_folder(database.parent)
    except BaseException:
        remove()
        raise


def _storage(database: Path) -> Any:
    return _optuna().storages.RDBStorage(
        f"sqlite:///{database.resolve()}", engine_kwargs={"connect_args": {"timeout": 60}}
    )


@contextlib.contextmanager
def _named_errors(folder: Path) -> Iterator[None]:
    """SweepError for a database that cannot be used: on a full disk, damaged, read-only."""
    _optuna()  # its absence has an error of its own
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except Exception as error:
        found: BaseException | None = error
        while found is not None and not isinstance(found, SQLAlchemyError):
            found = found.__cause__  # Optuna wraps them
        if found is None:
            raise
        reason = str(getattr(found, "orig", None) or found).splitlines()[0]
        raise SweepError(f"{folder / DATABASE}: {reason}") from None


def _load(storage: Any) -> optuna.Study:
    return _optuna().load_study(study_name=STUDY, storage=storage)


def _sampler(sweep: Sweep, seed: int) -> Any:
    optuna = _optuna()
    if sweep.method == "bayes":
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    return optuna.samplers.RandomSampler(seed=seed)


def _pruner(sweep: Sweep, every: Sequence[Any]) -> Any:
    """Hyperband. Without max_iter, a trial is as long as the longest that is complete.

    Optuna's "auto" would take an epoch more, and so sometimes a bracket in which nothing is judged.
    """
    optuna = _optuna()
    stopping = sweep.stopping
    if stopping is None:
        return optuna.pruners.NopPruner()
    complete = [t for t in every if t.state.name == "COMPLETE"]
    longest = max((max(t.intermediate_values, default=0) for t in complete), default=0)
    if stopping.last is None and not longest:
        # The first bracket alone; it also keeps what later trials are compared with.
        return optuna.pruners.SuccessiveHalvingPruner(
            min_resource=stopping.first, reduction_factor=stopping.eta
        )
    return optuna.pruners.HyperbandPruner(
        min_resource=stopping.first,
        max_resource=max(stopping.first, stopping.last or longest),
        reduction_factor=stopping.eta,
    )


def _ended(study: optuna.Study, sweep: Sweep, folder: Path) -> list[Trial]:
    """The trials of a study that have ended, without those that were repeated."""
    every = study.get_trials(deepcopy=False)
    repeated = {trial.user_attrs.get("repeats") for trial in every}
    states = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
    found = []
    for trial in every:
        state = states.get(trial.state.name)
        if state is None or trial.number in repeated:
            continue
        # Optuna takes it from the clock of the day, which may have been set back.
        seconds = max(0.0, trial.duration.total_seconds()) if trial.duration else 0.0
        found.append(
            Trial(
                number=trial.number,
                state=state,
                value=trial.value if state != "failed" else None,
                epochs=max(trial.intermediate_values, default=0),
                seconds=seconds,
                values=trial.user_attrs.get("values", {}),
                folder=folder / "trials" / _name(trial.number),
            )
        )
    return found


def _name(number: int) -> str:
    return f"trial_{number:05d}"


def _run_words(flags: str, folder: Path, name: str) -> list[str]:
    """The words by which a program learns its run folder."""
    words = []
    for word in shlex.split(flags):
        try:
            words.append(word.format(folder=folder / "trials", name=name))
        except (KeyError, IndexError, ValueError):
            raise SweepError(
                f"--run-flags {flags}: expected {{folder}} and {{name}} as its only fields"
            ) from None
    return words


# ---------------------------------------------------------------- a worker


class _Worker:
    """Takes trials of a study, one after the other."""

    def __init__(
        self,
        sweep: Sweep,
        folder: Path,
        program: Sequence[str],
        options: SweepOptions,
        *,
        storage: Any,
        shared: _Shared,
        report: Callable[[str], None],
    ) -> None:
        self._sweep = sweep
        self._folder = folder
        self._program = program
        self._options = options
        self._shared = shared
        self._report = report
        self.study = _load(storage)
        self._states = _optuna().trial.TrialState

    def run(self) -> None:
        """Run trials until the sweep has enough of them, or ends."""
        try:
            while (trial := self._next()) is not None:
                self._run(trial)
        except BaseException as error:  # raised again in the main thread
            with self._shared.lock:
                self._shared.error = self._shared.error or error
            self._shared.stop.set()

    # ---- before a trial ----

    def recover(self) -> None:
        """Repeat the trials whose worker was killed. Call it with the study locked."""
        for trial in self.study.get_trials(deepcopy=False, states=(self._states.RUNNING,)):
            worker = trial.user_attrs.get("worker")
            if worker is not None and is_alive(worker):
                continue
            process = trial.user_attrs.get("process")
            if process is not None:
                end_process(process)
            # A worker that was killed while it drew has not drawn all of a point of the queue.
            queued = trial.system_attrs.get("fixed_params", {})
            self._repeat(trial.number, {**queued, **trial.params})
            self._report(f"{_name(trial.number)}  was interrupted, is repeated")

    def _repeat(self, number: int, drawn: Mapping[str, Any]) -> None:
        """Fail a running trial and put its values into the queue."""
        every = self.study.get_trials(deepcopy=False)
        # In this order, and looking first: a kill in between neither loses nor doubles a trial.
        if all(trial.user_attrs.get("repeats") != number for trial in every):
            self.study.enqueue_trial(dict(drawn), user_attrs={"repeats": number})
        self.study.tell(number, state=self._states.FAIL)

    def enqueue_grid(self) -> None:
        """Put all points of the grid that are not in the study into its queue."""
        names = [p.name for p in self._sweep.parameters if p.domain().kind != "constant"]
        axes = [p.grid() for p in self._sweep.parameters if p.domain().kind != "constant"]
        known = set()
        for trial in self.study.get_trials(deepcopy=False):
            drawn = trial.system_attrs.get("fixed_params", trial.params)
            known.add(json.dumps(drawn, sort_keys=True))
        for point in itertools.product(*axes):
            drawn = dict(zip(names, point, strict=True))
            if json.dumps(drawn, sort_keys=True) not in known:
                self.study.enqueue_trial(drawn)

    def _next(self) -> optuna.Trial | None:
        """The next trial, with its values; None if no other should start."""
        shared = self._shared
        with _locked(self._folder):
            if shared.stop.is_set() or time.monotonic() >= shared.deadline:
                return None
            every = self.study.get_trials(deepcopy=False)
            if shared.goal is not None and self._counted(every) >= shared.goal:
                return None
            # Of the number of trials before this one, without repeats, which draw nothing: a sweep
            # that was interrupted continues with the numbers of one that was not.
            drawn_before = sum("repeats" not in t.user_attrs for t in every)
            seed = np.random.SeedSequence([self._options.seed, drawn_before]).generate_state(1)
            self.study.sampler = _sampler(self._sweep, int(seed[0]))
            self.study.pruner = _pruner(self._sweep, every)
            trial = self.study.ask()
            trial.set_user_attr("worker", identity(os.getpid()))
            trial.set_user_attr("values", self._suggest(trial))
        return trial

    def _counted(self, every: Sequence[Any]) -> int:
        """Trials that run or have ended, without those that are repeated."""
        repeated = {trial.user_attrs.get("repeats") for trial in every}
        waiting = self._states.WAITING
        return sum(t.state != waiting and t.number not in repeated for t in every)

    def _suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        values = {}
        for parameter in self._sweep.parameters:
            domain, name = parameter.domain(), parameter.name
            drawn: Any = None
            if domain.kind == "choice":
                drawn = trial.suggest_categorical(name, domain.choices)
            elif domain.kind == "int":
                drawn = trial.suggest_int(name, int(domain.low), int(domain.high))
            elif domain.kind == "float":
                drawn = trial.suggest_float(name, domain.low, domain.high, log=domain.log)
            values[name] = parameter.value(drawn)
        return values

    # ---- a trial ----

    def _run(self, trial: optuna.Trial) -> None:
        name = _name(trial.number)
        folder = self._folder / "trials"
        words = [*self._options.extra, *_run_words(self._options.run_flags, self._folder, name)]
        values = trial.user_attrs["values"]
        process = Process(
            command_line(self._sweep, self._program, values, words), folder / f"{name}.out"
        )
        log = Log(folder / name / "log")
        try:
            trial.set_user_attr("process", process.identity())
            process.begin()
            values = self._follow(trial, process, log)
        finally:
            process.stop()
        if values is not None:
            self._finish(trial, process, log, values)

    def _follow(self, trial: optuna.Trial, process: Process, log: Log) -> list[float] | None:
        """Report the metric of every epoch until the program ends; the metrics.

        None if the trial has been pruned or interrupted.
        """
        values: list[float] = []
        while True:
            status = process.status()  # before the log: what it wrote last must be read, too
            for line in log.new_lines():
                value = metric_of(line, self._sweep.metric)
                if value is None:
                    continue
                values.append(value)
                trial.report(value, len(values))
                # Asked of a program that has ended, too: later trials are compared with it.
                is_bad = trial.should_prune()
                if is_bad and status is None:
                    process.stop()
                    self.study.tell(trial, state=self._states.PRUNED)
                    self._tell_people(trial.number)
                    self._shared.failures = 0
                    return None
            if status is not None:
                return values
            if self._shared.stop.is_set():
                process.stop()
                with _locked(self._folder):
                    self._repeat(trial.number, trial.params)
                return None
            time.sleep(POLL)

    def _finish(
        self, trial: optuna.Trial, process: Process, log: Log, values: Sequence[float]
    ) -> None:
        """Record a trial whose program has ended."""
        status = process.status()
        name = _name(trial.number)
        if status == 0 and values and math.isfinite(values[-1]):
            self.study.tell(trial, values[-1])
            self._tell_people(trial.number)
            self._shared.failures = 0
            self._look_at_target(values[-1])
            return

        self.study.tell(trial, state=self._states.FAIL)
        if status == 0 and not values:
            known = ", ".join(sorted(log.names)) or "nothing"
            raise SweepError(
                f"{self._sweep.path}: metric {self._sweep.metric}: {name} logged none in "
                f"{self._folder / 'trials' / name / 'log'}; it has {known}"
            )
        reason = "the metric is not finite" if status == 0 else process.last_words()
        text = f"{name} failed, status {status}: {reason}"
        self._shared.failures += 1
        complete = self.study.get_trials(deepcopy=False, states=(self._states.COMPLETE,))
        # Status 2 is a refused option, which every other trial would also have.
        if (status == 2 and not complete) or self._shared.failures >= MAX_FAILURES:
            raise SweepError(text)
        self._report(text)

    def _look_at_target(self, value: float) -> None:
        target = self._sweep.target
        if target is None:
            return
        reached = value >= target if self._sweep.maximise else value <= target
        if reached:
            self._report(f"metric.target={target} is reached")
            self._shared.deadline = -math.inf  # no trial starts

    def _tell_people(self, number: int) -> None:
        """Report a line about a trial that has ended."""
        for trial in _ended(self.study, self._sweep, self._folder):
            if trial.number == number:
                self._report(line_of(trial, self._sweep))


def line_of(trial: Trial, sweep: Sweep) -> str:
    """`trial_00003  complete  val_acc 53.01  5 epochs  80 s  lr=0.0009 ...`."""
    shown = [f"{name}={short(trial.values.get(name))}" for name in sweep.varied()]
    return (
        f"{_name(trial.number)}  {trial.state:8}  {sweep.metric} {short(trial.value)}  "
        f"{trial.epochs} epochs  {trial.seconds:.0f} s  {' '.join(shown)}"
    )


def short(value: Any) -> str:
    """A value for people: numbers with six digits."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
