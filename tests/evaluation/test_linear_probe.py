"""The linear-probe program: from a frozen checkpoint to a model with nested heads."""

import json
import shutil

import pytest
import torch
from matryoshka.inference import pytorch_inference
from matryoshka.train import linear_probe
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from matryoshka.checkpoint.model_file import load_model, save_model
from matryoshka.data import CenterCrop, Loader
from matryoshka.data.augment import Preprocessing, normalise
from matryoshka.evaluation.predict import extract_features
from matryoshka.models import ModelSpec, build


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    """An FF checkpoint; its random weights suffice for digits."""
    torch.manual_seed(0)
    model = build(ModelSpec("resnet10", 7, (512,)))
    model.preprocessing = Preprocessing(size=32, ratio=1.0)
    path = tmp_path_factory.mktemp("ff") / "model.safetensors"
    save_model(model, path)
    return path


def test_features_come_in_the_data_sets_order(frozen, digits):
    model = load_model(frozen)
    shuffled = Loader(digits["val"], 32, order="random", crop=CenterCrop(32, 1.0))
    features, labels = extract_features(model, shuffled, 100)
    assert (features.dtype, labels.dtype, tuple(features.shape)) == (
        torch.float32,
        torch.int64,
        (100, 512),
    )
    for batch in Loader(digits["val"], 1, order="sequential", crop=CenterCrop(32, 1.0)):
        with torch.inference_mode():
            expected = model.features(normalise(batch.images))[0]
        torch.testing.assert_close(features[batch.index[0]], expected, atol=1e-4, rtol=1e-4)
        assert labels[batch.index[0]] == batch.labels[0], (
            "labels are not in the order of the data set"
        )
    with pytest.raises(ValueError, match="1 of 101 images are missing, the first is 100"):
        extract_features(model, shuffled, 101)


# ---------------------------------------------------------------- the program


def options(path, data, folder, run_id, *more):
    return [
        f"--model.path={path}",
        f"--data.train_dataset={data['train']}",
        f"--data.val_dataset={data['val']}",
        f"--logging.folder={folder}",
        f"--logging.run_id={run_id}",
        "--model.device=cpu",
        "--data.num_workers=1",
        *more,
    ]


@pytest.mark.parametrize("efficient", [0, 1])
def test_a_backbone_gets_nested_heads(frozen, digits, tmp_path, capsys, efficient):
    more = [
        "--model.dims=8,64,512",
        f"--model.efficient={efficient}",
        "--probe.weight_decay=1e-3,1e-2",
    ]
    assert linear_probe.main(options(frozen, digits, tmp_path, "run", *more)) == 0
    shown = capsys.readouterr().out
    run = tmp_path / "run"
    assert {p.name for p in run.iterdir()} == {
        "params.json",
        "config.yaml",
        "results.json",
        "model.safetensors",
    }
    model, before = load_model(run / "model.safetensors"), load_model(frozen)
    assert model.spec == ModelSpec("resnet10", 10, (8, 64, 512), bool(efficient))
    assert (model.preprocessing, model.classes) == (
        before.preprocessing,
        [str(i) for i in range(10)],
    )
    trunk = before.trunk.state_dict()
    assert all(torch.equal(value, trunk[key]) for key, value in model.trunk.state_dict().items()), (
        "the trunk is not frozen"
    )

    results = json.loads((run / "results.json").read_text())
    pytorch_inference.main(
        [
            f"--path={run / 'model.safetensors'}",
            f"--data-root={digits['val']}",
            f"--output={tmp_path / 'e.json'}",
        ]
    )
    evaluated = json.loads((tmp_path / "e.json").read_text())["prefixes"]
    for d, row in results["prefixes"].items():
        # other batches round differently: one of 100 images may be a tie
        assert row["top1"] == pytest.approx(evaluated[d]["top1"], abs=1.01), (
            f"prefix {d}: eval gives another accuracy"
        )
        assert row["converged"]
        assert row["weight_decay"] in (1e-3, 1e-2), f"prefix {d}: the decay is not a candidate"
        line = next(line for line in shown.splitlines() if line.split()[:1] == [d])
        assert f"{row['top1']:.2f}" in line
        assert line.endswith("yes")
    assert results["prefixes"]["512"]["top1"] > 60, "the probe has not learned the digits"
    assert set(results["held_out_top1"]) == {"0.001", "0.01"}
    assert (results["n_train"], results["n_val"], results["head"]) == (
        400,
        100,
        "mrl-e" if efficient else "mrl",
    )
    assert set(results["seconds"]) == {"features_train", "features_val", "fit"}
    assert json.loads((run / "params.json").read_text())["model.efficient"] == efficient


