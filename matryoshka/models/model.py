"""A backbone with a nested head: `build(ModelSpec)` -> NestedModel."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from matryoshka.data import CenterCrop, image_files, read_images
from matryoshka.data.augment import Preprocessing, normalise
from matryoshka.models.adapter import Adapter
from matryoshka.models.backbones import backbone
from matryoshka.models.blurpool import apply_blurpool
from matryoshka.models.neck import build_neck
from matryoshka.models.nested_vit import MEMBER, WidthFamily, member_options, vit_family
from matryoshka.models.options import (
    FAMILIES,
    ModelConfig,
    ModelError,
    ModelSpec,
    parse_arch_options,
)
from matryoshka.models.sizes import refuse_weights
from matryoshka.nested import NestedLinear, check_dims, default_dims, nested_logits

ENCODE_BATCH = 64  # files that encode_files decodes at a time
FAMILY_WIDTH = 512  # the widest member of a family without model.dims

# ---------------------------------------------------------------- the model


class NestedModel(nn.Module):
    """A trunk and a nested head: images -> features [B, D] -> logits [G, B, C].

    trunk: images [B, 3, H, W], normalised float -> features [B, D]
    neck: its output -> features [B, D], or None
    head: features [B, D] -> logits [G, B, C] of the G prefixes
    """

    # Whether the features of all dims come from one forward pass. If not (nested_vit.py), each dim
    # costs a pass of its own.
    one_pass = True

    def __init__(
        self,
        trunk: nn.Module,
        head: NestedLinear,
        width: int,
        spec: ModelSpec,
        neck: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.neck = neck
        self.head = head
        self.width = width
        self.spec = spec
        self.preprocessing = Preprocessing()
        self.classes: list[str] | None = None
        # Assumptions made while reading a bare state_dict, for the user to check.
        self.notes: list[str] = []
        # Modules that stay in eval mode, see transfer.apply_freeze. Names, not modules: a deep copy
        # or a conversion to SyncBatchNorm has modules of its own.
        self.frozen: tuple[str, ...] = ()
        # A map behind the features that embeddings take and the head does not: see adapter.py.
        self.adapter: Adapter | None = None

    @property
    def dims(self) -> tuple[int, ...]:
        return self.head.dims

    @property
    def trunk_width(self) -> int:
        """Numbers of the trunk's output, which a neck maps to the `width` of the features."""
        if self.neck is None:
            return self.width
        return next(m.in_features for m in self.neck.modules() if isinstance(m, nn.Linear))

    def classifier(self, dim: int) -> tuple[Tensor, Tensor]:
        """(weight [C, dim], bias [C]) of one dim, sliced where all share one."""
        head = self.head.heads[0 if self.head.shared else self.dims.index(dim)]
        return head.get_parameter("weight")[:, :dim], head.get_parameter("bias")

    def restrict(self, dims: Sequence[int]) -> None:
        """Keep only the prefixes `dims`; see `with_prefixes`."""
        head = self.head
        try:
            dims = check_dims(dims, head.dims[-1])
        except ValueError as error:
            raise ModelError(f"nesting list: {error}") from None
        if not head.shared:
            unknown = [d for d in dims if d not in head.dims]
            if unknown:
                raise ModelError(
                    f"nesting list: no classifier for {unknown[0]}, only for "
                    f"{', '.join(map(str, head.dims))}"
                )
            head.heads = nn.ModuleList(head.heads[head.dims.index(d)] for d in dims)
        # A shared head keeps its weights: nested_logits slices the columns that `dims` needs.
        head.dims = dims
        self.spec = replace(self.spec, dims=dims)

    def check_classes(self, dataset) -> None:
        """ModelError if the labels of `dataset` (path, classes, num_classes) are not this model's
        outputs.
        """
        count = self.spec.num_classes
        if dataset.num_classes > count or (dataset.classes and dataset.num_classes != count):
            raise ModelError(
                f"{dataset.path}: has {dataset.num_classes} classes, the model {count}; "
                "evaluate the model on the classes that it was trained on"
            )
        if dataset.classes and self.classes and dataset.classes != self.classes:
            raise ModelError(
                f"{dataset.path}: its class names differ from those that the model was trained on"
            )

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        # In training mode, the batch norms of a frozen stage would still update their statistics.
        for name in self.frozen:
            self.get_submodule(name).eval()
        return self

    def features(self, images: Tensor) -> Tensor:
        features = self.trunk(images)
        return features if self.neck is None else self.neck(features)

    def embeddings(self, images: Tensor) -> Tensor:
        """The features, or what the adapter makes of them in float32: [B, embedding_width]."""
        features = self.features(images)
        if self.adapter is None:
            return features
        if not torch.is_autocast_enabled(features.device.type):
            return self.adapter(features.float())
        # A fraction of the encoder's work: half precision would save nothing.
        with torch.autocast(features.device.type, enabled=False):
            return self.adapter(features.float())

    @property
    def embedding_width(self) -> int:
        return self.width if self.adapter is None else self.adapter.width

    @property
    def embedding_dims(self) -> tuple[int, ...]:
        """The prefixes that embeddings were trained for."""
        return self.dims if self.adapter is None else self.adapter.dims

    def features_of(self, images: Tensor, dim: int) -> Tensor:
        """What the classifier of `dim` sees, [B, dim]."""
        return self.features(images)[:, :dim]

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))

    @torch.no_grad()
    def encode(
        self, images: Tensor, truncate_dim: int | None = None, normalize: bool = False
    ) -> Tensor:
        """Embeddings, float32 [B, d]: the first `truncate_dim` columns of `embeddings` (None: all).

        images: uint8 [B, H, W, 3] as a Loader yields them, normalised here; or float [B, 3, H, W],
        already normalised. Their size is that of `preprocessing`; any device. normalize: scale to
        length 1 after truncation (a zero vector stays zero).

        Runs in eval mode without gradients, then restores the mode of every module. ModelError for
        a truncate_dim beyond the embedding width and for images of another shape or type.
        """
        if truncate_dim is not None and not 1 <= truncate_dim <= self.embedding_width:
            raise ModelError(
                f"truncate_dim={truncate_dim}: expected 1 to {self.embedding_width}, the feature "
                "width"
            )
        self._check_images(images)
        images = images.to(next(self.parameters()).device)
        if images.dtype == torch.uint8:
            images = normalise(images, self.preprocessing.mean, self.preprocessing.std)

        # Each module's own mode: frozen stages are in eval mode while the rest trains.
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            features = self.embeddings(images)[:, :truncate_dim].float()  # [B, d]
        finally:
            for module, mode in modes:
                module.training = mode
        return nn.functional.normalize(features, dim=1) if normalize else features

    @staticmethod
    def _check_images(images: Tensor) -> None:
        """ModelError unless `images` are uint8 [B, H, W, 3] or float [B, 3, H, W]."""
        # A Loader yields channels last, a preprocessed batch has them first.
        is_bytes = images.dtype == torch.uint8
        channel_axis = 3 if is_bytes else 1
        if (
            images.ndim != 4
            or images.shape[channel_axis] != 3
            or not (is_bytes or images.is_floating_point())
        ):
            dtype = str(images.dtype).removeprefix("torch.")
            raise ModelError(
                f"images are {dtype} {list(images.shape)}: expected uint8 [B, H, W, 3] or float "
                "[B, 3, H, W]"
            )

    def encode_files(
        self,
        paths: str | os.PathLike | Iterable[str | os.PathLike],
        truncate_dim: int | None = None,
        normalize: bool = False,
    ) -> Tensor:
        """`encode` of image files, cropped and resized by `preprocessing` as `matryoshka embed`
        does.

        paths: a file, a folder (all images below it, in the order of data.image_files), or several
        of these. Uses one core to decode: meant for queries and small folders; use a Loader for
        many images. BetonError for a file that is not an image.
        """
        crop = CenterCrop(self.preprocessing.size, self.preprocessing.ratio)
        files = image_files(paths)
        parts = [
            self.encode(
                torch.from_numpy(read_images(files[start : start + ENCODE_BATCH], crop)),
                truncate_dim,
                normalize,
            )
            for start in range(0, max(1, len(files)), ENCODE_BATCH)
        ]
        return torch.cat(parts)


