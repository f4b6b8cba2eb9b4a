"""Backbones, their options, BlurPool, trunks of timm, schedules, parameter groups, accuracy."""

import json
import logging
import sys

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import top_k_accuracy_score
from torch import nn
from torchvision import models

from matryoshka.checkpoint.contents import CheckpointError
from matryoshka.checkpoint.model_file import load_model, save_model
from matryoshka.checkpoint.transfer import check_start, start_model
from matryoshka.checkpoint.upstream import save_upstream
from matryoshka.evaluation.accuracy import PrefixAccuracy
from matryoshka.models import (
    RESNETS,
    ModelConfig,
    ModelError,
    ModelSpec,
    NestedModel,
    backbone,
    build,
    model_spec,
)
from matryoshka.models.blurpool import BlurPoolConv2d
from matryoshka.models.options import parse_arch_options
from matryoshka.nested import NestedLinear
from matryoshka.training.optim import LrConfig, lr_at, parameter_groups, peak_epoch, peak_lr

SMALL = ["resnet10", "resnet18", "resnet50"]
NATIVE = ["resnet10", *RESNETS]


@pytest.mark.parametrize("arch", SMALL)
@pytest.mark.parametrize("efficient", [False, True])
def test_forward_backward_every_parameter_gets_a_gradient(arch, efficient):
    model = build(ModelSpec(arch, 7, (8, 16, 512), efficient, blurpool=True))
    logits = model(images := torch.randn(2, 3, 40, 33))
    assert logits.shape == (3, 2, 7), "logits are not [G, B, C]"
    assert model.features(images).shape == (2, model.width), "features are not [B, D]"
    logits.square().sum().backward()
    # features beyond the longest prefix are not classified: only there may a gradient be zero,
    # nowhere missing
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


HEADS = {  # the dims and `efficient` of every kind of head
    "mrl": ((8, 16, 32), False),
    "mrl-e": ((8, 16, 32), True),
    "ff16": ((16,), False),
}
LARGE = {
    "resnet152",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
}
TRAINED = [
    *(pytest.param(a, marks=pytest.mark.slow if a in LARGE else ()) for a in NATIVE),
    "timm:test_resnet",
    "timm:vit_tiny_patch16_224",
]


@pytest.mark.parametrize("arch", TRAINED)
def test_every_backbone_trains_with_every_head(arch):
    """A frozen or forgotten parameter, or a NaN, would otherwise only show as a lower accuracy."""
    torch.manual_seed(0)
    trunk = build(ModelSpec(arch, 3, (8,))).trunk
    width = backbone_width(arch)
    size = 160 if arch == "timm:test_resnet" else 32
    images = torch.randn(2, 3, size, size)
    for name, (dims, efficient) in HEADS.items():
        spec = ModelSpec(arch, 3, dims, efficient)
        model = NestedModel(trunk, NestedLinear(dims, 3, efficient), width, spec).train()
        model.zero_grad()
        logits = model(images)
        assert spec.head_name == name
        assert logits.shape == (len(dims), 2, 3), f"{name}: logits are not [G, B, C]"
        logits.square().sum().backward()
        trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert len(trained) == len(list(model.parameters())), f"{name}: a parameter is frozen"
        missing = [n for n, grad in trained.items() if grad is None]
        assert not missing, f"{name}: no gradient for {missing}"
        bad = [n for n, grad in trained.items() if grad is not None and not grad.isfinite().all()]
        assert not bad, f"{name}: gradients of {bad} are not finite"


def backbone_width(arch):
    with torch.device("meta"):
        return backbone(arch)[1]


@pytest.mark.parametrize("arch", sorted(set(NATIVE) - set(SMALL)))
def test_every_backbone_builds(arch):
    with torch.device("meta"):
        model = build(ModelSpec(arch, 5, (8,), blurpool=True))
        assert model(torch.empty(2, 3, 32, 32)).shape == (1, 2, 5), "logits are not [G, B, C]"


