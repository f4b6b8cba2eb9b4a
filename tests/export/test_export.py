"""Exported files against the model that they come from."""

import json
import re
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from matryoshka.inference import export_models
from PIL import Image

from matryoshka import json_files
from matryoshka.checkpoint import load_model
from matryoshka.data import CenterCrop, Loader, open_dataset, read_images
from matryoshka.data.augment import normalise
from matryoshka.data.sources import open_images
from matryoshka.export import latency, torch_export
from matryoshka.export.formats import open_written
from matryoshka.export.graph import Deployed
from matryoshka.export.images import sample_images
from matryoshka.export.verify import largest_difference

FILES = {
    "onnx": "resnet10_d16.onnx",
    "pt2": "resnet10_d16.pt2",
    "torchscript": "resnet10_d16.pt",
    "int8": "resnet10_d16_int8.onnx",
}


def photos(folder, count):
    files = sorted((folder / "val").rglob("*.jpg"))[:count]
    return torch.from_numpy(read_images(files, CenterCrop(32, 1.0)))


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("name", FILES)
def test_outputs_are_those_of_the_model(exported, folder, name, batch):
    images = photos(folder, batch)
    model = exported.model
    with torch.no_grad():
        normalised = normalise(images, model.preprocessing.mean, model.preprocessing.std)
        features = model.features(normalised)[:, : exported.dim]
        logits = model(normalised)[:2]  # prefixes 8 and 16
    run = open_written(name, (exported.folder / FILES[name]).read_bytes(), 1)
    actual = run(images)
    limit = 0.3 if name == "int8" else 1e-4
    for got, wanted in zip(actual, (features, logits), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, wanted, rtol=limit, atol=limit)


def test_an_onnx_file_holds_only_what_the_prefix_needs(exported):
    proto = onnx.load(exported.folder / FILES["onnx"])
    stored = sum(int(np.prod(weight.dims)) for weight in proto.graph.initializer)
    # Batch norms are merged into convolutions: a kernel and a bias for each output channel.
    expected = 0
    for name, module in exported.model.trunk.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            last = name in ("layer4.0.conv2", "layer4.0.downsample.0")
            channels = exported.dim if last else module.out_channels
            expected += channels * (module.weight[0].numel() + 1)
    expected += 3 * (8 + 1) + 3 * (16 + 1)  # two classifiers of three classes
    assert expected <= stored <= expected + 50  # scale, shift and a few sizes
    whole = sum(p.numel() for p in exported.model.parameters())
    assert stored < 0.52 * whole


def test_an_onnx_file_describes_itself(exported):
    session = onnxruntime.InferenceSession(exported.folder / FILES["int8"])
    for path in (FILES["onnx"], FILES["int8"]):
        session = onnxruntime.InferenceSession(exported.folder / path)
        facts = {k: json.loads(v) for k, v in session.get_modelmeta().custom_metadata_map.items()}
        assert facts["dims"] == [8, 16]
        assert facts["embedding_dim"] == 16
        assert facts["classes"] == ["ant", "bee", "cat"]
        assert facts["preprocessing"]["size"] == 32
        assert facts["preprocessing"]["mean"] == [0.485, 0.456, 0.406]
        assert facts["input"] == "uint8 [B, 32, 32, 3], RGB"
        assert facts["model"]["arch"] == "resnet10"
        shapes = {v.name: v.shape for v in (*session.get_inputs(), *session.get_outputs())}
        assert shapes == {
            "input": ["batch", 32, 32, 3],
            "embedding": ["batch", 16],
            "logits": [2, "batch", 3],
        }


def test_metadata_of_the_other_formats(exported):
    extra = {torch_export.METADATA: ""}
    torch.jit.load(exported.folder / FILES["torchscript"], _extra_files=extra)
    scripted = json.loads(extra[torch_export.METADATA])
    extra = {torch_export.METADATA: ""}
    torch.export.load(exported.folder / FILES["pt2"], extra_files=extra)
    assert scripted == json.loads(extra[torch_export.METADATA])
    assert scripted["dims"] == [8, 16]


def test_a_file_names_no_source_code(exported):
    """The exporters note the stack of every operation, with the paths of this machine."""
    contents = [(exported.folder / FILES[name]).read_bytes() for name in ("onnx", "int8")]
    for name in ("pt2", "torchscript"):
        with zipfile.ZipFile(exported.folder / FILES[name]) as archive:
            contents += [archive.read(entry) for entry in archive.namelist()]
    for content in contents:
        assert str(Path(__file__).parents[2]).encode() not in content
        assert b"site-packages" not in content


def test_the_printed_accuracies(exported, folder):
    """Those of onnxruntime and NumPy's argmax, for each prefix, before and after."""
    files = sorted((folder / "val").rglob("*.jpg"))
    labels = np.array([["ant", "bee", "cat"].index(file.parent.name) for file in files])
    images = read_images(files, CenterCrop(32, 1.0))
    expected = {}
    for name in ("onnx", "int8"):
        session = onnxruntime.InferenceSession(exported.folder / FILES[name])
        logits = session.run(["logits"], {"input": images})[0]
        expected[name] = 100 * (logits.argmax(2) == labels).mean(1)
    rows = re.findall(r"^ +(8|16) +([\d.]+) +([\d.]+) +([+-][\d.]+)$", exported.text, re.MULTILINE)
    assert [int(row[0]) for row in rows] == [8, 16]
    for i, (_, before, after, change) in enumerate(rows):
        assert float(before) == pytest.approx(expected["onnx"][i], abs=0.006)
        assert float(after) == pytest.approx(expected["int8"][i], abs=0.006)
        assert float(change) == pytest.approx(expected["int8"][i] - expected["onnx"][i], abs=0.006)


