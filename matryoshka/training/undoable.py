"""A step of an optimizer that is undone on the device, for those that cannot leave one out there.

torch's fused SGD, Adam and AdamW take a flag on the device and then change nothing. For others the
host would wait for the flag in every step, and the device would then wait for the host. Undoing
needs an optimizer that keeps nothing on the host: `make_optimizer` marks these with `undoable`.
timm's Adan counts its steps on the host: it waits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def undoable_step(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """optimizer.step(); with `skip` (bool, 0-d, on the device) everything is as it was before.

    Costs memory for a second copy of weights and state, and about ten launches.
    """
    before = _tensors(optimizer)
    kept = {kind: torch.cat(parts) for kind, parts in _by_type(before.values()).items()}
    optimizer.step()

    after = _tensors(optimizer)
    # State that this step has made begins as zeros, in all optimizers that we have.
    for place, tensor in after.items():
        if place not in before:
            tensor.copy_(torch.where(skip, torch.zeros_like(tensor), tensor))
    known = [tensor for place, tensor in after.items() if place in before]
    for kind, parts in _by_type(known).items():
        changed = torch.cat(parts)
        torch.where(skip, kept[kind], changed, out=changed)
        values = changed.split([len(part) for part in parts])
        torch._foreach_copy_(parts, values)  # pyright: ignore[reportPrivateImportUsage]


def _tensors(optimizer: torch.optim.Optimizer) -> dict[tuple[int, str], Tensor]:
    """Weights and state by (number of the parameter, name), in an order that a step keeps."""
    found: dict[tuple[int, str], Tensor] = {}
    parameters: list[Any] = [p for group in optimizer.param_groups for p in group["params"]]
    for number, parameter in enumerate(parameters):
        found[number, ""] = parameter
        for name, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                found[number, name] = value
    return found


def _by_type(tensors: Iterable[Tensor]) -> dict[torch.dtype, list[Tensor]]:
    """Tensors as flat views, by type."""
    found: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        found.setdefault(tensor.dtype, []).append(flat_view(tensor))
    return found


def flat_view(tensor: Tensor) -> Tensor:
    """A view [n] of a tensor without gaps, in the order of its memory: any layout of kernels."""
    tensor = tensor.detach()
    end = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    if end != tensor.numel():
        return tensor.view(-1)
    return tensor.as_strided((tensor.numel(),), (1,))
