"""Layers behind a backbone that are part of the encoder: `linear:2048`, `mlp:4096,256`.

With a neck, the embedding has another width than the backbone, and its prefixes are those of the
neck's output.
"""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from matryoshka.models.options import ModelError, parse_neck


def build_neck(text: str, width: int) -> tuple[nn.Module | None, int]:
    """(neck, width of its output) behind features of `width` numbers; (None, width) for "".

    linear: one linear layer with bias. mlp: linear layers without bias, each followed by batch norm
    and, but for the last, ReLU.
    """
    if not text:
        return None, width
    try:
        kind, widths = parse_neck(text)
    except ValueError as error:
        raise ModelError(f"model.neck={text}: {error}") from None
    if kind == "linear":
        return nn.Linear(width, widths[0]), widths[0]
    layers: list[nn.Module] = []
    for number, (narrow, wide) in enumerate(pairwise((width, *widths)), 1):
        layers += [nn.Linear(narrow, wide, bias=False), nn.BatchNorm1d(wide)]
        if number < len(widths):
            layers.append(nn.ReLU())
    return nn.Sequential(*layers), widths[-1]
