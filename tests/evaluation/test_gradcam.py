"""Grad-CAM against loops over channels and positions, and against captum; the program on a CPU."""

import copy
import json
from collections import OrderedDict

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matryoshka.inference import gradcam as program
from PIL import Image
from torchvision.ops import Permute

from matryoshka.checkpoint.model_file import save_model
from matryoshka.checkpoint.upstream import save_upstream
from matryoshka.data import open_dataset, write_beton
from matryoshka.data.augment import Preprocessing
from matryoshka.evaluation.heat_maps import find_layer, heat_maps
from matryoshka.evaluation.montage import Cell, montage
from matryoshka.models import ModelError, ModelSpec, build

CLASSES = ["ant", "bee", "cat"]


def made(
    arch="resnet10", dims=(8, 64, 512), *, efficient=False, blurpool=False, num_classes=5, seed=0
):
    torch.manual_seed(seed)
    model = build(ModelSpec(arch, num_classes, dims, efficient, blurpool)).eval()
    for module in model.modules():  # statistics of its own: those of a new model change nothing
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return model


def pictures(n=3, height=64, width=None, seed=1):
    return torch.randn(n, 3, height, width or height, generator=torch.Generator().manual_seed(seed))


def stages(model, images):
    """{name: output} of the stages of a torchvision ResNet."""
    x, outputs = images, {}
    for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
        x = outputs[name] = model.trunk.get_submodule(name)(x.clone())
    return outputs


def by_loops(model, images, name, targets=None):
    """(maps [G, B, H, W], predictions [G, B], confidences [G, B]), by loops over channels and
    pixels.
    """
    shape = len(model.dims), len(images)
    maps, predictions, confidences = (
        np.zeros((*shape, *images.shape[2:])),
        np.zeros(shape, int),
        np.zeros(shape),
    )
    for g, b in np.ndindex(shape):
        features = stages(model, images[b : b + 1])[name].detach().requires_grad_()
        x, d = features, model.dims[g]
        for later in ["layer3", "layer4"][["layer2", "layer3", "layer4"].index(name) :]:
            x = model.trunk.get_submodule(later)(x.clone())
        head = model.head.heads[g if len(model.head.heads) > 1 else 0]
        logits = head.weight[:, :d] @ x.mean((2, 3))[0, :d] + head.bias
        values = logits.detach().double().numpy()
        predictions[g, b] = values.argmax()
        confidences[g, b] = 1 / sum(np.exp(v - values.max()) for v in values)
        logits[predictions[g, b] if targets is None else targets[g][b]].backward()
        channels = zip(
            features.grad[0].double().numpy(), features[0].detach().double().numpy(), strict=True
        )
        coarse = sum(
            sum(gradient.flat) / gradient.size * activation for gradient, activation in channels
        )
        maps[g, b] = normalised(enlarged(np.maximum(coarse, 0), *images.shape[2:]))
    return maps, predictions, confidences


def enlarged(coarse, height, width):
    """Bilinear, pixel centres at half integers, the border repeated."""
    h, w = coarse.shape
    large = np.zeros((height, width))
    for i, j in np.ndindex(height, width):
        y = min(max((i + 0.5) * h / height - 0.5, 0), h - 1)
        x = min(max((j + 0.5) * w / width - 0.5, 0), w - 1)
        for row, share in ((int(y), 1 - y % 1), (min(int(y) + 1, h - 1), y % 1)):
            large[i, j] += share * (
                (1 - x % 1) * coarse[row, int(x)] + x % 1 * coarse[row, min(int(x) + 1, w - 1)]
            )
    return large


def normalised(values):
    return values / values.max() if values.max() > 0 else values


