"""Errors of `writer=ffcv` and `loader=ffcv`; test_interop.py tests their function."""

import pytest
from beton_files import pngs
from matryoshka.train import train_imagenet, write_imagenet

from matryoshka.data import BetonError, ffcv_backend


@pytest.fixture
def missing(monkeypatch):
    monkeypatch.setattr(ffcv_backend, "is_installed", lambda name: False)


def test_without_ffcv_one_line_says_how_to_install_it(missing, digits, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        train_imagenet.main(
            [
                f"--data.train_dataset={digits['train']}",
                f"--data.val_dataset={digits['val']}",
                "--data.loader=ffcv",
            ]
        )
    said = capsys.readouterr().err
    assert (caught.value.code, said.count("\n")) == (2, 1)
    assert said.startswith("error: data.loader=ffcv needs FFCV")
    assert "pip install '.[ffcv]'" in said
    options = [
        "--cfg.dataset=digits",
        "--cfg.split=val",
        "--cfg.writer=ffcv",
        "--cfg.max_resolution=32",
    ]
    with pytest.raises(SystemExit) as caught:
        write_imagenet.main([*options, f"--cfg.write_path={tmp_path / 'x'}"])
    assert caught.value.code == 2
    assert "writer=ffcv needs FFCV" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_not_for_ffcvs_loader(folder, digits, monkeypatch, capsys):
    monkeypatch.setattr(ffcv_backend, "is_installed", lambda name: True)
    with pytest.raises(SystemExit):
        train_imagenet.main(
            [
                f"--data.train_dataset={folder / 'train'}",
                f"--data.val_dataset={folder / 'val'}",
                "--data.loader=ffcv",
            ]
        )
    assert "data.loader=native" in capsys.readouterr().err
    with pytest.raises(BetonError, match="is a folder"):
        ffcv_backend.FFCVLoader(folder / "train", 4)


REFUSED = [
    ("seed=1: writer=ffcv .*proportion", {"seed": 1, "write_mode": "proportion"}),
    ("transcode=fit: .*writer=native", {"transcode": "fit", "write_mode": "jpg"}),
    ("subset=5.* 1 to 4", {"subset": 5}),
    ("num_workers=-1", {"num_workers": -1}),
    ("smart_threshold=5 .*write_mode=raw", {"smart_threshold": 5, "write_mode": "raw"}),
]


@pytest.mark.parametrize(("message", "options"), REFUSED)
def test_options_that_ffcv_does_not_have(missing, tmp_path, message, options):
    with pytest.raises(BetonError, match=message):
        ffcv_backend.write_with_ffcv(pngs(4), tmp_path / "x", **{"max_resolution": 9} | options)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("batch_size=100: .*3 processes", {"batch_size": 100, "world": 3}),
        ("quasi_random", {"order": "quasi_random"}),
    ],
)
def test_what_ffcvs_loader_does_not_do(missing, digits, message, options):
    with pytest.raises(BetonError, match=message):
        ffcv_backend.FFCVLoader(digits["train"], **{"batch_size": 8, "world": 2} | options)
