"""Where a run starts: weights to begin with (`model.init`) and stages that keep them
(`model.freeze`).

The study behind it: a nested head on a trunk that was trained without one reaches 5 % top-1 at d =
8 with the trunk frozen and 60 % as more stages train with it (Kusupati et al., arXiv 2205.13147,
table 26).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from matryoshka import checkpoint
from matryoshka.data.augment import Preprocessing
from matryoshka.models import (
    RESNETS,
    TIMM,
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
FIRST_WEIGHTS = (
    "IMAGENET1K_V1"  # what upstream's pretrained=1 loads; every ResNet of torchvision has them
)


def start_model(
    config: ModelConfig, spec: ModelSpec, classes: list[str] | None = None
) -> tuple[NestedModel, list[str]]:
    """(a new model with the start weights and the frozen stages of the options, one line for each
    thing done).

    Published weights are downloaded into the caches of torch and Hugging Face. A checkpoint gives
    the trunk, and the head where kind, prefixes, classes and (`classes`) their names agree.
    `model.preprocessing` has the mean and std that the start weights were trained with: training
    has to normalise with them. ModelError, one line.
    """
    init = start_weights(config)
    weights = init and _published(init, spec.arch)
    model = build(spec, weights)
    notes = []
    if weights:
        cfg = getattr(
            model.trunk, "pretrained_cfg", None
        )  # timm's; torchvision's are trained with the defaults
        if cfg:
            model.preprocessing = Preprocessing(mean=tuple(cfg["mean"]), std=tuple(cfg["std"]))
        notes.append(f"trunk from {init}; the head starts fresh")
    elif init:
        state, model.preprocessing, note = _from_file(init, model, classes)
        model.load_state_dict(state, strict=False)  # it was compared: only a fresh head is missing
        notes.append(note)
    if model.preprocessing != Preprocessing():
        notes.append(
            f"images are normalised as there: mean {model.preprocessing.mean}, std "
            f"{model.preprocessing.std}"
        )
    if frozen := apply_freeze(model, config.freeze):
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
    """ModelError for what start_model would refuse, without a download and without memory for the
    weights.

    sizes: pixels of the square images that the model will get; not every model of timm takes every
    size, or gives features [B, D] at all. Unchecked remain the network and the content of published
    weights.
    """
    init = start_weights(config)
    with torch.device("meta"):
        model = build(spec)
    if init and not _published(init, spec.arch):
        _from_file(init, model, classes)
    apply_freeze(model, config.freeze)
    for size in sorted(set(sizes)) if spec.arch.startswith(TIMM) else ():  # a ResNet takes any
        try:
            shape = tuple(model.features(torch.empty(2, 3, size, size, device="meta")).shape)
        except Exception as error:  # whatever that model says to a size that it cannot take
            native = "x".join(
                str(n) for n in getattr(model.trunk, "pretrained_cfg", {}).get("input_size", ())[1:]
            )
            raise ModelError(
                f"model.arch={spec.arch} does not take images of {size} pixels, it was made for "
                f"{native}: "
                f"{one_line(error)}"
            ) from None
        if shape != (2, model.width):
            raise ModelError(
                f"model.arch={spec.arch} gives features of shape {list(shape)} for 2 images, not "
                "one vector each; "
                "choose another model"
            )


# ---------------------------------------------------------------- start weights


def start_weights(config: ModelConfig) -> str | None:
    """`model.init`, or what its alias `model.pretrained` stands for. ModelError where both are
    given and differ.
    """
    if not config.pretrained:
        return config.init or None
    meant = config.arch if config.arch.startswith(TIMM) else f"{TORCHVISION}{config.arch}"
    if config.init and _untagged(config.init) != _untagged(meant):
        raise ModelError(
            f"model.pretrained=1 means model.init={meant}, but model.init={config.init}; leave "
            "one out"
        )
    return config.init or meant


def _untagged(name: str) -> str:
    """timm:resnet18.a1_in1k -> timm:resnet18; torchvision:resnet50.IMAGENET1K_V2 ->
    torchvision:resnet50.
    """
    return name.partition(".")[0]


def _published(init: str, arch: str) -> str | None:
    """Which weights `build` has to ask for; None where `init` is a file."""
    if not init.startswith((TORCHVISION, TIMM)):
        return None
    theirs = _untagged(init).removeprefix(TORCHVISION)  # as model.arch would say it
    if theirs != _untagged(arch):
        raise ModelError(
            f"model.init={init} does not fit model.arch={arch}; add --model.arch={theirs}"
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

        known = sorted(get_model_weights(theirs).__members__) if theirs in RESNETS else []
        if weights in known:
            return weights
    raise ModelError(
        f"model.init={init}: no such weights are published; known: {', '.join(known) or 'none'}"
    )


def _from_file(
    path: str, model: NestedModel, classes: list[str] | None
) -> tuple[dict[str, Tensor], Preprocessing, str]:
    """(what `model` takes from a checkpoint, its mean and std, a line about it). `model` may be on
    the meta device.
    """
    spec = model.spec
    if not Path(path).is_file():
        raise ModelError(
            f"model.init={path}: no such file; give a checkpoint, {TORCHVISION}NAME or {TIMM}NAME"
        )
    try:
        # the file says what it is, but a bare .pt can be compared with only one of timm's models
        found = checkpoint.read(path, arch=spec.arch if spec.arch.startswith(TIMM) else None)
    except checkpoint.CheckpointError as error:
        raise ModelError(f"model.init: {error}") from None
    if _untagged(found.spec.arch) != _untagged(spec.arch):
        raise ModelError(
            f"model.init={path} is a {found.spec.arch}, model.arch={spec.arch}; add "
            f"--model.arch={found.spec.arch}"
        )
    note, state, like = f"trunk from {path}", found.state, model.state_dict()
    if found.spec.blurpool != spec.blurpool:
        state = with_or_without_blurpool(state, like)
        note += f", BlurPool {'added' if spec.blurpool else 'left out'}"
    if reason := _other_head(found, spec, classes):
        state = {key: value for key, value in state.items() if not key.startswith("head.")}
        like = {key: value for key, value in like.items() if not key.startswith("head.")}
    expected, given = (
        {key: tuple(v.shape) for key, v in weights.items()} for weights in (like, state)
    )
    for key in sorted(expected | given):
        if expected.get(key) != given.get(key):
            there, here = (
                list(shapes[key]) if key in shapes else "missing" for shapes in (given, expected)
            )
            raise ModelError(
                f"model.init={path} does not fit {spec.arch}: {key} is {there} there, {here} here"
            )
    note += f"; the head starts fresh: {reason}" if reason else " with its head"
    return state, Preprocessing(mean=found.preprocessing.mean, std=found.preprocessing.std), note


def _other_head(found: checkpoint.Contents, spec: ModelSpec, classes: list[str] | None) -> str:
    """Why the head of a checkpoint is not that of `spec`; empty where it is.

    An MRL-E head fits other prefixes of the same length: its columns are the same.
    """
    theirs = found.spec
    if theirs.head_name != spec.head_name:
        return f"{theirs.head_name} there, {spec.head_name} here"
    there, here = (s.dims[-1:] if s.efficient else s.dims for s in (theirs, spec))
    if there != here:
        return f"dims {list(theirs.dims)} there, {list(spec.dims)} here"
    if theirs.num_classes != spec.num_classes:
        return f"{theirs.num_classes} classes there, {spec.num_classes} here"
    return (
        "the class names differ" if found.classes and classes and found.classes != classes else ""
    )


# ---------------------------------------------------------------- frozen stages


def apply_freeze(model: NestedModel, freeze: str) -> int:
    """Keep stages of the trunk as they are: no gradients, and eval mode whatever `model.train()` is
    called with.

    freeze: "" none, "trunk" all of it, or names separated by commas: modules or parameters of the
    trunk (`layer1`, `blocks.0`, `cls_token`), and `stem` for a ResNet's conv1 and bn1. Replaces
    what was frozen before. Returns the number of frozen parameters (scalars). ModelError lists the
    known stages.
    """
    parameters = dict(model.trunk.named_parameters())
    inside = [
        prefix
        for part in freeze.split(",")
        if part.strip()
        for prefix in _prefixes(part.strip(), model.trunk)
    ]
    frozen = {name for name in parameters if any(_is_inside(name, prefix) for prefix in inside)}
    for name, parameter in parameters.items():
        parameter.requires_grad_(name not in frozen)
    modules = {name for name, _ in model.trunk.named_modules()}
    model.frozen = tuple(f"trunk.{prefix}".rstrip(".") for prefix in inside if prefix in modules)
    model.train(model.training)
    return sum(parameters[name].numel() for name in frozen)


def _is_inside(name: str, prefix: str) -> bool:
    return not prefix or name == prefix or name.startswith(f"{prefix}.")


def _prefixes(stage: str, trunk: nn.Module) -> list[str]:
    """The names in the trunk that a stage stands for. ModelError where it has no parameters."""
    names = [name for name, _ in trunk.named_parameters()]
    aliases = {"trunk": [""]}
    tops = list(dict.fromkeys(name.partition(".")[0] for name in names))
    if {"conv1", "bn1"} <= set(tops) and "stem" not in tops:
        aliases["stem"] = ["conv1", "bn1"]
        tops = [name for name in tops if name not in ("conv1", "bn1")]
    if stage in aliases:
        return aliases[stage]
    if any(_is_inside(name, stage) for name in names):
        return [stage]
    known = [*aliases, *tops]
    every = {
        ".".join(parts[: i + 1])
        for parts in (name.split(".") for name in names)
        for i in range(len(parts))
    }
    near = difflib.get_close_matches(stage, [*known, *sorted(every)], n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise ModelError(
        f"model.freeze: {stage!r} is no stage of this trunk{hint}; known: {', '.join(known)}, "
        "and parts of them"
    )
