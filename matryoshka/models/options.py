"""Model options (section `model`) and the description that rebuilds a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


class ModelError(ValueError):
    """A model option that cannot be met; the message names the option and the remedy."""

    user_error = True


@dataclass(frozen=True)
class ModelConfig:
    """Section `model`."""

    arch: str = field(
        default="resnet18",
        metadata={"help": "backbone: a ResNet by its torchvision name, or timm:NAME"},
    )
    pretrained: bool = field(
        default=False, metadata={"help": "short for model.init=torchvision:<arch>, or timm:"}
    )
    init: str | None = field(
        default=None,
        metadata={
            "help": "start weights: a checkpoint (.safetensors, .pt), "
            "torchvision:NAME[.WEIGHTS], timm:NAME"
        },
    )
    freeze: str = field(
        default="",
        metadata={
            "help": "stages that keep their start weights: trunk, or e.g. stem,layer1,layer2 or "
            "patch_embed"
        },
    )
    mrl: bool = field(default=False, metadata={"help": "MRL: one classifier per prefix"})
    efficient: bool = field(
        default=False, metadata={"help": "MRL-E: one classifier sliced per prefix; wins over mrl"}
    )
    nesting_start: int = field(
        default=3, metadata={"help": "the shortest prefix is 2^nesting_start"}
    )
    fixed_feature: int = field(
        default=0,
        metadata={"help": "baseline: width of the feature that is classified; 0 is the trunk's"},
    )
    dims: tuple[int, ...] | None = field(
        default=None,
        metadata={
            "help": "prefix lengths, e.g. 8,12,512; unset: powers of two from 2^nesting_start to "
            "the width"
        },
    )
    relative_importance: tuple[float, ...] | None = field(
        default=None, metadata={"help": "loss weight of each prefix; unset: all 1"}
    )


@dataclass(frozen=True)
class ModelSpec:
    """All that is needed to rebuild a model without its training config."""

    arch: str
    num_classes: int
    dims: tuple[int, ...]
    efficient: bool = False
    blurpool: bool = False
    arch_options: dict[str, Any] = field(default_factory=dict)

    @property
    def head_name(self) -> str:
        """`mrl`, `mrl-e` or `ff<width>`."""
        if len(self.dims) == 1:
            return f"ff{self.dims[0]}"
        return "mrl-e" if self.efficient else "mrl"
