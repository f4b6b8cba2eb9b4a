"""Where a loader is, as a few plain values that JSON can hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class StateError(ValueError):
    """A loader's state that does not fit; the message names every difference."""

    user_error = True


def check_state(
    state: Any, expected: Mapping[str, Any], num_batches: int, path: Any
) -> tuple[int, int]:
    """(epoch, batch) of a state whose other values are as `expected`. StateError naming what is
    not.
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
    epoch, batch = state["epoch"], state["batch"]
    if (
        type(epoch) is not int
        or type(batch) is not int
        or epoch < 0
        or not 0 <= batch <= num_batches
    ):
        raise StateError(
            f"{path}: the state says epoch {epoch!r}, batch {batch!r}; an epoch has "
            f"{num_batches} batches"
        )
    return epoch, batch
