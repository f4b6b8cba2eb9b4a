"""The run folder: one JSON line per event, TensorBoard, and what produced the run."""

from __future__ import annotations

import datetime
import json
import os
import platform
import secrets
import subprocess
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import torch

from matryoshka.data.loader import available_cores


class RunExists(ValueError):
    """The run folder is there already: nothing of an earlier run is touched."""

    user_error = True

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path}: this run exists; choose another --logging.run_id or another --logging.folder")


def new_run_id(name: str) -> str:
    """A folder name that sorts by time: 20260131-142501-resnet18-mrl-3fa2."""
    return f"{datetime.datetime.now():%Y%m%d-%H%M%S}-{name}-{secrets.token_hex(2)}"


class RunLog:
    """`<folder>/<run_id>/` with params.json (flat, upstream's format), config.yaml, env.json, log, tensorboard/.

    RunExists when the folder is there already.
    """

    def __init__(self, folder: str | Path, run_id: str, params: Mapping, config_yaml: str) -> None:
        from torch.utils.tensorboard import SummaryWriter  # 2 s to import: only where a run starts

        self.path = Path(folder) / run_id
        try:
            self.path.mkdir(parents=True)
        except FileExistsError:
            raise RunExists(self.path) from None
        self._start = time.time()
        (self.path / "params.json").write_text(json.dumps(dict(params), indent=1) + "\n")
        (self.path / "config.yaml").write_text(config_yaml)
        (self.path / "env.json").write_text(json.dumps(environment(), indent=1) + "\n")
        self._log = open(self.path / "log", "a", buffering=1)  # noqa: SIM115 (lives as long as the run)
        self._board = SummaryWriter(str(self.path / "tensorboard"))

    def event(self, values: Mapping) -> None:
        """Append one JSON line: upstream's `timestamp` and `relative_time` first, then `values` in their order."""
        now = time.time()
        line = {"timestamp": now, "relative_time": now - self._start, **values}
        self._log.write(json.dumps(line) + "\n")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """TensorBoard scalars at an optimizer step."""
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._log.close()
        self._board.close()


def accuracy_keys(prefixes: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """Upstream's log keys, as fractions: top_1, top_5 of one prefix; top_1_8 .. top_1_2048, top_5_8 .. of several."""
    keys = {}
    for ours, theirs in (("top1", "top_1"), ("top5", "top_5")):
        for dim, accuracy in prefixes.items():
            keys[theirs if len(prefixes) == 1 else f"{theirs}_{dim}"] = accuracy[ours] / 100
    return keys


def environment() -> dict:
    """Versions, code state and hardware."""
    names = ("matryoshka", "torch", "torchvision", "torchmetrics", "numpy", "pillow", "safetensors")
    versions = {name: _version(name) for name in names}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "versions": versions,
        "git": git_state(),
        "hardware": {"cpu": _cpu_name(), "cores": available_cores(), "gpus": gpus},
        "platform": platform.platform(),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def git_state() -> dict | None:
    """{"commit": .., "dirty": bool} of the source tree; None where it is not a checkout."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        status = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit.stdout.strip(), "dirty": bool(status.stdout.strip())}


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
