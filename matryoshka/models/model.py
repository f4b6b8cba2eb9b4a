"""Backbones with a nested head: `build(ModelSpec)` -> NestedModel.

Adding a backbone: a function `(weights: str | None) -> (trunk, width)` and its name in BACKBONES.
The trunk maps images [B, 3, H, W] to features [B, D]. `timm:NAME` is any model of timm that does
so.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from matryoshka.data import CenterCrop, read_images
from matryoshka.data.augment import Preprocessing, normalise
from matryoshka.models.blurpool import apply_blurpool
from matryoshka.models.options import ModelConfig, ModelError, ModelSpec
from matryoshka.nested import NestedLinear, check_dims, default_dims


class NestedModel(nn.Module):
    """trunk: images [B, 3, H, W] (normalised float) -> features [B, D]; head: features -> logits
    [G, B, C].
    """

    def __init__(self, trunk: nn.Module, head: NestedLinear, width: int, spec: ModelSpec) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head
        self.width = width
        self.spec = spec
        self.preprocessing = Preprocessing()
        self.classes: list[str] | None = None
        self.notes: list[str] = []  # what a loader of a bare state_dict had to assume
        self.frozen: tuple[
            str, ...
        ] = ()  # modules that stay in eval mode, see transfer.apply_freeze

    def check_classes(self, dataset) -> None:
        """ModelError unless the labels of `dataset` (path, classes, num_classes) mean this model's
        outputs.
        """
        count = self.spec.num_classes
        if dataset.num_classes > count or (dataset.classes and dataset.num_classes != count):
            raise ModelError(
                f"{dataset.path}: has {dataset.num_classes} classes, the model {count}; "
                "evaluate it on the classes that it was trained on"
            )
        if dataset.classes and self.classes and dataset.classes != self.classes:
            raise ModelError(
                f"{dataset.path}: its class names are not those that the model was trained on"
            )

    @property
    def dims(self) -> tuple[int, ...]:
        return self.head.dims

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for name in (
            self.frozen
        ):  # names, not modules: a copy, or a conversion to SyncBatchNorm, has its own
            self.get_submodule(name).eval()
        return self

    def features(self, images: Tensor) -> Tensor:
        return self.trunk(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.trunk(images))

    @torch.no_grad()
    def encode(
        self, images: Tensor, truncate_dim: int | None = None, normalize: bool = False
    ) -> Tensor:
        """Embeddings, float32 [B, d]: the first `truncate_dim` numbers of the features, None for
        all of them.

        images: uint8 [B, H, W, 3] as a Loader gives them, which get the model's normalisation here,
        or float [B, 3, H, W], normalised already; of the size that `preprocessing` says, on any
        device. normalize: to length 1, after truncation (a zero vector stays one). Computed in eval
        mode, without gradients; every module is then in its mode again. ModelError for a dimension
        that the model does not have, and for images of another shape.
        """
        if truncate_dim is not None and not 1 <= truncate_dim <= self.width:
            raise ModelError(
                f"truncate_dim={truncate_dim}: expected 1 to {self.width}, the width of the "
                "features"
            )
        channels = 3 if images.dtype == torch.uint8 else 1
        if (
            images.ndim != 4
            or images.shape[channels] != 3
            or not (channels == 3 or images.is_floating_point())
        ):
            raise ModelError(
                f"images are {str(images.dtype).removeprefix('torch.')} {list(images.shape)}: "
                "expected uint8 "
                "[B, H, W, 3], or float [B, 3, H, W]"
            )
        images = images.to(next(self.parameters()).device)
        if channels == 3:
            images = normalise(images, self.preprocessing.mean, self.preprocessing.std)
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            features = self.features(images)[:, :truncate_dim].float()
        finally:
            for module, mode in modes:
                module.training = mode
        return nn.functional.normalize(features, dim=1) if normalize else features

    def encode_files(
        self,
        paths: Iterable[str | os.PathLike],
        truncate_dim: int | None = None,
        normalize: bool = False,
    ) -> Tensor:
        """As `encode`, of image files that are prepared as `preprocessing` says, and so as
        `matryoshka embed` does.

        All of them at once: for a query or some, a Loader is for many. BetonError for a file that
        is no image.
        """
        images = read_images(paths, CenterCrop(self.preprocessing.size, self.preprocessing.ratio))
        return self.encode(torch.from_numpy(images), truncate_dim, normalize)


def _torchvision_resnet(name: str, weights: str | None, **options: Any) -> tuple[nn.Module, int]:
    import torchvision  # 2 to 5 s, which `--help` and a mistyped option should not take

    trunk = torchvision.models.get_model(name, **options)
    if weights is not None:
        published = torchvision.models.get_model_weights(name)[weights]
        # get_model(weights=...) would unpickle whatever is in the file
        trunk.load_state_dict(published.get_state_dict(check_hash=True, weights_only=True))
    return _without_classifier(trunk)


def _resnet10(weights: str | None, **options: Any) -> tuple[nn.Module, int]:
    """One basic block per stage (4.9 M parameters): for small images and machines without a GPU."""
    if weights is not None:
        raise ModelError(
            "model.init: there are no published weights for resnet10; choose another model.arch"
        )
    from torchvision.models.resnet import BasicBlock, ResNet

    return _without_classifier(ResNet(BasicBlock, [1, 1, 1, 1], **options))


def _without_classifier(resnet: nn.Module) -> tuple[nn.Module, int]:
    classifier = resnet.get_submodule("fc")
    assert isinstance(classifier, nn.Linear)
    resnet.add_module("fc", nn.Identity())
    return resnet, classifier.in_features


def _timm_model(name: str, weights: str | None, **options: Any) -> tuple[nn.Module, int]:
    """A model of timm without its classifier. weights: its name, with the tag of published weights
    or without.

    A transformer made for one image size gets timm's resampling of position embeddings where timm
    has it: other sizes work, the native one gives the same numbers. Never a download unless weights
    are asked for.
    """
    option = f"model.arch={TIMM}{name}" if weights is None else f"model.init={TIMM}{weights}"
    timm = import_timm(option)
    if not timm.is_model(name):  # nor is hf-hub:..., for which timm would download the architecture
        near = difflib.get_close_matches(name, timm.list_models(), n=1)
        hint = f" (did you mean {TIMM}{near[0]}?)" if near else ""
        raise ModelError(f"{option} is unknown to timm {timm.__version__}{hint}")
    make: Callable[..., Any] = partial(
        timm.create_model, weights or name, pretrained=weights is not None, num_classes=0, **options
    )
    try:
        fixed = getattr(timm.models.get_pretrained_cfg(name), "fixed_input_size", False)
        try:
            trunk = make(dynamic_img_size=True) if fixed else make()
        except TypeError:  # this model has no such option
            trunk = make()
    except (
        RuntimeError,
        AssertionError,
    ) as error:  # an unknown tag, a name that was given up, weights that misfit
        raise ModelError(f"{option}: {one_line(error)}") from None
    # the two differ where a model has a hidden layer before its classifier, which belongs to the
    # trunk
    width: Any = getattr(trunk, "head_hidden_size", None) or trunk.num_features
    return trunk, width


def import_timm(option: str):
    """The module timm. ModelError, naming the option that needs it, where it is not installed."""
    try:
        import timm
    except ImportError:
        raise ModelError(f"{option} needs timm: pip install timm") from None
    return timm


def one_line(error: Exception) -> str:
    """What another library says, without line breaks and not at length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."


