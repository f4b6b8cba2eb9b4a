"""Model files: the only door between training and everything after it.

`model.safetensors` holds the weights and, in its metadata, what rebuilds the model alone.
upstream.py reads and writes the plain state_dicts of other repositories.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from matryoshka.checkpoint import upstream
from matryoshka.checkpoint.contents import (
    FORMAT,
    TRAINING_FORMAT,
    CheckpointError,
    Contents,
    first_line,
)
from matryoshka.data import CenterCrop
from matryoshka.data.augment import Preprocessing
from matryoshka.files import write_atomically
from matryoshka.models import ModelSpec, NestedModel, build

# ---------------------------------------------------------------- writing


def save_model(model: NestedModel, path: str | Path, config: Mapping | None = None) -> None:
    """Write `model.safetensors`: weights + model spec, preprocessing, class names and (flat)
    training config.
    """
    about = {"format": FORMAT, **describe(model), "config": dict(config or {})}
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    write_atomically(path, save(tensors, {"matryoshka": json.dumps(about)}))


def describe(model: NestedModel) -> dict:
    """What rebuilds a model, beside its weights, as JSON holds it."""
    spec = asdict(model.spec)
    if not spec["arch_options"]:
        del spec["arch_options"]  # so that files without any keep their bytes
    return {
        "model": spec,
        "preprocessing": asdict(model.preprocessing),
        "classes": model.classes,
    }


def preprocessing_of(about: Mapping) -> Preprocessing:
    """What `describe` wrote."""
    given = about["preprocessing"]
    return Preprocessing(**{**given, "mean": tuple(given["mean"]), "std": tuple(given["std"])})


# ---------------------------------------------------------------- reading


def load_model(
    path: str | Path,
    mrl: bool = False,
    efficient: bool = False,
    rep_size: int | None = None,
    dims: tuple[int, ...] | None = None,
    arch: str | None = None,
    old_ckpt: bool = False,
) -> NestedModel:
    """The model of a checkpoint, on the CPU, in eval mode. Input normalised float [B, 3, H, W],
    logits [G, B, C].

    `model.safetensors` needs no further argument. For a bare upstream `.pt`, a `params.json` beside
    it gives arch, head and dims; without one they come from keys and shapes, and the flags decide
    what those cannot tell: `efficient` for an old-style MRL-E file (same keys as a fixed feature),
    `dims` for MRL-E prefixes other than the powers of two. `old_ckpt` insists on a file with the
    old keys. `model.notes` lists what had to be assumed. CheckpointError names file and
    disagreement.
    """
    path = Path(path)
    asked = {"mrl": mrl, "efficient": efficient, "rep_size": rep_size, "dims": dims, "arch": arch}
    spec, preprocessing, classes, notes, state = read(
        path, efficient=efficient, dims=dims, arch=arch, old_ckpt=old_ckpt
    )
    _check_asked(path, spec, asked)
    _check_head(path, spec, state)
    try:
        model = build(spec)
    except ValueError as error:
        raise CheckpointError(f"{path}: {first_line(error)}") from None
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            f"{path}: the weights do not fit {spec.arch}: {first_line(error)}"
        ) from None
    model.preprocessing, model.classes, model.notes = preprocessing, classes, notes
    return model.eval()


def read(
    path: str | Path,
    *,
    efficient: bool = False,
    dims: tuple[int, ...] | None = None,
    arch: str | None = None,
    old_ckpt: bool = False,
) -> Contents:
    """A model file without building its model. The flags decide what a bare `.pt` cannot tell, as
    in load_model.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such checkpoint file; give a model.safetensors or a .pt file"
        )
    if path.suffix == ".safetensors":
        if old_ckpt:
            raise CheckpointError(
                f"{path}: not a checkpoint of upstream's old style, but one of ours; drop old_ckpt"
            )
        contents = _read_safetensors(path)
    else:
        contents = upstream.read(
            path, {"efficient": efficient, "dims": dims, "arch": arch, "old_ckpt": old_ckpt}
        )
    if problem := _problem(contents):
        raise CheckpointError(
            f"{path}: {problem}; write the checkpoint again, or get another copy of it"
        )
    return contents


