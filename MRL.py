"""The paper's public names, with the signatures, attributes and state_dict keys of its repository.

`from MRL import MRL_Linear_Layer, Matryoshka_CE_Loss, FixedFeatureLayer` keeps working in code that
was written for it. New code uses `matryoshka.nested`, which these classes call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matryoshka.nested import check_dims, nested_logits

__all__ = ["FixedFeatureLayer", "MRL_Linear_Layer", "Matryoshka_CE_Loss"]


class Matryoshka_CE_Loss(nn.Module):
    """sum_g relative_importance[g] * CrossEntropyLoss(**kwargs)(output[g], target) -> scalar.

    output: [G, B, C] or a sequence of G tensors [B, C]; target [B]. The sum is not divided by G.
    """

    def __init__(self, relative_importance: Sequence[float] | None = None, **kwargs) -> None:
        super().__init__()
        self.criterion = nn.CrossEntropyLoss(**kwargs)
        self.relative_importance = relative_importance

    def forward(self, output: Tensor | Sequence[Tensor], target: Tensor) -> Tensor:
        losses = torch.stack([self.criterion(logits, target) for logits in output])
        if self.relative_importance is None:
            return losses.sum()
        if len(self.relative_importance) != len(losses):
            raise ValueError(
                f"relative_importance has {len(self.relative_importance)} weights for "
                f"{len(losses)} outputs"
            )
        # On the device of the losses: upstream's version fails on a GPU.
        return (losses * losses.new_tensor(self.relative_importance)).sum()


class MRL_Linear_Layer(nn.Module):
    """Nested classifiers as modules `nesting_classifier_{i}` -> tuple of G logits [B, C], shortest
    prefix first.

    efficient=False: one nn.Linear(nesting_list[i], num_classes, **kwargs) per prefix (MRL).
    efficient=True: `nesting_classifier_0` alone, of the longest width, sliced for every prefix
    (MRL-E).
    """

    def __init__(
        self,
        nesting_list: Sequence[int],
        num_classes: int = 1000,
        efficient: bool = False,
        **kwargs,
    ) -> None:
        super().__init__()
        self.nesting_list = list(check_dims(nesting_list, max(nesting_list, default=0)))
        self.num_classes = num_classes
        self.efficient = efficient
        widths = self.nesting_list[-1:] if efficient else self.nesting_list
        # Attributes, not an nn.ModuleList: their names are the keys of upstream's state_dicts.
        for i, width in enumerate(widths):
            setattr(self, f"nesting_classifier_{i}", nn.Linear(width, num_classes, **kwargs))

    def _classifiers(self) -> list[nn.Linear]:
        count = 1 if self.efficient else len(self.nesting_list)
        return [getattr(self, f"nesting_classifier_{i}") for i in range(count)]

    def reset_parameters(self) -> None:
        for classifier in self._classifiers():
            classifier.reset_parameters()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        heads = [(classifier.weight, classifier.bias) for classifier in self._classifiers()]
        return tuple(nested_logits(x, heads, self.nesting_list))


class FixedFeatureLayer(nn.Linear):
    """nn.Linear on the first `in_features` columns of its input (keys `weight`, `bias`)."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input[:, : self.in_features], self.weight, self.bias)
