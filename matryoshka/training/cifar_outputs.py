"""Outputs under the names of vision-transformers-cifar10 and matryoshka-vit-compression.

    checkpoint/{net}-{dataset}-{patch}-ckpt.t7     link to the newest run's best checkpoint
    checkpoint/nested_models/{net}_{dataset}_patch{patch}_dim{dim}.pth     one file for each dim
    log/log_{net}_{dataset}_patch{patch}.txt, .csv     links to the newest run's

The files themselves are in the run folder, so that runs with equal names do not overwrite each
other. A name of theirs that is a file and not a link is someone else's: it is left alone.
"""

from __future__ import annotations

import csv
import io
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from matryoshka import checkpoint
from matryoshka.checkpoint.contents import CheckpointError
from matryoshka.checkpoint.model_file import EXPORTS
from matryoshka.checkpoint.run_files import FINAL
from matryoshka.config import ConfigError
from matryoshka.evaluation.evaluate import Evaluation
from matryoshka.files import read_regular, write_atomically
from matryoshka.models import FAMILIES, NestedModel
from matryoshka.training.cifar_options import as_name
from matryoshka.training.run_folder import draw_chart
from matryoshka.training.session import Session
from matryoshka.training.supervised import SupervisedRun

DEFAULT_PATCH = 4  # in the names of nets without patches, too
RESULTS = "results.json"


class OutputNames:
    """The names that both repositories use, for the options of a run."""

    def __init__(self, cfg: SimpleNamespace) -> None:
        net = as_name(cfg.cifar.net or cfg.model.arch)
        dataset = as_name(cfg.cifar.dataset)
        patch = cfg.cifar.patch or DEFAULT_PATCH
        self.checkpoint = Path("checkpoint") / f"{net}-{dataset}-{patch}-ckpt.t7"
        self.log = Path("log") / f"log_{net}_{dataset}_patch{patch}"
        self.nested = Path("checkpoint/nested_models") / f"{net}_{dataset}_patch{patch}"


def newest_run(cfg: SimpleNamespace) -> Path:
    """The run folder that the link checkpoint/...t7 names. ConfigError without such a link."""
    link = OutputNames(cfg).checkpoint
    target = Path(os.path.realpath(link))
    run = target.parent.parent  # <run>/checkpoints/best.safetensors
    if not link.is_symlink() or not run.is_dir():
        raise ConfigError(
            f"--resume: {link} is no run of this net, data set and patch; start one without "
            "--resume, or give --training.resume=RUN_FOLDER"
        )
    return run


