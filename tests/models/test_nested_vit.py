"""Families of widths: slices against loops, exports against the family, gradients, counts."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import MRL
from matryoshka.checkpoint import CheckpointError, export_dims, load_model, save_model
from matryoshka.models import (
    FAMILIES,
    FamilyModel,
    ModelConfig,
    ModelError,
    ModelSpec,
    build,
    extract,
    model_spec,
    multiply_adds,
    widest,
    with_prefixes,
)
from matryoshka.models.nested_vit import leading_slice
from matryoshka.nested import nested_cross_entropy

TINY = {"image_size": 8, "patch": 4, "depth": 2, "heads": 2}
SHARING = {
    "vit_nested": [{}, {"norms": "per_width"}, {"decoupled": True}],
    "vit_independent": [{}],
    "vit_nested_proj": [{}],
}
VARIANTS = [
    pytest.param(arch, options, id="-".join([arch, *map(str, options)]))
    for arch, all_options in SHARING.items()
    for options in all_options
]
# Parameters of a ViT for 10 classes at 32 px and patch 4 (seed 000's table).
TABLE = {8: "13.9k", 16: "53.9k", 32: "212k", 64: "842k", 128: "3.36M", 256: "13.4M", 512: "53.5M"}


def family(arch="vit_nested", dims=(4, 8, 16), efficient=False, **options) -> FamilyModel:
    """A tiny family with random numbers everywhere, also where initialisation puts ones."""
    spec = ModelSpec(arch, 5, dims, efficient, arch_options={**TINY, **options})
    model = build(spec)
    assert isinstance(model, FamilyModel)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


# ---------------------------------------------------------------- slices


def test_every_head_is_sliced_by_itself():
    """Against indices one by one: row h * W + r of a matrix is number r of head h."""
    heads, wide, narrow = 3, 4, 2
    qkv = torch.arange(3 * heads * wide * wide).view(3 * heads * wide, wide)
    found = leading_slice("a.attention.qkv.weight", qkv, (3 * heads * narrow, narrow), heads)
    for which in range(3):
        for head in range(heads):
            for row in range(narrow):
                source = qkv[(which * heads + head) * wide + row]
                target = found[(which * heads + head) * narrow + row]
                assert target.tolist() == source[:narrow].tolist()
    out = torch.arange(wide * heads * wide).view(wide, heads * wide)
    found = leading_slice("a.attention.out.weight", out, (narrow, heads * narrow), heads)
    for row in range(narrow):
        expected = [int(out[row, h * wide + c]) for h in range(heads) for c in range(narrow)]
        assert found[row].tolist() == expected
    vector = torch.arange(5)
    assert leading_slice("norm.weight", vector, (2,), heads).tolist() == [0, 1]


# ---------------------------------------------------------------- exports


@settings(max_examples=25)
@given(
    variant=st.sampled_from([(arch, o) for arch, options in SHARING.items() for o in options]),
    dims=st.lists(st.sampled_from([4, 8, 12, 20]), min_size=1, max_size=3, unique=True).map(sorted),
    patch=st.sampled_from([2, 4, 8]),
    heads=st.integers(1, 3),
    efficient=st.booleans(),
)
def test_an_export_gives_the_logits_of_the_family(variant, dims, patch, heads, efficient):
    arch, options = variant
    model = family(
        arch, tuple(dims), efficient, **{**options, "patch": patch, "heads": heads, "depth": 1}
    ).eval()
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        logits = model(images)
        assert logits.shape == (len(dims), 2, 5), "logits are not [G, B, C]"
        for g, dim in enumerate(dims):
            alone = extract(model, dim)
            assert alone.spec.arch == "vitfixedposdualpatchnorm"
            torch.testing.assert_close(alone(images)[0], logits[g], atol=1e-5, rtol=1e-5)
            features = model.features_of(images, dim)
            torch.testing.assert_close(alone.features(images), features, atol=1e-5, rtol=1e-5)
        assert torch.equal(model.features(images), model.features_of(images, dims[-1]))
        some = [i for i in range(len(dims)) if i != 1]
        assert torch.equal(model(images, some), logits[some])


@pytest.mark.parametrize(("arch", "options"), VARIANTS)
def test_an_export_is_a_file_like_any_other(tmp_path, arch, options):
    model = family(arch, **options).eval()
    model.classes = list("abcde")
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        logits = model(images)
        save_model(model, tmp_path / "family.safetensors")
        again = load_model(tmp_path / "family.safetensors")
        assert again.spec == model.spec
        assert torch.equal(again(images), logits)
        for g, dim in enumerate(model.dims):
            save_model(extract(model, dim), tmp_path / "one.safetensors")
            one = load_model(tmp_path / "one.safetensors")
            assert one.classes == model.classes
            assert one.dims == (dim,)
            torch.testing.assert_close(one(images)[0], logits[g], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("arch", FAMILIES)
def test_parameters_of_every_width_and_of_the_family(arch):
    dims = tuple(TABLE)
    with torch.device("meta"):
        model = build(ModelSpec(arch, 10, dims, efficient=arch == "vit_nested"))
        alone = {dim: count(extract(model, dim)) for dim in dims}
    for dim, expected in TABLE.items():
        unit = {"k": 1e3, "M": 1e6}[expected[-1]]
        digits = len(expected.rstrip("kM").partition(".")[2])
        assert f"{alone[dim] / unit:.{digits}f}{expected[-1]}" == expected
    whole = {
        "vit_nested": alone[512],
        "vit_independent": sum(alone.values()),
        "vit_nested_proj": sum(alone.values()) - sum(49 * dim for dim in dims[:-1]),
    }
    assert count(model) == whole[arch]


def test_the_table_of_the_documentation():
    text = (Path(__file__).resolve().parents[2] / "docs/nested_vits.md").read_text()
    rows = re.findall(r"^\| (\d+) \| ([\d,]+) \| ([\d,.]+) \|$", text, re.MULTILINE)
    with torch.device("meta"):
        model = build(ModelSpec("vit_nested", 10, tuple(TABLE), efficient=True))
        costs = multiply_adds(model, 32)
        expected = [
            (str(dim), f"{count(extract(model, dim)):,}", f"{costs[dim] / 1e6:,.1f}")
            for dim in TABLE
        ]
    assert rows == expected


# ---------------------------------------------------------------- training


@pytest.mark.parametrize(("arch", "options"), VARIANTS)
@pytest.mark.parametrize("efficient", [False, True])
def test_gradients_of_a_joint_step_are_the_sum_of_separate_steps(arch, options, efficient):
    torch.manual_seed(1)
    model = family(arch, (4, 8, 12), efficient, dropout=0, **options).double()
    images, labels = torch.randn(3, 3, 8, 8).double(), torch.tensor([0, 3, 4])
    weights = torch.tensor([0.5, 2.0, 1.0])
    nested_cross_entropy(model(images), labels, weights)[0].backward()
    joint = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for g in range(3):
        loss = nested_cross_entropy(model(images, [g]), labels)[0]
        (weights[g].double() * loss).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, joint[name], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("arch", "options"), VARIANTS)
def test_every_width_learns_and_every_parameter_is_used(arch, options):
    torch.manual_seed(0)
    model = build(ModelSpec(arch, 5, (4, 8, 16), arch_options={**TINY, "dropout": 0, **options}))
    images, labels = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    before, per_width = nested_cross_entropy(model(images), labels)
    before.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(parameter.grad, alpha=0.02)
    after = nested_cross_entropy(model(images), labels)[1]
    assert (after < per_width).all(), "a step along the gradient raises a loss"


def test_the_widest_member_uses_every_shared_parameter():
    model = family(efficient=True)
    model(torch.randn(2, 3, 8, 8), [2]).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_a_sandwich_costs_no_other_width():
    model = family()
    calls = []
    for dim, member in model.trunk.members.items():
        member.register_forward_hook(lambda *_, dim=dim: calls.append(int(dim)))
    model(torch.randn(1, 3, 8, 8), [0, 2])
    assert calls == [4, 16]


def test_modes_and_dropout_reach_every_width():
    model = family(dropout=0.5)
    images = torch.randn(2, 3, 8, 8)
    assert not torch.equal(model.train()(images), model(images))
    assert torch.equal(model.eval()(images), model(images))


# ---------------------------------------------------------------- some of the widths


@pytest.mark.parametrize(("arch", "options"), VARIANTS)
@pytest.mark.parametrize("efficient", [False, True])
@pytest.mark.parametrize("dims", [(4,), (8, 16), (4, 8), (8,)])
def test_some_widths_of_a_family(tmp_path, arch, options, efficient, dims):
    model = family(arch, efficient=efficient, **options).eval()
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = model(images, [model.dims.index(d) for d in dims])
        assert with_prefixes(model, dims) is model
        assert (model.dims, model.width, model.spec.dims) == (dims, dims[-1], dims)
        torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)
        save_model(model, tmp_path / "model.safetensors")
        loaded = load_model(tmp_path / "model.safetensors")
        torch.testing.assert_close(loaded(images), expected, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- options and errors


def test_spec_from_options():
    options = ("image_size=8", "patch=4", "heads=2", "depth=1", "norms=per_width")
    config = ModelConfig(arch="vit_nested", dims=(8, 16), arch_options=options)
    spec = model_spec(config, 5)
    assert spec.dims == (8, 16)
    assert spec.efficient, "one classifier, sliced like the other weights"
    assert not model_spec(ModelConfig(arch="vit_nested", mrl=True), 5).efficient
    assert not model_spec(ModelConfig(arch="vit_independent"), 5).efficient
    assert model_spec(ModelConfig(arch="vit_nested"), 5).dims == tuple(TABLE)
    assert build(spec).width == 16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dims": (16, 8)}, r"model\.dims: dims \[16, 8\] must be positive and strictly incr"),
        ({"dims": (8, 10)}, r"model\.dims=8,10: dim=10 is not a multiple of 4"),
        ({"dims": tuple(range(4, 400, 4))}, r"model\.dims: 99 widths"),
        ({"fixed_feature": 8}, r"model\.fixed_feature: vit_nested"),
        ({"arch_options": ("dim=64",)}, r"model\.arch_options: vit_nested: dim=64"),
        ({"arch_options": ("norms=none",)}, r"norms=none: expected shared or per_width"),
        ({"arch_options": ("decoupled=2",)}, r"decoupled=2: expected true or false"),
        ({"arch_options": ("patch=5",)}, r"patch=5 does not divide image_size=32"),
        ({"arch_options": ("colour=red",)}, r"model\.arch_options: .* has no option colour"),
        ({"arch_options": ("vqvae=codes.safetensors",)}, r"model\.arch_options: .*vqvae"),
        (
            {"arch": "vit_independent", "arch_options": ("norms=shared",)},
            r"vit_independent: norms is for vit_nested",
        ),
        ({"relative_importance": (1.0, 2.0)}, r"model\.relative_importance has 2 weights"),
        ({"arch": "vit_nestd"}, r"did you mean vit_nested"),
    ],
)
def test_mistakes_are_one_line(settings, message):
    with pytest.raises(ModelError, match=message) as error:
        model_spec(ModelConfig(**{"arch": "vit_nested", **settings}), 5)
    assert "\n" not in str(error.value)


def test_widths_that_are_not_there():
    model = family()
    with pytest.raises(ModelError, match="no dim 5, only 4, 8, 16"):
        extract(model, 5)
    for dims in ((4, 5), (8, 4), ()):
        with pytest.raises(ModelError, match="expected some of this family's widths, 4, 8, 16"):
            with_prefixes(model, dims)


@pytest.mark.parametrize("efficient", [False, True])
def test_a_prefix_is_a_model_of_its_own(efficient, tmp_path):
    model = build(ModelSpec("resnet10", 3, (8, 16), efficient)).eval()
    images = torch.randn(2, 3, 32, 32)
    alone = extract(model, 8)
    save_model(alone, tmp_path / "dim8.safetensors")
    loaded = load_model(tmp_path / "dim8.safetensors")
    assert loaded.dims == (8,)
    torch.testing.assert_close(loaded(images)[0], model(images)[0])


def test_a_file_that_claims_other_widths(tmp_path):
    model = family()
    model.spec = ModelSpec("vit_nested", 5, (4, 8, 20), arch_options=model.spec.arch_options)
    save_model(model, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*by its dims"):
        load_model(tmp_path / "model.safetensors")


def test_features_serve_as_embeddings():
    model = family().eval()
    images = torch.randn(2, 3, 8, 8)
    embeddings = model.encode(images, normalize=True)
    assert embeddings.shape == (2, 16)
    assert np.linalg.norm(embeddings.numpy(), axis=1) == pytest.approx([1, 1], abs=1e-5)


# ---------------------------------------------------------------- names of the other repository

VIT_KWARGS = {
    "image_size": 8,
    "patch_size": 4,
    "num_classes": 5,
    "depth": 2,
    "heads": 2,
    "dropout": 0.1,
    "emb_dropout": 0.1,
}


@pytest.mark.parametrize(
    "make",
    [
        lambda: MRL.MRL_Entire_Transformer([4, 8], MRL.ViTFixedPosDualPatchNorm, VIT_KWARGS),
        lambda: MRL.MRL_Entire_Transformer_NestedProj([4, 8], **VIT_KWARGS),
    ],
)
def test_names_of_vit_compression(tmp_path, make):
    net = make().eval()
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        logits = net(images)
        assert isinstance(logits, tuple)
        assert [tuple(part.shape) for part in logits] == [(2, 5), (2, 5)]
        for i in (0, 1, -1):
            net.save_vit_model(i, tmp_path / "vit.pth")
            for vit in (net.get_vit_model(i), MRL.load_vit_model(tmp_path / "vit.pth")):
                torch.testing.assert_close(vit(images), logits[i], atol=1e-5, rtol=1e-5)
    labels = torch.tensor([0, 1])
    MRL.Matryoshka_CE_Loss()(net.train()(images), labels).backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == []


def test_arguments_of_vit_compression_that_we_do_not_have():
    for name, value in (("pool", "mean"), ("channels", 1), ("emb_dropout", 0.2)):
        with pytest.raises(ValueError, match=f"only {name}="):
            MRL.ViTFixedPosDualPatchNorm(dim=8, **{**VIT_KWARGS, name: value})
    other = MRL.MRL_Entire_Transformer([4], lambda dim: torch.nn.Linear(dim, 2))
    with pytest.raises(TypeError, match="Linear: only ViTFixedPosDualPatchNorm"):
        other.save_vit_model(0, "unused.pth")


def test_one_file_per_width_and_format(tmp_path):
    model = family().eval()
    images = torch.randn(2, 3, 8, 8)
    paths = export_dims(model, tmp_path / "nested_models", "vit_cifar10_patch4")
    names = [f"vit_cifar10_patch4_dim{d}.{s}" for d in (4, 8, 16) for s in ("safetensors", "pth")]
    assert [path.name for path in paths] == names
    with torch.no_grad():
        logits = model(images)
        for i, path in enumerate(paths):
            torch.testing.assert_close(load_model(path)(images)[0], logits[i // 2])
    with pytest.raises(CheckpointError, match="no drop_path"):
        export_dims(family(drop_path=0.1), tmp_path / "other", "vit")
    assert not (tmp_path / "other").exists()
    export_dims(family(drop_path=0.1), tmp_path / "other", "vit", formats=["safetensors"])
    assert len(list((tmp_path / "other").iterdir())) == 3


def test_programs_that_read_one_trunk_see_the_widest_member():
    model = family().eval()
    alone = widest(model)
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(alone(images)[0], model(images)[-1])
    assert alone.dims == (16,)
    assert "only the widest member, 16" in alone.notes[-1]
    assert widest(alone) is alone