TIMM = "timm:"  # before the name of one of timm's models
RESNETS = (  # torchvision's, all of them
    *("resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    *(
        "resnext50_32x4d",
        "resnext101_32x8d",
        "resnext101_64x4d",
        "wide_resnet50_2",
        "wide_resnet101_2",
    ),
)
BACKBONES: dict[str, Callable[..., tuple[nn.Module, int]]] = {
    "resnet10": _resnet10,
    **{name: partial(_torchvision_resnet, name) for name in RESNETS},
}


def backbone(arch: str, weights: str | None = None, **options: Any) -> tuple[nn.Module, int]:
    """(trunk, feature width) by name; options: further keywords of the builder.

    ModelError for an unknown name or weights that cannot be had.
    """
    if arch.startswith(TIMM):
        make = partial(_timm_model, arch.removeprefix(TIMM))
    elif arch in BACKBONES:
        make = BACKBONES[arch]
    else:
        near = difflib.get_close_matches(arch, BACKBONES, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ModelError(
            f"model.arch={arch!r} is unknown{hint}; known: {', '.join(sorted(BACKBONES))}, "
            f"{TIMM}NAME"
        )
    if weights is None:
        return make(None, **options)
    try:
        return make(weights, **options)
    except ModelError:
        raise
    except (
        Exception
    ) as error:  # no such weights, no network, a damaged file: each library has its own exceptions
        raise ModelError(
            f"model.init: the weights {weights} of {arch} cannot be had: {one_line(error)}"
        ) from error


def model_spec(config: ModelConfig, num_classes: int, blurpool: bool = False) -> ModelSpec:
    """The model that the options describe. ModelError names the option that cannot be met."""
    with torch.device("meta"):  # only the width is wanted
        _, width = backbone(config.arch)
    nested = config.mrl or config.efficient
    if nested and config.fixed_feature:
        raise ModelError(
            "model.fixed_feature is the baseline's width: leave it out with model.mrl or "
            "model.efficient"
        )
    if config.dims is not None and not nested:
        raise ModelError(
            "model.dims needs model.mrl=1 or model.efficient=1 (a single width is "
            "model.fixed_feature)"
        )
    try:
        if not nested:
            dims = check_dims((config.fixed_feature or width,), width)
        elif config.dims is not None:
            dims = check_dims(config.dims, width)
        else:
            dims = default_dims(width, shortest_prefix(config.nesting_start, width))
    except ValueError as error:
        option = "dims" if config.dims is not None else "fixed_feature"
        raise ModelError(f"model.{option}: {error} ({config.arch})") from None
    weights = config.relative_importance
    if weights is not None and len(weights) != len(dims):
        raise ModelError(
            f"model.relative_importance has {len(weights)} weights for the {len(dims)} prefixes "
            f"{list(dims)}"
        )
    return ModelSpec(config.arch, num_classes, dims, config.efficient, blurpool)


def shortest_prefix(nesting_start: int, width: int) -> int:
    """2^nesting_start, at most the feature width."""
    if nesting_start < 0 or 2**nesting_start > width:
        raise ModelError(
            f"model.nesting_start={nesting_start}: 2^{nesting_start} must be between 1 and the "
            f"width {width}"
        )
    return 2**nesting_start


def with_prefixes(model: NestedModel, dims: Sequence[int]) -> NestedModel:
    """The same weights with other prefixes: some of those that have a classifier (MRL), or any
    lengths up to the classifier's (MRL-E). Changes `model` and returns it; ModelError says what
    there is.
    """
    head = model.head
    try:
        dims = check_dims(dims, head.dims[-1])
    except ValueError as error:
        raise ModelError(f"nesting list: {error}") from None
    if not head.shared:
        if unknown := [d for d in dims if d not in head.dims]:
            raise ModelError(
                f"nesting list: no classifier for {unknown[0]}, only for "
                f"{', '.join(map(str, head.dims))}"
            )
        head.heads = nn.ModuleList(head.heads[head.dims.index(d)] for d in dims)
    head.dims = dims
    model.spec = replace(model.spec, dims=dims)
    return model


def build(spec: ModelSpec, weights: str | None = None) -> NestedModel:
    """The model of `spec`; `weights`: the name of published ones for the trunk (downloaded), None
    for random.

    A name is torchvision's, such as IMAGENET1K_V2, or timm's for the model, such as
    resnet18.a1_in1k.
    """
    trunk, width = backbone(spec.arch, weights, **spec.arch_options)
    head = NestedLinear(check_dims(spec.dims, width), spec.num_classes, spec.efficient)
    if spec.blurpool:
        apply_blurpool(trunk)
    return NestedModel(trunk, head, width, spec)