class FamilyModel(NestedModel):
    """A family of widths (nested_vit.py): the logits of each dim come from a member of that width.

    Each width is a forward pass of its own; `features` are those of the widest.
    """

    one_pass = False
    trunk: WidthFamily

    def features_of(self, images: Tensor, dim: int) -> Tensor:
        return self.trunk(images, dim)

    def forward(self, images: Tensor, which: Sequence[int] | None = None) -> Tensor:
        """Logits [G, B, C] of all widths, or, at least cost, of some.

        which: their numbers in `dims`, as nested.sandwich draws them; G is then their count.
        """
        dims = self.dims if which is None else [self.dims[i] for i in which]
        logits = []
        for dim, features in zip(dims, self.trunk.features(images, dims), strict=True):
            logits.append(nested_logits(features, [self.classifier(dim)], (dim,)))
        return torch.cat(logits)

    @torch.no_grad()
    def restrict(self, dims: Sequence[int]) -> None:
        dims = tuple(dims)
        unknown = [d for d in dims if d not in self.dims]
        if unknown or not dims or list(dims) != sorted(set(dims)):
            raise ModelError(
                f"nesting list: {','.join(map(str, dims))}: expected some of this family's widths, "
                f"{', '.join(map(str, self.dims))}, in rising order"
            )
        smaller = build(replace(self.spec, dims=dims))
        assert isinstance(smaller, FamilyModel)
        kept = smaller.state_dict()
        for dim in dims:
            for name, weight in self.trunk.weights_of(dim).items():
                key = f"trunk.members.{dim}.{name}"
                if key in kept:
                    kept[key] = weight
        for i in range(len(smaller.head.heads)):
            dim = dims[-1] if smaller.head.shared else dims[i]
            kept[f"head.heads.{i}.weight"], kept[f"head.heads.{i}.bias"] = self.classifier(dim)
        smaller.load_state_dict(kept)
        smaller.to(next(self.parameters()))
        smaller.train(self.training)
        self.trunk = smaller.trunk
        self.head = smaller.head
        self.width = dims[-1]
        self.spec = smaller.spec
        self.frozen = ()