@pytest.mark.parametrize(
    ("arch", "options", "path", "attribute"),
    [
        ("resnet10", {"zero_init_residual": True}, "layer1.0.bn2", "weight"),
        ("resnet18", {"zero_init_residual": True}, "layer1.0.bn2", "weight"),
        ("timm:test_resnet", {"drop_path_rate": 0.5}, "layer4.0.drop_path", "drop_prob"),
    ],
)
def test_options_of_a_backbone_reach_its_builder(tmp_path, arch, options, path, attribute):
    def value(model):
        found = getattr(model.trunk.get_submodule(path), attribute)
        return float(found if isinstance(found, float) else found.detach().abs().max())

    model = build(ModelSpec(arch, 3, (8, 16), arch_options=options))
    expected = 0.5 if attribute == "drop_prob" else 0.0
    assert value(model) == expected, f"{path}.{attribute} with {options}"
    save_model(model, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors")
    assert loaded.spec == model.spec
    assert value(loaded) == expected, f"{path}.{attribute} of the loaded model"


def test_unknown_options_of_a_backbone(tmp_path):
    for arch in ("resnet10", "resnet18", "timm:test_resnet"):
        with pytest.raises(ModelError, match=r"model.arch_options.*no_such_option") as error:
            build(ModelSpec(arch, 3, (8,), arch_options={"no_such_option": 1}))
        assert "\n" not in str(error.value)
        with pytest.raises(ModelError, match=r"model.arch_options.*weights"):
            build(ModelSpec(arch, 3, (8,), arch_options={"weights": "IMAGENET1K_V1"}))
    options = {"checkpoint_path": str(tmp_path / "pickle.pt")}
    with pytest.raises(ModelError, match="checkpoint_path is not allowed"):
        build(ModelSpec("timm:test_resnet", 3, (8,), arch_options=options))


def test_arch_options_are_read_as_json_values():
    pairs = ("patch=4", "dropout=0.5", "pool=mean", "bias=false", "depth=null")
    parsed = parse_arch_options(pairs)
    assert parsed == {"patch": 4, "dropout": 0.5, "pool": "mean", "bias": False, "depth": None}
    config = ModelConfig(arch="resnet10", arch_options=("zero_init_residual=true",))
    assert model_spec(config, 3).arch_options == {"zero_init_residual": True}


@pytest.mark.parametrize("pair", ["patch", "=4", "a b=4", "[1]=2"])
def test_arch_options_without_a_name(pair):
    with pytest.raises(ValueError, match="expected name=value"):
        parse_arch_options((pair,))
    with pytest.raises(ValueError, match="patch is given twice"):
        parse_arch_options(("patch=4", "patch=8"))


def test_a_file_without_options_has_no_key_for_them(tmp_path):
    """Files of models without options keep the bytes that they had before there were any."""
    save_model(build(ModelSpec("resnet10", 3, (8,))), tmp_path / "model.safetensors")
    assert b"arch_options" not in (tmp_path / "model.safetensors").read_bytes()


def test_every_torchvision_resnet_is_there():
    names = {
        n
        for n in models.list_models()
        if models.get_model_builder(n).__module__ == "torchvision.models.resnet"
    }
    assert set(RESNETS) == names


def test_spec_from_options():
    spec = model_spec(ModelConfig(arch="resnet50", mrl=True), 1000)
    assert spec.dims == (8, 16, 32, 64, 128, 256, 512, 1024, 2048)
    assert spec.head_name == "mrl"
    assert model_spec(ModelConfig(mrl=True, nesting_start=4), 10).dims == (
        16,
        32,
        64,
        128,
        256,
        512,
    )
    assert model_spec(ModelConfig(efficient=True, dims=(8, 12, 512)), 10).head_name == "mrl-e"
    assert model_spec(ModelConfig(efficient=True, mrl=True), 10).efficient
    assert model_spec(ModelConfig(), 10).dims == (512,)
    assert model_spec(ModelConfig(fixed_feature=64), 10).head_name == "ff64"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"arch": "resnet81"}, ["resnet81", "did you mean resnet18"]),
        ({"arch": "vgg16"}, ["vgg16", "resnet50"]),
        ({"fixed_feature": 2048}, ["model.fixed_feature", "512"]),
        ({"mrl": True, "fixed_feature": 8}, ["model.fixed_feature"]),
        ({"mrl": True, "dims": (8, 4096)}, ["model.dims", "4096"]),
        ({"dims": (8, 16)}, ["model.dims", "model.mrl"]),
        ({"mrl": True, "nesting_start": 12}, ["model.nesting_start"]),
        ({"mrl": True, "relative_importance": (1.0,)}, ["model.relative_importance"]),
    ],
)
def test_options_that_cannot_be_met(options, words):
    with pytest.raises(ModelError) as error:
        model_spec(ModelConfig(**options), 10)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


