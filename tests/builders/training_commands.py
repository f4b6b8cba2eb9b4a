"""Options of a small training run, and programs that refuse theirs."""

import pytest


def options(data, folder, run_id="run", *more):
    return [
        f"--data.train_dataset={data['train']}",
        f"--data.val_dataset={data['val']}",
        f"--logging.folder={folder}",
        f"--logging.run_id={run_id}",
        "--model.arch=resnet10",
        "--training.batch_size=64",
        "--training.epochs=2",
        "--lr.lr=0.05",
        "--lr.lr_peak_epoch=1",
        "--data.flip=0",
        "--data.scale=0.7,1",
        "--validation.crop_ratio=1",
        "--resolution.min_res=32",
        "--resolution.max_res=32",
        "--validation.resolution=32",
        "--training.device=cpu",
        *more,
    ]


def refused(main, argv, capsys) -> str:
    """main(argv) ends with status 2 and one line; the line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(argv)
    shown = capsys.readouterr()
    assert end.value.code == 2
    lines = shown.err.strip().splitlines()
    assert len(lines) == 1, shown.err
    assert lines[0].startswith("error: ")
    return lines[0]
