"""One ViT as Matryoshka ViT compression exports it: `<net>_<dataset>_patch<p>_dim<d>.pth`.

The only file that knows that repository's layout. A file of torch.save, without code in it:
{"model_state_dict", "dim", "vit_class", "vit_kwargs"}. Ours have a further key, `matryoshka`: JSON
with the preprocessing and the class names. That repository's programs load our files, too.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from matryoshka.checkpoint.contents import CheckpointError, Contents, preprocessing_of
from matryoshka.checkpoint.torch_files import is_whole
from matryoshka.data.augment import Preprocessing
from matryoshka.data.catalogue import normalisation
from matryoshka.files import write_atomically
from matryoshka.models import ModelSpec, NestedModel
from matryoshka.models.patches import UNIT_VARIANCE, sincos_positions


class Layout(NamedTuple):
    """A class of that repository: our architecture, and its name of the patch projection."""

    arch: str
    projection: str
    fixed_positions: bool


# The nested class stores the projection of the widest member, of which a width uses its first rows.
CLASSES = {
    "ViTFixedPosDualPatchNorm": Layout("vitfixedposdualpatchnorm", "patch_norm.proj", True),
    "ViTFixedPosNestedDualPatchNorm": Layout("vitfixedposdualpatchnorm", "nested_proj", True),
    "ViTFixedPos": Layout("vitfixedpos", "to_patch_embedding.1", True),
    "ViT_LearnPos": Layout("vitlearnedpos", "to_patch_embedding.1", False),
}
OUTPUT = "ViTFixedPosDualPatchNorm"

# (name below a block of ours, name below a layer of theirs)
BLOCK_NAMES = (
    ("norm1", "0.norm"),
    ("attention.qkv", "0.fn.to_qkv"),
    ("attention.out", "0.fn.to_out.0"),
    ("norm2", "1.norm"),
    ("mlp.fc1", "1.fn.net.0"),
    ("mlp.fc2", "1.fn.net.3"),
)
OPTIONS = {"image_size": "image_size", "patch_size": "patch", "depth": "depth", "heads": "heads"}
DEFAULTS = {"image_size": 32, "patch_size": 4, "depth": 6, "heads": 8}  # of our nets
KEYS = ("model_state_dict", "dim", "vit_class", "vit_kwargs")

# ---------------------------------------------------------------- names of weights


def _their_name(name: str, layout: Layout) -> str:
    """The name of a parameter of ours, `trunk.` or `head.` in front, in that repository."""
    block = re.fullmatch(r"trunk\.blocks\.(\d+)\.(.+)\.(weight|bias)", name)
    if block is not None:
        layer, inner, leaf = block.groups()
        return f"transformer.layers.{layer}.{dict(BLOCK_NAMES)[inner]}.{leaf}"
    leaf = name.rpartition(".")[2]
    fixed = {
        "trunk.cls": "cls_token",
        "trunk.positions": "pos_embedding",
        f"trunk.patches.project.{leaf}": f"{layout.projection}.{leaf}",
        f"trunk.norm.{leaf}": f"mlp_head.0.{leaf}",
        f"head.heads.0.{leaf}": f"mlp_head.1.{leaf}",
    }
    return fixed[name]


def _our_names(depth: int, layout: Layout) -> list[str]:
    """All parameters of a member of ours."""
    names = ["trunk.cls"]
    if not layout.fixed_positions:
        names.append("trunk.positions")
    for part in ("trunk.patches.project", "trunk.norm", "head.heads.0"):
        names += [f"{part}.weight", f"{part}.bias"]
    for layer in range(depth):
        for inner, _ in BLOCK_NAMES:
            leaves = ["weight"] if inner == "attention.qkv" else ["weight", "bias"]
            names += [f"trunk.blocks.{layer}.{inner}.{leaf}" for leaf in leaves]
    return names


def _their_order(dim: int) -> Tensor:
    """For each column of our features, its number in theirs: int64 [dim].

    Their fixed positions alternate sines and cosines, ours have the sines of an axis first. All
    weights that read or write the features are permuted alike, so that both nets are the same.
    """
    half = torch.cat([torch.arange(0, dim // 2, 2), torch.arange(1, dim // 2, 2)])
    return torch.cat([half, half + dim // 2])


def _permute(name: str, weight: Tensor, order: Tensor) -> Tensor:
    """`weight` of our name with its axis of the features, if it has one, in this order."""
    if name.endswith(("mlp.fc1.bias", "head.heads.0.bias")):
        return weight
    reads = ("attention.qkv.weight", "mlp.fc1.weight", "head.heads.0.weight")
    return weight.index_select(1 if name.endswith(reads) else 0, order)


# ---------------------------------------------------------------- writing


def save_vit_pth(model: NestedModel, path: str | Path) -> None:
    """Write one ViT, such as `extract` gives it. CheckpointError for any other model."""
    kwargs = vit_kwargs(model, path)
    layout = CLASSES[OUTPUT]
    dim = model.width
    state = {}
    ours_of_theirs = _their_order(dim).argsort()
    for name, value in model.state_dict().items():
        weight = _permute(name, value.detach().cpu(), ours_of_theirs)
        state[_their_name(name, layout)] = weight[None, None] if name == "trunk.cls" else weight
    side = kwargs["image_size"] // kwargs["patch_size"]
    state["pos_embedding"] = _positions(side, dim)
    extra = {"preprocessing": asdict(model.preprocessing), "classes": model.classes}
    buffer = io.BytesIO()
    torch.save(
        {
            "model_state_dict": state,
            "dim": dim,
            "vit_class": OUTPUT,
            "vit_kwargs": kwargs,
            "matryoshka": json.dumps(extra),
        },
        buffer,
    )
    write_atomically(path, buffer.getvalue())


def vit_kwargs(model: NestedModel, path: str | Path) -> dict[str, Any]:
    """The arguments of their class. CheckpointError for a model that the layout cannot hold."""
    spec = model.spec
    options = dict(spec.arch_options)
    dim = options.pop("dim", 512)
    dropout = options.pop("dropout", 0.1)
    named = {theirs: options.pop(ours, DEFAULTS[theirs]) for theirs, ours in OPTIONS.items()}
    if options.get("pool") == "cls":
        options.pop("pool")
    arch = CLASSES[OUTPUT].arch
    if spec.arch != arch or spec.dims != (dim,):
        raise CheckpointError(
            f"{path}: the .pth layout holds one {arch} with one classifier, not a {spec.arch} with "
            f"dims {list(spec.dims)}; extract a width of it first"
        )
    # With one head, that repository leaves out the output projection.
    if options or named["heads"] == 1:
        given = next((f"{name}={value}" for name, value in options.items()), "heads=1")
        raise CheckpointError(f"{path}: the .pth layout has no {given}; save a model.safetensors")
    return {
        **named,
        "num_classes": spec.num_classes,
        "pool": "cls",
        "channels": 3,
        "dropout": dropout,
        "emb_dropout": dropout,
    }


def _positions(side: int, dim: int) -> Tensor:
    """Their table of fixed positions, [1, side * side + 1, dim]: zeros for the CLS token."""
    table = sincos_positions(side, side, dim, scale=UNIT_VARIANCE)[:, _their_order(dim).argsort()]
    return torch.cat([table.new_zeros(1, dim), table])[None]


# ---------------------------------------------------------------- reading


def is_vit_pth(stored: Any) -> bool:
    """Whether the content of a file of torch.save has this layout."""
    return isinstance(stored, Mapping) and "vit_class" in stored and "model_state_dict" in stored


def read(path: Path, stored: Mapping[str, Any]) -> Contents:
    """Read an export, ours or that repository's. CheckpointError names what is wrong."""
    missing = [key for key in KEYS if key not in stored]
    if missing:
        raise CheckpointError(f"{path}: an exported ViT without {missing[0]}; export it again")
    state, dim, class_name, kwargs = (stored[key] for key in KEYS)
    layout = CLASSES.get(class_name) if isinstance(class_name, str) else None
    if layout is None:
        raise CheckpointError(
            f"{path}: its vit_class is {class_name!r}; readable are {', '.join(CLASSES)}"
        )
    _check_kwargs(path, dim, kwargs, layout)
    options: dict[str, Any] = {ours: kwargs[theirs] for theirs, ours in OPTIONS.items()}
    options |= {"dim": dim, "dropout": kwargs.get("dropout", 0.0)}

    if layout.fixed_positions:
        _check_positions(path, _weight(path, state, "pos_embedding"), kwargs, dim)
    weights = {}
    for name in _our_names(kwargs["depth"], layout):
        weight = _weight(path, state, _their_name(name, layout))
        if name.startswith("trunk.patches.project."):
            weight = weight[:dim]
        elif name in ("trunk.cls", "trunk.positions"):
            weight = weight.reshape(weight.shape[1:] if name == "trunk.positions" else [-1])
        weights[name] = weight
    if layout.fixed_positions:
        order = _their_order(dim)
        for name, weight in weights.items():
            weights[name] = _reordered(path, name, weight, order)
    spec = ModelSpec(
        arch=layout.arch, num_classes=kwargs["num_classes"], dims=(dim,), arch_options=options
    )
    preprocessing, classes, notes = _extra(path, stored, kwargs)
    return Contents(spec, preprocessing, classes, notes, weights)


