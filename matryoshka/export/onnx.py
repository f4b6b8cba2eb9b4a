"""ONNX files, by PyTorch's exporter that starts from torch.export, and onnxruntime to run them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from matryoshka.export.graph import INPUT, OUTPUTS, Graph, Run
from matryoshka.export.options import ExportError
from matryoshka.export.quiet import quiet
from matryoshka.models import one_line

MAX_BYTES = 2**31 - 1  # of one protocol buffer


def write_onnx(graph: Graph) -> bytes:
    """The content of an .onnx file: one input, `input`, and the outputs `embedding` and `logits`.

    The batch axis is dynamic. Preprocessing, classes and prefixes are in `metadata_props`.
    ExportError names an operation that ONNX lacks.
    """
    try:
        with quiet():
            program: Any = torch.onnx.export(
                graph.exported(),
                (graph.example,),
                input_names=[INPUT],
                output_names=list(OUTPUTS),
                dynamic_shapes=({0: torch.export.Dim("batch")},),  # the name in the file
                dynamo=True,
                verbose=False,
            )
    except Exception as error:
        arch = graph.source.model.spec.arch
        raise ExportError(
            f"--format onnx: cannot export {arch}: {one_line(first_cause(error))}; "
            "choose other formats"
        ) from error
    proto = program.model_proto
    strip(proto)
    for name, text in graph.source.metadata().items():
        proto.metadata_props.add(key=name, value=text)
    size = proto.ByteSize()
    if size > MAX_BYTES:
        raise ExportError(
            f"--format onnx: the file would have {size / 2**30:.1f} GB, ONNX files have at most 2; "
            "choose --format pt2"
        )
    return proto.SerializeToString()


def strip(proto: Any) -> None:
    """Remove the exporter's notes on every node: lines of source code with their paths."""
    for part in (proto.graph, *proto.functions):
        for node in part.node:
            del node.metadata_props[:]
            node.doc_string = ""
        for value in part.value_info:
            del value.metadata_props[:]
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        del value.metadata_props[:]
    del proto.graph.metadata_props[:]
    del proto.metadata_props[:]


def first_cause(error: BaseException) -> Exception:
    """The exception that began a chain of `raise ... from ...`."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    assert isinstance(error, Exception)
    return error


def open_onnx(content: bytes, threads: int) -> Run:
    """Run the content of an .onnx file on the CPU with onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors
    # Its threads would wait actively for the next run, and slow down what is measured beside it.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        embedding, logits = session.run(list(OUTPUTS), {INPUT: images.numpy()})
        return torch.from_numpy(embedding), torch.from_numpy(logits)

    return run
