"""ImageNet's test sets, baselines and saved arrays, against NumPy loops over single images."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import torchvision
from imagenet_small import FOLDERS, ROOT, SUBSET, WNIDS, evaluate, refused
from PIL import Image
from safetensors.torch import save_file
from torchvision import transforms

from matryoshka.checkpoint.model_file import load_model, save_model
from matryoshka.data import open_dataset, write_beton
from matryoshka.data.augment import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from matryoshka.data.resized_images import resize_and_crop
from matryoshka.models import ModelSpec, build


def one_by_one(model, name, root):
    """(logits [G, N, C], labels [N]), sorted by folder and file; C is 200 for A and R."""
    logits, labels = [], []
    for folder in sorted((root / FOLDERS[name]).iterdir()):
        index = int(folder.name) if folder.name.isdigit() else WNIDS.index(folder.name)
        for file in sorted(folder.iterdir()):
            pixels = (np.asarray(Image.open(file)) / 255 - IMAGENET_MEAN) / IMAGENET_STD
            with torch.inference_mode():
                row = model(
                    torch.tensor(pixels.transpose(2, 0, 1)[None], dtype=torch.float32)
                ).numpy()[:, 0]
            if name in SUBSET:
                row = np.stack([[prefix[i] for i in SUBSET[name]] for prefix in row])
            logits.append(row)
            labels.append(SUBSET[name].index(index) if name in SUBSET else index)
    return np.stack(logits, axis=1), np.array(labels)


def accuracy(logits, labels):
    """{(prefix number, k): percent} by sorting every row."""
    hits = {(g, k): 0 for g in range(len(logits)) for k in (1, 5)}
    for g, prefix in enumerate(logits):
        for row, label in zip(prefix, labels, strict=True):
            ranked = sorted(range(len(row)), key=lambda c: (-row[c], c))
            for k in (1, 5):
                hits[g, k] += label in ranked[:k]
    return {key: pytest.approx(100 * count / len(labels)) for key, count in hits.items()}


def shown(results):
    return {
        (g, k): row[f"top{k}"] for g, row in enumerate(results["prefixes"].values()) for k in (1, 5)
    }


@pytest.mark.parametrize("name", list(FOLDERS))
def test_a_set_equals_loops_over_single_images(
    name, imagenet_root, imagenet_checkpoint, tmp_path, capsys
):
    results, arrays = evaluate(
        imagenet_checkpoint, imagenet_root, tmp_path, f"--dataset={name.upper()}"
    )
    logits, labels = one_by_one(load_model(imagenet_checkpoint), name, imagenet_root)
    assert (arrays["logits"].dtype, arrays["softmax"].dtype) == (np.float32, np.float32)
    assert (arrays["predictions"].dtype, arrays["gt"].dtype) == (np.int64, np.int64)
    assert arrays["logits"].shape == (3, 9, 200 if name in SUBSET else 1000), (
        "logits are not [G, N, C]"
    )
    np.testing.assert_allclose(arrays["logits"], logits, atol=1e-4)
    np.testing.assert_array_equal(arrays["gt"], labels)
    np.testing.assert_array_equal(arrays["predictions"], logits.argmax(2))
    powers = np.exp(logits - logits.max(2, keepdims=True))
    np.testing.assert_allclose(arrays["softmax"], powers / powers.sum(2, keepdims=True), atol=1e-5)
    assert shown(results) == accuracy(logits, labels) == accuracy(arrays["logits"], arrays["gt"]), (
        "accuracies of the table, the loops and the arrays"
    )
    assert max(shown(results).values()) > 0, "vacuous: no image is classified correctly"
    assert (results["dataset"], results["images"]) == (name, 9), "data set, images"
    table = re.findall(r"^ +(\d+) +([\d.]+) +([\d.]+)$", capsys.readouterr().out, re.MULTILINE)
    assert [(int(d), float(a)) for d, a, _ in table] == [
        (d, pytest.approx(100 * (row == labels).mean(), abs=0.01))
        for d, row in zip((8, 64, 512), arrays["predictions"], strict=True)
    ], "top-1 in percent by prefix, printed against predicted"
    for kind, file in results["arrays"].items():
        assert all(
            word in file
            for word in (
                name,
                imagenet_checkpoint.parent.name,
                "model",
                "mrl",
                "8-64-512",
                "fp32",
                kind,
            )
        )


def test_numbered_folders_keep_their_numbers_in_a_beton(
    imagenet_root, imagenet_checkpoint, tmp_path
):
    beton = tmp_path / "v2.beton"
    source = open_dataset(imagenet_root / FOLDERS["V2"])
    write_beton(source, beton, write_mode="raw", max_resolution=32)
    _, there = evaluate(imagenet_checkpoint, imagenet_root, tmp_path / "folder", "--dataset=v2")
    _, here = evaluate(imagenet_checkpoint, beton, tmp_path / "beton", "--dataset=v2")
    assert all(np.array_equal(there[kind], here[kind]) for kind in there)
    assert sorted(set(here["gt"].tolist())) == [2, 10, 100], "labels are the numbers of the folders"


def test_variants_of_v2_do_not_share_a_file(imagenet_root, imagenet_checkpoint, tmp_path):
    variant = tmp_path / "imagenetv2-threshold0.7-format-val"
    variant.symlink_to(imagenet_root / FOLDERS["V2"])
    files = [
        evaluate(imagenet_checkpoint, data, tmp_path, "--dataset=V2")[0]["arrays"]["gt"]
        for data in (imagenet_root, variant)
    ]
    assert files[0].startswith("V2_")
    assert files[1].startswith("V2-imagenetv2-threshold0.7-format-val_")


def test_a_beton_without_names_has_the_sets_own_labels(
    imagenet_root, imagenet_checkpoint, tmp_path
):
    beton = tmp_path / "a.beton"
    source = open_dataset(imagenet_root / FOLDERS["A"])
    write_beton(source, beton, write_mode="raw", max_resolution=32)
    Path(f"{beton}.json").unlink()
    _, arrays = evaluate(imagenet_checkpoint, beton, tmp_path, "--dataset=A")
    np.testing.assert_array_equal(arrays["gt"], source.labels)
    assert arrays["logits"].shape == (3, 9, 200), "logits are not [G, N, C]"
    v1, arrays = evaluate(imagenet_checkpoint, beton, tmp_path)
    assert v1["classes"] == arrays["logits"].shape[2] == 1000, "classes of V1"


def test_upstreams_names_and_shapes(imagenet_root, imagenet_checkpoint, tmp_path):
    data = imagenet_root / FOLDERS["Sketch"]  # the set's own folder
    results, arrays = evaluate(
        imagenet_checkpoint, data, tmp_path, "--dataset=sketch", "--upstream_names", "--tta"
    )
    stem = "mrl=True_efficient=False_dataset=sketch_tta=True"
    kinds = ("logits", "softmax", "predictions")
    assert results["arrays"] == {k: f"{stem}_{k}.pth" for k in kinds} | {
        "gt": "gt_dataset=sketch.pth"
    }
    assert arrays["predictions"].shape == (3, 9), "predictions are not [G, N]"
    baseline = build(ModelSpec("resnet10", 1000, (64,)))
    save_model(baseline, tmp_path / "ff.safetensors")
    results, arrays = evaluate(
        tmp_path / "ff.safetensors",
        imagenet_root,
        tmp_path,
        "--upstream_names",
        "--preprocessing=ffcv",
    )
    assert {kind: a.shape for kind, a in arrays.items()} == {
        "logits": (9, 1000),
        "softmax": (9, 1000),
        "predictions": (9,),
        "gt": (9,),
    }


@pytest.mark.slow
def test_ranks_save_what_one_process_saves(imagenet_root, imagenet_checkpoint, tmp_path):
    """Two gloo processes with global batches of 4: the second one has no part of the last batch,
    which has 1 image.
    """
    more = ["--dataset=R", f"--ood={imagenet_root / FOLDERS['Sketch']}"]
    results, alone = evaluate(imagenet_checkpoint, imagenet_root, tmp_path, *more)
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {
        "OMP_NUM_THREADS": "1"
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [
        ROOT / "inference" / "pytorch_inference.py",
        f"--path={imagenet_checkpoint}",
        f"--data-root={imagenet_root}",
    ]
    command += [
        *more,
        "--batch-size=2",
        "--device=cpu",
        "--workers=1",
        f"--output={tmp_path / 'two.json'}",
    ]
    command += [f"--save_{kind}" for kind in alone]
    for file in tmp_path.glob("*.npy"):
        file.unlink()
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    together = json.loads((tmp_path / "two.json").read_text())
    for kind, array in alone.items():
        np.testing.assert_allclose(np.load(tmp_path / together["arrays"][kind]), array, atol=1e-5)
    assert together["prefixes"] == {
        d: pytest.approx(row) for d, row in results["prefixes"].items()
    }, "accuracies of two ranks and of one"
    assert "auroc" in together["prefixes"]["8"]


# ---------------------------------------------------------------- preprocessing


@pytest.mark.parametrize(
    "size", [(500, 375), (375, 500), (256, 256), (224, 400), (64, 47), (301, 257)]
)
def test_upstreams_pixels_are_torchvisions(photo, size):
    picture = Image.fromarray(photo(*size))
    expected = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])(picture)
    np.testing.assert_array_equal(resize_and_crop(picture), np.asarray(expected))


def test_preprocessing_option(folder, tmp_path):
    torch.manual_seed(2)
    model = build(ModelSpec("resnet10", 3, (8, 512))).eval()
    model.preprocessing = Preprocessing(size=48, ratio=1.0)
    save_model(model, tmp_path / "m.safetensors")
    resize = transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    data = open_dataset(folder / "val")
    pictures = [Image.open(folder / "val" / data.name(i)).convert("RGB") for i in range(len(data))]
    with torch.inference_mode():
        expected = torch.cat([model(resize(picture)[None]) for picture in pictures], dim=1).numpy()
    _, upstream = evaluate(tmp_path / "m.safetensors", folder, tmp_path, "--preprocessing=upstream")
    np.testing.assert_allclose(upstream["logits"], expected, atol=1e-4)
    _, own = evaluate(tmp_path / "m.safetensors", folder, tmp_path)
    results, ffcv = evaluate(tmp_path / "m.safetensors", folder, tmp_path, "--preprocessing=ffcv")
    assert results["resolution"] == 48, "the checkpoint's size"
    assert not np.allclose(own["logits"], ffcv["logits"], atol=1e-3), (
        "--preprocessing has no effect"
    )
    model.preprocessing = Preprocessing(size=48)  # the ratio 224/256
    save_model(model, tmp_path / "m.safetensors")
    assert np.array_equal(
        evaluate(tmp_path / "m.safetensors", folder, tmp_path)[1]["logits"], ffcv["logits"]
    )


# ---------------------------------------------------------------- baselines


def test_torchvisions_model_is_a_baseline(imagenet_root, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.manual_seed(3)
    model = torchvision.models.resnet18().eval()
    url = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(model.state_dict(), tmp_path / "hub" / "checkpoints" / url.rsplit("/", 1)[1])
    results, arrays = evaluate(
        "torchvision:resnet18", imagenet_root, tmp_path, "--preprocessing=upstream", "--dataset=V2"
    )
    assert (results["head"], results["resolution"], list(results["prefixes"])) == (
        "ff512",
        224,
        ["512"],
    )
    file = imagenet_root / FOLDERS["V2"] / "10" / "0.png"  # sorted before 100 and 2
    shown_to_it = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms()(Image.open(file))
    with torch.inference_mode():
        np.testing.assert_allclose(arrays["logits"][0, 0], model(shown_to_it[None])[0], atol=1e-3)


def test_timms_model_is_a_baseline(imagenet_root, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    torch.manual_seed(3)
    model = timm.create_model("test_resnet").eval()
    cfg = model.pretrained_cfg
    place = tmp_path / f"models--timm--{cfg['architecture']}.{cfg['tag']}"
    (place / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40)
    save_file(model.state_dict(), place / "snapshots" / ("0" * 40) / "model.safetensors")
    results, arrays = evaluate("timm:test_resnet", imagenet_root, tmp_path, "--dataset=A")
    assert results["resolution"] == cfg["input_size"][-1], "timm's size"
    own = evaluate("timm:test_resnet", imagenet_root, tmp_path, "--preprocessing=upstream")[1]
    picture = resize_and_crop(
        Image.open(next(p for p in sorted((imagenet_root / "val").rglob("*.png"))))
    )
    image = (picture / 255 - cfg["mean"]) / np.array(cfg["std"])
    with torch.inference_mode():
        logits = model(torch.tensor(image.transpose(2, 0, 1)[None], dtype=torch.float32))[0]
    np.testing.assert_allclose(own["logits"][0, 0], logits, atol=1e-4)
    assert arrays["logits"].shape == (1, 9, 200), "logits are not [G, N, C]"


# ---------------------------------------------------------------- the lists, the mistakes


def test_the_lists_are_timms():
    lists = json.loads((ROOT / "matryoshka" / "data" / "imagenet.json").read_text())
    assert lists["1k"] == WNIDS == sorted(WNIDS)
    for name, indices in SUBSET.items():
        assert lists[name.lower()] == [WNIDS[i] for i in indices]
    assert "Apache-2.0" in lists["source"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--dataset=V3"], ["--dataset V3", "V1, V2, A, R, Sketch, O"]),
        (["--dataset=O"], ["--data-root", "imagenet-o/"]),
        (["--ood={root}/nowhere"], ["nowhere", "no such"]),
        (["--nesting-list=8,16"], ["nesting list", "no classifier for 16", "8, 64, 512"]),
        (["--nesting-list=64,8"], ["nesting list", "increasing"]),
        (["--nesting-list=few"], ["--nesting-list few", "expected int,..."]),
        (["--old_ckpt"], ["old style", "drop old_ckpt"]),
        (["--path=torchvision:resnet50", "--old_ckpt"], ["takes no old_ckpt", "baseline"]),
        (
            ["--dataset=A", "--data-root={root}/sketch"],
            ["sketch", "not a class of A", "imagenet-a"],
        ),
        (["--dataset=Sketch", "--data-root={root}/" + FOLDERS["V2"]], ["not a class of Sketch"]),
        (
            ["--dataset=V2", "--data-root={other}"],
            ["imagenetv2-threshold0.7-format-val", "imagenetv2-top-images"],
        ),
        (["--dataset=R", "--path={small}"], ["--dataset R", "1000 classes", "has 3"]),
        (["--dataset=R", "--path={named}"], ["--dataset R", "not ImageNet-1K's", "'c0'"]),
        (["--upstream_names"], ["--upstream_names", "--save_"]),
        (["--path=torchvision:resnet51"], ["torchvision:resnet51", "resnet50"]),
        (["--path=torchvision:resnet50.V9"], ["no such weights", "IMAGENET1K_V2"]),
        (["--path=torchvision:resnet50", "--mrl"], ["takes no mrl", "baseline"]),
        (["--path=timm:resnet5000"], ["timm:resnet5000", "no such weights"]),
        (["--path=timm:test_vit"], ["timm:test_vit", "cannot load"]),
    ],
)
def test_mistakes_are_one_line(
    imagenet_root, imagenet_checkpoint, tmp_path, *, monkeypatch, capsys, argv, words
):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for variant in ("threshold0.7-format-val", "top-images-format-val"):
        (tmp_path / "other" / f"imagenetv2-{variant}").mkdir(parents=True)
    save_model(build(ModelSpec("resnet10", 3, (8,))), tmp_path / "small.safetensors")
    named = build(ModelSpec("resnet10", 1000, (8,)))
    named.classes = [f"c{i}" for i in range(1000)]
    save_model(named, tmp_path / "named.safetensors")
    places = {
        "root": imagenet_root,
        "other": tmp_path / "other",
        "small": tmp_path / "small.safetensors",
        "named": tmp_path / "named.safetensors",
    }
    given = [word.format(**places) for word in argv]
    line = refused(
        [f"--path={imagenet_checkpoint}", f"--data-root={imagenet_root}", *given], capsys
    )
    assert line.startswith("error: ")
    assert all(word in line for word in words), line


def test_weights_that_cannot_be_loaded_are_one_line(imagenet_root, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(
        torch.hub,
        "download_url_to_file",
        lambda *a, **k: (_ for _ in ()).throw(OSError("no network")),
    )
    line = refused(["--path=torchvision:resnet18", f"--data-root={imagenet_root}"], capsys)
    assert "torchvision:resnet18: cannot load the weights: no network" in line
