"""The queries that a certificate needs: before a sweep, in the docs, and by other bounds."""

import math
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from matryoshka.retrieval.sweep import grid, highest_bound, queries_needed
from matryoshka.retrieval.sweep_report import outlook

ROOT = Path(__file__).resolve().parents[2]
ROWS = 5000  # of an index of photos; the grid is the same for 1,000 to 200,000


def tried(*indexes: str, dims: tuple[int, ...] = ()) -> int:
    return len(grid(indexes, columns=512, rows=ROWS, dims=dims))


def clopper_pearson(queries: int, error: float) -> float:
    """The exact lower bound of a share of which all `queries` samples are hits."""
    return float(stats.beta.ppf(error, queries, 1))


@given(st.floats(0.9, 0.998), st.integers(1, 400))
@settings(max_examples=40)
def test_against_the_exact_bound_for_hits_and_misses(target, settings_tried):
    """The bound holds for any distribution, so it needs more queries, but few more."""
    needed = queries_needed(target, settings_tried)
    error = 0.05 / settings_tried
    assert clopper_pearson(needed, error) >= target
    exact = math.ceil(math.log(error) / math.log(target))
    assert exact <= needed <= 1.5 * exact + 2


@given(st.integers(1, 3000), st.integers(1, 400))
@settings(max_examples=40)
def test_the_highest_bound_by_its_definition(queries, settings_tried):
    """Wealth of a gambler on a search without loss: mean over stakes of (1 + s (1 - m)) ** n."""
    bound = highest_bound(queries, settings_tried)
    needed = settings_tried / 0.05
    halvings = max(0, math.ceil(0.5 * math.log2(queries / (8 * math.log(needed)))))
    stakes = [0.5**i for i in range(halvings + 1)]
    wealth = [(1 + s * (1 - bound)) ** queries for s in stakes]
    if bound:
        assert sum(wealth) / len(stakes) == pytest.approx(needed, rel=1e-6)
    else:
        assert sum(wealth) / len(stakes) < needed


def test_the_documented_numbers():
    counts = [tried("scan", dims=(64,)), tried("ivf", dims=(64,)), tried("scan", "ivf", "binary")]
    page = (ROOT / "docs/retrieval.md").read_text()
    shown = re.search(r"without lists, (\d+) .*with lists, (\d+) .*arrays, (\d+) settings", page)
    assert shown is not None
    assert [int(n) for n in shown.groups()] == counts
    rows = re.findall(r"^\| (0\.\d+) \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \|$", page, re.MULTILINE)
    assert [float(row[0]) for row in rows] == [0.95, 0.98, 0.99, 0.995]
    for target, *numbers in rows:
        expected = [queries_needed(float(target), count) for count in counts]
        assert [int(n.replace(",", "")) for n in numbers] == expected
    started = (ROOT / "docs/getting_started.md").read_text()
    assert f"takes {queries_needed(0.98, counts[0])} queries" in started
    assert f"takes {queries_needed(0.99, counts[0])} " in started


def test_the_line_before_a_sweep():
    few = outlook(target=0.99, tried=90, queries=450, available=450)
    assert few == (
        "certify  recall 0.99 needs 863 queries or more for 90 settings; 450 certify 0.9807 at "
        "most: give more queries, or --target-recall 0.98"
    )
    assert highest_bound(450, 90) >= 0.98
    more = outlook(target=0.99, tried=90, queries=450, available=900)
    assert more.endswith("450 certify 0.9807 at most: --truth 863")
    assert outlook(target=0.99, tried=90, queries=863, available=863).endswith("measured: 863")
    assert "--target-recall" not in outlook(target=0.99, tried=90, queries=3, available=3)
    assert "no number of queries" in outlook(target=1, tried=9, queries=9, available=9)
