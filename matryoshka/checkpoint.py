"""Model files: the only door between training and everything after it.

Ours: `model.safetensors` (weights, and in its metadata what rebuilds the model alone). Also read and written:
the plain state_dicts of MRL's and ffcv-imagenet's repositories, whose key names are known here and only here.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple
from itertools import count, pairwise, takewhile
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from matryoshka.data import CenterCrop
from matryoshka.data.augment import Preprocessing
from matryoshka.models import BACKBONES, TIMM, ModelSpec, NestedModel, backbone, build
from matryoshka.models.blurpool import apply_blurpool
from matryoshka.nested import check_dims, default_dims

FORMAT, TRAINING_FORMAT = "matryoshka-model-1", "matryoshka-training-1"


class CheckpointError(ValueError):
    """A file that is not the checkpoint that was asked for; the message names the file and the remedy."""

    user_error = True


# ---------------------------------------------------------------- writing


def save_model(model: NestedModel, path: str | Path, config: Mapping | None = None) -> None:
    """Write `model.safetensors`: weights + model spec, preprocessing, class names and (flat) training config."""
    about = {"format": FORMAT, **describe(model), "config": dict(config or {})}
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    write_atomically(path, save(tensors, {"matryoshka": json.dumps(about)}))


def describe(model: NestedModel) -> dict:
    """What rebuilds a model, beside its weights, as JSON holds it."""
    return {
        "model": asdict(model.spec), "preprocessing": asdict(model.preprocessing), "classes": model.classes
    }  # fmt: skip


def preprocessing_of(about: Mapping) -> Preprocessing:
    """What `describe` wrote."""
    given = about["preprocessing"]
    return Preprocessing(**{**given, "mean": tuple(given["mean"]), "std": tuple(given["std"])})


def save_upstream(model: NestedModel, path: str | Path) -> None:
    """Write `final_weights.pt`: a plain state_dict with upstream's keys, always behind its `module.` prefix."""
    buffer = io.BytesIO()
    torch.save({f"module.{key}": value for key, value in to_upstream(model).items()}, buffer)
    write_atomically(path, buffer.getvalue())


def write_atomically(path: str | Path, *content: bytes | memoryview) -> None:
    """Replace `path` by `content`, whole or not at all: temporary name, flush to disk, rename, flush the folder."""
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder; give the name of a file")
        _replace(path, path.with_name(f".{path.name}.{os.getpid()}.tmp"), content)
    except OSError as error:  # a full disk, too, has an error without a file's name
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def _replace(path: Path, temporary: Path, content: Sequence[bytes | memoryview]) -> None:
    try:
        file = os.open(temporary, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC, 0o666)
        try:
            for part in content:
                rest = memoryview(part)
                while rest:
                    rest = rest[os.write(file, rest) :]
            os.fsync(file)
        finally:
            os.close(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


# ---------------------------------------------------------------- key names


def to_upstream(model: NestedModel) -> dict[str, Tensor]:
    """Weights under upstream's names: torchvision's for the trunk, `fc.*` for the head; no `module.` prefix."""
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


# ---------------------------------------------------------------- reading


class Contents(NamedTuple):
    """What a model file says: all that rebuilds the model. state: weights under our names."""

    spec: ModelSpec
    preprocessing: Preprocessing
    classes: list[str] | None
    notes: list[str]
    state: dict[str, Tensor]


def load_model(
    path: str | Path,
    mrl: bool = False,
    efficient: bool = False,
    rep_size: int | None = None,
    dims: tuple[int, ...] | None = None,
    arch: str | None = None,
    old_ckpt: bool = False,
) -> NestedModel:
    """The model of a checkpoint, on the CPU, in eval mode. Input normalised float [B, 3, H, W], logits [G, B, C].

    `model.safetensors` needs no further argument. For a bare upstream `.pt`, a `params.json` beside it gives
    arch, head and dims; without one they come from keys and shapes, and the flags decide what those cannot tell:
    `efficient` for an old-style MRL-E file (same keys as a fixed feature), `dims` for MRL-E prefixes other than
    the powers of two. `old_ckpt` insists on a file with the old keys.
    `model.notes` lists what had to be assumed. CheckpointError names file and disagreement.
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
        raise CheckpointError(f"{path}: {_first_line(error)}") from None
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: the weights do not fit {spec.arch}: {_first_line(error)}") from None
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
    """A model file without building its model. The flags decide what a bare `.pt` cannot tell, as in load_model."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint file; give a model.safetensors or a .pt file")
    if path.suffix == ".safetensors":
        if old_ckpt:
            raise CheckpointError(f"{path}: not a checkpoint of upstream's old style, but one of ours; drop old_ckpt")
        contents = _read_safetensors(path)
    else:
        contents = _read_upstream(path, {"efficient": efficient, "dims": dims, "arch": arch, "old_ckpt": old_ckpt})
    if problem := _problem(contents):
        raise CheckpointError(f"{path}: {problem}; write the checkpoint again, or get another copy of it")
    return contents