@pytest.mark.parametrize("kind", ["mrl", "mrl-e", "ff", "blurpool", "layer3", "oblong"])
def test_maps_equal_loops(kind):
    model = made(
        dims=(24,) if kind == "ff" else (8, 64, 512),
        efficient=kind == "mrl-e",
        blurpool=kind == "blurpool",
    )
    images = pictures(2, 64, 96 if kind == "oblong" else 64)
    name = "layer3" if kind == "layer3" else "layer4"
    found = heat_maps(model, images, layer=name)
    maps, predictions, confidences = by_loops(model, images, name)
    assert [t.dtype for t in found] == [torch.float32, torch.int64, torch.float32]
    np.testing.assert_allclose(found.maps, maps, atol=1e-4)
    np.testing.assert_array_equal(found.predictions, predictions)
    np.testing.assert_allclose(found.confidences, confidences, atol=1e-5)
    assert (float(found.maps.min()) >= 0, float(found.maps.max())) == (True, 1), (
        "maps must be 0 to 1, with a maximum of 1"
    )


def test_targets_are_explained_but_predictions_stay():
    model, images = made(), pictures(2)
    own = heat_maps(model, images, layer="layer4")
    each, passes = torch.tensor([[0, 1], [2, 3], [4, 0]]), []
    handle = model.trunk.register_forward_hook(lambda _, given, out: passes.append(len(out)))
    found = heat_maps(model, images, each, "layer4")
    handle.remove()
    # one image chooses the layer; one pass for both images serves all prefixes
    assert passes == [1, 2], "expected one pass for the layer and one for all prefixes"
    np.testing.assert_allclose(
        found.maps, by_loops(model, images, "layer4", each.tolist())[0], atol=1e-4
    )
    assert torch.equal(found.predictions, own.predictions), "targets changed the predictions"
    shared = heat_maps(model, images, torch.tensor([3, 1]), "layer4").maps
    three = heat_maps(model, images, torch.tensor([[3, 1]] * 3), "layer4").maps
    assert torch.equal(shared, three), "targets [B] and [G, B] differ"
    again = heat_maps(model, images, own.predictions, "layer4").maps
    assert torch.equal(again, own.maps), "targets equal to the predictions change the maps"


@pytest.mark.parametrize("layer", ["layer4", "layer3", "layer4.0.bn1"])
def test_captum_agrees(layer):
    captum = pytest.importorskip("captum.attr")
    model, images = made(), pictures(3)
    found = heat_maps(model, images, layer=layer)
    for g in range(len(model.dims)):
        method = captum.LayerGradCam(lambda x, g=g: model(x)[g], model.trunk.get_submodule(layer))
        coarse = method.attribute(images, target=found.predictions[g], relu_attributions=True)
        large = (
            captum.LayerAttribution.interpolate(coarse, tuple(images.shape[2:]), "bilinear")[:, 0]
            .detach()
            .numpy()
        )
        np.testing.assert_allclose(found.maps[g], [normalised(one) for one in large], atol=1e-5)


def test_a_class_without_evidence_has_an_empty_map():
    model, images = made(), pictures(2)
    with torch.no_grad():
        for head in model.head.heads:
            head.weight[2] = -head.weight[2].abs()  # features are positive, behind a ReLU
    found = heat_maps(model, images, torch.tensor([2, 0]), "layer4")
    assert not found.maps[:, 0].any()
    assert found.maps[:, 1].any()


def test_the_model_is_restored():
    model, images = made(), pictures(2)
    model.train()
    model.trunk.bn1.eval()  # as after model.freeze
    model.trunk.conv1.weight.requires_grad_(False)
    model.head.heads[0].weight.grad = torch.ones_like(model.head.heads[0].weight)
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    heat_maps(model, images)
    with pytest.raises(ModelError):
        heat_maps(model, images, layer="fc")
    assert [m.training for m in model.modules()] == modes, "the mode of a module changed"
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), (
        "weights or statistics changed"
    )
    for parameter, old in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, old) if old is not None else parameter.grad is None, (
            "a gradient changed"
        )
    assert not any(m._forward_hooks for m in model.modules())
    assert torch.is_grad_enabled()