@torch.no_grad()
def extract(model: NestedModel, dim: int) -> NestedModel:
    """One dim of a nested model as a model of its own.

    Of a family: a plain ViT of this width, with exactly its parameters. Of any other model: its
    trunk and the classifier on the first `dim` features. The weights are copies; preprocessing and
    class names are the model's. ModelError for a dim that the model does not have.
    """
    if dim not in model.dims:
        raise ModelError(f"{model.spec.arch}: no dim {dim}, only {', '.join(map(str, model.dims))}")
    if isinstance(model, FamilyModel):
        arch_options = {**member_options(model.spec.arch_options), "dim": dim}
        spec = replace(model.spec, arch=MEMBER, arch_options=arch_options)
        weights = model.trunk.weights_of(dim)
    else:
        spec = model.spec
        weights = model.trunk.state_dict()
    alone = build(replace(spec, dims=(dim,), efficient=False))
    state = {f"trunk.{name}": weight for name, weight in weights.items()}
    if model.neck is not None:
        state |= {f"neck.{name}": weight for name, weight in model.neck.state_dict().items()}
    state["head.heads.0.weight"], state["head.heads.0.bias"] = model.classifier(dim)
    alone.load_state_dict(state)
    alone.to(next(model.parameters()))
    alone.preprocessing = model.preprocessing
    alone.classes = model.classes
    return alone.train(model.training)


def widest(model: NestedModel) -> NestedModel:
    """The widest member of a family, for programs that read the prefixes of one trunk's features;
    any other model itself.
    """
    if model.one_pass:
        return model
    alone = extract(model, model.dims[-1])
    alone.notes = [
        *model.notes,
        f"of the family {model.spec.arch}, only the widest member, {alone.width}, is used",
    ]
    return alone


def build(spec: ModelSpec, weights: str | None = None) -> NestedModel:
    """Build the model of `spec`.

    `weights` names published weights for the trunk, which are downloaded; None initialises at
    random. It is torchvision's name, such as IMAGENET1K_V2, or timm's name of the model, such as
    resnet18.a1_in1k.
    """
    if spec.arch in FAMILIES:
        refuse_weights(spec.arch, weights)
        family = vit_family(spec.arch, spec.dims, spec.arch_options)
        head = NestedLinear(family.dims, spec.num_classes, spec.efficient)
        return FamilyModel(family, head, family.dims[-1], spec)
    trunk, width = backbone(spec.arch, weights, spec.arch_options)
    neck, width = build_neck(spec.neck, width)
    head = NestedLinear(check_dims(spec.dims, width), spec.num_classes, spec.efficient)
    if spec.blurpool:
        apply_blurpool(trunk)
    # What a file of the options said is part of the model from now on: see backbones.py.
    saved_options = getattr(trunk, "saved_options", {})
    if saved_options:
        spec = replace(spec, arch_options={**spec.arch_options, **saved_options})
    model = NestedModel(trunk, head, width, spec, neck)
    normalisation = getattr(trunk, "normalisation", None)
    if normalisation:
        mean, std = normalisation
        model.preprocessing = Preprocessing(mean=mean, std=std)
    return model


