"""Backbones with a nested head: `build(ModelSpec)` -> NestedModel.

options.py      ModelConfig (section `model`) and ModelSpec, which rebuilds a model; without torch
model.py        NestedModel, build, with_prefixes, model_spec
backbones.py    BACKBONES: trunks by name; start here to add one
resnets.py      torchvision's ResNets and a ResNet-10
timm_models.py  `timm:NAME`
blurpool.py     anti-aliased strided convolutions
"""

from typing import TYPE_CHECKING

from matryoshka import lazy
from matryoshka.models.options import ModelConfig, ModelError, ModelSpec

if TYPE_CHECKING:
    from matryoshka.models.backbones import BACKBONES, backbone
    from matryoshka.models.model import (
        NestedModel,
        build,
        model_spec,
        shortest_prefix,
        with_prefixes,
    )
    from matryoshka.models.resnets import RESNETS
    from matryoshka.models.timm_models import TIMM, import_timm, one_line

__all__ = [
    "BACKBONES",
    "RESNETS",
    "TIMM",
    "ModelConfig",
    "ModelError",
    "ModelSpec",
    "NestedModel",
    "backbone",
    "build",
    "import_timm",
    "model_spec",
    "one_line",
    "shortest_prefix",
    "with_prefixes",
]

__getattr__ = lazy.attribute(
    __name__,
    {
        "backbones": ("BACKBONES", "backbone"),
        "model": ("NestedModel", "build", "model_spec", "shortest_prefix", "with_prefixes"),
        "resnets": ("RESNETS",),
        "timm_models": ("TIMM", "import_timm", "one_line"),
    },
)
