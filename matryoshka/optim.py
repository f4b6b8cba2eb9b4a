"""Learning-rate schedules as pure functions of the epoch, and parameter groups by module type."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class LrConfig:
    """Section `lr`."""

    lr: float | None = field(default=None, metadata={"help": "peak rate; unset: lr_per_256 x global batch / 256"})
    lr_per_256: float = field(default=0.125, metadata={"help": "peak rate per 256 images of the global batch"})
    lr_schedule_type: str = field(
        default="cyclic", metadata={"help": "shape over the run", "choices": ("step", "cyclic", "constant")}
    )
    lr_peak_epoch: int = field(default=2, metadata={"help": "cyclic: epoch of the highest rate"})
    step_ratio: float = field(default=0.1, metadata={"help": "step: factor at each step"})
    step_length: int = field(default=30, metadata={"help": "step: epochs between two steps"})

    def __post_init__(self) -> None:
        if (self.lr is not None and self.lr < 0) or self.lr_per_256 < 0:
            raise ValueError("lr.lr and lr.lr_per_256 must not be negative")
        if self.step_length < 1 or self.lr_peak_epoch < 0:
            raise ValueError("lr.step_length must be 1 or more, lr.lr_peak_epoch 0 or more")


def peak_lr(config: LrConfig, global_batch: int) -> float:
    """The highest rate of the run: linear in the global batch unless `lr.lr` is given (Goyal et al. 2017)."""
    return config.lr if config.lr is not None else config.lr_per_256 * global_batch / 256


def peak_epoch(config: LrConfig, epochs: int) -> int:
    """`lr.lr_peak_epoch`, moved into a run that is too short for it."""
    return config.lr_peak_epoch if config.lr_peak_epoch < epochs else max(0, (epochs - 1) // 2)


def lr_at(epoch: float, config: LrConfig, peak: float, epochs: int) -> float:
    """Rate at a point of the run, in epochs (2.5 is half-way through the third).

    cyclic: 1e-4 x peak -> peak -> 0, linear, with the turn at `peak_epoch`. step: x step_ratio every
    step_length epochs, at the boundary (upstream smears each drop over the epoch before it). constant: peak.
    """
    if config.lr_schedule_type == "constant":
        return peak
    if config.lr_schedule_type == "step":
        return peak * config.step_ratio ** (int(epoch) // config.step_length)
    turn = peak_epoch(config, epochs)
    if epoch < turn:
        return peak * (1e-4 + (1 - 1e-4) * epoch / turn)
    return peak * max(0.0, (epochs - epoch) / (epochs - turn))


def parameter_groups(model: nn.Module, weight_decay: float, norm_weight_decay: float) -> list[dict]:
    """Two groups for an optimizer: the parameters of normalisation layers, chosen by type, and all others.

    Upstream chooses by the substring "bn" in the name, which misses ResNet's `downsample.1`.
    """
    norms = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
    in_norms = {id(p) for m in model.modules() if isinstance(m, norms) for p in m.parameters(recurse=False)}
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if id(p) in in_norms], "weight_decay": norm_weight_decay},
        {"params": [p for p in trainable if id(p) not in in_norms], "weight_decay": weight_decay},
    ]
