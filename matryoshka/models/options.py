"""Options and specification of a model, without torch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from matryoshka.config import option
from matryoshka.config.limits import MAX_DIM, MAX_NESTING_START, MAX_WEIGHT

# Families of transformers nested in their width: their dims are widths, see nested_vit.py.
FAMILIES = ("vit_nested", "vit_independent", "vit_nested_proj")


class ModelError(ValueError):
    """A model option that cannot be met; the message names the option and the remedy."""

    user_error = True


def parse_arch_options(pairs: tuple[str, ...] | None) -> dict[str, Any]:
    """("patch=4", "pool=mean") -> {"patch": 4, "pool": "mean"}: numbers, true, false, null as in
    JSON, anything else as text. ValueError for a pair without `=` and a name given twice.
    """
    parsed: dict[str, Any] = {}
    for pair in pairs or ():
        name, equals, text = pair.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"{pair!r}: expected name=value")
        if name in parsed:
            raise ValueError(f"{name} is given twice")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        parsed[name] = value if isinstance(value, int | float | str | None) else text
    return parsed


def _check_pairs(pairs: tuple[str, ...]) -> None:
    parse_arch_options(pairs)


def parse_neck(text: str) -> tuple[str, tuple[int, ...]]:
    """ "mlp:512,128" -> ("mlp", (512, 128)). ValueError for anything that is not a neck."""
    kind, _, numbers = text.partition(":")
    try:
        widths = tuple(int(number) for number in numbers.split(","))
    except ValueError:
        widths = ()
    if kind not in ("linear", "mlp") or not widths or min(widths) < 1:
        raise ValueError("expected linear:WIDTH, or mlp:WIDTH,...,WIDTH")
    if max(widths) > MAX_DIM:
        raise ValueError(f"expected widths of at most {MAX_DIM}")
    if kind == "linear" and len(widths) > 1:
        raise ValueError("linear has one width; several are mlp:WIDTH,...,WIDTH")
    return kind, widths


def _check_neck(text: str) -> None:
    if text:
        parse_neck(text)


@dataclass(frozen=True)
class ModelConfig:
    """Section `model`."""

    arch: str = option(
        "resnet18",
        help="backbone: a ResNet by its torchvision name, timm:NAME, a net for small images "
        "(docs/models.md), or a family of widths (docs/nested_vits.md)",
        common=True,
    )
    arch_options: tuple[str, ...] | None = option(
        None,
        help="further options of the backbone, e.g. patch=4,dim=128",
        check=_check_pairs,
    )
    neck: str = option(
        "",
        help="layers behind the backbone that are part of the encoder: linear:WIDTH, or "
        "mlp:WIDTH,...,WIDTH with batch norm",
        check=_check_neck,
    )
    pretrained: bool = option(
        False, help="short for model.init=torchvision:<arch>, or timm: for a model of timm"
    )
    init: str | None = option(
        None,
        help="initial weights: a checkpoint (.safetensors, .pt), torchvision:NAME[.WEIGHTS], "
        "timm:NAME",
        common=True,
        existing=True,
    )
    freeze: str = option(
        "",
        help="stages that keep their initial weights: trunk, or e.g. stem,layer1,layer2 or "
        "patch_embed",
    )
    mrl: bool = option(False, help="MRL: one classifier per prefix", common=True)
    efficient: bool = option(
        False, help="MRL-E: one classifier sliced per prefix; wins over mrl", common=True
    )
    nesting_start: int = option(
        3, help="the shortest prefix is 2^nesting_start", low=0, high=MAX_NESTING_START
    )
    fixed_feature: int = option(
        0,
        help="baseline: width of the classified feature; 0: the backbone's width",
        low=0,
        high=MAX_DIM,
    )
    dims: tuple[int, ...] | None = option(
        None,
        help="prefix lengths, e.g. 8,12,512, or the widths of a family; unset: powers of two from "
        "2^nesting_start to the width",
        low=1,
        high=MAX_DIM,
    )
    relative_importance: tuple[float, ...] | None = option(
        None, help="loss weight of each prefix; unset: all 1", low=0, high=MAX_WEIGHT
    )


@dataclass(frozen=True)
class ModelSpec:
    """All that is needed to rebuild a model without its training config.

    arch_options: further keywords of the backbone's builder, as JSON holds them. neck: layers
    behind the backbone, see neck.py; the dims are prefixes of their output.
    """

    arch: str
    num_classes: int
    dims: tuple[int, ...]
    efficient: bool = False
    blurpool: bool = False
    arch_options: dict[str, Any] = field(default_factory=dict, hash=False)
    neck: str = ""

    @property
    def head_name(self) -> str:
        """`mrl`, `mrl-e` or `ff<width>`."""
        if len(self.dims) == 1:
            return f"ff{self.dims[0]}"
        return "mrl-e" if self.efficient else "mrl"
