"""Tables and intervals."""

import numpy as np
import pytest
from scipy.stats import binomtest

from matryoshka.report import accuracy_table, plot_accuracy, wilson_interval


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (7, 10), (10, 10), (357, 360), (38000, 50000)])
def test_wilson_interval_equals_scipy(hits, n):
    expected = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    assert wilson_interval(100 * hits / n, n) == pytest.approx((100 * expected.low, 100 * expected.high), abs=2e-3)


def test_table_shows_what_there_is():
    rows = accuracy_table({8: {"top1": 66.631, "top5": 88.0, "ff_top1": 65.3}, 2048: {"top1": 76.8, "top5": 93.2}})
    assert [line.split() for line in rows.splitlines()] == [
        ["prefix", "top-1", "%", "top-5", "%", "FF", "top-1", "%"],
        ["8", "66.63", "88.00", "65.30"],
        ["2048", "76.80", "93.20", "-"],
    ]


def test_plot_draws_both_curves(tmp_path):
    from PIL import Image

    plot_accuracy(tmp_path / "a.png", {8: {"top1": 60.0, "ff_top1": 55.0}, 16: {"top1": 90.0}}, "title", 100)
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).reshape(-1, 3).tolist()
    assert [0x1F, 0x5F, 0xA8] in pixels
    assert [0xD1, 0x49, 0x5B] in pixels