def _problem(contents: Contents) -> str | None:
    """What no model can be built from."""
    spec, shown = contents.spec, contents.preprocessing
    arch, num_classes, dims = spec.arch, spec.num_classes, spec.dims
    efficient, blurpool, options = spec.efficient, spec.blurpool, spec.arch_options
    if not (isinstance(options, dict) and all(isinstance(key, str) for key in options)):
        return f"its arch_options are {options!r}"
    if not (isinstance(arch, str) and isinstance(efficient, bool) and isinstance(blurpool, bool)):
        return f"its arch, efficient and blurpool are {arch!r}, {efficient!r} and {blurpool!r}"
    if type(num_classes) is not int or num_classes < 1:
        return f"its number of classes is {num_classes!r}"
    if (
        not dims
        or any(type(d) is not int for d in dims)
        or any(a >= b for a, b in pairwise((0, *dims)))
    ):
        return f"its dims {list(dims)!r} are not positive and increasing"
    try:
        CenterCrop(shown.size, shown.ratio)
        sound = type(shown.size) is int and len(shown.mean) == len(shown.std) == 3
        sound = sound and min(shown.std) > 0 and all(map(math.isfinite, (*shown.mean, *shown.std)))
    except (TypeError, ValueError, OverflowError):
        sound = False
    if not sound:
        return f"its {shown} makes no sense"
    names = contents.classes
    if names is not None and not (
        isinstance(names, list) and all(isinstance(name, str) for name in names)
    ):
        return "its classes are not a list of names"
    return (
        f"it has {len(names)} names for {num_classes} classes"
        if names and len(names) != num_classes
        else None
    )


def _check_head(path: Path, spec: ModelSpec, state: Mapping[str, Tensor]) -> None:
    """Before a classifier of the sizes that a file claims is allocated."""
    for i, d in enumerate(spec.dims[-1:] if spec.efficient else spec.dims):
        weight = state.get(f"head.heads.{i}.weight")
        shape, expected = "missing" if weight is None else list(weight.shape), [spec.num_classes, d]
        if shape != expected:
            raise CheckpointError(
                f"{path}: classifier {i} is {shape}, by its dims and classes it should be "
                f"{expected}"
            )


def _check_asked(path: Path, spec: ModelSpec, asked: dict) -> None:
    """Flags that contradict the file are an error: nobody should read numbers of another model than
    asked for.
    """
    head = spec.head_name
    if asked["efficient"] and head != "mrl-e":
        raise CheckpointError(
            f"{path}: efficient was asked for, but the checkpoint's head is {head}; drop the flag"
        )
    if asked["mrl"] and not asked["efficient"] and head != "mrl":
        hint = "add the efficient flag" if head == "mrl-e" else "drop the flag"
        raise CheckpointError(
            f"{path}: mrl was asked for, but the checkpoint's head is {head}; {hint}"
        )
    if asked["rep_size"] is not None and asked["rep_size"] != spec.dims[-1]:
        raise CheckpointError(
            f"{path}: rep_size {asked['rep_size']} was asked for, but the checkpoint's is "
            f"{spec.dims[-1]}"
        )
    if asked["dims"] is not None and tuple(asked["dims"]) != spec.dims:
        raise CheckpointError(
            f"{path}: dims {list(asked['dims'])} were asked for, the checkpoint has "
            f"{list(spec.dims)}"
        )
    if asked["arch"] is not None and asked["arch"] != spec.arch:
        raise CheckpointError(
            f"{path}: arch {asked['arch']} was asked for, but the checkpoint is a {spec.arch}"
        )


def _read_safetensors(path: Path) -> Contents:
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("matryoshka", "null"))
            if not isinstance(about, dict) or about.get("format") not in (FORMAT, TRAINING_FORMAT):
                raise CheckpointError(
                    f"{path}: a safetensors file, but not one of ours (no {FORMAT} metadata)"
                )
            prefix = (
                "" if about["format"] == FORMAT else "model."
            )  # beside the optimizer's state and more
            keys = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118 (not a dict)
            state = {key[len(prefix) :]: file.get_tensor(key) for key in keys}
        model = about["model"]
        spec = ModelSpec(**{**model, "dims": tuple(model["dims"])})
        preprocessing = preprocessing_of(about)
    except CheckpointError:
        raise
    except (SafetensorError, OSError, TypeError, KeyError, RecursionError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a whole safetensors checkpoint ({first_line(error)})"
        ) from None
    return Contents(spec, preprocessing, about.get("classes"), [], state)
