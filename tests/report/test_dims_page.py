"""Sections of the report that show dims.json: against the file, with hostile names, and without."""

import json
import re

import pytest
from dims_results import write_dims
from matryoshka.inference import report
from training_commands import refused

NAMES = ["cat", '"><script>alert(1)</script>', "dog & fox"]
DIMS = [8, 32, 512]


@pytest.fixture
def found(tmp_path):
    return write_dims(tmp_path, dims=DIMS, names=NAMES)


def page(folder, *options):
    assert report.main([str(folder), *options]) == 0
    return (folder / "report.html").read_text()


def cells(text, section):
    """The rows of the first table of a section."""
    body = text[text.index(f'<section id="{section}"') :].partition("<tbody>")[2]
    rows = body.partition("</tbody>")[0].split("</tr>")[:-1]
    return [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in rows]


def test_the_page_needs_dims_json_alone(found, tmp_path, capsys):
    text = page(tmp_path)
    rows = cells(text, "cost")
    assert [int(row[0]) for row in rows] == DIMS
    for dim, row in zip(DIMS, rows, strict=True):
        assert float(row[1]) == pytest.approx(found["prefixes"][str(dim)]["top1"], abs=0.005)
    assert [row[3] for row in rows] == ["6.40 k", "102 k", "26.2 M"]
    assert [row[6] for row in rows] == ["8.00", "32.0", "512"]
    assert "top-1 accuracy by multiply-adds" in text
    assert "<title>vit_nested MRL 8,32,512 on cifar10</title>" in text
    # the same table, printed
    printed = capsys.readouterr().out.splitlines()
    assert [int(line.split()[0]) for line in printed[1:4]] == DIMS


def test_errors_and_maps(found, tmp_path):
    text = page(tmp_path)
    errors = found["confused"]["512"]
    assert len(cells(text, "confused")) == len(errors)
    assert [int(row[2]) for row in cells(text, "confused")] == [images for *_, images in errors]
    data = re.search(r'id="class-confusion-data">(.*?)</script>', text)[1]
    assert json.loads(data) == {"names": NAMES, "confusion": found["confusion"]}
    for dim in DIMS:
        drawn = text.partition(f'aria-label="map of the embeddings with {dim} dimensions"')[2]
        assert drawn.partition("</svg>")[0].count("h0") == found["images"]
    assert "<script>alert" not in text


def test_sections_appear_where_they_have_a_subject(tmp_path):
    names = [f"class {k}" for k in range(40)]
    write_dims(tmp_path, dims=[8], names=names, macs={"8": 5}, map=None, images=200)
    text = page(tmp_path)
    assert 'id="class-confusion"' not in text, "40 classes are a list of errors, not a matrix"
    assert 'id="confused"' in text
    assert 'id="maps"' not in text
    assert "multiply-adds per image" not in text, "one dim is not a curve"


def test_prefixes_of_one_backbone_cost_the_same(tmp_path):
    write_dims(tmp_path, dims=[8, 16], names=NAMES, macs={"8": 1000, "16": 1001})
    text = page(tmp_path)
    assert "All dims run the same backbone" in text
    assert "multiply-adds per image" not in text


@pytest.mark.parametrize(
    ("small", "images", "text"),
    [
        (0, 1000, "Width 512 is more accurate than width 8"),
        (300, 1000, "Width 8 is more accurate than width 512"),
        (100, 100_000, "Width 8 loses at most one point against width 512"),
    ],
)
def test_widths_are_no_prefixes(tmp_path, small, images, text):
    """The paired counts decide; a width is not the first numbers of an embedding."""
    pair = {"first_only": small, "second_only": 100, "images": images}
    write_dims(tmp_path, dims=[8, 512], names=NAMES, one_pass=False, paired={"8": pair})
    headline = re.search(r'<p class="headline">(.*?)</p>', page(tmp_path), re.DOTALL)[1]
    assert "% top-1 with width 8" in headline
    assert text in headline
    assert "first" not in headline


def test_results_of_a_training_run_are_not_those_of_an_evaluation(found, tmp_path, capsys):
    """train_cifar10.py writes a results.json of its own."""
    (tmp_path / "results.json").write_text('{"test": {"top_1": {"8": 50.0}}}')
    assert "cifar10" in page(tmp_path)
    (tmp_path / "dims/dims.json").unlink()
    line = refused(report.main, [str(tmp_path)], capsys)
    assert "has no results.json of an evaluation" in line
    assert "matryoshka dims" in line


def test_mistakes(found, tmp_path, capsys):
    assert "give one run folder" in refused(report.main, [str(tmp_path), "--run=x"], capsys)
    for key in ("costs", "loss"):
        (tmp_path / "dims/dims.json").write_text(json.dumps(found | {key: None}))
        assert "incomplete or edited" in refused(report.main, [str(tmp_path)], capsys)
        kept = {k: value for k, value in found.items() if k != key}
        (tmp_path / "dims/dims.json").write_text(json.dumps(kept))
        assert f"{key!r} is missing" in refused(report.main, [str(tmp_path)], capsys)
