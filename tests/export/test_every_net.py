"""Every net for small images as an ONNX file that holds a prefix, run at two batch sizes."""

from dataclasses import replace

import pytest
import torch
from small_nets import LARGE, TINY

from matryoshka.export.formats import WRITERS, open_written
from matryoshka.export.graph import Deployed, record
from matryoshka.models import ModelSpec, build

# One net of each kind in every run of the tests; the others differ in sizes or positions.
QUICK = (
    "vit_small",
    "vitfixedposdualpatchnorm",
    "cct",
    "cait",
    "mlpmixer",
    "convmixer",
    "fast_cnn",
)
NETS = [net for net in TINY if net not in {"vitfixedposvqvae", *LARGE}]


def marked(net):
    return net if net in QUICK else pytest.param(net, marks=pytest.mark.slow)


@pytest.mark.parametrize("net", map(marked, [*NETS, "vit_nested"]))
def test_a_net_as_onnx(net):
    torch.manual_seed(0)
    options = {"patch": 4, "image_size": 8, "heads": 2} if net == "vit_nested" else TINY[net]
    size = options["image_size"]
    model = build(ModelSpec(net, 3, (4, 8), arch_options=options)).eval()
    model.preprocessing = replace(model.preprocessing, size=size, ratio=1.0)
    source = Deployed(model, 4, False)
    run = open_written("onnx", WRITERS["onnx"](record(source, 2)), 1)
    for batch in (1, 7):
        images = torch.randn(batch, 3, size, size)
        embedding, logits = run(images)
        with torch.inference_mode():
            wanted = model(images)[0]
        assert embedding.shape == (batch, 4)
        assert logits.shape == (1, batch, 3)
        assert (logits[0] - wanted).abs().max() <= 1e-4 * (1 + wanted.abs().max())
