"""Runs of train_cifar10.py: outputs under both repositories' names, selection, stop and resume."""

import csv
import json
import os
import signal
import traceback

import numpy as np
import pytest
import torch
from matryoshka.train import train_cifar10
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from matryoshka import checkpoint
from matryoshka.data import CenterCrop, Loader, open_dataset
from matryoshka.data.augment import normalise
from matryoshka.data.split import stratified_split
from matryoshka.devices import pick_precision
from matryoshka.distributed import pick_device
from matryoshka.training import cifar_outputs, snapshot
from matryoshka.training.guard import NonFiniteGuard
from matryoshka.training.watch import REQUEUE

SMALL = ["--bs=90", "--size=16", "--patch=4", "--device=cpu", "--nowandb", "--data.num_workers=1"]
NESTED = ["--mrl_flag", "--mrl_kind=nested", "--mrl_dims=8,16", "--model.arch_options=depth=1"]
OURS = os.path.join("matryoshka", "")
NAME = "vitfixedposdualpatchnorm_cifar10_patch4"


def command(digits, *more):
    data = f"--data={digits['train']},{digits['val']}"
    return [*SMALL, data, "--n_epochs=2", "--lr=0.003", *more]


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    """Outputs are named relative to the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cifar_outputs, "draw_chart", lambda *_: None)


@pytest.fixture(scope="module")
def nested(digits, tmp_path_factory):
    """The folder of a finished run of a nested transformer."""
    folder = tmp_path_factory.mktemp("nested")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(cifar_outputs, "draw_chart", lambda *_: None)
        assert train_cifar10.main(command(digits, *NESTED)) == 0
    return folder


def run_of(folder):
    """The first run in the folder; its name starts with its time and ends with random digits."""
    return min((folder / "runs").glob("*/*"), key=lambda run: (run / "env.json").stat().st_mtime_ns)


def top1(model, dataset):
    """Top-1 in percent of every dim, image by image."""
    loader = Loader(dataset, 1, order="sequential", crop=CenterCrop(16, 1.0), num_workers=1)
    hits = np.zeros(len(model.dims))
    with torch.no_grad():
        for batch in loader:
            scale = model.preprocessing
            logits = model(normalise(batch.images, scale.mean, scale.std))[:, 0]
            hits += (logits.argmax(1) == batch.labels[0]).numpy()
    return 100 * hits / len(loader)


# ---------------------------------------------------------------- what a run leaves


def test_the_model_is_that_of_the_best_epoch_and_its_numbers_are_right(nested, digits):
    run = run_of(nested)
    model = checkpoint.load_model(run / "model.safetensors")
    results = json.loads((run / "results.json").read_text())
    found = [results["test"]["top_1"][str(d)] for d in model.dims]
    assert found == pytest.approx(top1(model, str(digits["val"])))

    best = snapshot.read(run / "checkpoints" / "best.safetensors")
    weights = model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in best.part("model.").items())
    log = [json.loads(line) for line in (run / "log").read_text().splitlines()]
    highest = max(line["top_1_16"] for line in log)
    assert results["validation"]["top_1"]["16"] == pytest.approx(100 * highest)


def test_the_validation_images_are_held_out(nested, digits):
    """40 of 400, four of each class; the other 360 are trained on: 4 steps of 90."""
    train = open_dataset(digits["train"])
    kept, held_out = stratified_split(train.labels, 0.1, 0)
    assert np.bincount(train.labels[held_out]).tolist() == [4] * 10
    metadata = snapshot.read(run_of(nested) / "checkpoints" / "last.safetensors").metadata
    assert metadata["progress"]["loader"]["samples"] == len(kept) == 360
    assert metadata["progress"]["step"] == 8


def test_the_names_of_both_repositories_are_links_into_the_run(nested):
    run = run_of(nested)
    link = nested / "checkpoint" / "vitfixedposdualpatchnorm-cifar10-4-ckpt.t7"
    assert link.is_symlink()
    assert link.resolve() == (run / "checkpoints" / "best.safetensors").resolve()
    for dim in (8, 16):
        for suffix in ("pth", "safetensors"):
            name = f"{NAME}_dim{dim}.{suffix}"
            export = nested / "checkpoint" / "nested_models" / name
            assert export.resolve() == (run / "nested_models" / name).resolve()
            assert export.is_file()

    losses, accuracies = csv.reader((nested / "log" / f"log_{NAME}.csv").read_text().splitlines())
    log = [json.loads(line) for line in (run / "log").read_text().splitlines()]
    assert [float(loss) for loss in losses] == [line["val_loss"] for line in log]
    assert [float(a) for a in accuracies] == [100 * line["top_1_16"] for line in log]
    text = (nested / "log" / f"log_{NAME}.txt").read_text().splitlines()
    assert len(text) == 2
    assert f"Epoch 1, lr: {log[1]['current_lr']:.7f}, val loss: {log[1]['val_loss']:.5f}" in text[1]


def test_an_export_gives_the_familys_logits(nested):
    run = run_of(nested)
    family = checkpoint.load_model(run / "model.safetensors")
    images = torch.randn(3, 3, 16, 16)
    for i, dim in enumerate(family.dims):
        for suffix in ("pth", "safetensors"):
            export = checkpoint.load_model(run / "nested_models" / f"{NAME}_dim{dim}.{suffix}")
            assert export.dims == (dim,)
            assert export.preprocessing == family.preprocessing
            torch.testing.assert_close(export(images)[0], family(images)[i], atol=1e-5, rtol=0)


def test_a_family_that_the_pth_layout_cannot_hold_is_exported_all_the_same(digits, capsys):
    options = "--model.arch_options=depth=1,heads=1"
    argv = [word for word in command(digits, *NESTED, "--n_epochs=1") if "arch_options" not in word]
    assert train_cifar10.main([*argv, options]) == 0
    assert "note     no .pth files: " in capsys.readouterr().out
    run = run_of(train_cifar10.Path())
    assert {path.suffix for path in (run / "nested_models").iterdir()} == {".safetensors"}
    assert (run / "model.safetensors").is_file()


def test_tensorboard_has_the_tags_of_both_repositories(nested):
    run = run_of(nested)
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    log = [json.loads(line) for line in (run / "log").read_text().splitlines()]
    for tag, key, factor in (
        ("Loss/Train", "train_loss", 1),
        ("Loss/Validation", "val_loss", 1),
        ("Accuracy/Validation", "top_1_16", 100),
        ("Learning_Rate", "current_lr", 1),
    ):
        scalars = events.Scalars(tag)
        assert [s.step for s in scalars] == [0, 1]
        assert [s.value for s in scalars] == pytest.approx([factor * line[key] for line in log])
    assert all(s.value > 0 for s in events.Scalars("Epoch_Time"))


def test_a_second_run_of_the_same_name_overwrites_nothing(nested, digits, monkeypatch):
    monkeypatch.chdir(nested)
    first = run_of(nested)
    before = (first / "model.safetensors").read_bytes()
    assert train_cifar10.main(command(digits, *NESTED, "--seed=1", "--n_epochs=1")) == 0
    (second,) = set((nested / "runs").glob("*/*")) - {first}
    assert (first / "model.safetensors").read_bytes() == before
    link = nested / "checkpoint" / "vitfixedposdualpatchnorm-cifar10-4-ckpt.t7"
    assert second in link.resolve().parents
    # other dims: no export of the earlier run is left under the common name
    wider = [word.replace("8,16", "16,24") for word in NESTED]
    assert train_cifar10.main(command(digits, *wider, "--n_epochs=1")) == 0
    exports = (nested / "checkpoint" / "nested_models").iterdir()
    assert {path.stem.rpartition("_")[2] for path in exports} == {"dim16", "dim24"}
    # a file of the user under such a name stays
    text = nested / "log" / f"log_{NAME}.txt"
    text.unlink()
    text.write_text("mine")
    assert train_cifar10.main(command(digits, *NESTED, "--seed=2", "--n_epochs=1")) == 0
    assert text.read_text() == "mine"


def test_a_folder_without_links_gets_a_note(digits, tmp_path, capsys):
    """A file called log, or a file system without links, must not end a run after an epoch."""
    (tmp_path / "log").write_text("mine")
    assert train_cifar10.main(command(digits, *NESTED, "--n_epochs=1")) == 0
    assert "note     no links in checkpoint/ and log/: " in capsys.readouterr().out
    assert (run_of(tmp_path) / "model.safetensors").is_file()
    assert (tmp_path / "log").read_text() == "mine"


# ---------------------------------------------------------------- stop and resume


@pytest.mark.parametrize(("stop", "epoch"), [(2, 0), (6, 1)])
def test_a_stopped_run_resumes_to_the_same_weights(
    digits, nested, tmp_path, monkeypatch, capsys, *, stop, epoch
):
    original, steps = NonFiniteGuard.before_step, []

    def at_step(self):
        steps.append(0)
        if len(steps) == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    monkeypatch.setattr(NonFiniteGuard, "before_step", at_step)
    assert train_cifar10.main(command(digits, *NESTED)) == REQUEUE
    assert "resume with the same command and --resume" in capsys.readouterr().out
    monkeypatch.setattr(NonFiniteGuard, "before_step", original)
    assert train_cifar10.main(command(digits, *NESTED, "--resume")) == 0
    assert f"resume   after step {stop}, epoch {epoch}" in capsys.readouterr().out
    ours, theirs = (
        (run_of(folder) / "model.safetensors").read_bytes() for folder in (tmp_path, nested)
    )
    assert ours[-1000:] == theirs[-1000:], "the weights differ from those of an undisturbed run"
    lines = (tmp_path / "log" / f"log_{NAME}.txt").read_text().splitlines()
    assert [line.split("Epoch ")[1][0] for line in lines] == ["0", "1"]
    assert train_cifar10.main(command(digits, *NESTED, "-r")) == 0
    assert "this run is done" in capsys.readouterr().out


def refused(argv, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        train_cifar10.main(argv)
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_resume_names_what_is_missing_or_different(digits, nested, tmp_path, monkeypatch, capsys):
    line = refused(command(digits, *NESTED, "--resume"), capsys)
    assert "checkpoint/vitfixedposdualpatchnorm-cifar10-4-ckpt.t7 is no run" in line
    assert list(tmp_path.iterdir()) == []
    monkeypatch.chdir(nested)
    line = refused(command(digits, *NESTED, "--resume", "--lr=0.1"), capsys)
    assert "cannot resume with other options: lr.lr was 0.003 and is 0.1" in line


# ---------------------------------------------------------------- selection


def test_selection_on_the_test_set_is_labelled(digits, capsys):
    argv = command(digits, *NESTED, "--n_epochs=1", "--select_on_test", "--notb")
    assert train_cifar10.main(argv) == 0
    out = capsys.readouterr().out
    assert "the best epoch on the 100 TEST images" in out
    assert "(100 images, which chose the epoch)" in out
    assert "validation top-1" not in out
    run = run_of(train_cifar10.Path())
    results = json.loads((run / "results.json").read_text())
    assert list(results) == ["test"]
    assert results["test"]["chose_the_epoch"] is True
    assert not (run / "tensorboard").exists()


def test_without_validation_images_the_last_weights_are_the_model(digits, capsys):
    average = ["--val_share=0", "--training.ema=0.5"]
    assert train_cifar10.main(command(digits, *NESTED, *average)) == 0
    out = capsys.readouterr().out
    assert "the weights of the last epoch, without validation" in out
    assert "400 images, 10 classes; 100 to test" in out
    run = run_of(train_cifar10.Path())
    last = snapshot.read(run / "checkpoints" / "last.safetensors").part("ema.")
    weights = checkpoint.load_model(run / "model.safetensors").state_dict()
    assert all(torch.equal(weights[name], value) for name, value in last.items())
    assert not (run / "checkpoints" / "best.safetensors").exists()


def test_one_evaluation_chooses_nothing(digits, capsys):
    argv = command(digits, *NESTED, "--logging.log_level=0", "--notb")
    assert train_cifar10.main(argv) == 0
    out = capsys.readouterr().out
    assert "chosen   the last epoch, the only one that logging.log_level=0 evaluates" in out
    assert "(40 images, held out)" in out
    results = json.loads((run_of(train_cifar10.Path()) / "results.json").read_text())
    assert [results[name]["chose_the_epoch"] for name in ("validation", "test")] == [False, False]


@pytest.mark.parametrize("share", ["0", "0.2", None])
def test_a_folder_with_images_for_validation(share, digits, tmp_path, capsys):
    """val.beton beside test.beton; `--val_share 0` still means: choose nothing."""
    for name, source in (("train", "train"), ("val", "val"), ("test", "val")):
        (tmp_path / f"{name}.beton").symlink_to(digits[source])
    argv = [*SMALL, f"--data={tmp_path}", "--n_epochs=1", "--net=fast_cnn", "--notb"]
    argv += ["--model.arch_options=dim=16", *([f"--val_share={share}"] if share else [])]
    if share == "0.2":
        assert "the images for validation are" in refused(argv, capsys)
        return
    assert train_cifar10.main(argv) == 0
    out = capsys.readouterr().out
    wanted = "the last epoch" if share else f"the best epoch on 100 images of {tmp_path}/val.beton"
    assert wanted in out


# ---------------------------------------------------------------- other nets and steps


@pytest.mark.parametrize(
    "more",
    [
        ["--net=fast_cnn", "--mrl_flag", "--model.arch_options=dim=16", "--opt=muon"],
        [*NESTED, "--mrl_dims=8,16,24", "--training.sandwich=0", "--training.distill=0.5"],
    ],
    ids=["fast_cnn", "sandwich"],
)
def test_other_nets_and_ways_to_train(digits, more, capsys):
    assert train_cifar10.main(command(digits, *more, "--n_epochs=1", "--data.cutmix=1")) == 0
    run = run_of(train_cifar10.Path())
    (line,) = [json.loads(text) for text in (run / "log").read_text().splitlines()]
    assert np.isfinite(line["train_loss"])
    if "--training.sandwich=0" in more:
        events = EventAccumulator(str(run / "tensorboard")).Reload()
        assert "loss/16" not in events.Tags()["scalars"], "the middle width is never trained"
        assert events.Scalars("loss/8")[0].value == pytest.approx(np.log(10), rel=0.3)


class InFloat64(TorchDispatchMode):
    """Collects the lines whose operations give float64."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        outputs = operation(*args, **(kwargs or {}))
        for output in tree_leaves(outputs):
            if isinstance(output, torch.Tensor) and output.dtype == torch.float64:
                ours = [f for f in traceback.extract_stack() if OURS in f.filename]
                self.found.add(ours[-1].line)
        return outputs


