"""Other people's trainers on our data: the examples of docs/loader.md, where they are installed."""

import contextlib
import re
from pathlib import Path

import pytest

from matryoshka.data import ImageFolder, write_beton

PAGE = Path(__file__).resolve().parents[2] / "docs/loader.md"
TRAINERS = {  # module: what its run prints for every step
    "lightly": r"epoch (\d): loss (\d+\.\d+)",
    "transformers": r"'loss': '?(\d+\.\d+)",
}


@pytest.mark.parametrize("module", TRAINERS)
def test_the_example_trains(module, tmp_path, folder, capsys):
    pytest.importorskip(module, reason=f"{module} is not installed: make trainers")
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (example,) = [block for block in blocks if f"from {module}" in block]
    data = ImageFolder(folder / "train")
    write_beton(data, tmp_path / "train.beton", max_resolution=500, write_mode="jpg")
    with contextlib.chdir(tmp_path):
        exec(compile(example, module, "exec"), {})
    steps = re.findall(TRAINERS[module], capsys.readouterr().out)
    assert len(steps) == 4, "steps of two batches of 8 out of 20 images, twice"
