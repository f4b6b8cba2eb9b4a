"""Grad-CAM heat maps of every prefix: the regions of an image that support a class.

    maps, predictions, confidences = heat_maps(model, images)      # [G, B, H, W], [G, B], [G, B]

Selvaraju et al. 2017, arXiv 1610.02391, equations 1 and 2: for feature maps A [K, h, w] of a layer
and the logit y of a class, ReLU(sum_k a_k A_k), where a_k is the mean of dy/dA_k over the
positions. Dimension legend: G prefixes, B images, C classes, K channels, h x w positions.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matryoshka.models import ModelError, NestedModel

MIN_POSITIONS = 6  # along a side: coarser maps localise little


class Layer(NamedTuple):
    """A module of the trunk whose output is a feature map, and the size of that map."""

    name: str
    height: int
    width: int


class HeatMaps(NamedTuple):
    maps: Tensor  # float32 [G, B, H, W], 0 to 1
    predictions: Tensor  # int64 [G, B]
    confidences: Tensor  # float32 [G, B], the softmax probability of the predicted class


# ---------------------------------------------------------------- choice of the layer


def find_layer(model: NestedModel, images: Tensor, name: str | None = None) -> Layer:
    """Choose the layer for Grad-CAM by running the first of `images` [B, 3, H, W] (normalised).

    The layer is the last module of the trunk, in the order in which modules finish, whose output
    (a) is a feature map with as many channels as the trunk has features,
    (b) has more than one position, and
    (c) affects the logits.
    That is layer4 of a ResNet at 64 pixels or more; the last stage or norm of timm's convnets;
    norm1 of the last block of a ViT that classifies by its class token (c); the last norm of a ViT
    that averages its tokens. If no module meets all three, (a) is dropped: a ResNet at 32 pixels,
    whose layer4 has one position, uses layer3. A feature map is [B, K, h, w], [B, h, w, K], or
    tokens [B, N, K], of which those after the prefix tokens (class, registers) form a grid; its
    aspect ratio is that of the images.

    If that map has fewer than MIN_POSITIONS along a side, as with small images, the layer is the
    last module outside of residual blocks whose map has as many and affects the logits: layer2 of a
    ResNet at 64 pixels, layer1 at 32. Without such a module the coarse map stays.

    name: use this module, whether or not it meets (a) to (c). Raises ModelError if the module does
    not exist or has no feature map.
    """
    image = images[:1]
    trunk = model.trunk
    if name is not None:
        name = name.removeprefix("trunk.")
        _get_module(model, name)
        names = [name]
    else:
        names = [n for n, _ in trunk.named_modules() if n]

    outputs: dict[str, Tensor] = {}  # in the order in which modules finish

    def keep(module_name: str) -> Callable:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and _map_layout(output, trunk, image) is not None:
                outputs.pop(module_name, None)  # a module that runs twice moves to the end
                outputs[module_name] = output

        return hook

    with _eval_mode(model), torch.enable_grad(), contextlib.ExitStack() as hooks:
        for n in names:
            hooks.callback(trunk.get_submodule(n).register_forward_hook(keep(n)).remove)
        # the image requires a gradient: without it, frozen weights would leave no graph
        image = image.detach().clone().requires_grad_()
        logits = model(image)
        if name is not None:
            if name not in outputs:
                raise ModelError(
                    f"layer {name}: its output is not a feature map; {_layer_hint(model)}"
                )
            return _as_layer(name, outputs[name], trunk, image)

        several = {}  # modules that meet (b)
        for n, output in outputs.items():
            if _as_map(output, trunk, image)[0, 0].numel() > 1:
                several[n] = output
        if not several:
            raise ModelError(
                f"{model.spec.arch}: no module has a feature map of several positions; "
                f"{_layer_hint(model)}"
            )

        # where timm has a layer behind the pooling, num_features differs from the trunk's width
        channels = getattr(trunk, "num_features", model.trunk_width)
        wide = []  # modules that also meet (a)
        for n, output in several.items():
            if _as_map(output, trunk, image).shape[1] == channels:
                wide.append(n)

        used = []  # modules that also meet (c)
        gradients = torch.autograd.grad(logits.sum(), list(several.values()), allow_unused=True)
        for n, gradient in zip(several, gradients, strict=True):
            if gradient is not None and _as_map(gradient, trunk, image).count_nonzero():
                used.append(n)

    both = [n for n in wide if n in used]
    # A classifier of zeros uses no module: `used` is empty.
    candidates = both or used or wide or list(several)
    chosen = candidates[-1]
    if not _is_fine(several[chosen], trunk, image):
        for n in used or several:
            if _is_fine(several[n], trunk, image) and _outside_blocks(trunk, n):
                chosen = n
    return _as_layer(chosen, several[chosen], trunk, image)


def _is_fine(output: Tensor, trunk: nn.Module, image: Tensor) -> bool:
    return min(_as_map(output, trunk, image).shape[2:]) >= MIN_POSITIONS


def _outside_blocks(trunk: nn.Module, name: str) -> bool:
    """Whether all parents of a module are plain sequences.

    Inside a residual block, a module has only a part of the features: the skip connection passes
    the others.
    """
    parents = name.split(".")[:-1]
    for depth in range(1, len(parents) + 1):
        if type(trunk.get_submodule(".".join(parents[:depth]))) is not nn.Sequential:
            return False
    return True


# ---------------------------------------------------------------- Grad-CAM


def heat_maps(
    model: NestedModel, images: Tensor, targets: Tensor | None = None, layer: str | None = None
) -> HeatMaps:
    """Grad-CAM of each prefix's predicted class.

    images [B, 3, H, W]: normalised float, on the model's device. targets: int64 [G, B] or [B], the
    classes to explain instead. layer: a module of the trunk, by default the one that find_layer
    chooses. Costs one forward pass and, for each prefix, a backward pass from the logits to the
    layer.

    Maps are resized to H x W (bilinear) and divided by their maximum; a map without a positive
    value is all 0. The model runs in eval mode; its mode and gradients are restored. Raises
    ModelError for an unknown layer or targets of the wrong shape or range.
    """
    layer = find_layer(model, images, layer).name
    trunk = model.trunk
    kept: list[Tensor] = []

    def start_graph(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        # the graph starts at this layer: earlier ones cost neither memory nor time
        torch.set_grad_enabled(True)
        kept[:] = [output.detach().requires_grad_()]
        return kept[0].clone()  # the next module may work in place

    with _eval_mode(model), torch.enable_grad():
        handle = _get_module(model, layer).register_forward_hook(start_graph)
        try:
            with torch.no_grad():
                logits = model(images)
        finally:
            handle.remove()

        predictions = logits.detach().argmax(2)
        shares = logits.detach().float().softmax(2)
        confidences = shares.gather(2, predictions[..., None])[..., 0]
        classes = predictions if targets is None else _check_targets(targets, logits)

        # summed over the images, which do not interact in eval mode: one backward pass for all
        scores = logits.gather(2, classes[..., None]).sum((1, 2))  # [G]
        features = _as_map(kept[0].detach(), trunk, images)
        maps = []
        for g, score in enumerate(scores):
            # The graph is freed with the last prefix.
            (gradient,) = torch.autograd.grad(score, kept, retain_graph=g + 1 < len(scores))
            weights = _as_map(gradient, trunk, images).mean((2, 3), keepdim=True)
            maps.append((weights * features).sum(1).relu())
        coarse = torch.stack(maps, 1).float()  # [B, G, h, w]

        large = F.interpolate(coarse, images.shape[2:], mode="bilinear").transpose(0, 1)
        highest = large.amax((2, 3), keepdim=True)
        heat = torch.where(highest > 0, large / highest, 0).clamp(0, 1)
    return HeatMaps(heat, predictions, confidences)


def _check_targets(targets: Tensor, logits: Tensor) -> Tensor:
    """Targets as int64 [G, B]."""
    g, b, c = logits.shape
    if targets.shape not in ((b,), (g, b)):
        raise ModelError(f"targets of shape {list(targets.shape)}: expected [{b}] or [{g}, {b}]")
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < c:
        raise ModelError(
            f"targets {int(targets.min())} to {int(targets.max())}: the model has classes 0 to "
            f"{c - 1}"
        )
    return targets.to(logits.device).expand(g, b)


# ---------------------------------------------------------------- modules


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, the previous mode of every module afterwards.

    Gradients work inside even if the caller is in inference mode.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.inference_mode(False):
            model.eval()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _get_module(model: NestedModel, name: str) -> nn.Module:
    modules = dict(model.trunk.named_modules())
    if not name or name not in modules:
        near = difflib.get_close_matches(name, modules, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ModelError(
            f"layer {name!r}: {model.spec.arch} has no module of that name{hint}; "
            f"{_layer_hint(model)}"
        )
    return modules[name]


def _layer_hint(model: NestedModel) -> str:
    return f"its parts are {', '.join(name for name, _ in model.trunk.named_children())}"


# ---------------------------------------------------------------- feature maps


def _map_layout(output: Tensor, trunk: nn.Module, image: Tensor) -> tuple[str, int, int] | None:
    """(layout, h, w) if an output is a feature map of the image, judged by its aspect ratio."""
    height, width = image.shape[2:]

    def fits(h: int, w: int) -> bool:
        # strides round the sides: the ratio may be off by one position
        return min(h, w) > 0 and abs(h * width - w * height) <= max(height, width)

    if output.ndim == 4 and output.is_floating_point():
        _, a, b, c = output.shape
        if fits(b, c):
            return "BKhw", b, c
        if fits(a, b):
            return "BhwK", a, b
    if output.ndim == 3 and output.is_floating_point():
        tokens = output.shape[1] - _num_prefix_tokens(trunk)
        h = round((max(tokens, 0) * height / width) ** 0.5)
        if h and tokens % h == 0 and fits(h, tokens // h):
            return "BNK", h, tokens // h
    return None


def _num_prefix_tokens(trunk: nn.Module) -> int:
    """Number of class, distillation and register tokens, which precede the patch tokens."""
    count = getattr(trunk, "num_prefix_tokens", 0)
    return count if isinstance(count, int) else 0


def _as_map(output: Tensor, trunk: nn.Module, image: Tensor) -> Tensor:
    """An output that is a feature map, or its gradient, as [B, K, h, w]."""
    map_layout = _map_layout(output, trunk, image)
    assert map_layout is not None
    layout, h, w = map_layout
    if layout == "BNK":
        return output[:, _num_prefix_tokens(trunk) :].transpose(1, 2).unflatten(2, (h, w))
    return output if layout == "BKhw" else output.permute(0, 3, 1, 2)


def _as_layer(name: str, output: Tensor, trunk: nn.Module, image: Tensor) -> Layer:
    height, width = _as_map(output, trunk, image).shape[2:]
    return Layer(name, height, width)
