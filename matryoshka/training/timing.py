"""Times of training steps and evaluations on this machine, measured in a few seconds."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import islice

import torch

from matryoshka.data.augment import normalise
from matryoshka.data.loader import Batch
from matryoshka.devices import autocast, pick_precision
from matryoshka.models import ModelSpec, NestedModel, build
from matryoshka.nested import nested_cross_entropy

WARM_UP = 2  # steps that are not timed: memory is allocated, kernels are chosen
MOST_STEPS = 40


def random_batches(size: int, batch: int, classes: int, device: torch.device) -> Iterator[Batch]:
    """Endless batches of grey noise, to time a model without its data."""
    images = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, device=device)
    labels = torch.randint(0, classes, (batch,), device=device)
    index = torch.arange(batch, device=device)
    while True:
        yield Batch(images, labels, index)


def step_seconds(spec: ModelSpec, batches: Iterable[Batch], *, seconds: float) -> float:
    """Time of a training step with SGD: loading, forward and backward pass, update.

    The lower quartile of the steps of about `seconds`, at least one step: on a shared machine, some
    steps take many times as long. ValueError if there are too few batches.
    """
    model, optimizer = None, None
    times = []
    began = before = time.perf_counter()
    for number, batch in enumerate(islice(batches, MOST_STEPS + WARM_UP)):
        device = batch.images.device
        if model is None or optimizer is None:
            model = _placed(spec, device).train()
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
        with autocast(device, pick_precision("auto", device)):
            logits = model(normalise(batch.images))
        loss, _ = nested_cross_entropy(logits.float(), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        _wait(device)

        now = time.perf_counter()
        if number >= WARM_UP:
            times.append(now - before)
        before = now
        if times and now - began > seconds:
            break
    if not times:
        raise ValueError(f"fewer than {WARM_UP + 1} batches to time")
    return sorted(times)[len(times) // 4]


def evaluation_seconds(spec: ModelSpec, batches: Iterable[Batch], *, seconds: float) -> float:
    """Time of evaluating one image: the fastest of the batches, without the first."""
    model = None
    best = float("inf")
    began = time.perf_counter()
    with torch.inference_mode():
        for number, batch in enumerate(batches):
            before = time.perf_counter()
            device = batch.images.device
            if model is None:
                model = _placed(spec, device).eval()
            with autocast(device, pick_precision("auto", device)):
                model(normalise(batch.images))
            _wait(device)
            now = time.perf_counter()
            if number:
                best = min(best, (now - before) / len(batch.images))
                if now - began > seconds:
                    break
    return best


def _placed(spec: ModelSpec, device: torch.device) -> NestedModel:
    return build(spec).to(device).to(memory_format=torch.channels_last)


def _wait(device: torch.device) -> None:
    """Until the device has finished: its kernels run asynchronously."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
