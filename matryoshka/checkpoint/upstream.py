"""The plain state_dicts of MRL's and ffcv-imagenet's repositories, whose key names are known here
and only here.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Mapping
from itertools import count, takewhile
from pathlib import Path

import torch
from torch import Tensor

from matryoshka.checkpoint.contents import CheckpointError, Contents
from matryoshka.data.augment import Preprocessing
from matryoshka.files import write_atomically
from matryoshka.models import BACKBONES, TIMM, ModelSpec, NestedModel, backbone
from matryoshka.models.blurpool import apply_blurpool
from matryoshka.nested import check_dims, default_dims


def save_upstream(model: NestedModel, path: str | Path) -> None:
    """Write `final_weights.pt`: a plain state_dict with upstream's keys, always behind its
    `module.` prefix.
    """
    buffer = io.BytesIO()
    torch.save({f"module.{key}": value for key, value in to_upstream(model).items()}, buffer)
    write_atomically(path, buffer.getvalue())


def to_upstream(model: NestedModel) -> dict[str, Tensor]:
    """Weights under upstream's names: torchvision's for the trunk, `fc.*` for the head; no
    `module.` prefix.
    """
    state = {}
    for key, value in model.state_dict().items():
        room, rest = key.split(".", 1)
        if room == "head":
            i, leaf = rest.removeprefix("heads.").split(".")
            rest = f"fc.nesting_classifier_{i}.{leaf}" if len(model.dims) > 1 else f"fc.{leaf}"
        state[rest] = value.detach().cpu().contiguous()
    return state


def from_upstream(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names for upstream's (without prefix), in its new and its old style."""
    ours = {}
    for key, value in state.items():
        if key.startswith("fc.nesting_classifier_"):
            ours[f"head.heads.{key.removeprefix('fc.nesting_classifier_')}"] = value
        elif key.startswith("fc."):
            ours[f"head.heads.0.{key.removeprefix('fc.')}"] = value
        else:
            ours[f"trunk.{key}"] = value
    return ours


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    """An upstream state_dict without its `module.` prefix. weights_only: a pickle that wants more
    is refused.
    """
    try:
        with warnings.catch_warnings():  # torch warns of plain pickles before it refuses them
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (
        Exception
    ):  # whatever an unpickler stumbles over; torch's own message advises to run the file's code
        raise CheckpointError(
            f"{path}: not a checkpoint of plain tensors (an HTML page? a pickle that wants to "
            "run code? cut off?); "
            "give a state_dict that torch.save wrote, or a model.safetensors"
        ) from None
    plain = isinstance(state, Mapping) and all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
    )
    if not plain or not state:
        raise CheckpointError(
            f"{path}: not a plain state_dict; expected upstream's final_weights.pt"
        )
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return dict(state)


def read(path: Path, asked: dict) -> Contents:
    state = _read_state_dict(path)
    params = _params_beside(path)
    notes: list[str] = []
    widths = _head_widths(path, state)
    widest = widths[-1]
    trunk = {key: tuple(value.shape) for key, value in state.items() if not key.startswith("fc.")}
    arch, trunk_width, blurpool = _recognise(path, trunk, asked["arch"] or params.get("model.arch"))

    nested_keys = "fc.weight" not in state
    if (
        asked["old_ckpt"] and nested_keys and len(widths) == 1
    ):  # MRL and fixed features kept their keys
        raise CheckpointError(
            f"{path}: not of upstream's old style: its MRL-E classifier is nesting_classifier_0; "
            "drop old_ckpt"
        )
    said_efficient = asked["efficient"] or bool(params.get("model.efficient"))
    if len(widths) > 1:  # one classifier per prefix: MRL, its dims are in the shapes
        dims, efficient = widths, False
    elif nested_keys or said_efficient:  # MRL-E: the dims are in no shape
        dims, efficient = _shared_dims(path, asked, params, widest, notes), True
    else:
        dims, efficient = widths, False
        if params.get("model.mrl"):
            raise CheckpointError(
                f"{path}: params.json beside it says model.mrl=1, but it has one classifier, "
                "fc.weight"
            )
        if widest == trunk_width and not params:
            notes.append(
                f"read as a fixed feature of width {widest}; an old-style MRL-E file looks the "
                "same: "
                "if it is one, ask for efficient"
            )
    num_classes = len(state["fc.nesting_classifier_0.weight" if nested_keys else "fc.weight"])
    size = params.get("validation.resolution")
    preprocessing = Preprocessing(size=int(size)) if size else Preprocessing()
    spec = ModelSpec(arch, num_classes, dims, efficient, blurpool)
    return Contents(spec, preprocessing, None, notes, from_upstream(state))


