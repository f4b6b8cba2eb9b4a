"""Initial weights from every source, frozen stages, and invalid options."""

import copy
import json
import pickle
from dataclasses import replace

import huggingface_hub
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from matryoshka import checkpoint
from matryoshka.checkpoint.model_file import save_model
from matryoshka.checkpoint.transfer import apply_freeze, check_start, start_model
from matryoshka.checkpoint.upstream import save_upstream, to_upstream
from matryoshka.data.augment import Preprocessing
from matryoshka.models import ModelConfig, ModelError, ModelSpec, build, model_spec
from matryoshka.models.blurpool import apply_blurpool
from matryoshka.nested import nested_cross_entropy
from matryoshka.training.optim import parameter_groups

IMAGES = torch.randn(2, 3, 64, 64)
MRL = ModelSpec("resnet10", 10, (8, 512))


def source_of(spec=MRL):
    """A model in which every weight and statistic differs from a new model's."""
    torch.manual_seed(1)
    model = build(spec).train()
    for _ in range(2):
        model(torch.randn(4, 3, 64, 64))  # moves the batch-norm statistics
    model.preprocessing = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    return model.eval()


def start(init, spec=MRL, freeze="", classes=None, pretrained=False):
    config = ModelConfig(
        arch=spec.arch, init=init and str(init), freeze=freeze, pretrained=pretrained
    )
    check_start(config, spec, classes)
    torch.manual_seed(0)
    model, notes = start_model(config, spec, classes)
    assert not any("\n" in note for note in notes)
    return model.eval(), notes


def fresh_head(spec=MRL):
    torch.manual_seed(0)
    return build(spec).head.state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def cached_torchvision(monkeypatch, folder, name, weights, content=None):
    """Put `content`, or the weights of a new model, into torchvision's cache; return the model."""
    monkeypatch.setenv("TORCH_HOME", str(folder))
    torch.manual_seed(3)
    model = torchvision.models.get_model(name).eval()
    url = torchvision.models.get_model_weights(name)[weights].url
    (folder / "hub" / "checkpoints").mkdir(parents=True, exist_ok=True)
    path = folder / "hub" / "checkpoints" / url.rsplit("/", 1)[1]
    path.write_bytes(content) if content is not None else torch.save(model.state_dict(), path)
    model.fc = nn.Identity()
    return model


