"""Upstream's --retrieval: file names, shapes, labels that are class indices, and features equal to
those of single images.
"""

import numpy as np
import pytest
from imagenet_small import FOLDERS, WNIDS, refused
from matryoshka.inference import pytorch_inference
from oracles import one_by_one
from PIL import Image

from matryoshka.checkpoint.model_file import load_model, save_model
from matryoshka.config import ConfigError
from matryoshka.data import ImageFolder, write_beton
from matryoshka.data.augment import Preprocessing
from matryoshka.evaluation import retrieval_arrays
from matryoshka.evaluation.options import eval_parser
from matryoshka.evaluation.saved_arrays import write_array
from matryoshka.models import ModelSpec, build


class Killed(Exception):
    """Ends a run as a kill does: no handler of the program catches it."""


def arguments(path, root, prefix, *more):
    """Options of pytorch_inference.py; later ones win."""
    return [
        "--retrieval",
        f"--path={path}",
        f"--data-root={root}",
        f"--retrieval_array_path={prefix}",
        "--dataset=1K",
        "--workers=1",
        "--batch-size=4",
        "--device=cpu",
        *more,
    ]


def retrieval(argv):
    assert pytorch_inference.main(argv) == 0


@pytest.fixture(scope="module")
def root(tmp_path_factory, imagenet_root, photo):
    """train, val and V2 with folders of the classes 0, 7 and 999; 2, 10 and 100."""
    place = tmp_path_factory.mktemp("imagenet1k")
    for name in ("val", FOLDERS["V2"]):
        (place / name).symlink_to(imagenet_root / name)
    for label in (0, 7, 999):
        (place / "train" / WNIDS[label]).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(photo(32, 32, seed=5000 + label + i)).save(
                place / "train" / WNIDS[label] / f"{i}.png"
            )
    return place


def arrays(prefix):
    found = [np.load(f"{prefix}-{kind}.npy", allow_pickle=False) for kind in "Xy"]
    assert [a.dtype for a in found] == [np.float32, np.int64]
    assert found[1].shape == (len(found[0]), 1), "labels are not [N, 1]"
    return found[0], found[1][:, 0]


def test_queries_and_database_of_1k_are_those_of_single_images(
    root, imagenet_checkpoint, tmp_path, capsys
):
    args = arguments(imagenet_checkpoint, root, f"{tmp_path}/run1_", "--mrl")
    retrieval(args)
    model = load_model(imagenet_checkpoint)
    for split, labels in (
        ("val", [0] * 3 + [7] * 2 + [999] * 4),
        ("train", [0] * 4 + [7] * 4 + [999] * 4),
    ):
        X, y = arrays(f"{tmp_path}/run1_1K_{split}_mrl1_e0_ff512")
        np.testing.assert_allclose(X, one_by_one(model, root / split)[0], atol=1e-4)
        assert y.tolist() == labels, f"labels of {split}"
    files = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    kinds = ("X.npy", "y.npy", "meta.json")
    assert sorted(files) == sorted(
        f"run1_1K_{s}_mrl1_e0_ff512-{kind}" for s in ("val", "train") for kind in kinds
    )
    retrieval(args)  # again: nothing is computed again
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == files
    (tmp_path / "run1_1K_val_mrl1_e0_ff512-y.npy").unlink()
    capsys.readouterr()
    retrieval(args)  # what is missing is
    assert capsys.readouterr().out.count("images/s") == 1, "only the incomplete split is computed"
    assert (
        arrays(f"{tmp_path}/run1_1K_val_mrl1_e0_ff512")[1].tolist() == [0] * 3 + [7] * 2 + [999] * 4
    )


def test_v2s_labels_are_the_numbers_of_its_folders(root, imagenet_checkpoint, tmp_path):
    retrieval(arguments(imagenet_checkpoint, root, f"{tmp_path}/", "--dataset=V2"))
    assert (
        arrays(f"{tmp_path}/V2_val_mrl1_e0_ff512")[1].tolist() == [10] * 2 + [100] * 4 + [2] * 3
    )  # "10" sorts first
    assert len(list(tmp_path.iterdir())) == 3, "V2 has no database"


