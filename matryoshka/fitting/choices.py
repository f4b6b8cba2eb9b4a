"""Options of a training that fits into a time, from times measured on this machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from matryoshka.checkpoint import load_model
from matryoshka.checkpoint.fetching import why_no_weights
from matryoshka.data import CenterCrop, Loader, RandomResizedCrop
from matryoshka.models import ModelConfig, model_spec
from matryoshka.training import recipe, timing
from matryoshka.training.progress import duration

# Seconds after training that do not depend on the photos: analyses, pictures, index, report. On a
# CPU that trains recipe.REFERENCE at REFERENCE_RATE images per second.
FIXED_SECONDS = 9.0
REFERENCE_RATE = 350.0
EPOCH_SECONDS = 0.15  # a checkpoint and the lines of an epoch, on the same CPU
EMBED_FACTOR = 2.0  # evaluating and embedding an image, over its forward pass alone
ATTEMPTS = 2  # to choose sizes
CHANGED = 1.5  # the machine is faster by this than when its speed was measured: choose again
TIMING_SHARE = 0.05  # of the time, to time steps with the photos
ROUND_SECONDS = 4.0  # one look at each of two resolutions
FEWEST_ROUNDS = 2
MOST_ROUNDS = 6
SAFETY = 0.92  # share of the time left for training that is planned


@dataclass(frozen=True)
class Stored:
    """The photos as they are stored.

    images: {"train": N, "val": N}, and "test" if there is one. side: median shorter side in
    pixels. longest: longest side of any stored image. files: {part: .beton}.
    """

    images: dict[str, int]
    side: int
    longest: int
    classes: int
    files: dict[str, str]


@dataclass(frozen=True)
class Choice:
    """Options of `matryoshka train`; where the weights start; seconds that training will take."""

    options: dict[str, Any]
    start: str
    expected: float
    warnings: list[str]


def choose(
    stored: Stored,
    given: Mapping[str, Any],
    *,
    device: torch.device,
    seconds_left: Callable[[], float],
    init: str | None,
    start: str,
) -> Choice:
    """Choose all options of the training that `given` leaves open.

    seconds_left: from now to the end of the whole run. init, start: of `start_weights`.
    """
    gpu = device.type == "cuda"
    facts = recipe.Facts(
        images=stored.images["train"],
        side=stored.side,
        classes=stored.classes,
        gpu=gpu,
        pretrained=init is not None,
    )

    # ---- backbone and resolution from the speed on noise, then steps with the photos ----
    arch = given.get("model.arch") or arch_of(init)
    reference = images_per_second(recipe.REFERENCE, facts, device)
    rate = reference
    if arch is not None and arch != recipe.REFERENCE:
        rate = images_per_second(arch, facts, device)
    for _ in range(ATTEMPTS):
        slowness = 1.0
        if not gpu:  # analyses and pictures take as long as the CPU is slow
            slowness = min(3.0, max(0.7, REFERENCE_RATE / reference))
        fixed = FIXED_SECONDS * slowness
        left = max(1.0, seconds_left() - fixed)
        sizes = recipe.choose_model(facts, seconds=left, rate=rate, arch=arch)
        if "resolution.max_res" in given:
            sizes = recipe.Sizes(sizes.arch, given["resolution.max_res"])
        chosen = options(facts, sizes, stored, given, init)
        costs = measure(
            stored,
            chosen,
            sizes,
            device,
            epoch=EPOCH_SECONDS * slowness,
            seconds=TIMING_SHARE * left,
        )
        # A shared machine may have been busy with others when the noise was timed.
        factor = speed_on_photos(chosen, sizes, costs, fixed_arch=arch is not None) / rate
        if factor <= CHANGED:
            break
        reference *= factor
        rate *= factor

    # ---- epochs ----
    batch = min(chosen["training.batch_size"], facts.images)
    steps = max(1, facts.images // batch)
    total = sum(stored.images.values())
    after = fixed + EMBED_FACTOR * costs.evaluated_image * total
    seconds = SAFETY * (seconds_left() - after)
    plan = {"steps": steps, "val_images": stored.images["val"], "costs": costs}
    epochs = given.get("training.epochs")
    if epochs is None:
        epochs = recipe.choose_epochs(sizes.resolution, seconds=seconds, **plan)
    expected = recipe.run_seconds(sizes.resolution, epochs, **plan)
    warnings = []
    if expected > 1.1 * max(0.0, seconds):
        warnings.append(
            f"too little time: {epochs} {'pass' if epochs == 1 else 'passes'} over the photos and "
            f"the evaluation take about {duration(expected + after)}; the run will be longer"
        )
    return Choice(recipe.ramp(sizes.resolution, epochs) | chosen, start, expected, warnings)


def options(
    facts: recipe.Facts,
    sizes: recipe.Sizes,
    stored: Stored,
    given: Mapping[str, Any],
    init: str | None,
) -> dict[str, Any]:
    """The options of the training but for the epochs; `given` overrides them."""
    chosen = recipe.options(facts, sizes, stored=stored.longest) | dict(given)
    if init is not None:
        chosen["model.init"] = init
    if given.get("model.fixed_feature") or given.get("model.efficient"):
        chosen["model.mrl"] = given.get("model.mrl", False)
    return chosen


def speed_on_photos(
    chosen: Mapping[str, Any], sizes: recipe.Sizes, costs: recipe.Costs, *, fixed_arch: bool
) -> float:
    """Images per second as `images_per_second` gives them, from the steps with the photos."""
    relative = 1.0 if fixed_arch else recipe.COST[sizes.arch]
    pixels = (sizes.resolution / recipe.REFERENCE_SIZE) ** 2
    return chosen["training.batch_size"] / costs.step(sizes.resolution) * relative * pixels


def start_weights(given: Mapping[str, Any], *, side: int, gpu: bool) -> tuple[str | None, str]:
    """(model.init or None, a text about it): published weights if they are at hand.

    side: median shorter side of the photos in pixels.
    """
    if given.get("model.init"):
        return given["model.init"], f"start weights: {given['model.init']}"
    arch = given.get("model.arch") or ("resnet50" if gpu else recipe.REFERENCE)
    if given.get("model.pretrained"):
        return (arch if arch.startswith("timm:") else f"torchvision:{arch}"), "published weights"
    if side < recipe.PRETRAINED_SIDE:
        return None, "from scratch: the photos are too small for published weights"
    reason = why_no_weights(arch)
    if reason:
        return None, f"from scratch: {reason}"
    return f"torchvision:{arch}", "start weights: ImageNet's, from torchvision"


def arch_of(init: str | None) -> str | None:
    """The architecture of start weights; None without them."""
    if init is None:
        return None
    if init.startswith("timm:"):
        return init.partition(".")[0]
    if init.startswith("torchvision:"):
        return init.removeprefix("torchvision:").partition(".")[0]
    return load_model(init).spec.arch


def images_per_second(arch: str, facts: recipe.Facts, device: torch.device) -> float:
    """Speed of training steps on noise, at recipe.REFERENCE_SIZE."""
    size = min(recipe.REFERENCE_SIZE, recipe.resolutions(facts.side)[0])
    batch = recipe.batch_size(facts.images, gpu=facts.gpu)
    spec = model_spec(ModelConfig(arch=arch, mrl=True), facts.classes)
    noise = timing.random_batches(size, batch, facts.classes, device)
    seconds = timing.step_seconds(spec, noise, seconds=2.0)
    return batch / seconds * (size / recipe.REFERENCE_SIZE) ** 2


def measure(
    stored: Stored,
    chosen: Mapping[str, Any],
    sizes: recipe.Sizes,
    device: torch.device,
    *,
    epoch: float,
    seconds: float,
) -> recipe.Costs:
    """Time training steps and an evaluation with the photos and the chosen options.

    epoch: what an epoch costs besides. seconds: for the timing of the steps, about.
    """
    dims = chosen.get("model.dims")
    config = ModelConfig(arch=sizes.arch, mrl=True, dims=tuple(dims) if dims else None)
    spec = model_spec(config, stored.classes)
    batch = min(chosen["training.batch_size"], stored.images["train"])
    train = Loader(stored.files["train"], batch, drop_last=True, device=device)
    resolutions = sorted({recipe.lowest(sizes.resolution), sizes.resolution})
    times = dict.fromkeys(resolutions, math.inf)
    # Several looks, of which the fastest counts: on a shared machine, others are busy for seconds
    # at a time.
    for _ in range(max(FEWEST_ROUNDS, min(MOST_ROUNDS, int(seconds / ROUND_SECONDS)))):
        for resolution in resolutions:
            train.crop = RandomResizedCrop(resolution, chosen["data.scale"])
            measured = timing.step_seconds(spec, _endless(train), seconds=2.0)
            times[resolution] = min(times[resolution], measured)

    def step(resolution: int) -> float:
        # The time of other sizes is proportional to the number of pixels.
        size = min(times, key=lambda measured: abs(measured - resolution))
        return times[size] * (resolution / size) ** 2

    batch = min(chosen["validation.batch_size"], max(1, stored.images["val"] // 2))
    crop = CenterCrop(sizes.resolution, chosen["validation.crop_ratio"])
    val = Loader(stored.files["val"], batch, order="sequential", crop=crop, device=device)
    return recipe.Costs(
        step=step,
        evaluated_image=timing.evaluation_seconds(spec, val, seconds=2.0),
        epoch=epoch,
    )


def _endless(loader: Loader) -> Iterator[Any]:
    while True:
        yield from loader
