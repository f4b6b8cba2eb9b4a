"""The run folder: one JSON line per event, TensorBoard, Weights & Biases if wanted, and what
produced the run.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from matryoshka.environment import environment
from matryoshka.files import write_atomically


class RunExists(ValueError):
    """The run folder is there already: nothing of an earlier run is touched."""

    user_error = True

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"{path}: this run exists; go on with it (--training.resume=auto), or choose another "
            "--logging.run_id or "
            "--logging.folder"
        )


class WandbError(ValueError):
    """Weights & Biases cannot be used as it was asked for."""

    user_error = True


def new_run_id(name: str) -> str:
    """A folder name that sorts by time: 20260131-142501-resnet18-mrl-3fa2."""
    return f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{name}-{secrets.token_hex(2)}"


class RunLog:
    """A run folder: params.json (flat, upstream's format), config.yaml, env.json, log,
    events.jsonl, tensorboard/.

    going_on: (step, epoch) of the checkpoint that the run goes on from; later lines are dropped.
    None: a new run, which begins anew what was killed before its first checkpoint. wandb: project
    of Weights & Biases to log to as well; the run has its folder's name there, and stays one run
    there when it goes on. WandbError where that does not work; nothing is written then.
    """

    def __init__(
        self,
        path: Path,
        params: Mapping,
        config_yaml: str,
        going_on: tuple[int, int] | None = None,
        launch: str | None = None,
        wandb: str | None = None,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter  # 2 s to import: only where a run starts

        self.path = path
        self._wandb = (
            None if wandb is None else _start_wandb(wandb, path, params, going_on is not None)
        )
        self._wandb_names: set[str] = set()
        path.mkdir(parents=True, exist_ok=True)
        (path / "params.json").write_text(json.dumps(dict(params), indent=1) + "\n")
        (path / "config.yaml").write_text(config_yaml)
        (path / "env.json").write_text(
            json.dumps(environment() | {"launch": launch}, indent=1) + "\n"
        )
        if going_on is None:
            for name in ("log", "events.jsonl", "skipped.jsonl"):
                (path / name).unlink(missing_ok=True)
            shutil.rmtree(path / "tensorboard", ignore_errors=True)
        self._lines: dict[str, TextIO] = {}
        self.cut(0 if going_on is None else going_on[1])
        purge = None if going_on is None else going_on[0] + 1
        self._board = SummaryWriter(str(path / "tensorboard"), purge_step=purge)
        self._start = time.time()

    def cut(self, epoch: int) -> None:
        """Drop the lines of `log` and skipped.jsonl from this epoch on, and a line that was not
        finished.
        """
        for file in self._lines.values():
            file.close()
        self._lines.clear()
        for name in ("log", "skipped.jsonl", "events.jsonl"):
            path = self.path / name
            if not path.exists():
                continue
            kept = []
            for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
                try:
                    values = json.loads(line)
                except ValueError:
                    break
                if name == "events.jsonl" or values.get("epoch", -1) < epoch:
                    kept.append(line)
            write_atomically(path, "".join(kept).encode())

    def _append(self, name: str, values: Mapping) -> None:
        if name not in self._lines:
            self._lines[name] = open(self.path / name, "a", buffering=1, encoding="utf-8")  # noqa: SIM115 (until close)
        self._lines[name].write(json.dumps(values) + "\n")

    def note(self, values: Mapping) -> None:
        """Append to events.jsonl: starts, stops, skipped steps, rollbacks."""
        self._append("events.jsonl", {"timestamp": time.time(), **values})

    def skipped(self, values: Mapping) -> None:
        """Append to skipped.jsonl: an image that was left out."""
        self._append("skipped.jsonl", values)

    def event(self, values: Mapping) -> None:
        """Append one JSON line: upstream's `timestamp` and `relative_time` first, then `values` in
        their order.
        """
        now = time.time()
        self._append("log", {"timestamp": now, "relative_time": now - self._start, **values})
        if "epoch" in values:
            self._send(
                {f"epoch/{name}": v for name, v in values.items() if name != "epoch"},
                "epoch",
                values["epoch"],
            )

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """TensorBoard scalars at an optimizer step."""
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        self._send(values, "step", step)

    def _send(self, values: Mapping[str, float], axis: str, at: int) -> None:
        """To Weights & Biases, over an axis of ours: its own never goes back, what follows a
        rollback would be lost.
        """
        if self._wandb is None:
            return
        with self._wandb_may_fail():
            for name in values.keys() - self._wandb_names:
                self._wandb.define_metric(name, step_metric=axis)
                self._wandb_names.add(name)
            self._wandb.log({**values, axis: at})

    @contextlib.contextmanager
    def _wandb_may_fail(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of its own process, of its server: the training is worth more
            self._wandb = None
            self.note(
                {"event": "problem", "text": f"no more logging to Weights & Biases: {error!r}"}
            )

    def close(self) -> None:
        if self._wandb is not None:
            with self._wandb_may_fail():
                self._wandb.finish()
        for file in self._lines.values():
            file.close()
        self._board.close()


def _start_wandb(project: str, path: Path, params: Mapping, going_on: bool) -> Any:
    """A run of Weights & Biases. Its id is kept in the folder: another folder of the same name is
    another run.
    """
    try:
        import wandb
    except ImportError:
        raise WandbError(
            f"logging.wandb={project}: wandb is not installed; `pip install wandb`"
        ) from None
    new, kept = not path.exists() or not any(path.iterdir()), path / "wandb_id"
    path.mkdir(parents=True, exist_ok=True)
    if not (going_on and kept.exists()):
        write_atomically(
            kept,
            f"{re.sub('[^A-Za-z0-9_-]', '-', path.name)[:64]}-{secrets.token_hex(4)}\n".encode(),
        )
    try:
        return wandb.init(
            project=project,
            id=kept.read_text().strip(),
            resume="allow",
            dir=str(path),
            config=dict(params),
            name=path.name,
        )
    except wandb.Error as error:
        if new:
            shutil.rmtree(path, ignore_errors=True)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WandbError(
            f"logging.wandb={project}: {reason.rstrip('.')}; or set WANDB_MODE=offline"
        ) from None


def accuracy_keys(prefixes: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """Upstream's log keys, as fractions: top_1, top_5 of one prefix; top_1_8 .. top_1_2048, top_5_8
    .. of several.
    """
    keys = {}
    for ours, theirs in (("top1", "top_1"), ("top5", "top_5")):
        for dim, accuracy in prefixes.items():
            keys[theirs if len(prefixes) == 1 else f"{theirs}_{dim}"] = accuracy[ours] / 100
    return keys