def with_prefixes(model: NestedModel, dims: Sequence[int]) -> NestedModel:
    """Restrict `model` to the prefixes `dims`; change it in place and return it.

    MRL: `dims` must be prefixes that have a classifier. MRL-E: any lengths up to the classifier's
    width, because its columns are shared. A family: some of its widths; the weights of wider ones
    are dropped. ModelError lists the available prefixes.
    """
    model.restrict(dims)
    return model


# ---------------------------------------------------------------- options -> spec


def model_spec(config: ModelConfig, num_classes: int, blurpool: bool = False) -> ModelSpec:
    """The ModelSpec of the options. ModelError names the option that is invalid."""
    arch_options = parse_arch_options(config.arch_options)
    if config.arch in FAMILIES:
        return _family_spec(config, num_classes, arch_options)
    with torch.device("meta"):  # only the width is needed: no memory, no initialisation
        _, width = backbone(config.arch, options=arch_options)
        _, width = build_neck(config.neck, width)

    nested = config.mrl or config.efficient
    if nested and config.fixed_feature:
        raise ModelError(
            "model.fixed_feature is the width of the baseline: drop it with model.mrl or "
            "model.efficient"
        )
    if config.dims is not None and not nested:
        raise ModelError(
            "model.dims needs model.mrl=1 or model.efficient=1 (for a single width use "
            "model.fixed_feature)"
        )
    try:
        if not nested:
            dims = check_dims((config.fixed_feature or width,), width)
        elif config.dims is not None:
            dims = check_dims(config.dims, width)
        else:
            dims = default_dims(width, shortest_prefix(config.nesting_start, width))
    except ModelError:
        raise
    except ValueError as error:
        option = "dims" if config.dims is not None else "fixed_feature"
        raise ModelError(f"model.{option}: {error} ({config.arch})") from None

    _check_importance(config, dims)
    return ModelSpec(
        arch=config.arch,
        num_classes=num_classes,
        dims=dims,
        efficient=config.efficient,
        blurpool=blurpool,
        arch_options=arch_options,
        neck=config.neck,
    )


def _family_spec(config: ModelConfig, num_classes: int, arch_options: dict[str, Any]) -> ModelSpec:
    """The ModelSpec of a family, which is nested without model.mrl."""
    if config.neck:
        raise ModelError(
            f"model.neck={config.neck}: {config.arch} has a width for each of its dims; leave it "
            "out"
        )
    if config.fixed_feature:
        raise ModelError(
            f"model.fixed_feature: {config.arch} has the widths of model.dims; leave it out"
        )
    if config.dims is not None:
        try:
            dims = check_dims(config.dims, max(config.dims, default=0))
        except ValueError as error:
            raise ModelError(f"model.dims: {error} ({config.arch})") from None
    else:
        dims = default_dims(FAMILY_WIDTH, shortest_prefix(config.nesting_start, FAMILY_WIDTH))
    with torch.device("meta"):  # the errors of widths and options
        vit_family(config.arch, dims, arch_options)
    _check_importance(config, dims)
    return ModelSpec(
        arch=config.arch,
        num_classes=num_classes,
        dims=dims,
        # Where all weights are slices, the classifier's are, too.
        efficient=config.efficient or (config.arch == "vit_nested" and not config.mrl),
        arch_options=arch_options,
    )


def _check_importance(config: ModelConfig, dims: Sequence[int]) -> None:
    """ModelError unless there is one model.relative_importance for each prefix."""
    weights = config.relative_importance
    if weights is not None and len(weights) != len(dims):
        raise ModelError(
            f"model.relative_importance has {len(weights)} weights for the {len(dims)} prefixes "
            f"{list(dims)}"
        )


def shortest_prefix(nesting_start: int, width: int) -> int:
    """2^nesting_start. ModelError if that is not between 1 and the feature width."""
    if nesting_start < 0 or 2**nesting_start > width:
        raise ModelError(
            f"model.nesting_start={nesting_start}: 2^{nesting_start} must be between 1 and the "
            f"width {width}"
        )
    return 2**nesting_start
