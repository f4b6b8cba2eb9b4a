"""Save and load models.

`model.safetensors` holds the weights and, in its metadata, everything else that rebuilds the model.
Plain state_dicts of other repositories (`.pt`) are read and written by upstream.py, exports of
Matryoshka ViT compression (`.pth`) by vit_pth.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from matryoshka import tensor_files
from matryoshka.checkpoint import upstream, vit_pth
from matryoshka.checkpoint.contents import (
    FORMAT,
    TRAINING_FORMAT,
    CheckpointError,
    Contents,
    first_line,
    preprocessing_of,
)
from matryoshka.checkpoint.torch_files import load_plain
from matryoshka.data import CenterCrop
from matryoshka.data.augment import Preprocessing
from matryoshka.files import write_atomically
from matryoshka.models import FAMILIES, ModelSpec, NestedModel, build, extract

EXPORTS = ("safetensors", "pth")  # formats of `export_dims`

# ---------------------------------------------------------------- writing


def save_model(model: NestedModel, path: str | Path, config: Mapping | None = None) -> None:
    """Write `model.safetensors`: weights, model spec, preprocessing, class names and the (flat)
    training config.
    """
    metadata = {"format": FORMAT, **describe(model), "config": dict(config or {})}
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    write_atomically(path, *tensor_files.encode(tensors, metadata))


def describe(model: NestedModel) -> dict[str, Any]:
    """Everything but the weights that is needed to rebuild a model, as a JSON object."""
    spec = asdict(model.spec)
    # Only models that use them have these keys: files of all others keep their bytes.
    for name in ("arch_options", "neck"):
        if not spec[name]:
            spec.pop(name)
    return {
        "model": spec,
        "preprocessing": asdict(model.preprocessing),
        "classes": model.classes,
    }


def export_dims(
    model: NestedModel, folder: str | Path, stem: str, formats: Sequence[str] = EXPORTS
) -> list[Path]:
    """Write one file per dim and format: `<stem>_dim<d>.safetensors`, and `.pth` for families.

    Returns their paths. Files that are there are replaced. CheckpointError for a model that the
    .pth layout does not have, before any file is written.
    """
    folder = Path(folder)
    members = {dim: extract(model, dim) for dim in model.dims}
    if "pth" in formats:
        for dim, member in members.items():
            vit_pth.vit_kwargs(member, folder / f"{stem}_dim{dim}.pth")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for dim, member in members.items():
        for suffix in formats:
            path = folder / f"{stem}_dim{dim}.{suffix}"
            if suffix == "pth":
                vit_pth.save_vit_pth(member, path)
            else:
                save_model(member, path)
            written.append(path)
    return written


# ---------------------------------------------------------------- reading


def load_model(
    path: str | Path,
    *,
    mrl: bool = False,
    efficient: bool = False,
    rep_size: int | None = None,
    dims: tuple[int, ...] | None = None,
    arch: str | None = None,
    old_ckpt: bool = False,
) -> NestedModel:
    """Load the model of a checkpoint, on the CPU, in eval mode.

    Its input is normalised float [B, 3, H, W], its output logits [G, B, C].

    `model.safetensors` needs no further argument. A bare upstream `.pt` gets its architecture, head
    and dims from a `params.json` in the same folder, or, without one, from its keys and shapes. The
    flags supply what keys and shapes do not determine: `efficient` for an old-style MRL-E file
    (same keys as a fixed feature), `dims` for MRL-E prefixes other than the powers of two.
    `old_ckpt` requires a file with the old keys. `model.notes` lists the assumptions that were
    made. CheckpointError names the file and every contradiction with a flag.
    """
    path = Path(path)
    requested = {
        "mrl": mrl,
        "efficient": efficient,
        "rep_size": rep_size,
        "dims": dims,
        "arch": arch,
    }
    contents = read(path, efficient=efficient, dims=dims, arch=arch, old_ckpt=old_ckpt)
    # All checks that need no model come first: a file may claim any size.
    _check_requested(path, contents.spec, requested)
    _check_head(path, contents.spec, contents.state)
    try:
        # Options, necks and the dims of families can claim any width; an architecture has one.
        if contents.spec.arch_options or contents.spec.neck or contents.spec.arch in FAMILIES:
            _check_shapes(path, contents.spec, contents.state)
        model = build(contents.spec)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: {first_line(error)}") from None
    try:
        model.load_state_dict(contents.state)
    except RuntimeError as error:
        raise CheckpointError(
            f"{path}: the weights do not fit {contents.spec.arch}: {first_line(error)}"
        ) from None
    model.preprocessing = contents.preprocessing
    model.classes = contents.classes
    model.notes = contents.notes
    return model.eval()


def read(
    path: str | Path,
    *,
    efficient: bool = False,
    dims: tuple[int, ...] | None = None,
    arch: str | None = None,
    old_ckpt: bool = False,
) -> Contents:
    """Read a model file without building its model. The flags are those of load_model."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such checkpoint file; give a model.safetensors or a .pt file"
        )
    if path.resolve().suffix == ".safetensors" or tensor_files.is_safetensors(path):
        _refuse_old_style(path, old_ckpt)
        contents = _read_safetensors(path)
    else:
        stored = load_plain(path)
        if vit_pth.is_vit_pth(stored):
            _refuse_old_style(path, old_ckpt)
            contents = vit_pth.read(path, stored)
        else:
            contents = upstream.read(
                path, stored, efficient=efficient, dims=dims, arch=arch, old_ckpt=old_ckpt
            )
    problem = _problem(contents)
    if problem:
        raise CheckpointError(
            f"{path}: {problem}; write the checkpoint again, or get another copy of it"
        )
    return contents


