"""What each dim costs where it is used alone: parameters, multiply-adds, bytes, latency."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from matryoshka.checkpoint import save_model
from matryoshka.evaluation.dim_models import DimModel
from matryoshka.export.latency import latencies
from matryoshka.models import NestedModel, extract, multiply_adds

BLOCKS = 5  # of the latency; a batch of 128 takes a wide transformer half a minute on one core


@dataclass(frozen=True)
class DimCost:
    """Cost of one dim. macs: multiply-adds of one image. bytes: of its file. seconds: {batch size:
    of a forward pass}.
    """

    parameters: int
    macs: int
    bytes: int
    seconds: dict[int, float]


def dim_costs(models: Sequence[DimModel], batches: Sequence[int] = ()) -> dict[int, DimCost]:
    """{dim: cost} of every dim of `models`, on their device.

    A dim of a nested model is measured as a model of its own (models.extract). batches: sizes of
    the batches whose latency is measured, all dims in turns.
    """
    alone: dict[int, NestedModel] = {}
    macs: dict[int, int] = {}
    files: dict[int, int] = {}
    for each in models:
        macs |= multiply_adds(each.model, each.model.preprocessing.size)
        for dim in each.model.dims:
            single = len(each.model.dims) == 1
            alone[dim] = each.model if single else extract(each.model, dim)
            is_file = single and Path(each.path).is_file()
            files[dim] = Path(each.path).stat().st_size if is_file else file_size(alone[dim])
    seconds: dict[int, dict[int, float]] = {dim: {} for dim in alone}
    for batch in batches:
        for dim, time in _forward_seconds(alone, batch).items():
            seconds[dim][batch] = time
    costs = {}
    for dim, model in alone.items():
        parameters = sum(p.numel() for p in model.parameters())
        costs[dim] = DimCost(parameters, macs[dim], files[dim], seconds[dim])
    return costs


def file_size(model: NestedModel) -> int:
    """Bytes of the model's .safetensors file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_model(model, path)
        return path.stat().st_size


def _forward_seconds(models: dict[int, NestedModel], batch: int) -> dict[int, float]:
    """Seconds of a forward pass of each model: the median of several blocks, in turns."""
    calls: dict[str, Callable[[], object]] = {}
    for dim, model in models.items():
        size = model.preprocessing.size
        device = next(model.parameters()).device
        images = torch.rand(batch, 3, size, size, device=device)
        calls[str(dim)] = partial(_forward, model.eval(), images)
    with torch.inference_mode():
        return {int(dim): seconds for dim, seconds in latencies(calls, BLOCKS).items()}


def _forward(model: NestedModel, images: Tensor) -> None:
    model(images)
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    elif images.is_mps:
        torch.mps.synchronize()
