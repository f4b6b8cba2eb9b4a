"""What a self-supervised run leaves: the encoder, its numbers, and names of other repositories.

    <run>/model.safetensors, results.json
    <logging.relic_folder>/relic_model.pth, encoder.pth
    <logging.moco_folder>/best_model.pt, checkpoint_epoch_<e>.pt, final_model.pt

The .pth and .pt files hold tensors and numbers alone: torch.load(weights_only=True) reads them.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from matryoshka import checkpoint
from matryoshka.checkpoint.run_files import FINAL
from matryoshka.files import write_atomically
from matryoshka.models import NestedModel
from matryoshka.training.guard import StepReport
from matryoshka.training.run_folder import draw_chart
from matryoshka.training.session import Session
from matryoshka.training.ssl_run import BEST_METRIC, SslRun

RESULTS = "results.json"
# As in MoCo-Matryoshka: epochs between two checkpoint_epoch_<e>.pt, steps between losses.
MOCO_EVERY = 10
BATCH_EVERY = 10


class SslOutputs:
    """Writes the outputs of a run, on rank 0."""

    def __init__(self, run: SslRun) -> None:
        self._run = run
        logging = run.cfg.logging
        self._relic = None if logging.relic_folder is None else Path(logging.relic_folder)
        self._moco = None if logging.moco_folder is None else Path(logging.moco_folder)

    def write_epoch(self, session: Session, metrics: Mapping[str, float]) -> None:
        """Write what follows an epoch, before `epoch_done` counts it."""
        epoch = session.loop.epoch + 1
        if self._relic is not None:
            self._write_relic()
        if self._moco is None:
            return
        assert session.log is not None
        session.log.write_board(moco_tags(metrics, self._run.dims), epoch)
        value = metrics.get(BEST_METRIC)
        if value is not None and value > session.loop.best:
            self._write_moco("best_model.pt", epoch, value)
        if epoch % MOCO_EVERY == 0:
            self._write_moco(f"checkpoint_epoch_{epoch}.pt", epoch, session.loop.best)

    def write_steps(self, session: Session, reports: Sequence[StepReport]) -> None:
        """Write the losses of every tenth step under the names of MoCo-Matryoshka."""
        if self._moco is None:
            return
        assert session.log is not None
        for report in reports:
            if report.step % BATCH_EVERY == 0:
                tags = {"Loss/batch_total": report.loss}
                for dim, loss in zip(self._run.dims, report.prefix_losses, strict=True):
                    tags[f"Loss/batch_dim_{dim}"] = loss
                session.log.write_board(tags, report.step)

    def write_final(
        self, session: Session, model: NestedModel, metrics: Mapping[str, float]
    ) -> list[str]:
        """Write the results and the final model; return lines for the user."""
        run = self._run
        folder = run.start.path
        session.snapshots.wait()
        lines = []
        if self._relic is not None:
            self._write_relic()
            lines.append(f"weights  {self._relic}: relic_model.pth, encoder.pth")
        if self._moco is not None:
            self._write_moco("final_model.pt", run.cfg.training.epochs, session.loop.best)
            best = ", best_model.pt" if (self._moco / "best_model.pt").exists() else ""
            lines.append(f"weights  {self._moco}: final_model.pt{best}")
        values = results(metrics, run.dims, run.cfg.ssl.method)
        write_atomically(folder / RESULTS, (json.dumps(values, indent=1) + "\n").encode())
        checkpoint.save_upstream(model, folder / "final_weights.pt")
        # Last, because this file marks the run as finished.
        checkpoint.save_model(model, folder / FINAL, run.options)
        draw_chart(folder, run.print0)
        return [*lines, f"model    {folder / FINAL}"]

    def _write_relic(self) -> None:
        assert self._relic is not None
        method = self._run.learner.method
        _save(self._relic / "relic_model.pth", _on_cpu(method.state_dict()))
        _save(self._relic / "encoder.pth", _on_cpu(self._run.encoder.trunk.state_dict()))

    def _write_moco(self, name: str, epoch: int, best: float) -> None:
        assert self._moco is not None
        run = self._run
        method = run.learner.method
        contents: dict[str, Any] = {
            "epoch": epoch,
            "model_q": _on_cpu(method.online.encoder.state_dict()),
            "optimizer": _on_cpu(run.state.optimizer.state_dict()),
            "best_metric": best,
            "nesting_list": list(run.dims),
        }
        if method.target is not None:
            contents["model_k"] = _on_cpu(method.target.tower.encoder.state_dict())
        _save(self._moco / name, contents)


def results(metrics: Mapping[str, float], dims: Sequence[int], method: str) -> dict[str, Any]:
    """The content of results.json: the numbers of the last evaluation by name and prefix."""
    found: dict[str, Any] = {"method": method, "dims": list(dims)}
    if "pflop" in metrics:
        found["pflop"] = metrics["pflop"]
    knn: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        kind, _, dim = name.partition("/")
        if not dim:
            continue
        if kind in ("knn20", "knn200"):
            knn.setdefault(dim, {})[kind.removeprefix("knn")] = value
        elif kind in ("map10", "probe", "std", "alignment", "uniformity", "rank"):
            found.setdefault(kind, {})[dim] = value
    if knn:
        found["knn"] = knn
    return found


def moco_tags(metrics: Mapping[str, float], dims: Sequence[int]) -> dict[str, float]:
    """An epoch's scalars under the TensorBoard names of MoCo-Matryoshka."""
    tags = {"Loss/epoch_total": metrics["loss"], "LR/learning_rate": metrics["lr"]}
    for dim in dims:
        tags[f"Loss/epoch_dim_{dim}"] = metrics[f"loss/{dim}"]
    full = dims[-1]
    for name, tag in (
        ("knn20", "KNN/top1_acc"),
        ("knn20_top5", "KNN/top5_acc"),
        ("map10", "Retrieval/mAP"),
    ):
        if f"{name}/{full}" in metrics:
            tags[tag] = metrics[f"{name}/{full}"] / 100
    return tags


def _on_cpu(state: Any) -> Any:
    """A state_dict with its tensors on the CPU, for a file."""
    if isinstance(state, torch.Tensor):
        return state.detach().cpu().contiguous()
    if isinstance(state, Mapping):
        return {key: _on_cpu(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [_on_cpu(value) for value in state]
    return state


def _save(path: Path, contents: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(dict(contents), buffer)
    write_atomically(path, buffer.getvalue())