def test_the_caller_may_be_without_gradients():
    model, images = made().requires_grad_(False), pictures(2)
    expected = heat_maps(model, images).maps
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(heat_maps(model, images.clone()).maps, expected), (
                f"maps differ under {context.__name__}"
            )
            assert not torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("arch", "size", "expected"),
    [
        ("resnet10", 64, ("layer2", 8, 8)),  # layer4 has 2 x 2 positions
        ("resnet10", 32, ("layer1", 8, 8)),
        ("resnet50", 64, ("layer2", 8, 8)),  # not layer3.0.conv1, inside of a block
        ("resnet10", 192, ("layer4", 6, 6)),
        ("timm:test_convnext", 96, ("stages.2", 6, 6)),
        ("timm:test_efficientnet", 96, ("blocks.3", 6, 6)),
        (
            "timm:test_vit",
            160,
            ("blocks.5.norm1", 10, 10),
        ),  # its class token reads the patches in the last attention
        ("timm:test_vit2", 160, ("norm", 10, 10)),  # averages, has a register
        ("timm:test_vit3", 160, ("norm", 10, 10)),  # pools by attention
    ],
)
def test_the_last_layer_with_a_map_is_chosen(arch, size, expected):
    dims = (8, 64) if "test_" in arch else (8, 2048 if arch == "resnet50" else 512)
    model = made(arch, dims)
    images = pictures(2, size)
    assert tuple(find_layer(model, images)) == expected, "another layer was chosen"
    assert tuple(find_layer(model, images, f"trunk.{expected[0]}")) == expected, (
        "a named layer has another size"
    )
    maps = heat_maps(model, images).maps
    assert maps.shape == (2, 2, size, size), "maps must have the size of the images"
    assert maps.amax((2, 3)).max() == 1, "maps must have a maximum of 1"


def test_maps_of_a_vit_equal_loops():
    """From the last block's first norm on, with the block's own parts; the class token is first."""
    model, images = made("timm:test_vit", (8, 64)), pictures(1, 160)
    trunk, last = model.trunk, model.trunk.blocks[-1]
    tokens = trunk.blocks[:-1](trunk._pos_embed(trunk.patch_embed(images)))
    normed = last.norm1(tokens).detach().requires_grad_()
    out = tokens + last.ls1(last.attn(normed))
    feature = trunk.norm(out + last.ls2(last.mlp(last.norm2(out))))[:, 0]
    found = heat_maps(model, images)
    for g, prefix in enumerate(model.head(feature)):
        (gradient,) = torch.autograd.grad(prefix.max(), normed, retain_graph=True)
        weights = gradient[0, 1:].mean(0)
        coarse = np.zeros((10, 10))
        for n, token in enumerate(normed[0, 1:].detach()):
            coarse[n // 10, n % 10] = max(0.0, float(sum(weights * token)))
        np.testing.assert_allclose(
            found.maps[g, 0], normalised(enlarged(coarse, 160, 160)), atol=1e-4
        )


def test_channels_may_come_last():
    model, images = made(), pictures(2, 64, 96)
    expected = heat_maps(model, images, layer="layer4").maps
    layers = OrderedDict(
        (n, part) for n, part in model.trunk.named_children() if n not in ("avgpool", "fc")
    )
    layers |= {
        "last": Permute((0, 2, 3, 1)),
        "back": Permute((0, 3, 1, 2)),
        "pool": torch.nn.AdaptiveAvgPool2d(1),
    }
    model.trunk = torch.nn.Sequential(layers).append(torch.nn.Flatten())
    assert tuple(find_layer(model, images, "last")) == ("last", 2, 3)
    torch.testing.assert_close(heat_maps(model, images, layer="last").maps, expected)


@pytest.mark.parametrize(
    ("layer", "targets", "words"),
    [
        ("layer5", None, ["layer5", "layer4"]),
        ("fc", None, ["fc", "not a feature map"]),
        ("", None, ["no module of that name"]),
        (None, None, ["several positions"]),
        (None, [0], ["targets", "[2] or [3, 2]"]),
        (None, [0, 5], ["targets", "0 to 4"]),
        (None, [-1, 0], ["targets", "0 to 4"]),
        (None, [[0, 0]] * 2, ["targets"]),
    ],
)
def test_invalid_layers_and_targets(layer, targets, words):
    model = made()
    if layer is targets is None:
        model.trunk = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64 * 64, 512))
    with pytest.raises(ModelError) as error:
        heat_maps(model, pictures(2), None if targets is None else torch.tensor(targets), layer)
    assert all(word in str(error.value) for word in words), error.value