def test_blurpool_places_and_values():
    model = build(ModelSpec("resnet50", 10, (2048,), blurpool=True))
    wrapped = {name for name, m in model.named_modules() if isinstance(m, BlurPoolConv2d)}
    assert wrapped == {
        f"trunk.layer{n}.0.{c}" for n in (2, 3, 4) for c in ("conv2", "downsample.0")
    }
    conv = nn.Conv2d(16, 2, 3, stride=2, padding=1)
    image = torch.randn(1, 16, 7, 6)
    padded = np.pad(image.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)))
    blurred = np.zeros_like(image.numpy())
    for i in range(7):
        for j in range(6):
            kernel = np.outer([1, 2, 1], [1, 2, 1]) / 16
            blurred[0, :, i, j] = (padded[0, :, i : i + 3, j : j + 3] * kernel).sum((1, 2))
    np.testing.assert_allclose(
        BlurPoolConv2d(conv)(image).detach(), conv(torch.tensor(blurred)).detach(), atol=1e-5
    )


# ---------------------------------------------------------------- trunks of timm


@pytest.mark.parametrize("arch", ["timm:test_resnet", "timm:test_vit", "timm:test_mambaout"])
def test_a_timm_checkpoint_rebuilds_its_model_alone(monkeypatch, tmp_path, arch):
    spec = model_spec(ModelConfig(arch=arch, mrl=True), 10, blurpool=arch == "timm:test_resnet")
    source = build(spec).eval()
    save_model(source, tmp_path / "model.safetensors")
    save_upstream(source, tmp_path / "final_weights.pt")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    images = torch.randn(2, 3, 160, 160)
    expected = source(images)
    assert expected.shape == (len(spec.dims), 2, 10), "logits are not [G, B, C]"
    assert torch.equal(load_model(tmp_path / "model.safetensors")(images), expected)
    assert torch.equal(load_model(tmp_path / "final_weights.pt", arch=arch)(images), expected)
    with pytest.raises(CheckpointError, match="fit no known backbone"):
        load_model(tmp_path / "final_weights.pt")
    (tmp_path / "params.json").write_text(json.dumps({"model.arch": arch}))
    assert torch.equal(load_model(tmp_path / "final_weights.pt")(images), expected)


def test_a_transformer_takes_other_sizes():
    config = ModelConfig(arch="timm:vit_tiny_patch16_224")
    model, _ = start_model(config, spec := model_spec(config, 10))
    torch.manual_seed(0)
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    plain.load_state_dict(model.trunk.state_dict())
    images = torch.randn(1, 3, 224, 224)
    assert torch.equal(model.eval().features(images), plain.eval()(images))
    assert model.features(images[..., :160, :160]).shape == (1, 192), "features of 160 px"
    check_start(config, spec, sizes=(128, 160, 224))