class CifarOutputs:
    """Writes the outputs of a run, on rank 0."""

    def __init__(self, run: SupervisedRun) -> None:
        self._run = run
        self._names = OutputNames(run.cfg)
        self._wanted = run.cfg.cifar.seed_outputs and _links_work(run)
        # Of the averaged weights where there are any: they choose the best epoch.
        self._accuracy = "ema_top_1" if run.ema is not None else "top_1"
        self._started = time.monotonic()

    def start(self, session: Session) -> None:
        """Link the checkpoint of the run's start: `--resume` finds a run that is stopped early."""
        session.snapshots.wait()
        if self._wanted:
            self._link_checkpoint()

    def write_epoch(self, session: Session, metrics: Mapping[str, float]) -> None:
        """Write the epoch that `session.log_epoch` has logged, before `epoch_done` counts it."""
        widest = self._run.dims[-1]
        seconds = time.monotonic() - self._started
        self._started = time.monotonic()
        accuracy = metrics.get(f"{self._accuracy}/{widest}")
        loss = metrics.get("val_loss")
        assert session.log is not None
        board = {
            "Loss/Train": metrics["loss"],
            "Loss/Validation": loss,
            "Accuracy/Validation": accuracy,
            "Learning_Rate": metrics["lr"],
            "Epoch_Time": seconds,
        }
        keys = {
            "train_loss": metrics["loss"],
            "val_loss": loss,
            "val_acc": accuracy,
            "lr": metrics["lr"],
            "epoch_time": seconds,
        }
        epoch = session.loop.epoch
        session.log.write_board(_known(board), epoch)
        session.log.send(_known(keys), "epoch", epoch)
        if self._wanted:
            self._write_logs()
            self._link_checkpoint()

    def _write_logs(self) -> None:
        """log.txt and log.csv of the run folder, from its `log`: also right after a resume."""
        folder = self._run.start.path
        widest = self._run.dims[-1]
        key = self._accuracy if len(self._run.dims) == 1 else f"{self._accuracy}_{widest}"
        lines, losses, accuracies = [], [], []
        for line in read_regular(folder / "log").decode().splitlines():
            values = json.loads(line)
            if key not in values:
                continue  # not evaluated
            losses.append(values["val_loss"])
            accuracies.append(100 * values[key])
            lines.append(
                f"{time.ctime(values['timestamp'])} Epoch {values['epoch']}, "
                f"lr: {values['current_lr']:.7f}, val loss: {losses[-1]:.5f}, "
                f"acc: {accuracies[-1]:.5f}\n"
            )
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows([losses, accuracies])
        write_atomically(folder / "log.txt", "".join(lines).encode())
        write_atomically(folder / "log.csv", table.getvalue().encode())
        for suffix in ("txt", "csv"):
            _link(
                self._names.log.with_name(f"{self._names.log.name}.{suffix}"),
                folder / f"log.{suffix}",
            )

    def _link_checkpoint(self) -> None:
        checkpoints = self._run.start.path / "checkpoints"
        best = checkpoints / "best.safetensors"
        _link(self._names.checkpoint, best if best.exists() else checkpoints / "last.safetensors")

    def write_final(
        self,
        session: Session,
        model: NestedModel,
        results: Mapping[str, Evaluation],
        chosen_on: str | None,
    ) -> list[str]:
        """Write exports, results.json and the final model; return lines for the user.

        results: of the model, on `validation` and `test`. chosen_on: which of them chose the epoch.
        """
        run = self._run
        folder = run.start.path
        session.snapshots.wait()
        lines = []
        if len(run.dims) > 1:
            lines += self._export(model)
        if self._wanted:
            self._link_checkpoint()
        values = {}
        for name, result in results.items():
            top1 = {dim: row["top1"] for dim, row in result.accuracy.items()}
            chose = name == chosen_on
            values[name] = {"top_1": top1, "loss": result.loss, "chose_the_epoch": chose}
        write_atomically(folder / RESULTS, (json.dumps(values, indent=1) + "\n").encode())
        checkpoint.save_upstream(model, folder / "final_weights.pt")
        # Last, because this file marks the run as finished.
        checkpoint.save_model(model, folder / FINAL, run.options)
        draw_chart(folder, run.print0)
        return [*lines, f"model    {folder / FINAL}"]

    def _export(self, model: NestedModel) -> list[str]:
        """A model file for each dim, and for families the .pth of matryoshka-vit-compression."""
        folder = self._run.start.path / "nested_models"
        stem = self._names.nested.name
        links = f"; links in {self._names.nested.parent}" if self._wanted else ""
        lines = [f"exports  {folder}: a model for each dim{links}"]
        formats = EXPORTS if model.spec.arch in FAMILIES else EXPORTS[:1]
        try:
            files = checkpoint.export_dims(model, folder, stem, formats)
        except CheckpointError as error:  # options that the other repository does not have
            lines.append(f"note     no .pth files: {error}")
            files = checkpoint.export_dims(model, folder, stem, EXPORTS[:1])
        if self._wanted:
            # Links of an earlier run with other dims would mix two runs in one table.
            for old in self._names.nested.parent.glob(f"{stem}_dim*"):
                if old.is_symlink():
                    old.unlink(missing_ok=True)  # another run may end at the same time
            for file in files:
                _link(self._names.nested.parent / file.name, file)
        return lines


def _known(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}


def _links_work(run: SupervisedRun) -> bool:
    """Whether this folder takes the links; a note if it does not, on FAT for example."""
    try:
        for folder in (Path("checkpoint"), Path("log")):
            folder.mkdir(exist_ok=True)
        _link(Path("log") / f".try-{run.start.path.name}", run.start.path)
        (Path("log") / f".try-{run.start.path.name}").unlink()
    except OSError as error:
        run.print0(
            f"note     no links in checkpoint/ and log/: {error.strerror or error}; all outputs "
            f"are in {run.start.path}"
        )
        return False
    return True


def _link(name: Path, target: Path) -> None:
    """Let `name` be a link to `target`, unless something else has this name."""
    if name.exists() and not name.is_symlink():
        return
    name.parent.mkdir(parents=True, exist_ok=True)
    temporary = name.with_name(f".{name.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    place = target.resolve().parent / target.name  # the link of the run's best, not its target
    temporary.symlink_to(os.path.relpath(place, name.parent.resolve()))
    os.replace(temporary, name)
