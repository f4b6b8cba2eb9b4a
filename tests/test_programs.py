"""Every program's main(argv), on a CPU, on real small data: what it leaves behind, what it says,
what it refuses.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matryoshka.inference import pytorch_inference
from matryoshka.train import train_imagenet
from sklearn.metrics import top_k_accuracy_score
from training_commands import options, refused

from matryoshka import cli, config, json_files
from matryoshka.checkpoint.model_file import load_model, save_model
from matryoshka.data import CenterCrop, Digits, Loader, open_dataset, write_beton
from matryoshka.data.augment import Preprocessing, normalise
from matryoshka.models import ModelSpec, build
from matryoshka.training.loaders import ResolutionConfig, resolution_at

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted([*ROOT.glob("rn50_configs/*.yaml"), *ROOT.glob("rn18_configs/*.yaml")])


@pytest.fixture(scope="module")
def run(tmp_path_factory, digits):
    """A finished MRL run."""
    folder = tmp_path_factory.mktemp("runs")
    assert (
        train_imagenet.main(
            options(digits, folder, "run", "--model.mrl=1", "--model.dims=8,32,512")
        )
        == 0
    )
    return folder / "run"


# ---------------------------------------------------------------- training


def test_the_run_folder(run, digits):
    assert {p.name for p in run.iterdir()} == {
        "params.json",
        "config.yaml",
        "env.json",
        "log",
        "events.jsonl",
        "checkpoints",
        "accuracy.png",
        "tensorboard",
        "final_weights.pt",
        "model.safetensors",
    }
    lines = [json.loads(line) for line in (run / "log").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1]
    upstream = ["timestamp", "relative_time", "current_lr", "val_time"]
    upstream += [f"top_{k}_{d}" for k in (1, 5) for d in (8, 32, 512)] + ["train_loss", "epoch"]
    assert list(lines[0])[: len(upstream)] == upstream
    assert lines[1]["train_loss"] < lines[0]["train_loss"], "train_loss of epoch 1 against epoch 0"
    params, is_sealed = json_files.decode((run / "params.json").read_bytes())
    assert is_sealed
    assert params["model.mrl"] == 1
    assert params["model.dims"] == [8, 32, 512]
    resolved = config.read(train_imagenet.SECTIONS, [f"--config-file={run / 'config.yaml'}"])
    assert config.flat(resolved) == params
    env = json.loads((run / "env.json").read_text())
    assert env["versions"]["torch"] == torch.__version__.split("+")[0]
    weights = torch.load(run / "final_weights.pt", weights_only=True)
    assert all(key.startswith("module.") for key in weights)


def test_the_checkpoint_has_the_accuracy_that_the_log_says(run, digits):
    """Slow oracle: one image at a time, scikit-learn counts."""
    last = json.loads((run / "log").read_text().splitlines()[-1])
    for path in (run / "model.safetensors", run / "final_weights.pt"):
        model = load_model(path)
        logits, labels = [], []
        for batch in Loader(digits["val"], 1, order="sequential", crop=CenterCrop(32, 1.0)):
            images = normalise(batch.images)
            with torch.inference_mode():
                logits.append(model(images) + model(images.flip(3)))  # validation.lr_tta is on
            labels.append(batch.labels.item())
        logits = torch.cat(logits, 1)
        for g, d in enumerate(model.dims):
            for k in (1, 5):
                expected = top_k_accuracy_score(labels, logits[g], k=k, labels=range(10))
                assert last[f"top_{k}_{d}"] == pytest.approx(expected, abs=0.011), (
                    f"top_{k}_{d}: log against a computation from the saved model"
                )  # one of 100 may be a tie


@pytest.mark.parametrize(
    ("model", "head"),
    [
        (["--model.efficient=1"], "mrl-e"),
        (["--model.fixed_feature=16"], "ff16"),
        ([], "ff512"),
        (
            ["--model.mrl=1", "--model.nesting_start=5", "--model.relative_importance=2,1,1,1,1"],
            "mrl",
        ),
    ],
)
def test_every_head_trains_and_is_read_back(tmp_path, digits, model, head):
    more = [*model, "--training.epochs=1", "--training.use_blurpool=1", "--logging.log_level=0"]
    train_imagenet.main(options(digits, tmp_path, "run", *more))
    loaded = load_model(tmp_path / "run" / "model.safetensors")
    assert loaded.spec.head_name == head
    assert loaded.spec.blurpool
    assert loaded.preprocessing == Preprocessing(32, 1.0)
    assert loaded.classes == [str(i) for i in range(10)]
    again = load_model(tmp_path / "run" / "final_weights.pt")  # params.json beside it says the rest
    assert again.spec == loaded.spec
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.state_dict().values(), loaded.state_dict().values(), strict=True)
    )


@pytest.mark.slow
def test_every_option_of_the_optimizer_changes_the_result(tmp_path):
    losses, few = {}, tmp_path / "few.beton"
    write_beton(Digits("train"), few, max_resolution=64, write_mode="jpg", subset=100)
    variants = {
        "base": [],
        "seed": ["--training.seed=1"],
        "bn_wd": ["--training.bn_wd=1"],
        "scale": ["--data.scale=0.2,0.5"],
        "weight_decay": ["--training.weight_decay=0.5"],
        "momentum": ["--training.momentum=0"],
        "label_smoothing": ["--training.label_smoothing=0.5"],
        "blurpool": ["--training.use_blurpool=1"],
        "flip": ["--data.flip=1"],
        "ratio": ["--data.ratio=0.5,0.6"],
        "schedule": ["--lr.lr_schedule_type=constant"],
        "bf16": ["--training.precision=bf16"],
        "resolution": ["--resolution.min_res=64"],
        "lr_per_256": ["--lr.lr=none", "--lr.lr_per_256=0.4"],
        "mirror": ["--validation.lr_tta=0"],
    }
    for name, more in {**variants, "again": []}.items():
        short = ["--training.epochs=1", "--training.batch_size=50", *more]
        train_imagenet.main(options({"train": few, "val": few}, tmp_path, name, *short))
        line = json.loads((tmp_path / name / "log").read_text().splitlines()[-1])
        losses[name] = (
            line["train_loss"],
            line["top_1"],
            load_model(tmp_path / name / "model.safetensors"),
        )
    assert losses["base"][0] == losses["again"][0]
    for name in set(variants) - {"base", "mirror"}:
        state = losses[name][2].state_dict()
        different = any(
            key not in state or not torch.equal(value, state[key])
            for key, value in losses["base"][2].state_dict().items()
        )
        assert different, name
    assert losses["mirror"][0] == losses["base"][0]  # only the evaluation differs


def test_resolution_ramp():
    ramp = ResolutionConfig(min_res=160, max_res=192, start_ramp=29, end_ramp=34)
    assert [resolution_at(e, ramp) for e in (0, 29, 31, 32, 34, 39)] == [
        160,
        160,
        160,
        192,
        192,
        192,
    ]
    beyond = ResolutionConfig(min_res=128, max_res=224, start_ramp=1, end_ramp=100)
    assert resolution_at(50, beyond) == 160 + 32 * round((50 - 1) / 99 * 3 - 1)
    assert resolution_at(3, ResolutionConfig(min_res=33, max_res=40)) == 40


def test_eval_only(run, digits, capsys):
    train_imagenet.main(
        [
            "--training.eval_only=1",
            f"--training.path={run / 'model.safetensors'}",
            f"--data.val_dataset={digits['val']}",
            "--validation.resolution=32",
            "--validation.crop_ratio=1",
            "--training.device=cpu",
        ]
    )
    last = json.loads((run / "log").read_text().splitlines()[-1])
    shown = capsys.readouterr().out
    for d in (8, 32, 512):
        assert f"{d:6d}  top-1 {100 * last[f'top_1_{d}']:6.2f}" in shown


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_is_a_valid_configuration(path):
    needed = ["--data.train_dataset=a", "--data.val_dataset=b"]
    cfg = config.read(train_imagenet.SECTIONS, [f"--config-file={path.relative_to(ROOT)}", *needed])
    epochs = int(path.stem.split("_")[1])
    assert cfg.training.epochs == epochs
    assert cfg.model.arch == {"rn50": "resnet50", "rn18": "resnet18"}[path.stem[:4]]
    assert resolution_at(0, cfg.resolution) == 160
    assert resolution_at(epochs - 1, cfg.resolution) == 192
    assert cfg.training.distributed is None


# ---------------------------------------------------------------- evaluation


def test_inference_equals_the_log(run, digits, tmp_path, capsys):
    output = tmp_path / "results.json"
    pytorch_inference.main(
        [
            f"--path={run / 'model.safetensors'}",
            f"--data-root={digits['val']}",
            "--tta",
            f"--output={output}",
        ]
    )
    results = json.loads(output.read_text())
    last = json.loads((run / "log").read_text().splitlines()[-1])
    assert {d: p["top1"] for d, p in results["prefixes"].items()} == {
        str(d): pytest.approx(100 * last[f"top_1_{d}"]) for d in (8, 32, 512)
    }, "top-1 of the saved model against the log's last line, in percent"
    assert (results["images"], results["head"], results["tta"]) == (100, "mrl", True)
    shown = capsys.readouterr().out
    assert "prefix     top-1 %     top-5 %" in shown


def test_inference_on_an_image_folder_with_upstreams_flags(folder, tmp_path):
    """<data-root>/val, a bare MRL file of 3 classes, checked against one forward pass per image."""
    torch.manual_seed(3)
    model = build(ModelSpec("resnet18", 3, (8, 64, 512))).eval()
    state = {
        f"fc.nesting_classifier_{k[11:]}" if k.startswith("head") else k[6:]: v
        for k, v in model.state_dict().items()
    }
    torch.save({f"module.{k}": v for k, v in state.items()}, tmp_path / "final_weights.pt")
    output = tmp_path / "r.json"
    pytorch_inference.main(
        [
            f"--path={tmp_path / 'final_weights.pt'}",
            "--mrl",
            "--dataset",
            "v1",
            "--data-root",
            str(folder),
            "--workers=1",
            f"--output={output}",
            "--batch-size=4",
        ]
    )
    data = open_dataset(folder / "val")
    hits = np.zeros(3)
    for batch in Loader(data, 1, order="sequential", crop=CenterCrop(224)):
        with torch.inference_mode():
            hits += (model(normalise(batch.images)).argmax(2) == batch.labels).squeeze(1).numpy()
    prefixes = json.loads(output.read_text())["prefixes"]
    assert [prefixes[str(d)]["top1"] for d in (8, 64, 512)] == pytest.approx(
        100 * hits / len(data)
    ), "top-1 by prefix in percent against a count of hits"


# ---------------------------------------------------------------- the user's mistakes


MISTAKES = [
    (["--data.train_dataset=nowhere.beton"], ["nowhere.beton", "no such"]),
    (["--data.train_dataset=none"], ["data.train_dataset", "required"]),
    (["--training.epoch=3"], ["training.epoch", "training.epochs"]),
    (["--model.arch=resnet19"], ["resnet19", "did you mean"]),
    (["--training.batch_size=0"], ["training.batch_size=0"]),
    (["--training.epochs=0"], ["training.epochs=0"]),
    (["--training.device=cuda"], ["device=cuda", "0 GPUs"]),
    (["--training.precision=fp16"], ["fp16", "GPU"]),
    (["--training.eval_only=1"], ["training.path"]),
    (["--training.path=x.pt"], ["training.path", "training.eval_only"]),
    (["--logging.run_id=run"], ["run", "logging.run_id", "logging.folder"]),
    (["--model.dims=8,16"], ["model.dims", "model.mrl"]),
    (["--data.scale=0.5,0.1"], ["data.scale"]),
    (["--data.flip=2"], ["data.flip"]),
    (["--resolution.min_res=0"], ["resolution.min_res"]),
    (["--validation.crop_ratio=2"], ["validation.crop_ratio"]),
    (["--lr.lr=-1"], ["lr.lr"]),
    (["--data.order=sorted"], ["data.order", "sorted", "quasi_random"]),
    (["--data.window_pages=0"], ["data.window_pages=0"]),
    (["--data.on_error=ignore"], ["data.on_error", "ignore", "skip"]),
    (["--data.loader=dali"], ["data.loader", "dali", "ffcv"]),
    (["--data.loader=ffcv", "--data.resident=1"], ["data.resident", "data.loader=native"]),
    (["--data.num_workers=-1"], ["data.num_workers=-1"]),
    (["--training.seed=-1"], ["training.seed=-1"]),
    (["--training.sync_bn=1"], ["training.sync_bn=1", "GPU"]),
    (["--training.compile=fast"], ["training.compile", "fast", "graphs"]),
    (["--training.compile=graphs", "--training.device=cpu"], ["training.compile=graphs", "GPU"]),
    (
        ["--training.compile=1", "--training.deterministic=1"],
        ["training.compile", "training.deterministic"],
    ),
    (
        ["--training.accumulate=2", "--training.global_batch_size=64"],
        ["training.accumulate", "global_batch_size"],
    ),
    (["--training.keep_last=0"], ["training.keep_last=0"]),
    (["--training.optimizer=adamm"], ["training.optimizer", "adamm", "adamw"]),
    (["--training.resume=nowhere"], ["training.resume=nowhere"]),
    (["--training.ema=2"], ["training.ema=2"]),
    (["--data.randaugment=30"], ["data.randaugment=30", "10"]),
    (["--data.mixup=-1"], ["data.mixup=-1"]),
    (["--lr.warmup_epochs=1"], ["lr.warmup_epochs", "cyclic"]),
    (["--model.init=nowhere.pt"], ["model.init", "nowhere.pt"]),
    (["--model.freeze=layer9"], ["model.freeze", "layer9", "layer4"]),
]


@pytest.mark.parametrize(
    ("more", "words"), MISTAKES, ids=lambda v: v[0] if isinstance(v, list) else ""
)
def test_mistakes_in_training_are_one_line(run, digits, capsys, more, words):
    if torch.cuda.is_available() and "cuda" in more[0]:
        pytest.skip("this machine has a GPU")
    line = refused(train_imagenet.main, [*options(digits, run.parent, "other"), *more], capsys)
    assert all(word in line for word in words), line
    assert [p.name for p in run.parent.iterdir()] == ["run"]  # nothing was begun


def test_the_parent_of_train_and_val_is_not_a_data_set(digits, folder, tmp_path, capsys):
    parent = {"train": folder, "val": digits["val"]}
    line = refused(train_imagenet.main, options(parent, tmp_path / "runs"), capsys)
    assert f"data.train_dataset={folder}" in line
    assert f"{folder}/train" in line


def test_class_counts_and_names_must_fit(run, digits, folder, tmp_path, capsys):
    mixed = {"train": folder / "train", "val": digits["val"]}
    line = refused(train_imagenet.main, options(mixed, tmp_path), capsys)
    assert "10 classes" in line
    line = refused(
        pytorch_inference.main,
        [f"--path={run / 'model.safetensors'}", f"--data-root={folder}"],
        capsys,
    )
    assert "3 classes" in line
    only = ["--training.eval_only=1", f"--training.path={run / 'model.safetensors'}"]
    assert "3 classes" in refused(
        train_imagenet.main, [*only, f"--data.val_dataset={folder / 'val'}"], capsys
    )
    save_model(build(ModelSpec("resnet10", 3, (8,))), tmp_path / "m.safetensors")
    assert "classes" in refused(
        pytorch_inference.main,
        [f"--path={tmp_path / 'm.safetensors'}", f"--data-root={digits['val']}"],
        capsys,
    )


def test_damaged_data_is_one_line(run, digits, tmp_path, capsys):
    content = digits["train"].read_bytes()
    cut = tmp_path / "cut.beton"
    cut.write_bytes(content[: len(content) // 2])
    line = refused(
        train_imagenet.main, options({"train": cut, "val": digits["val"]}, tmp_path), capsys
    )
    assert "cut.beton" in line
    cut.write_bytes(b"\x07" + content[1:])
    line = refused(
        train_imagenet.main, options({"train": cut, "val": digits["val"]}, tmp_path), capsys
    )
    assert "version" in line
    (tmp_path / "empty").mkdir()
    assert "class folders" in refused(
        pytorch_inference.main,
        [f"--path={run / 'model.safetensors'}", f"--data-root={tmp_path / 'empty'}"],
        capsys,
    )


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--dataset=V3"], ["--dataset V3", "V1"]),
        (["--data-root=/nowhere/at/all"], ["--data-root", "/nowhere/at/all"]),
        (["--path=/nowhere/model.pt"], ["/nowhere/model.pt"]),
        (["--output=/nowhere/r.json"], ["--output"]),
        (["--batch-size=0"], ["--batch-size"]),
        (["--efficient"], ["efficient", "mrl"]),
        (["--rep_size=16"], ["rep_size", "512"]),
        (["--device=cuda"], ["device=cuda"]),
    ],
)
def test_mistakes_in_evaluation_are_one_line(run, digits, capsys, argv, words):
    if torch.cuda.is_available() and argv == ["--device=cuda"]:
        pytest.skip("this machine has a GPU")
    base = [f"--path={run / 'model.safetensors'}", f"--data-root={digits['val']}"]
    line = refused(pytorch_inference.main, [*base, *argv], capsys)
    assert all(word in line for word in words), line


# ---------------------------------------------------------------- the command


def test_the_command(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert [name for name in ("demo", *cli.PROGRAMS) if name not in shown] == []
    assert cli.main(["nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err
    assert cli.main([]) == 2
    for command in cli.PROGRAMS:
        with pytest.raises(SystemExit) as end:
            cli.main([command, "--help"])
        assert end.value.code == 0
    assert "--model.mrl" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("cwd", "script"), [(".", "train/train_imagenet.py"), ("own", "inference/pytorch_inference.py")]
)
def test_programs_run_in_place(cwd, script):
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    place = ROOT if cwd == "." else (ROOT / script).parent
    done = subprocess.run(
        [sys.executable, (ROOT / script).relative_to(place), "--help"],
        cwd=place,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout
