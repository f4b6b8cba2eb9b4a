"""Accuracy tables, intervals, plots, and reading of run folders."""

import json

import numpy as np
import pytest
from scipy.stats import binomtest

from matryoshka.report import (
    RunError,
    accuracy_table,
    plot_accuracy,
    plot_run,
    read_run,
    short_dims,
    wilson_interval,
)
from matryoshka.training.run_folder import RunLog


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (7, 10), (10, 10), (357, 360), (38000, 50000)])
def test_wilson_interval_equals_scipy(hits, n):
    expected = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(100 * hits / n, n) == pytest.approx(
        (100 * expected.low, 100 * expected.high), abs=2e-3
    ), "interval differs from SciPy"


def test_table_has_the_given_columns():
    rows = accuracy_table(
        {8: {"top1": 66.631, "top5": 88.0, "ff_top1": 65.3}, 2048: {"top1": 76.8, "top5": 93.2}}
    )
    assert [line.split() for line in rows.splitlines()] == [
        ["prefix", "top-1", "%", "top-5", "%", "FF", "top-1", "%"],
        ["8", "66.63", "88.00", "65.30"],
        ["2048", "76.80", "93.20", "-"],
    ]


def test_plot_draws_both_curves(tmp_path):
    from PIL import Image

    plot_accuracy(
        tmp_path / "a.png", {8: {"top1": 60.0, "ff_top1": 55.0}, 16: {"top1": 90.0}}, "title", 100
    )
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).reshape(-1, 3).tolist()
    assert [0x1F, 0x5F, 0xA8] in pixels
    assert [0xD1, 0x49, 0x5B] in pixels


# ---------------------------------------------------------------- runs

MRL = {"model.arch": "resnet18", "model.mrl": 1}


def write_run(path, params, epochs):
    log = RunLog(path, params, "")
    for epoch, values in enumerate(epochs):
        log.write_line(
            {"current_lr": 0.5 / (epoch + 1), **values, "train_loss": 4.0 - epoch, "epoch": epoch}
        )
    log.close()
    return path


def curves(axes):
    """{legend label or number: ([x], [y])} of the lines with points."""
    lines = [line for line in axes.lines if len(line.get_xdata())]
    return {
        line.get_label(): (list(line.get_xdata()), pytest.approx(list(line.get_ydata())))
        for line in lines
    }


def test_plot_run_draws_the_log(tmp_path):
    from PIL import Image

    dims = [8 * 2**i for i in range(9)]
    epochs = [
        {f"{of}top_1_{d}": (e + i / 10) / 10 for i, d in enumerate(dims) for of in ("", "ema_")}
        for e in (1, 3, 2)
    ]
    figure = plot_run(write_run(tmp_path / "a $run$", MRL, epochs), tmp_path / "run.png")
    above, below, rate = figure.axes
    shown = curves(above)
    for i, d in enumerate(dims):  # the legend names the accuracy of the best epoch, 1
        assert shown[f"{d:>4}: {30 + i:5.1f}"] == ([0, 1, 2], [10 + i, 30 + i, 20 + i]), (
            f"curve of prefix {d}"
        )
    assert len(shown) == 2 * len(dims) + 1, "number of curves"
    texts = [text.get_text() for text in above.get_legend().get_texts()]
    assert texts == [f"{d:>4}: {30 + i:5.1f}" for i, d in reversed(list(enumerate(dims)))] + [
        "average\nof weights"
    ]
    assert [list(curves(axes).values()) for axes in (below, rate)] == [
        [([0, 1, 2], [4.0, 3.0, 2.0])],
        [([0, 1, 2], [0.5, 0.25, 0.5 / 3])],
    ], "loss or learning rate"
    assert (above.get_title(loc="left"), above.get_title(loc="right")) == (
        "resnet18 mrl 8-2048",
        "a $run$",
    )
    colours = [line.get_color() for line in above.lines if line.get_label() in texts[:-1]]
    assert len(set(colours)) == len(dims), "two curves share a colour"
    image = np.asarray(Image.open(tmp_path / "run.png").convert("RGB"))
    assert image.shape == (975, 1200, 3), "size of the picture"
    assert all(
        (image == np.round(255 * np.array(c[:3])).astype(int)).all(2).any() for c in colours
    ), "a colour is missing in the picture"
    box = above.get_legend().get_window_extent()
    assert box.x1 <= figure.bbox.x1, "the legend is cut off at the right"  # nothing is cut off
    assert box.y0 >= above.get_window_extent().y0, "the legend is cut off below"


@pytest.mark.parametrize(
    "epochs", [[], [{}], [{}] * 40 + [{"top_1": 0.5}], [{"top_1": float("nan")}], [{"top_1": "x"}]]
)
def test_plot_run_of_short_logs(tmp_path, epochs):
    run = write_run(
        tmp_path / "run", {"model.arch": "resnet18", "model.fixed_feature": 16}, [*epochs]
    )
    (run / "log").touch()
    figure = plot_run(run, tmp_path / "run.png")
    shown = [line for line in figure.axes[0].lines if line.get_label() == "  16:  50.0"]
    assert [line.get_marker() for line in shown] == ["o"] * ({"top_1": 0.5} in epochs), (
        "a single point needs a marker"
    )
    assert figure.axes[0].get_title(loc="left") == "resnet18 ff16"


def test_plot_run_of_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"params\.json"):
        plot_run(tmp_path / "nothing", tmp_path / "run.png")
    (tmp_path / "params.json").write_text(json.dumps(MRL))
    with pytest.raises(FileNotFoundError, match="log"):
        plot_run(tmp_path, tmp_path / "run.png")
    (tmp_path / "params.json").write_text("[]")
    with pytest.raises(RunError, match=r"params\.json"):
        plot_run(tmp_path, tmp_path / "run.png")
    assert not (tmp_path / "run.png").exists()


def test_torn_lines_are_left_out(tmp_path):
    run = write_run(
        tmp_path, MRL, [{"top_1_8": 0.25, "top_1_12": 0.5}, {"top_1_8": 0.5, "top_1_12": 0.75}]
    )
    whole = read_run(run)
    first, second = (run / "log").read_bytes().splitlines(keepends=True)
    torn = [
        b'{"epoch": 1, "top_',
        b"\0\0\0\n",
        b"[1]\n",
        b"\xff\xfe\n",
        b'{"epoch": "x"}\n',
        b"[" * 100_000 + b"\n",
    ]
    (run / "log").write_bytes(first + b"".join(torn[1:]) + second + torn[0])
    assert read_run(run) == whole
    assert whole.top1() == {"8": {0: 25, 1: 50}, "12": {0: 50, 1: 75}}, (
        "accuracies of the log in percent"
    )
    assert whole.best() == (1, {"8": 50, "12": 75}), "best epoch"


@pytest.mark.parametrize(
    ("params", "log", "expected"),
    [
        ({"model.mrl": 1}, {"top_1_8": 0.5, "top_1_16": 0.5}, ("mrl", (8, 16))),
        ({"model.efficient": 1, "model.mrl": 1, "model.dims": [8, 12]}, {}, ("mrl-e", (8, 12))),
        ({"model.mrl": 1, "model.dims": [16]}, {"top_1": 0.5}, ("ff16", (16,))),
        ({"model.mrl": 1}, {}, ("mrl", ())),
        ({"model.fixed_feature": 8}, {"top_1": 0.5}, ("ff8", (8,))),
        ({"model.fixed_feature": 0}, {"top_1": 0.5}, ("ff", ())),
        ({"model.mrl": 1, "model.dims": 5}, {}, ("mrl", ())),
    ],
)
def test_the_head_of_a_run_without_a_checkpoint(tmp_path, params, log, expected):
    run = read_run(write_run(tmp_path, {"model.arch": "resnet18", **params}, [log]))
    assert (run.head, run.dims) == expected
    assert [len(values) for values in run.top1().values()] == [1] * len(log), (
        "number of logged accuracies"
    )


def test_a_checkpoint_gives_the_width_of_a_trunk(tmp_path):
    from matryoshka.checkpoint.model_file import save_model
    from matryoshka.models import ModelSpec, build

    run = write_run(
        tmp_path, {"model.arch": "resnet18", "model.fixed_feature": 0}, [{"top_1": 0.5}]
    )
    save_model(build(ModelSpec("resnet10", 3, (512,))), tmp_path / "model.safetensors")
    found = read_run(run)
    assert (found.arch, found.head, found.top1()) == ("resnet10", "ff512", {"512": {0: 50}})
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    assert read_run(run).head == "ff"


@pytest.mark.parametrize(
    ("dims", "text"),
    [
        ((8, 16, 32), "8-32"),
        ((8, 12), "8,12"),
        ((8, 32, 512), "8,32,512"),
        ((8, 12, 16, 512), "8,12..512"),
        ((8,), ""),
    ],
)
def test_short_dims(dims, text):
    assert short_dims(dims) == text
