"""Plain state_dicts of the MRL and ffcv-imagenet repositories; the only file that knows their key
names.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from matryoshka import json_files
from matryoshka.checkpoint.contents import CheckpointError, Contents, first_line
from matryoshka.checkpoint.torch_files import is_whole
from matryoshka.data.augment import Preprocessing
from matryoshka.files import read_regular, write_atomically
from matryoshka.models import (
    BACKBONES,
    FAMILIES,
    RESNETS,
    TIMM,
    ModelError,
    ModelSpec,
    NestedModel,
    backbone,
)
from matryoshka.models.blurpool import apply_blurpool
from matryoshka.models.options import parse_arch_options
from matryoshka.nested import check_dims, default_dims

# ---------------------------------------------------------------- names of weights


def save_upstream(model: NestedModel, path: str | Path) -> None:
    """Write `final_weights.pt`: a plain state_dict with upstream's keys and `module.` prefix."""
    buffer = io.BytesIO()
    torch.save({f"module.{key}": value for key, value in to_upstream(model).items()}, buffer)
    write_atomically(path, buffer.getvalue())


def to_upstream(model: NestedModel) -> dict[str, Tensor]:
    """Weights under upstream's names: torchvision's for the trunk, `fc.*` for the head; no
    `module.` prefix.
    """
    state = {}
    for key, value in model.state_dict().items():
        part, name = key.split(".", 1)  # trunk, neck or head
        if part == "neck":  # which upstream does not have
            name = key
        if part == "head":
            i, leaf = name.removeprefix("heads.").split(".")
            nested = len(model.dims) > 1
            name = f"fc.nesting_classifier_{i}.{leaf}" if nested else f"fc.{leaf}"
        state[name] = value.detach().cpu().contiguous()
    return state


