"""The bench of evaluation runs through with tiny arguments."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _bench(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import record

    monkeypatch.setattr(record, "RESULTS", tmp_path)


def test_the_evaluation_bench(capsys, tmp_path):
    import evaluation as bench

    few = [
        "--arch",
        "resnet10",
        "--res",
        "32",
        "--batch",
        "2",
        "--classes",
        "20",
        "--device",
        "cpu",
        "--blocks",
        "1",
    ]
    assert bench.main([*few, "--seconds", "0", "--images", "60", "--loop-images", "20"]) == 0
    said = capsys.readouterr().out
    for words in (
        "7 prefixes over one, resnet10 32 px x 2: ",
        " % of the loader's rate",
        "cascade of [9, 60, 20]",
    ):
        assert words in said
    rows = [json.loads(line) for line in (tmp_path / "evaluation.jsonl").read_text().splitlines()]
    prefixes, loop, analysis = rows
    assert prefixes["time / FF"]["n"] == 1
    assert 0 < loop["waiting"]["median"] <= 1, "waiting time as a fraction of the loop's time"
    assert loop["of the loader"]["median"] > 0, "seconds of the loader alone"
    assert analysis["peak bytes"] > 10**7, "peak memory of the analysis in bytes"
    assert analysis["cpu seconds"] > 0, "CPU seconds of the analysis"
