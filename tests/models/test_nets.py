"""Nets for small images: every net trains, is stored, and refuses what it cannot do."""

import copy
import json
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_nets import LARGE, TINY, VIT
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from matryoshka.checkpoint import CheckpointError, load_model, save_model
from matryoshka.checkpoint.transfer import apply_freeze, check_start, start_model
from matryoshka.checkpoint.upstream import save_upstream
from matryoshka.models import (
    BACKBONES,
    RESNETS,
    ModelConfig,
    ModelError,
    ModelSpec,
    NestedModel,
    backbone,
    build,
    model_spec,
    option_names,
)
from matryoshka.models.ema import Ema
from matryoshka.models.fast_cnn import WHITEN_IMAGES, whitening_directions
from matryoshka.models.patches import ShiftedPatches, cut, sincos_positions
from matryoshka.models.vit import DynamicTanh, SequencePool, VisionTransformer, attend
from matryoshka.models.vqvae import EncoderSizes, VqVae, save_vqvae
from matryoshka.nested import NestedLinear, nested_cross_entropy

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def vqvae_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("vqvae") / "vqvae.safetensors"
    torch.manual_seed(0)
    sizes = EncoderSizes(hiddens=8, residual_hiddens=4, residual_layers=1, code_dim=6)
    save_vqvae(VqVae(sizes, codes=4), path, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    return path


def tiny_options(net, vqvae_file):
    return TINY[net] | ({"vqvae": str(vqvae_file)} if net == "vitfixedposvqvae" else {})


def test_every_net_is_here():
    assert set(TINY) | {"vit_timm", "resnet10", *RESNETS} == set(BACKBONES)


@pytest.mark.parametrize(
    "net", [pytest.param(n, marks=pytest.mark.slow if n in LARGE else ()) for n in TINY]
)
def test_a_net_trains_and_is_stored_with_every_head(net, vqvae_file, tmp_path):
    torch.manual_seed(0)
    options = tiny_options(net, vqvae_file)
    size = options["image_size"]
    images = torch.randn(4, 3, size, size)
    labels = torch.tensor([0, 1, 2, 0])
    trunk, width = backbone(net, options=options)
    heads = {"plain": ((width,), False), "mrl": ((4, width), False), "mrl-e": ((4, width), True)}
    for name, (dims, efficient) in heads.items():
        spec = ModelSpec(net, 3, dims, efficient, arch_options=options)
        model = NestedModel(trunk, NestedLinear(dims, 3, efficient), width, spec).train()
        assert model.features(images).shape == (4, width), f"{name}: features are not [B, D]"

        # ---- a step of steepest descent lowers the loss ----
        def loss(model=model):
            logits = model(images)
            assert logits.shape[1:] == (4, 3)
            return nested_cross_entropy(logits, labels)[0]

        model.zero_grad()
        before = loss()
        before.backward()
        gradients = {n: p.grad for n, p in model.named_parameters()}
        assert [n for n, g in gradients.items() if g is None] == [], "no gradient"
        assert [n for n, g in gradients.items() if g is not None and not g.isfinite().all()] == []
        if name == "mrl-e":  # before, a branch may start at zero
            unused = [n for n, p in model.named_parameters() if p.ndim > 1 and not p.grad.any()]
            assert unused == [], "a weight has no influence"
        assert lowers(model, loss, before.item()), f"{name}: no step lowers the loss"

    # ---- the model of the options, stored and loaded ----
    model = build(spec).eval()
    save_model(model, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors")
    with torch.inference_mode():
        torch.testing.assert_close(loaded(images), model(images), rtol=0, atol=0)
    assert loaded.spec == model.spec
    assert loaded.preprocessing == model.preprocessing


@torch.no_grad()
def lowers(model, loss, before):
    """Whether a step along the gradient lowers the loss; the model keeps the first that does."""
    parameters = list(model.parameters())
    norm = torch.stack([p.grad.norm() for p in parameters]).norm().item()
    taken = 0.0
    for length in (0.03, 0.003, 0.0003):  # batch norm over four images makes some losses steep
        for parameter in parameters:
            parameter.sub_(parameter.grad, alpha=(length - taken) / norm)
        taken = length
        if loss().item() < before:
            return True
    return False


def test_vit_timm_has_its_size():
    with torch.device("meta"):
        model = build(ModelSpec("vit_timm", 10, (768,)))
        assert model(torch.empty(2, 3, 384, 384)).shape == (1, 2, 10)


# ---------------------------------------------------------------- docs/models.md


def parameters(net, classes=10, **options):
    """Number of parameters with a plain head, at the net's default options."""
    with torch.device("meta"):
        _, width = backbone(net, options=options)
        model = build(ModelSpec(net, classes, (width,), arch_options=options))
    return sum(p.numel() for p in model.parameters())


def table_rows(heading):
    """The cells of every row that starts with `code` in a section of docs/models.md."""
    page = (ROOT / "docs" / "models.md").read_text()
    section = page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def digits(text):
    """'9.52M' -> (9.52e6, half a unit of its last digit)."""
    number, unit = text.lstrip("~")[:-1], text[-1]
    scale = {"k": 1e3, "M": 1e6}[unit]
    decimals = len(number.partition(".")[2])
    return float(number) * scale, 0.5 * 10**-decimals * scale


def test_the_table_of_parameters_is_that_of_the_nets():
    rows = {}
    for first, *cells in table_rows("Parameters"):
        rows[first.strip("`")] = cells
    assert set(rows) == set(TINY) | {"vit_timm"}
    for net, (_, width, ours, reference, macs, _) in rows.items():
        extra = {"vqvae": asdict(EncoderSizes())} if net == "vitfixedposvqvae" else {}
        size = {"mobilevit": 64, "vit_timm": 384}.get(net, 32)
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            trunk, found = backbone(net, options=extra)
            trunk.eval()(torch.empty(1, 3, size, size))
        count = sum(p.numel() for p in trunk.parameters()) + 10 * found + 10  # and a plain head
        assert (width, ours) == (f"{found}", f"{count:,}"), net
        assert macs == f"{counter.get_total_flops() / 2e6 + found / 1e5:,.0f}", net
        if not reference.startswith("not known"):
            value, half_unit = digits(reference)
            assert abs(count - value) <= half_unit, f"{net}: {count:,}, reference {reference}"


def test_the_page_lists_the_options_of_every_net():
    listed = {}
    meanings = set()
    for first, second in table_rows("Options"):
        names = re.findall(r"`(\w+)`", first)
        if set(names) <= set(BACKBONES):
            listed |= {net: re.findall(r"`(\w+)`", second) for net in names}
        else:
            meanings |= set(names)
    assert listed == {net: list(option_names(net) or ()) for net in {*TINY, "vit_timm"}}
    explained_elsewhere = {"image_size", "zero_init_residual", "vqvae"}
    assert {name for names in listed.values() for name in names} - explained_elsewhere == meanings


def test_parameters_of_the_nested_family_are_those_of_the_reference():
    reference = {8: "13.9k", 16: "53.9k", 32: "212k", 64: "842k", 128: "3.36M", 256: "13.4M"}
    for dim, text in reference.items():
        value, half_unit = digits(text)
        count = parameters("vitfixedposdualpatchnorm", dim=dim)
        assert abs(count - value) <= half_unit, dim


# ---------------------------------------------------------------- sizes and mistakes


@pytest.mark.parametrize("net", ["swin", "mlpmixer", "convmixer", "cct", "vit", "res18", "vgg"])
def test_nets_at_48_pixels(net):
    options = {"image_size": 48}
    with torch.device("meta"):
        model = build(ModelSpec(net, 10, (8,), arch_options=options))
        assert model(torch.empty(2, 3, 48, 48)).shape == (1, 2, 10)


@settings(max_examples=15)
@given(st.integers(1, 5), st.integers(1, 4), st.sampled_from([4, 8, 12]), st.integers(1, 3))
def test_any_image_size_with_a_patch_that_divides(side, patch, dim, heads):
    size = side * patch
    images = torch.randn(2, 3, size, size)
    options = {"image_size": size, "patch": patch, "dim": dim, "depth": 1, "heads": heads}
    for net in ("vit_small", "vitfixedposdualpatchnorm", "cait"):
        trunk, _ = backbone(net, options=options)
        assert trunk(images).shape == (2, dim)


@pytest.mark.parametrize(
    ("net", "options", "words"),
    [
        ("vit", {"patch": 5}, ["patch=5", "image_size=32", "1, 2, 4, 8, 16, 32"]),
        ("mlpmixer", {"patch": 7}, ["patch=7", "image_size=32"]),
        ("cait", {"patch": 5}, ["cait", "patch=5"]),
        ("cct", {"heads": 5}, ["heads=5", "dim=256", "legal: 1, 2, 4, 8"]),
        ("vitfixedpos", {"dim": 18}, ["dim=18", "multiple of 4", "dim="]),
        ("vit", {"dim": 0}, ["dim=0", "1 to"]),
        ("vit", {"dim": True}, ["dim=True"]),
        ("vit", {"dim": "wide"}, ["dim=wide"]),
        ("vit", {"depth": 10**9}, ["depth=1000000000"]),
        ("vit", {"dropout": 1}, ["dropout=1", "less than 1"]),
        ("vit", {"dropout": "none"}, ["dropout=none"]),
        ("vit", {"position_scale": -1}, ["position_scale=-1"]),
        ("vit", {"pool": "max"}, ["pool=max", "cls, mean, sequence"]),
        ("vit", {"patches": "conv"}, ["patch=4", "patch=2"]),
        ("vit", {"pach": 4}, ["no option pach", "did you mean patch?"]),
        ("vit_small", {"pool": "mean", "patch": 32}, ["patch=32", "one token"]),
        ("vit", {"vqvae": "x.safetensors"}, ["vqvae", "patches=vqvae"]),
        ("vitfixedposvqvae", {}, ["vqvae=FILE", "matryoshka vqvae"]),
        ("vitfixedposvqvae", {"vqvae": "missing.safetensors"}, ["missing.safetensors", "no such"]),
        ("vitfixedposvqvae", {"vqvae": 3}, ["vqvae=3"]),
        ("vitfixedposvqvae", {"vqvae": {"patch": 4}}, ["vqvae", "code_dim"]),
        ("mobilevit", {"image_size": 32}, ["image_size=32", "multiple of 64", "image_size=64"]),
        ("swin", {"image_size": 36}, ["image_size=36", "multiple of 8"]),
        ("swin", {"patch": 17}, ["patch=17", "1 to 16 tokens"]),
        ("vit", {"image_size": 4096, "patch": 1}, ["patch=1", "128 patches", "patch=32"]),
        ("swin", {"dim": 100}, ["dim=100", "multiple of 32"]),
        ("vit_timm", {"image_size": 100}, ["image_size=100", "multiple of 16"]),
        ("vgg", {"image_size": 16}, ["image_size=16", "32 or more"]),
        ("res18", {"image_size": 4}, ["image_size=4", "8 or more"]),
        ("res18", {"zero_init_residual": "maybe"}, ["zero_init_residual=maybe"]),
        ("fast_cnn", {"image_size": 8}, ["image_size=8", "9 or more"]),
        ("fast_cnn", {"dim": 30}, ["dim=30", "multiple of 4"]),
        ("convmixer", {"kernel": 0}, ["kernel=0"]),
    ],
)
def test_a_bad_combination_is_one_line(net, options, words):
    with pytest.raises(ModelError) as error, torch.device("meta"):
        backbone(net, options=options)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("model.arch_options")
    assert [word for word in words if word not in message] == [], message


def test_an_unknown_net_names_the_near_ones():
    with pytest.raises(ModelError, match=r"did you mean vit_small or .*\?") as error:
        backbone("vit_smal")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("net", [n for n in TINY if n not in ("mobilevit", "vitfixedposvqvae")])
def test_nets_without_published_weights_say_so(net):
    with pytest.raises(ModelError, match=f"no weights are published for {net}"):
        backbone(net, weights="IMAGENET1K_V1")


def test_images_of_another_size_are_refused_before_training():
    spec = model_spec(ModelConfig(arch="vit"), 10)
    with pytest.raises(ModelError, match=r"model.arch=vit: .* 32 x 32 pixels, not 48 x 48"):
        check_start(ModelConfig(arch="vit"), spec, sizes=[32, 48])
    check_start(ModelConfig(arch="vit"), spec, sizes=[32])


def test_the_short_names_of_timms_models_take_their_weights():
    config = ModelConfig(arch="vit_timm", pretrained=True)
    check_start(config, model_spec(config, 10))
    other = ModelConfig(arch="vit_timm", init="timm:vit_small_patch16_384")
    with pytest.raises(ModelError, match=r"does not fit model\.arch=vit_timm"):
        check_start(other, model_spec(other, 10))
    config = ModelConfig(arch="res18", pretrained=True)
    with pytest.raises(ModelError, match="no such weights are published"):
        check_start(config, model_spec(config, 10))


# ---------------------------------------------------------------- the transformer, by its formulas


def norm_by_formula(x, layer):
    if isinstance(layer, DynamicTanh):
        return np.tanh(array(layer.alpha) * x) * array(layer.weight) + array(layer.bias)
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt(centred.var(-1, keepdims=True) + 1e-5)
    if layer.weight is None:
        return scaled
    return scaled * array(layer.weight) + array(layer.bias)


def array(tensor):
    return tensor.detach().double().numpy()


def linear(x, layer):
    return x @ array(layer.weight).T + (0 if layer.bias is None else array(layer.bias))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def gelu(x):
    erf = np.vectorize(lambda v: float(torch.erf(torch.tensor(v, dtype=torch.float64))))
    return 0.5 * x * (1 + erf(x / np.sqrt(2)))


def attention_by_formula(x, layer):
    """x [N, dim]: every head and every pair of tokens on its own."""
    n, heads, d = len(x), layer.heads, layer.head_dim
    q, k, v = linear(x, layer.qkv).reshape(n, 3, heads, d).transpose(1, 2, 0, 3)
    local = layer.temperature is not None
    scale = np.exp(array(layer.temperature)) if local else 1 / np.sqrt(d)
    out = np.zeros((n, heads, d))
    for head in range(heads):
        for i in range(n):
            scores = np.array([q[head, i] @ k[head, j] * scale for j in range(n)])
            if local:
                scores[i] = -np.inf  # not to itself
            out[i, head] = softmax(scores) @ v[head]
    return linear(out.reshape(n, -1), layer.out)


def features_by_formula(trunk, image, tokens):
    """Features of one image from its tokens [N, dim]."""
    x = tokens
    if trunk.cls is not None:
        x = np.concatenate([array(trunk.cls)[None], x])
    if trunk.positions is not None:
        x = x + array(trunk.positions)
    for block in trunk.blocks:
        x = x + attention_by_formula(norm_by_formula(x, block.norm1), block.attention)
        hidden = gelu(linear(norm_by_formula(x, block.norm2), block.mlp.fc1))
        x = x + linear(hidden, block.mlp.fc2)
    if trunk.pool == "cls":
        return norm_by_formula(x, trunk.norm)[0]
    if trunk.pool == "mean":
        return norm_by_formula(x.mean(0), trunk.norm)
    x = norm_by_formula(x, trunk.norm)
    return softmax(linear(x, trunk.sequence_pool.score)[:, 0]) @ x


@pytest.mark.parametrize(
    "net", ["vit", "vit_small", "simplevit", "dyt", "vitfixedposdualpatchnorm", "cct"]
)
def test_a_transformer_computes_its_formula(net):
    torch.manual_seed(1)
    trunk, _ = backbone(net, options=TINY[net] | ({} if net == "cct" else {"head_dim": 6}))
    assert isinstance(trunk, VisionTransformer)
    with torch.no_grad():  # norms at their start would hide a forgotten weight
        for parameter in trunk.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    trunk.eval()
    images = torch.randn(2, 3, 8, 8)
    tokens = array(trunk.patches(images))
    expected = [features_by_formula(trunk, *pair) for pair in zip(images, tokens, strict=True)]
    np.testing.assert_allclose(array(trunk(images)), expected, rtol=1e-4, atol=1e-5)


def test_dual_patch_norm_by_its_formula():
    trunk, _ = backbone("vitfixedposdualpatchnorm", options=VIT)
    images = torch.randn(2, 3, 8, 8)
    patches = trunk.patches
    assert list(patches.norm_pixels.parameters()) == list(patches.norm_tokens.parameters()) == []
    x = norm_by_formula(array(cut(images, 4)), patches.norm_pixels)
    expected = norm_by_formula(linear(x, patches.project), patches.norm_tokens)
    np.testing.assert_allclose(array(patches(images)), expected, rtol=1e-4, atol=1e-5)


def test_patches_are_cut_row_by_row():
    images = torch.randn(2, 3, 6, 4)
    found = cut(images, 2)
    for b in range(2):
        for token, (row, column) in enumerate((r, c) for r in range(3) for c in range(2)):
            piece = images[b, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            torch.testing.assert_close(found[b, token], piece.permute(1, 2, 0).flatten())


def test_shifted_patches_move_the_image_by_half_a_patch():
    image = torch.randn(1, 3, 8, 8)
    layer = ShiftedPatches(4, 5)
    copies = [image[0]]
    for right in (2, -2):
        for down in (2, -2):
            moved = torch.zeros(3, 8, 8)
            for y in range(8):
                for x in range(8):
                    if 0 <= y - down < 8 and 0 <= x - right < 8:
                        moved[:, y, x] = image[0, :, y - down, x - right]
            copies.append(moved)
    pieces = cut(torch.cat(copies)[None], 4)
    torch.testing.assert_close(layer(image), layer.project(layer.norm(pieces)))


def test_positions_by_their_formula():
    rows, columns, dim = 2, 3, 8
    expected = np.zeros((rows * columns, dim))
    for y in range(rows):
        for x in range(columns):
            for half, coordinate in ((0, x), (4, y)):
                for k in range(2):
                    angle = coordinate / 10000 ** (k / 2)
                    expected[y * columns + x, half + k] = np.sin(angle)
                    expected[y * columns + x, half + 2 + k] = np.cos(angle)
    np.testing.assert_allclose(sincos_positions(rows, columns, dim), expected, atol=1e-6)
    trunk, _ = backbone("vitfixedpos", options=VIT)
    assert trunk.positions[0].abs().max() == 0  # the CLS token
    torch.testing.assert_close(trunk.positions[1:].square().mean(1), torch.ones(4))
    assert "positions" not in trunk.state_dict()


def test_sequence_pool_weighs_tokens():
    pool = SequencePool(2)
    x = torch.randn(3, 4, 2)
    weights = torch.softmax(x @ pool.score.weight[0] + pool.score.bias, dim=1)
    expected = torch.stack([sum(weights[b, n] * x[b, n] for n in range(4)) for b in range(3)])
    torch.testing.assert_close(pool(x), expected)


def test_stochastic_depth_leaves_out_branches_of_single_images():
    torch.manual_seed(0)
    options = TINY["cct"] | {"drop_path": 0.9, "depth": 2}
    trunk, _ = backbone("cct", options=options)
    images = torch.randn(1, 3, 8, 8).expand(32, 3, 8, 8)
    assert len(torch.unique(trunk.train()(images).detach(), dim=0)) > 1
    assert len(torch.unique(trunk.eval()(images).detach(), dim=0)) == 1
    assert [b.drop_path.p if hasattr(b.drop_path, "p") else 0 for b in trunk.blocks] == [0, 0.9]


# ---------------------------------------------------------------- CaiT


def test_cait_computes_its_formula():
    torch.manual_seed(2)
    trunk, _ = backbone("cait", options=TINY["cait"] | {"head_dim": 6})
    trunk.eval()
    images = torch.randn(2, 3, 8, 8)
    tokens = array(trunk.patches(images)) + array(trunk.positions)

    def attend(queries, context, layer):
        heads = layer.heads
        q = linear(queries, layer.query).reshape(len(queries), heads, -1)
        k, v = np.split(linear(context, layer.key_value), 2, axis=1)
        k, v = k.reshape(len(context), heads, -1), v.reshape(len(context), heads, -1)
        scores = np.einsum("qhd,nhd->hqn", q, k) / np.sqrt(q.shape[2])
        scores = np.einsum("hqn,hg->gqn", scores, array(layer.mix_scores))
        weights = np.einsum("hqn,hg->gqn", softmax(scores), array(layer.mix_weights))
        return linear(np.einsum("hqn,nhd->qhd", weights, v).reshape(len(queries), -1), layer.out)

    def block_by_formula(x, block, others=None):
        q = norm_by_formula(x, block.norm1)
        context = q if others is None else np.concatenate([q, others])
        x = x + array(block.scale1) * attend(q, context, block.attention)
        hidden = gelu(linear(norm_by_formula(x, block.norm2), block.mlp.fc1))
        return x + array(block.scale2) * linear(hidden, block.mlp.fc2)

    for b in range(2):
        x = tokens[b]
        for block in trunk.blocks:
            x = block_by_formula(x, block)
        cls = array(trunk.cls)[None]
        for block in trunk.cls_blocks:
            cls = block_by_formula(cls, block, x)
        expected = norm_by_formula(cls, trunk.norm)[0]
        np.testing.assert_allclose(array(trunk(images))[b], expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- fast_cnn


def smooth_images(count=64, size=10, seed=0):
    """Correlated pixels, as photos have them; the channels differ."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.randn(count, 3, 4, 4, generator=generator)
    images = nn.functional.interpolate(small, size=size, mode="bilinear")
    mix = torch.tensor([[1.0, 0.9, 0.8], [0.0, 0.3, 0.1], [0.0, 0.0, 0.5]])
    return torch.einsum("bchw,dc->bdhw", images, mix) + 0.2


def test_whitening_decorrelates_patches():
    torch.manual_seed(0)
    trunk, _ = backbone("fast_cnn", options={"image_size": 10, "dim": 96})
    images = smooth_images()
    trunk.initialise_from(images)
    filters = array(trunk.whitening.filters).reshape(24, 12)
    np.testing.assert_allclose(filters[12:], -filters[:12])

    patches = []  # channels, rows, columns, as a convolution's weights
    for image in images.double().numpy():
        for y in range(9):
            for x in range(9):
                patches.append(image[:, y : y + 2, x : x + 2].ravel())
    moments = np.transpose(patches) @ np.array(patches) / len(patches)
    values, vectors = np.linalg.eigh(moments)
    # along each eigenvector the mean square becomes value / (value + epsilon)
    expected = np.sort(values / (values + 5e-4))
    found = filters[:12] @ moments @ filters[:12].T
    np.testing.assert_allclose(np.sort(np.diag(found)), expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found, np.diag(np.diag(found)), atol=2e-3)
    assert np.diag(found)[0] == max(np.diag(found)), "not the largest eigenvalue first"
    assert np.abs(vectors[:, -1] @ filters[0]) / np.linalg.norm(filters[0]) > 0.999

    shown = trunk.whitening(images).square().mean((0, 2, 3))
    torch.testing.assert_close(shown[:3], torch.ones(3), rtol=0.1, atol=0)


def test_whitening_reads_a_bounded_number_of_images():
    images = torch.randn(1, 3, 3, 3).expand(WHITEN_IMAGES + 100, 3, 3, 3).clone()
    images[WHITEN_IMAGES:] = 1e9
    few = whitening_directions(images[:WHITEN_IMAGES])
    torch.testing.assert_close(whitening_directions(images).abs(), few.abs())


def test_whitening_is_set_once_and_stays(tmp_path):
    torch.manual_seed(0)
    spec = ModelSpec("fast_cnn", 3, (8,), arch_options={"image_size": 10, "dim": 96})
    model = build(spec)
    average = Ema(model, 0.99)
    model.trunk.initialise_from(smooth_images())
    filters = model.trunk.whitening.filters.clone()
    apply_freeze(model, "")
    assert not any("filters" in name for name, _ in model.named_parameters())
    average.update(0)
    assert torch.equal(average.module.trunk.whitening.filters, filters)

    save_model(model, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors")
    loaded.trunk.initialise_from(smooth_images(seed=1))  # a resumed run
    assert torch.equal(loaded.trunk.whitening.filters, filters)


def test_images_that_cannot_be_whitened_change_nothing():
    trunk, _ = backbone("fast_cnn", options={"dim": 96})
    before = trunk.whitening.filters.clone()
    for bad in (
        torch.full((4, 3, 5, 5), torch.nan),
        torch.empty(0, 3, 5, 5),
        torch.zeros(4, 5, 5, 3),
        torch.zeros(4, 3, 5, 5, dtype=torch.uint8),
    ):
        with pytest.raises(ModelError, match="to whiten"):
            trunk.initialise_from(bad)
    assert torch.equal(trunk.whitening.filters, before)
    assert not trunk.whitening.is_set


def test_fast_cnn_starts_as_identities_and_its_norms_have_no_scale():
    trunk, width = backbone("fast_cnn")
    assert width == 256
    for group, channels_in in ((trunk.group1, 24), (trunk.group2, 64), (trunk.group3, 256)):
        x = torch.randn(1, channels_in, 5, 5)
        kept = min(channels_in, group.conv1.out_channels)
        torch.testing.assert_close(group.conv1(x)[:, :kept], x[:, :kept])
        y = torch.randn(1, group.conv2.in_channels, 5, 5)
        torch.testing.assert_close(group.conv2(y), y)
        assert [name for name, _ in group.norm1.named_parameters()] == ["bias"]
    x = torch.randn(8, 64, 4, 4)
    expected = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), correction=0, keepdim=True)
    torch.testing.assert_close(trunk.group1.norm1.train()(x), expected, rtol=1e-4, atol=1e-5)
    assert trunk.group1.norm1.momentum == 0.4


# ---------------------------------------------------------------- tokens of a VQ-VAE


def test_a_saved_model_needs_no_other_file(vqvae_file, tmp_path):
    path = tmp_path / "encoder.safetensors"
    path.write_bytes(vqvae_file.read_bytes())
    config = ModelConfig(
        arch="vitfixedposvqvae",
        arch_options=(f"vqvae={path}", "dim=16", "depth=1", "heads=1"),
    )
    spec = model_spec(config, 3)
    assert spec.arch_options["vqvae"] == str(path)
    model, notes = start_model(config, spec)
    assert model.preprocessing.mean == (0.1, 0.2, 0.3)
    assert model.preprocessing.std == (0.4, 0.5, 0.6)
    assert any("normalised" in note for note in notes)
    model.eval()
    save_model(model, tmp_path / "model.safetensors")
    path.unlink()
    loaded = load_model(tmp_path / "model.safetensors")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), model(images))
    assert loaded.preprocessing == model.preprocessing


def test_the_encoder_is_frozen(vqvae_file):
    model = build(
        ModelSpec(
            "vitfixedposvqvae", 3, (8,), arch_options=tiny_options("vitfixedposvqvae", vqvae_file)
        )
    )
    before = copy.deepcopy(model.trunk.patches.encoder.state_dict())
    model.train()
    apply_freeze(model, "")
    assert not model.trunk.patches.encoder.training
    assert model.trunk.patches.training
    assert list(model.trunk.patches.encoder.parameters()) == []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    after = model.trunk.patches.encoder.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_a_code_as_wide_as_a_token_needs_no_linear_map(tmp_path):
    sizes = EncoderSizes(hiddens=8, residual_hiddens=4, residual_layers=1, code_dim=16)
    vqvae = VqVae(sizes, codes=4)
    save_vqvae(vqvae, tmp_path / "v.safetensors", (0.5,) * 3, (0.5,) * 3)
    trunk, _ = backbone(
        "vitfixedposvqvae", options=VIT | {"vqvae": str(tmp_path / "v.safetensors")}
    )
    images = torch.randn(2, 3, 8, 8)
    codes = array(vqvae.encoder(images)).reshape(2, 16, 4).transpose(0, 2, 1)
    expected = norm_by_formula(codes, trunk.patches.norm)
    np.testing.assert_allclose(array(trunk.patches(images)), expected, rtol=1e-3, atol=1e-4)


def test_a_checkpoint_that_names_a_file_is_refused(vqvae_file, tmp_path, monkeypatch):
    model = build(
        ModelSpec(
            "vitfixedposvqvae", 3, (8,), arch_options=tiny_options("vitfixedposvqvae", vqvae_file)
        )
    )
    model.spec.arch_options["vqvae"] = str(vqvae_file)
    save_model(model, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="name another file") as error:
        load_model(tmp_path / "model.safetensors")
    assert "\n" not in str(error.value)


def test_a_patch_other_than_the_vqvaes_is_refused(vqvae_file):
    with pytest.raises(ModelError, match=r"patch=8, but the VQ-VAE has patch=4"):
        backbone("vitfixedposvqvae", options={"vqvae": str(vqvae_file), "patch": 8})


# ---------------------------------------------------------------- plain state_dicts


def test_a_pt_file_with_its_options_beside_it_is_read(tmp_path):
    options = {"dim": 16, "depth": 1, "heads": 1}
    model = build(ModelSpec("vit_tiny", 3, (8, 16), arch_options=options)).eval()
    save_upstream(model, tmp_path / "final_weights.pt")
    params = {"model.arch": "vit_tiny", "model.arch_options": ["dim=16", "depth=1", "heads=1"]}
    (tmp_path / "params.json").write_text(json.dumps(params))
    loaded = load_model(tmp_path / "final_weights.pt")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), model(images))
    assert loaded.spec.arch_options == options


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        (["dim=8", "depth=1", "heads=1"], "not those of a vit_tiny"),
        (["dim"], "name=value"),
        ([3], "model.arch_options"),
        (7, "model.arch_options"),
        (["patch=5"], "patch=5"),
        (["vqvae=/etc/passwd"], "VQ-VAE"),
    ],
)
def test_options_that_do_not_fit_a_pt_file_are_one_line(tmp_path, pairs, words):
    options = {"dim": 16, "depth": 1, "heads": 1}
    model = build(ModelSpec("vit_tiny", 3, (8, 16), arch_options=options))
    save_upstream(model, tmp_path / "final_weights.pt")
    params = {"model.arch": "vit_tiny", "model.arch_options": pairs}
    (tmp_path / "params.json").write_text(json.dumps(params))
    with pytest.raises(CheckpointError) as error:
        load_model(tmp_path / "final_weights.pt")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("tokens", [1, 5, 64, 200])
def test_attention_written_out_is_the_fused_one(tokens):
    """`attend` in bfloat16 (written out on a CPU) against softmax(QK^T / sqrt(E)) V in float64."""
    made = torch.Generator().manual_seed(tokens)
    inputs = [torch.randn(2, 3, tokens, 8, generator=made).bfloat16() for _ in "qkv"]
    given = [x.clone().requires_grad_() for x in inputs]
    attend(*given, 0.0).float().square().sum().backward()
    exact = [x.double().requires_grad_() for x in inputs]
    scores = exact[0] @ exact[1].transpose(2, 3) / 8**0.5
    (scores.softmax(3) @ exact[2]).square().sum().backward()
    for mine, theirs in zip(given, exact, strict=True):
        error = (mine.grad.double() - theirs.grad).norm()
        assert error <= 0.03 * theirs.grad.norm() + 1e-6
