"""docs/results.md says that nothing has run on a GPU until a row says otherwise."""

import json
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MACHINE = {
    "git": {"commit": "c0ffee1" * 5, "dirty": False},
    "hardware": {"cpu": "Some CPU", "cores": 16, "gpus": ["NVIDIA H200"]},
}
TIMES = {"n": 3, "median": 1.01, "min": 1.0, "max": 1.02}
SPEED = {"n": 3, "median": 5678.0, "min": 5600.0, "max": 5700.0}
STEP = {
    "case": "rn50 224 px x 256, compiled",
    "kind": "MRL",
    "images_per_s": SPEED,
    "time / FF": TIMES,
    "of matmul": 0.18,
    "of copy": 0.5,
}
FEED = {
    "case": "rn50 224 px x 256, eager",
    "feed": "loader, 8 threads",
    "images_per_s": SPEED,
    "of synthetic": {"median": 0.99},
    "data_wait": {"median": 0.004},
}
TRAINED = {
    "case": "classification",
    "data": "Tiny-ImageNet, 50 classes",
    "model": "resnet18, mrl",
    "training": "40 epochs",
    "images_per_s": 54321.0,
    "dims": [8, 512],
    "top1": [51.25, 61.75],
    "top5": [77.0, 88.0],
}
ROWS = [
    ("step", STEP, "| rn50 224 px x 256, compiled | MRL | 5,678 (5,600 to 5,700) |"),
    ("end_to_end", FEED, "| loader, 8 threads | 5,678 (5,600 to 5,700) | 99.0 % | 0.4 % |"),
    ("accuracy", TRAINED, "| resnet18, mrl; 40 epochs | 54,321 | 51.2 / 77.0 | 61.8 / 88.0 |"),
]


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import results_page

    shutil.copytree(ROOT / "bench" / "results", tmp_path / "results")
    monkeypatch.setattr(results_page, "RESULTS", tmp_path / "results")
    for name in results_page.ON_BOTH:  # as before the first GPU
        path = tmp_path / "results" / f"{name}.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if not json.loads(line)["hardware"].get("gpus")]
        path.write_text("".join(f"{line}\n" for line in kept))
    return results_page


def test_without_a_gpu(page):
    assert page.on_a_gpu() == ["## On a GPU", "", page.NO_GPU, ""]
    assert page.NO_GPU in page.render()


@pytest.mark.parametrize(("name", "row", "line"), ROWS, ids=[name for name, _, _ in ROWS])
def test_with_a_gpu(page, name, row, line):
    before = page.render()
    with open(page.RESULTS / f"{name}.jsonl", "a") as file:
        file.write(json.dumps(MACHINE | row) + "\n")
    text = page.render()
    assert page.NO_GPU not in text
    assert line in text
    assert "commit c0ffee1, NVIDIA H200, Some CPU, 16 cores." in text
    first, last = text.index("## On a GPU"), text.index("## Killed")
    assert text[:first] + text[last:] == before.replace(f"## On a GPU\n\n{page.NO_GPU}\n\n", ""), (
        "a row of a GPU changes the other sections"
    )
