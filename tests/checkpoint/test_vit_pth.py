"""The .pth layout of Matryoshka ViT compression, against a slow net that is written from it."""

import math

import numpy as np
import pytest
import torch
from scipy.special import erf, softmax

from matryoshka.checkpoint import CheckpointError, load_model, save_model, save_vit_pth
from matryoshka.data.augment import Preprocessing
from matryoshka.models import ModelSpec, build, extract, with_prefixes

SIZE, PATCH, HEADS, CLASSES, DIM = 8, 4, 2, 10, 8
KWARGS = {
    "image_size": SIZE,
    "patch_size": PATCH,
    "num_classes": CLASSES,
    "depth": 2,
    "heads": HEADS,
    "dropout": 0.1,
    "emb_dropout": 0.1,
}
PROJECTIONS = {
    "ViTFixedPosDualPatchNorm": "patch_norm.proj",
    "ViTFixedPosNestedDualPatchNorm": "nested_proj",
    "ViTFixedPos": "to_patch_embedding.1",
    "ViT_LearnPos": "to_patch_embedding.1",
}

# ---------------------------------------------------------------- oracle


def positions():
    """Sine and cosine in turn: of x in the first half of the columns, of y in the second."""
    table = np.zeros((1 + (SIZE // PATCH) ** 2, DIM))
    quarter = DIM // 4
    for y in range(SIZE // PATCH):
        for x in range(SIZE // PATCH):
            row = table[1 + y * (SIZE // PATCH) + x]
            for k in range(quarter):
                frequency = 10000 ** (-k / quarter)
                row[2 * k] = math.sqrt(2) * math.sin(x * frequency)
                row[2 * k + 1] = math.sqrt(2) * math.cos(x * frequency)
                row[DIM // 2 + 2 * k] = math.sqrt(2) * math.sin(y * frequency)
                row[DIM // 2 + 2 * k + 1] = math.sqrt(2) * math.cos(y * frequency)
    return table


def layer_norm(x, weight=1.0, bias=0.0):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight + bias


def their_logits(stored, images):
    """One image, layer and head after the other, from the names of the file."""
    state = {key: value.double().numpy() for key, value in stored["model_state_dict"].items()}
    dual = "DualPatchNorm" in stored["vit_class"]
    projection = PROJECTIONS[stored["vit_class"]]
    dim, heads = stored["dim"], stored["vit_kwargs"]["heads"]
    rows = []
    for image in images.double().numpy():
        tokens = [state["cls_token"].ravel()]
        for y in range(0, SIZE, PATCH):
            for x in range(0, SIZE, PATCH):
                pixels = image[:, y : y + PATCH, x : x + PATCH].transpose(1, 2, 0).ravel()
                pixels = layer_norm(pixels) if dual else pixels
                token = state[f"{projection}.weight"][:dim] @ pixels
                token = token + state[f"{projection}.bias"][:dim]
                tokens.append(layer_norm(token) if dual else token)
        x = np.stack(tokens) + state["pos_embedding"][0]
        for layer in range(stored["vit_kwargs"]["depth"]):
            name = f"transformer.layers.{layer}"
            y = layer_norm(x, state[f"{name}.0.norm.weight"], state[f"{name}.0.norm.bias"])
            queries, keys, values = np.split(y @ state[f"{name}.0.fn.to_qkv.weight"].T, 3, axis=1)
            mixed = []
            for head in range(heads):
                part = slice(head * dim, (head + 1) * dim)
                scores = queries[:, part] @ keys[:, part].T / math.sqrt(dim)
                mixed.append(softmax(scores, axis=1) @ values[:, part])
            x = x + np.concatenate(mixed, axis=1) @ state[f"{name}.0.fn.to_out.0.weight"].T
            x = x + state[f"{name}.0.fn.to_out.0.bias"]
            y = layer_norm(x, state[f"{name}.1.norm.weight"], state[f"{name}.1.norm.bias"])
            y = y @ state[f"{name}.1.fn.net.0.weight"].T + state[f"{name}.1.fn.net.0.bias"]
            y = y * (1 + erf(y / math.sqrt(2))) / 2
            x = x + y @ state[f"{name}.1.fn.net.3.weight"].T + state[f"{name}.1.fn.net.3.bias"]
        final = layer_norm(x[0], state["mlp_head.0.weight"], state["mlp_head.0.bias"])
        rows.append(state["mlp_head.1.weight"] @ final + state["mlp_head.1.bias"])
    return np.stack(rows)


def their_file(vit_class="ViTFixedPosDualPatchNorm"):
    """The content of a file of that repository, with random weights."""
    rng = np.random.default_rng(0)

    def random(*shape):
        return torch.tensor(rng.standard_normal(shape) / 2, dtype=torch.float32)

    wide = 2 * DIM if "Nested" in vit_class else DIM  # the nested class keeps all rows
    projection = PROJECTIONS[vit_class]
    state = {
        "cls_token": random(1, 1, DIM),
        "pos_embedding": torch.tensor(positions(), dtype=torch.float32)[None],
        f"{projection}.weight": random(wide, 3 * PATCH * PATCH),
        f"{projection}.bias": random(wide),
        "mlp_head.0.weight": random(DIM),
        "mlp_head.0.bias": random(DIM),
        "mlp_head.1.weight": random(CLASSES, DIM),
        "mlp_head.1.bias": random(CLASSES),
    }
    if vit_class == "ViT_LearnPos":
        state["pos_embedding"] = random(*state["pos_embedding"].shape)
    if "Nested" in vit_class:  # stored twice
        state["patch_norm.nested_proj.weight"] = state[f"{projection}.weight"]
        state["patch_norm.nested_proj.bias"] = state[f"{projection}.bias"]
    for layer in range(2):
        name = f"transformer.layers.{layer}"
        state[f"{name}.0.fn.to_qkv.weight"] = random(3 * HEADS * DIM, DIM)
        state[f"{name}.0.fn.to_out.0.weight"] = random(DIM, HEADS * DIM)
        for key in ("1.fn.net.0", "1.fn.net.3"):
            state[f"{name}.{key}.weight"] = random(DIM, DIM)
        for key in ("0.norm.weight", "0.norm.bias", "1.norm.weight", "1.norm.bias"):
            state[f"{name}.{key}"] = random(DIM)
        for key in ("0.fn.to_out.0", "1.fn.net.0", "1.fn.net.3"):
            state[f"{name}.{key}.bias"] = random(DIM)
    return {
        "model_state_dict": state,
        "dim": DIM,
        "vit_class": vit_class,
        "vit_kwargs": dict(KWARGS),
    }


def model_of_their_size(arch="vit_nested"):
    options = {"image_size": SIZE, "patch": PATCH, "depth": 2, "heads": HEADS}
    model = build(ModelSpec(arch, CLASSES, (4, DIM), True, arch_options=options))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


# ---------------------------------------------------------------- both ways


@pytest.mark.parametrize("vit_class", PROJECTIONS)
def test_a_file_of_that_repository(tmp_path, vit_class):
    stored = their_file(vit_class)
    torch.save(stored, tmp_path / "vit.pth")
    model = load_model(tmp_path / "vit.pth")
    images = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        found = model(images)[0].numpy()
    assert found == pytest.approx(their_logits(stored, images), abs=1e-4)
    assert model.dims == (DIM,)
    preprocessing = model.preprocessing
    assert (preprocessing.size, preprocessing.ratio) == (SIZE, 1.0)
    assert preprocessing.std == (0.2023, 0.1994, 0.2010)
    assert model.notes == ["the file has no mean and std, assumed those of CIFAR-10"]
    expected = sum(v.numel() for k, v in stored["model_state_dict"].items() if "pos" not in k)
    if "Nested" in vit_class:
        expected -= 3 * DIM * (3 * PATCH * PATCH + 1)  # the other rows, and all of the copy
    if vit_class == "ViT_LearnPos":
        expected += stored["model_state_dict"]["pos_embedding"].numel()
    assert sum(p.numel() for p in model.parameters()) == expected


def test_ours_in_that_layout(tmp_path):
    model = model_of_their_size()
    model.classes = [f"class {c}" for c in range(CLASSES)]
    model.preprocessing = Preprocessing(size=SIZE, ratio=1.0, mean=(0.5,) * 3, std=(0.25,) * 3)
    alone = extract(model, DIM)
    save_vit_pth(alone, tmp_path / "vit.pth")
    stored = torch.load(tmp_path / "vit.pth", weights_only=True)
    assert (stored["dim"], stored["vit_class"]) == (DIM, "ViTFixedPosDualPatchNorm")
    assert stored["vit_kwargs"] == {**KWARGS, "pool": "cls", "channels": 3}
    theirs = their_file()["model_state_dict"]
    shapes = {key: value.shape for key, value in stored["model_state_dict"].items()}
    assert shapes == {key: value.shape for key, value in theirs.items()}
    table = stored["model_state_dict"]["pos_embedding"][0].numpy()
    assert table == pytest.approx(positions(), abs=1e-6)

    images = torch.randn(2, 3, SIZE, SIZE)
    loaded = load_model(tmp_path / "vit.pth")
    with torch.no_grad():
        family = model(images)[1]
        assert family.numpy() == pytest.approx(their_logits(stored, images), abs=1e-4)
        assert torch.equal(loaded(images), alone(images))
    assert (loaded.spec.arch, loaded.spec.dims) == (alone.spec.arch, alone.spec.dims)
    assert (loaded.classes, loaded.preprocessing) == (model.classes, model.preprocessing)
    save_model(loaded, tmp_path / "model.safetensors")
    assert load_model(tmp_path / "model.safetensors").notes == []


# ---------------------------------------------------------------- mistakes


def without(content, key):
    content.pop(key)


DAMAGE = {
    "no kwargs": (lambda c: without(c, "vit_kwargs"), "without vit_kwargs"),
    "class": (lambda c: c.update(vit_class="ViTFixedPosVqVae"), "vit_class is 'ViTFixedPosVqVae'"),
    "class type": (lambda c: c.update(vit_class=[1]), r"vit_class is \[1\]"),
    "dim": (lambda c: c.update(dim="8"), "dim is '8'"),
    "narrow dim": (lambda c: c.update(dim=6), "dim is 6, and fixed positions need a multiple of 4"),
    "wide dim": (lambda c: c.update(dim=16), "pos_embedding is not the fixed table"),
    "kwargs": (lambda c: c.update(vit_kwargs=[]), "vit_kwargs is"),
    "depth": (lambda c: c["vit_kwargs"].update(depth=3), r"no whole transformer\.layers\.2"),
    "endless": (lambda c: c["vit_kwargs"].update(depth=10**9), "depth is 1000000000"),
    "image size": (lambda c: c["vit_kwargs"].update(image_size=16384), "not the fixed table"),
    "heads": (lambda c: c["vit_kwargs"].update(heads=5), "the weights do not fit"),
    "channels": (lambda c: c["vit_kwargs"].update(channels=1), "takes 1 channels"),
    "pool": (lambda c: c["vit_kwargs"].update(pool="max"), "pool is 'max'"),
    "state": (lambda c: c.update(model_state_dict=3), "no whole pos_embedding"),
    "missing": (lambda c: without(c["model_state_dict"], "cls_token"), "no whole cls_token"),
    "positions": (
        lambda c: c["model_state_dict"]["pos_embedding"].mul_(2),
        "not the fixed table",
    ),
    "shape": (
        lambda c: c["model_state_dict"].update({"mlp_head.1.weight": torch.zeros(10)}),
        r"head\.heads\.0\.weight is \[10\], which does not fit dim=8",
    ),
    "classes": (lambda c: c["vit_kwargs"].update(num_classes=7), r"classifier 0 is \[10, 8\]"),
    "hollow": (
        lambda c: c["model_state_dict"].update({"cls_token": torch.zeros(1).expand(1, 1, 8)}),
        "no whole cls_token",
    ),
    "extra": (lambda c: c.update(matryoshka="{"), "its preprocessing is damaged"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_wrong_file_is_one_line(tmp_path, name):
    change, message = DAMAGE[name]
    content = their_file()
    change(content)
    torch.save(content, tmp_path / "vit.pth")
    with pytest.raises(CheckpointError, match=message) as error:
        load_model(tmp_path / "vit.pth")
    assert "\n" not in str(error.value)
    assert str(tmp_path / "vit.pth") in str(error.value)


def test_models_that_the_layout_cannot_hold(tmp_path):
    path = tmp_path / "vit.pth"
    with pytest.raises(CheckpointError, match="not a vit_nested with dims"):
        save_vit_pth(model_of_their_size(), path)
    options = {"image_size": SIZE, "patch": PATCH, "dim": DIM}
    for extra, message in (
        ({"mlp_dim": 32}, "no mlp_dim=32"),
        ({"heads": 1}, "no heads=1"),
        ({"pool": "mean"}, "no pool=mean"),
    ):
        spec = ModelSpec("vitfixedposdualpatchnorm", 10, (DIM,), arch_options={**options, **extra})
        with pytest.raises(CheckpointError, match=message):
            save_vit_pth(build(spec), path)
    assert not path.exists()
    one = extract(with_prefixes(model_of_their_size("vit_independent"), (4,)), 4)
    save_vit_pth(one, path)
    assert load_model(path).dims == (4,)


def test_flags_of_other_files_are_refused(tmp_path):
    torch.save(their_file(), tmp_path / "vit.pth")
    with pytest.raises(CheckpointError, match="mrl was requested"):
        load_model(tmp_path / "vit.pth", mrl=True)
    with pytest.raises(CheckpointError, match="old_ckpt"):
        load_model(tmp_path / "vit.pth", old_ckpt=True)
