"""Progress bars for long tasks with data: downloads, writing."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


class Bars:
    """A bar on standard error for each task, one after the other; nothing if it is not a terminal.

    with Bars() as bars:
        named_dataset("cifar10", "train", progress=bars)
    """

    def __init__(self) -> None:
        self._task = ""
        self._bar: Any = None

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, task: str, done: int, total: int) -> None:
        """Show that `done` of `total` images are written, or bytes downloaded."""
        if task != self._task:
            self.__exit__()
            is_download = task.startswith("download ")
            unit = "B" if is_download else " images"
            # disable=None: no bar if stderr is not a terminal.
            self._bar = tqdm(
                total=total,
                desc=task,
                unit=unit,
                unit_scale=is_download,
                disable=None,
                file=sys.stderr,
            )
            self._task = task
        self._bar.update(done - self._bar.n)
