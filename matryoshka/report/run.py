"""Run folders: options, model, and the metrics of every epoch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from matryoshka import json_files, tensor_files
from matryoshka.files import open_regular, read_regular


class RunError(ValueError):
    """A folder that is not a readable training run; the message names the file."""

    user_error = True


@dataclass(frozen=True)
class Run:
    """Contents of a run folder.

    params: flat options. head: mrl, mrl-e or ff<width>. dims: prefix lengths; empty if unknown
    from checkpoint, log and options. epochs: {epoch: its line of `log`}. events: events.jsonl.
    """

    path: Path
    params: dict[str, Any]
    arch: str
    head: str
    dims: tuple[int, ...]
    epochs: dict[int, dict[str, Any]]
    events: list[dict[str, Any]]

    def column(self, key: str, factor: float = 1.0) -> dict[int, float]:
        """{epoch: factor * value} of a key of `log`; epochs without a finite number are omitted."""
        values = {}
        for epoch, line in self.epochs.items():
            value = line.get(key)
            if isinstance(value, int | float) and isfinite(value):
                values[epoch] = factor * value
        return values

    def top1(self, of: str = "") -> dict[str, dict[int, float]]:
        """{prefix: {epoch: percent}}, shortest prefix first.

        of: `ema_` selects the metrics of the averaged weights.
        """
        names = [str(d) for d in self.dims] or ["feature"]
        curves = {}
        for name in names:
            # A model with a single prefix logs `top_1`, without the length.
            key = f"{of}top_1_{name}" if len(names) > 1 else f"{of}top_1"
            values = self.column(key, 100)
            if values:
                curves[name] = values
        return curves

    def neighbours(self) -> dict[str, dict[int, float]]:
        """As `top1`, of the vote of 20 nearest neighbours in a run without labels."""
        curves = {str(d): self.column(f"knn20/{d}") for d in self.dims}
        return {name: values for name, values in curves.items() if values}

    def best(self) -> tuple[int | None, dict[str, float]]:
        """The first epoch in which the longest prefix was most accurate, and every top-1 % then."""
        return best_of(self.top1())


def best_of(curves: Mapping[str, Mapping[int, float]]) -> tuple[int | None, dict[str, float]]:
    """The first epoch in which the last curve is highest, and the values of all then."""
    if not curves:
        return None, {}
    longest = list(curves.values())[-1]
    epoch = max(longest, key=lambda e: (longest[e], -e))
    return epoch, {name: values[epoch] for name, values in curves.items() if epoch in values}


def short_dims(dims: Sequence[int]) -> str:
    """Prefix lengths in short form.

    `8-2048` if each length doubles the previous one, `8,32,512` or `8,12..512` otherwise; empty
    for a single length.
    """
    if len(dims) < 2:
        return ""
    if all(b == 2 * a for a, b in pairwise(dims)):
        return f"{dims[0]}-{dims[-1]}"
    if len(dims) < 4:
        return ",".join(map(str, dims))
    return f"{dims[0]},{dims[1]}..{dims[-1]}"


def read_run(folder: str | Path) -> Run:
    """Read a run folder; the run may still be in progress.

    Skips lines torn by a kill and files that do not exist yet. Raises OSError without params.json,
    RunError if params.json does not belong to a training run.
    """
    folder = Path(folder)
    file = folder / "params.json"
    try:
        params, _ = json_files.decode(read_regular(file))
    except json_files.JsonFileError as error:
        raise RunError(f"{file}: damaged: {error}") from None
    if not isinstance(params, dict) or not isinstance(params.get("model.arch"), str):
        raise RunError(f"{file}: not the options of a training run: model.arch is missing")

    lines = {}
    for line in _read_json_lines(folder / "log"):
        if type(line.get("epoch")) is int:  # a bool is also an int
            lines[line["epoch"]] = line
    epochs = {epoch: lines[epoch] for epoch in sorted(lines)}

    # The checkpoint knows everything; a run that has none yet is described by its options.
    model = _model_of_checkpoint(folder) or _model_of_options(params, epochs)
    return Run(
        path=folder,
        params=params,
        arch=model.arch,
        head=model.head,
        dims=model.dims,
        epochs=epochs,
        events=_read_json_lines(folder / "events.jsonl"),
    )


def _read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, one per line; other lines are skipped."""
    if not path.exists():
        return []
    objects = []
    for line in read_regular(path).decode(errors="replace").split("\n"):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            objects.append(value)
    return objects


class _Model(NamedTuple):
    arch: str
    dims: tuple[int, ...]
    efficient: bool  # MRL-E
    nested: bool

    @property
    def head(self) -> str:
        if len(self.dims) == 1 or not self.nested:
            return f"ff{self.dims[0] if self.dims else ''}"
        return "mrl-e" if self.efficient else "mrl"


def _model_of_checkpoint(folder: Path) -> _Model | None:
    """The model that a checkpoint of the run describes; None without a readable checkpoint."""
    for name in ("model.safetensors", "checkpoints/last.safetensors"):
        try:
            with open_regular(folder / name) as file:
                metadata = tensor_files.read_header(file).metadata or {}
            spec = metadata["model"]
            return _Model(spec["arch"], tuple(spec["dims"]), spec["efficient"], nested=True)
        except (OSError, ValueError, LookupError, TypeError):
            continue
    return None


def _model_of_options(params: Mapping[str, Any], epochs: Mapping[int, Mapping[str, Any]]) -> _Model:
    """The model that the options describe; prefix lengths come from the log where it has them."""
    efficient = bool(params.get("model.efficient"))
    nested = efficient or bool(params.get("model.mrl"))

    # The prefixes that the run logs are certain; options may have left them to a default.
    logged = set()
    for line in epochs.values():
        for key in line:
            match = re.fullmatch(r"(?:top_1_|loss/)(\d+)", key)  # supervised, self-supervised
            if match:
                logged.add(int(match[1]))
    if logged:
        dims = tuple(sorted(logged))
    elif nested:
        declared = params.get("model.dims")
        dims = tuple(declared) if isinstance(declared, list) else ()
    else:
        width = params.get("model.fixed_feature")
        dims = (width,) if width else ()  # 0: the width of the trunk, which only a checkpoint has
    return _Model(params["model.arch"], dims, efficient, nested)
