"""Validation of a loader's state, a dict of JSON values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from matryoshka.data.dataset import Dataset
from matryoshka.data.fingerprint import Content


class StateError(ValueError):
    """A state of another dataset or other options; the message names every difference."""

    user_error = True


def content_state(content: Content) -> dict[str, Any]:
    """The entries of a state that tell its images from others."""
    return {"dataset": content.sampled, "dataset_whole": content.whole}


def expected_content(state: Any, dataset: Dataset, content: Content) -> tuple[dict[str, Any], str]:
    """The entries that `state` must have if it is of the images of `dataset`, whose fingerprint is
    `content`; and a note about what cannot be compared, or "".
    """
    before = state.get("dataset") if isinstance(state, Mapping) else None
    if isinstance(before, str) and re.fullmatch("[0-9a-f]{8}", before):
        note = (
            f"{dataset.path}: the run began with an older version, which noted only the sizes or "
            "names of the images; whether they are the same otherwise cannot be told"
        )
        return {"dataset": f"{dataset.fingerprint():08x}"}, note
    expected: dict[str, Any] = {"dataset": content.sampled}
    note = ""
    if isinstance(state, Mapping) and state.get("dataset_whole") is not None:
        if content.whole is not None:
            expected["dataset_whole"] = content.whole
        else:
            note = (
                f"{dataset.path}: the checksum of its side file does not count (the file is newer, "
                "or the side file is not its own): a sample of the images was compared, not all"
            )
    return expected, note


def check_state(
    state: Any, expected: Mapping[str, Any], num_batches: int, path: Any
) -> tuple[int, int]:
    """Return (epoch, batch) of a state. StateError if its other values are not `expected`, or if
    these two are not a position in an epoch of `num_batches`.
    """
    if not isinstance(state, Mapping):
        raise StateError(f"{path}: the loader's state is a {type(state).__name__}, not a dict")
    missing = [key for key in ("epoch", "batch", *expected) if key not in state]
    if missing:
        raise StateError(f"{path}: the loader's state lacks {', '.join(missing)}")
    differences = [
        f"{key} was {state[key]!r} and is {value!r}"
        for key, value in expected.items()
        if state[key] != value
    ]
    if differences:
        others = ""
        if any(key.startswith("dataset") and state[key] != expected[key] for key in expected):
            others = " (other images than those that the run was trained on)"
        raise StateError(f"{path}: the state is of another run: {'; '.join(differences)}{others}")
    epoch = state["epoch"]
    batch = state["batch"]
    # `type(...) is int`, because JSON's true is an instance of int as well.
    are_integers = type(epoch) is int and type(batch) is int
    if not are_integers or epoch < 0 or not 0 <= batch <= num_batches:
        raise StateError(
            f"{path}: the state has epoch {epoch!r} and batch {batch!r}; expected epoch "
            f"0 or more and batch 0 to {num_batches}"
        )
    return epoch, batch