def test_what_the_program_prints(exported):
    assert "TorchScript is deprecated" in exported.text
    assert re.search(r"verify: images of \S+, batch 1, 7", exported.text)
    for name in ("onnx", "pt2", "torchscript"):
        found = re.search(rf"^  {name} +(\S+)  \(limit 0.001\)$", exported.text, re.MULTILINE)
        assert float(found[1]) < 1e-4
    assert re.search(r"^  int8 .*no limit", exported.text, re.MULTILINE)
    assert re.search(r"latency on the CPU, median of 7 blocks in turns, \d+ threads", exported.text)
    for name in ("eager", "onnx", "pt2", "torchscript", "int8"):
        assert re.search(rf"^{name} +\d+\.\d\dx +\d+\.\d\d", exported.text, re.MULTILINE)


def test_the_example_of_the_documentation(exported, tmp_path, monkeypatch):
    """docs/export.md without torch: the same embedding as encode_files, but for the resampling."""
    page = (Path(__file__).parents[2] / "docs/export.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert "torch" not in block
    assert len([line for line in block.splitlines() if line.strip()]) <= 16
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    small.resize((200, 150), Image.Resampling.BICUBIC).save(tmp_path / "cat.jpg", quality=95)
    monkeypatch.chdir(tmp_path)
    name = re.search(r'"(exported_models/\S+\.onnx)"', block)[1]
    names = {}
    exec(block.replace(name, str(exported.folder / FILES["onnx"])), names)
    wanted = exported.model.encode_files("cat.jpg", truncate_dim=16, normalize=True)[0].numpy()
    got = names["embedding"][0] / np.linalg.norm(names["embedding"])
    assert got @ wanted > 0.999


# ---------------------------------------------------------------- parts


def test_inputs_are_normalised_as_everywhere(exported):
    source = Deployed(exported.model)
    images = source.noise(2, seed=3)
    p = exported.model.preprocessing
    torch.testing.assert_close(source.inputs(images), normalise(images, p.mean, p.std))
    assert Deployed(exported.model, with_preprocessing=True).inputs(images) is images


def test_the_largest_difference(exported):
    source = Deployed(exported.model, 8)
    images = source.noise(3)
    embedding, logits = source(source.inputs(images))
    assert largest_difference(source, source, images) == 0

    changed = logits.clone()
    changed[0, 2, 1] += 0.5
    expected = 0.5 / (1 + abs(float(logits[0, 2, 1])))
    found = largest_difference(lambda _: (embedding, changed), source, images)
    assert found == pytest.approx(expected, rel=1e-5)
    changed[0, 0, 0] = torch.nan
    assert largest_difference(lambda _: (embedding, changed), source, images) == np.inf
    assert largest_difference(lambda _: (embedding[:2], logits), source, images) == np.inf


def test_sampled_images_are_evenly_spaced(exported, folder):
    preprocessing = exported.model.preprocessing
    files = sorted((folder / "val").rglob("*.jpg"))
    whole = read_images(files, CenterCrop(32, 1.0))
    source = open_images([folder / "val"])
    assert np.array_equal(sample_images(source, 99, preprocessing).numpy(), whole)
    some = sample_images(source, 3, preprocessing).numpy()
    assert np.array_equal(some, whole[[0, 4, 8]])


def test_latencies_are_medians_of_turns(monkeypatch):
    now = 0.0
    order = []

    def call(name, durations):
        def run():
            nonlocal now
            order.append(name)
            now += durations.pop(0) if len(durations) > 1 else durations[0]

        return run

    monkeypatch.setattr(latency.time, "perf_counter", lambda: now)
    # a warm-up call, one that chooses the number of repeats, and three blocks
    calls = {"a": call("a", [9, 1, 1, 5, 2]), "b": call("b", [9, 2, 4, 4, 4])}
    found = latency.latencies(calls, blocks=3, block_seconds=1)
    assert found == {"a": 2, "b": 4}
    assert order == ["a", "a", "b", "b", "a", "b", "a", "b", "a", "b"]


def test_verify_takes_the_test_images_of_the_run(small_nested, digits, tmp_path, capsys):
    link = small_nested / "checkpoint/vitfixedposdualpatchnorm-cifar10-8-ckpt.t7"
    argv = [f"--checkpoint={link}", "--format=pt2", "--verify", "--no-latency"]
    assert export_models.main([*argv, f"--output_dir={tmp_path / 'first'}"]) == 0
    run = link.resolve().parents[1]
    assert f"verify: test images of {run}, batch 1, 7;" in capsys.readouterr().out

    args = SimpleNamespace(checkpoint=str(link), images=None)
    source = Deployed(load_model(link))
    images, _ = export_models.verification_images(args, source, 7)
    loader = Loader(open_dataset(digits["val"]), 100, order="sequential", crop=CenterCrop(32, 1.0))
    (whole,) = loader
    assert torch.equal(images, whole.images[[0, 16, 33, 50, 66, 82, 99]])  # 99/6 apart

    # A run whose images have gone.
    copy = tmp_path / "moved"
    shutil.copytree(run, copy)
    params, _ = json_files.decode((copy / "params.json").read_bytes())
    params["data.val_dataset"] = str(tmp_path / "gone.beton")
    (copy / "params.json").write_text(json.dumps(params))
    argv[0] = f"--checkpoint={copy / 'model.safetensors'}"
    assert export_models.main([*argv, f"--output_dir={tmp_path / 'second'}"]) == 0
    text = f"verify: noise (the test images of {copy} are not here any more), batch 1, 7;"
    assert text in capsys.readouterr().out
