"""Everything that a training step reads or changes, as named tensors and plain values, and back."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from matryoshka.data.loader import Loader

M = TypeVar("M", bound=nn.Module)


@dataclass
class Progress:
    """Where a run is. step: optimizer steps; epoch: epochs that are trained, evaluated and logged.

    best: highest top-1 of the longest prefix, in percent. rollbacks: returns to an older
    checkpoint, so far. calm_until: the step up to which the learning rate is lowered after a
    rollback.
    """

    step: int = 0
    epoch: int = 0
    best: float = -1.0
    rollbacks: int = 0
    calm_until: int = 0


class Ema(Generic[M]):
    """Exponential moving average of a model's weights; its buffers are copied.

    The decay grows to `decay` from (1 + step) / (10 + step), so that a short run forgets its start.
    """

    def __init__(self, model: M, decay: float) -> None:
        self.decay = decay
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self._average: list[Tensor] = list(self.module.parameters())
        self._source: list[Tensor] = list(model.parameters())
        self._buffers = list(zip(self.module.buffers(), model.buffers(), strict=True))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimizer step number `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._average, self._source, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]
        for mine, theirs in self._buffers:
            mine.copy_(theirs)


class TrainState(Generic[M]):
    """What a checkpoint holds of a run.

    totals: the sums of the epoch so far, on this rank. about: what rebuilds the model
    (checkpoint.describe).
    """

    def __init__(
        self,
        model: M,
        optimizer: torch.optim.Optimizer,
        loader: Loader,
        scaler: torch.amp.GradScaler,
        totals: Tensor,
        about: Mapping[str, Any],
        ema: Ema[M] | None = None,
    ) -> None:
        self.model: M = model
        self.optimizer, self.loader, self.scaler = optimizer, loader, scaler
        self.totals, self.about, self.ema = totals, dict(about), ema
        self.progress = Progress()

    def tensors(self, totals: Tensor) -> dict[str, Tensor]:
        """Names and tensors, not copied. totals: `self.totals` of all ranks, [ranks, ...]."""
        found = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        if self.ema is not None:
            found |= {f"ema.{name}": value for name, value in self.ema.module.state_dict().items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            found |= {
                f"optimizer.{index}.{k}": v for k, v in values.items() if isinstance(v, Tensor)
            }
        return found | {"totals": totals, "rng": torch.get_rng_state()}

    def values(self) -> dict[str, Any]:
        """The rest, as JSON holds it."""
        optimizer = self.optimizer.state_dict()
        numbers = {
            str(index): {k: v for k, v in values.items() if not isinstance(v, Tensor)}
            for index, values in optimizer["state"].items()
        }
        return {
            **asdict(self.progress),
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
        """Be as `tensors` and `values` were. RuntimeError or StateError where they do not fit."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {
                name[len(prefix) :]: v for name, v in tensors.items() if name.startswith(prefix)
            }

        self.model.load_state_dict(part("model."))
        if self.ema is not None:
            self.ema.module.load_state_dict(part("ema."))
        state: dict[int, dict[str, Any]] = {
            int(i): dict(v) for i, v in values["optimizer"]["numbers"].items()
        }
        for name, value in part("optimizer.").items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict(
            {"state": state, "param_groups": values["optimizer"]["param_groups"]}
        )
        self.loader.load_state_dict(values["loader"])
        if values["scaler"]:
            self.scaler.load_state_dict(values["scaler"])
        totals = tensors["totals"].to(self.totals.device)
        if (
            len(totals) == ranks
        ):  # the same sums in the same order: the log is the same to the last digit
            self.totals.copy_(totals[rank])
        else:
            self.totals.copy_(totals.sum(0)) if rank == 0 else self.totals.zero_()
        torch.set_rng_state(tensors["rng"].cpu())
        self.progress = Progress(**{key: values[key] for key in asdict(Progress())})
