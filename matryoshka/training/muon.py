"""Muon (Jordan et al. 2024): steps of kernels are orthogonal matrices; other rules for the rest.

A kernel [out, in, h, w] is a matrix [out, in x h x w]. The orthogonal matrix next to its momentum
comes from Newton-Schulz iterations, which timm has; here is what timm does not offer: float32 on a
CPU, SGD for all other parameters, and filters of a fixed norm.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

MIN_SIDE = 4  # rows and columns; for narrower matrices the iterations are not worth their time
MAX_ASPECT = 128


class MuonRules(NamedTuple):
    """How Muon steps kernels, and what steps the rest.

    steps: Newton-Schulz iterations. scale: adamw or filters, see `make_muon`; filters needs SGD.
    rest: adamw or sgd; rest_lr: its rate as a factor of Muon's; rest_momentum: SGD's momentum.
    betas: AdamW's. nesterov: of Muon and of the rest (AdamW becomes NAdamW).
    """

    steps: int = 5
    scale: str = "adamw"
    rest: str = "adamw"
    rest_lr: float = 1.0
    rest_momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    nesterov: bool = False


def make_muon(
    groups: Sequence[dict], lr: float, momentum: float, rules: MuonRules, device: torch.device
) -> torch.optim.Optimizer:
    """Muon for `parameter_groups`. Raises ImportError without timm.

    scale adamw: a step has the size of AdamW's (Liu et al. 2025, arXiv 2502.16982: 0.2 times the
    root of the longer side), so that one rate suits kernels and the rest.
    scale filters: the kernels of convolutions, and no others, are set to the Frobenius norm
    sqrt(out) before each step, which is the orthogonal matrix itself times the rate: the rate is
    relative to the kernel, as in airbench94_muon. For convolutions that a normalisation follows.
    """
    import timm.optim.muon as module  # takes seconds: not for the other optimizers

    settings = {
        "momentum": momentum,
        "nesterov": rules.nesterov,
        "ns_steps": rules.steps,
        "ns_coefficients": "quintic" if rules.scale == "adamw" else "original",
        "eps": 1e-8,
        "adjust_lr_fn": "match_rms_adamw" if rules.scale == "adamw" else None,
    }
    if rules.rest == "adamw":
        # timm itself finds the kernels; the classifiers must be kept from it.
        split = _split(groups, "use_fallback", lambda parameter: True)
        betas = {"betas": rules.betas, "fallback_lr_scale": rules.rest_lr}
        # AdamW's counters on the device, where a step can be undone without waiting for it.
        betas["capturable"] = device.type == "cuda"
        return _timm_class(module, device)(split, lr=lr, **settings, **betas)

    is_filters = rules.scale == "filters"
    split = _split(groups, "use_sgd", _is_filter if is_filters else _is_kernel)
    settings |= {
        "filters": is_filters,
        "rest_lr": rules.rest_lr,
        "rest_momentum": rules.rest_momentum,
    }
    return MuonAndSgd(split, lr, settings, in_float32=device.type == "cpu")


def _timm_class(module: Any, device: torch.device) -> Any:
    """timm's class; on a CPU in float32: its bf16 took 31 times as long without AVX-512."""
    if device.type != "cpu":
        return module.Muon

    class Muon(module.Muon):
        def step(self, closure=None):
            with _products_in_float32(module):
                return super().step(closure)

    return Muon


@contextlib.contextmanager
def _products_in_float32(module: Any) -> Iterator[None]:
    """timm has no option for the type: replace the function for the time of a step."""
    orthogonal = module.zeropower_via_newtonschulz
    module.zeropower_via_newtonschulz = partial(orthogonal, dtype=torch.float32)
    try:
        yield
    finally:
        module.zeropower_via_newtonschulz = orthogonal


# ---------------------------------------------------------------- which parameter is what


def _split(groups: Sequence[dict], mark: str, is_kernel: Callable[[Tensor], bool]) -> list[dict]:
    """Split each group into kernels and the rest, where `mark` is True; classifiers are rest."""
    split = []
    for group in groups:
        end = len(group["params"]) - group.get("classifiers", 0)
        kernels = [p for p in group["params"][:end] if is_kernel(p)]
        rest = [p for p in group["params"][:end] if not is_kernel(p)]
        rest += group["params"][end:]
        for params, is_rest in ((kernels, False), (rest, True)):
            if params:
                decay = group["weight_decay"]
                split.append({"params": params, "weight_decay": decay, mark: is_rest})
    return split


def _is_kernel(parameter: Tensor) -> bool:
    """Whether this is a matrix or a filter that is not too narrow; the limits are timm's."""
    if parameter.ndim < 2 or 1 in parameter.shape[:2]:
        return False
    rows, columns = parameter.shape[0], parameter[0].numel()
    short, long = min(rows, columns), max(rows, columns)
    return short >= MIN_SIDE and long <= MAX_ASPECT * short


def _is_filter(parameter: Tensor) -> bool:
    return parameter.ndim == 4 and _is_kernel(parameter)


# ---------------------------------------------------------------- Muon and SGD


class MuonAndSgd(torch.optim.Optimizer):
    """Muon; SGD with momentum for groups with `use_sgd`. See `make_muon`."""

    def __init__(
        self, groups: list[dict], lr: float, settings: dict, *, in_float32: bool = False
    ) -> None:
        super().__init__(groups, {"lr": lr, **settings})
        self._in_float32 = in_float32

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of every group; the closure's value."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            if group["use_sgd"]:
                self._step_rest(group, params)
            else:
                self._step_kernels(group, params)
        return loss

    def _step_kernels(self, group: dict, params: list[Tensor]) -> None:
        import timm.optim.muon as module

        if group["filters"]:
            for p in params:
                p.mul_(len(p) ** 0.5 / p.norm().clamp_(min=1e-7))
        number = contextlib.nullcontext()
        if self._in_float32:
            number = _products_in_float32(module)
        with number:
            module.muon(
                params,
                [p.grad for p in params if p.grad is not None],
                self._buffers(params, "momentum_buffer"),
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                momentum=group["momentum"],
                nesterov=group["nesterov"],
                ns_steps=group["ns_steps"],
                ns_coefficients=group["ns_coefficients"],
                eps=group["eps"],
                safety_factor=1.0,
                adjust_lr_fn=group["adjust_lr_fn"],
                conv_mode="flatten",
                normalize_spatial=True,
                scale_eps=False,
            )

    def _step_rest(self, group: dict, params: list[Tensor]) -> None:
        from torch.optim.sgd import sgd

        sgd(
            params,
            [p.grad for p in params if p.grad is not None],
            [*self._buffers(params, "momentum_buffer")],
            weight_decay=group["weight_decay"],
            momentum=group["rest_momentum"],
            lr=group["lr"] * group["rest_lr"],
            dampening=0.0,
            nesterov=group["nesterov"] and group["rest_momentum"] > 0,
            maximize=False,
        )

    def _buffers(self, params: list[Tensor], name: str) -> list[Tensor]:
        """A state of every parameter, 0 at first."""
        for p in params:
            if name not in self.state[p]:
                self.state[p][name] = torch.zeros_like(p)
        return [self.state[p][name] for p in params]