def _check_kwargs(path: Path, dim: Any, kwargs: Any, layout: Layout) -> None:
    counts = {"dim": dim}
    if isinstance(kwargs, Mapping):
        counts |= {name: kwargs.get(name) for name in (*OPTIONS, "num_classes")}
    # The limit is that of the nets' checks: a file can claim any size.
    wrong = [name for name, n in counts.items() if type(n) is not int or not 1 <= n <= 16384]
    if not isinstance(kwargs, Mapping) or wrong:
        name = wrong[0] if wrong else "vit_kwargs"
        raise CheckpointError(f"{path}: its {name} is {counts.get(name)!r}; export it again")
    if layout.fixed_positions and dim % 4:
        raise CheckpointError(f"{path}: its dim is {dim}, and fixed positions need a multiple of 4")
    if kwargs.get("channels", 3) != 3:
        raise CheckpointError(f"{path}: takes {kwargs['channels']} channels; only 3 are supported")
    if kwargs.get("pool", "cls") != "cls":  # their mean includes the CLS token, ours has none
        raise CheckpointError(f"{path}: its pool is {kwargs['pool']!r}; only cls is supported")


def _weight(path: Path, state: Any, name: str) -> Tensor:
    weight = state.get(name) if isinstance(state, Mapping) else None
    if not isinstance(weight, Tensor) or not is_whole(weight) or not weight.ndim:
        raise CheckpointError(f"{path}: has no whole {name}; get another copy of it")
    return weight


