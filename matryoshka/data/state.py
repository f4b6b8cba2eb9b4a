"""Validation of a loader's state, a dict of JSON values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class StateError(ValueError):
    """A state of another dataset or other options; the message names every difference."""

    user_error = True


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
        raise StateError(f"{path}: the state is of another run: {'; '.join(differences)}")
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
