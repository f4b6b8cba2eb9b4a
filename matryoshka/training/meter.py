"""Speed, data wait, gradient norms and progress bar of one training epoch."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

from matryoshka.data.loader import Batch, Loader
from matryoshka.training.guard import StepReport
from matryoshka.training.session import Session


class EpochMeter:
    """Iterates over the batches that are left of an epoch and measures it.

        with EpochMeter(loader, session, log_level=1, print0=print) as meter:
            for batch in meter:
                ...
                meter.update(session.after_step(loss, norm, skipped), lr)
        meter.metrics(images)

    A terminal shows a progress bar. log_level 2 writes every step to TensorBoard and, without a
    terminal, prints a line for it.
    """

    def __init__(
        self, loader: Loader, session: Session, *, log_level: int, print0: Callable[[str], None]
    ) -> None:
        self._loader = loader
        self._session = session
        self._log_steps = log_level > 1
        self._print0 = print0
        self._norms: list[float] = []
        self._wait_before = loader.wait
        self._started = time.perf_counter()
        self._seconds = 0.0
        loop = session.loop
        # A resumed epoch starts where it stopped: the bar counts from there.
        self._bar = tqdm(
            loader,
            desc=f"epoch {loop.epoch}",
            total=len(loader),
            initial=loop.step - loop.epoch * len(loader),
            leave=False,
            disable=session.log is None or not sys.stderr.isatty(),
            unit="step",
        )

    def __enter__(self) -> EpochMeter:
        return self

    def __exit__(self, *_) -> None:
        self._seconds = time.perf_counter() - self._started
        self._bar.close()

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._bar)

    def update(self, reports: list[StepReport], lr: float) -> None:
        """Record and show the reports that arrived with the last step."""
        # Reports arrive up to two steps late (NonFiniteGuard.lag): none in some steps, several at
        # the end.
        self._norms += [report.norm for report in reports]
        log = self._session.log
        if log is None:
            return
        wait = self._waited() / (time.perf_counter() - self._started)
        for report in reports:
            if not self._bar.disable and report.step % 10 == 0:
                self._bar.set_postfix(
                    loss=f"{report.loss:.3f}",
                    lr=f"{lr:.3g}",
                    wait=f"{100 * wait:.0f}%",
                    refresh=False,
                )
            if not self._log_steps:
                continue
            scalars = {
                "step/loss": report.loss,
                "step/lr": lr,
                "step/gradient_norm": report.norm,
                "step/data_wait": wait,
            }
            log.write_scalars(scalars, report.step)
            if self._bar.disable:
                self._print0(
                    f"step {report.step}  loss {report.loss:.3f}  lr {lr:.3g}  "
                    f"norm {report.norm:.3g}  wait {100 * wait:.0f} %"
                )

    def metrics(self, images: float) -> dict[str, float]:
        """Measurements of the finished epoch, in which all ranks have trained on `images` images.

        gradient_norm: median over steps. data_wait: share of the time spent waiting for data.
        """
        return {
            "gradient_norm": statistics.median(self._norms or [0.0]),
            "images_per_s": images / self._seconds,
            "data_wait": self._waited() / self._seconds,
        }

    def _waited(self) -> float:
        return self._loader.wait - self._wait_before