@pytest.mark.parametrize(
    ("arch", "sizes", "words"),
    [
        ("timm:test_vit", (160, 100), ["100 pixels", "160x160", "patch size"]),
        ("timm:convit_tiny", (224, 160), ["160 pixels", "224x224"]),
        ("timm:mobilenetv5_300m_enc", (256,), ["[2, 2048, 16, 16]", "one vector"]),
    ],
)
def test_sizes_and_features_that_do_not_fit(arch, sizes, words):
    config = ModelConfig(arch=arch)
    with pytest.raises(ModelError) as error:
        check_start(config, model_spec(config, 10), sizes=sizes)
    assert all(word in str(error.value) for word in [arch, *words])
    assert "\n" not in str(error.value)


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        ModelError, match=r"^model.arch=timm:test_vit needs timm: pip install timm$"
    ):
        model_spec(ModelConfig(arch="timm:test_vit"), 10)


@pytest.mark.parametrize(
    ("arch", "words"),
    [
        ("timm:vit_tiny_patch16", ["did you mean timm:vit_tiny_patch16_"]),
        ("timm:hf-hub:timm/resnet18", ["unknown to timm"]),
        ("timm:resnet18.foo", ["Invalid pretrained tag"]),
        ("timm:", ["unknown to timm"]),
    ],
)
def test_models_that_timm_does_not_know(arch, words, caplog):
    with caplog.at_level(logging.WARNING), pytest.raises(ModelError) as error:
        model_spec(ModelConfig(arch=arch), 10)
    assert all(word in str(error.value) for word in [f"model.arch={arch}", *words])
    assert "\n" not in str(error.value)
    assert caplog.records == []


# ---------------------------------------------------------------- schedules


def test_cyclic_schedule():
    config = LrConfig(lr_peak_epoch=2)
    for epoch in np.linspace(0, 16, 33):
        expected = np.interp(epoch, [0, 2, 16], [1e-4 * 1.7, 1.7, 0])
        assert lr_at(float(epoch), config, 1.7, 16) == pytest.approx(expected, abs=1e-12), (
            f"lr at epoch {epoch}"
        )


def test_peak_beyond_the_run_moves_into_it():
    config = LrConfig(lr_peak_epoch=2)
    assert [peak_epoch(config, e) for e in (1, 2, 3, 16)] == [0, 0, 2, 2], (
        "peak of runs of 1, 2, 3, 16 epochs"
    )
    for epochs in (1, 2):
        rates = [lr_at(e / 10, config, 1.0, epochs) for e in range(10 * epochs)]
        assert max(rates) == 1.0, f"the peak is not reached in {epochs} epochs"
        assert all(0 < r <= 1 for r in rates), f"a rate outside of (0, peak]: {rates}"


def test_step_and_constant_schedules():
    step = LrConfig(lr_schedule_type="step", step_ratio=0.1, step_length=30)
    assert [lr_at(e, step, 2.0, 90) for e in (0, 29.99, 30, 60)] == pytest.approx(
        [2, 2, 0.2, 0.02]
    ), "step schedule"
    assert lr_at(55.5, LrConfig(lr_schedule_type="constant"), 0.3, 90) == 0.3, "constant schedule"


def test_rate_is_linear_in_the_global_batch():
    recipe = LrConfig(lr_per_256=0.10625)
    assert peak_lr(recipe, 1024) == pytest.approx(0.425), "lr_per_256 x 4"
    assert peak_lr(recipe, 4096) == pytest.approx(1.7), "lr_per_256 x 16"
    assert peak_lr(LrConfig(lr=0.5, lr_per_256=9), 4096) == 0.5, "lr overrides lr_per_256"


def test_dynamic_tanh_has_the_weight_decay_of_a_norm():
    options = {"dim": 16, "depth": 1, "heads": 2}
    model = build(ModelSpec("dyt", 3, (16,), arch_options=options))
    norms, _ = parameter_groups(model, 1e-4, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)].removeprefix("trunk.blocks.0.norm1.") for p in norms["params"]}
    assert {"alpha", "weight", "bias"} <= found