def _refuse_old_style(path: Path, old_ckpt: bool) -> None:
    if old_ckpt:
        raise CheckpointError(
            f"{path}: a Matryoshka checkpoint, not one of upstream's old style; drop old_ckpt"
        )


def _read_safetensors(path: Path) -> Contents:
    try:
        stored = tensor_files.read(path)
        metadata = stored.metadata
        if metadata is None or metadata.get("format") not in (FORMAT, TRAINING_FORMAT):
            raise CheckpointError(
                f"{path}: a safetensors file, but not a Matryoshka checkpoint "
                f"(no {FORMAT} metadata)"
            )
        # A training checkpoint has the optimizer's tensors beside the model's. `encoder` names
        # the part to load; older files lack the key and hold a classifier.
        trained = metadata["format"] == TRAINING_FORMAT
        state = stored.tensors(metadata.get("encoder", "model.") if trained else "")
        model = metadata["model"]  # JSON turned its tuple into a list
        spec = ModelSpec(**{**model, "dims": tuple(model["dims"])})
        preprocessing = preprocessing_of(metadata)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except (TypeError, KeyError, RecursionError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: not a whole safetensors checkpoint ({first_line(error)})"
        ) from None
    notes = [] if stored.is_sealed else [tensor_files.OLD_NOTE]
    return Contents(spec, preprocessing, metadata.get("classes"), notes, state)


# ---------------------------------------------------------------- checks of a file's contents


