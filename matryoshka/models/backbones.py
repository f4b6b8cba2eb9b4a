"""Backbones by name.

To add one: write a function `(weights: str | None, **options) -> (trunk, width)` and enter it in
BACKBONES. The trunk maps images [B, 3, H, W] to features [B, D]. It may have

initialise_from(images)   called with normalised images before the first step of a training
saved_options             options of the saved model where the builder's own name a file
normalisation             (mean, std) of the images that a part of it was trained on
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from matryoshka.models.cait import CAIT_NETS, cait
from matryoshka.models.fast_cnn import fast_cnn
from matryoshka.models.mixers import convmixer, mlpmixer
from matryoshka.models.options import FAMILIES, ModelError
from matryoshka.models.resnets import RESNETS, resnet10, torchvision_resnet
from matryoshka.models.small import RESNETS_32, small_resnet, vgg
from matryoshka.models.swin import swin
from matryoshka.models.timm_models import TIMM, mobilevit, one_line, timm_model, vit_timm
from matryoshka.models.vit import VIT_NETS, cct, vision_transformer

BACKBONES: dict[str, Callable[..., tuple[nn.Module, int]]] = {
    "resnet10": resnet10,
    **{name: partial(torchvision_resnet, name) for name in RESNETS},
    **{name: partial(vision_transformer, name, **VIT_NETS[name]) for name in VIT_NETS},
    "cct": cct,
    **{name: partial(cait, name, **CAIT_NETS[name]) for name in CAIT_NETS},
    "swin": swin,
    "mlpmixer": mlpmixer,
    "convmixer": convmixer,
    "mobilevit": mobilevit,
    "vit_timm": vit_timm,
    **{name: partial(small_resnet, name) for name in RESNETS_32},
    "vgg": vgg,
    "fast_cnn": fast_cnn,
}


def backbone(
    arch: str, weights: str | None = None, options: Mapping[str, Any] | None = None
) -> tuple[nn.Module, int]:
    """(trunk, feature width) of the architecture `arch`: a key of BACKBONES, or timm:NAME.

    `weights` names published weights for the trunk, which are downloaded; None initialises at
    random. `options` are keyword arguments of the builder. ModelError for an unknown name, weights
    that cannot be loaded, or an option that the builder does not accept.
    """
    build_trunk = _builder(arch)
    _check_names(arch, options or {})
    try:
        return build_trunk(weights, **(options or {}))
    except ModelError:  # names the option already
        raise
    except Exception as error:
        # An unknown option, missing weights, no network, a damaged file: each library raises its
        # own exceptions. Without options and weights the error is ours and keeps its traceback.
        if weights is None:
            if not options:
                raise
            raise ModelError(f"model.arch_options={options}: {one_line(error)}") from error
        raise ModelError(
            f"model.init: cannot load the weights {weights} of {arch}: {one_line(error)}"
        ) from error


def option_names(arch: str) -> tuple[str, ...] | None:
    """Names of the options of `arch`; None if another library's builder decides."""
    if arch in FAMILIES:
        from matryoshka.models.nested_vit import MEMBER, SHARING

        # The widths of a family are its dims.
        members = option_names(MEMBER) or ()
        return tuple(name for name in (*members, *SHARING) if name not in ("dim", "vqvae"))
    parameters = inspect.signature(_builder(arch)).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return tuple(parameter.name for parameter in parameters if parameter.name != "weights")


def _check_names(arch: str, options: Mapping[str, Any]) -> None:
    known = option_names(arch)
    if known is None:
        return
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ModelError(
                f"model.arch_options: {arch} has no option {name}{hint}; its options: "
                f"{', '.join(known)}"
            )


def _builder(arch: str) -> Callable[..., tuple[nn.Module, int]]:
    if arch.startswith(TIMM):
        return partial(timm_model, arch.removeprefix(TIMM))
    if arch in BACKBONES:
        return BACKBONES[arch]
    if arch in FAMILIES:
        raise ModelError(
            f"model.arch={arch} is a family of widths, not one backbone; choose another one here"
        )
    names = (*BACKBONES, *FAMILIES)
    near = difflib.get_close_matches(arch, names, n=3)
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    known = ", ".join(sorted(names))
    raise ModelError(f"model.arch={arch!r} is unknown{hint}; known: {known}, {TIMM}NAME")
