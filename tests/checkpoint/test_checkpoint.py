"""The door: our files and upstream's, in their old and new style, with and without `module.`; and
hostile ones.
"""

import json
import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from matryoshka import checkpoint, config
from matryoshka.checkpoint import model_file
from matryoshka.checkpoint.contents import CheckpointError
from matryoshka.checkpoint.model_file import load_model, save_model
from matryoshka.checkpoint.upstream import save_upstream, to_upstream
from matryoshka.data.augment import Preprocessing
from matryoshka.files import write_atomically
from matryoshka.models import ModelSpec, build
from matryoshka.nested import default_dims

IMAGES = torch.randn(2, 3, 32, 32)


def model_of(dims=(8, 512), efficient=False, arch="resnet10", classes=10, blurpool=True):
    torch.manual_seed(0)
    model = build(ModelSpec(arch, classes, dims, efficient, blurpool)).eval()
    model.preprocessing = Preprocessing(size=64, ratio=1.0)
    model.classes = [f"class {i}" for i in range(classes)]
    return model


def old_style(model):
    """Upstream's old key names: MRL-E under fc.weight, fc.bias."""
    return {
        k.replace("nesting_classifier_0.", "") if model.spec.efficient else k: v
        for k, v in to_upstream(model).items()
    }


@pytest.mark.parametrize(
    ("dims", "efficient"),
    [((512,), False), ((16,), False), ((8, 512), False), ((8, 12, 512), True)],
)
def test_model_file_rebuilds_the_model(tmp_path, dims, efficient):
    model = model_of(dims, efficient)
    save_model(model, tmp_path / "model.safetensors", {"training.epochs": 3})
    loaded = load_model(tmp_path / "model.safetensors")
    assert loaded.spec == model.spec
    assert (loaded.preprocessing, loaded.classes, loaded.notes) == (
        model.preprocessing,
        model.classes,
        [],
    )
    assert torch.equal(loaded(IMAGES), model(IMAGES))
    assert not loaded.training
    assert os.listdir(tmp_path) == ["model.safetensors"]


@pytest.mark.parametrize("prefix", ["module.", ""])
@pytest.mark.parametrize("style", ["new", "old"])
@pytest.mark.parametrize(
    ("dims", "efficient", "flags"),
    [
        (default_dims(512), False, {"mrl": True}),
        (default_dims(512, 16), False, {"mrl": True}),
        (default_dims(512), True, {"efficient": True}),
        ((8, 12, 512), True, {"efficient": True, "dims": (8, 12, 512)}),
        ((512,), False, {}),
        ((16,), False, {"rep_size": 16}),
    ],
)
def test_upstream_files_give_identical_logits(tmp_path, *, prefix, style, dims, efficient, flags):
    model = model_of(dims, efficient, blurpool=style == "new")
    state = to_upstream(model) if style == "new" else old_style(model)
    torch.save({prefix + key: value for key, value in state.items()}, tmp_path / "w.pt")
    loaded = load_model(tmp_path / "w.pt", **flags)
    assert loaded.spec == model.spec
    assert torch.equal(loaded(IMAGES), model(IMAGES))


def test_keys_of_upstream():
    keys = set(to_upstream(model_of((8, 512), arch="resnet50")))
    assert {
        "fc.nesting_classifier_0.weight",
        "fc.nesting_classifier_1.bias",
        "layer2.0.conv2.conv.weight",
    } <= keys
    assert {"layer4.0.downsample.0.blur_filter", "conv1.weight", "bn1.num_batches_tracked"} <= keys
    assert {"fc.weight", "fc.bias"} <= set(to_upstream(model_of((64,))))
    mrl_e = to_upstream(model_of((8, 512), efficient=True))
    assert [k for k in mrl_e if k.startswith("fc.")] == [
        "fc.nesting_classifier_0.weight",
        "fc.nesting_classifier_0.bias",
    ]


def test_final_weights_load_into_torchvision_plus_the_papers_layer(tmp_path):
    """What upstream's code does with final_weights.pt: cut 7 characters, load into resnet + MRL
    layer.
    """
    import torchvision

    import MRL

    model = model_of(default_dims(512), arch="resnet18", blurpool=False)
    save_upstream(model, tmp_path / "final_weights.pt")
    state = torch.load(tmp_path / "final_weights.pt", weights_only=True)
    theirs = torchvision.models.resnet18()
    theirs.fc = MRL.MRL_Linear_Layer(list(default_dims(512)), num_classes=10)
    theirs.load_state_dict({key[7:]: value for key, value in state.items()})
    torch.testing.assert_close(torch.stack(theirs.eval()(IMAGES)), model(IMAGES), rtol=0, atol=0)