def test_a_montage_tells_right_from_wrong_without_colour():
    heat = np.linspace(0, 1, 32 * 32).reshape(32, 32)
    given = (
        (8, heat, "bee $x^2$", 0.25, False),
        (64, heat, "ant", 0.5, True),
        (512, 0 * heat, "ant", 1, True),
    )
    cells = [Cell(*one) for one in given]
    figure = montage(
        np.zeros((32, 32, 3), np.uint8), "photo.jpg", "true class: ant", cells, "Grad-CAM"
    )
    shown = [text.get_text() for text in figure.texts]
    for words in (
        "photo.jpg",
        "true class: ant",
        "prefix 8",
        "prefix 64",
        "25 %",
        "50 %",
        "\N{BALLOT X} bee $x^2$",
    ):
        assert words in shown
    assert shown.count("\N{CHECK MARK} ant") == 2, "two predictions are right"
    frames = [axes.spines["left"].get_linestyle() for axes in figure.axes[1:4]]
    assert frames[0] != frames[1] == frames[2], "frames must tell right from wrong"
    assert [len(axes.texts) for axes in figure.axes[1:4]] == [0, 0, 1], (
        "only the empty map has a text"
    )


@pytest.mark.parametrize("count", [1, 4, 5, 9, 13])
def test_nothing_overlaps_and_nothing_is_cut_off(count):
    heat = np.random.default_rng(0).random((16, 16))
    name = "a class with quite a long name, like many"
    cells = [Cell(2**k, heat, name, 0.123, k % 2 == 0) for k in range(count)]
    figure = montage(
        np.zeros((16, 16, 3), np.uint8), "n" * 200, f"true class: {name}", cells, "a note " * 50
    )
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [one.get_window_extent(renderer) for one in (*figure.texts, *figure.axes)]
    for i, box in enumerate(boxes):
        assert min(box.x0, box.y0) >= 0, f"box {i} is cut off at the left or below: {box}"
        assert box.x1 <= figure.bbox.x1, f"box {i} is cut off at the right: {box}"
        assert box.y1 <= figure.bbox.y1, f"box {i} is cut off above: {box}"
        for other in boxes[:i]:
            apart = (
                box.x1 <= other.x0 or other.x1 <= box.x0 or box.y1 <= other.y0 or other.y1 <= box.y0
            )
            assert apart, f"boxes overlap: {box}, {other}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    model = made(num_classes=3)
    model.classes = CLASSES
    model.preprocessing = Preprocessing(
        size=32, ratio=1.0, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4)
    )
    path = tmp_path_factory.mktemp("run") / "model.safetensors"
    save_model(model, path)
    return path


@pytest.fixture(scope="module")
def raw(tmp_path_factory, photo):
    """Class folders of 32-px PNG files, whose pixels need no resizing: {ant, bee, cat} of 3 images
    each.
    """
    root = tmp_path_factory.mktemp("raw")
    for label, name in enumerate(CLASSES):
        (root / name).mkdir()
        for i in range(3):
            Image.fromarray(photo(32, 32, seed=10 * label + i)).save(root / name / f"{i}.png")
    return root


def ran(checkpoint, data, output, *more):
    assert (
        program.main(
            [f"--path={checkpoint}", f"--data={data}", f"--output={output}", "--device=cpu", *more]
        )
        == 0
    )
    return json.loads((output / "gradcam.json").read_text())


def expected_of(checkpoint, file):
    """{prefix: (predicted class, confidence)} of an image of 32 pixels."""
    model = program.checkpoint.load_model(checkpoint)
    pixels = (np.asarray(Image.open(file)) / 255 - (0.4, 0.5, 0.6)) / (0.2, 0.3, 0.4)
    with torch.inference_mode():
        shares = (
            model(torch.tensor(pixels.transpose(2, 0, 1)[None], dtype=torch.float32))[:, 0]
            .softmax(1)
            .numpy()
        )
    return {
        str(d): (CLASSES[p.argmax()], pytest.approx(p.max(), abs=1e-4))
        for d, p in zip(model.dims, shares, strict=True)
    }


