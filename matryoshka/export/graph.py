"""A model as one graph, from which every format is written."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from matryoshka import checkpoint
from matryoshka.export.cut import cut
from matryoshka.export.options import ExportError
from matryoshka.export.quiet import quiet
from matryoshka.models import ModelError, NestedModel, one_line, with_prefixes

FORMAT = "matryoshka-export-1"
INPUT = "input"
OUTPUTS = ("embedding", "logits")

# Computes a file: its input -> (embedding [B, d], logits [G, B, C]).
Run = Callable[[Tensor], tuple[Tensor, Tensor]]


class Deployed(nn.Module):
    """What a file computes: images -> (embedding [B, d], logits [G, B, C]).

    with_preprocessing: images are uint8 [B, S, S, 3], normalised here; else float32 [B, 3, S, S],
    normalised already. truncate_dim: d, and only the prefixes up to it; None: all. The embedding of
    a model with an adapter is behind it, the logits are those of the features before it, of all
    prefixes.

    ExportError for a truncate_dim that is not a prefix of the model, or of its adapter.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, model: NestedModel, truncate_dim: int | None = None, with_preprocessing: bool = False
    ) -> None:
        super().__init__()
        model = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
        if truncate_dim is not None:
            model = _truncated(model, truncate_dim)
        self.model = model
        self.embedding_dim = truncate_dim or model.embedding_width
        self.with_preprocessing = with_preprocessing
        # (x / 255 - mean) / std as x * scale + shift. Not augment.normalise: its cached constants
        # would keep the fake tensors of a recording.
        mean = torch.tensor(model.preprocessing.mean)
        std = torch.tensor(model.preprocessing.std)
        self.register_buffer("scale", (1 / (255 * std)).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("shift", (-mean / std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        normalised = self._normalised(images) if self.with_preprocessing else images
        # `cut` merges what the two calls compute twice.
        return self.model.embeddings(normalised)[:, : self.embedding_dim], self.model(normalised)

    def logits(self, images: Tensor) -> Tensor:
        """Only the logits: the model's usual call, for its latency."""
        return self.model(self._normalised(images) if self.with_preprocessing else images)

    def inputs(self, images: Tensor) -> Tensor:
        """The input of a file for images uint8 [B, S, S, 3]."""
        return images if self.with_preprocessing else self._normalised(images)

    def _normalised(self, images: Tensor) -> Tensor:
        return torch.addcmul(self.shift, images.permute(0, 3, 1, 2).float(), self.scale)

    def noise(self, batch: int, seed: int = 0) -> Tensor:
        """Random images, uint8 [B, S, S, 3]."""
        size = self.model.preprocessing.size
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8, generator=generator)

    def input_text(self) -> str:
        """Type, shape and meaning of the input."""
        size = self.model.preprocessing.size
        if self.with_preprocessing:
            return f"uint8 [B, {size}, {size}, 3], RGB"
        return f"float32 [B, 3, {size}, {size}], RGB, (pixel / 255 - mean) / std"

    def metadata(self) -> dict[str, str]:
        """What a user of the file needs, as JSON texts by name; docs/export.md lists them."""
        model = self.model
        described = checkpoint.describe(model)
        facts = {
            "format": FORMAT,
            "input": self.input_text(),
            "embedding_dim": self.embedding_dim,
            "dims": list(model.dims),
            "classes": model.classes,
            "preprocessing": described["preprocessing"],
            "model": described["model"],
        }
        if model.adapter is not None:
            kept = [dim for dim in model.adapter.dims if dim <= self.embedding_dim]
            facts["adapter"] = {"sha256": model.adapter.sha256(), "dims": kept}
        return {name: json.dumps(value) for name, value in facts.items()}


def _truncated(model: NestedModel, dim: int) -> NestedModel:
    """`model` with its prefixes up to `dim`; with an adapter, the model itself."""
    if model.adapter is not None:
        if dim not in model.adapter.dims:
            known = ", ".join(map(str, model.adapter.dims))
            raise ExportError(
                f"--truncate-dim {dim}: not a prefix of the adapter, which has {known}"
            )
        return model
    kept = [d for d in model.dims if d < dim]
    try:
        return with_prefixes(model, [*kept, dim])
    except ModelError:
        known = ", ".join(map(str, model.dims))
        raise ExportError(
            f"--truncate-dim {dim}: not a prefix of the model, which has {known}"
        ) from None


@dataclass(frozen=True)
class Graph:
    """A recorded model: `module`, the graph; `source`, the model that it computes."""

    module: fx.GraphModule
    source: Deployed
    example: Tensor  # an input, [B, ...]

    def exported(self) -> torch.export.ExportedProgram:
        """The graph for torch.export and ONNX, with a dynamic batch axis."""
        return _export(self.module, self.example)


def record(source: Deployed, batch: int = 2) -> Graph:
    """Record `source` with an example of `batch` images, and cut it to what its outputs need.

    ExportError for a model that does not take images of its size, or whose code torch.export cannot
    follow.
    """
    # torch.export takes an axis of length 1 for a constant.
    example = source.inputs(source.noise(max(2, batch)))
    size = source.model.preprocessing.size
    arch = source.model.spec.arch
    with torch.no_grad():
        try:
            source(example)
        except Exception as error:
            raise ExportError(
                f"{arch} does not take images of {size} pixels ({one_line(error)}); "
                "choose --img_size"
            ) from error
        try:
            with quiet():
                program = _recorded(source, example).run_decompositions({})
        except Exception as error:
            raise ExportError(f"torch.export cannot record {arch}: {one_line(error)}") from error
    return Graph(cut(program.module()), source, example)  # type: ignore[arg-type]


def _recorded(source: Deployed, example: Tensor) -> torch.export.ExportedProgram:
    try:
        return _export(source, example)
    except Exception as error:
        # `len(x)` in a model's code fixes the batch size in this mode. The strict one, which reads
        # bytecode, is several times slower and follows it.
        try:
            return _export(source, example, strict=True)
        except Exception:
            raise error from None


def _export(
    module: nn.Module, example: Tensor, strict: bool = False
) -> torch.export.ExportedProgram:
    shapes = ({0: torch.export.Dim("batch")},)
    with torch.no_grad():
        return torch.export.export(module, (example,), dynamic_shapes=shapes, strict=strict)
