"""Grad-CAM of every prefix: where in an image the logit of a class comes from.

    maps, predictions, confidences = heat_maps(model, images)      # [G, B, H, W], [G, B], [G, B]

Selvaraju et al. 2017, arXiv 1610.02391: for feature maps A [K, h, w] of a layer and the logit y of
a class, ReLU(sum_k a_k A_k) with a_k the mean of dy/dA_k over the positions (equations 1 and 2).
"""

from __future__ import annotations

import contextlib
import difflib
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matryoshka.models import ModelError, NestedModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Layer(NamedTuple):
    """A module of the trunk whose output is a feature map, and how many positions the map has."""

    name: str
    height: int
    width: int


class HeatMaps(NamedTuple):
    maps: Tensor  # float32 [G, B, H, W], 0 to 1
    predictions: Tensor  # int64 [G, B]
    confidences: Tensor  # float32 [G, B], the softmax probability of the predicted class


def find_layer(model: NestedModel, images: Tensor, name: str | None = None) -> Layer:
    """The layer that heat maps are made of, for images [B, 3, H, W] (normalised float); the first
    one is tried.

    It is the last module of the trunk, in the order in which they finish, whose output is a feature
    map (a) with as many channels as the trunk has features, (b) of more than one position, (c) on
    whose positions the logits depend. That is layer4 of a ResNet at 64 pixels or more, the last
    stage or norm of timm's convnets, norm1 of the last block of a ViT that classifies by its class
    token (c), norm of one that averages. Without (a) where no module has all three: a ResNet at 32
    pixels, whose layer4 has one position, gives layer3. A feature map is [B, K, h, w], [B, h, w,
    K], or tokens [B, N, K] of which those behind the prefix tokens (class, registers) make a grid;
    h / w is that of the images.

    name: this module instead, whatever (a) to (c) say. ModelError where there is no such module or
    no feature map.
    """
    image = images[:1]
    outputs: dict[
        str, Tensor
    ] = {}  # in the order in which modules finish; of one that runs twice the last
    trunk = model.trunk

    def keep(module_name: str):
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and _grid(output, trunk, image) is not None:
                outputs.pop(module_name, None)
                outputs[module_name] = output

        return hook

    if name is not None:
        name = name.removeprefix("trunk.")
        _module(model, name)
    names = [n for n, _ in trunk.named_modules() if n and name in (None, n)]
    with _untouched(model), torch.enable_grad(), contextlib.ExitStack() as hooks:
        for n in names:
            hooks.callback(trunk.get_submodule(n).register_forward_hook(keep(n)).remove)
        image = image.detach().clone().requires_grad_()  # a graph even where every weight is frozen
        logits = model(image)
        if name is not None:
            if name not in outputs:
                raise ModelError(f"layer {name}: its output is no feature map; {_hint(model)}")
            return _layer(name, outputs[name], trunk, image)
        several = {
            n: output for n, output in outputs.items() if _positions(output, trunk, image) > 1
        }
        if not several:
            raise ModelError(
                f"{model.spec.arch}: no module has a feature map of several positions; "
                f"{_hint(model)}"
            )
        features = getattr(
            trunk, "num_features", model.width
        )  # not the width where timm has a layer behind the pooling
        wide = [
            n for n, output in several.items() if _as_map(output, trunk, image).shape[1] == features
        ]
        gradients = torch.autograd.grad(logits.sum(), list(several.values()), allow_unused=True)
        used = [
            n
            for n, gradient in zip(several, gradients, strict=True)
            if gradient is not None and _as_map(gradient, trunk, image).count_nonzero()
        ]
    both = [n for n in wide if n in used]
    chosen = (both or used or wide or list(several))[-1]  # `wide` for a classifier of zeros
    return _layer(chosen, several[chosen], trunk, image)


