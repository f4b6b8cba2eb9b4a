"""Files of a run folder that others than its own program look for."""

from __future__ import annotations

from pathlib import Path

FINAL = "model.safetensors"  # the model of a finished run
PARAMS = "params.json"  # its options


def run_of(path: str) -> Path | None:
    """The run folder that a model file lies in; None for a file without one."""
    real = Path(path).resolve()
    for folder in list(real.parents)[:2]:  # exports and checkpoints are in a folder of the run
        if (folder / PARAMS).is_file():
            return folder
    return None
