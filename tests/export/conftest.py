"""One model and its exported files, shared by the tests of this folder."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from matryoshka.inference import export_models

from matryoshka.checkpoint import load_model, save_model
from matryoshka.export.latency import latencies
from matryoshka.models import ModelSpec, build

DIM = 16


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A random resnet10 for 32 px, MRL, whose batch norms differ from the identity."""
    torch.manual_seed(0)
    model = build(ModelSpec("resnet10", 3, (8, DIM, 64)))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.5, 0.5)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    model.preprocessing = replace(model.preprocessing, size=32, ratio=1.0)
    model.classes = ["ant", "bee", "cat"]
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    save_model(model, path)
    return path


@pytest.fixture(scope="session")
def exported(checkpoint, folder, tmp_path_factory):
    """All formats of `checkpoint`, truncated, with preprocessing: folder, model, printed text."""
    output = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *parts, **_: printed.append(" ".join(parts)))
        patch.setattr(export_models, "TIMED", (1,))
        patch.setattr(export_models, "latencies", partial(latencies, block_seconds=0.005))
        status = export_models.main(
            [
                f"--checkpoint={checkpoint}",
                f"--output_dir={output}",
                "--model_type=resnet10",
                "--format=onnx,pt2,torchscript,int8",
                f"--truncate-dim={DIM}",
                "--with-preprocessing",
                f"--calibration={folder / 'train'}",
                f"--eval-data={folder / 'val'}",
                "--verify",
                f"--images={folder / 'val'}",
            ]
        )
    assert status == 0
    return SimpleNamespace(
        folder=output, model=load_model(checkpoint), text="\n".join(printed), dim=DIM
    )
