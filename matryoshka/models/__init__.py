"""Backbones with a nested head: `build(ModelSpec)` -> NestedModel.

options.py      ModelConfig (section `model`) and ModelSpec, which rebuilds a model; without torch
model.py        NestedModel, build, with_prefixes, model_spec
backbones.py    BACKBONES: trunks by name; start here to add one
nested_vit.py   families of transformers nested in their width
macs.py         multiply-adds of a model, PFLOP of a run
resnets.py      torchvision's ResNets and a ResNet-10
timm_models.py  `timm:NAME`, mobilevit, vit_timm
vit.py          transformers for small images: vit, vit_small, ..., cct; patches.py: their tokens
cait.py swin.py mixers.py   CaiT, Swin, MLP-Mixer and ConvMixer for small images
small.py        ResNets and VGG for small images
fast_cnn.py     a convolutional net that learns small images fast
vqvae.py        VQ-VAE whose encoder makes tokens
sizes.py        checks of a net's options
blurpool.py     anti-aliased strided convolutions
"""

from typing import TYPE_CHECKING

from matryoshka import lazy
from matryoshka.models.options import FAMILIES, ModelConfig, ModelError, ModelSpec

if TYPE_CHECKING:
    from matryoshka.models.backbones import BACKBONES, backbone, option_names
    from matryoshka.models.macs import module_multiply_adds, multiply_adds, pflop
    from matryoshka.models.model import (
        FamilyModel,
        NestedModel,
        build,
        extract,
        model_spec,
        shortest_prefix,
        widest,
        with_prefixes,
    )
    from matryoshka.models.resnets import RESNETS
    from matryoshka.models.timm_models import TIMM, TIMM_NAMES, import_timm, one_line

__all__ = [
    "BACKBONES",
    "FAMILIES",
    "RESNETS",
    "TIMM",
    "TIMM_NAMES",
    "FamilyModel",
    "ModelConfig",
    "ModelError",
    "ModelSpec",
    "NestedModel",
    "backbone",
    "build",
    "extract",
    "import_timm",
    "model_spec",
    "module_multiply_adds",
    "multiply_adds",
    "one_line",
    "option_names",
    "pflop",
    "shortest_prefix",
    "widest",
    "with_prefixes",
]

__getattr__ = lazy.attribute(
    __name__,
    {
        "backbones": ("BACKBONES", "backbone", "option_names"),
        "macs": ("module_multiply_adds", "multiply_adds", "pflop"),
        "model": (
            "FamilyModel",
            "NestedModel",
            "build",
            "extract",
            "model_spec",
            "shortest_prefix",
            "widest",
            "with_prefixes",
        ),
        "resnets": ("RESNETS",),
        "timm_models": ("TIMM", "TIMM_NAMES", "import_timm", "one_line"),
    },
)