def _problem(contents: Contents) -> str | None:
    """Why no model can be built from the contents; None if one can."""
    spec = contents.spec
    # arch, efficient and blurpool may have any JSON type in a damaged or hostile file
    flags_are_bool = isinstance(spec.efficient, bool) and isinstance(spec.blurpool, bool)
    if not isinstance(spec.arch, str) or not flags_are_bool:
        return (
            f"its arch, efficient and blurpool are {spec.arch!r}, {spec.efficient!r} and "
            f"{spec.blurpool!r}"
        )
    if not isinstance(spec.arch_options, dict):
        return f"its arch_options are {spec.arch_options!r}, not names and values"
    if not isinstance(spec.neck, str):
        return f"its neck is {spec.neck!r}"
    # A saved model has the encoder's sizes there: opening a checkpoint opens no other file.
    if isinstance(spec.arch_options.get("vqvae"), str):
        return f"its arch_options name another file, vqvae={spec.arch_options['vqvae']!r}"
    if type(spec.num_classes) is not int or spec.num_classes < 1:
        return f"its number of classes is {spec.num_classes!r}"
    dims_are_int = all(type(d) is int for d in spec.dims)  # a bool is an int to isinstance
    if not spec.dims or not dims_are_int or any(a >= b for a, b in pairwise((0, *spec.dims))):
        return f"its dims {list(spec.dims)!r} are not positive and increasing"
    if not _is_valid_preprocessing(contents.preprocessing):
        return f"its {contents.preprocessing} is not valid"

    names = contents.classes
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return "its classes are not a list of names"
    if names and len(names) != spec.num_classes:
        return f"it has {len(names)} names for {spec.num_classes} classes"
    return None


def _is_valid_preprocessing(preprocessing: Preprocessing) -> bool:
    mean = preprocessing.mean
    std = preprocessing.std
    try:
        CenterCrop(preprocessing.size, preprocessing.ratio)  # ValueError outside of its ranges
        return (
            type(preprocessing.size) is int
            and len(mean) == len(std) == 3
            and min(std) > 0
            and all(math.isfinite(value) for value in (*mean, *std))
        )
    except (TypeError, ValueError, OverflowError):
        return False


def _check_head(path: Path, spec: ModelSpec, state: Mapping[str, Tensor]) -> None:
    """Compare the classifiers' shapes with the spec, before memory of the claimed size is
    allocated.
    """
    widths = spec.dims[-1:] if spec.efficient else spec.dims
    for i, d in enumerate(widths):
        weight = state.get(f"head.heads.{i}.weight")
        shape = "missing" if weight is None else list(weight.shape)
        expected = [spec.num_classes, d]
        if shape != expected:
            raise CheckpointError(
                f"{path}: classifier {i} is {shape}, by its dims and classes it should be "
                f"{expected}"
            )


def _check_shapes(path: Path, spec: ModelSpec, state: Mapping[str, Tensor]) -> None:
    """Compare all shapes with the spec on the meta device: options may claim any width."""
    with torch.device("meta"):
        expected = {key: value.shape for key, value in build(spec).state_dict().items()}
    if expected != {key: value.shape for key, value in state.items()}:
        raise CheckpointError(
            f"{path}: the weights do not fit {spec.arch} with arch_options={spec.arch_options}"
        )


def _check_requested(path: Path, spec: ModelSpec, requested: Mapping[str, Any]) -> None:
    """CheckpointError for flags that contradict the file.

    Otherwise a user would take the numbers of one model for those of another.
    """
    head = spec.head_name
    if requested["efficient"] and head != "mrl-e":
        raise CheckpointError(
            f"{path}: efficient was requested, but the checkpoint's head is {head}; drop the flag"
        )
    if requested["mrl"] and not requested["efficient"] and head != "mrl":
        hint = "add the efficient flag" if head == "mrl-e" else "drop the flag"
        raise CheckpointError(
            f"{path}: mrl was requested, but the checkpoint's head is {head}; {hint}"
        )

    rep_size = requested["rep_size"]
    dims = requested["dims"]
    arch = requested["arch"]
    if rep_size is not None and rep_size != spec.dims[-1]:
        raise CheckpointError(
            f"{path}: rep_size {rep_size} was requested, but the checkpoint's is {spec.dims[-1]}"
        )
    if dims is not None and tuple(dims) != spec.dims:
        raise CheckpointError(
            f"{path}: dims {list(dims)} were requested, but the checkpoint has {list(spec.dims)}"
        )
    if arch is not None and arch != spec.arch:
        raise CheckpointError(
            f"{path}: arch {arch} was requested, but the checkpoint's is {spec.arch}"
        )
