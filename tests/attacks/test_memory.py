"""Batches larger than the free memory: an error before anything is written, in every program."""

import pytest
import small_commands

from matryoshka import cli


@pytest.fixture
def free(monkeypatch):
    """Sets the bytes that are free."""

    def leave(count):
        for module in ("budget", "resident"):
            monkeypatch.setattr(f"matryoshka.data.{module}.free_memory", lambda: count)

    return leave


PROGRAMS = ("embed", "train", "eval", "cifar", "ssl", "vqvae", "probe", "dims", "baselines")


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_end_in_one_line_and_write_nothing(free, inputs, tmp_path, capsys, name):
    free(100)
    with pytest.raises(SystemExit, match=r"^2$"):
        cli.main(small_commands.command(name, inputs, tmp_path))
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert ".beton: memory for " in said
    assert not any(tmp_path.iterdir())


def test_the_last_resolution_of_a_training_is_looked_at_first(free, inputs, tmp_path, capsys):
    train = [
        "train",
        f"--data.train_dataset={inputs / 'train.beton'}",
        f"--data.val_dataset={inputs / 'val.beton'}",
        f"--logging.folder={tmp_path}",
        "--model.arch=resnet10",
        "--training.device=cpu",
        "--training.batch_size=8",
        "--data.resident=0",
        "--resolution.min_res=32",
        "--resolution.max_res=4096",
        "--validation.resolution=32",
    ]
    free(1 << 30)
    with pytest.raises(SystemExit, match=r"^2$"):
        cli.main(train)
    assert "4 batches of 8 images of 4096x4096" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
