"""Training steps to measure: fixed feature, MRL and MRL-E, with our head and the paper's loops.

All steps are equal except for head and loss. The paper's versions are rewritten from the behaviour
of its repository (arXiv 2205.13147): one linear layer per prefix, or slices of a single one, in a
Python loop; one cross-entropy per output; their weighted sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from machine import Machine
from torch import Tensor, nn

from matryoshka.data.augment import normalise
from matryoshka.devices import autocast
from matryoshka.models import backbone
from matryoshka.models.blurpool import apply_blurpool
from matryoshka.nested import NestedLinear, default_dims, nested_cross_entropy, nested_logits
from matryoshka.training.compiling import compile_step
from matryoshka.training.optim import parameter_groups
from matryoshka.training.options import GRAPHS

FF = "FF"
MRL = "MRL"
MRL_E = "MRL-E"
OFFICIAL = "official MRL"
OFFICIAL_E = "official MRL-E"
KINDS = (FF, MRL, MRL_E, OFFICIAL, OFFICIAL_E)
MODES = {"eager": None, "compiled": "1", "graphs": GRAPHS}  # values of training.compile
SMOOTHING = 0.1
SHORT = {
    "rn18": "resnet18",
    "rn34": "resnet34",
    "rn50": "resnet50",
    "rn101": "resnet101",
    "rn152": "resnet152",
}


class OfficialHead(nn.Module):
    """features [B, D] -> a tuple of logits [B, C], one per prefix."""

    def __init__(self, dims: Sequence[int], classes: int, shared: bool) -> None:
        super().__init__()
        self.dims = tuple(dims)
        self.shared = shared
        self.heads = nn.ModuleList(
            nn.Linear(d, classes) for d in (self.dims[-1:] if shared else self.dims)
        )

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        outputs = ()
        for i, d in enumerate(self.dims):
            if self.shared:
                head = self.heads[0]
                outputs += (F.linear(features[:, :d], head.weight[:, :d], head.bias),)  # type: ignore[index,arg-type]
            else:
                outputs += (self.heads[i](features[:, :d]),)
        return outputs


class OfficialLoss(nn.Module):
    """The sum over prefixes of weight x cross-entropy; all weights are 1."""

    def __init__(self) -> None:
        super().__init__()
        self.criterion = nn.CrossEntropyLoss(label_smoothing=SMOOTHING)

    def forward(self, outputs: tuple[Tensor, ...], labels: Tensor) -> Tensor:
        losses = torch.stack([self.criterion(output.float(), labels) for output in outputs])
        return (torch.ones_like(losses) * losses).sum()


class OurLoss(nn.Module):
    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return nested_cross_entropy(logits.float(), labels, label_smoothing=SMOOTHING)[0]


class OurHead(NestedLinear):
    """NestedLinear with a choice of how the logits are computed."""

    fused: bool | None = None

    def forward(self, features: Tensor) -> Tensor:
        heads: list = [(head.weight, head.bias) for head in self.heads]
        return nested_logits(features, heads, self.dims, self.fused)


class _Objective(nn.Module):
    """(images or features, labels) -> loss. Images of uint8 are normalised here, as in training:
    in one piece for torch.compile.
    """

    def __init__(self, trunk: nn.Module, head: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head
        self.loss = loss

    def forward(self, inputs: Tensor, labels: Tensor) -> Tensor:
        if inputs.dtype == torch.uint8:
            inputs = normalise(inputs)
        return self.loss(self.head(self.trunk(inputs)), labels)


def objective(
    kind: str, trunk: nn.Module, width: int, classes: int, fused: bool | None = None
) -> nn.Module:
    dims = (width,) if kind == FF else default_dims(width)
    if kind.startswith("official"):
        return _Objective(trunk, OfficialHead(dims, classes, kind == OFFICIAL_E), OfficialLoss())
    head = OurHead(dims, classes, kind == MRL_E)
    head.fused = fused
    return _Objective(trunk, head, OurLoss())


class Step:
    """The trainer's step: images uint8 [B, H, W, 3] and labels [B] -> loss; updates the weights."""

    def __init__(
        self, kind: str, arch: str, classes: int, machine: Machine, *, blurpool: bool = False
    ) -> None:
        torch.manual_seed(0)
        trunk, width = backbone(SHORT.get(arch, arch))
        if blurpool:
            apply_blurpool(trunk)
        self.machine = machine
        model = objective(kind, trunk, width, classes).to(
            machine.device, memory_format=torch.channels_last
        )  # type: ignore[call-overload]
        self.optimizer = torch.optim.SGD(
            parameter_groups(model, 5e-5, 0), lr=0.01, momentum=0.9, fused=True
        )
        self.forward = compile_step(model, None)

    def compile(self, mode: str) -> None:
        """As the trainer does: with static shapes, from the uint8 images to the loss."""
        self.forward = compile_step(self.forward.module, MODES[mode])

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        self.forward.begin_step()
        with autocast(self.machine.device, self.machine.precision):
            loss = self.forward(images, labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def synthetic(batch: int, size: int, classes: int, machine: Machine) -> tuple[Tensor, Tensor]:
    """A batch on the device: images uint8 [B, size, size, 3], labels [B]."""
    images = torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, device=machine.device)
    return images, torch.randint(0, classes, (batch,), device=machine.device)


def head_call(
    kind: str, width: int, batch: int, *, classes: int, fused: bool | None, machine: Machine
) -> Callable[[], None]:
    """Forward and backward of head and loss alone, on features of the trunk's dtype."""
    torch.manual_seed(0)
    compute = objective(kind, nn.Identity(), width, classes, fused).to(machine.device)
    features = torch.randn(batch, width, device=machine.device).to(machine.dtype).requires_grad_()
    labels = torch.randint(0, classes, (batch,), device=machine.device)
    leaves = [features, *compute.parameters()]

    def call() -> None:
        for leaf in leaves:
            leaf.grad = None
        with autocast(machine.device, machine.precision):
            loss = compute(features, labels)
        loss.backward()

    return call


def as_graph(call: Callable[[], None]) -> Callable[[], None]:
    """The same work as one CUDA graph, which takes device time only, as behind a busy trunk."""
    # CUDA graphs need a few runs on a side stream first (torch.cuda.CUDAGraph's documentation).
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
