"""The benches of training steps run through with tiny arguments; what they compare is compared here
by value.
"""

import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _bench(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import record

    monkeypatch.setattr(record, "RESULTS", tmp_path)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_step_bench(capsys, tmp_path, monkeypatch):
    import step as bench

    def no_compiler(*args, **kwargs):
        raise RuntimeError("no compiler here\nand more")

    monkeypatch.setattr(torch, "compile", no_compiler)
    few = [
        "--arch",
        "resnet10",
        "--res",
        "32",
        "--batch",
        "2",
        "--modes",
        "eager",
        "compiled",
        "--device",
        "cpu",
    ]
    few += [
        "--blocks",
        "1",
        "--seconds",
        "0",
        "--classes",
        "5",
        "--widths",
        "16",
        "--head-batch",
        "3",
    ]
    assert bench.main(few) == 0
    said = capsys.readouterr().out
    assert "MRL-E, 16 x 3 " in said
    assert (
        "not measured: MRL (resnet10 32 px x 2, compiled): RuntimeError: no compiler here\n" in said
    )
    rows = rows_of(tmp_path / "step.jsonl")
    assert {row["hardware"]["cpu"] for row in rows} == {rows[0]["hardware"]["cpu"]}
    heads = [row for row in rows if row["case"] == "head and loss"]
    assert [row["way"] for row in heads] == 2 * ["fused", "prefixes", "official"]
    steps = {row["kind"]: row for row in rows if row not in heads}
    assert list(steps) == list(bench.KINDS)
    assert steps["FF"]["time / FF"]["median"] == 1
    assert steps["MRL"]["flops"] > steps["FF"]["flops"] > 0, (
        "floating-point operations of a step: MRL adds heads to FF"
    )
    assert 0 < steps["MRL"]["of matmul"] < 2, "fraction of the rate of a matrix product"


def test_cases_with_and_without_blurpool(tmp_path):
    import step as bench

    few = ["--cases", "resnet10:32:2", "--blurpool", "0", "1", "--kinds", "FF", "MRL"]
    few += ["--device", "cpu", "--blocks", "2", "--seconds", "0", "--classes", "5", "--widths"]
    assert bench.main(few) == 0
    rows = rows_of(tmp_path / "step.jsonl")
    name = "resnet10 32 px x 2, eager"
    cases = [*4 * [name], *4 * [f"{name}, BlurPool"]]
    assert [row["case"] for row in rows] == cases
    # what is kept if the program is killed, then what counts
    assert [row["images_per_s"]["n"] for row in rows] == 2 * [1, 1, 2, 2]
    assert [row["kind"] for row in rows] == 4 * ["FF", "MRL"]
    assert rows[4]["flops"] > rows[0]["flops"], "BlurPool adds filters"
    with pytest.raises(SystemExit, match="2"):
        bench.main(["--cases", "resnet10:32"])


def test_a_case_that_has_no_time_is_named(capsys):
    import step as bench

    assert bench.main(["--device", "cpu", "--limit", "-1", "--no-record"]) == 0
    said = capsys.readouterr().out
    assert "not measured: rn50 64 px x 16, eager: no time left (--limit)" in said
    assert "not measured: MRL, 512 x 16: no time left (--limit)" in said


@pytest.mark.parametrize("shared", [False, True])
def test_the_papers_loops_compute_the_same(shared):
    """Head and loss from the paper's description against ours: loss and all gradients."""
    import training

    kinds = (training.MRL_E, training.OFFICIAL_E) if shared else (training.MRL, training.OFFICIAL)
    ours, theirs = (training.objective(kind, torch.nn.Identity(), 20, 7).double() for kind in kinds)
    theirs.load_state_dict(ours.state_dict())
    labels = torch.randint(0, 7, (6,))
    features = [torch.randn(6, 20, dtype=torch.float64).requires_grad_()]
    features.append(features[0].detach().clone().requires_grad_())
    losses = []
    for compute, inputs in zip((ours, theirs), features, strict=True):
        losses.append(compute(inputs, labels))
        losses[-1].backward()
    torch.testing.assert_close(
        *losses, rtol=1e-6, atol=1e-6
    )  # the loss itself is computed in float32
    torch.testing.assert_close(*(x.grad for x in features), rtol=1e-6, atol=1e-6)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-6)


def test_what_a_call_asks_for():
    import machine

    x, w = torch.randn(3, 5), torch.randn(7, 5)
    assert machine.work_of(lambda: x @ w.T) == (
        2 * 3 * 5 * 7,
        4 * (3 * 5 + 5 * 7 + 3 * 7),
    )  # the transpose moves nothing


@pytest.mark.parametrize("own", [True, False])
def test_the_end_to_end_bench(own, digits, capsys, tmp_path):
    import end_to_end as bench

    few = [
        "--arch",
        "resnet10",
        "--res",
        "32",
        "--batch",
        "4",
        "--steps",
        "2",
        "--blocks",
        "1",
        "--device",
        "cpu",
    ]
    few += ["--images", "8"] if own else ["--data", str(digits["train"]), "--classes", "3"]
    assert bench.main(few) == 0
    said = capsys.readouterr().out
    assert "loader, 1 threads" in said
    assert "not measured" not in said
    (row,) = rows_of(tmp_path / "end_to_end.jsonl")
    assert row["of synthetic"]["n"] == 1
    assert 0 <= row["data_wait"]["median"] < 1, "data wait as a fraction of the step"


def test_the_bench_of_resident_sets(capsys, tmp_path):
    import resident as bench

    few = ["--arch", "resnet10", "--batch", "8", "--blocks", "1", "--seconds", "0.01"]
    assert bench.main([*few, "--device", "cpu"]) == 0
    assert "crop, flip" in capsys.readouterr().out
    rows = rows_of(tmp_path / "resident.jsonl")
    assert [row["case"] for row in rows] == [f"resnet10, {name}" for name in bench.CASES]
    for row in rows:
        share = row["share of a step"]
        assert 0 < share["min"] <= share["median"] <= share["max"] < 1


def test_the_views_bench(capsys, tmp_path):
    import views as bench

    argv = ["--size", "8", "--batch", "4", "--blocks", "1", "--seconds", "0.01", "--device", "cpu"]
    assert bench.main(argv) == 0
    assert "8 px: " in capsys.readouterr().out
    (row,) = rows_of(tmp_path / "views.jsonl")
    assert row["images/s"]["matryoshka"] > 0
