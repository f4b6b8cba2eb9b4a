"""Backbones with a nested head: `build(ModelSpec)` -> NestedModel.

options.py  ModelConfig and ModelSpec, without torch
model.py    NestedModel and its backbones
"""

from typing import TYPE_CHECKING

from matryoshka import lazy
from matryoshka.models.options import ModelConfig, ModelError, ModelSpec

if TYPE_CHECKING:
    from matryoshka.models.model import (
        BACKBONES,
        RESNETS,
        TIMM,
        NestedModel,
        backbone,
        build,
        import_timm,
        model_spec,
        one_line,
        shortest_prefix,
        with_prefixes,
    )

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
        "model": (
            "BACKBONES",
            "RESNETS",
            "TIMM",
            "NestedModel",
            "backbone",
            "build",
            "import_timm",
            "model_spec",
            "one_line",
            "shortest_prefix",
            "with_prefixes",
        )
    },
)
