"""The Grad-CAM program: supported checkpoints, diverged and unknown models."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matryoshka.inference import gradcam as program
from PIL import Image

from matryoshka.checkpoint import published
from matryoshka.checkpoint.model_file import save_model
from matryoshka.checkpoint.upstream import to_upstream
from matryoshka.data.augment import Preprocessing
from matryoshka.models import ModelSpec, build


def made(dims=(8, 512), efficient=False, num_classes=3):
    torch.manual_seed(0)
    model = build(ModelSpec("resnet10", num_classes, dims, efficient)).eval()
    model.preprocessing = Preprocessing(size=32, ratio=1.0)
    return model


@pytest.fixture
def picture(tmp_path, photo):
    (tmp_path / "data").mkdir()
    Image.fromarray(photo(32, 32)).save(tmp_path / "data" / "one.png")
    return tmp_path / "data" / "one.png"


def arguments(path, picture, output, *more):
    return [f"--path={path}", f"--data={picture}", f"--output={output}", "--device=cpu", *more]


def refused(capsys, argv):
    """The one-line error of the program."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        program.main(argv)
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert (end.value.code, len(lines), shown.out) == (2, 1, ""), shown
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["trunk.conv1.weight", "head.heads.1.bias"])
def test_a_diverged_model_has_no_maps(picture, tmp_path, capsys, value, place):
    model = made()
    with torch.no_grad():
        model.get_parameter(place).view(-1)[0] = value
    save_model(model, tmp_path / "bad.safetensors")
    line = refused(capsys, arguments(tmp_path / "bad.safetensors", picture, tmp_path / "maps"))
    assert f"{tmp_path / 'bad.safetensors'}: its outputs are not finite" in line
    assert not (tmp_path / "maps").exists()


def test_upstreams_old_checkpoints(picture, tmp_path, capsys):
    model = made(tuple(2**k for k in range(3, 10)), efficient=True)
    state = {
        key.replace("nesting_classifier_0.", ""): value for key, value in to_upstream(model).items()
    }
    torch.save(state, tmp_path / "old.pt")
    (tmp_path / "params.json").write_text(json.dumps({"validation.resolution": 32}))
    flags = ["--mrl", "--efficient", "--old_ckpt"]
    assert program.main(arguments(tmp_path / "old.pt", picture, tmp_path / "maps", *flags)) == 0
    (shown,) = json.loads((tmp_path / "maps" / "gradcam.json").read_text())
    pixels = (
        np.asarray(Image.open(picture)) / 255 - model.preprocessing.mean
    ) / model.preprocessing.std
    with torch.inference_mode():
        logits = model(torch.tensor(pixels.transpose(2, 0, 1)[None], dtype=torch.float32))[:, 0]
    assert [row["prediction"] for row in shown["prefixes"].values()] == [
        f"class {c}" for c in logits.argmax(1).tolist()
    ]
    torch.save(to_upstream(model), tmp_path / "new.pt")
    line = refused(capsys, arguments(tmp_path / "new.pt", picture, tmp_path / "no", *flags))
    assert "new.pt: not of upstream's old style" in line


def test_published_baselines(picture, tmp_path, capsys, monkeypatch):
    asked = []

    def load(name, option="--path"):  # without a download
        asked.append((name, option))
        model = made((512,), num_classes=1000)
        with torch.no_grad():
            model.head.heads[0].bias[207] += 100
        return model

    monkeypatch.setattr(published, "load_published", load)
    assert (
        program.main(arguments("torchvision:resnet18", picture, tmp_path / "maps", "--target=207"))
        == 0
    )
    assert asked == [("torchvision:resnet18", "--path")]
    (shown,) = json.loads((tmp_path / "maps" / "gradcam.json").read_text())
    assert list(shown["prefixes"]) == ["512"]
    assert shown["prefixes"]["512"]["prediction"] == "golden retriever"
    line = refused(
        capsys, arguments("timm:resnet10t", picture, tmp_path / "no", "--mrl", "--old_ckpt")
    )
    assert "--path timm:resnet10t: a published baseline takes no mrl, old_ckpt" in line


def test_unknown_published_baselines(picture, tmp_path, capsys):
    for name in ("torchvision:resnet51", "timm:none_of_these"):
        assert f"--path {name}: " in refused(capsys, arguments(name, picture, tmp_path / "no"))
    assert not Path(tmp_path / "no").exists()
