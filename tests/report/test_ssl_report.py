"""The page of a self-supervised run: its log in, curves, monitors, warnings and neighbours out."""

import base64
import io
import json
import re

import embedding_folders
import numpy as np
import pytest
from matryoshka.inference import report
from PIL import Image

from matryoshka import json_files

DIMS = [8, 64, 96]
CLASSES = ["ant", "bee"]
EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three epochs of ReLIC, two of them evaluated, and embeddings of 12 grey images."""
    folder = tmp_path_factory.mktemp("ssl") / "run"
    folder.mkdir()
    params = {
        "model.arch": "fast_cnn",
        "model.mrl": True,
        "ssl.method": "relic",
        "data.train_dataset": "/data/photos/train",
    }
    (folder / "params.json").write_text(json.dumps(params))
    (folder / "env.json").write_text(json.dumps({"python": "3.11", "versions": {"torch": "2.15"}}))
    lines = []
    for epoch in range(3):
        line = {"epoch": epoch, "loss": 9.0 - epoch, "lr": 0.1 / (epoch + 1), "pflop": epoch + 1.5}
        for g, dim in enumerate(DIMS):
            line[f"loss/{dim}"] = 3.0 - 0.1 * g - epoch
            if epoch != 1:
                line |= {
                    f"knn20/{dim}": 40.0 + g + 10 * epoch,
                    f"knn200/{dim}": 30.0 + g,
                    f"probe/{dim}": 50.25 + g,
                    f"std/{dim}": 0.9,
                    f"uniformity/{dim}": -2.0 - 0.5 * epoch,
                    f"alignment/{dim}": 0.3,
                    f"rank/{dim}": dim / 4,
                }
        lines.append(json.dumps(line))
    (folder / "log").write_text("\n".join(lines) + "\n")
    event = {"event": "collapse", "epoch": 2, "text": f"rank of prefix 8 is 2.0 {EVIL}"}
    (folder / "events.jsonl").write_text(json.dumps(event) + "\n")
    # As the training writes it: no results of an evaluation.
    (folder / "results.json").write_text(json.dumps({"method": "relic", "dims": DIMS}))

    photos = folder.parent / "photos"
    names = []
    for i in range(12):
        place = photos / CLASSES[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (20 * i, 20 * i, 20 * i)).save(place / f"{i:02}.png")
    names = [f"{CLASSES[c]}/{i:02}.png" for c in range(2) for i in range(c, 12, 2)]
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(12, 96)).astype(np.float32)
    labels = np.repeat([0, 1], 6)
    embedding_folders.write(folder / "embeddings", rows, labels, names=names, classes=CLASSES)
    say_where(folder / "embeddings", photos)
    return folder


def say_where(embeddings, photos):
    meta, _ = json_files.decode((embeddings / "meta.json").read_bytes())
    meta["data"]["path"] = str(photos)
    (embeddings / "meta.json").write_bytes(json_files.encode(meta))


def page_of(run, tmp_path, *more):
    output = tmp_path / "page.html"
    assert report.main([str(run), f"--output={output}", *more]) == 0
    return output.read_text()


def text_of(page):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))


def test_the_page_shows_the_log(run, tmp_path):
    page = page_of(run, tmp_path, "--samples=0")
    text = text_of(page)
    assert "<title>ReLIC fast_cnn 8,64,96 on photos</title>" in page
    assert (
        "ReLIC without labels, 3 epochs. Weighted kNN: 60.0 % with the first 8 dimensions, 62.0 % "
        "with all 96." in text
    )
    sections = re.findall(r'<section id="([^"]*)"', page)
    assert sections == ["self-supervised", "collapse", "provenance"]
    assert all(f'href="#{name}"' in page for name in sections)
    rows = re.findall(r'<tr><th scope="row">(\d+)</th>(.*?)</tr>', page, re.DOTALL)
    shown = {dim: re.findall(r"<td>(.*?)</td>", cells) for dim, cells in rows}
    assert shown["8"] == ["60.00", "30.00", "50.25", "0.90", "2.00", "-3.00", "0.30"]
    assert shown["96"] == ["62.00", "32.00", "52.25", "0.90", "24.00", "-3.00", "0.30"]
    assert "PFLOP of training 3.5" in text
    # Every curve in the charts for wide and for narrow pages; 1 of 2 values has no mark.
    for label in (
        "8, 0: 40.00 %",
        "96, 2: 62.00 %",
        "64, 0: 25.00 %",
        "8, 2: -3.00",
        "96, 1: 1.80",
    ):
        assert page.count(f"<title>{label}</title>") >= 2, label
    assert "Learning rate" in text
    assert "Momentum" not in text, "not in the log"


def test_warnings_are_shown_and_escaped(run, tmp_path):
    page = page_of(run, tmp_path, "--samples=0")
    assert "The run warned:" in page
    assert "epoch 2: rank of prefix 8 is 2.0 &lt;script&gt;" in page
    assert EVIL not in page


def test_a_run_in_its_first_epoch(run, tmp_path):
    young = tmp_path / "young"
    young.mkdir()
    for name in ("params.json", "env.json"):
        (young / name).write_text((run / name).read_text())
    (young / "log").write_text(json.dumps({"epoch": 0, "loss": 3.0, "loss/8": 1.0, "loss/16": 2.0}))
    text = text_of(page_of(young, tmp_path))
    assert "ReLIC without labels, 1 epoch. The log has no evaluation of the embeddings." in text
    (young / "log").unlink()
    assert "Provenance" in text_of(page_of(young, tmp_path))


def grey(address):
    picture = Image.open(io.BytesIO(base64.b64decode(address.split(",")[1])))
    return round(np.asarray(picture.convert("L")).mean() / 20)


def test_neighbours_are_the_nearest_images(run, tmp_path):
    page = page_of(run, tmp_path, "--samples=4", "--seed=1")
    articles = re.findall(r"<article>(.*?)</article>", page, re.DOTALL)
    assert len(articles) == 4
    X = np.load(run / "embeddings" / "X.npy")
    numbers = [i for c in range(2) for i in range(c, 12, 2)]  # of the image files, by row
    for article in articles:
        own = grey(re.search(r'<figure><img src="([^"]*)"', article)[1])
        row = numbers.index(own)
        shown = re.findall(r"<div><span>(\d+)</span>(.*?)</div>", article, re.DOTALL)
        assert [int(dim) for dim, _ in shown] == [8, 64, 96]
        for dim, pictures in shown:
            units = X[:, : int(dim)] / np.linalg.norm(X[:, : int(dim)], axis=1, keepdims=True)
            nearest = [j for j in np.argsort(-(units @ units[row])) if j != row][:5]
            found = re.findall(r'<img class="(\w*)" src="([^"]*)"', pictures)
            assert [grey(address) for _, address in found] == [numbers[j] for j in nearest]
            marks = ["same" if (j < 6) == (row < 6) else "other" for j in nearest]
            assert [mark for mark, _ in found] == marks


def test_images_that_are_gone_are_a_note(run, tmp_path, capsys):
    moved = tmp_path / "embeddings"
    moved.mkdir()
    for file in (run / "embeddings").iterdir():
        if file.is_file():
            (moved / file.name).write_bytes(file.read_bytes())
    say_where(moved, tmp_path / "nowhere")
    page = page_of(run, tmp_path, f"--embeddings={moved}")
    assert "note: no neighbours:" in capsys.readouterr().out
    assert 'id="neighbours"' not in page


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--embeddings={run}"], ["has no embeddings"]),
        (["--embeddings={run}/none"], ["none: no such folder", "matryoshka embed"]),
        (["--analysis={run}/log"], ["log"]),
    ],
)
def test_mistakes_are_one_line(run, tmp_path, capsys, more, words):
    output = tmp_path / "page.html"
    with pytest.raises(SystemExit) as end:
        report.main([str(run), f"--output={output}", *(word.format(run=run) for word in more)])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2
    assert all(word in line for word in words), line
    assert not output.exists()
