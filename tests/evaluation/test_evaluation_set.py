"""`eval --dataset`: public sets by name, folders in their place, and models behind links."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from matryoshka.inference import pytorch_inference
from sklearn.datasets import load_digits
from training_commands import refused

from matryoshka import json_files
from matryoshka.config import ConfigError
from matryoshka.data import open_dataset
from matryoshka.evaluation.evaluation_set import find_images
from matryoshka.evaluation.run_images import check_same_images


def options(dataset="V1", root=None, split=None, cache=None):
    root = None if root is None else str(root)
    return SimpleNamespace(dataset=dataset, data_root=root, split=split, cache=cache)


def test_a_public_set_is_written_to_the_cache(tmp_path):
    name, path = find_images(options("Digits", cache=str(tmp_path)))
    assert name == "digits"
    assert path.parent == tmp_path
    _, train = find_images(options("digits", split="train", cache=str(tmp_path)))
    labels = np.concatenate([open_dataset(train).labels, open_dataset(path).labels])
    assert sorted(labels) == sorted(load_digits().target)


def test_a_folder_stands_in_for_a_download(tmp_path):
    for part in ("train", "test", "val"):
        (tmp_path / part).mkdir()
    assert find_images(options("cifar10", tmp_path)) == ("cifar10", tmp_path / "test")
    assert find_images(options("cifar10", tmp_path, split="val"))[1] == tmp_path / "val"
    assert find_images(options("cifar10", tmp_path, split="train"))[1] == tmp_path / "train"
    assert find_images(options("cifar100", tmp_path / "val"))[1] == tmp_path / "val"
    (tmp_path / "val").rmdir()
    assert find_images(options("tiny-imagenet", tmp_path, split="val"))[1] == tmp_path / "test"


def test_own_images_may_have_parts(tmp_path):
    (tmp_path / "test").mkdir()
    assert find_images(options(root=tmp_path)) == ("V1", tmp_path), "`test` may be a class"
    (tmp_path / "train").mkdir()
    assert find_images(options(root=tmp_path)) == ("V1", tmp_path / "test")
    (tmp_path / "val").mkdir()
    assert find_images(options(root=tmp_path)) == ("V1", tmp_path / "val")


def test_a_class_may_have_the_name_of_a_part(tmp_path):
    (tmp_path / "train").mkdir()  # a class of CIFAR-100
    (tmp_path / "tree").mkdir()
    assert find_images(options("cifar100", tmp_path))[1] == tmp_path


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (options("cifar11"), "did you mean 'cifar10'?"),
        (options("V2", split="test"), "--split is for public data sets"),
        (options("A", cache="data"), "--cache is for public data sets"),
        (options("cifar10", root="x", cache="data"), "drop one of the two"),
    ],
)
def test_mistakes_are_one_line(given, text):
    with pytest.raises(ConfigError) as error:
        find_images(given)
    assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_eval_on_a_link_of_another_name(small_nested, digits, tmp_path, capsys):
    """checkpoint/NAME-ckpt.t7 is a link to a training checkpoint."""
    (link,) = (small_nested / "checkpoint").glob("*.t7")
    (model,) = (small_nested / "runs").glob("*/*/model.safetensors")
    found = []
    for number, path in enumerate((link, model)):
        output = tmp_path / f"{number}.json"
        words = [f"--path={path}", f"--data-root={digits['val']}", f"--output={output}"]
        assert pytorch_inference.main([*words, "--dataset=cifar10", "--workers=1"]) == 0
        found.append(json.loads(output.read_text()))
    assert found[0]["prefixes"] == found[1]["prefixes"]
    assert found[0]["dataset"] == "cifar10"
    assert "cifar10, 100 images at 32 px" in capsys.readouterr().out

    copy = tmp_path / "copy.t7"
    shutil.copy(link, copy)
    words = [f"--path={copy}", f"--data-root={digits['val']}", "--workers=1"]
    assert pytorch_inference.main(words) == 0

    pickle = tmp_path / "old.t7"
    pickle.write_bytes(b"not a checkpoint")
    line = refused(
        pytorch_inference.main, [f"--path={pickle}", f"--data-root={digits['val']}"], capsys
    )
    assert "not a checkpoint of plain tensors" in line


@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_run_knows_its_own_images(split, small_nested, tmp_path, capsys):
    """The numbers of results.json are found again, without a word on where the images are."""
    (model,) = (small_nested / "runs").glob("*/*/model.safetensors")
    output = tmp_path / "results.json"
    words = [f"--path={model}", f"--split={split}", f"--output={output}", "--workers=1"]
    assert pytorch_inference.main(words) == 0
    found = json.loads(output.read_text())
    told = json.loads((model.parent / "results.json").read_text())[split]
    images = {"test": 100, "validation": 40}[split]
    assert found["images"] == images
    assert {d: row["top1"] for d, row in found["prefixes"].items()} == pytest.approx(told["top_1"])
    assert f": {split}, {images} images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({}, "has the parts test and validation"),
        ({"cifar.val_share": 0}, "kept no image for validation"),
        ({"cifar.select_on_test": 1}, "chose its epoch on the test set"),
        ({"data.train_dataset": "gone.beton"}, "gone.beton: images of "),
    ],
)
def test_parts_that_a_run_does_not_have(change, text, small_nested, tmp_path, capsys):
    (model,) = (small_nested / "runs").glob("*/*/model.safetensors")
    params, _ = json_files.decode((model.parent / "params.json").read_bytes())
    shutil.copy(model, tmp_path / "copy.safetensors")
    (tmp_path / "params.json").write_text(json.dumps(params | change))
    split = "validation" if change else "tset"
    words = [f"--path={tmp_path / 'copy.safetensors'}", f"--split={split}"]
    line = refused(pytorch_inference.main, words, capsys)
    assert text in line
    assert "--cache: the images are those of" in refused(
        pytorch_inference.main, [*words, "--cache=data"], capsys
    )


@pytest.mark.parametrize(
    ("change", "split", "is_same"),
    [
        ({}, "validation", True),
        ({"training.seed": 1}, "test", True),
        ({"training.seed": 1}, "validation", False),
        ({"data.val_dataset": "other.beton"}, "test", False),
    ],
)
def test_models_are_compared_on_images_that_none_has_seen(
    change, split, is_same, small_nested, tmp_path
):
    (model,) = (small_nested / "runs").glob("*/*/model.safetensors")
    params, _ = json_files.decode((model.parent / "params.json").read_bytes())
    (tmp_path / "params.json").write_text(json.dumps(params | change))
    shutil.copy(model, tmp_path)
    other = str(tmp_path / model.name)
    if is_same:
        check_same_images(str(model), other, split)
        return
    with pytest.raises(ConfigError, match="are of runs with different images"):
        check_same_images(str(model), other, split)


def test_a_path_is_a_data_set(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    assert find_images(options(str(tmp_path))) == ("V1", tmp_path / "test")
    assert find_images(options(str(tmp_path), split="train")) == ("V1", tmp_path / "train")
    for other in (options(str(tmp_path), root=tmp_path), options(str(tmp_path), cache="x")):
        with pytest.raises(ConfigError, match="names the images itself; drop --"):
            find_images(other)
