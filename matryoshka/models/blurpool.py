"""Anti-aliased strided convolutions, as in the recipes of ffcv-imagenet and MRL (Zhang 2019,
arXiv 1904.11486).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BlurPoolConv2d(nn.Module):
    """A strided convolution after a fixed depthwise 3x3 blur [1 2 1]x[1 2 1]/16 (stride 1, zero
    padding 1).

    The names `conv` and `blur_filter` [C_in, 1, 3, 3] are those of the published checkpoints.
    """

    blur_filter: Tensor

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        # A buffer although it is constant: upstream's checkpoints store it.
        row = torch.tensor([1.0, 2.0, 1.0])
        kernel = (row[:, None] * row[None, :] / 16).expand(conv.in_channels, 1, 3, 3).contiguous()
        self.conv = conv
        self.register_buffer("blur_filter", kernel)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.conv2d(x, self.blur_filter, padding=1, groups=self.conv.in_channels))


def apply_blurpool(module: nn.Module) -> None:
    """Wrap in place every strided Conv2d with at least 16 input channels.

    The bound excludes the stem, whose input is RGB, as upstream does.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d) and max(child.stride) > 1 and child.in_channels >= 16:
            setattr(module, name, BlurPoolConv2d(child))
        elif not isinstance(child, BlurPoolConv2d):
            apply_blurpool(child)


def with_or_without_blurpool(
    state: Mapping[str, Tensor], like: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Rename the keys of `state` to those of `like`, where only one of the two has BlurPool.

    Both are state_dicts of the same architecture. Convolutions keep their weights; the filters are
    constants and come from `like`.
    """
    suffix = ".blur_filter"
    # Of both: only one of the two has filters, and the direction is not known yet.
    blurred = [key.removesuffix(suffix) for key in (*state, *like) if key.endswith(suffix)]
    filters = {key: value for key, value in like.items() if key.endswith(suffix)}

    # layer2.0.conv2.weight without BlurPool is layer2.0.conv2.conv.weight with it
    new_names = {}
    for name in blurred:
        for leaf in ("weight", "bias"):
            plain, wrapped = f"{name}.{leaf}", f"{name}.conv.{leaf}"
            if filters:  # `like` has BlurPool, `state` does not
                new_names[plain] = wrapped
            else:
                new_names[wrapped] = plain

    renamed = dict(filters)
    for key, value in state.items():
        if not key.endswith(suffix):
            renamed[new_names.get(key, key)] = value
    return renamed
