"""Options of a training run that fits into a time: resolution, backbone, batch, rate, epochs.

    rate = measured images per second of REFERENCE at 64 px
    sizes = choose_model(facts, seconds=480, rate=rate)        # backbone and resolution
    run = choose_epochs(sizes, facts, seconds=480, costs=...)  # with measured times

Pure functions of measured numbers. The thresholds come from runs on Tiny-ImageNet, see
bench/NOTES.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from matryoshka.training.loaders import resolution_at
from matryoshka.training.options import ResolutionConfig

REFERENCE = "resnet18"
SMALLEST = "resnet10"
REFERENCE_SIZE = 64
# Time of a training step relative to REFERENCE at the same size (measured at 64 px on a CPU; by
# their multiplications it would be 0.49, 2.0 and 2.25).
COST = {"resnet10": 0.6, "resnet18": 1.0, "resnet34": 1.9, "resnet50": 3.0}
PRETRAINED_SIDE = 96  # shorter side in pixels below which ImageNet's weights are of little use
STRIDE = 32  # of the ResNets: resolutions are multiples of it
LARGEST = 224

# Epochs that a choice needs; with fewer, the next cheaper one is taken. On 15 classes of
# Tiny-ImageNet at 64 px, in equal times: ResNet-10 for 30 epochs 66.5 % top-1, ResNet-18 for 18
# 61.3 %; ResNet-10 for 60 71.9 %, ResNet-18 for 36 67.7 % (750 images, n = 1).
SCRATCH_EPOCHS = 30  # at more than REFERENCE_SIZE
SCRATCH_EPOCHS_SMALL = 8
PRETRAINED_EPOCHS = 4
LARGE_MODEL_EPOCHS = 80  # a larger backbone from scratch
MAX_EPOCHS = 300  # more bring nothing: the run is shorter than the time


@dataclass(frozen=True)
class Facts:
    """What the choices depend on.

    images: to train on. side: median shorter side in pixels. classes: number of classes. gpu: a GPU
    is used. pretrained: published weights are at hand.
    """

    images: int
    side: int
    classes: int
    gpu: bool = False
    pretrained: bool = False


@dataclass(frozen=True)
class Sizes:
    """Backbone, and image size at the end of training and in the evaluation."""

    arch: str
    resolution: int


@dataclass(frozen=True)
class Costs:
    """Measured seconds: of a training step at a resolution, of evaluating one image, and what every
    epoch costs besides.
    """

    step: Callable[[int], float]
    evaluated_image: float
    epoch: float


def choose_model(facts: Facts, *, seconds: float, rate: float, arch: str | None = None) -> Sizes:
    """The largest resolution and backbone for which the time is enough.

    seconds: for training. rate: images per second of REFERENCE, or of `arch`, at REFERENCE_SIZE.
    Images are never enlarged: the resolution is at most their shorter side. arch: the backbone, if
    it is not to be chosen.
    """
    sizes = resolutions(facts.side)
    if arch is not None:
        needed = PRETRAINED_EPOCHS if facts.pretrained else SCRATCH_EPOCHS
        for size in sizes:
            pixels = (size / REFERENCE_SIZE) ** 2 * _ramp_share(size)
            if seconds * rate / pixels / facts.images >= needed:
                return Sizes(arch, size)
        return Sizes(arch, sizes[-1])

    def epochs(arch: str, size: int) -> float:
        pixels = (size / REFERENCE_SIZE) ** 2 * _ramp_share(size)
        return seconds * rate / (COST[arch] * pixels) / facts.images

    if facts.pretrained:
        archs = ("resnet50", "resnet18") if facts.gpu else ("resnet18",)
        for name in archs:
            for size in sizes:
                if epochs(name, size) >= PRETRAINED_EPOCHS:
                    return Sizes(name, size)
        return Sizes(archs[-1], sizes[-1])

    chosen = sizes[-1]
    for size in sizes:
        needed = SCRATCH_EPOCHS if size > REFERENCE_SIZE else SCRATCH_EPOCHS_SMALL
        if epochs(SMALLEST, size) >= needed:
            chosen = size
            break
    for larger in ("resnet50", "resnet18"):
        if epochs(larger, chosen) >= LARGE_MODEL_EPOCHS:
            return Sizes(larger, chosen)
    return Sizes(SMALLEST, chosen)


def resolutions(side: int) -> list[int]:
    """Resolutions for images of this shorter side, the largest first."""
    if side < STRIDE:
        return [side]
    largest = min(LARGEST, side // STRIDE * STRIDE)
    return list(range(largest, STRIDE - 1, -STRIDE))


def batch_size(images: int, *, gpu: bool) -> int:
    """A power of two, 30 steps an epoch or more where the set allows it: 16 to 64, on GPUs to 512.

    Small batches learn faster per image where time is short.
    """
    largest = 512 if gpu else 64
    fitting = 1 << max(0, (max(1, images // 30)).bit_length() - 1)
    return min(largest, max(16, fitting), max(1, images))


def options(facts: Facts, sizes: Sizes, *, stored: int) -> dict[str, Any]:
    """Options of `matryoshka train` but for the epochs. stored: longest side of stored images."""
    batch = batch_size(facts.images, gpu=facts.gpu)
    # Per 256 images: 0.4 from scratch, 0.1 from published weights.
    rate = (0.1 if facts.pretrained else 0.4) * batch / 256
    # Larger images keep a margin, as in ImageNet's evaluation; small ones are shown whole.
    whole = facts.side < 1.1 * sizes.resolution or stored < 1.1 * sizes.resolution
    return {
        "model.arch": sizes.arch,
        "model.mrl": True,
        "training.batch_size": batch,
        "training.weight_decay": 1e-4 if facts.pretrained else 5e-4,
        "training.label_smoothing": 0.1,
        "lr.lr": round(rate, 4),
        "data.scale": (0.35, 1.0),
        "validation.resolution": sizes.resolution,
        "validation.crop_ratio": 1.0 if whole else 0.875,
        "validation.lr_tta": False,
        "validation.batch_size": min(512, 4 * batch),
    }


def ramp(resolution: int, epochs: int) -> dict[str, Any]:
    """Options of section `resolution` and the peak of the rate, for a number of epochs.

    Half the size in the first half of the run: most of the accuracy for half of the time
    (progressive resizing, as in FFCV's recipes).
    """
    low = lowest(resolution)
    start, end = round(0.25 * epochs), round(0.75 * epochs)
    if end <= start:
        low = resolution
    return {
        "resolution.min_res": low,
        "resolution.max_res": resolution,
        "resolution.start_ramp": start,
        "resolution.end_ramp": max(end, start + 1),
        "lr.lr_peak_epoch": min(max(1, round(0.2 * epochs)), max(0, epochs - 1)),
        "training.epochs": epochs,
    }


def run_seconds(
    resolution: int, epochs: int, *, steps: int, val_images: int, costs: Costs
) -> float:
    """Time of a run of this many epochs of `steps` steps."""
    chosen = ramp(resolution, epochs)
    schedule = ResolutionConfig(
        min_res=chosen["resolution.min_res"],
        max_res=chosen["resolution.max_res"],
        start_ramp=chosen["resolution.start_ramp"],
        end_ramp=chosen["resolution.end_ramp"],
    )
    sizes = Counter(resolution_at(epoch, schedule) for epoch in range(epochs))
    training = sum(count * steps * costs.step(size) for size, count in sizes.items())
    return training + epochs * (costs.epoch + val_images * costs.evaluated_image)


def choose_epochs(
    resolution: int, *, seconds: float, steps: int, val_images: int, costs: Costs
) -> int:
    """The largest number of epochs that fits, from 1 to MAX_EPOCHS."""
    fitting = 1
    for epochs in range(2, MAX_EPOCHS + 1):
        time = run_seconds(resolution, epochs, steps=steps, val_images=val_images, costs=costs)
        if time > seconds:
            break
        fitting = epochs
    return fitting


def lowest(resolution: int) -> int:
    """Resolution at the start of a run that ends with `resolution`."""
    return max(min(STRIDE, resolution), resolution // 2 // STRIDE * STRIDE)


def _ramp_share(resolution: int) -> float:
    """Mean number of pixels over a run with a ramp, relative to the full resolution."""
    return (1 + (lowest(resolution) / resolution) ** 2) / 2


def flags(chosen: Mapping[str, Any]) -> list[str]:
    """Options as words of a command line."""
    words = []
    for key, value in chosen.items():
        text = value
        if isinstance(value, bool):
            text = int(value)
        elif isinstance(value, tuple | list):
            text = ",".join(map(str, value))
        words.append(f"--{key}={text}")
    return words