def test_every_prefix_of_every_image_is_shown(checkpoint, raw, tmp_path, capsys):
    listed = ran(checkpoint, raw, tmp_path / "new" / "maps")
    folder = open_dataset(raw)
    assert [one["image"] for one in listed] == [folder.name(i) for i in range(9)]
    assert [one["label"] for one in listed] == [CLASSES[label] for label in folder.labels]
    for one in listed:
        assert set(one) == {"image", "label", "file", "prefixes", "layer", "positions"}
        assert (one["layer"], one["positions"]) == ("layer1", [8, 8])
        for d, (prediction, confidence) in expected_of(checkpoint, raw / one["image"]).items():
            correct = prediction == one["label"]
            assert one["prefixes"][d] == {
                "prediction": prediction,
                "confidence": confidence,
                "correct": correct,
            }, f"{one['image']}, prefix {d}"
        picture = Image.open(tmp_path / "new" / "maps" / one["file"])
        assert (picture.format, min(picture.size) > 300) == ("PNG", True), (
            f"{one['file']}: format or size"
        )
        assert len(picture.convert("RGB").getcolors(10**7)) > 100, (
            f"{one['file']}: the picture is empty"
        )
    assert len({one["file"] for one in listed}) == 9, "file names are not unique"
    assert "layer1, 8 x 8" in capsys.readouterr().out
    assert {p["correct"] for one in listed for p in one["prefixes"].values()} == {True, False}


def test_a_beton_gives_what_its_folder_gives(checkpoint, raw, tmp_path):
    write_beton(open_dataset(raw), tmp_path / "raw.beton", write_mode="raw", max_resolution=32)
    there = ran(checkpoint, raw, tmp_path / "a", "--dims=512,8", "--images=4", "--format=jpg")
    here = ran(checkpoint, tmp_path / "raw.beton", tmp_path / "b", "--dims=8,512", "--images=4")
    assert [one["prefixes"] for one in there] == [one["prefixes"] for one in here], (
        "a .beton gives other predictions than its folder"
    )
    assert [list(one["prefixes"]) for one in here] == [["8", "512"]] * 4
    assert [one["label"] for one in here] == [
        "ant",
        "bee",
        "bee",
        "cat",
    ]  # spread over a sorted set
    assert Image.open(tmp_path / "a" / there[0]["file"]).format == "JPEG"


def test_loose_files_and_a_single_one(checkpoint, raw, tmp_path, capsys):
    loose = tmp_path / "holiday"
    (loose / "maps").mkdir(parents=True)  # as of an earlier run
    for i, name in enumerate(("b.png", "a\N{SNOWMAN}.png", "c.PNG")):
        (loose / name).write_bytes((raw / "bee" / f"{i}.png").read_bytes())
    (loose / "broken.jpg").write_bytes(b"\xff\xd8\xff" + b"0" * 50)
    (loose / "empty.png").write_bytes(b"")
    listed = ran(checkpoint, loose, loose / "maps")
    assert [one["image"] for one in listed] == ["a\N{SNOWMAN}.png", "b.png", "c.PNG"]
    skipped = capsys.readouterr().err.strip().splitlines()
    assert all(
        name in line for name, line in zip(("broken.jpg", "empty.png"), skipped, strict=True)
    ), skipped
    for one in listed:
        assert one["label"] is None
        for d, (prediction, confidence) in expected_of(checkpoint, loose / one["image"]).items():
            assert one["prefixes"][d] == {
                "prediction": prediction,
                "confidence": confidence,
                "correct": None,
            }, f"{one['image']}, prefix {d}"
    assert [one["prefixes"] for one in ran(checkpoint, loose / "b.png", tmp_path)] == [
        listed[1]["prefixes"]
    ]
    assert [one["label"] for one in ran(checkpoint, raw / "ant", tmp_path)] == [
        "ant"
    ] * 3  # by the folder's name


