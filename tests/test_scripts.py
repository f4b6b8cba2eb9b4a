"""scripts/: each runs from the root and from its folder, with options that its program accepts; and
the two programs under their old places in the root.

Shell scripts find a program `matryoshka` that notes its words: these are parsed by the real one, or
run in this process. Scripts in Python run in this process.
"""

import contextlib
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from matryoshka.inference import compare_dims, report
from matryoshka.train import sweep

from matryoshka.evaluation.dims_options import dims_parser
from matryoshka.training.cifar_options import parser as cifar_parser

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
STUB = (
    '#!/bin/sh\nfor word in "$@"; do printf "%s\\n" "$word" >> "$WORDS"; done\necho >> "$WORDS"\n'
)
NET = "vitfixedposdualpatchnorm"
MODEL = f"{NET}_cifar10_patch8"


@pytest.fixture(scope="module")
def root(tmp_path_factory, small_nested):
    """A copy of the scripts beside the exports of a training run, and the noting program."""
    folder = tmp_path_factory.mktemp("root")
    shutil.copytree(SCRIPTS, folder / "scripts")
    shutil.copytree(SCRIPTS.parent / "sweeps", folder / "sweeps")
    (folder / "checkpoint/nested_models").mkdir(parents=True)
    for path in (small_nested / "checkpoint/nested_models").iterdir():
        shutil.copy(path, folder / "checkpoint/nested_models")
    (folder / "bin").mkdir()
    (folder / "bin/matryoshka").write_text(STUB)
    (folder / "bin/matryoshka").chmod(0o755)
    return folder


def calls(root, script, *words, start="."):
    """The words of each call of `matryoshka` that a shell script makes; (status, calls)."""
    noted = root / "words"
    noted.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "PATH": f"{root / 'bin'}:{os.environ['PATH']}",
        "WORDS": str(noted),
    }
    path = os.path.relpath(root / "scripts" / script, root / start)
    done = subprocess.run(
        ["bash", path, *words],
        cwd=root / start,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    text = noted.read_text() if noted.exists() else ""
    found = [call.split("\n") for call in text.removesuffix("\n\n").split("\n\n") if call]
    return done, found


def run_python(root, script, *words, start="."):
    """Run a script in Python as `python scripts/X.py` does; its exit status."""
    with contextlib.chdir(root / start), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *words])
        try:
            runpy.run_path(str(root / "scripts" / script), run_name="__main__")
        except SystemExit as end:
            return end.code or 0
    return 0


def test_scripts_are_short_and_tested():
    for path in SCRIPTS.iterdir():
        assert len(path.read_text().splitlines()) <= 35
        assert path.suffix == ".py" or os.access(path, os.X_OK)
        assert path.name in Path(__file__).read_text(), f"{path.name}: add a test"


@pytest.mark.parametrize("start", [".", "scripts"])
def test_run_mrl_train(root, start):
    done, (call,) = calls(root, "run_mrl_train.sh", "--data", "photos", start=start)
    assert done.returncode == 0
    assert call[0] == "cifar"
    cfg = cifar_parser().parse_args(call[1:])
    assert cfg.model.arch == "vit_nested_proj"
    assert cfg.model.dims == (8, 16, 32, 64, 128, 256, 512)
    assert cfg.training.epochs == 500
    assert cfg.training.optimizer == "adam"
    assert cfg.cifar.data == ("photos",)


def test_run_non_mrl_train(root, monkeypatch):
    monkeypatch.setenv("DIMS", "8 16")
    _, found = calls(root, "run_non_mrl_train.sh", "--n_epochs", "2", start="scripts")
    options = [cifar_parser().parse_args(call[1:]) for call in found]
    assert [cfg.cifar.dim for cfg in options] == [8, 16]
    assert {cfg.model.arch for cfg in options} == {"vitfixedposdualpatchnorm"}
    assert {cfg.training.epochs for cfg in options} == {2}, "the last one counts"


def test_run_zoo(root):
    epochs = {"vit_small": 400, "swin": 400, "mlpmixer": 500, "res18": 200}
    for net, expected in epochs.items():
        _, (call,) = calls(root, "run_zoo.sh", net, "--patch", "2")
        cfg = cifar_parser().parse_args(call[1:])
        assert cfg.model.arch == net
        assert cfg.training.epochs == expected
        assert cfg.cifar.patch == 2
        assert cfg.lr.lr == (1e-3 if net == "mlpmixer" else 1e-4)
    done, found = calls(root, "run_zoo.sh", "--patch", "2")
    assert done.returncode == 2
    assert not found
    assert done.stderr.count("\n") == 1


def test_compare_optimizers(root):
    _, found = calls(root, "compare_optimizers.sh")
    options = [cifar_parser().parse_args(call[1:]) for call in found]
    assert [cfg.training.optimizer for cfg in options] == ["adan", "adam", "adamw"]
    assert options[0].training.betas == pytest.approx((0.965, 0.89, 0.985))