def _reordered(path: Path, name: str, weight: Tensor, order: Tensor) -> Tensor:
    try:
        return _permute(name, weight, order)
    except (IndexError, RuntimeError):
        raise CheckpointError(
            f"{path}: {name} is {list(weight.shape)}, which does not fit dim={len(order)}"
        ) from None


def _check_positions(path: Path, table: Tensor, kwargs: Mapping[str, Any], dim: int) -> None:
    """The net computes its positions: those of the file must be the same."""
    side = kwargs["image_size"] // kwargs["patch_size"]
    shape = (1, side * side + 1, dim)
    if tuple(table.shape) != shape or not torch.allclose(table, _positions(side, dim), atol=1e-4):
        raise CheckpointError(
            f"{path}: its pos_embedding is not the fixed table {list(shape)} of this architecture"
        )


def _extra(
    path: Path, stored: Mapping[str, Any], kwargs: Mapping[str, Any]
) -> tuple[Preprocessing, list[str] | None, list[str]]:
    """(preprocessing, class names, notes): what we add, or what that repository assumes."""
    if "matryoshka" in stored:
        try:
            extra = json.loads(stored["matryoshka"])
            return preprocessing_of(extra), extra["classes"], []
        except (TypeError, KeyError, ValueError, RecursionError):
            raise CheckpointError(
                f"{path}: its preprocessing is damaged; get another copy of it"
            ) from None
    classes = kwargs["num_classes"]
    # What the repository trains on, by the number of classes.
    data, name = ("cifar100", "CIFAR-100") if classes == 100 else ("cifar10", "CIFAR-10")
    mean, std = normalisation(data)
    preprocessing = Preprocessing(size=kwargs["image_size"], ratio=1.0, mean=mean, std=std)
    return preprocessing, None, [f"the file has no mean and std, assumed those of {name}"]
