"""The formats of an export by name."""

from __future__ import annotations

from collections.abc import Callable

from matryoshka.export.graph import Graph, Run
from matryoshka.export.onnx import open_onnx, write_onnx
from matryoshka.export.torch_export import open_pt2, write_pt2
from matryoshka.export.torchscript import open_torchscript, write_torchscript

# Content of a file from the recorded graph. int8 is made from the content of an .onnx file.
WRITERS: dict[str, Callable[[Graph], bytes]] = {
    "onnx": write_onnx,
    "pt2": write_pt2,
    "torchscript": write_torchscript,
}
# The end of a file's name.
ENDINGS = {"onnx": ".onnx", "pt2": ".pt2", "torchscript": ".pt", "int8": "_int8.onnx"}


def open_written(name: str, content: bytes, threads: int) -> Run:
    """Run the content of a file that this process has written in the format `name`.

    threads: of onnxruntime; the other formats use PyTorch's.
    """
    if name == "pt2":
        return open_pt2(content)
    if name == "torchscript":
        return open_torchscript(content)
    return open_onnx(content, threads)
