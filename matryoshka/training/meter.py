"""Speed, data wait, gradient norms and progress bar of one training epoch."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator

import torch
from tqdm import tqdm

from matryoshka.data.loader import Batch, Loader
from matryoshka.training.guard import StepReport
from matryoshka.training.progress import Progress
from matryoshka.training.session import Session


class EpochMeter:
    """Iterates over the batches that are left of an epoch and measures it.

        with EpochMeter(loader, session, progress, log_level=1, device=device) as meter:
            for batch in meter:
                ...
                meter.update(session.after_step(loss, norm, skipped), lr)
        meter.metrics(images)

    A terminal shows a progress bar with the remaining time of the run; without one, `progress`
    prints a line every few seconds. log_level 2 writes every step to TensorBoard and, without a
    terminal, prints a line for it. device: of the steps. prefixes: number of prefixes, over whose
    losses a step's loss is a sum.
    """

    def __init__(
        self,
        loader: Loader,
        session: Session,
        progress: Progress,
        *,
        log_level: int,
        device: torch.device,
        prefixes: int = 1,
    ) -> None:
        self._loader = loader
        self._device = device
        self._session = session
        self._progress = progress
        self._log_steps = log_level > 1
        self._prefixes = prefixes
        self._trained = 0  # steps of this epoch, in this process
        self._norms: list[float] = []
        self._wait_before = loader.wait
        self._started = time.perf_counter()
        self._seconds = 0.0
        progress.start_steps()
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
        if self._device.type == "cuda":
            # The last steps are queued, not done: their time belongs to this epoch.
            torch.cuda.synchronize(self._device)
        self._seconds = time.perf_counter() - self._started
        self._bar.close()

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._bar)

    def update(self, reports: list[StepReport], lr: float) -> None:
        """Record and show the reports that arrived with the last step."""
        # Reports arrive up to two steps late (NonFiniteGuard.lag): none in some steps, several at
        # the end.
        self._norms += [report.norm for report in reports]
        step = self._session.loop.step
        self._trained += 1
        self._progress.step(self._session.loop.epoch, step)
        log = self._session.log
        if log is None:
            return
        wait = self._waited() / (time.perf_counter() - self._started)
        for report in reports:
            loss = report.loss / self._prefixes
            if not self._bar.disable and report.step % 10 == 0:
                self._bar.set_postfix_str(
                    f"loss {loss:.3f}, lr {lr:.3g}, wait {100 * wait:.0f}%, "
                    f"run: {self._progress.eta(step)}",
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
                self._progress.print0(
                    f"step {report.step}  loss {loss:.3f}  lr {lr:.3g}  "
                    f"norm {report.norm:.3g}  wait {100 * wait:.0f} %"
                )
        if reports and self._bar.disable and self._progress.is_due():
            self._progress.print0(self._line(reports[-1], step))

    def _line(self, report: StepReport, step: int) -> str:
        """The line of a run in progress, without a terminal."""
        epoch = self._session.loop.epoch
        in_epoch = step - epoch * len(self._loader)
        speed = self._trained * self._loader.batch_size / (time.perf_counter() - self._started)
        return (
            f"epoch {epoch:3d}  step {in_epoch}/{len(self._loader)}  "
            f"loss {report.loss / self._prefixes:.3f}  {speed:.0f} images/s  "
            f"{self._progress.eta(step)}"
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
