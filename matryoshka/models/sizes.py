"""Checks of a net's options: every ModelError names `model.arch_options` and what is legal."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from matryoshka.config.options import legible, show
from matryoshka.models.options import ModelError

# Upper bounds, far above any sensible net: a checkpoint can claim any number, and building a net of
# a billion layers would not end.
LIMITS = {
    "image_size": 4096,
    "patch": 1024,
    "dim": 16384,
    "depth": 256,
    "cls_depth": 256,
    "heads": 256,
    "head_dim": 16384,
    "mlp_dim": 65536,
    "kernel": 63,
    "codes": 65536,
    "code_dim": 16384,
    "hiddens": 4096,
    "residual_hiddens": 4096,
    "residual_layers": 64,
}


def _shown(net: str, name: str, value: object) -> str:
    """An option and its value, which may come from a file, on one line."""
    text = legible(value) if isinstance(value, str) else show(value)
    return f"model.arch_options: {net}: {name}={text}"


def check_counts(net: str, **counts: object) -> None:
    """Each of `counts` is a whole number from 1 to its limit in LIMITS."""
    for name, value in counts.items():
        if type(value) is not int or not 1 <= value <= LIMITS[name]:  # a bool is an int
            raise ModelError(
                f"{_shown(net, name, value)}: expected a whole number from 1 to {LIMITS[name]}"
            )


def check_shares(net: str, **shares: object) -> None:
    """Each of `shares` is a number from 0 to less than 1: a probability of dropping."""
    for name, value in shares.items():
        if type(value) not in (int, float) or not 0 <= value < 1:  # pyright: ignore[reportOperatorIssue]
            raise ModelError(f"{_shown(net, name, value)}: expected 0 or more, and less than 1")


def check_scales(net: str, **scales: object) -> None:
    """Each of `scales` is a number above 0, at most 100."""
    for name, value in scales.items():
        if type(value) not in (int, float) or not 0 < value <= 100:  # pyright: ignore[reportOperatorIssue]
            raise ModelError(f"{_shown(net, name, value)}: expected more than 0, at most 100")


def check_choices(net: str, legal: Iterable[str], **choices: object) -> None:
    """Each of `choices` is one of the words `legal`."""
    legal = tuple(legal)
    for name, value in choices.items():
        if value not in legal:
            raise ModelError(f"{_shown(net, name, value)}: expected one of {', '.join(legal)}")


MAX_SIDE = 128  # tokens per side of an image: attention has the square of all as its scores


def check_patches(net: str, image_size: int, patch: int) -> None:
    """`patch` divides `image_size`, into MAX_SIDE patches per side at most."""
    if image_size % patch:
        legal = [p for p in range(1, image_size + 1) if image_size % p == 0]
        raise ModelError(
            f"model.arch_options: {net}: patch={patch} does not divide image_size={image_size}; "
            f"legal: {', '.join(map(str, legal))}"
        )
    if image_size // patch > MAX_SIDE:
        raise ModelError(
            f"model.arch_options: {net}: patch={patch} cuts image_size={image_size} into more than "
            f"{MAX_SIDE} patches per side; try patch={-(-image_size // MAX_SIDE)} or more"
        )


def check_heads(net: str, dim: int, heads: int) -> None:
    """`heads` divides `dim`."""
    if dim % heads:
        legal = [h for h in range(1, min(dim, 64) + 1) if dim % h == 0]
        raise ModelError(
            f"model.arch_options: {net}: heads={heads} does not divide dim={dim}; legal: "
            f"{', '.join(map(str, legal))}"
        )


def check_multiple(net: str, of: int, reason: str, **counts: int) -> None:
    """Each of `counts` is a multiple of `of`, for the reason that the message gives."""
    for name, value in counts.items():
        if value % of:
            near = max(of, round(value / of) * of)
            raise ModelError(
                f"model.arch_options: {net}: {name}={value} is not a multiple of {of}, which "
                f"{reason}; try {name}={near}"
            )


def check_least(net: str, least: int, reason: str, **counts: int) -> None:
    """Each of `counts` is `least` or more, because the net `reason`."""
    for name, value in counts.items():
        if value < least:
            raise ModelError(
                f"model.arch_options: {net}: {name}={value}: {net} {reason}; legal: {least} or more"
            )


def check_images(images: Tensor, size: int) -> None:
    """`images` [B, 3, H, W] have the size that a net's positions are for."""
    height, width = images.shape[-2:]
    if (height, width) != (size, size):
        raise ModelError(
            f"the net takes images of {size} x {size} pixels, not {height} x {width}: it has a "
            f"position for each patch; model.arch_options=image_size=... sets the size"
        )


def refuse_weights(net: str, weights: str | None) -> None:
    """ModelError if published weights are asked for: there are none."""
    if weights is not None:
        raise ModelError(
            f"model.init: no weights are published for {net}; give a checkpoint, or leave it out"
        )