def _problem(contents: Contents) -> str | None:
    """What no model can be built from."""
    (arch, num_classes, dims, efficient, blurpool), shown = astuple(contents.spec), contents.preprocessing
    if not (isinstance(arch, str) and isinstance(efficient, bool) and isinstance(blurpool, bool)):
        return f"its arch, efficient and blurpool are {arch!r}, {efficient!r} and {blurpool!r}"
    if type(num_classes) is not int or num_classes < 1:
        return f"its number of classes is {num_classes!r}"
    if not dims or any(type(d) is not int for d in dims) or any(a >= b for a, b in pairwise((0, *dims))):
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
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        return "its classes are not a list of names"
    return f"it has {len(names)} names for {num_classes} classes" if names and len(names) != num_classes else None


def _check_head(path: Path, spec: ModelSpec, state: Mapping[str, Tensor]) -> None:
    """Before a classifier of the sizes that a file claims is allocated."""
    for i, d in enumerate(spec.dims[-1:] if spec.efficient else spec.dims):
        weight = state.get(f"head.heads.{i}.weight")
        shape, expected = "missing" if weight is None else list(weight.shape), [spec.num_classes, d]
        if shape != expected:
            raise CheckpointError(f"{path}: classifier {i} is {shape}, by its dims and classes it should be {expected}")


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[min(1, len(lines) - 1)] if lines else type(error).__name__


def _check_asked(path: Path, spec: ModelSpec, asked: dict) -> None:
    """Flags that contradict the file are an error: nobody should read numbers of another model than asked for."""
    head = spec.head_name
    if asked["efficient"] and head != "mrl-e":
        raise CheckpointError(f"{path}: efficient was asked for, but the checkpoint's head is {head}; drop the flag")
    if asked["mrl"] and not asked["efficient"] and head != "mrl":
        hint = "add the efficient flag" if head == "mrl-e" else "drop the flag"
        raise CheckpointError(f"{path}: mrl was asked for, but the checkpoint's head is {head}; {hint}")
    if asked["rep_size"] is not None and asked["rep_size"] != spec.dims[-1]:
        raise CheckpointError(
            f"{path}: rep_size {asked['rep_size']} was asked for, but the checkpoint's is {spec.dims[-1]}"
        )
    if asked["dims"] is not None and tuple(asked["dims"]) != spec.dims:
        raise CheckpointError(
            f"{path}: dims {list(asked['dims'])} were asked for, the checkpoint has {list(spec.dims)}"
        )
    if asked["arch"] is not None and asked["arch"] != spec.arch:
        raise CheckpointError(f"{path}: arch {asked['arch']} was asked for, but the checkpoint is a {spec.arch}")


