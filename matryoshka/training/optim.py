"""Learning-rate schedules (pure functions of the epoch), parameter groups, optimizers by name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from matryoshka.models.vit import DynamicTanh
from matryoshka.nested import NestedLinear
from matryoshka.ssl.towers import LearnedTemperature
from matryoshka.training.muon import MuonRules, make_muon
from matryoshka.training.options import ADAN_BETAS, OPTIMIZERS, LrConfig, TrainingConfig

KERNELS = ("fused", "capturable")  # options of an optimizer that depend on the device


class OptimError(ValueError):
    """An optimizer that is not available; the message names the option and the remedy."""

    user_error = True


def peak_lr(config: LrConfig, global_batch: int) -> float:
    """Peak learning rate: linear in the global batch (Goyal et al. 2017, arXiv 1706.02677).

    `lr.lr` overrides the rule.
    """
    return config.lr if config.lr is not None else config.lr_per_256 * global_batch / 256


def peak_epoch(config: LrConfig, epochs: int) -> float:
    """Epoch at which the warm-up reaches the peak rate.

    `lr.lr_peak_epoch` for the cyclic schedule, else `lr.warmup_epochs`; moved into the first half
    of a run that is too short for it.
    """
    if config.lr_schedule_type == "cyclic":
        requested = config.lr_peak_epoch
    else:
        requested = config.warmup_epochs
    if requested < epochs:
        return requested
    return max(0, (epochs - 1) // 2)


def lr_at(epoch: float, config: LrConfig, peak: float, epochs: int) -> float:
    """Learning rate at a point of the run, in epochs (2.5 is half-way through the third epoch).

    All schedules rise linearly from 1e-4 x peak to the peak, which they reach at `peak_epoch`.
    Then cyclic falls linearly to 0; cosine falls to 0 along half a cosine (Loshchilov and Hutter
    2017, arXiv 1608.03983); step multiplies by step_ratio every step_length epochs of the run, at
    the boundary (upstream spreads each drop over the epoch before it); constant stays.
    """
    start = peak_epoch(config, epochs)
    if epoch < start:
        return peak * (1e-4 + (1 - 1e-4) * epoch / start)
    if config.lr_schedule_type == "constant":
        return peak
    if config.lr_schedule_type == "step":
        return peak * config.step_ratio ** (int(epoch) // config.step_length)

    left = max(0.0, (epochs - epoch) / (epochs - start))  # share of the decay, from 1 to 0
    if config.lr_schedule_type == "cosine":
        return peak * (0.5 - 0.5 * math.cos(math.pi * left))
    return peak * left


def parameter_groups(model: nn.Module, weight_decay: float, norm_weight_decay: float) -> list[dict]:
    """Two groups for an optimizer: parameters of normalisation layers, and all others; a third for
    a learned temperature, where there is one.

    Normalisation layers are found by module type; upstream looks for "bn" in the name, which misses
    ResNet's `downsample.1`. The last `classifiers` (a count) parameters of a group belong to nested
    heads: `make_optimizer` treats them apart.
    """
    norm_types = (
        nn.modules.batchnorm._NormBase,
        nn.LayerNorm,
        nn.GroupNorm,
        nn.RMSNorm,
        DynamicTanh,  # stands in place of a norm
    )
    in_norms: set[int] = set()
    in_heads: set[int] = set()
    for module in model.modules():
        if isinstance(module, norm_types):
            in_norms |= {id(p) for p in module.parameters(recurse=False)}
        if isinstance(module, NestedLinear):
            in_heads |= {id(p) for p in module.parameters()}

    trainable = [p for p in model.parameters() if p.requires_grad]
    in_temperatures = {
        id(p) for m in model.modules() if isinstance(m, LearnedTemperature) for p in m.parameters()
    }
    norms = [p for p in trainable if id(p) in in_norms]
    heads = [p for p in trainable if id(p) in in_heads]
    trunk = [p for p in trainable if id(p) not in in_norms | in_heads | in_temperatures]
    groups = [
        {"params": norms, "weight_decay": norm_weight_decay, "classifiers": 0},
        {"params": trunk + heads, "weight_decay": weight_decay, "classifiers": len(heads)},
    ]
    temperatures = [p for p in trainable if id(p) in in_temperatures]
    if temperatures:  # decay would change what the loss means
        groups.append({"params": temperatures, "weight_decay": 0.0, "classifiers": 0})
    return groups


def configured_optimizer(
    config: TrainingConfig, groups: Sequence[dict], lr: float, device: torch.device
) -> torch.optim.Optimizer:
    """The optimizer that section `training` describes, for `parameter_groups`. See make_optimizer.

    lr: the first rate; the loop sets it anew in each step.
    """
    rest_momentum = config.muon_rest_momentum
    return make_optimizer(
        config.optimizer,
        groups,
        lr,
        config.momentum,
        device,
        betas=config.betas,
        nesterov=config.nesterov,
        muon=MuonRules(
            steps=config.muon_steps,
            scale=config.muon_scale,
            rest=config.muon_rest,
            rest_lr=config.muon_rest_lr,
            rest_momentum=config.momentum if rest_momentum is None else rest_momentum,
        ),
    )


def make_optimizer(
    name: str,
    groups: Sequence[dict],
    lr: float,
    momentum: float,
    device: torch.device,
    *,
    betas: Sequence[float] | None = None,
    nesterov: bool = False,
    muon: MuonRules | None = None,
) -> torch.optim.Optimizer:
    """Build one of OPTIMIZERS for `parameter_groups`. Raises OptimError if it is not available.

    A learning rate set in a group overrides `lr`. momentum: also beta 1 of Adam and AdamW, whose
    beta 2 is 0.999; Adan has none. betas: instead of these, for adam, adamw, muon's AdamW (two) and
    adan (three), as weights of the old means, see `adan_betas`. nesterov: of sgd and muon.

    adam: weight decay is added to the gradient, as in torch; AdamW and Adan decay the weights.
    adan (Xie et al. 2022, arXiv 2208.06677): timm's, with the paper's proximal decay.
    lars (You et al. 2017, arXiv 1708.03888): the trust ratio, with coefficient 0.001, scales the
    steps of all groups except those without both weight decay and matrices (norm layers).
    muon (Jordan et al. 2024): see `muon.make_muon`. Vectors, classifiers and very narrow matrices
    use AdamW, or SGD by `muon.rest`; without muon, its defaults, with beta 1 = momentum.

    The optimizer's state holds only tensors and numbers, and its groups only JSON values.
    """
    if name not in OPTIMIZERS:
        raise OptimError(f"training.optimizer={name!r}: expected one of {', '.join(OPTIMIZERS)}")
    if name in ("adam", "adamw", "muon") and not 0 <= momentum < 1:
        raise OptimError(f"training.momentum={momentum}: {name} needs 0 or more, and less than 1")

    # Unknown keys of a group stay in the optimizer's param_groups, and so in every checkpoint.
    plain = []
    for group in groups:
        plain.append({key: value for key, value in group.items() if key != "classifiers"})
    # Not on a CPU: the fused step is 1.5 to 2 times faster there, which is little beside seconds
    # for the gradients, but it assumes equal memory layouts and is silently wrong without them
    # (torch 2.15).
    fused = True if device.type == "cuda" else None
    pair = (float(momentum), 0.999)
    if betas is not None and len(betas) == 2:
        pair = (float(betas[0]), float(betas[1]))
    if name == "sgd":
        optimizer = torch.optim.SGD(plain, lr=lr, momentum=momentum, nesterov=nesterov, fused=fused)
        # A fused first step that a GradScaler skips leaves torch's own buffers uninitialised
        # (torch 2.15).
        if momentum:
            for group in plain:
                for parameter in group["params"]:
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    elif name == "adam":
        optimizer = torch.optim.Adam(plain, lr=lr, betas=pair, fused=fused)
    elif name == "adamw":
        optimizer = torch.optim.AdamW(plain, lr=lr, betas=pair, fused=fused)
    elif name == "adan":
        three = ADAN_BETAS if betas is None else tuple(float(beta) for beta in betas)
        optimizer = _timm(name).Adan(plain, lr=lr, betas=three)
    elif name == "lars":
        # timm adapts only groups with weight decay; without any, its LARS would be SGD.
        adapted = []
        for group in plain:
            has_matrices = any(p.ndim > 1 for p in group["params"])
            adapted.append({**group, "always_adapt": has_matrices})
        optimizer = _timm(name).Lars(adapted, lr=lr, momentum=momentum)
    else:  # muon
        _timm(name)
        rules = (muon or MuonRules())._replace(betas=pair, nesterov=nesterov)
        optimizer = make_muon(groups, lr, momentum, rules, device)
    # Whether a step changes nothing but tensors of the device: see undoable.py.
    optimizer.undoable = name in ("lars", "muon")  # type: ignore[attr-defined]
    optimizer.register_load_state_dict_pre_hook(_keep_kernels)
    optimizer.register_load_state_dict_post_hook(_restore_layout)
    return optimizer


def _timm(name: str) -> Any:
    try:
        import timm.optim  # takes seconds: not for the other optimizers
    except ImportError as error:
        raise OptimError(
            f"training.optimizer={name} needs timm ({error}): pip install timm"
        ) from None
    return timm.optim


def _keep_kernels(optimizer: torch.optim.Optimizer, state: dict) -> dict:
    """Keep this device's choice of kernels when a state from another kind of device is loaded."""
    own = {name: optimizer.defaults[name] for name in KERNELS if name in optimizer.defaults}
    return {**state, "param_groups": [{**group, **own} for group in state["param_groups"]]}


def _restore_layout(optimizer: torch.optim.Optimizer) -> None:
    """Give loaded state the memory layout of its parameter, which fused kernels assume.

    A file stores tensors row by row.
    """
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if (
                torch.is_tensor(value)
                and value.shape == parameter.shape
                and value.stride() != parameter.stride()
            ):
                state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
