"""What a model file says, whatever its format."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from matryoshka.data.augment import Preprocessing
from matryoshka.models import ModelSpec

FORMAT, TRAINING_FORMAT = "matryoshka-model-1", "matryoshka-training-1"


class CheckpointError(ValueError):
    """A file that is not the checkpoint that was asked for; the message names the file and the
    remedy.
    """

    user_error = True


class Contents(NamedTuple):
    """What a model file says: all that rebuilds the model. state: weights under our names."""

    spec: ModelSpec
    preprocessing: Preprocessing
    classes: list[str] | None
    notes: list[str]
    state: dict[str, Tensor]


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[min(1, len(lines) - 1)] if lines else type(error).__name__
