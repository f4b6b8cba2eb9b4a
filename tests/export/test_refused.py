"""Mistakes of a user: one line, exit code 2, and no file."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matryoshka.inference import export_models
from torch import nn

from matryoshka import cli
from matryoshka.checkpoint import save_model
from matryoshka.export import packages, quiet
from matryoshka.models import BACKBONES, ModelSpec, build

ROOT = Path(__file__).resolve().parents[2]


class Small(nn.Module):
    """A trunk for images of 8 pixels or more; D = 8."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 8)

    def forward(self, x):
        return self.patches(x).mean((2, 3))


class Odd(Small):
    """With an operation that ONNX lacks."""

    def forward(self, x):
        return torch.special.gammaln(super().forward(x).abs() + 1)


class Branching(Small):
    """Depends on the values of the images."""

    def forward(self, x):
        x = super().forward(x)
        return x if x.sum() > 0 else -x


def save_small(trunk, path, monkeypatch):
    """The path of a checkpoint whose architecture is called `small`."""
    monkeypatch.setitem(BACKBONES, "small", lambda weights=None: (trunk(), 8))
    save_model(build(ModelSpec("small", 3, (4, 8))), path)
    return path


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(argv, capsys):
    """The error message of a call that writes nothing."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.main(["export", *map(str, argv)])
    assert end.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0].removeprefix("error: ")


REFUSED = {
    "--model_type=vit": "--model_type vit: CHECKPOINT is a resnet10; use --model_type resnet10",
    "--truncate-dim=12": "--truncate-dim 12: not a prefix of the model, which has 8, 16, 64",
    "--truncate-dim=512": "--truncate-dim 512: not a prefix of the model",
    "--format=int8": "--format int8 needs --calibration",
    "--calibration=FOLDER": "--calibration is for --format int8; add it",
    "--eval-data=FOLDER": "--eval-data is for --format int8; add it",
    "--images=FOLDER": "--images is for --verify; add it",
    "--format=tflite": "--format tflite: 'tflite' is unknown; known: onnx, pt2",
    "--batch_size=0": "--batch_size 0: expected 1 to 65536",
    "--output_dir=CHECKPOINT": "--output_dir CHECKPOINT: is not a folder",
    "--rep_size=3": "CHECKPOINT: rep_size 3 was requested",
}


@pytest.mark.parametrize("option", REFUSED)
def test_options(checkpoint, folder, option, empty, capsys):
    message = REFUSED[option]
    for word, path in {"CHECKPOINT": checkpoint, "FOLDER": folder / "val"}.items():
        option = option.replace(word, str(path))
        message = message.replace(word, str(path))
    assert refused([f"--checkpoint={checkpoint}", option], capsys).startswith(message)
    assert os.listdir(empty) == []


def test_files_that_are_no_checkpoint(empty, capsys):
    page = empty / "page.pt"
    page.write_text("<html>404</html>")
    assert refused([f"--checkpoint={page}"], capsys).startswith(f"{page}: not a checkpoint")
    assert refused(["--checkpoint=no.pt"], capsys) == "--checkpoint no.pt: no such file or folder"
    assert os.listdir(empty) == ["page.pt"]


def test_classes_of_the_evaluation(checkpoint, digits, folder, capsys):
    message = refused(
        [
            f"--checkpoint={checkpoint}",
            "--format=int8",
            f"--calibration={folder / 'train'}",
            f"--eval-data={digits['val']}",
        ],
        capsys,
    )
    assert message.startswith(f"{digits['val']}: has 10 classes, the model 3")


def test_existing_files_are_kept(checkpoint, tmp_path, capsys):
    old = tmp_path / "resnet10.onnx"
    old.write_text("old")
    argv = [f"--checkpoint={checkpoint}", f"--output_dir={tmp_path}", "--format=onnx"]
    message = refused(argv, capsys)
    assert message == f"{old}: exists; add --overwrite, or give another --output_dir"
    assert old.read_text() == "old"


def test_overwrite_and_a_failed_verification(tmp_path, monkeypatch, capsys):
    """pt2 needs no package; its outputs are replaced by some that differ."""
    checkpoint = save_small(Small, tmp_path / "small.safetensors", monkeypatch)
    output = tmp_path / "out"
    output.mkdir()
    old = output / "small.pt2"
    old.write_text("old")
    argv = [
        f"--checkpoint={checkpoint}",
        f"--output_dir={output}",
        "--img_size=8",
        "--format=pt2",
        "--overwrite",
        "--verify",
        "--no-latency",
    ]
    opened = export_models.open_written

    def changed(name, content, threads):
        run = opened(name, content, threads)
        return lambda images: tuple(output + 0.01 for output in run(images))

    monkeypatch.setattr(export_models, "open_written", changed)
    message = refused(argv, capsys)
    assert message.startswith("--verify: pt2 differs by ")
    assert message.endswith("more than --tolerance 0.001; nothing was written")
    assert old.read_text() == "old"

    assert cli.main(["export", *argv, "--tolerance=0.02", "--batch_size=3"]) == 0
    assert "verify: noise, batch 1, 3, 7" in capsys.readouterr().out
    assert old.read_bytes()[:2] == b"PK"  # an archive
    assert os.listdir(output) == [old.name]


def test_a_link_with_another_name(tmp_path, monkeypatch):
    """checkpoint/vit-4-ckpt.t7, the newest run's weights, as in vision-transformers-cifar10."""
    checkpoint = save_small(Small, tmp_path / "small.safetensors", monkeypatch)
    link = tmp_path / "small-4-ckpt.t7"
    link.symlink_to(checkpoint)
    args = SimpleNamespace(checkpoint=str(link), model_type="small", img_size=None)
    for flag in ("mrl", "efficient", "rep_size", "old_ckpt", "adapter"):
        setattr(args, flag, None)
    assert export_models.load(args).spec.arch == "small"


