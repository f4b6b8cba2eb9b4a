"""Save and load adapters: safetensors, with everything but the weights as JSON in the metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from matryoshka import tensor_files
from matryoshka.checkpoint.contents import first_line
from matryoshka.embeddings.reading import adapted_sha256, trunk_sha256
from matryoshka.files import write_atomically
from matryoshka.models import NestedModel
from matryoshka.models.adapter import METHODS, Adapter, AdapterError, AdapterSpec

FORMAT = "matryoshka-adapter-1"
MAKE = "`matryoshka adapt` makes one"
DAMAGES = (LookupError, TypeError, ValueError, AttributeError, RuntimeError, RecursionError)
MOST = 1 << 20  # numbers of an embedding: a file may claim any width


def save_adapter(path: str | Path, adapter: Adapter, about: Mapping[str, Any]) -> None:
    """Write an adapter file. about: how it was made, a JSON object for readers of the file."""
    spec = asdict(adapter.spec)
    facts = {"format": FORMAT, "adapter": spec, "sha256": adapter.sha256(), "about": dict(about)}
    tensors = {
        name: value.detach().cpu().contiguous() for name, value in adapter.state_dict().items()
    }
    write_atomically(path, *tensor_files.encode(tensors, facts))


def load_adapter(path: str | Path) -> Adapter:
    """The adapter of a file, on the CPU, without gradients. AdapterError, one line."""
    path = Path(path)
    if not path.is_file():
        raise AdapterError(f"{path}: no such adapter file; {MAKE}")
    try:
        stored = tensor_files.read(path)
        facts = stored.metadata
        if facts is None or facts.get("format") != FORMAT:
            raise AdapterError(f"{path}: is not an adapter (no {FORMAT} metadata); {MAKE}")
        spec = _spec(facts["adapter"])
        state = stored.tensors()
        _check_shapes(spec, state)
        adapter = Adapter(spec)
        adapter.load_state_dict(state)
    except AdapterError:
        raise
    except (OSError, *DAMAGES) as error:
        raise AdapterError(
            f"{path}: is not a whole adapter ({first_line(error)}); {MAKE}"
        ) from None
    if facts.get("sha256") != adapter.sha256():
        raise AdapterError(f"{path}: is damaged: its weights have changed; get another copy of it")
    return adapter.eval().requires_grad_(False)


def _check_shapes(spec: AdapterSpec, state: Mapping[str, Tensor]) -> None:
    """ValueError unless the weights are those of `spec`; before memory of its size is allocated."""
    with torch.device("meta"):
        expected = {name: value.shape for name, value in Adapter(spec).state_dict().items()}
    if expected != {name: value.shape for name, value in state.items()}:
        raise ValueError(f"its weights do not fit width {spec.width}, dims {spec.dims}")
    if not all(value.dtype == torch.float32 for value in state.values()):
        raise ValueError("its weights are not float32")
    if not all(bool(value.isfinite().all()) for value in state.values()):
        raise ValueError("its weights are not finite")


def _spec(stored: Mapping[str, Any]) -> AdapterSpec:
    """The AdapterSpec of a file. ValueError for values that no adapter has."""
    spec = AdapterSpec(**{**stored, "dims": tuple(stored["dims"])})
    sizes = (spec.width, *spec.dims, spec.hidden)
    if not all(type(size) is int and 0 <= size <= MOST for size in sizes):
        raise ValueError(f"width {spec.width}, dims {spec.dims}, hidden {spec.hidden}")
    if spec.method not in METHODS:
        raise ValueError(f"method {spec.method!r}")
    if spec.encoder is not None and not isinstance(spec.encoder.get("weights_sha256"), str):
        raise ValueError("an encoder without weights_sha256")
    return spec


def adapted_model(
    encoder: Mapping[str, Any], adapter: Adapter, path: str | Path, what: str
) -> dict[str, Any]:
    """The entry `model` of meta.json for embeddings behind an adapter, from their encoder's.

    what: the embeddings or the model, for errors. AdapterError if the adapter was fitted to another
    encoder, or if the embeddings are behind an adapter already.
    """
    if "adapter" in encoder:
        raise AdapterError(
            f"--adapter {path}: {what} is behind an adapter already ({encoder['adapter']['file']})"
        )
    check_encoder(adapter, path, encoder["weights_sha256"], what)
    return {
        **encoder,
        "weights_sha256": adapted_sha256(encoder["weights_sha256"], adapter.sha256()),
        "dims": list(adapter.dims),
        "encoder_sha256": encoder["weights_sha256"],
        "adapter": {
            "file": str(path),
            "sha256": adapter.sha256(),
            "map": adapter.spec.map_name,
            "method": adapter.spec.method,
            "width": adapter.width,
        },
    }


def check_encoder(adapter: Adapter, path: str | Path, weights_sha256: str, what: str) -> None:
    """AdapterError if an adapter was fitted to embeddings of another encoder than that of `what`.

    Nothing is known about the encoder of bare arrays.
    """
    encoder = adapter.spec.encoder
    if encoder is not None and encoder["weights_sha256"] != weights_sha256:
        raise AdapterError(
            f"--adapter {path}: was fitted to embeddings of {encoder.get('file')} (weights "
            f"{encoder['weights_sha256'][:12]}), {what} has weights {weights_sha256[:12]}; fit "
            "another with `matryoshka adapt`"
        )


def add_adapter(model: NestedModel, path: str | Path, what: str) -> None:
    """Put the adapter of a file behind a model. what: the model, for errors.

    AdapterError for one of another width, or one that was fitted to another encoder.
    """
    adapter = load_adapter(path)
    adapter.check_width(model.width, f"--adapter {path}: {what} gives embeddings of")
    check_encoder(adapter, path, trunk_sha256(model), what)
    model.adapter = adapter.to(next(model.parameters()).device)
