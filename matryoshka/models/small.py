"""Convolutional nets for small images: ResNets with a 3x3 stem, and VGG-19.

The blocks are torchvision's; the layers for 224-px images (7x7 stem of stride 2 and max pool, fully
connected layers of VGG) are left out, as usual on CIFAR (He et al. 2016, arXiv 1512.03385, 4.2).
"""

from __future__ import annotations

from torch import nn

from matryoshka.models.options import ModelError
from matryoshka.models.resnets import torchvision_resnet
from matryoshka.models.sizes import check_counts, check_least, refuse_weights

RESNETS_32 = {"res18": "resnet18", "res34": "resnet34", "res50": "resnet50", "res101": "resnet101"}


def small_resnet(
    net: str,
    weights: str | None = None,
    *,
    image_size: int = 32,
    zero_init_residual: bool = False,
) -> tuple[nn.Module, int]:
    """(trunk, width) of a ResNet whose stem keeps the resolution: any image of 8 pixels or more.

    Its convolutions see a 32-px image at 32, 16, 8 and 4 pixels.
    """
    refuse_weights(net, weights)
    check_counts(net, image_size=image_size)
    check_least(net, 8, "has three strides of 2", image_size=image_size)
    if not isinstance(zero_init_residual, bool):
        raise ModelError(
            f"model.arch_options: {net}: zero_init_residual={zero_init_residual}: expected true or "
            "false"
        )
    trunk, width = torchvision_resnet(RESNETS_32[net], zero_init_residual=zero_init_residual)
    stem = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")  # as the others
    trunk.add_module("conv1", stem)
    trunk.add_module("maxpool", nn.Identity())
    return trunk, width


def vgg(weights: str | None = None, *, image_size: int = 32) -> tuple[nn.Module, int]:
    """(trunk, 512) of VGG-19 with batch norm (Simonyan and Zisserman 2015, arXiv 1409.1556).

    Sixteen 3x3 convolutions and five max pools, then the mean of what is left of the image.
    """
    refuse_weights("vgg", weights)
    check_counts("vgg", image_size=image_size)
    check_least("vgg", 32, "has five max pools of 2", image_size=image_size)
    from torchvision.models.vgg import cfgs, make_layers

    trunk = nn.Sequential(
        make_layers(cfgs["E"], batch_norm=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    for module in trunk.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    return trunk, 512
