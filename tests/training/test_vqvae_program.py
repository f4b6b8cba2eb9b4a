"""`matryoshka vqvae` on a few photos, and the transformer that uses its file."""

import re

import pytest
import torch
from matryoshka.train import train_vqvae

from matryoshka.models import ModelConfig, model_spec
from matryoshka.models.vqvae import read_encoder

FAST = (
    "--data.size=16",
    "--data.num_workers=1",
    "--model.hiddens=8",
    "--model.residual_hiddens=4",
    "--model.codes=8",
    "--model.code_dim=4",
    "--training.batch_size=8",
    "--training.device=cpu",
)


def start(folder, path, *options):
    arguments = [f"--data.train_dataset={folder}", f"--output.path={path}"]
    return train_vqvae.main([*arguments, *FAST, *options])


def test_training_writes_an_encoder(folder, tmp_path, capsys):
    path = tmp_path / "new" / "vqvae.safetensors"
    options = ("--training.steps=60", "--training.log_every=20", "--training.lr=0.005")
    assert start(folder, path, f"--data.val_dataset={folder}", *options) == 0
    text = capsys.readouterr().out
    errors = [float(x) for x in re.findall(r"^step .*error ([\d.]+)", text, re.MULTILINE)]
    assert len(errors) == 3
    assert errors[-1] < errors[0]
    last = re.search(r"validation set: error ([\d.]+)  perplexity ([\d.]+)", text)
    assert last is not None
    assert float(last[1]) < errors[0]
    assert 1 <= float(last[2]) <= 8

    stored = read_encoder(path)
    assert stored.sizes.code_dim == 4
    assert stored.mean == (0.485, 0.456, 0.406)
    assert stored.encoder(torch.zeros(1, 3, 16, 16)).shape == (1, 4, 4, 4)
    options = (f"vqvae={path}", "dim=8", "depth=1", "heads=1", "image_size=16")
    model_spec(ModelConfig(arch="vitfixedposvqvae", arch_options=options), 3)


def test_the_same_seed_gives_the_same_file(folder, tmp_path):
    for name in ("a", "b"):
        start(folder, tmp_path / f"{name}.safetensors", "--training.steps=3")
    a, b = (tmp_path / f"{name}.safetensors" for name in ("a", "b"))
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model.patch=6"], "power of two"),
        (["--data.size=18"], "data.size=18"),
        (["--output.path=vqvae.pt"], ".safetensors"),
        (["--data.mean=0.5,0.5"], "three numbers"),
        (["--training.lr=1e9"], "training.lr"),
        (["--training.steps=2", "--training.lr=10", "--training.log_every=1"], "training.lr=10"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(folder, tmp_path, capsys, options, words):
    path = tmp_path / "vqvae.safetensors"
    with pytest.raises(SystemExit, match=r"^2$"):
        start(folder, path, *options)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert list(tmp_path.iterdir()) == []
