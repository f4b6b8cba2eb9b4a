"""Multiply-adds of a model for one image, for every prefix or width."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from matryoshka.models.model import NestedModel


def multiply_adds(
    model: NestedModel, image_size: int, dims: Sequence[int] | None = None
) -> dict[int, int]:
    """{dim: multiply-adds of one image's logits at that dim alone}, of the dims of the model.

    Counts matrix products and convolutions, as torch's FlopCounterMode does, at half of its FLOPs;
    normalisation, activations and additions are left out. Prefixes of one trunk cost the same up to
    their classifiers; the widths of a family (`model.one_pass` is False) cost what each of them
    runs. image_size: pixels of the side. dims: some of the model's dims, all by default.

    Runs the model on one black image, without gradients, on its own device; the mode of every
    module and what is trained are restored.
    """
    image = next(model.parameters()).new_zeros(1, 3, image_size, image_size)
    modes = [(module, module.training) for module in model.modules()]
    # The counter refuses a parameter that requires a gradient as the input of a module.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)
    counts = {}
    trunk = None
    try:
        for dim in model.dims if dims is None else dims:
            if trunk is None or not model.one_pass:
                trunk = _products(model, image, dim)
            counts[dim] = trunk + dim * model.spec.num_classes
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter in trained:
            parameter.requires_grad_(True)
    return counts


def _products(model: NestedModel, image: torch.Tensor, dim: int) -> int:
    """Multiply-adds of the features of width `dim`."""
    # Imports sympy: half a second, which a mistyped option must not wait for.
    from torch.utils.flop_counter import FlopCounterMode

    # The plain attention: fused kernels are counted only in some versions of torch.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.features_of(image, dim)
    return counter.get_total_flops() // 2