def test_folders_without_classes_and_lists_of_files(checkpoint, raw, tmp_path):
    nested = tmp_path / "photos"
    (nested / "sub").mkdir(parents=True)
    (nested / "b.png").write_bytes((raw / "bee" / "0.png").read_bytes())
    (nested / "sub" / "a.png").write_bytes((raw / "ant" / "0.png").read_bytes())
    maps = nested / "maps"
    first = ran(checkpoint, nested, maps)
    assert [one["image"] for one in first] == ["b.png", "sub/a.png"]
    assert [one["label"] for one in first] == [None, None]
    assert ran(checkpoint, nested, maps) == first, "pictures of the first run were used as images"

    files = [str(nested / "sub" / "a.png"), str(nested / "b.png")]
    output = tmp_path / "listed"
    assert program.main([f"--path={checkpoint}", "--data", *files, f"--output={output}"]) == 0
    listed = json.loads((output / "gradcam.json").read_text())
    assert [one["prefixes"] for one in listed] == [one["prefixes"] for one in first]


def test_classes_count_by_name_and_imagenets_are_in_words(raw, tmp_path):
    model = made(num_classes=1000)
    model.preprocessing = Preprocessing(size=32, ratio=1.0)
    with torch.no_grad():
        model.head.heads[0].bias[207] += 100
    save_upstream(model, tmp_path / "final_weights.pt")
    (tmp_path / "params.json").write_text(json.dumps({"validation.resolution": 32}))
    for name in ("aardvark", "n01443537", "n02099601"):
        (tmp_path / "val" / name).mkdir(parents=True)
        (tmp_path / "val" / name / "0.png").write_bytes((raw / "bee" / "0.png").read_bytes())
    listed = ran(
        tmp_path / "final_weights.pt", tmp_path / "val", tmp_path / "maps", "--mrl", "--dims=8"
    )
    assert [one["label"] for one in listed] == ["aardvark", "goldfish", "golden retriever"]
    assert {one["prefixes"]["8"]["prediction"] for one in listed} == {"golden retriever"}
    assert [one["prefixes"]["8"]["correct"] for one in listed] == [
        None,
        False,
        True,
    ]  # an aardvark is no class of it


def test_the_target_decides_what_is_explained(checkpoint, raw, tmp_path, monkeypatch):
    asked, original = [], program.heat_maps
    monkeypatch.setattr(
        program, "heat_maps", lambda *args: asked.append(args[2]) or original(*args)
    )
    for target in ("predicted", "label", "2"):
        listed = ran(checkpoint, raw, tmp_path, f"--target={target}", "--images=3", "--dims=8")
        assert [one["label"] for one in listed] == CLASSES
    assert [t if t is None else t.tolist() for t in asked] == [None, [0, 1, 2], [2, 2, 2]]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--path={tmp}/none.pt"], ["none.pt", "no such checkpoint"]),
        (["--data={tmp}/none"], ["none", "no such file or folder"]),
        (["--data={tmp}/bad"], ["bad", "none of its images"]),
        (["--images=0"], ["--images 0"]),
        (["--dims=8,16"], ["--dims", "no prefix 16", "[8, 64, 512]"]),
        (["--dims=8;16"], ["--dims 8;16", "expected int,..."]),
        (["--target=3"], ["--target 3", "0 to 2"]),
        (["--target=ant"], ["--target ant", "predicted, label"]),
        (["--target=label", "--data={tmp}/bad"], ["--target label", "0.png", "--target predicted"]),
        (["--layer=layer9"], ["layer9", "layer4"]),
        (["--efficient"], ["efficient was requested"]),
        (["--output={raw}/ant/0.png"], ["0.png"]),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(checkpoint, raw, tmp_path, capsys, *, more, words):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "0.png").write_bytes(b"no image")
    given = [word.format(tmp=tmp_path, raw=raw) for word in more]
    base = [
        f"--path={checkpoint}",
        f"--data={raw}",
        f"--output={tmp_path / 'maps'}",
        "--device=cpu",
    ]
    with pytest.raises(SystemExit) as end:
        program.main([*base, *given])
    *skipped, line = capsys.readouterr().err.strip().splitlines()
    assert (end.value.code, line[:7], len(skipped)) == (2, "error: ", words[0] == "bad")
    assert all(word in line for word in words), line
    assert not (tmp_path / "maps").exists()
