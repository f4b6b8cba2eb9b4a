"""TorchScript files, `.pt`. PyTorch has deprecated TorchScript; `.pt2` is its successor."""

from __future__ import annotations

import io
import json

import torch
from torch import Tensor, fx

from matryoshka.export.graph import Graph, Run
from matryoshka.export.options import ExportError
from matryoshka.export.quiet import quiet
from matryoshka.export.torch_export import METADATA
from matryoshka.models import one_line

NOTE = "TorchScript is deprecated by PyTorch: use pt2 or onnx where you can"


def write_torchscript(graph: Graph) -> bytes:
    """The content of a TorchScript file with a dynamic batch axis; the metadata is its METADATA.

    Compiled from the recorded graph, not traced: a trace would fix the batch size.
    """
    facts = {name: json.loads(text) for name, text in graph.source.metadata().items()}
    buffer = io.BytesIO()
    try:
        with quiet():
            compiled = torch.jit.script(_compilable(graph.module)).eval()
            torch.jit.save(compiled, buffer, _extra_files={METADATA: json.dumps(facts)})
    except Exception as error:
        arch = graph.source.model.spec.arch
        raise ExportError(
            f"--format torchscript: cannot export {arch}: {one_line(error)}; choose other formats"
        ) from error
    return buffer.getvalue()


def _compilable(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a recorded graph in the words of TorchScript's compiler."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in graph.nodes:
        if node.target is torch.ops.aten.sym_size.int:
            node.op = "call_method"
            node.target = "size"
        elif isinstance(node.target, torch._ops.OpOverload):
            # The compiler chooses the overload by the types of the arguments.
            node.target = node.target.overloadpacket
    return fx.GraphModule(module, graph)


def open_torchscript(written: bytes) -> Run:
    """Run what `write_torchscript` has returned. A file of another origin can run code: never open
    one.
    """
    with quiet():
        module = torch.jit.load(io.BytesIO(written))

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return module(images)

    return run