def test_params_json_determines_the_model_of_a_bare_file(tmp_path):
    model = model_of((16, 32, 64, 128, 256, 512), efficient=True, blurpool=False)
    save_upstream(model, tmp_path / "final_weights.pt")
    assumed = load_model(tmp_path / "final_weights.pt")
    assert assumed.dims == default_dims(512)
    assert "assumed" in assumed.notes[0]
    params = {
        "model.arch": "resnet10",
        "model.efficient": 1,
        "model.nesting_start": 4,
        "validation.resolution": 48,
    }
    (tmp_path / "params.json").write_text(json.dumps(params))
    loaded = load_model(tmp_path / "final_weights.pt")
    assert (loaded.dims, loaded.preprocessing.size, loaded.notes) == (model.dims, 48, [])


def test_an_old_mrl_e_file_is_never_guessed(tmp_path):
    model = model_of(default_dims(512), efficient=True)
    torch.save(old_style(model), tmp_path / "w.pt")
    as_ff = load_model(tmp_path / "w.pt")
    assert as_ff.spec.head_name == "ff512"
    assert "old-style MRL-E" in as_ff.notes[0]
    assert load_model(tmp_path / "w.pt", efficient=True).spec.head_name == "mrl-e"


@pytest.mark.parametrize(
    ("dims", "efficient", "flags", "words"),
    [
        ((512,), False, {"mrl": True}, ["mrl was requested", "ff512"]),
        ((8, 512), False, {"efficient": True}, ["efficient was requested", "mrl"]),
        ((8, 512), True, {"mrl": True}, ["mrl was requested", "mrl-e"]),
        ((16,), False, {"rep_size": 32}, ["32", "16"]),
        ((8, 512), False, {"dims": (8, 16)}, ["[8, 16]", "[8, 512]"]),
        ((8, 512), False, {"arch": "resnet50"}, ["resnet50"]),
    ],
)
@pytest.mark.parametrize("kind", ["ours", "upstream"])
def test_contradictions_with_flags_name_both_sides(
    tmp_path, *, kind, dims, efficient, flags, words
):
    model = model_of(dims, efficient)
    path = tmp_path / ("model.safetensors" if kind == "ours" else "w.pt")
    save_model(model, path) if kind == "ours" else save_upstream(model, path)
    with pytest.raises(CheckpointError) as error:
        load_model(path, **flags)
    assert all(word in str(error.value) for word in [str(path), *words])
    assert "\n" not in str(error.value)


