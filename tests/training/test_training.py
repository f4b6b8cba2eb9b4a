"""Options of train_imagenet.py: each has its documented effect."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from matryoshka.inference import pytorch_inference
from matryoshka.train import train_imagenet

from matryoshka import devices
from matryoshka.checkpoint.model_file import load_model
from matryoshka.models.ema import Ema
from matryoshka.training import progress
from matryoshka.training.compiling import Forward, explained

COMPILE = torch.compile


def train(digits, folder, run_id, *more):
    argv = [
        f"--data.train_dataset={digits['val']}",
        f"--data.val_dataset={digits['val']}",
        f"--logging.folder={folder}",
        f"--logging.run_id={run_id}",
        "--model.arch=resnet10",
        "--model.mrl=1",
        "--model.dims=8,64",
        "--training.epochs=1",
        "--training.batch_size=20",
        "--resolution.min_res=32",
        "--resolution.max_res=32",
        "--validation.resolution=32",
        "--validation.lr_tta=0",
        "--data.num_workers=1",
        "--lr.lr=0.01",
        *more,
    ]
    assert train_imagenet.main(argv) == 0
    return load_model(folder / run_id / "model.safetensors").state_dict()


@pytest.fixture(scope="module", autouse=True)
def _without_chart():
    """The chart takes a quarter of a short run; test_programs.py looks at it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_imagenet, "draw_chart", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def plain(digits, tmp_path_factory):
    return train(digits, tmp_path_factory.mktemp("plain"), "run")


def differ(a, b):
    return any(not torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "more",
    [
        ["--data.mixup=0.5"],
        ["--data.cutmix=1"],
        ["--data.randaugment=9"],
        ["--data.flip=0"],
        ["--training.optimizer=adamw"],
        ["--training.optimizer=adam", "--training.betas=0.9,0.99"],
        ["--training.optimizer=adan"],
        ["--training.nesterov=1"],
        ["--training.optimizer=lars"],
        ["--training.optimizer=muon"],
        ["--training.momentum=0.5"],
        ["--training.clip=0.01"],
        ["--training.weight_decay=0.1"],
        ["--training.bn_wd=0.1"],
        ["--training.label_smoothing=0"],
        ["--training.seed=1"],
        ["--training.use_blurpool=1"],
        ["--training.accumulate=2"],
        ["--training.global_batch_size=30"],
        ["--lr.lr_schedule_type=cosine"],
        ["--lr.lr_schedule_type=constant", "--lr.warmup_epochs=0.5"],
        ["--model.relative_importance=1,3"],
        ["--model.efficient=1"],
        ["--model.freeze=stem"],
    ],
    ids=lambda more: more[-1].lstrip("-"),
)
def test_every_option_changes_the_weights(digits, tmp_path, plain, more):
    state = train(digits, tmp_path, "run", *more)
    assert state.keys() != plain.keys() or differ(plain, state)
    assert all(torch.isfinite(value).all() for value in state.values())


def test_the_same_seed_gives_the_same_weights(digits, tmp_path, plain):
    state = train(
        digits, tmp_path, "run", "--training.deterministic=1", "--training.checkpoint_every_steps=2"
    )
    assert not differ(plain, state)
    assert torch.are_deterministic_algorithms_enabled()
    train(digits, tmp_path, "other")
    assert not torch.are_deterministic_algorithms_enabled()


def test_images_per_step(digits, tmp_path, capsys):
    """100 images: steps per epoch and images per step, as the options say."""
    for more, text in (
        ([], "5 steps of 20 images"),
        (["--training.accumulate=2"], "2 steps of 40 images"),
        (["--training.global_batch_size=33"], "3 steps of 33 images"),
    ):
        train(digits, tmp_path, f"run{len(text)}{text[0]}", *more)
        assert text in capsys.readouterr().out


def last_line(run):
    return json.loads((run / "log").read_text().splitlines()[-1])