def test_the_program_fits_scikit_learns_model(frozen, digits, tmp_path):
    more = ["--model.dims=16", "--probe.weight_decay=1e-2", "--probe.tolerance=1e-7"]
    linear_probe.main(options(frozen, digits, tmp_path, "run", *more))
    model = load_model(frozen)
    sets = {}
    for split in ("train", "val"):
        loader = Loader(digits[split], 64, order="sequential", crop=CenterCrop(32, 1.0))
        features, labels = extract_features(model, loader, len(loader.dataset))
        sets[split] = features[:, :16].double().numpy(), labels.numpy()
    scaler = StandardScaler().fit(sets["train"][0])
    oracle = LogisticRegression(C=1 / (400 * 1e-2), tol=1e-9, max_iter=5000)
    oracle.fit(scaler.transform(sets["train"][0]), sets["train"][1])
    score = oracle.score(scaler.transform(sets["val"][0]), sets["val"][1])
    row = json.loads((tmp_path / "run" / "results.json").read_text())["prefixes"]["16"]
    # one of 100 images may be a tie
    assert row["top1"] == pytest.approx(100 * score, abs=1.01), "accuracy differs from scikit-learn"


def test_missing_convergence_is_reported(frozen, digits, tmp_path, capsys):
    more = [
        "--model.nesting_start=8",
        "--probe.solver=sgd",
        "--probe.epochs=1",
        "--probe.weight_decay=0",
    ]
    linear_probe.main(
        options(frozen, digits, tmp_path, "sgd", *more, "--probe.lr=0.01", "--probe.batch_size=50")
    )
    results = json.loads((tmp_path / "sgd" / "results.json").read_text())
    assert {d: (row["converged"], row["iterations"]) for d, row in results["prefixes"].items()} == {
        "256": (False, 8),
        "512": (False, 8),
    }
    assert "raise probe.epochs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--model.dims=8,1024"], ["model.dims", "beyond the feature width 512"]),
        (["--model.dims=8,8"], ["model.dims", "strictly increasing"]),
        (["--model.nesting_start=10"], ["model.nesting_start=10", "512"]),
        (["--model.path={tmp}/none.safetensors"], ["none.safetensors", "no such checkpoint"]),
        (["--model.path=torchvision:resnet51"], ["model.path torchvision:resnet51", "resnet50"]),
        (["--data.val_dataset={folder}/val"], ["val", "classes"]),
        (["--data.train_dataset={tmp}/none.beton"], ["none.beton", "no such file"]),
        (
            ["--data.train_dataset={tmp}/single", "--data.val_dataset={tmp}/single"],
            ["single", "only one class"],
        ),
        (["--probe.solver=newton"], ["probe.solver", "lbfgs, sgd"]),
        (["--probe.weight_decay=-1"], ["probe.weight_decay", "0 to 1e+09"]),
        (["--probe.weight_decay="], ["probe.weight_decay", "0 to 1e+09"]),
        (["--probe.lr=0"], ["probe.lr=0"]),
        (["--probe.epochs=0"], ["probe.epochs=0"]),
        (["--probe.tolerance=-1"], ["probe.tolerance=-1: expected more than 0"]),
        (["--probe.tolerance=0"], ["probe.tolerance=0: expected more than 0"]),
        (["--probe.seed=-1"], ["probe.seed=-1: expected 0 to"]),
        ([f"--probe.seed={2**63}"], [f"probe.seed={2**63}: expected 0 to {2**63 - 1}"]),
        (["--data.num_workers=1025"], ["data.num_workers=1025: expected 0 to 1024"]),
        (["--data.batch_size=0"], ["data.batch_size=0"]),
        (["--logging.run_id=taken"], ["taken", "--logging.run_id"]),
        (["--model.dimensions=8"], ["unknown option", "model.dimensions"]),
    ],
)
def test_mistakes_are_one_line(frozen, digits, folder, tmp_path, capsys, *, more, words):
    shutil.copytree(folder / "train" / "ant", tmp_path / "single" / "ant")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "log").touch()
    given = [word.format(tmp=tmp_path, folder=folder) for word in more]
    with pytest.raises(SystemExit) as end:
        linear_probe.main(options(frozen, digits, tmp_path, "new", *given))
    lines = capsys.readouterr().err.strip().splitlines()
    assert (end.value.code, len(lines)) == (2, 1), lines
    assert lines[0].startswith("error: ")
    assert all(word in lines[0] for word in words), lines[0]
    assert not (tmp_path / "new").exists()


def test_one_process_only(frozen, digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        linear_probe.main(options(frozen, digits, tmp_path, "new"))
    assert "one process" in capsys.readouterr().err


def test_results_that_are_not_finite_are_refused(digits, tmp_path, capsys):
    model = build(ModelSpec("resnet10", 7, (512,)))
    model.preprocessing = Preprocessing(size=32, ratio=1.0)
    with torch.no_grad():
        next(model.trunk.parameters()).fill_(float("nan"))
    save_model(model, tmp_path / "nan.safetensors")
    with pytest.raises(SystemExit) as end:
        linear_probe.main(options(tmp_path / "nan.safetensors", digits, tmp_path, "new"))
    assert end.value.code == 2
    assert "not finite" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