def cached_timm(monkeypatch, folder, name):
    """Put weights of `name` into Hugging Face's cache; return their model without head."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    torch.manual_seed(3)
    model = timm.create_model(name).eval()
    repository = (
        folder
        / f"models--timm--{model.pretrained_cfg['architecture']}.{model.pretrained_cfg['tag']}"
    )
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    save_file(model.state_dict(), snapshot / "model.safetensors")
    model.reset_classifier(0)
    return model


# ---------------------------------------------------------------- start weights


@pytest.mark.parametrize("kind", ["ours", "upstream", "upstream, no prefix"])
@pytest.mark.parametrize("blurpool", [False, True])
def test_a_checkpoint_gives_trunk_and_head(tmp_path, kind, blurpool):
    spec = replace(MRL, blurpool=blurpool)
    source, path = source_of(spec), tmp_path / ("m.safetensors" if kind == "ours" else "w.pt")
    if kind == "ours":
        save_model(source, path)
    elif kind == "upstream":
        save_upstream(source, path)
    else:
        torch.save(to_upstream(source), path)
    model, notes = start(path, spec)
    assert same(model.state_dict(), source.state_dict())
    assert notes[0] == f"trunk from {path} with its head"
    assert model.preprocessing == (source.preprocessing if kind == "ours" else Preprocessing())
    assert [note for note in notes if "normalised" in note] == notes[1:]
    assert len(notes) == (2 if kind == "ours" else 1), f"{notes}"


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (ModelSpec("resnet10", 7, (8, 512)), "10 classes in the file, 7 in the model"),
        (ModelSpec("resnet10", 10, (8, 16)), "dims [8, 512] in the file, [8, 16] in the model"),
        (
            ModelSpec("resnet10", 10, (8, 512), efficient=True),
            "mrl in the file, mrl-e in the model",
        ),
        (ModelSpec("resnet10", 10, (64,)), "mrl in the file, ff64 in the model"),
        (MRL, "the class names differ"),
    ],
)
def test_a_different_head_is_initialised_at_random(tmp_path, spec, reason):
    source = source_of()
    source.classes = [f"class {i}" for i in range(10)]
    save_model(source, tmp_path / "m.safetensors")
    model, notes = start(
        tmp_path / "m.safetensors", spec, classes=[f"other {i}" for i in range(spec.num_classes)]
    )
    assert notes[0].endswith(f"; the head is initialised at random: {reason}")
    assert same(model.trunk.state_dict(), source.trunk.state_dict())
    assert same(model.head.state_dict(), fresh_head(spec))  # that of a run without model.init


def test_heads_of_upstream(tmp_path):
    """A shared classifier fits any prefixes. An old-style file is ambiguous (it may be a fixed
    feature), so its head is not used.
    """
    spec = ModelSpec("resnet10", 10, (8, 12, 512), efficient=True)
    source = source_of(replace(spec, dims=(8, 16, 512)))
    save_upstream(source, tmp_path / "new.pt")
    model, _ = start(tmp_path / "new.pt", spec)
    assert same(model.head.state_dict(), source.head.state_dict())
    old = {
        key.replace("nesting_classifier_0.", ""): value
        for key, value in to_upstream(source).items()
    }
    torch.save(old, tmp_path / "old.pt")
    model, notes = start(tmp_path / "old.pt", spec)
    assert notes[0].endswith("ff512 in the file, mrl-e in the model")
    assert same(model.trunk.state_dict(), source.trunk.state_dict())
    model, _ = start(tmp_path / "old.pt", ModelSpec("resnet10", 10, (512,)))
    assert same(model.head.state_dict(), source.head.state_dict())


@pytest.mark.parametrize("kind", ["ours", "upstream"])
@pytest.mark.parametrize("there", [False, True])
def test_blurpool_is_added_or_left_out(tmp_path, kind, there):
    spec = replace(MRL, blurpool=not there)
    source, path = (
        source_of(replace(spec, blurpool=there)),
        tmp_path / ("m.safetensors" if kind == "ours" else "w.pt"),
    )
    save_model(source, path) if kind == "ours" else save_upstream(source, path)
    model, notes = start(path, spec)
    assert (
        notes[0] == f"trunk from {path}, BlurPool {'left out' if there else 'added'} with its head"
    )
    if there:
        apply_blurpool(model.trunk)  # the oracle knows one direction only
    else:
        apply_blurpool(source.trunk)
    assert same(model.state_dict(), source.state_dict())


@pytest.mark.parametrize(
    ("init", "weights"),
    [
        ("torchvision:resnet18", "IMAGENET1K_V1"),
        ("torchvision:resnet50.IMAGENET1K_V2", "IMAGENET1K_V2"),
        ("torchvision:resnet50.DEFAULT", "IMAGENET1K_V2"),
    ],
)
def test_published_weights_of_torchvision(monkeypatch, tmp_path, init, weights):
    arch = init.removeprefix("torchvision:").partition(".")[0]
    theirs = cached_torchvision(monkeypatch, tmp_path, arch, weights)
    model, notes = start(init, ModelSpec(arch, 10, (8, 512)))
    assert notes == [f"trunk from {init}; the head is initialised at random"]
    assert torch.equal(model.features(IMAGES), theirs(IMAGES))
    assert same(model.head.state_dict(), fresh_head(ModelSpec(arch, 10, (8, 512))))


def test_pretrained_is_an_alias(monkeypatch, tmp_path):
    theirs = cached_torchvision(monkeypatch, tmp_path, "resnet18", "IMAGENET1K_V1")
    spec = ModelSpec("resnet18", 10, (8, 512), blurpool=True)
    apply_blurpool(theirs)
    for init in (None, "", "torchvision:resnet18", "torchvision:resnet18.IMAGENET1K_V1"):
        model, _ = start(init, spec, pretrained=True)
        assert torch.equal(model.features(IMAGES), theirs(IMAGES))


@pytest.mark.parametrize("name", ["test_resnet", "test_resnet.r160_in1k", "test_vit"])
def test_published_weights_of_timm(monkeypatch, tmp_path, name):
    """From Hugging Face's cache; the download that fills it is not tested."""
    theirs = cached_timm(monkeypatch, tmp_path, name)
    spec = model_spec(ModelConfig(arch=f"timm:{name.partition('.')[0]}", mrl=True), 10)
    images = torch.randn(2, 3, 160, 160)
    for pretrained in (False, True):
        model, notes = start(None if pretrained else f"timm:{name}", spec, pretrained=pretrained)
        assert torch.equal(model.features(images), theirs(images))
        assert model.preprocessing.mean == theirs.pretrained_cfg["mean"] != Preprocessing().mean
        assert "normalised as for these weights: mean (0.5, 0.5, 0.5)" in notes[1]