def test_a_batch_larger_than_the_set_is_lowered(digits, tmp_path, plain, capsys):
    state = train(digits, tmp_path, "run", "--training.batch_size=256")
    shown = capsys.readouterr().out
    assert "1 epochs x 1 steps of 100 images" in shown
    assert (
        "note     batches of 256 images are more than the 100 of the training set: lowered to 100"
    ) in shown
    assert "leaves out" not in shown
    assert differ(state, plain)
    assert np.isfinite(last_line(tmp_path / "run")["train_loss"])


@pytest.mark.parametrize(("batch", "left_out"), [(20, 0), (19, 5), (30, 10), (60, 40)])
def test_images_left_out_by_full_batches_are_noted(digits, tmp_path, capsys, batch, left_out):
    """A tenth of the images or more is worth a note."""
    train(digits, tmp_path, "run", f"--training.batch_size={batch}")
    notes = re.findall(r"note +each epoch leaves out (\d+) of 100 images", capsys.readouterr().out)
    assert notes == ([str(left_out)] if left_out >= 10 else [])


def test_the_last_lines_are_what_eval_measures(digits, tmp_path, capsys):
    """One view and mirrored, on the digits, which differ from their mirror images."""
    train(
        digits,
        tmp_path,
        "run",
        "--training.epochs=2",
        "--validation.lr_tta=1",
        f"--data.train_dataset={digits['train']}",
    )
    shown = capsys.readouterr().out
    texts = {}
    for name, more in (("accuracy", []), ("mirrored", ["--tta"])):
        printed = re.search(rf"^{name} top-1 8: (\S+)  64: (\S+) ", shown, re.MULTILINE)
        assert printed is not None
        output = tmp_path / f"{name}.json"
        argv = [
            f"--path={tmp_path / 'run/model.safetensors'}",
            f"--data-root={digits['val']}",
            f"--output={output}",
            *more,
        ]
        assert pytorch_inference.main(argv) == 0
        prefixes = json.loads(output.read_text())["prefixes"]
        texts[name] = printed.groups()
        assert texts[name] == tuple(f"{prefixes[dim]['top1']:.2f}" for dim in ("8", "64"))
    assert texts["accuracy"] != texts["mirrored"]


def test_lines_of_an_epoch_without_a_terminal(digits, tmp_path, capsys, monkeypatch):
    """Every line has the step, the mean loss over the prefixes and the time that is left."""
    monkeypatch.setattr(progress, "LINE_SECONDS", 0)
    train(digits, tmp_path, "run", "--logging.log_level=1", "--validation.batch_size=40")
    shown = capsys.readouterr().out
    pattern = (
        r"^epoch   0  step (\d)/5  loss (\S+)  \d+ images/s  (?:time left unknown|\d+ s left)$"
    )
    lines = re.findall(pattern, shown, re.MULTILINE)
    assert lines
    steps = [int(step) for step, _ in lines]
    assert steps == sorted(set(steps))
    assert set(steps) <= {1, 2, 3, 4, 5}
    printed = re.search(r"^epoch   0  loss (\S+)  lr", shown, re.MULTILINE)
    assert printed is not None
    # Two prefixes: the log has the sum of their losses.
    logged = last_line(tmp_path / "run")["train_loss"]
    assert float(printed[1]) == pytest.approx(logged / 2, abs=6e-4)
    assert "evaluated 33 %" in shown
    # Losses of single steps are means, too: near ln(10) for 10 classes, not twice that.
    assert all(1.5 < float(loss) < 3.5 for _, loss in lines)


