"""Anti-aliased strided convolutions, as in the recipes of ffcv-imagenet and MRL (Zhang 2019, arXiv
1904.11486).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BlurPoolConv2d(nn.Module):
    """A strided convolution behind a fixed depthwise 3x3 blur [1 2 1]x[1 2 1]/16 (stride 1, zero
    padding 1).

    The names `conv` and `blur_filter` [C_in, 1, 3, 3] are those of the published checkpoints.
    """

    blur_filter: Tensor

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        row = torch.tensor([1.0, 2.0, 1.0])
        kernel = (row[:, None] * row[None, :] / 16).expand(conv.in_channels, 1, 3, 3).contiguous()
        self.conv = conv
        self.register_buffer("blur_filter", kernel)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.conv2d(x, self.blur_filter, padding=1, groups=self.conv.in_channels))


def apply_blurpool(module: nn.Module) -> None:
    """Wrap in place every Conv2d that strides and has at least 16 input channels (so never an RGB
    stem).
    """
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d) and max(child.stride) > 1 and child.in_channels >= 16:
            setattr(module, name, BlurPoolConv2d(child))
        elif not isinstance(child, BlurPoolConv2d):
            apply_blurpool(child)


def with_or_without_blurpool(
    state: Mapping[str, Tensor], like: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A state_dict under the names of `like`, of the same model, where only one of the two has
    BlurPool.

    The convolutions keep their weights; the filters, which are constants, are those of `like`.
    """
    blurred = [
        key.removesuffix(".blur_filter") for key in (*state, *like) if key.endswith(".blur_filter")
    ]
    wrapped = {
        f"{name}.conv.{leaf}": f"{name}.{leaf}" for name in blurred for leaf in ("weight", "bias")
    }
    filters = {key: value for key, value in like.items() if key.endswith(".blur_filter")}
    names = {plain: inner for inner, plain in wrapped.items()} if filters else wrapped
    return filters | {
        names.get(k, k): value for k, value in state.items() if not k.endswith(".blur_filter")
    }