def from_upstream(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under NestedModel's names, from upstream's new or old keys without prefix."""
    renamed = {}
    for key, value in state.items():
        if key.startswith("fc.nesting_classifier_"):
            renamed[f"head.heads.{key.removeprefix('fc.nesting_classifier_')}"] = value
        elif key.startswith("fc."):
            renamed[f"head.heads.0.{key.removeprefix('fc.')}"] = value
        else:
            renamed[f"trunk.{key}"] = value
    return renamed


# ---------------------------------------------------------------- reading


def read(
    path: Path,
    stored: Any,
    *,
    efficient: bool = False,
    dims: tuple[int, ...] | None = None,
    arch: str | None = None,
    old_ckpt: bool = False,
) -> Contents:
    """Read an upstream `.pt`. stored: what the file holds. Further arguments: see load_model."""
    state = _state_dict(path, stored)
    params = _read_params(path)
    notes: list[str] = []
    names = _classifier_names(path, state)
    widths = tuple(state[name].shape[1] for name in names)
    widest = widths[-1]
    trunk = {key: tuple(value.shape) for key, value in state.items() if not key.startswith("fc.")}
    options = _arch_options(path, params)
    arch, trunk_width, blurpool = _recognise(path, trunk, arch or params.get("model.arch"), options)

    # The keys below `fc.` of each kind of head, and where its dims come from:
    #   MRL                nesting_classifier_0, _1, ...  the widths of the classifiers
    #   MRL-E              nesting_classifier_0           not in the file
    #   MRL-E, old style   weight                         not in the file
    #   fixed feature      weight                         the width of the classifier
    nested_keys = "fc.weight" not in state
    # Only MRL-E changed its keys between the two styles.
    if old_ckpt and nested_keys and len(widths) == 1:
        raise CheckpointError(
            f"{path}: not of upstream's old style: its MRL-E classifier is nesting_classifier_0; "
            "drop old_ckpt"
        )
    if len(widths) > 1:
        spec_dims, shared = widths, False
    elif nested_keys or efficient or params.get("model.efficient"):
        spec_dims, shared = _shared_dims(path, dims, params, widest, notes), True
    else:
        spec_dims, shared = widths, False
        if params.get("model.mrl"):
            raise CheckpointError(
                f"{path}: its params.json has model.mrl=1, but the file has one classifier, "
                "fc.weight"
            )
        if widest == trunk_width and not params:
            notes.append(
                f"read as a fixed feature of width {widest}; an old-style MRL-E file has the same "
                "keys: if it is one, use the efficient flag"
            )

    # A bare .pt is evaluated as in the validation of its training.
    size = params.get("validation.resolution")
    spec = ModelSpec(
        arch=arch,
        num_classes=len(state[names[0]]),
        dims=spec_dims,
        efficient=shared,
        blurpool=blurpool,
        arch_options=options,
    )
    preprocessing = Preprocessing(size=int(size)) if size else Preprocessing()
    return Contents(spec, preprocessing, None, notes, from_upstream(state))


def _state_dict(path: Path, state: Any) -> dict[str, Tensor]:
    """Check an upstream state_dict and remove its `module.` prefix."""
    plain = isinstance(state, Mapping) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    )
    if not plain or not state:
        raise CheckpointError(
            f"{path}: not a plain state_dict; expected upstream's final_weights.pt"
        )
    # DDP adds the prefix; single-GPU checkpoints lack it, and upstream cannot read those.
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return dict(state)


def _read_params(path: Path) -> dict[str, Any]:
    """params.json in the checkpoint's folder, where upstream's trainer writes its options; {} if
    the file does not exist.
    """
    file = path.with_name("params.json")
    if not file.is_file():
        return {}
    try:
        params, _ = json_files.decode(read_regular(file))
    except json_files.JsonFileError as error:
        raise CheckpointError(f"{file}: {error}; fix or remove it") from None
    if not isinstance(params, dict):
        return {}
    expected = {"model.arch": str, "model.nesting_start": int, "validation.resolution": int}
    for key, kind in expected.items():
        value = params.get(key)
        negative = kind is int and isinstance(value, int) and value < 0
        if not isinstance(value, kind | None) or negative:
            raise CheckpointError(f"{file}: {key} is {value!r}; fix or remove it")
    return params


def _classifier_names(path: Path, state: Mapping[str, Tensor]) -> list[str]:
    """Keys of the classifiers' weights, shortest prefix first; each is a matrix [C, d]."""
    names = []
    if "fc.weight" in state:
        names.append("fc.weight")
    else:
        while f"fc.nesting_classifier_{len(names)}.weight" in state:
            names.append(f"fc.nesting_classifier_{len(names)}.weight")
    if not names:
        raise CheckpointError(
            f"{path}: no classifier (fc.weight or fc.nesting_classifier_0.weight) among its keys"
        )
    for name in names:
        weight = state[name]
        if weight.ndim != 2 or not is_whole(weight):
            raise CheckpointError(
                f"{path}: {name}, {list(weight.shape)}, is not a whole matrix; get another copy "
                "of the file"
            )
    return names


def _shared_dims(
    path: Path,
    dims: tuple[int, ...] | None,
    params: Mapping[str, Any],
    width: int,
    notes: list[str],
) -> tuple[int, ...]:
    """The prefixes of an MRL-E classifier of `width` columns: from the argument, else params.json,
    else assumed.
    """
    stated = (params.get("model.dims") or None) if dims is None else dims
    try:
        if stated is not None:
            checked = check_dims(stated, width)
            # The classifier was trained at its whole width, so the longest prefix is the width.
            if checked[-1] != width:
                raise ValueError(f"dims {list(checked)} end before the width {width}")
            return checked
        if params.get("model.nesting_start") is not None:
            # 31: 2**(a huge number in params.json) must not exhaust memory
            return default_dims(width, 2 ** min(params["model.nesting_start"], 31))
    except (TypeError, ValueError, OverflowError) as error:
        source = "its params.json" if dims is None else "the dims argument"
        raise CheckpointError(f"{path}: {error} of its classifier ({source})") from None
    assumed = default_dims(width)
    notes.append(
        f"MRL-E weights do not determine their prefixes, assumed {list(assumed)}; if it was "
        "trained with others, give dims"
    )
    return assumed


def _arch_options(path: Path, params: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the net in a params.json; ours are a list of `name=value`."""
    pairs = params.get("model.arch_options") or ()
    try:
        options = parse_arch_options(tuple(pairs))
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: its params.json has model.arch_options={pairs!r}: {first_line(error)}"
        ) from None
    if "vqvae" in options:  # opening a checkpoint opens no other file
        raise CheckpointError(
            f"{path}: does not say how its VQ-VAE encoder is built; use the model.safetensors of "
            "the same run"
        )
    return options


def _recognise(
    path: Path, trunk: dict[str, tuple[int, ...]], arch: str | None, options: Mapping[str, Any]
) -> tuple[str, int, bool]:
    """(arch, feature width, blurpool) of the backbone with exactly these keys and shapes."""
    if arch in FAMILIES:
        raise CheckpointError(
            f"{path}: weights alone do not describe a {arch}; give the model.safetensors of its run"
        )
    blurpool = any(key.endswith(".blur_filter") for key in trunk)
    known = arch is not None and (arch in BACKBONES or arch.startswith(TIMM))
    # Without a name all ResNets are tried: upstream has no other nets. Those for small images and
    # timm's are too many, and most have options that shapes do not tell.
    resnets = ("resnet10", *RESNETS)
    candidates = [arch] if arch is not None and known else resnets
    for name in candidates:
        with torch.device("meta"):  # shapes are enough: no memory, no initialisation
            try:
                candidate, width = backbone(name, options=options)
            except ModelError as error:
                raise CheckpointError(f"{path}: {error}") from None
            if blurpool:
                apply_blurpool(candidate)
        shapes = {key: tuple(value.shape) for key, value in candidate.state_dict().items()}
        if shapes == trunk:
            return name, width, blurpool
    if arch:
        raise CheckpointError(f"{path}: its weights are not those of a {arch}")
    raise CheckpointError(
        f"{path}: its weights fit no known backbone ({', '.join(sorted(resnets))}); for "
        "another one, give arch"
    )
