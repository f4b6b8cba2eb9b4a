"""A linear classifier per prefix that learns beside a run, on features that it does not change.

    probe = OnlineProbe(dims=(8, 64, 512), num_classes=10)
    right, labelled = probe.update(features, labels)     # in every step of training
    right, labelled = probe.answers(features, labels)    # of images that it does not learn from
    accuracy = 100 * right / labelled                    # top-1 % of each prefix [G]

Its accuracy follows that of a converged linear probe from below, without a pass over the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from matryoshka.nested import NestedLinear

_TILE = 1 << 24  # numbers in the largest intermediate
LR = 1e-3  # AdamW's default, which fits because the features are normalised


class Answers(NamedTuple):
    """Sums over a batch, on its device: right answers of each prefix [G], images with a label."""

    right: Tensor
    labelled: Tensor


class OnlineProbe(nn.Module):
    """One linear head per prefix on detached features, normalised by a batch norm without weights.

    The step of AdamW is inside, and its state is in `state_dict()` as tensors. The parameters do
    not require gradients outside `update`: optimizers, averages of weights and DDP of the run leave
    them alone. In several processes give `update` the features and labels of all of them: each
    process then makes the same step.

    dims: G prefixes of features [B, D]; num_classes: C, labels are 0 to C - 1, or -1 for none.
    """

    def __init__(
        self,
        dims: Sequence[int],
        num_classes: int,
        *,
        lr: float = LR,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__()
        self.head = NestedLinear(dims, num_classes)
        self.dims = self.head.dims
        self.normalise = nn.BatchNorm1d(self.dims[-1], affine=False)
        self.lr = lr
        self.weight_decay = weight_decay
        self.head.requires_grad_(False)
        for name, parameter in self.head.named_parameters():
            nn.init.zeros_(parameter)  # the minimum of a convex loss does not depend on the start
            flat = name.replace(".", "_")
            self.register_buffer(f"{flat}_exp_avg", torch.zeros_like(parameter))
            self.register_buffer(f"{flat}_exp_avg_sq", torch.zeros_like(parameter))
            self.register_buffer(f"{flat}_step", torch.zeros(()))

    def forward(self, features: Tensor) -> Tensor:
        """Logits [G, B, C] of features [B, >= D], in float32; no gradient reaches the features."""
        with torch.autocast(features.device.type, enabled=False):
            return self.head(self.normalise(features.detach()[:, : self.dims[-1]].float()))

    def update(self, features: Tensor, labels: Tensor) -> Answers:
        """One step on a batch; how many of its labelled images were right before the step.

        Nothing here waits for a GPU. A batch of one image has no statistics: no step.
        """
        features = features.detach()[:, : self.dims[-1]].float()
        labels = labels.to(features.device)
        if len(features) < 2:
            return Answers(features.new_zeros(len(self.dims)), features.new_zeros(()))
        # A run that diverges is rolled back or stopped elsewhere; these classifiers stay finite.
        features = features.nan_to_num(0, 0, 0)
        parameters = list(self.head.parameters())
        labelled = (labels >= 0).sum()
        self.train()
        self.head.requires_grad_(True)
        with torch.enable_grad():
            logits = self(features)  # [G, B, C]
            total = F.cross_entropy(
                logits.flatten(0, 1),
                labels.repeat(len(self.dims)),
                ignore_index=-1,
                reduction="sum",
            )
            gradients = torch.autograd.grad(total / labelled.clamp_min(1), parameters)
        self.head.requires_grad_(False)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer = self._optimizer(parameters)
        optimizer.step()
        optimizer.zero_grad()
        return _answers(logits.detach(), labels)

    @torch.no_grad()
    def write_into(self, head: NestedLinear) -> None:
        """Give a model's classifiers the weights with which they answer as this probe does.

        The running statistics of the batch norm become part of them. ValueError for another head.
        """
        if head.shared or head.dims != self.dims:
            raise ValueError(f"a head of dims {head.dims}, the probe has {self.dims}")
        mean, variance = self.normalise.running_mean, self.normalise.running_var
        assert mean is not None
        assert variance is not None
        scale = (variance + self.normalise.eps).rsqrt()
        for d, own, other in zip(self.dims, self.head.heads, head.heads, strict=True):
            weight = own.get_parameter("weight") * scale[:d]
            other.get_parameter("weight").copy_(weight)
            other.get_parameter("bias").copy_(own.get_parameter("bias") - weight @ mean[:d])

    def _optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.AdamW:
        """AdamW around the buffers, which `to` and `load_state_dict` may have replaced."""
        on_gpu = parameters[0].is_cuda
        optimizer = torch.optim.AdamW(
            parameters, lr=self.lr, weight_decay=self.weight_decay, capturable=on_gpu
        )
        for name, parameter in self.head.named_parameters():
            flat = name.replace(".", "_")
            optimizer.state[parameter] = {
                "step": self.get_buffer(f"{flat}_step"),
                "exp_avg": self.get_buffer(f"{flat}_exp_avg"),
                "exp_avg_sq": self.get_buffer(f"{flat}_exp_avg_sq"),
            }
        return optimizer

    @torch.no_grad()
    def answers(self, features: Tensor, labels: Tensor) -> Answers:
        """How many labelled images are right, with the running statistics and without a step."""
        self.eval()
        labels = labels.to(features.device)
        # 9 prefixes, 1,000 classes and 50,000 images would be 1.8 GB of logits.
        rows = max(1, _TILE // (len(self.dims) * self.head.num_classes))
        parts = zip(features.split(rows), labels.split(rows), strict=True)
        right, labelled = zip(*(_answers(self(x), y) for x, y in parts), strict=True)
        return Answers(torch.stack(right).sum(0), torch.stack(labelled).sum())


def _answers(logits: Tensor, labels: Tensor) -> Answers:
    right = (logits.argmax(2) == labels).sum(1)  # no answer equals -1
    return Answers(right.float(), (labels >= 0).sum().float())
