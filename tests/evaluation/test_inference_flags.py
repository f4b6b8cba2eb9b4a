"""Evaluation: out-of-distribution images, selected prefixes and upstream's checkpoints, compared
with loops and with our own format.
"""

import json

import numpy as np
import pytest
import torch
from imagenet_small import ROOT, WNIDS, evaluate, refused
from PIL import Image

from matryoshka.checkpoint.model_file import load_model, save_model
from matryoshka.data.augment import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from matryoshka.models import ModelSpec, build

# ---------------------------------------------------------------- unknown classes


def by_pairs(inside, outside):
    """(AUROC, AUPR, FPR95) of confidences, in percent, by counting."""
    pairs = [(1 if b < a else 0.5 if a == b else 0) for a in inside for b in outside]
    points = []  # (recall of the unknown, precision, known ones lost) at every threshold
    for t in sorted({*inside, *outside}):
        found, lost = sum(c <= t for c in outside), sum(c <= t for c in inside)
        points.append((found / len(outside), found / (found + lost), lost / len(inside)))
    area = sum(
        (r - before) * p
        for (r, p, _), (before, _, _) in zip(points, [(0, 0, 0), *points[:-1]], strict=True)
    )
    return (
        100 * sum(pairs) / len(pairs),
        100 * area,
        100 * min(lost for r, _, lost in points if r >= 0.95),
    )


def test_unknown_classes_are_detected_by_confidence(
    imagenet_root, imagenet_checkpoint, tmp_path, photo, capsys
):
    """ImageNet-O: V1's images of its 200 classes against its own, both over these classes."""
    listed = json.loads((ROOT / "matryoshka" / "data" / "imagenet.json").read_text())["o"]
    columns = [WNIDS.index(wnid) for wnid in listed]
    inside = [columns[0], columns[7], 7, columns[199], 999]
    for folder, classes in (("val", inside), ("imagenet-o", [3, columns[5]])):
        for c in classes:
            (tmp_path / folder / WNIDS[c]).mkdir(parents=True)
            for i in range(3):
                Image.fromarray(photo(32, 32, seed=50 * c + i)).save(
                    tmp_path / folder / WNIDS[c] / f"{i}.png"
                )
    assert 7 not in columns
    assert 999 not in columns
    results, arrays = evaluate(imagenet_checkpoint, tmp_path, tmp_path / "o", "--dataset=o")
    assert (results["images"], results["ood_images"], results["classes"]) == (9, 6, 200), (
        "images, OOD images, classes"
    )
    assert sorted(set(arrays["gt"].tolist())) == sorted(
        columns.index(c) for c in inside if c in columns
    )

    model, confidence = load_model(imagenet_checkpoint), {}
    for folder in ("val", "imagenet-o"):
        rows = []
        for file in sorted((tmp_path / folder).rglob("*.png")):
            if folder == "val" and WNIDS.index(file.parent.name) not in columns:
                continue
            pixels = (np.asarray(Image.open(file)) / 255 - IMAGENET_MEAN) / IMAGENET_STD
            with torch.inference_mode():
                logits = model(torch.tensor(pixels.transpose(2, 0, 1)[None], dtype=torch.float32))[
                    :, 0, columns
                ]
            rows.append(logits.softmax(1).amax(1))
        confidence[folder] = torch.stack(rows, 1).numpy()
    for g, row in enumerate(results["prefixes"].values()):
        expected = by_pairs(confidence["val"][g], confidence["imagenet-o"][g])
        assert (row["auroc"], row["aupr"], row["fpr95"]) == pytest.approx(expected), (
            "AUROC, AUPR, FPR95"
        )
    assert "AUROC" in capsys.readouterr().out
    beside, _ = evaluate(
        imagenet_checkpoint, imagenet_root, tmp_path / "ood", f"--ood={tmp_path / 'imagenet-o'}"
    )
    assert set(beside["prefixes"]["8"]) == {"top1", "top5", "auroc", "aupr", "fpr95"}


def test_a_validation_set_without_these_classes(imagenet_checkpoint, tmp_path, photo, capsys):
    for folder in ("val", "imagenet-o"):
        (tmp_path / folder / WNIDS[999]).mkdir(parents=True)
        Image.fromarray(photo(32, 32)).save(tmp_path / folder / WNIDS[999] / "0.png")
    line = refused(
        [f"--path={imagenet_checkpoint}", f"--data-root={tmp_path}", "--dataset=O"], capsys
    )
    assert "no images of these classes" in line


@pytest.fixture
def diverged(tmp_path):
    """A model whose second prefix has NaN logits."""
    model = build(ModelSpec("resnet10", 1000, (8, 64)))
    model.preprocessing = Preprocessing(size=32, ratio=1.0)
    with torch.no_grad():
        model.head.heads[1].bias[5] = np.nan
    save_model(model, tmp_path / "nan.safetensors")
    return tmp_path / "nan.safetensors"


def test_a_model_that_diverged_is_noticed(imagenet_root, diverged, tmp_path, capsys):
    results, _ = evaluate(diverged, imagenet_root, tmp_path / "nan")
    assert results["not_finite"] == 9, "every image has NaN logits"
    assert "note: 9 images have logits that are not finite" in capsys.readouterr().out
    line = refused(
        [f"--path={diverged}", f"--data-root={imagenet_root}", f"--ood={imagenet_root / 'sketch'}"],
        capsys,
    )
    assert "not finite" in line


