"""Multiply-adds against counts by hand: a formula for ViTs, loops over the layers of other nets."""

from dataclasses import asdict

import pytest
import torch
from torch import nn

from matryoshka.models import (
    BACKBONES,
    FAMILIES,
    ModelSpec,
    build,
    module_multiply_adds,
    multiply_adds,
    pflop,
)
from matryoshka.models.vqvae import EncoderSizes

SIZES = {"mobilevit": 64, "vit_timm": 384}  # pixels; all others take 32
OPTIONS = {"vitfixedposvqvae": {"vqvae": asdict(EncoderSizes())}}
LARGE = ("resnet101", "resnet152", "resnext", "wide_")  # more of the same layers
SMALL = ["resnet10", "resnet18"]


def vit_by_hand(dim, *, image, patch, depth, heads, classes):
    """Products of a ViT whose heads and MLP have the width `dim`, layer by layer.

    The last block computes only the CLS token, which attends to all tokens.
    """
    patches = (image // patch) ** 2
    tokens = patches + 1
    total = patches * 3 * patch * patch * dim
    for layer in range(depth):
        queries = 1 if layer == depth - 1 else tokens
        inner = heads * dim
        total += queries * dim * inner  # queries
        total += 2 * tokens * dim * inner  # keys, values
        total += 2 * heads * queries * tokens * dim  # scores, weighted sum
        total += queries * inner * dim  # output of the heads
        total += 2 * queries * dim * dim  # MLP
    return total + dim * classes


@pytest.mark.parametrize("arch", FAMILIES)
@pytest.mark.parametrize(("patch", "depth", "heads"), [(4, 6, 8), (2, 2, 3), (8, 1, 1)])
def test_every_width_of_a_family_against_the_formula(arch, patch, depth, heads):
    options = {"image_size": 16, "patch": patch, "depth": depth, "heads": heads}
    model = build(ModelSpec(arch, 7, (4, 8, 20), arch_options=options))
    expected = {
        dim: vit_by_hand(dim, image=16, patch=patch, depth=depth, heads=heads, classes=7)
        for dim in (4, 8, 20)
    }
    assert multiply_adds(model, 16) == expected
    assert multiply_adds(model, 16, [8]) == {8: expected[8]}


def layers_by_hand(model, size):
    """Multiply-adds of convolutions and linear layers, from the sizes that pass through them."""
    total = 0

    def convolution(layer, _, output):
        nonlocal total
        taps = layer.kernel_size[0] * layer.kernel_size[1] * layer.in_channels // layer.groups
        total += output.numel() * taps

    def linear(layer, _, output):
        nonlocal total
        total += output.numel() * layer.in_features

    hooks = []
    for module in model.trunk.modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(convolution))
        elif isinstance(module, nn.Linear):
            hooks.append(module.register_forward_hook(linear))
    with torch.no_grad():
        model.features(torch.zeros(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    return total


@pytest.mark.parametrize("arch", SMALL)
def test_convolutional_nets_against_their_layers(arch):
    model = build(ModelSpec(arch, 6, (8, 16))).train()
    found = multiply_adds(model, 64)
    assert model.training, "the mode is not restored"
    assert all(parameter.requires_grad for parameter in model.parameters())
    expected = layers_by_hand(model.eval(), 64)
    assert found == {8: expected + 8 * 6, 16: expected + 16 * 6}


OTHERS = sorted(name for name in BACKBONES if name not in SMALL and not name.startswith(LARGE))


@pytest.mark.parametrize("arch", OTHERS)
def test_no_net_hides_its_layers(arch):
    """A fused operation that the counter does not know would make a net look free."""
    size = SIZES.get(arch, 32)
    with torch.device("meta"):
        model = build(ModelSpec(arch, 6, (8,), arch_options=OPTIONS.get(arch, {}))).eval()
        found = multiply_adds(model, size)[8]
        assert found >= layers_by_hand(model, size) + 8 * 6 > 8 * 6


def test_published_figures():
    """torchvision's documentation: 4.09 and 1.81 GFLOPS at 224 pixels, one per multiply-add."""
    for arch, expected in (("resnet50", 4.09), ("resnet18", 1.81)):
        with torch.device("meta"):
            counts = multiply_adds(build(ModelSpec(arch, 1000, (8, 512))).eval(), 224)
        assert counts[512] / 1e9 == pytest.approx(expected, abs=0.01)


def test_any_module_of_images():
    """A convolution of 8 x 8 places, 3 x 3 x 3 taps, 5 channels; then 5 -> 7 numbers."""
    encoder = nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1, bias=False),
        nn.BatchNorm2d(5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 7),
    )
    encoder[0].requires_grad_(False)
    assert module_multiply_adds(encoder, 8) == 8 * 8 * 27 * 5 + 5 * 7
    assert encoder[1].training, "the mode is not restored"
    assert [p.requires_grad for p in encoder.parameters()] == [False, True, True, True, True]
    assert int(encoder[1].num_batches_tracked) == 0


def test_pflop_of_a_step_is_what_the_counter_sees():
    """Forward and backward pass of the trained net, forward alone of the target."""
    from torch.utils.flop_counter import FlopCounterMode

    online, target = (nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 4)) for _ in range(2))
    x = torch.randn(10, 6, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        embeddings = online(x)
        with torch.no_grad():
            wanted = target(x)
        (embeddings - wanted).square().sum().backward()
    macs = 6 * 9 + 9 * 4
    assert pflop(macs, macs, images=10) == pytest.approx(counter.get_total_flops() / 1e15)
    assert pflop(macs, 0, images=10) == pytest.approx(0.75 * counter.get_total_flops() / 1e15)
