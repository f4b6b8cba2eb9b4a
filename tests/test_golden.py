"""The numbers in golden.json still come out. golden.py says which, and writes them anew.

python -m pytest tests/test_golden.py
"""

import json
import math

import golden
import pytest

RELATIVE, RECALL = 1e-4, 1e-2  # differences between CPUs
WRITE = "if the change is meant: python tests/golden.py record --committed"


def is_near(name: str, a: float, b: float) -> bool:
    """Whether two values of `floats` are those of the same program on two CPUs."""
    if name.endswith("/recall"):
        return abs(a - b) <= RECALL
    return math.isclose(a, b, rel_tol=RELATIVE)


@pytest.fixture(scope="module")
def committed():
    return json.loads(golden.COMMITTED.read_text())


def test_the_portable_numbers_are_equal(committed):
    now = golden.computed("portable")
    lines, count = golden.compare(committed, now)
    assert count > 0, "golden.json has no portable values"
    assert not lines, "\n".join([*lines, WRITE])


def test_the_floats_are_near(committed):
    before, now = committed["floats"], golden.computed("machine")["floats"]
    other = sorted(before.keys() ^ now.keys())
    assert not other, f"other names: {other}; {WRITE}"
    far = [
        f"{name}: was {before[name]} and is {now[name]}"
        for name in before
        if not is_near(name, before[name], now[name])
    ]
    assert not far, "\n".join([*far, WRITE])


def test_committed_values_depend_on_no_machine(committed):
    assert set(committed) == set(golden.KEPT), "golden.json has other sections"
