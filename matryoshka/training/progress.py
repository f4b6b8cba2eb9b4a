"""Progress of a run: remaining time, and a line every few seconds where no bar is shown."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")

# The work of a convolution grows with the square of the size, but small images keep a CPU less
# busy: a step at 64 px takes 2.5 times as long as one at 32 px (ResNet-10, batches of 64).
GROWTH = 1.5
LATEST = 50  # steps

LINE_SECONDS = 10.0  # without a terminal: largest time between two lines
ANNOUNCE_SECONDS = 5.0  # of timed steps, before the time of the whole run is estimated
LONG_HOURS = 1.0  # a CPU run longer than this is announced with a hint


def duration(seconds: float) -> str:
    """A time for people: `42 s`, `3 min 20 s`, `4 h 10 min`, `3 d 4 h`."""
    whole = max(0, round(seconds))
    units = [("d", 86400), ("h", 3600), ("min", 60), ("s", 1)]
    for position, (unit, size) in enumerate(units):
        if whole < size and unit != "s":
            continue
        text = f"{whole // size} {unit}"
        rest = whole % size
        if unit != "s":
            smaller, smaller_size = units[position + 1]
            if rest // smaller_size:
                text += f" {rest // smaller_size} {smaller}"
        return text
    raise AssertionError("unreachable: the last unit accepts every number")


class Forecast:
    """Remaining time of a run, from the steps and evaluations that were timed.

    resolutions: image size of every epoch, in pixels. steps: number of steps in an epoch. Each size
    has its own time per step, the median of its latest steps: the first ones are slow. The time of
    a size without a step is that of the nearest timed one, scaled by the power GROWTH of the sizes.
    timed: seconds of all steps that were timed.
    """

    def __init__(self, resolutions: Sequence[int], steps: int) -> None:
        self._resolutions = list(resolutions)
        self._steps = steps
        self._latest: dict[int, deque[float]] = {}  # size -> seconds of its latest steps
        self._evaluation = 0.0  # seconds of one evaluation, once it is known
        self.timed = 0.0

    def add_step(self, epoch: int, seconds: float) -> None:
        latest = self._latest.setdefault(self._resolutions[epoch], deque(maxlen=LATEST))
        latest.append(seconds)
        self.timed += seconds

    def add_evaluation(self, seconds: float) -> None:
        """Record the time of the evaluation after an epoch."""
        self._evaluation = seconds

    def seconds_per_step(self, resolution: int) -> float:
        """Time of one step at this size. ValueError before any step was timed."""
        if not self._latest:
            raise ValueError("no step was timed")
        nearest = min(self._latest, key=lambda size: abs(size - resolution))
        return statistics.median(self._latest[nearest]) * (resolution / nearest) ** GROWTH

    def remaining(self, step: int) -> float | None:
        """Seconds from global step `step` to the end; None before any step was timed."""
        if not self._latest:
            return None
        epoch, done = divmod(step, self._steps)
        total = 0.0
        for later in range(epoch, len(self._resolutions)):
            left = self._steps - done if later == epoch else self._steps
            total += left * self.seconds_per_step(self._resolutions[later]) + self._evaluation
        return total


class Progress:
    """Prints a run's lines, and a progress line when none was printed for LINE_SECONDS.

    print0: prints on rank 0, nothing elsewhere. hint: text for a run longer than LONG_HOURS, or "".
    """

    def __init__(
        self,
        forecast: Forecast,
        print0: Callable[[str], None],
        *,
        hint: str = "",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.forecast = forecast
        self._print0 = print0
        self._hint = hint
        self._clock = clock
        self._printed = clock()
        self._announced = False
        self._last: float | None = None  # end of the last step, to time the next one

    def print0(self, text: str) -> None:
        """Print a line now; the next progress line waits from here."""
        self._printed = self._clock()
        self._print0(text)

    def start_steps(self) -> None:
        """Steps follow: the time up to the end of the first one is not a step's."""
        self._last = None

    def step(self, epoch: int, step: int) -> None:
        """Time the step that ended; announce the time of the whole run as soon as it is known.

        epoch: that of the step. step: global number of steps that are done.
        """
        now = self._clock()
        if self._last is not None:
            self.forecast.add_step(epoch, now - self._last)
        self._last = now
        if not self._announced and self.forecast.timed >= ANNOUNCE_SECONDS:
            self.announce(step)

    def announce(self, step: int) -> None:
        """Print the remaining time, once; nothing before any step was timed, and after the last."""
        seconds = self.forecast.remaining(step)
        if self._announced or seconds is None or seconds < 0.5:  # which would read 0 s
            return
        self._announced = True
        hint = self._hint if seconds > 3600 * LONG_HOURS else ""
        self.print0(f"time     about {duration(seconds)} left{hint}")

    def is_due(self) -> bool:
        """Whether nothing was printed for LINE_SECONDS."""
        return self._clock() - self._printed >= LINE_SECONDS

    def eta(self, step: int) -> str:
        """`3 min 20 s left`, or `time left unknown` before any step was timed."""
        seconds = self.forecast.remaining(step)
        return "time left unknown" if seconds is None else f"{duration(seconds)} left"

    def batches(self, batches: Iterable[T], total: int, what: str) -> Iterator[T]:
        """Yield the batches; print a line every LINE_SECONDS. total: their number."""
        for done, batch in enumerate(batches):
            if done and self.is_due():  # 0 % is no news: the epoch before it was long
                self.print0(f"{what} {100 * done / max(1, total):.0f} %")
            yield batch
