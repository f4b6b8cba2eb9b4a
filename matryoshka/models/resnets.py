"""ResNet trunks: torchvision's architectures, and a ResNet-10 for small images."""

from __future__ import annotations

from typing import Any

from torch import nn

from matryoshka.models.options import ModelError

# Every ResNet of torchvision; a test compares this list with torchvision's own.
RESNETS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)


def torchvision_resnet(
    name: str, weights: str | None = None, *, small_stem: bool = False, **options: Any
) -> tuple[nn.Module, int]:
    """(trunk, feature width) of a torchvision ResNet.

    `weights` names published weights, such as IMAGENET1K_V2; None initialises at random.
    small_stem: a 3x3 convolution without stride and no pooling in front, as for images of 32 px
    (SimCLR, arXiv 2002.05709, appendix B.9). `options` are keyword arguments of torchvision's
    builder.
    """
    if small_stem and weights is not None:
        raise ModelError(
            f"model.arch_options: small_stem replaces the first layer of {name}, whose published "
            "weights do not fit; leave one out"
        )
    # Importing torchvision takes 2 to 5 s: `--help` and option errors must not wait for it.
    import torchvision

    trunk = torchvision.models.get_model(name, **options)
    if weights is not None:
        published = torchvision.models.get_model_weights(name)[weights]
        # get_model(weights=...) would unpickle the file without weights_only
        trunk.load_state_dict(published.get_state_dict(check_hash=True, weights_only=True))
    if small_stem:
        _replace_stem(trunk)
    return _without_classifier(trunk)


def resnet10(weights: str | None = None, **options: Any) -> tuple[nn.Module, int]:
    """One basic block per stage (4.9 M parameters): for small images and machines without a GPU."""
    if weights is not None:
        raise ModelError(
            "model.init: no weights are published for resnet10; choose another model.arch"
        )
    from torchvision.models.resnet import BasicBlock, ResNet

    return _without_classifier(ResNet(BasicBlock, [1, 1, 1, 1], **options))


def _replace_stem(resnet: nn.Module) -> None:
    """A 3x3 convolution instead of 7x7 with stride 2, and no max pooling."""
    wide = resnet.get_submodule("conv1")
    assert isinstance(wide, nn.Conv2d)
    conv = nn.Conv2d(3, wide.out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")  # as torchvision
    resnet.add_module("conv1", conv)
    resnet.add_module("maxpool", nn.Identity())


def _without_classifier(resnet: nn.Module) -> tuple[nn.Module, int]:
    """Replace the final linear layer `fc` by the identity; return the trunk and its width."""
    classifier = resnet.get_submodule("fc")
    assert isinstance(classifier, nn.Linear)
    resnet.add_module("fc", nn.Identity())
    return resnet, classifier.in_features
