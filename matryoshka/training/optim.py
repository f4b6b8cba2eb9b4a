"""Learning-rate schedules as pure functions of the epoch, parameter groups by module type,
optimizers by name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from matryoshka.nested import NestedLinear
from matryoshka.training.options import OPTIMIZERS, LrConfig


class OptimError(ValueError):
    """An optimizer that cannot be had; the message names the option and the remedy."""

    user_error = True


def peak_lr(config: LrConfig, global_batch: int) -> float:
    """The highest rate of the run: linear in the global batch unless `lr.lr` is given (Goyal et al.
    2017).
    """
    return config.lr if config.lr is not None else config.lr_per_256 * global_batch / 256


def peak_epoch(config: LrConfig, epochs: int) -> float:
    """The epoch at which the ramp reaches the peak: `lr.lr_peak_epoch` of cyclic, else
    `lr.warmup_epochs`.

    Moved into a run that is too short for it.
    """
    asked = config.lr_peak_epoch if config.lr_schedule_type == "cyclic" else config.warmup_epochs
    return asked if asked < epochs else max(0, (epochs - 1) // 2)


def lr_at(epoch: float, config: LrConfig, peak: float, epochs: int) -> float:
    """Rate at a point of the run, in epochs (2.5 is half-way through the third).

    All: 1e-4 x peak -> peak, linear, until `peak_epoch`. Then cyclic: -> 0, linear. cosine: -> 0,
    by half a cosine (Loshchilov and Hutter 2017, arXiv 1608.03983). step: x step_ratio every
    step_length epochs of the run, at the boundary (upstream smears each drop over the epoch before
    it). constant: peak.
    """
    turn = peak_epoch(config, epochs)
    if epoch < turn:
        return peak * (1e-4 + (1 - 1e-4) * epoch / turn)
    if config.lr_schedule_type == "constant":
        return peak
    if config.lr_schedule_type == "step":
        return peak * config.step_ratio ** (int(epoch) // config.step_length)
    left = max(0.0, (epochs - epoch) / (epochs - turn))
    return peak * (
        0.5 - 0.5 * math.cos(math.pi * left) if config.lr_schedule_type == "cosine" else left
    )


def parameter_groups(model: nn.Module, weight_decay: float, norm_weight_decay: float) -> list[dict]:
    """Two groups for an optimizer: the parameters of normalisation layers, chosen by type, and all
    others.

    The last `classifiers` (a count) of a group are those of nested heads, for `make_optimizer`.
    Upstream chooses by the substring "bn" in the name, which misses ResNet's `downsample.1`.
    """
    types = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
    in_norms = {
        id(p) for m in model.modules() if isinstance(m, types) for p in m.parameters(recurse=False)
    }
    in_heads = {
        id(p) for m in model.modules() if isinstance(m, NestedLinear) for p in m.parameters()
    }
    trainable = [p for p in model.parameters() if p.requires_grad]
    norms = [p for p in trainable if id(p) in in_norms]
    heads = [p for p in trainable if id(p) in in_heads]
    trunk = [p for p in trainable if id(p) not in in_norms | in_heads]
    return [
        {"params": norms, "weight_decay": norm_weight_decay, "classifiers": 0},
        {"params": trunk + heads, "weight_decay": weight_decay, "classifiers": len(heads)},
    ]


def make_optimizer(
    name: str, groups: Sequence[dict], lr: float, momentum: float, device: torch.device
) -> torch.optim.Optimizer:
    """One of OPTIMIZERS for `parameter_groups`; OptimError if it cannot be had. A rate set in a
    group counts.

    momentum: beta 1 of AdamW, whose beta 2 is 0.999. lars (You et al. 2017, arXiv 1708.03888): the
    trust ratio, with coefficient 0.001, scales the steps of each group that decays or holds a
    matrix; not those of norm layers without weight decay. muon (Jordan et al. 2024): kernels as
    matrices [out, in x h x w], their steps scaled to the size of AdamW's (Liu et al. 2025, arXiv
    2502.16982), so one rate suits both; vectors, classifiers and very narrow matrices by AdamW. The
    state holds tensors and numbers only, the groups nothing that JSON lacks.
    """
    if name not in OPTIMIZERS:
        raise OptimError(f"training.optimizer={name!r}: expected one of {', '.join(OPTIMIZERS)}")
    if name in ("adamw", "muon") and not 0 <= momentum < 1:
        raise OptimError(f"training.momentum={momentum}: {name} needs 0 or more, and less than 1")
    plain = [
        {key: value for key, value in group.items() if key != "classifiers"} for group in groups
    ]
    # not on a CPU: the fused step is 1.5 to 2 times as fast there, of seconds for the gradients,
    # but it takes equal memory layouts for granted and is silently wrong without them (torch 2.15)
    fused = True if device.type == "cuda" else None
    betas = (float(momentum), 0.999)
    if name == "sgd":
        optimizer = torch.optim.SGD(plain, lr=lr, momentum=momentum, fused=fused)
        # a fused first step that a GradScaler skips leaves torch's own buffers uninitialised (2.15)
        for parameter in [p for group in plain for p in group["params"]] if momentum else []:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    elif name == "adamw":
        optimizer = torch.optim.AdamW(plain, lr=lr, betas=betas, fused=fused)
    elif name == "lars":
        # timm adapts where there is weight decay; without any, LARS would be SGD
        adapted = [
            {**group, "always_adapt": any(p.ndim > 1 for p in group["params"])} for group in plain
        ]
        optimizer = _timm(name).Lars(adapted, lr=lr, momentum=momentum)
    else:
        muon = _muon_in_float32(_timm(name)) if device.type == "cpu" else _timm(name).Muon
        apart = _classifiers_apart(groups)
        optimizer = muon(apart, lr=lr, momentum=momentum, betas=betas, eps=1e-8)
    optimizer.register_load_state_dict_pre_hook(_keep_fused)
    optimizer.register_load_state_dict_post_hook(_restore_layout)
    return optimizer


def _timm(name: str) -> Any:
    try:
        import timm.optim  # seconds, which no other optimizer should take
    except ImportError as error:
        raise OptimError(
            f"training.optimizer={name} needs timm ({error}): pip install timm"
        ) from None
    return timm.optim


def _muon_in_float32(timm_optim: Any) -> Any:
    """timm's Muon computes in bf16, which took 31 times as long as float32 on a CPU without
    AVX-512.
    """
    module = timm_optim.muon

    class Muon(module.Muon):
        def step(self, closure=None):
            orthogonal = module.zeropower_via_newtonschulz
            module.zeropower_via_newtonschulz = partial(orthogonal, dtype=torch.float32)
            try:
                return super().step(closure)
            finally:
                module.zeropower_via_newtonschulz = orthogonal

    return Muon


def _classifiers_apart(groups: Sequence[dict]) -> list[dict]:
    """Each group's classifiers in a group of their own, which timm's Muon leaves to AdamW."""
    apart = []
    for group in groups:
        end = len(group["params"]) - group.get("classifiers", 0)
        for params, adamw in ((group["params"][:end], False), (group["params"][end:], True)):
            if params:
                apart.append(
                    {"params": params, "weight_decay": group["weight_decay"], "use_fallback": adamw}
                )
    return apart


def _keep_fused(optimizer: torch.optim.Optimizer, state: dict) -> dict:
    """A state from another kind of device does not choose the kernels here."""
    fused = {"fused": optimizer.defaults["fused"]} if "fused" in optimizer.defaults else {}
    return {**state, "param_groups": [{**group, **fused} for group in state["param_groups"]]}


def _restore_layout(optimizer: torch.optim.Optimizer) -> None:
    """A file stores tensors row by row; fused kernels take the layout of the parameter for granted."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if (
                torch.is_tensor(value)
                and value.shape == parameter.shape
                and value.stride() != parameter.stride()
            ):
                state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
