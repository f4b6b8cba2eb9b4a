"""A model as files that run without this package.

options.py       options of `matryoshka export`, ExportError; without torch
graph.py         Deployed, what a file computes; record, its graph; start here
cut.py           reduces a graph to what its outputs need
onnx.py          ONNX, run by onnxruntime
torch_export.py  torch.export's .pt2
torchscript.py   TorchScript, which PyTorch has deprecated
int8.py          ONNX with 8-bit weights and activations
formats.py       the formats by name: WRITERS, open_written
verify.py        differences between a file and the model
latency.py       times of files and model, measured in turns
images.py        images for calibration and verification
packages.py      packages that an export needs, or how to install them
quiet.py         silences other libraries
"""

from typing import TYPE_CHECKING

from matryoshka import lazy
from matryoshka.export.options import ExportError

if TYPE_CHECKING:
    from matryoshka.export.formats import WRITERS, open_written
    from matryoshka.export.graph import Deployed, Graph, record
    from matryoshka.export.int8 import quantise
    from matryoshka.export.verify import largest_difference

__all__ = [
    "WRITERS",
    "Deployed",
    "ExportError",
    "Graph",
    "largest_difference",
    "open_written",
    "quantise",
    "record",
]

__getattr__ = lazy.attribute(
    __name__,
    {
        "formats": ("WRITERS", "open_written"),
        "graph": ("Deployed", "Graph", "record"),
        "int8": ("quantise",),
        "verify": ("largest_difference",),
    },
)
