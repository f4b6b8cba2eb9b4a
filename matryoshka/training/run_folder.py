"""Run folder: JSON lines, TensorBoard and Weights & Biases logs, options and environment."""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from matryoshka import json_files
from matryoshka.environment import environment
from matryoshka.files import AppendedFile, open_append, read_regular, write_atomically
from matryoshka.training.run_lock import is_unused


class RunExists(ValueError):
    """The run folder exists; nothing of the earlier run is changed."""

    user_error = True

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"{path}: this run exists; resume it (--training.resume=auto), or choose another "
            "--logging.run_id or --logging.folder"
        )


class WandbError(ValueError):
    """Weights & Biases is not available; the message names the remedy."""

    user_error = True


def new_run_id(name: str) -> str:
    """Return a folder name that sorts by time: 20260131-142501-resnet18-mrl-3fa2."""
    return f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{name}-{secrets.token_hex(2)}"


class RunLog:
    """A run folder: params.json, config.yaml, env.json, log, events.jsonl, skipped.jsonl,
    tensorboard/.

    params: flat options, written in upstream's format. resumed_at: (step, epoch) of the checkpoint
    that the run resumes from, which drops later lines; None starts a new run and removes the files
    of a run that was killed before its first checkpoint. launch: name shared by the restarts of one
    torchrun. wandb: project of Weights & Biases that receives the same numbers; the run has the
    folder's name there and remains one run when it is resumed. Raises WandbError, before anything
    is written, if Weights & Biases is not available. tensorboard: whether to write for it.
    """

    def __init__(
        self,
        path: Path,
        params: Mapping,
        config_yaml: str,
        *,
        resumed_at: tuple[int, int] | None = None,
        launch: str | None = None,
        wandb: str | None = None,
        tensorboard: bool = True,
    ) -> None:
        self.path = path
        resumed = resumed_at is not None
        # First of all: if it fails, nothing of the folder has changed.
        self._wandb = None if wandb is None else _start_wandb(wandb, path, params, resumed=resumed)
        self._wandb_names: set[str] = set()

        path.mkdir(parents=True, exist_ok=True)
        env = environment() | {"launch": launch}
        write_atomically(path / "params.json", json_files.encode(params))
        write_atomically(path / "config.yaml", config_yaml.encode())
        write_atomically(path / "env.json", (json.dumps(env, indent=1) + "\n").encode())

        if resumed_at is None:
            for name in ("log", "events.jsonl", "skipped.jsonl"):
                (path / name).unlink(missing_ok=True)
            shutil.rmtree(path / "tensorboard", ignore_errors=True)
        self._files: dict[str, AppendedFile] = {}
        self.truncate(0 if resumed_at is None else resumed_at[1])
        # TensorBoard hides the scalars of the steps that are trained again.
        purge_step = None if resumed_at is None else resumed_at[0] + 1
        self._board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # 2 s: only where a run starts

            self._board = SummaryWriter(str(path / "tensorboard"), purge_step=purge_step)
        self._start = time.monotonic()

    def lines(self) -> list[dict[str, Any]]:
        """The epochs' lines of `log` so far."""
        path = self.path / "log"
        if not path.exists():
            return []
        return [json.loads(line) for line in read_regular(path).decode().splitlines()]

    def truncate(self, epoch: int) -> None:
        """Drop the lines of log and skipped.jsonl from `epoch` on, and unfinished lines."""
        for file in self._files.values():
            file.close()
        self._files.clear()
        for name in ("log", "skipped.jsonl", "events.jsonl"):
            path = self.path / name
            if not path.exists():
                continue
            # An epoch that is trained again would otherwise have two lines.
            kept = []
            for line in read_regular(path).splitlines(keepends=True):
                of_epoch = _epoch_of(line)
                if of_epoch is not None and (name == "events.jsonl" or of_epoch < epoch):
                    kept.append(line)
            write_atomically(path, b"".join(kept))

    def _append(self, name: str, values: Mapping) -> None:
        if name not in self._files:
            # Not buffered: a kill loses at most the line that is being written.
            self._files[name] = open_append(self.path / name)
        self._files[name].write(json.dumps(values) + "\n")

    def write_line(self, values: Mapping) -> None:
        """Append a line to `log`: upstream's `timestamp` and `relative_time`, then `values`."""
        # Two clocks: that of the day may be set while a run is training.
        times = {"timestamp": time.time(), "relative_time": time.monotonic() - self._start}
        self._append("log", {**times, **values})
        if "epoch" in values:
            by_epoch = {f"epoch/{name}": v for name, v in values.items() if name != "epoch"}
            self.send(by_epoch, "epoch", values["epoch"])

    def write_event(self, values: Mapping) -> None:
        """Append a line to events.jsonl: starts, stops, skipped steps, rollbacks."""
        self._append("events.jsonl", {"timestamp": time.time(), **values})

    def write_skipped(self, values: Mapping) -> None:
        """Append a line to skipped.jsonl: an image that was left out."""
        self._append("skipped.jsonl", values)

    def write_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write TensorBoard scalars at an optimizer step."""
        self.write_board(values, step)
        self.send(values, "step", step)

    def write_board(self, values: Mapping[str, float], step: int) -> None:
        """Write scalars to TensorBoard alone."""
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def send(self, values: Mapping[str, float], axis: str, at: int) -> None:
        """Log to Weights & Biases alone, over our own axis.

        Its own step counter never decreases: it would drop everything that follows a rollback.
        """
        if self._wandb is None:
            return
        with self._wandb_may_fail():
            # Every new metric needs its axis once, before its first value.
            for name in values.keys() - self._wandb_names:
                self._wandb.define_metric(name, step_metric=axis)
                self._wandb_names.add(name)
            self._wandb.log({**values, axis: at})

    @contextlib.contextmanager
    def _wandb_may_fail(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # its process or server failed: training is worth more
            self._wandb = None
            text = f"logging to Weights & Biases has stopped: {error!r}"
            self.write_event({"event": "problem", "text": text})

    def close(self) -> None:
        if self._wandb is not None:
            with self._wandb_may_fail():
                self._wandb.finish()
        for file in self._files.values():
            file.close()
        if self._board is not None:
            self._board.close()


def _epoch_of(line: bytes) -> int | None:
    """The epoch of a line, -1 if it has none; None for a line that is damaged, or that a killed
    process has not finished.
    """
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or not line.endswith(b"\n"):
        return None
    epoch = values.get("epoch", -1)
    return epoch if isinstance(epoch, int) else None


def _start_wandb(project: str, path: Path, params: Mapping, *, resumed: bool) -> Any:
    """Start or resume a run of Weights & Biases.

    Its id is kept in the run folder, so that another folder of the same name is another run.
    """
    try:
        import wandb
    except ImportError:
        raise WandbError(
            f"logging.wandb={project}: wandb is not installed; `pip install wandb`"
        ) from None

    is_new = is_unused(path)
    path.mkdir(parents=True, exist_ok=True)
    id_file = path / "wandb_id"
    # A new run in a folder of the same name must not continue the earlier run of wandb.
    if not (resumed and id_file.exists()):
        name = re.sub("[^A-Za-z0-9_-]", "-", path.name)[:64]  # the characters that wandb allows
        write_atomically(id_file, f"{name}-{secrets.token_hex(4)}\n".encode())
    try:
        return wandb.init(
            project=project,
            id=read_regular(id_file).decode().strip(),
            resume="allow",
            dir=str(path),
            config=dict(params),
            name=path.name,
        )
    except wandb.Error as error:
        if is_new:  # leave no trace: the next start must not find a run here
            shutil.rmtree(path, ignore_errors=True)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WandbError(
            f"logging.wandb={project}: {reason.rstrip('.')}; or set WANDB_MODE=offline"
        ) from None


# ---------------------------------------------------------------- names of the metrics


def accuracy_metrics(
    accuracy: Mapping[int, Mapping[str, float]], prefix: str = ""
) -> dict[str, float]:
    """{dim: {top1, top5}} in percent as metrics: top_1/8, ..., top_5/8, ... in percent.

    prefix: goes before every name, such as "ema_".
    """
    metrics = {}
    for key, name in (("top1", "top_1"), ("top5", "top_5")):
        for dim, values in accuracy.items():
            metrics[f"{prefix}{name}/{dim}"] = values[key]
    return metrics


def log_line(metrics: Mapping[str, float], epoch: int) -> dict[str, float]:
    """An epoch's line of `log` under upstream's keys, accuracies as fractions.

    One prefix has the keys top_1 and top_5, several have top_1_8, ..., top_5_8, ...
    """
    line: dict[str, float] = {"current_lr": metrics["lr"]}
    if "val_time" in metrics:
        line["val_time"] = metrics["val_time"]

    several = sum(name.startswith("top_1/") for name in metrics) > 1
    for name, percent in metrics.items():
        kind, _, dim = name.partition("/")
        if kind.removeprefix("ema_") in ("top_1", "top_5"):
            line[f"{kind}_{dim}" if several else kind] = percent / 100

    line |= {"train_loss": metrics["loss"], "epoch": epoch}
    ours = ("images_per_s", "data_wait", "val_loss")  # upstream does not have these
    line |= {name: metrics[name] for name in ours if name in metrics}
    if "pflop" in metrics:  # training without labels
        line |= {name: value for name, value in metrics.items() if _is_unlabelled(name)}
    return line


# Metrics of training without labels; those with a prefix are named like knn20/64.
UNLABELLED = (
    "loss",
    "knn20",
    "knn200",
    "knn20_top5",
    "map10",
    "probe",
    "probe_train",
    "std",
    "alignment",
    "uniformity",
    "rank",
)
UNLABELLED_SCALARS = ("knn20_mean", "pflop", "momentum", "temperature")


def _is_unlabelled(name: str) -> bool:
    kind, _, prefix = name.partition("/")
    return name in UNLABELLED_SCALARS or (bool(prefix) and kind in UNLABELLED)


def epoch_scalars(metrics: Mapping[str, float]) -> dict[str, float]:
    """An epoch's scalars for TensorBoard: all metrics but top-5 and the time of the evaluation."""
    left_out = ("val_time", "top_5/", "ema_top_5/")
    return {name: value for name, value in metrics.items() if not name.startswith(left_out)}


def draw_chart(run: Path, print0: Callable[[str], None]) -> None:
    """Draw the run's chart. Failures become a note: the model is already saved."""
    from matryoshka.report import plot_run  # matplotlib: 1 s

    try:
        plot_run(run, run / "accuracy.png")
    except Exception as error:
        print0(f"note     no chart of this run: {error}")