class Attack:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def test_weights_that_cannot_be_loaded(monkeypatch, tmp_path):
    spec, config = (
        ModelSpec("resnet18", 10, (512,)),
        ModelConfig(arch="resnet18", init="torchvision:resnet18"),
    )
    check_start(config, spec)  # nobody asked the network yet
    attack = pickle.dumps(Attack(tmp_path / "executed"), 2)
    for content in (b"", b"<html>404</html>", attack, pickle.dumps({"a": 1}, 2)):
        cached_torchvision(monkeypatch, tmp_path, "resnet18", "IMAGENET1K_V1", content)
        with pytest.raises(
            ModelError, match=r"^model.init: cannot load the weights IMAGENET1K_V1 of resnet18.*$"
        ):
            start_model(config, spec)
    assert not (tmp_path / "executed").exists()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    config, spec = (
        ModelConfig(arch="timm:test_vit", pretrained=True),
        ModelSpec("timm:test_vit", 10, (64,)),
    )
    check_start(config, spec)
    with pytest.raises(
        ModelError, match=r"^model.init: cannot load the weights test_vit of timm:test_vit.*$"
    ):
        start_model(config, spec)


def test_weights_of_timm_without_a_network(monkeypatch, tmp_path, capfd):
    """One line, at once: the hub's client would tell of its retries for a minute."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    class NoNetwork:
        def head(self, *_, **__):
            raise OSError("no route")

    monkeypatch.setattr(huggingface_hub.utils, "get_session", NoNetwork)
    config = ModelConfig(arch="timm:test_vit", pretrained=True)
    with pytest.raises(ModelError) as raised:
        start_model(config, ModelSpec("timm:test_vit", 10, (64,)))
    assert str(raised.value) == (
        "model.init: cannot load the weights test_vit of timm:test_vit: https://huggingface.co "
        f"cannot be reached, and {tmp_path} does not have them; connect once, or leave them out: "
        "--model.pretrained=0"
    )
    assert capfd.readouterr().err == ""
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False


def test_a_checkpoint_of_a_timm_model(tmp_path):
    spec = ModelSpec("timm:test_resnet", 10, (8, 64), blurpool=True)
    source = source_of(spec)
    save_model(source, tmp_path / "m.safetensors")
    save_upstream(source, tmp_path / "w.pt")
    for path in ("m.safetensors", "w.pt"):
        assert same(start(tmp_path / path, spec)[0].state_dict(), source.state_dict())
    model, _ = start(tmp_path / "m.safetensors", replace(spec, arch="timm:test_resnet.r160_in1k"))
    assert same(model.state_dict(), source.state_dict())  # a tag names weights, not an architecture


# ---------------------------------------------------------------- frozen stages


FROZEN = [  # what is frozen, and the names in the trunk that it means
    ("resnet10", "trunk", [""]),
    ("resnet10", "stem", ["conv1.", "bn1."]),
    ("resnet10", "stem,layer1, layer2", ["conv1.", "bn1.", "layer1.", "layer2."]),
    ("resnet10", "layer3.0.bn1,layer1", ["layer3.0.bn1.", "layer1."]),
    ("timm:test_resnet", "stem,layer1", ["conv1.", "bn1.", "layer1."]),
    ("timm:test_vit", "cls_token,patch_embed,blocks.0", ["cls_token", "patch_embed.", "blocks.0."]),
    (
        "timm:test_efficientnet",
        "conv_stem,bn1,blocks.0,blocks.1",
        ["conv_stem.", "bn1.", "blocks.0.", "blocks.1."],
    ),
]


@pytest.mark.parametrize(
    ("arch", "freeze", "prefixes"), FROZEN, ids=lambda v: v if isinstance(v, str) else ""
)
def test_frozen_stages_stay_and_the_rest_moves(tmp_path, arch, freeze, prefixes):
    spec = ModelSpec(arch, 10, (8, 64), blurpool=arch == "resnet10")
    save_model(source_of(spec), tmp_path / "m.safetensors")
    model, notes = start(tmp_path / "m.safetensors", spec, freeze)
    model = copy.deepcopy(model)  # as an average of the weights is made
    before = copy.deepcopy(model.state_dict())

    groups = parameter_groups(model, 0.1, 0.1)
    in_optimizer = {id(p) for group in groups for p in group["params"]}
    frozen = {f"trunk.{n}" for n in model.trunk.state_dict() if n.startswith(tuple(prefixes))}
    names = dict(model.named_parameters())
    assert {name for name in names if id(names[name]) not in in_optimizer} == frozen & names.keys()
    assert f"{sum(names[n].numel() for n in frozen & names.keys()):,} of " in notes[-1]

    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    for _ in range(3):
        model.train()
        optimizer.zero_grad()
        nested_cross_entropy(model(torch.randn(8, 3, 64, 64)), torch.arange(8))[0].backward()
        optimizer.step()
    after = model.state_dict()
    constant = {key for key in after if key.endswith(".blur_filter")}
    still = {key for key in after if torch.equal(before[key], after[key])}
    assert still - constant == frozen - constant, (
        "parameters that did not move are not the frozen ones"
    )
    assert all(
        not module.training for name, module in model.named_modules() if name in model.frozen
    )
    assert model.head.training
    assert apply_freeze(model, "") == 0  # and it can be taken back
    assert all(p.requires_grad for p in model.parameters())
    assert all(module.training for module in model.modules())


def test_frozen_random_weights_are_noted():
    _, notes = start(None, freeze="trunk")
    assert "random weights" in notes[-1]
    assert start(None)[1] == []


@pytest.mark.parametrize(
    ("arch", "freeze", "words"),
    [
        (
            "resnet10",
            "layer5",
            ["'layer5'", "did you mean layer", "trunk, stem, layer1, layer2, layer3, layer4"],
        ),
        ("resnet10", "stem,layer1.7", ["'layer1.7'", "layer1.0"]),
        ("resnet10", "head", ["'head'"]),
        ("resnet10", "layer", ["'layer'"]),
        ("resnet10", "maxpool", ["'maxpool'"]),
        ("timm:test_vit", "stem", ["'stem'", "cls_token", "patch_embed", "blocks"]),
        ("timm:test_vit", "patch_embd", ["did you mean patch_embed"]),
    ],
)
def test_unknown_stages(arch, freeze, words):
    config = ModelConfig(arch=arch, freeze=freeze)
    spec = model_spec(config, 10)
    for function in (check_start, start_model):
        with pytest.raises(ModelError) as error:
            function(config, spec)
        assert all(word in str(error.value) for word in ["model.freeze", *words])
        assert "\n" not in str(error.value)


# ---------------------------------------------------------------- start weights that do not fit


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Valid and invalid checkpoints of a resnet10."""
    folder = tmp_path_factory.mktemp("files")
    source = source_of()
    save_model(source, folder / "m.safetensors")
    save_upstream(source, folder / "w.pt")
    (folder / "broken.pt").write_bytes(b"<html>404</html>")
    save_file({"a": torch.zeros(1)}, folder / "plain.safetensors")
    metadata = json.dumps({"format": checkpoint.FORMAT, **checkpoint.describe(source)})
    state = source.state_dict()
    other = {
        "trunk.layer1.0.conv1.weight": torch.zeros(3),
        "head.heads.0.weight": torch.zeros(10, 9),
    }
    for key, value in other.items():
        save_file(state | {key: value}, folder / f"{key[:4]}.safetensors", {"matryoshka": metadata})
    del state["trunk.bn1.weight"]
    save_file(state, folder / "missing.safetensors", {"matryoshka": metadata})
    return folder