def test_sweeps(root, capsys):
    _, (call,) = calls(root, "run_sweep.sh", "--trials", "3", start="scripts")
    assert call == ["sweep", "sweeps/adan_betas_decay.yaml", "--trials", "3"]
    assert sweep.parser().parse_args(call[1:]).trials == 3
    _, (call,) = calls(root, "find_top_sweeps.sh")
    args = sweep.parser().parse_args(call[1:])
    assert (args.trials, args.top) == (0, 3)


def test_evaluate_all_nested_models(root, digits, capsys):
    words = ["cifar10", "vitfixedposdualpatchnorm", "8", "--data-root", str(digits["val"])]
    _, (call,) = calls(root, "evaluate_all_nested_models.sh", *words, start="scripts")
    assert call[0] == "dims"
    with contextlib.chdir(root):
        assert compare_dims.main([*call[1:], "--no-latency"]) == 0
    found = json.loads((root / f"eval_results/{MODEL}/dims.json").read_text())
    assert found["dims"] == [8, 16]
    assert found["dataset"] == "cifar10"

    # the page of all results
    _, (call,) = calls(root, "plot_results.sh")
    with contextlib.chdir(root):
        assert report.main([*call[1:], "--samples=0"]) == 0
    assert "cifar10" in (root / "eval_results/report.html").read_text()

    # the matrices again
    assert run_python(root, "plot_confusion_matrices.py", "--output_dir", "plots") == 0
    for dim in (8, 16):
        assert (root / f"plots/{MODEL}_dim{dim}_confusion_matrix.png").is_file()
    assert "has no dims.json" in run_python(
        root, "plot_confusion_matrices.py", "--results_dir", "checkpoint"
    )

    done, found = calls(root, "evaluate_all_nested_models.sh", "cifar100")
    assert done.returncode == 2
    assert not found
    assert "train with --mrl_flag first" in done.stderr


def test_separate_vit_evaluator(root, digits):
    model = f"checkpoint/nested_models/{MODEL}_dim8.pth"
    more = ["--bs", "50", "--num_workers", "1", f"--data-root={digits['val']}"]
    words = ["--model_path", model, *more]
    assert run_python(root, "separate_vit_evaluator.py", *words, start="scripts") == 0
    folder = root / f"eval_results/{MODEL}_dim8"
    assert (folder / "confusion_dim8.csv").is_file()
    assert list((root / f"runs/eval_{MODEL}_dim8").iterdir())


def test_tsne(root, digits):
    words = ["--max_samples", "20", "--perplexity", "5", "--num_workers", "1"]
    more = ["--output_dir", "tsne", f"--data-root={digits['val']}"]
    assert run_python(root, "tsne_nested_vit_embeddings.py", *words, *more) == 0
    assert (root / "tsne/tsne_dim8.png").is_file()
    # run_tsne.sh starts the same script: `python` is looked up as `matryoshka` is.
    shutil.copy(root / "bin/matryoshka", root / "bin/python")
    _, (call,) = calls(root, "run_tsne.sh", "--perplexity", "5", start="scripts")
    (root / "bin/python").unlink()
    assert call == ["scripts/tsne_nested_vit_embeddings.py", "--perplexity", "5"]
    assert dims_parser().parse_args(["--path", "x", "--perplexity", "5"]).perplexity == 5


def test_images_are_those_of_the_run(root, small_nested, digits):
    """Exports are links into their run, which knows its test images: no download of CIFAR-10."""
    exports = small_nested / "checkpoint/nested_models"
    name = MODEL.replace("patch8", "patch9")
    link = root / f"checkpoint/nested_models/{name}_dim8.pth"
    link.symlink_to(exports / f"{MODEL}_dim8.pth")
    _, (call,) = calls(root, "evaluate_all_nested_models.sh", "cifar10", NET, "9")
    assert "--dataset" not in call
    words = ["evaluate_all_nested_models.sh", "cifar10", NET, "9", "--data-root", "photos"]
    _, (call,) = calls(root, *words)
    assert call[call.index("--dataset") + 1] == "cifar10"

    assert run_python(root, "separate_vit_evaluator.py", "--model_path", str(link), "--notb") == 0
    found = json.loads((root / f"eval_results/{name}_dim8/dims.json").read_text())
    link.unlink()
    assert found["data"] == str(digits["val"])
    words = ["--nested_dir", str(exports), "--perplexity", "5", "--output_dir", "tsne_linked"]
    assert run_python(root, "tsne_nested_vit_embeddings.py", *words) == 0
    found = json.loads((root / "tsne_linked/dims.json").read_text())
    assert found["data"] == str(digits["val"])


@pytest.mark.parametrize(
    ("face", "program", "flag"),
    [
        ("train_cifar10.py", "cifar", "--mrl_flag"),
        ("export_models.py", "export", "--model_type"),
    ],
)
def test_old_names_in_the_root(face, program, flag, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [face, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPTS.parent / face), run_name="__main__")
    assert not end.value.code
    out = capsys.readouterr().out
    assert f"matryoshka {program}" in out
    assert flag in out
    monkeypatch.setattr(sys, "argv", [face, "--no_such_option"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPTS.parent / face), run_name="__main__")
    assert end.value.code == 2
