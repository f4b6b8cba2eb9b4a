"""Static quantisation of an ONNX file by onnxruntime: 8-bit weights and activations."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from matryoshka.export.graph import INPUT, OUTPUTS
from matryoshka.export.onnx import strip
from matryoshka.export.options import ExportError
from matryoshka.export.quiet import quiet
from matryoshka.models import one_line

# In a transformer only the large products gain; 8 bits in softmax and GELU cost accuracy.
TRANSFORMER = ["Conv", "Gemm", "MatMul"]


def quantise(content: bytes, batches: Iterable[Tensor]) -> bytes:
    """The 8-bit version of an .onnx file's content, as ONNX with QuantizeLinear nodes.

    batches: inputs of the file that set the ranges of activations (smallest to largest value).
    Weights have a scale per output channel and 7 bits, since x86 CPUs without VNNI add pairs of
    8-bit products in 16 bits, which saturate. The embedding and the classifiers stay float32: they
    are small, and a prefix of 8 numbers needs each of them.
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    metadata = {entry.key: entry.value for entry in onnx.load_from_string(content).metadata_props}
    try:
        with tempfile.TemporaryDirectory(prefix="matryoshka-int8-") as folder, quiet():
            source, prepared, result = (
                Path(folder) / f"{name}.onnx" for name in ("source", "prepared", "result")
            )
            source.write_bytes(content)
            # Merges batch norms into convolutions. Symbolic shapes would need another package.
            quant_pre_process(source, prepared, skip_symbolic_shape=True)
            graph = onnx.load_from_string(prepared.read_bytes()).graph
            kinds = {node.op_type for node in graph.node}
            quantization.quantize_static(
                prepared,
                result,
                _reader(quantization.CalibrationDataReader, batches),
                op_types_to_quantize=TRANSFORMER if "LayerNormalization" in kinds else None,
                nodes_to_exclude=_last_nodes(graph),
                per_channel=True,
                reduce_range=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                calibrate_method=quantization.CalibrationMethod.MinMax,
            )
            proto = onnx.load_from_string(result.read_bytes())
    except Exception as error:
        raise ExportError(
            f"--format int8: onnxruntime cannot quantise it: {one_line(error)}; "
            "choose other formats"
        ) from error
    strip(proto)
    for name, text in metadata.items():
        proto.metadata_props.add(key=name, value=text)
    return proto.SerializeToString()


def _reader(base: type, batches: Iterable[Tensor]) -> Any:
    """onnxruntime's interface of calibration data: get_next returns None after the last batch."""

    class Reader(base):
        def __init__(self) -> None:
            self._inputs: Iterator[dict[str, np.ndarray]] = (
                {INPUT: batch.numpy()} for batch in batches
            )

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self._inputs, None)

    return Reader()


def _last_nodes(graph: Any) -> list[str]:
    """Names of the nodes that stay float32: the embedding's last ones and the classifiers.

    From the outputs back to the last operation that has weights and does not make logits alone.
    """
    producers = {name: node for node in graph.node for name in node.output}

    def before(names: Iterable[str]) -> dict[str, Any]:
        """The nodes that the values `names` depend on, by the name of their first output."""
        found: dict[str, Any] = {}
        waiting = list(names)
        while waiting:
            node = producers.get(waiting.pop())
            if node is not None and node.output[0] not in found:
                found[node.output[0]] = node
                waiting += node.input
        return found

    embedding, logits = OUTPUTS
    trunk = before([embedding])
    excluded = [node.name for key, node in before([logits]).items() if key not in trunk]
    # The last nodes of the trunk, up to and without its last convolution or product.
    waiting = [embedding]
    while waiting:
        node = producers.get(waiting.pop())
        if node is not None and node.op_type not in (*TRANSFORMER, "Add", "Relu"):
            excluded.append(node.name)
            waiting += node.input
    return sorted(set(excluded))
