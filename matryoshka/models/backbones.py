"""Backbones by name.

To add one: write a function `(weights: str | None, **options) -> (trunk, width)` and enter it in
BACKBONES. The trunk maps images [B, 3, H, W] to features [B, D].
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from matryoshka.models.options import FAMILIES, ModelError
from matryoshka.models.resnets import RESNETS, resnet10, torchvision_resnet
from matryoshka.models.timm_models import TIMM, one_line, timm_model
from matryoshka.models.vit import VIT_NETS, cct, vision_transformer

BACKBONES: dict[str, Callable[..., tuple[nn.Module, int]]] = {
    "resnet10": resnet10,
    **{name: partial(torchvision_resnet, name) for name in RESNETS},
    **{name: partial(vision_transformer, name, **VIT_NETS[name]) for name in VIT_NETS},
    "cct": cct,
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


def option_names(arch: str) -> frozenset[str]:
    """The names of model.arch_options that the builder of `arch` declares.

    Empty for builders that pass everything on to another library.
    """
    from matryoshka.models.nested_vit import MEMBER

    parameters = inspect.signature(_builder(MEMBER if arch in FAMILIES else arch)).parameters
    named = {n for n, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    # The widths of a family are its dims.
    return frozenset(named - {"dim"} if arch in FAMILIES else named)


def _builder(arch: str) -> Callable[..., tuple[nn.Module, int]]:
    if arch.startswith(TIMM):
        return partial(timm_model, arch.removeprefix(TIMM))
    if arch in BACKBONES:
        return BACKBONES[arch]
    if arch in FAMILIES:
        raise ModelError(
            f"model.arch={arch} is a family of widths, not one backbone; choose another one here"
        )
    near = difflib.get_close_matches(arch, (*BACKBONES, *FAMILIES), n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    known = ", ".join(sorted((*BACKBONES, *FAMILIES)))
    raise ModelError(f"model.arch={arch!r} is unknown{hint}; known: {known}, {TIMM}NAME")