def _params_beside(path: Path) -> dict:
    file = path.with_name("params.json")
    if not file.is_file():
        return {}
    try:
        params = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file}: not valid JSON ({error}); mend or remove it") from None
    params = params if isinstance(params, dict) else {}
    for key, expected in {
        "model.arch": str,
        "model.nesting_start": int,
        "validation.resolution": int,
    }.items():
        if not isinstance(params.get(key), expected | None) or (
            expected is int and (params.get(key) or 0) < 0
        ):
            raise CheckpointError(f"{file}: {key} is {params[key]!r}; mend or remove it")
    return params


def _head_widths(path: Path, state: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Input widths of the classifiers, in order."""
    names = ["fc.weight"] if "fc.weight" in state else []
    names = names or list(
        takewhile(state.__contains__, map("fc.nesting_classifier_{}.weight".format, count()))
    )
    if not names:
        raise CheckpointError(
            f"{path}: no classifier (fc.weight or fc.nesting_classifier_0.weight) among its keys"
        )
    for name in names:
        weight = state[name]
        plain = weight.layout == torch.strided and weight.device.type == "cpu" and weight.ndim == 2
        if (
            not plain or weight.untyped_storage().nbytes() < weight.nbytes
        ):  # a small file can claim any shape
            raise CheckpointError(
                f"{path}: {name}, {list(weight.shape)}, is no whole matrix; get another copy of it"
            )
    return tuple(state[name].shape[1] for name in names)


def _shared_dims(
    path: Path, asked: dict, params: dict, width: int, notes: list[str]
) -> tuple[int, ...]:
    """The prefixes of an MRL-E classifier of that width."""
    given = params.get("model.dims") or None if asked["dims"] is None else asked["dims"]
    try:
        if given is not None:
            dims = check_dims(given, width)
            if dims[-1] == width:
                return dims
            raise ValueError(f"dims {list(dims)} end before the width {width}")
        if params.get("model.nesting_start") is not None:
            return default_dims(width, 2 ** min(params["model.nesting_start"], 31))
    except (TypeError, ValueError, OverflowError) as error:
        place = "asked for" if asked["dims"] is not None else "in params.json beside it"
        raise CheckpointError(f"{path}: {error} of its classifier ({place})") from None
    dims = default_dims(width)
    notes.append(
        f"MRL-E weights do not tell their prefixes: {list(dims)} assumed; if it was trained with "
        "others, give dims"
    )
    return dims


def _recognise(
    path: Path, trunk: dict[str, tuple[int, ...]], arch: str | None
) -> tuple[str, int, bool]:
    """(arch, feature width, blurpool) whose trunk has exactly these keys and shapes."""
    blurpool = any(key.endswith(".blur_filter") for key in trunk)
    named = [arch] if arch and (arch in BACKBONES or arch.startswith(TIMM)) else []
    for name in named or BACKBONES:  # timm's are too many to try
        with torch.device("meta"):
            candidate, width = backbone(name)
            if blurpool:
                apply_blurpool(candidate)
        if {key: tuple(value.shape) for key, value in candidate.state_dict().items()} == trunk:
            return name, width, blurpool
    if arch:
        raise CheckpointError(f"{path}: its weights are not those of a {arch}")
    raise CheckpointError(
        f"{path}: its weights fit no known backbone ({', '.join(sorted(BACKBONES))})"
    )
