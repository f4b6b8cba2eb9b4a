"""The state of a training run as named tensors and JSON values: collect and restore it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from matryoshka.data.loader import Loader
from matryoshka.models.ema import Ema
from matryoshka.training.sums import Sums

M = TypeVar("M", bound=nn.Module)


@dataclass
class LoopState:
    """Position of a run.

    step: optimizer steps done. epoch: epochs trained, evaluated and logged. best: highest value of
    the session's best_metric so far. rollbacks: returns to an older checkpoint so far.
    reduced_lr_until: step until which the learning rate stays reduced after a rollback.
    """

    step: int = 0
    epoch: int = 0
    best: float = -1.0
    rollbacks: int = 0
    reduced_lr_until: int = 0

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        # The checkpoint format has an older name.
        values["calm_until"] = values.pop("reduced_lr_until")
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> LoopState:
        return cls(
            step=values["step"],
            epoch=values["epoch"],
            best=values["best"],
            rollbacks=values["rollbacks"],
            reduced_lr_until=values["calm_until"],
        )


class TrainState(Generic[M]):
    """Contents of a training checkpoint.

    model: a module whose state_dict holds everything that is trained or carried along as tensors;
        a method with target networks or queues keeps them as submodules and buffers.
    sums: the epoch's sums of losses and images on this rank.
    metadata: rebuilds the model without the program (checkpoint.describe).
    encoder: path of the encoder within `model`, with a final dot ("online."); "" if `model` is the
        encoder itself. checkpoint.load_model opens the encoder of any checkpoint by it.
    """

    def __init__(
        self,
        *,
        model: M,
        optimizer: torch.optim.Optimizer,
        loader: Loader,
        scaler: torch.amp.GradScaler,
        sums: Sums,
        metadata: Mapping[str, Any],
        ema: Ema[M] | None = None,
        encoder: str = "",
    ) -> None:
        self.model: M = model
        self.optimizer = optimizer
        self.loader = loader
        self.scaler = scaler
        self.sums = sums
        self.ema = ema
        self.metadata = {**metadata, "encoder": f"model.{encoder}"}
        self.loop = LoopState()

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of `loss`, scaled for fp16 where the run uses it."""
        self.scaler.scale(loss).backward()

    def tensors(self, totals: Tensor) -> dict[str, Tensor]:
        """All tensors by name, not copied. totals: `sums.totals` of all ranks, [ranks, ...]."""
        named = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        if self.ema is not None:
            for name, value in self.ema.module.state_dict().items():
                named[f"ema.{name}"] = value
        for index, values in self.optimizer.state_dict()["state"].items():
            for key, value in values.items():
                if isinstance(value, Tensor):
                    named[f"optimizer.{index}.{key}"] = value
        named["totals"] = totals
        named["rng"] = torch.get_rng_state()
        return named

    def values(self) -> dict[str, Any]:
        """Everything that is not a tensor, as JSON values."""
        optimizer = self.optimizer.state_dict()
        numbers = {}
        for index, values in optimizer["state"].items():
            plain = {key: value for key, value in values.items() if not isinstance(value, Tensor)}
            numbers[str(index)] = plain  # keys of JSON objects are text
        return {
            **self.loop.to_json(),
            "loader": self.loader.state_dict(),
            "scaler": self.scaler.state_dict(),
            "optimizer": {"numbers": numbers, "param_groups": optimizer["param_groups"]},
        }

    def restore(
        self,
        tensors: Mapping[str, Tensor],
        values: Mapping[str, Any],
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        """Load what `tensors` and `values` returned.

        Raises RuntimeError, KeyError or StateError if they do not fit this model, optimizer or
        loader.
        """
        self.model.load_state_dict(_without_prefix(tensors, "model."))
        if self.ema is not None:
            self.ema.module.load_state_dict(_without_prefix(tensors, "ema."))

        # Numbers come from the JSON values, tensors from the file: together the optimizer's state.
        state: dict[int, dict[str, Any]] = {}
        for index, numbers in values["optimizer"]["numbers"].items():
            state[int(index)] = dict(numbers)
        for name, value in _without_prefix(tensors, "optimizer.").items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = value
        param_groups = values["optimizer"]["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": param_groups})

        self.loader.load_state_dict(values["loader"])
        if values["scaler"]:  # empty unless the run uses fp16
            self.scaler.load_state_dict(values["scaler"])
        self.sums.restore(tensors["totals"], rank=rank, ranks=ranks)
        torch.set_rng_state(tensors["rng"].cpu())
        self.loop = LoopState.from_json(values)


def _without_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
