"""Multiply-adds of a model for one image, for every prefix or width, and PFLOP of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
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
    counts = {}
    trunk = None
    with _as_for_inference(model):
        for dim in model.dims if dims is None else dims:
            if trunk is None or not model.one_pass:
                trunk = _products(lambda dim=dim: model.features_of(image, dim))
            counts[dim] = trunk + dim * model.spec.num_classes
    return counts


def module_multiply_adds(module: nn.Module, image_size: int) -> int:
    """Multiply-adds of one image's pass through any module that takes images [B, 3, H, W].

    Counted and restored as in `multiply_adds`.
    """
    image = next(module.parameters()).new_zeros(1, 3, image_size, image_size)
    with _as_for_inference(module):
        return _products(lambda: module(image))


def pflop(macs_trained: int, macs_target: int, images: int) -> float:
    """PFLOP (10^15) of training on `images` images, each view counting as one.

    macs_trained: multiply-adds of one image in everything that is trained. They count 3 times, for
    the forward pass and for the gradients by inputs and by weights (Kaplan et al., arXiv
    2001.08361, section 2.1). macs_target: of what runs forward only, such as a target encoder. A
    multiply-add is 2 FLOP.
    """
    return 2 * (3 * macs_trained + macs_target) * images / 1e15


@contextmanager
def _as_for_inference(module: nn.Module) -> Iterator[None]:
    """Eval mode without trained parameters inside the block; restored after it."""
    modes = [(part, part.training) for part in module.modules()]
    # The counter refuses a parameter that requires a gradient as the input of a module.
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    module.eval().requires_grad_(False)
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
        for parameter in trained:
            parameter.requires_grad_(True)


def _products(run: Callable[[], object]) -> int:
    """Multiply-adds of what `run` computes."""
    # Imports sympy: half a second, which a mistyped option must not wait for.
    from torch.utils.flop_counter import FlopCounterMode

    # The plain attention: fused kernels are counted only in some versions of torch.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2
