"""A GPU without enough memory for a step: one line that says what would fit."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator

import torch

GIB = 2**30


class OutOfMemory(ValueError):
    """A batch that does not fit into the GPU; the message names the option and what would fit."""

    user_error = True


@contextlib.contextmanager
def explained(
    device: torch.device,
    size: int,
    attempt: Callable[[int], None] | None,
    remedy: Callable[[int], str],
) -> Iterator[None]:
    """Raise OutOfMemory for the GPU's error in the block, with a batch size that was seen to fit.

    size: images of the forward pass in the block. attempt: does the pass with fewer images; None:
    none can be tried, and half is proposed. remedy: size -> the options that set it.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        # Its frames hold the tensors of the pass, which must be free before another attempt.
        traceback.clear_frames(error.__traceback__)
        failed = error.with_traceback(None)
    else:
        return
    del failed
    used = _usage(device)
    needs = f"training.batch_size={size}: a step needs more memory than the GPU has{used}"
    if attempt is None and size > 1:
        raise OutOfMemory(f"{needs}; {size // 2} images may fit: {remedy(size // 2)}")
    fits = None if attempt is None else largest_that_fits(device, size, attempt)
    if fits is None:
        raise OutOfMemory(
            f"{needs}; not even one image fits: give smaller images or a smaller model, or another "
            "GPU"
        )
    raise OutOfMemory(f"{needs}; {fits} images fit: {remedy(fits)}")


def largest_that_fits(
    device: torch.device, size: int, attempt: Callable[[int], None]
) -> int | None:
    """The largest of size / 2, size / 4, ... for which `attempt` has enough memory; None: none."""
    while size > 1:
        size //= 2
        if device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            attempt(size)
        except torch.OutOfMemoryError as error:
            traceback.clear_frames(error.__traceback__)
        else:
            return size
    return None


def _usage(device: torch.device) -> str:
    """Who uses the memory of the GPU."""
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    own = torch.cuda.memory_reserved(device)
    others = max(0, total - free - own)
    return (
        f" ({total / GIB:.1f} GiB, of which this process has {own / GIB:.1f} and all else "
        f"{others / GIB:.1f})"
    )
