"""Files of torch.export, `.pt2`: a program for PyTorch without the model's Python code."""

from __future__ import annotations

import io
import json

import torch
from torch import Tensor

from matryoshka.export.graph import Graph, Run
from matryoshka.export.options import ExportError
from matryoshka.export.quiet import quiet
from matryoshka.models import one_line

METADATA = "matryoshka-export.json"  # a file inside the archive


def write_pt2(graph: Graph) -> bytes:
    """The content of a .pt2 file with a dynamic batch axis; the metadata is its METADATA."""
    buffer = io.BytesIO()
    facts = {name: json.loads(text) for name, text in graph.source.metadata().items()}
    try:
        with quiet():
            program = graph.exported()
            for node in program.graph.nodes:  # lines of source code with their paths
                node.meta.pop("stack_trace", None)
            torch.export.save(program, buffer, extra_files={METADATA: json.dumps(facts)})
    except Exception as error:
        arch = graph.source.model.spec.arch
        raise ExportError(
            f"--format pt2: cannot export {arch}: {one_line(error)}; choose other formats"
        ) from error
    return buffer.getvalue()


def open_pt2(written: bytes) -> Run:
    """Run what `write_pt2` has returned. A file of another origin can run code: never open one."""
    with quiet():
        module = torch.export.load(io.BytesIO(written)).module()

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return module(images)

    return run