def test_params_json_that_contradicts_the_file(tmp_path):
    save_upstream(model_of((512,)), tmp_path / "w.pt")
    (tmp_path / "params.json").write_text('{"model.mrl": 1}')
    with pytest.raises(CheckpointError, match=r"model.mrl=1"):
        load_model(tmp_path / "w.pt")
    (tmp_path / "params.json").write_text('{"model.arch": "resnet50"}')
    with pytest.raises(CheckpointError, match="not those of a resnet50"):
        load_model(tmp_path / "w.pt")
    (tmp_path / "params.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"params.json: not valid JSON"):
        load_model(tmp_path / "w.pt")


# ---------------------------------------------------------------- files that are not checkpoints


class Attack:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def hostile_files(folder, marker):
    good = folder / "good.safetensors"
    save_model(model_of(), good)
    content = good.read_bytes()
    pt = folder / "good.pt"
    save_upstream(model_of(), pt)
    wrong = {
        "format": "matryoshka-model-1",
        "model": {"arch": "resnet10", "num_classes": 10, "dims": [8]},
    }
    yield "html.pt", b"<html>404</html>"
    yield "html.safetensors", b"<html>404</html>"
    yield "empty.pt", b""
    yield "empty.safetensors", b""
    yield "cut.safetensors", content[: len(content) // 2]
    yield "cut.pt", pt.read_bytes()[: len(pt.read_bytes()) // 2]
    yield "pickle.pt", pickle.dumps(Attack(marker))
    save_file({"a": torch.zeros(1)}, folder / "plain.safetensors")
    yield "plain.safetensors", (folder / "plain.safetensors").read_bytes()
    for i, metadata in enumerate(
        ("[", "[]", '{"format": 3}', json.dumps(wrong), json.dumps(wrong | {"preprocessing": {}}))
    ):
        save_file({"a": torch.zeros(1)}, folder / "m.safetensors", {"matryoshka": metadata})
        yield f"metadata{i}.safetensors", (folder / "m.safetensors").read_bytes()


def test_files_that_are_not_checkpoints(tmp_path):
    marker = tmp_path / "executed"
    names = []
    for name, content in hostile_files(tmp_path, marker):
        (tmp_path / name).write_bytes(content)
        with warnings.catch_warnings(action="error"), pytest.raises(CheckpointError) as error:
            load_model(tmp_path / name)  # without torch's two lines of a warning
        assert name in str(error.value)
        assert "\n" not in str(error.value)
        assert ("an HTML page? a pickle that would run code? truncated?" in str(error.value)) == (
            ".pt" in name
        )
        assert "issue" not in str(error.value)
        names.append(name)
    torch.save({"model": Attack(marker)}, tmp_path / "zip.pt")
    torch.save({"epoch": 3, "state_dict": {}}, tmp_path / "trainer.pt")
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "headless.pt")
    torch.save(
        {"conv1.weight": torch.zeros(1), "fc.weight": torch.zeros(10, 512)}, tmp_path / "unknown.pt"
    )
    for name in ("zip.pt", "trainer.pt", "headless.pt", "unknown.pt", "missing.pt"):
        with pytest.raises(CheckpointError, match=name):
            load_model(tmp_path / name)
    assert not marker.exists()
    assert len(names) == 13, f"the test covers other files: {names}"


INVALID = [
    ({"dims": [0, 8]}, "dims [0, 8]"),
    ({"dims": [8, 8]}, "dims [8, 8]"),
    ({"dims": [512, 8]}, "dims [512, 8]"),
    ({"dims": []}, "dims []"),
    ({"dims": "8512"}, "dims ['8'"),
    ({"dims": [8, 512.0]}, "512.0"),
    ({"dims": [True, 512]}, "True"),
    ({"dims": 8}, "not a whole"),
    (
        {"dims": [8, 256]},
        "classifier 1 is [10, 512], by its dims and classes it should be [10, 256]",
    ),
    ({"dims": [8, 512, 1024]}, "classifier 2 is missing"),
    ({"arch": 18}, "arch"),
    ({"arch": ["resnet10"]}, "arch"),
    ({"efficient": "no"}, "efficient"),
    ({"num_classes": 10**12}, "1000000000000"),
    ({"num_classes": 10.0}, "classes is 10.0"),
    ({"num_classes": "10"}, "classes is '10'"),
    ({"num_classes": True}, "classes is True"),
    ({"num_classes": 0}, "classes is 0"),
    ({"size": -5}, "size=-5"),
    ({"size": 0}, "size=0"),
    ({"size": 10**9}, "size=1000000000"),
    ({"size": "large"}, "size='large'"),
    ({"size": 32.5}, "size=32.5"),
    ({"size": None}, "size=None"),
    ({"ratio": 0}, "ratio=0"),
    ({"ratio": float("nan")}, "ratio=nan"),
    ({"std": [0, 1, 1]}, "std=(0, 1, 1)"),
    ({"std": [1, 1]}, "std=(1, 1)"),
    ({"std": [1, float("inf"), 1]}, "inf"),
    ({"mean": ["0.5", 0, 0]}, "mean=('0.5', 0, 0)"),
    ({"mean": 0.5}, "not a whole"),
    ({"classes": "0123456789"}, "not a list of names"),
    ({"classes": list(range(10))}, "not a list of names"),
    ({"classes": {"ant": 0}}, "not a list of names"),
    ({"classes": ["ant", "bee"]}, "2 names for 10 classes"),
]


@pytest.mark.parametrize(("change", "words"), INVALID, ids=lambda value: str(value)[:30])
def test_invalid_metadata(tmp_path, monkeypatch, change, words):
    model = model_of()
    metadata = {"format": checkpoint.FORMAT} | json.loads(json.dumps(checkpoint.describe(model)))
    for key, value in change.items():
        place = next(
            (metadata[part] for part in ("model", "preprocessing") if key in metadata[part]),
            metadata,
        )
        assert key in place
        place[key] = value
    save_file(model.state_dict(), tmp_path / "m.safetensors", {"matryoshka": json.dumps(metadata)})
    monkeypatch.setattr(model_file, "build", lambda spec: pytest.fail(f"{spec} was built"))
    with pytest.raises(CheckpointError) as error:
        load_model(tmp_path / "m.safetensors")
    assert "m.safetensors: " in str(error.value)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"arch": "resnet11"}, "resnet11"),
        ({"dims": [8, 1024]}, "width 512"),
        ({"arch_options": ["width_per_group"]}, "arch_options"),
        ({"arch_options": {"width_per_group": 1 << 30}}, "arch_options"),
        ({"arch": "resnet50", "arch_options": {"width_per_group": 1 << 20}}, "do not fit"),
    ],
)
def test_metadata_of_models_that_cannot_be_built(tmp_path, change, words):
    model = model_of()
    metadata = {"format": checkpoint.FORMAT} | checkpoint.describe(model)
    metadata["model"] |= change
    state = model.state_dict() | {
        "head.heads.1.weight": torch.zeros(10, metadata["model"]["dims"][-1])
    }
    save_file(state, tmp_path / "m.safetensors", {"matryoshka": json.dumps(metadata)})
    with pytest.raises(CheckpointError, match=rf"m\.safetensors: .*{words}"):
        load_model(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("fc.weight", torch.tensor(1.0)),
        ("fc.weight", torch.zeros(10)),
        ("fc.weight", torch.zeros(10, 512, 1, 1)),
        ("fc.weight", torch.zeros(1).expand(10**12, 512)),  # a file of some bytes
        ("fc.weight", torch.zeros(10, 512).to_sparse()),
        ("fc.weight", torch.zeros(10, 512, device="meta")),
        ("fc.nesting_classifier_0.weight", torch.zeros(8)),
        (3, torch.zeros(10, 512)),
        (None, torch.zeros(10, 512)),
    ],
)
def test_invalid_state_dicts(tmp_path, key, value):
    state = {k: v for k, v in to_upstream(model_of((512,))).items() if k != "fc.weight"}
    torch.save(state | {key: value}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"w\.pt: ") as error:
        load_model(tmp_path / "w.pt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"model.arch": 18}, "params.json: model.arch is 18"),
        ({"model.nesting_start": "three"}, "params.json: model.nesting_start is 'three'"),
        ({"model.nesting_start": -1}, "params.json: model.nesting_start is -1"),
        ({"validation.resolution": "big"}, "params.json: validation.resolution is 'big'"),
        ({"model.dims": "abc"}, "its params.json"),
        ({"model.dims": [8, 1024]}, "beyond the feature width 512"),
        ({"model.dims": [8, 64]}, "end before the width 512"),
        ({"validation.resolution": 10**6}, "size=1000000"),
    ],
)
def test_invalid_params_json(tmp_path, params, words):
    save_upstream(model_of(efficient=True), tmp_path / "w.pt")
    (tmp_path / "params.json").write_text(json.dumps(params))
    with pytest.raises(CheckpointError) as error:
        load_model(tmp_path / "w.pt")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- writing


def written(path):
    """Run a program that writes `path`."""
    config.program(lambda: write_atomically(path, b"new"))()


@pytest.mark.parametrize("content", [None, b"old"])
def test_a_failed_write_names_its_target_and_leaves_it_unchanged(
    tmp_path, monkeypatch, capsys, content
):
    target = tmp_path / "x.json"
    if content:
        target.write_bytes(content)
    for call, error in {
        "write": OSError(28, "No space left on device"),
        "replace": PermissionError(13, "No", "t"),
    }.items():
        with monkeypatch.context() as patch:

            def failing(*_, error=error):
                raise error

            patch.setattr(os, call, failing)
            with pytest.raises(SystemExit) as end:
                written(target)
        assert end.value.code == 2
        assert capsys.readouterr().err == f"error: {target}: {error.strerror}\n"
        assert [p.read_bytes() for p in tmp_path.iterdir()] == ([content] if content else [])
    written(target)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"new"]


def test_places_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").touch()
    for target, words in {
        tmp_path: "is a folder",
        Path(): "is a folder",
        tmp_path / "file" / "x": "Not a directory",
        tmp_path / "none" / "x": "No such file",
    }.items():
        with pytest.raises(SystemExit):
            written(target)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {target}: {words}")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
