"""Memory of decoded batches: compared with what is free, before any of it is allocated.

The system ends a process that uses more memory than there is, without a word.
"""

from __future__ import annotations

import math

from matryoshka.data.slots import Size, pixel_bytes
from matryoshka.environment import free_memory

_FLOATS = 4  # bytes of a number that a model takes, which was one byte of a pixel
# Of the free memory, for the sizes that a message proposes: the next start may find less.
_MARGIN = 0.9


class BatchMemoryError(ValueError):
    """Batches that do not fit into the free memory; the message says what would."""

    user_error = True


def check_batches(
    what: object,
    count: int,
    size: Size,
    *,
    batches: int,
    as_floats: bool,
    processes: int = 1,
) -> None:
    """BatchMemoryError unless `batches` decoded batches fit into the free memory.

    what: the dataset, for the message. count: images of a batch in this process. as_floats: with
    one batch as a model takes it, float32. processes: that do the same on this machine.
    """
    free = free_memory()
    times = batches + (_FLOATS if as_floats else 0)  # bytes in memory for one of the pixels
    needed = times * pixel_bytes(count, size)
    if free is None or needed <= free // processes:
        return
    free //= processes
    sides = (size,) if isinstance(size, int) else size
    shown = ", ".join(f"{side}x{side}" for side in dict.fromkeys(sides))
    views = "" if isinstance(size, int) else f" in {len(sides)} views"
    fitting = int(_MARGIN * free) // (times * pixel_bytes(1, size))
    remedies = [f"the batch size to {fitting}"] if fitting else []
    if isinstance(size, int):
        side = math.isqrt(int(_MARGIN * free) // (times * 3 * count))
        remedies += [f"the resolution to {side} pixels"] if side else []
    held = "a batch" if batches == 1 else f"{batches} batches"
    floats = ", one of them as floats, too," if as_floats else ""
    others = f" for each of {processes} processes" if processes > 1 else ""
    raise BatchMemoryError(
        f"{what}: memory for {held} of {count} images{views} of {shown} pixels{floats} is "
        f"{needed / 1e9:,.3g} GB, {free / 1e9:,.3g} GB are free{others}; lower "
        f"{' or '.join(remedies) or 'the resolution'}"
    )