def test_a_subset_is_cut_out_also_where_class_names_are_equal(imagenet_root, tmp_path, capsys):
    """A data set with the model's own 1000 names is V1, also if another one was named."""
    model = build(ModelSpec("resnet10", 3, (8,)))
    model.classes = sorted(p.name for p in (imagenet_root / "imagenet-a").iterdir())
    save_model(model, tmp_path / "m.safetensors")
    line = refused(
        [f"--path={tmp_path / 'm.safetensors'}", f"--data-root={imagenet_root}", "--dataset=A"],
        capsys,
    )
    assert "needs a model of 1000 classes" in line


def test_another_resolution(imagenet_root, imagenet_checkpoint, tmp_path, capsys):
    results, arrays = evaluate(imagenet_checkpoint, imagenet_root, tmp_path, "--resolution=64")
    assert results["resolution"] == 64, "--resolution"
    assert "checkpoint64" in results["arrays"]["logits"]
    _, own = evaluate(imagenet_checkpoint, imagenet_root, tmp_path / "own")
    assert not np.allclose(arrays["logits"], own["logits"], atol=1e-3), (
        "the resolution has no effect"
    )
    both = ["--resolution=64", "--preprocessing=upstream"]
    line = refused([f"--path={imagenet_checkpoint}", f"--data-root={imagenet_root}", *both], capsys)
    assert "--resolution 64" in line


# ---------------------------------------------------------------- prefixes, upstream's checkpoints


@pytest.mark.parametrize("efficient", [False, True])
def test_selected_prefixes(imagenet_root, tmp_path, efficient):
    torch.manual_seed(4)
    model = build(ModelSpec("resnet10", 1000, (8, 64, 512), efficient))
    model.preprocessing = Preprocessing(size=32, ratio=1.0)
    save_model(model, tmp_path / "m.safetensors")
    _, whole = evaluate(tmp_path / "m.safetensors", imagenet_root, tmp_path / "all")
    results, some = evaluate(
        tmp_path / "m.safetensors", imagenet_root, tmp_path / "some", "--nesting-list=8,512"
    )
    assert results["dims"] == [8, 512]
    np.testing.assert_allclose(some["logits"], whole["logits"][[0, 2]], atol=1e-5)
    if efficient:  # the slices of one classifier may have any length
        results, one = evaluate(
            tmp_path / "m.safetensors", imagenet_root, tmp_path / "one", "--nesting-list=24"
        )
        assert (results["head"], results["dims"]) == ("mrl-e", [24])
        weight, bias = model.head.heads[0].weight[:, :24], model.head.heads[0].bias
        file = sorted((imagenet_root / "val").rglob("*.png"))[0]
        pixels = (np.asarray(Image.open(file)) / 255 - IMAGENET_MEAN) / IMAGENET_STD
        with torch.inference_mode():
            image = torch.tensor(pixels.transpose(2, 0, 1)[None], dtype=torch.float32)
            logits = model.eval().features(image)[0, :24] @ weight.T + bias
        np.testing.assert_allclose(one["logits"][0, 0], logits, atol=1e-4)


def test_every_format_of_upstream_has_the_same_logits(imagenet_root, tmp_path, capsys):
    """With and without DDP's prefix, keys of the first and of later releases, fixed features."""
    torch.manual_seed(5)
    for spec, flags in (
        (ModelSpec("resnet10", 1000, (8, 64, 512)), ["--mrl"]),
        (
            ModelSpec("resnet10", 1000, (8, 16, 32, 64, 128, 256, 512), True),
            ["--mrl", "--efficient"],
        ),
        (ModelSpec("resnet10", 1000, (512,)), []),
        (ModelSpec("resnet10", 1000, (64,)), ["--rep_size=64"]),
    ):
        model = build(spec)
        save_model(model, tmp_path / "ours.safetensors")
        _, ours = evaluate(tmp_path / "ours.safetensors", imagenet_root, tmp_path / "ours")
        nested = len(spec.dims) > 1
        for prefix in ("", "module."):
            for old in (False, True):
                state = {}
                for key, value in model.state_dict().items():
                    i = key.split(".")[2] if key.startswith("head") else ""
                    new = (
                        f"fc.nesting_classifier_{i}."
                        if nested and not (old and spec.efficient)
                        else "fc."
                    )
                    leaf = key.rpartition(".")[2]
                    state[prefix + (new + leaf if i else key.removeprefix("trunk."))] = value
                torch.save(state, tmp_path / "final_weights.pt")
                more = [*flags, *(["--old_ckpt"] if old else [])]
                results, arrays = evaluate(
                    tmp_path / "final_weights.pt", imagenet_root, tmp_path / "pt", *more
                )
                np.testing.assert_array_equal(arrays["logits"], ours["logits"])
                assert results["head"] == spec.head_name
        if spec.efficient:
            capsys.readouterr()
            evaluate(
                tmp_path / "final_weights.pt",
                imagenet_root,
                tmp_path / "pt",
                "--nesting-list=8,512",
                *flags,
            )
            assert "note" not in capsys.readouterr().out.replace("note: only 3 of the 1000", "")
        if spec.dims == (512,):  # as an old MRL-E file would look
            evaluate(tmp_path / "final_weights.pt", imagenet_root, tmp_path / "pt")
            assert "old-style MRL-E file has the same keys" in capsys.readouterr().out
    line = refused(
        [f"--path={tmp_path / 'final_weights.pt'}", f"--data-root={imagenet_root}", "--mrl"], capsys
    )
    assert "mrl was requested" in line