def test_weight_decay_groups_by_type():
    model = build(ModelSpec("resnet18", 10, (8, 512)))
    norms, others = parameter_groups(model, 1e-4, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)] for p in norms["params"]}
    assert "trunk.layer2.0.downsample.1.weight" in found  # the one that a name test misses
    assert len(found) == 2 * sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()), (
        "one weight and one bias per norm"
    )
    assert len(norms["params"]) + len(others["params"]) == len(names), (
        "a parameter is in no group, or in two"
    )
    assert (norms["weight_decay"], others["weight_decay"]) == (0.0, 1e-4), (
        "weight decay of norms, others"
    )


# ---------------------------------------------------------------- accuracy


@settings(max_examples=40)
@given(
    n=st.integers(2, 40),
    c=st.integers(6, 12),
    g=st.integers(1, 3),
    cut=st.integers(1, 39),
    seed=st.integers(0, 2**31),
)
def test_accuracy_equals_scikit_learn(n, c, g, cut, seed):
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(size=(g, n, c)).astype(np.float32), rng.integers(0, c, n)
    metric = PrefixAccuracy(range(8, 8 + g))
    for part in (slice(0, cut), slice(cut, n)):  # in two batches, one maybe empty
        metric.update(torch.tensor(logits[:, part]), torch.tensor(labels[part]))
    result = metric.compute()
    for i, dim in enumerate(range(8, 8 + g)):
        for key, k in (("top1", 1), ("top5", 5)):
            expected = 100 * top_k_accuracy_score(labels, logits[i], k=k, labels=range(c))
            assert result[dim][key] == pytest.approx(expected, abs=1e-9), f"{key} of prefix {dim}"


def test_accuracy_of_ties_and_nan():
    metric = PrefixAccuracy((8,))
    metric.update(torch.zeros(1, 10, 10), torch.arange(10))  # all equal: argmax says class 0
    assert metric.compute()[8] == {"top1": 10.0, "top5": 50.0}, "ties"
    metric.reset()
    metric.update(torch.full((1, 10, 10), torch.nan), torch.arange(10))
    assert metric.compute()[8] == {"top1": 0.0, "top5": 0.0}, "NaN counts as wrong"


def test_encode_files_are_prepared_as_a_loader_prepares_them(tmp_path, monkeypatch):
    import numpy as np
    from PIL import Image

    from matryoshka.data import BetonError, CenterCrop, ImageFolder, Loader
    from matryoshka.data.augment import Preprocessing

    rng = np.random.default_rng(0)
    (tmp_path / "a").mkdir()
    sizes = [(60, 40), (33, 90), (48, 48), (200, 150)]
    names = [f"a/{i}.{'png' if i % 2 else 'jpg'}" for i in range(4)]
    for name, (w, h) in zip(names, sizes, strict=True):
        Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)).save(tmp_path / name)
    model = build(model_spec(ModelConfig(arch="resnet10", mrl=True), 3))
    model.preprocessing = Preprocessing(32, 0.8, (0.4, 0.4, 0.4), (0.2, 0.2, 0.2))
    data = ImageFolder(tmp_path)
    (batch,) = Loader(data, 4, order="sequential", crop=CenterCrop(32, 0.8))
    paths = [tmp_path / data.name(i) for i in range(4)]
    torch.testing.assert_close(
        model.encode_files(paths), model.encode(batch.images), rtol=0, atol=0
    )
    short = model.encode_files(map(str, paths[:2]), truncate_dim=16, normalize=True)
    torch.testing.assert_close(short, model.encode(batch.images[:2], 16, True))
    assert model.encode_files([]).shape == (0, model.width), "no files: no rows"
    assert not short.requires_grad
    torch.testing.assert_close(model.encode_files(paths[0]), model.encode(batch.images[:1]))
    monkeypatch.setattr("matryoshka.models.model.ENCODE_BATCH", 3)
    torch.testing.assert_close(model.encode_files(tmp_path), model.encode(batch.images))
    (tmp_path / "no.jpg").write_bytes(b"no picture")
    for path, words in (
        (tmp_path / "no.jpg", "no.jpg: "),
        (tmp_path / "gone.jpg", "gone.jpg: No such file"),
    ):
        with pytest.raises(BetonError, match=words):
            model.encode_files([path])