def heat_maps(
    model: NestedModel, images: Tensor, targets: Tensor | None = None, layer: str | None = None
) -> HeatMaps:
    """Grad-CAM of each prefix's predicted class, from one forward pass and one (short) backward
    pass per prefix.

    images [B, 3, H, W], normalised float, on the model's device. targets: int64 [G, B] or [B], the
    classes to explain instead. layer: a module of the trunk; None: the one that find_layer chooses.
    Maps are resized to H x W (bilinear) and each divided by its maximum; one without a positive
    value is all 0. The model keeps its mode and its gradients, and runs in eval mode. ModelError:
    no such layer, targets that misfit.
    """
    layer = find_layer(model, images, layer).name
    trunk = model.trunk
    kept: list[Tensor] = []

    def cut(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        # the graph begins here: what comes before needs none, and costs neither memory nor time
        torch.set_grad_enabled(True)
        kept[:] = [output.detach().requires_grad_()]
        return kept[0].clone()  # what follows may work in place

    with _untouched(model), torch.enable_grad():
        handle = _module(model, layer).register_forward_hook(cut)
        try:
            with torch.no_grad():
                logits = model(images)
        finally:
            handle.remove()
        predictions = logits.detach().argmax(2)
        confidences = logits.detach().float().softmax(2).gather(2, predictions[..., None])[..., 0]
        classes = predictions if targets is None else _check_targets(targets, logits)
        scores = logits.gather(2, classes[..., None]).sum(
            (1, 2)
        )  # [G]; of the sum: images do not mix in eval mode
        features = _as_map(kept[0].detach(), trunk, images)
        maps = []
        for g, score in enumerate(scores):
            (gradient,) = torch.autograd.grad(score, kept, retain_graph=g + 1 < len(scores))
            weights = _as_map(gradient, trunk, images).mean((2, 3), keepdim=True)
            maps.append((weights * features).sum(1).relu())
        large = F.interpolate(
            torch.stack(maps, 1).float(), images.shape[2:], mode="bilinear"
        ).transpose(0, 1)
        highest = large.amax((2, 3), keepdim=True)
        shares = torch.where(highest > 0, large / highest, 0).clamp(0, 1)
    return HeatMaps(shares, predictions, confidences)


def _check_targets(targets: Tensor, logits: Tensor) -> Tensor:
    """int64 [G, B]."""
    g, b, c = logits.shape
    if targets.shape not in ((b,), (g, b)):
        raise ModelError(f"targets of shape {list(targets.shape)}: expected [{b}] or [{g}, {b}]")
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < c:
        raise ModelError(
            f"targets {int(targets.min())} to {int(targets.max())}: the model has classes 0 to "
            f"{c - 1}"
        )
    return targets.to(logits.device).expand(g, b)


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, the mode of every module as it was afterwards; also where the caller is in
    inference mode.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.inference_mode(False):
            model.eval()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _module(model: NestedModel, name: str) -> nn.Module:
    modules = dict(model.trunk.named_modules())
    if not name or name not in modules:
        near = difflib.get_close_matches(name, modules, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ModelError(
            f"layer {name!r}: {model.spec.arch} has none of that name{hint}; {_hint(model)}"
        )
    return modules[name]


def _hint(model: NestedModel) -> str:
    return f"its parts are {', '.join(name for name, _ in model.trunk.named_children())}"


# ---------------------------------------------------------------- feature maps


def _grid(output: Tensor, trunk: nn.Module, image: Tensor) -> tuple[str, int, int] | None:
    """(layout, h, w) where an output is a feature map of an image, by the ratio of its sides."""
    height, width = image.shape[2:]

    def fits(h: int, w: int) -> bool:
        return min(h, w) > 0 and abs(h * width - w * height) <= max(
            height, width
        )  # sides are rounded: by a position

    if output.ndim == 4 and output.is_floating_point():
        _, a, b, c = output.shape
        if fits(b, c):
            return "BKhw", b, c
        if fits(a, b):
            return "BhwK", a, b
    if output.ndim == 3 and output.is_floating_point():
        tokens = output.shape[1] - _prefix_tokens(trunk)
        h = round((max(tokens, 0) * height / width) ** 0.5)
        if h and tokens % h == 0 and fits(h, tokens // h):
            return "BNK", h, tokens // h
    return None


def _prefix_tokens(trunk: nn.Module) -> int:
    """Class, distillation and register tokens, which lie before those of the patches."""
    count = getattr(trunk, "num_prefix_tokens", 0)
    return count if isinstance(count, int) else 0


def _as_map(output: Tensor, trunk: nn.Module, image: Tensor) -> Tensor:
    """[B, K, h, w] of an output for which `_grid` is not None, or of its gradient."""
    grid = _grid(output, trunk, image)
    assert grid is not None
    layout, h, w = grid
    if layout == "BNK":
        return output[:, _prefix_tokens(trunk) :].transpose(1, 2).unflatten(2, (h, w))
    return output if layout == "BKhw" else output.permute(0, 3, 1, 2)


def _positions(output: Tensor, trunk: nn.Module, image: Tensor) -> int:
    return _as_map(output, trunk, image)[0, 0].numel()


def _layer(name: str, output: Tensor, trunk: nn.Module, image: Tensor) -> Layer:
    return Layer(name, *_as_map(output, trunk, image).shape[2:])


# ---------------------------------------------------------------- picture


class Cell(NamedTuple):
    """One prefix of a montage. heat: float [H, W], 0 to 1. correct: None where the true class is
    not known.
    """

    dim: int
    heat: np.ndarray
    prediction: str
    confidence: float
    correct: bool | None


# inches, and points for text
_TILE, _HEAD, _LINE, _PAD, _GAP, _MARGIN, _FOOT = 1.85, 0.24, 0.18, 0.07, 0.17, 0.16, 0.2
_WIDTH = 7.4  # at least: the foot's
_TEXT, _SMALL = 10, 8.5
_COLOUR = {
    True: "#0072B2",
    False: "#D55E00",
    None: "0.35",
}  # Okabe and Ito's blue and vermilion: told apart by all
_FRAME: dict[bool | None, str | tuple] = {True: "-", False: (0, (4, 2)), None: "-"}
_MARK = {True: "\N{CHECK MARK} ", False: "\N{BALLOT X} ", None: ""}


def montage(image: np.ndarray, title: str, truth: str, cells: Sequence[Cell], note: str) -> Figure:
    """The image, uint8 [H, W, 3], at the left; beside it, for every prefix, the image with its heat
    map.

    Right and wrong predictions have a mark, another colour and another frame each. title, truth:
    below the image. note: what the heat is, below all, beside the colours from none to most.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    rows = 1 if len(cells) <= 4 else 2 if len(cells) <= 12 else -(-len(cells) // 6)
    columns = -(-len(cells) // rows)
    side = (
        max(_TILE, (_WIDTH - 2 * _MARGIN - 0.1 - columns * _GAP) / (columns + 1))
        if rows == 1
        else _TILE
    )
    captions = [fitted(_MARK[one.correct] + one.prediction, side, _TEXT, 2) for one in cells]
    lines = max(2 if rows == 1 else 1, *(1 + caption.count("\n") for caption in captions))
    cell = _HEAD + side + _PAD + lines * _LINE
    grid = rows * cell + (rows - 1) * _GAP
    large = side if rows == 1 else min(grid - _HEAD - _PAD - 4 * _LINE, 2.3 * side)
    width = max(2 * _MARGIN + large + 0.1 + columns * (_GAP + side), _WIDTH)
    height = 2 * _MARGIN + grid + _GAP + _FOOT
    figure = Figure(figsize=(width, height), dpi=120, facecolor="white")

    def tile(x: float, y: float, size: float, pixels: np.ndarray):
        """Axes with an image, its upper left corner x, y inches from that of the figure."""
        axes = figure.add_axes((x / width, 1 - (y + size) / height, size / width, size / height))
        axes.imshow(
            pixels,
            interpolation="nearest" if pixels.shape[0] < 128 else "antialiased",
            aspect="auto",
        )
        axes.set(xticks=[], yticks=[])
        return axes

    def text(x: float, y: float, words: str, size: float = _TEXT, va: str = "top", **options):
        """Words whose upper left corner is at x, y inches."""
        figure.text(
            x / width, 1 - y / height, words, fontsize=size, va=va, parse_math=False, **options
        )

    left, top, below = _MARGIN, _MARGIN, _MARGIN + _HEAD + large + _PAD
    text(left, top, "image", weight="bold")
    tile(left, top + _HEAD, large, image).spines[:].set_color("0.35")
    name = fitted(title, large, _TEXT, 1 if truth and rows == 1 else 2)
    text(left, below, name, color="0.35")
    text(
        left,
        below + _LINE * (1 + name.count("\n")),
        fitted(truth, large, _TEXT, 1 if rows == 1 else 2),
    )
    grey = image @ np.array([0.299, 0.587, 0.114])
    for k, (one, caption) in enumerate(zip(cells, captions, strict=True)):
        x = left + large + 0.1 + _GAP + (k % columns) * (side + _GAP)
        y = top + (k // columns) * (cell + _GAP)
        axes = tile(x, y + _HEAD, side, heated(grey, one.heat))
        if one.heat.min() < 0.5 < one.heat.max():
            axes.contour(one.heat, levels=[0.5], colors="white", linewidths=1.2)
        if not one.heat.any():
            axes.text(
                0.5,
                0.5,
                "nothing speaks\nfor this class",
                transform=axes.transAxes,
                ha="center",
                va="center",
                color="white",
                fontsize=_SMALL,
                bbox={"facecolor": "black", "alpha": 0.7, "lw": 0},
            )
        for spine in axes.spines.values():
            spine.set(
                color=_COLOUR[one.correct],
                linewidth=0.8 if one.correct is None else 2.2,
                linestyle=_FRAME[one.correct],
            )
        text(x, y, f"prefix {one.dim}", weight="bold")
        text(x + side, y, f"{100 * one.confidence:.0f} %", ha="right")
        text(x, y + _HEAD + side + _PAD, caption, color=_COLOUR[one.correct])

    middle = height - _MARGIN - _FOOT / 2
    foot = (1 - (middle + 0.07) / height, 0.14 / height)  # from the bottom; height
    bar = figure.add_axes((left / width, foot[0], 0.9 / width, foot[1]))
    bar.imshow(colours(np.linspace(0, 1, 128))[None], aspect="auto", extent=(0, 1, 0, 1))
    bar.axvline(0.5, color="white", linewidth=1.2)
    bar.set(xticks=[], yticks=[])
    known = any(one.correct is not None for one in cells)
    words = fitted(
        f"{note}; white line: half of the highest value",
        width - 3.2 if known else width - 1.4,
        _SMALL,
    )
    text(left + 1.0, middle, words, _SMALL, "center_baseline", color="0.25")
    for x, correct, words in ((width - 1.75, True, "right"), (width - 0.91, False, "wrong")):
        if known:
            box = Rectangle(
                (x / width, foot[0]),
                0.2 / width,
                foot[1],
                fill=False,
                lw=1.6,
                edgecolor=_COLOUR[correct],
                linestyle=_FRAME[correct],
            )
            figure.add_artist(box)
            text(
                x + 0.27,
                middle,
                _MARK[correct] + words,
                _SMALL,
                "center_baseline",
                color=_COLOUR[correct],
            )
    return figure


def colours(shares: np.ndarray) -> np.ndarray:
    """float [..., 3] of shares 0 to 1: matplotlib's inferno, which grows lighter all the way for
    every eye.
    """
    from matplotlib import colormaps

    return colormaps["inferno"](0.15 + 0.85 * shares)[..., :3]


def heated(grey: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """float [H, W, 3], 0 to 1: a grey image [H, W] (0 to 255) under a heat map that is the denser
    the hotter it is.
    """
    dense = (0.2 + 0.4 * heat)[..., None]
    return np.clip((1 - dense) * (grey / 255)[..., None] + dense * colours(heat), 0, 1)


def fitted(text: str, width: float, size: float, lines: int = 1) -> str:
    """`text` on at most `lines` lines of `width` inches, broken between words where it can be, cut
    with an ellipsis.
    """
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextToPath

    measure, font = TextToPath(), FontProperties(size=size)

    def too_wide(words: str) -> bool:
        return (
            measure.get_text_width_height_descent(words, font, ismath=False)[0] > 70 * width
        )  # of 72: hinting

    def longest(words: str, end: str = "") -> int:
        """How many characters of `words`, one at least, fit on a line with `end` behind them."""
        return 1 + bisect_left(
            range(2, len(words) + 1), True, key=lambda n: too_wide(words[:n] + end)
        )

    shown: list[str] = []
    rest = " ".join(text.split())
    while rest:
        end = longest(rest)
        if end < len(rest) and len(shown) == lines - 1:
            ellipsis = "\N{HORIZONTAL ELLIPSIS}"
            return "\n".join([*shown, rest[: longest(rest, ellipsis)].rstrip() + ellipsis])
        if end < len(rest):
            space = rest.rfind(" ", 1, end + 1)
            end = space if space > 0 else end
        shown.append(rest[:end].rstrip())
        rest = rest[end:].lstrip()
    return "\n".join(shown)