@pytest.mark.parametrize(
    ("arch", "init", "words"),
    [
        ("resnet10", "{}/none.pt", ["no such file", "torchvision:NAME"]),
        ("resnet10", "hf:resnet18", ["no such file", "timm:NAME"]),
        ("resnet10", "{}", ["no such file"]),
        ("resnet18", "{}/m.safetensors", ["is a resnet10", "resnet18", "--model.arch=resnet10"]),
        ("resnet50", "{}/w.pt", ["is a resnet10", "resnet50", "--model.arch=resnet10"]),
        ("timm:test_resnet", "{}/m.safetensors", ["is a resnet10"]),
        ("timm:test_resnet", "{}/w.pt", ["w.pt", "not those of a timm:test_resnet"]),
        ("resnet10", "{}/broken.pt", ["not a checkpoint of plain tensors"]),
        ("resnet10", "{}/plain.safetensors", ["not a Matryoshka checkpoint"]),
        (
            "resnet10",
            "{}/trun.safetensors",
            ["trunk.layer1.0.conv1.weight is [3] in the file, [64, 64, 3, 3] in the model"],
        ),
        (
            "resnet10",
            "{}/head.safetensors",
            ["head.heads.0.weight is [10, 9] in the file, [10, 8] in the model"],
        ),
        (
            "resnet10",
            "{}/missing.safetensors",
            ["trunk.bn1.weight is missing in the file, [64] in the model"],
        ),
        ("resnet10", "torchvision:resnet10", ["no such weights", "none"]),
        ("resnet18", "torchvision:resnet50", ["torchvision:resnet50", "--model.arch=resnet50"]),
        ("resnet50", "torchvision:resnet50.V3", ["V3", "IMAGENET1K_V1", "IMAGENET1K_V2"]),
        ("resnet18", "timm:resnet18", ["--model.arch=timm:resnet18"]),
        ("timm:resnet18", "torchvision:resnet18", ["--model.arch=resnet18"]),
        ("timm:resnet18", "timm:resnet18.foo", ["no such weights", "resnet18.a1_in1k"]),
        ("timm:test_mambaout", "timm:test_mambaout", ["no such weights", "none"]),
    ],
)
def test_initial_weights_that_do_not_fit(files, arch, init, words):
    config = ModelConfig(arch=arch, init=init.format(files))
    spec = ModelSpec(arch, 10, (8, 512) if arch != "timm:test_resnet" else (8,))
    if arch == "timm:test_mambaout":
        spec = replace(spec, dims=(8,))
    for function in (check_start, start_model):
        with pytest.raises(ModelError) as error:
            function(config, spec)
        assert all(word in str(error.value) for word in ["model.init", *words])
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("init", ["torchvision:resnet50", "timm:resnet18", "w.pt"])
def test_pretrained_that_contradicts_init(init):
    config = ModelConfig(arch="resnet18", pretrained=True, init=init)
    with pytest.raises(
        ModelError, match=rf"^model.pretrained=1 means model.init=torchvision:resnet18, .*{init}"
    ):
        check_start(config, ModelSpec("resnet18", 10, (8,)))