def test_a_missing_package(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(packages, "is_installed", lambda name: name != "onnxruntime")
    argv = [f"--checkpoint={checkpoint}", f"--output_dir={tmp_path / 'out'}"]
    message = refused(argv, capsys)
    expected = "--format onnx needs onnxruntime: pip install 'matryoshka-vision[export]'"
    assert message == expected
    packages.check_packages(["pt2", "torchscript"])  # these need none


def test_models_that_cannot_be_exported(tmp_path, monkeypatch, capsys):
    for trunk, size, message in (
        (Odd, 8, "--format onnx: cannot export small: No ONNX function found for"),
        (Small, 4, "small does not take images of 4 pixels ("),
        (Branching, 8, "torch.export cannot record small: Could not guard on data-dependent"),
    ):
        path = save_small(trunk, tmp_path / "small.safetensors", monkeypatch)
        output = tmp_path / "out"
        argv = [f"--checkpoint={path}", f"--img_size={size}", f"--output_dir={output}"]
        assert refused(argv, capsys).startswith(message)
        assert not output.exists()


def test_quiet_restores_everything(capfd):
    def loud():
        print("dropped")
        print("dropped", file=sys.stderr)
        raise ValueError("kept")

    with pytest.raises(ValueError, match="kept"), quiet.quiet():
        loud()
    print("seen")
    assert capfd.readouterr() == ("seen\n", "")


@pytest.mark.parametrize(
    ("program", "cwd"),
    [("export_models.py", ROOT / "inference"), ("inference/export_models.py", ROOT)],
)
def test_the_program_starts_in_place(program, cwd):
    """As the README of vision-transformers-cifar10 has it; a mistake is found before torch."""
    command = [sys.executable, program, "--checkpoint", "no", "--model_type", "vit"]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: --checkpoint no: no such file or folder\n"


def test_folders_are_looked_at_before_the_export(checkpoint, empty, monkeypatch, capsys):
    monkeypatch.setattr(export_models, "record", lambda *_: pytest.fail("too late"))
    (empty / "file").write_text("")
    (empty / "none").mkdir()
    inside = refused([f"--checkpoint={checkpoint}", "--output_dir=file/in"], capsys)
    assert inside == "--output_dir file/in: Not a directory"
    words = [f"--checkpoint={checkpoint}", "--verify", "--images=none"]
    assert refused(words, capsys).startswith("none: ")
    assert sorted(os.listdir(empty)) == ["file", "none"]
