"""Transfer learning: initial weights (`model.init`) and frozen stages (`model.freeze`).

A nested head on a trunk that was trained without one reaches 5 % top-1 at d = 8 with the trunk
frozen, and 60 % as more stages train with it (Kusupati et al., arXiv 2205.13147, table 26).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from matryoshka import checkpoint, tensor_files
from matryoshka.checkpoint.torch_files import is_whole, load_plain
from matryoshka.data.augment import Preprocessing
from matryoshka.environment import free_memory
from matryoshka.models import (
    RESNETS,
    TIMM,
    TIMM_NAMES,
    ModelConfig,
    ModelError,
    ModelSpec,
    NestedModel,
    build,
    import_timm,
    one_line,
)
from matryoshka.models.blurpool import with_or_without_blurpool

__all__ = ["apply_freeze", "check_start", "start_model"]

TORCHVISION = "torchvision:"
FIRST_WEIGHTS = "IMAGENET1K_V1"  # upstream's pretrained=1; every ResNet of torchvision has them


def start_model(
    config: ModelConfig, spec: ModelSpec, classes: list[str] | None = None
) -> tuple[NestedModel, list[str]]:
    """Build a model with the initial weights and frozen stages of the options.

    Returns the model and notes for the user, one line per action. Published weights are downloaded
    into the caches of torch and Hugging Face. A checkpoint provides the trunk, and also the head if
    its kind, prefixes and class names (`classes`) agree.

    `model.preprocessing` gets the mean and std of the initial weights: training must normalise with
    them. ModelError, one line, if the weights do not fit.
    """
    init = start_weights(config)
    weights = _published(init, spec.arch) if init else None
    model = build(spec, weights)
    notes = []
    if weights:
        # timm's models know their mean and std; torchvision's are trained with the defaults
        cfg = getattr(model.trunk, "pretrained_cfg", None)
        if cfg:
            model.preprocessing = Preprocessing(mean=tuple(cfg["mean"]), std=tuple(cfg["std"]))
        notes.append(f"trunk from {init}; the head is initialised at random")
    elif init:
        state, model.preprocessing, note = _from_file(init, model, classes)
        # not strict: _from_file has compared all keys, and only a new head may be missing
        model.load_state_dict(state, strict=False)
        notes.append(note)

    if model.preprocessing != Preprocessing():
        notes.append(
            f"images are normalised as for these weights: mean {model.preprocessing.mean}, std "
            f"{model.preprocessing.std}"
        )
    frozen = apply_freeze(model, config.freeze)
    if frozen:
        total = sum(p.numel() for p in model.parameters())
        random = "" if init else ", at random weights (no model.init)"
        notes.append(f"{frozen:,} of {total:,} parameters are frozen ({config.freeze}){random}")
    return model, notes


def check_start(
    config: ModelConfig,
    spec: ModelSpec,
    classes: list[str] | None = None,
    sizes: Iterable[int] = (),
) -> None:
    """Raise the ModelErrors of start_model without downloads and without memory for weights.

    sizes: side lengths in pixels of the training images; some timm models accept only some sizes,
    or do not return features [B, D]. The network and the content of published weights remain
    unchecked.
    """
    init = start_weights(config)
    with torch.device("meta"):
        model = build(spec)
    _check_memory(model)
    if init and not _published(init, spec.arch):
        _from_file(init, model, classes)
    apply_freeze(model, config.freeze)
    if spec.arch not in ("resnet10", *RESNETS):  # which accept every size
        for size in sorted(set(sizes)):
            _check_size(model, size)


def _check_memory(model: NestedModel) -> None:
    """ModelError for a model whose weights alone do not fit: the system would end the process."""
    count = sum(parameter.numel() for parameter in model.parameters())
    free = free_memory()
    if free is not None and 4 * count > free:
        raise ModelError(
            f"model.arch={model.spec.arch}: {count:,} parameters need {4 * count / 1e9:,.1f} GB, "
            f"{free / 1e9:,.1f} GB are free; choose a smaller model"
        )


def _check_size(model: NestedModel, size: int) -> None:
    """ModelError unless the trunk, on the meta device, maps images of `size` pixels to [B, D]."""
    arch = model.spec.arch
    try:
        shape = tuple(model.features(torch.empty(2, 3, size, size, device="meta")).shape)
    except ModelError as error:
        raise ModelError(f"model.arch={arch}: {error}") from None
    except Exception as error:  # each timm model raises its own type for an unsupported size
        native_size = getattr(model.trunk, "pretrained_cfg", {}).get("input_size", ())[1:]
        native = f", its size is {'x'.join(map(str, native_size))}" if native_size else ""
        raise ModelError(
            f"model.arch={arch} does not accept images of {size} pixels{native}: {one_line(error)}"
        ) from None
    if shape != (2, model.width):
        raise ModelError(
            f"model.arch={arch} returns features of shape {list(shape)} for 2 images, not one "
            "vector each; choose another model"
        )


# ---------------------------------------------------------------- initial weights


def start_weights(config: ModelConfig) -> str | None:
    """`model.init`, or the value that its alias `model.pretrained` stands for.

    ModelError if both are given and differ.
    """
    if not config.pretrained:
        return config.init or None
    full_name = _full_name(config.arch)
    alias = full_name if full_name.startswith(TIMM) else f"{TORCHVISION}{full_name}"
    if config.init and _untagged(config.init) != _untagged(alias):
        raise ModelError(
            f"model.pretrained=1 means model.init={alias}, but model.init={config.init}; leave "
            "one out"
        )
    return config.init or alias


def _full_name(arch: str) -> str:
    """vit_timm -> timm:vit_base_patch16_384; other names as they are."""
    return f"{TIMM}{TIMM_NAMES[arch]}" if arch in TIMM_NAMES else arch


def _untagged(name: str) -> str:
    """timm:resnet18.a1_in1k -> timm:resnet18; torchvision:resnet50.IMAGENET1K_V2 ->
    torchvision:resnet50.
    """
    return name.partition(".")[0]


def _published(init: str, arch: str) -> str | None:
    """The name of published weights for `build`; None if `init` is a file."""
    if not init.startswith((TORCHVISION, TIMM)):
        return None
    init_arch = _untagged(init).removeprefix(TORCHVISION)  # in the notation of model.arch
    if init_arch != _untagged(_full_name(arch)):
        raise ModelError(
            f"model.init={init} does not fit model.arch={arch}; add --model.arch={init_arch}"
        )
    if init.startswith(TIMM):
        weights = init.removeprefix(TIMM)
        timm = import_timm(f"model.init={init}")
        if timm.models.is_model_pretrained(weights):
            return weights
        known = [name for name in timm.list_pretrained() if _untagged(name) == _untagged(weights)]
    else:
        weights = init.removeprefix(TORCHVISION).partition(".")[2] or FIRST_WEIGHTS
        from torchvision.models import get_model_weights

        known = sorted(get_model_weights(init_arch).__members__) if init_arch in RESNETS else []
        if weights in known:
            return weights
    raise ModelError(
        f"model.init={init}: no such weights are published; known: {', '.join(known) or 'none'}"
    )


def _from_file(
    path: str, model: NestedModel, classes: list[str] | None
) -> tuple[dict[str, Tensor], Preprocessing, str]:
    """(weights for `model`, mean and std, a note) of a checkpoint.

    All keys and shapes are compared here. `model` may be on the meta device.
    """
    spec = model.spec
    try:
        contents = _read_init(path, spec.arch)
    except ModelError:
        bare = _bare_trunk(path, model)
        if bare is None:
            raise
        return bare
    note = f"trunk from {path}"
    state = contents.state
    expected = model.state_dict()
    # BlurPool only renames convolutions and adds constants: weights fit with it and without.
    if contents.spec.blurpool != spec.blurpool:
        state = with_or_without_blurpool(state, expected)
        note += f", BlurPool {'added' if spec.blurpool else 'left out'}"

    if contents.spec.neck != spec.neck:
        state, expected = _without("neck.", state), _without("neck.", expected)
        left_out = f"its neck {contents.spec.neck} is left out"
        note += f"; {'the neck is initialised at random' if spec.neck else left_out}"
    reason = _head_difference(contents, spec, classes)
    if reason:
        state, expected = _without("head.", state), _without("head.", expected)
        note += f"; the head is initialised at random: {reason}"
    else:
        note += " with its head"

    for key in sorted(expected.keys() | state.keys()):
        in_model = list(expected[key].shape) if key in expected else "missing"
        in_file = list(state[key].shape) if key in state else "missing"
        if in_model != in_file:
            raise ModelError(
                f"model.init={path} does not fit {spec.arch}: {key} is {in_file} in the file, "
                f"{in_model} in the model"
            )
    # Only mean and std: the image size belongs to the new run.
    preprocessing = Preprocessing(mean=contents.preprocessing.mean, std=contents.preprocessing.std)
    return state, preprocessing, note


def _read_init(path: str, arch: str) -> checkpoint.Contents:
    """Read the checkpoint of `model.init`. ModelError unless its backbone is `arch`."""
    if not Path(path).is_file():
        raise ModelError(
            f"model.init={path}: no such file; give a checkpoint, {TORCHVISION}NAME or {TIMM}NAME"
        )
    try:
        # A bare .pt is recognised among our backbones, but timm has too many models to try.
        contents = checkpoint.read(path, arch=arch if arch.startswith(TIMM) else None)
    except checkpoint.CheckpointError as error:
        raise ModelError(f"model.init: {error}") from None
    if _untagged(contents.spec.arch) != _untagged(arch):
        raise ModelError(
            f"model.init={path} is a {contents.spec.arch}, but model.arch={arch}; add "
            f"--model.arch={contents.spec.arch}"
        )
    return contents


def _bare_trunk(
    path: str, model: NestedModel
) -> tuple[dict[str, Tensor], Preprocessing, str] | None:
    """As _from_file, of a file of another program in which the trunk's weights are somewhere, under
    their own names: encoder.pth, relic_model.pth, best_model.pt; None if they are not all there.
    """
    try:
        tensors = _foreign_tensors(Path(path))
    except (checkpoint.CheckpointError, tensor_files.TensorFileError, OSError):
        return None
    wanted = {name: tensor.shape for name, tensor in model.trunk.state_dict().items()}
    first = next(iter(wanted))
    prefixes = [name.removesuffix(first) for name in tensors if name.endswith(first)]
    # Of two towers the target is the encoder that is kept; the shortest name is the outermost.
    for prefix in sorted(prefixes, key=lambda p: ("target" not in p, len(p))):
        found = {name: tensors.get(prefix + name) for name in wanted}
        state = {}
        for name, tensor in found.items():
            if tensor is not None and tensor.shape == wanted[name] and is_whole(tensor):
                state[f"trunk.{name}"] = tensor
        if len(state) == len(wanted):
            where = f" ({prefix.rstrip('.')})" if prefix else ""
            note = f"trunk from {path}{where}; the head is initialised at random"
            return state, Preprocessing(), note
    return None


def _foreign_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of torch.save, or of a safetensors file that is not ours; by name."""
    if not tensor_files.is_safetensors(path):
        return dict(_named_tensors(load_plain(path)))
    stored = tensor_files.read(path)
    if stored.metadata is not None:
        raise tensor_files.TensorFileError("a file of this project has another reader")
    return stored.tensors()