def _read_safetensors(path: Path) -> Contents:
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("matryoshka", "null"))
            if not isinstance(about, dict) or about.get("format") not in (FORMAT, TRAINING_FORMAT):
                raise CheckpointError(f"{path}: a safetensors file, but not one of ours (no {FORMAT} metadata)")
            prefix = "" if about["format"] == FORMAT else "model."  # beside the optimizer's state and more
            keys = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118 (not a dict)
            state = {key[len(prefix) :]: file.get_tensor(key) for key in keys}
        model = about["model"]
        spec = ModelSpec(**{**model, "dims": tuple(model["dims"])})
        preprocessing = preprocessing_of(about)
    except CheckpointError:
        raise
    except (SafetensorError, OSError, TypeError, KeyError, RecursionError, ValueError) as error:
        raise CheckpointError(f"{path}: not a whole safetensors checkpoint ({_first_line(error)})") from None
    return Contents(spec, preprocessing, about.get("classes"), [], state)


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    """An upstream state_dict without its `module.` prefix. weights_only: a pickle that wants more is refused."""
    try:
        with warnings.catch_warnings():  # torch warns of plain pickles before it refuses them
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception:  # whatever an unpickler stumbles over; torch's own message advises to run the file's code
        raise CheckpointError(
            f"{path}: not a checkpoint of plain tensors (an HTML page? a pickle that wants to run code? cut off?); "
            "give a state_dict that torch.save wrote, or a model.safetensors"
        ) from None
    plain = isinstance(state, Mapping) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    if not plain or not state:
        raise CheckpointError(f"{path}: not a plain state_dict; expected upstream's final_weights.pt")
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return dict(state)


def _read_upstream(path: Path, asked: dict) -> Contents:
    state = _read_state_dict(path)
    params = _params_beside(path)
    notes: list[str] = []
    widths = _head_widths(path, state)
    widest = widths[-1]
    trunk = {key: tuple(value.shape) for key, value in state.items() if not key.startswith("fc.")}
    arch, trunk_width, blurpool = _recognise(path, trunk, asked["arch"] or params.get("model.arch"))

    nested_keys = "fc.weight" not in state
    if asked["old_ckpt"] and nested_keys and len(widths) == 1:  # MRL and fixed features kept their keys
        raise CheckpointError(
            f"{path}: not of upstream's old style: its MRL-E classifier is nesting_classifier_0; drop old_ckpt"
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
                f"{path}: params.json beside it says model.mrl=1, but it has one classifier, fc.weight"
            )
        if widest == trunk_width and not params:
            notes.append(
                f"read as a fixed feature of width {widest}; an old-style MRL-E file looks the same: "
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
    for key, expected in {"model.arch": str, "model.nesting_start": int, "validation.resolution": int}.items():
        if not isinstance(params.get(key), expected | None) or (expected is int and (params.get(key) or 0) < 0):
            raise CheckpointError(f"{file}: {key} is {params[key]!r}; mend or remove it")
    return params


def _head_widths(path: Path, state: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Input widths of the classifiers, in order."""
    names = ["fc.weight"] if "fc.weight" in state else []
    names = names or list(takewhile(state.__contains__, map("fc.nesting_classifier_{}.weight".format, count())))
    if not names:
        raise CheckpointError(f"{path}: no classifier (fc.weight or fc.nesting_classifier_0.weight) among its keys")
    for name in names:
        weight = state[name]
        plain = weight.layout == torch.strided and weight.device.type == "cpu" and weight.ndim == 2
        if not plain or weight.untyped_storage().nbytes() < weight.nbytes:  # a small file can claim any shape
            raise CheckpointError(f"{path}: {name}, {list(weight.shape)}, is no whole matrix; get another copy of it")
    return tuple(state[name].shape[1] for name in names)


def _shared_dims(path: Path, asked: dict, params: dict, width: int, notes: list[str]) -> tuple[int, ...]:
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
        f"MRL-E weights do not tell their prefixes: {list(dims)} assumed; if it was trained with others, give dims"
    )
    return dims


def _recognise(path: Path, trunk: dict[str, tuple[int, ...]], arch: str | None) -> tuple[str, int, bool]:
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
    raise CheckpointError(f"{path}: its weights fit no known backbone ({', '.join(sorted(BACKBONES))})")