def test_a_run_computes_nothing_in_float64(digits, monkeypatch):
    """Apple's GPUs have none; they are also a device of the option."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mps, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        assert pick_device("auto", 0) == torch.device("mps")
    assert pick_precision("auto", torch.device("mps")) == "fp32"
    more = ["--opt=adan", "--training.ema=0.5", "--training.clip=1", "--mixup", "--data.cutmix=1"]
    more += ["--data.random_erasing=0.5", "--data.color_jitter=0.4,0.4,0.4,0.1", "--n_epochs=1"]
    with InFloat64() as mode:
        assert train_cifar10.main(command(digits, *NESTED, *more)) == 0
    on_the_cpu = {"total = self.count.cpu().double()"}  # and what is divided by it
    divided = {line for line in mode.found if line.endswith(".cpu() / total).tolist()")}
    assert mode.found - on_the_cpu == divided


def test_weights_and_biases_get_the_keys_of_both_repositories(digits, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    started, sent = [], []

    class Run:
        def define_metric(self, *_, **__):
            pass

        def log(self, values):
            sent.append(values)

        def finish(self):
            pass

    monkeypatch.setattr(wandb, "init", lambda **kwargs: started.append(kwargs) or Run())
    argv = [word for word in command(digits, *NESTED, "--n_epochs=1") if word != "--nowandb"]
    assert train_cifar10.main(argv) == 0
    assert started[0]["project"] == "cifar10-challange"
    (values,) = [values for values in sent if "val_acc" in values]
    keys = {"epoch", "train_loss", "val_loss", "val_acc", "lr", "epoch_time"}
    assert set(values) == keys


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--net=vitt"], "did you mean vit"),
        (["--patch=5"], "patch=5"),
        (["--mrl_flag", "--mrl_dims=16,8"], "strictly increasing"),
        (["--net=res18", "--mrl_flag", "--mrl_dims=8,1024"], "beyond the feature width 512"),
        (["--data=nowhere"], "nowhere"),
        (["--data=a,b,c"], "TRAIN.beton,TEST.beton"),
        (["--bs=0"], "1 to 16777216"),
        (["--data={train}"], "the same images to train and to test on"),
        (["--data={train},{train}"], "the same images to train and to test on"),
        (["--val_share=0.001"], "--val_share 0.001: "),
        (["--data.loader=ffcv"], "use data.loader=native"),
        (["--training.eval_only=1"], "evaluate with matryoshka eval"),
        (["--validation.lr_tta=1"], "matryoshka eval --tta"),
        (["--data.val_dataset=x.beton"], "give --data TRAIN.beton,TEST.beton"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(digits, tmp_path, more, message, capsys):
    words = [word.format(**digits) for word in more]
    assert message in refused([*command(digits), *words], capsys)
    assert list(tmp_path.iterdir()) == []