def _named_tensors(stored: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested dictionaries, named by their keys with dots between them."""
    if isinstance(stored, Tensor):
        yield path, stored
    elif isinstance(stored, Mapping):
        for key, value in stored.items():
            yield from _named_tensors(value, f"{path}.{key}" if path else str(key))


def _without(part: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not key.startswith(part)}


def _head_difference(
    contents: checkpoint.Contents, spec: ModelSpec, classes: list[str] | None
) -> str:
    """Why the head of a checkpoint does not fit `spec`; empty if it fits.

    An MRL-E head fits all prefixes of the same longest width, because they share its columns.
    """
    stored = contents.spec
    if stored.neck != spec.neck:
        return "the features differ"
    if stored.head_name != spec.head_name:
        return f"{stored.head_name} in the file, {spec.head_name} in the model"
    stored_widths = stored.dims[-1:] if stored.efficient else stored.dims
    model_widths = spec.dims[-1:] if spec.efficient else spec.dims
    if stored_widths != model_widths:
        return f"dims {list(stored.dims)} in the file, {list(spec.dims)} in the model"
    if stored.num_classes != spec.num_classes:
        return f"{stored.num_classes} classes in the file, {spec.num_classes} in the model"
    # Equal numbers of classes may be different classes: an output would then have another meaning.
    if contents.classes and classes and contents.classes != classes:
        return "the class names differ"
    return ""


# ---------------------------------------------------------------- frozen stages


def apply_freeze(model: NestedModel, freeze: str) -> int:
    """Freeze stages of the trunk: no gradients, and eval mode even after `model.train()`.

    freeze: "" for none, "trunk" for all, or a comma-separated list of modules or parameters of the
    trunk (`layer1`, `blocks.0`, `cls_token`); `stem` means a ResNet's conv1 and bn1. Replaces the
    previous selection. Returns the number of frozen parameters (scalars). ModelError lists the
    known stages.
    """
    stages = [stage.strip() for stage in freeze.split(",") if stage.strip()]
    prefixes = []
    for stage in stages:
        prefixes += _stage_prefixes(stage, model.trunk)

    frozen = 0
    for name, parameter in model.trunk.named_parameters():
        is_frozen = any(_is_inside(name, prefix) for prefix in prefixes)
        parameter.requires_grad_(not is_frozen)
        if is_frozen:
            frozen += parameter.numel()

    # Eval mode is a property of modules: a frozen parameter such as cls_token has none.
    modules = {name for name, _ in model.trunk.named_modules()}
    model.frozen = tuple(f"trunk.{prefix}".rstrip(".") for prefix in prefixes if prefix in modules)
    model.train(model.training)  # applies the selection to the current mode
    return frozen


def _is_inside(name: str, prefix: str) -> bool:
    return not prefix or name == prefix or name.startswith(f"{prefix}.")


def _stage_prefixes(stage: str, trunk: nn.Module) -> list[str]:
    """Name prefixes of the parameters of a stage. ModelError if it has none."""
    names = [name for name, _ in trunk.named_parameters()]
    aliases = {"trunk": [""]}
    top_level = list(dict.fromkeys(name.partition(".")[0] for name in names))
    if {"conv1", "bn1"} <= set(top_level) and "stem" not in top_level:
        aliases["stem"] = ["conv1", "bn1"]
        top_level = [name for name in top_level if name not in ("conv1", "bn1")]
    if stage in aliases:
        return aliases[stage]
    if any(_is_inside(name, stage) for name in names):
        return [stage]

    known = [*aliases, *top_level]
    paths = set()  # layer1, layer1.0, layer1.0.conv1, ...
    for name in names:
        parts = name.split(".")
        paths |= {".".join(parts[:length]) for length in range(1, len(parts) + 1)}
    near = difflib.get_close_matches(stage, [*known, *sorted(paths)], n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise ModelError(
        f"model.freeze: {stage!r} is not a stage of this trunk{hint}; known: {', '.join(known)}, "
        "and parts of them"
    )
