"""The contents of a model file, independent of its format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from matryoshka.data.augment import Preprocessing
from matryoshka.models import ModelSpec

FORMAT = "matryoshka-model-1"
TRAINING_FORMAT = "matryoshka-training-1"


class CheckpointError(ValueError):
    """A file that is not the requested checkpoint; the message names the file and the remedy."""

    user_error = True


class Contents(NamedTuple):
    """Everything needed to rebuild a model."""

    spec: ModelSpec
    preprocessing: Preprocessing
    classes: list[str] | None
    notes: list[str]  # assumptions made while reading, for the user to check
    state: dict[str, Tensor]  # weights under NestedModel's names


def preprocessing_of(metadata: Mapping) -> Preprocessing:
    """The Preprocessing that `describe` stored. JSON has turned its tuples into lists."""
    stored = metadata["preprocessing"]
    return Preprocessing(**{**stored, "mean": tuple(stored["mean"]), "std": tuple(stored["std"])})


def first_line(error: Exception) -> str:
    """The informative line of an exception's message.

    torch's load_state_dict starts with a line that only names the class; the second one has the
    key.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[min(1, len(lines) - 1)] if lines else type(error).__name__
