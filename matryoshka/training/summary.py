"""Lines that a training program prints about a run and its epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace

from matryoshka.training.checks import requested_batch_size
from matryoshka.training.optim import peak_epoch

LEFT_OUT_SHARE = 0.1  # of the images: a note if full batches leave out more than this


def epoch_line(
    epoch: int,
    metrics: Mapping[str, float],
    dims: Sequence[int],
    trained_prefixes: int | None = None,
) -> str:
    """The line that is printed after an epoch. The loss is the mean over the prefixes.

    The loss that is minimised and logged is their sum (MRL, equation 1). trained_prefixes: how many
    a step trains; None: all.
    """
    top1 = "not evaluated"
    if f"top_1/{dims[-1]}" in metrics:
        top1 = "  ".join(f"{dim}: {metrics[f'top_1/{dim}']:.1f}" for dim in dims)
    if f"ema_top_1/{dims[-1]}" in metrics:
        top1 += f"  (average {metrics[f'ema_top_1/{dims[-1]}']:.1f})"
    loss = metrics["loss"] / (trained_prefixes or len(dims))
    return (
        f"epoch {epoch:3d}  loss {loss:.3f}  lr {metrics['lr']:.3g}  "
        f"{metrics['images_per_s']:.0f} images/s  wait {100 * metrics['data_wait']:.0f} %  "
        f"top-1 {top1}"
    )


def ssl_epoch_line(epoch: int, metrics: Mapping[str, float], dims: Sequence[int]) -> str:
    """The line after an epoch without labels. The loss is the mean over the prefixes."""
    shown = "not evaluated"
    for name, text in (("knn20", "kNN"), ("probe_train", "probe"), ("rank", "rank")):
        if f"{name}/{dims[-1]}" in metrics:
            values = "  ".join(f"{dim}: {metrics[f'{name}/{dim}']:.1f}" for dim in dims)
            shown = f"{text} {values}"
            break
    return (
        f"epoch {epoch:3d}  loss {metrics['loss'] / len(dims):.3f}  lr {metrics['lr']:.3g}  "
        f"{metrics['images_per_s']:.0f} images/s  wait {100 * metrics['data_wait']:.0f} %  {shown}"
    )


def accuracy_text(accuracy: Mapping[int, Mapping[str, float]]) -> str:
    return "top-1 " + "  ".join(f"{dim}: {row['top1']:.2f}" for dim, row in accuracy.items())


def schedule_notes(cfg: SimpleNamespace) -> list[str]:
    """Notes on a learning-rate peak that lies beyond the run and was moved into it."""
    name = "lr_peak_epoch" if cfg.lr.lr_schedule_type == "cyclic" else "warmup_epochs"
    requested = getattr(cfg.lr, name)
    actual = peak_epoch(cfg.lr, cfg.training.epochs)
    if actual == requested:
        return []
    epochs = cfg.training.epochs
    return [f"lr.{name}={requested} is beyond these {epochs} epochs: peak at {actual}"]


def size_text(resolutions: Sequence[int]) -> str:
    """`160 px`, or `160 to 224 px` for a ramp."""
    low, high = min(resolutions), max(resolutions)
    return f"{low} px" if low == high else f"{low} to {high} px"


def batch_notes(cfg: SimpleNamespace, processes: int, global_batch: int, images: int) -> list[str]:
    """Notes on a batch that was lowered, and on images that full batches leave out."""
    notes = []
    requested = requested_batch_size(cfg, processes)
    if requested > images:
        notes.append(
            f"batches of {requested} images are more than the {images} of the training set: "
            f"lowered to {global_batch}"
        )
    left_out = images % global_batch
    if left_out >= LEFT_OUT_SHARE * images:
        notes.append(
            f"each epoch leaves out {left_out} of {images} images, chosen anew: only full batches "
            f"of {global_batch} are trained on; see training.batch_size"
        )
    return notes