def test_4k_a_fixed_feature_and_a_random_sample(root, tmp_path):
    place = tmp_path / "4k"
    place.mkdir()
    for name, split in (("imagenet4k_queries", "val"), ("imagenet4k_database", "train")):
        write_beton(
            ImageFolder(root / split), place / f"{name}.beton", write_mode="raw", max_resolution=32
        )
    model = build(ModelSpec("resnet10", 3, (16,)))
    model.preprocessing = Preprocessing(32, 1.0)
    save_model(model, tmp_path / "ff.safetensors")
    args = arguments(
        tmp_path / "ff.safetensors",
        place,
        f"{tmp_path}/",
        "--dataset=4K",
        "--rep_size=16",
        "--random_sample_dim=10",
    )
    retrieval(args)
    features, labels, _ = one_by_one(model.eval(), root / "train")
    X, y = arrays(f"{tmp_path}/4K_train_mrl0_e0_ff16")
    assert X.shape == (10, 16), "10 sampled images of 16 columns"
    picked = [int(np.abs(features[:, :16] - row).sum(1).argmin()) for row in X]
    assert picked == sorted(set(picked)), "the sample repeats an image"
    np.testing.assert_allclose(X, features[picked, :16], atol=1e-4)
    assert y.tolist() == labels[picked].tolist(), "labels of the sample"
    assert arrays(f"{tmp_path}/4K_val_mrl0_e0_ff16")[0].shape == (
        9,
        16,
    )  # there are fewer: all of them


def test_a_kill_between_the_files_leaves_no_old_description(
    root, imagenet_checkpoint, tmp_path, monkeypatch
):
    """The kill comes when y of another sample is written, but X and meta.json are not."""
    stem = f"{tmp_path}/1K_val_mrl1_e0_ff512"
    three, five = (
        arguments(imagenet_checkpoint, root, f"{tmp_path}/", f"--random_sample_dim={n}")
        for n in (3, 5)
    )
    retrieval(three)
    before = arrays(stem)

    def killed(*array):
        write_array(*array)
        raise Killed

    monkeypatch.setattr(retrieval_arrays, "write_array", killed)
    with pytest.raises(Killed):
        retrieval(five)
    monkeypatch.undo()
    assert len(np.load(f"{stem}-y.npy")) == 5, "the labels of the killed run"
    retrieval(three)
    assert all(np.array_equal(new, old) for new, old in zip(arrays(stem), before, strict=True))
    retrieval(five)
    assert len(arrays(stem)[0]) == 5, "rows of the last run"
    assert not list(tmp_path.glob("*-embeddings"))


def test_a_kill_before_the_arrays_are_published_computes_nothing_again(
    root, imagenet_checkpoint, tmp_path, monkeypatch, capsys
):
    args = arguments(imagenet_checkpoint, root, f"{tmp_path}/", "--dataset=V2")
    folder = tmp_path / "V2_val_mrl1_e0_ff512-embeddings"

    def killed(_):
        raise Killed

    monkeypatch.setattr(retrieval_arrays, "publish", killed)
    with pytest.raises(Killed):
        retrieval(args)
    monkeypatch.undo()
    made = np.load(folder / "X.npy")
    capsys.readouterr()
    retrieval(args)
    assert "images/s" not in capsys.readouterr().out
    assert np.array_equal(arrays(f"{tmp_path}/V2_val_mrl1_e0_ff512")[0], made)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--dataset=V1"], ["--dataset V1", "1K, V2, 4K"]),
        (["--dataset=4K"], ["imagenet4k_queries.beton"]),
        (["--tta"], ["--tta"]),
        (["--nesting-list=8"], ["--nesting-list"]),
        (["--random_sample_dim=0"], ["--random_sample_dim", "0"]),
        (
            ["--retrieval_array_path=/nowhere/at/all/"],
            ["--retrieval_array_path", "/nowhere/at/all does not exist"],
        ),
        (["--batch-size=0"], ["--batch-size"]),
        (["--resolution=64", "--preprocessing=upstream"], ["--resolution 64"]),
    ],
)
def test_mistakes_name_the_option(root, imagenet_checkpoint, tmp_path, capsys, *, more, words):
    line = refused(arguments(imagenet_checkpoint, root, f"{tmp_path}/", *more), capsys)
    assert all(word in line for word in words), line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--random_sample_dim", "--batch-size"])
def test_numbers_out_of_range_are_refused_by_the_parser(option):
    with pytest.raises(ConfigError, match=f"^{option} 0: expected 1 "):
        eval_parser().parse_args(["--path=x", "--retrieval", f"{option}=0"])