def test_the_average_of_weights_follows_its_formula(digits, tmp_path, capsys):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    ema, want = Ema(model, 0.9), model[0].weight.detach().numpy().copy()
    for step in range(30):
        with torch.no_grad():
            model[0].weight += torch.randn(3, 2)
            model[1].running_mean += 1
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step))
        want = decay * want + (1 - decay) * model[0].weight.detach().numpy()
    np.testing.assert_allclose(ema.module[0].weight, want, rtol=1e-5)
    assert torch.equal(ema.module[1].running_mean, model[1].running_mean)
    plain = train(digits, tmp_path, "run", "--training.ema=0.9")
    assert "(average " in capsys.readouterr().out
    assert differ(load_model(tmp_path / "run" / "model_ema.safetensors").state_dict(), plain)


def test_weights_and_biases_hears_of_a_run(digits, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(digits, tmp_path, "run", "--logging.wandb=project")
    assert list((tmp_path / "run").glob("wandb/offline-run-*/*.wandb"))


def test_compilation_is_tried_and_reported(digits, tmp_path, capsys, monkeypatch):
    compiled = []

    def counted(module, **how):
        compiled.append((type(module).__name__, how))
        return module

    monkeypatch.setattr(torch, "compile", counted)
    monkeypatch.setattr(devices, "why_not_compile", lambda device: None)
    train(digits, tmp_path, "yes", "--training.compile=1")
    assert "fp32, compiled; the first steps at each size" in capsys.readouterr().out
    # Static shapes, and not the model itself, which is evaluated as it is.
    assert compiled == [("Objective", {"dynamic": False, "mode": None})]
    monkeypatch.setattr(
        devices, "why_not_compile", lambda device: "torch.compile fails: no compiler"
    )
    train(digits, tmp_path, "no", "--training.compile=true")
    assert "not compiled (torch.compile fails: no compiler)\n" in capsys.readouterr().out
    for run, words in {"unset": (), "off": ("--training.compile=0",)}.items():
        train(digits, tmp_path, run, *words)
        assert "compile" not in capsys.readouterr().out
    assert len(compiled) == 1


def broken_code(function):
    """A compiled function whose code, as the compiler wrote it, fails in the backward pass."""
    place = Path(torch.__file__).parent / "_inductor" / "made.py"
    made: dict = {}
    exec(compile("def run(gradient):\n    buf25 += gradient", str(place), "exec"), made)

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss):
            return loss.clone()

        @staticmethod
        def backward(ctx, *gradients):
            return made["run"](*gradients)

    def forward(*args, **kwargs):
        loss, per_prefix = function(*args, **kwargs)
        return Broken.apply(loss), per_prefix

    return forward


def broken_backend(graph, inputs):
    raise RuntimeError("no such instruction\nmore")


@pytest.mark.parametrize(
    "case",
    [
        (lambda module, **_: broken_code(module), "UnboundLocalError: "),
        (
            lambda module, **_: COMPILE(module, backend=broken_backend),
            "BackendCompilerFailed: backend='broken_backend' raised:",
        ),
    ],
)
def test_code_of_the_compiler_that_fails_is_one_line(digits, tmp_path, monkeypatch, capsys, case):
    broken, reason = case
    monkeypatch.setattr(devices, "why_not_compile", lambda device: None)
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(SystemExit, match="2"):
        train(digits, tmp_path, "run", "--training.compile=1")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: training.compile: torch.compile of torch {torch.__version__} ")
    assert f"({reason}" in line
    monkeypatch.undo()
    train(digits, tmp_path, "run", "--training.compile=0", "--training.resume=auto")


def test_an_error_of_the_model_is_not_the_compilers(monkeypatch):
    def broken(*_):
        raise RuntimeError("of the model")

    with (
        pytest.raises(RuntimeError, match=r"^of the model$"),
        explained(Forward(torch.nn.Identity(), broken)),
    ):
        broken()


def test_why_it_does_not_compile(monkeypatch):
    def broken(_):
        def call(*_):
            raise RuntimeError("\nInvalidCxxCompiler: No working C++ compiler found\nmore")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    reason = devices.why_not_compile(torch.device("cpu"))
    assert reason == "torch.compile fails: InvalidCxxCompiler: No working C++ compiler found"
