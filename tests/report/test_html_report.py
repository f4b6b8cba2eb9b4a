"""`matryoshka report`: the page against its input files, hostile names, and a real browser."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from matryoshka.inference import analyze, report
from PIL import Image

from matryoshka.data import Digits, write_beton
from matryoshka.report.page import MAX_BYTES, charts, paper

DIMS = [8, 32, 512]
N = 60
EVIL = '"><script>alert(1)</script>'


class Text(HTMLParser):
    """Tags, and the text outside of scripts and styles."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self.ids = [], [], set()
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids |= {value for name, value in attrs if name == "id"}

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] not in ("script", "style"):
            self.text.append(data)

    def all(self):
        return re.sub(r"\s+", " ", " ".join(self.text))


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """An evaluation of 60 digits with hostile names, its analysis, baselines and heat maps."""
    folder = tmp_path_factory.mktemp("evaluated")
    write_beton(Digits("val"), folder / "val.beton", max_resolution=32, write_mode="raw", subset=N)
    labels = np.array([int(y) for y in Digits("val").labels[:N]])
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((3, N, 10)).astype(np.float32)
    for g, strength in enumerate((1.0, 2.0, 4.0)):
        logits[g, np.arange(N), labels] += strength
    np.save(folder / "logits.npy", logits)
    np.save(folder / "gt.npy", labels)
    names = [EVIL, *(f"digit {i}" for i in range(1, 10))]
    top1 = 100 * (logits.argmax(2) == labels).mean(1)
    results = {
        "prefixes": {
            str(d): {"top1": float(a), "top5": 99.0} for d, a in zip(DIMS, top1, strict=True)
        },
        "checkpoint": "run/model.safetensors",
        "arch": "resnet10",
        "head": "mrl",
        "dims": DIMS,
        "dataset": "V1",
        "data": str(folder / "val.beton"),
        "classes": 10,
        "class_names": names,
        "images": N,
        "resolution": 32,
        "crop_ratio": 1.0,
        "tta": False,
        "precision": "fp32",
        "images_per_s": 100.0,
        "preprocessing": "checkpoint",
        "arrays": {"logits": "logits.npy", "gt": "gt.npy"},
        "environment": {
            "python": "3.11",
            "versions": {"torch": "2.15"},
            "git": {"commit": "c0ffee" * 7, "dirty": True},
            "hardware": {"cpu": "a <fast> one", "cores": 2, "gpus": []},
            "world_size": 1,
        },
    }
    (folder / "results.json").write_text(json.dumps(results))
    assert analyze.main([f"--results={folder / 'results.json'}", "--splits=2"]) == 0
    methods = {
        "1-NN": {"metric": "top-1", "values": {"8": 40.0, "32": 50.0, "512": 60.0}, "std": None}
    }
    (folder / "baselines.json").write_text(json.dumps({"methods": methods}))
    (folder / "gradcam").mkdir()
    Image.new("RGB", (300, 100), (10, 120, 60)).save(folder / "gradcam" / "0.png")
    (folder / "gradcam" / "gradcam.json").write_text(json.dumps([{"image": EVIL, "file": "0.png"}]))
    return folder


def page_of(folder, *argv):
    assert report.main([f"--run={folder}", f"--output={folder / 'report.html'}", *argv]) == 0
    return (folder / "report.html").read_text()


def test_the_page_shows_the_numbers_of_the_files(evaluated, tmp_path, capsys):
    results = json.loads((evaluated / "results.json").read_text())
    fixed = results | {
        "head": "ff16",
        "prefixes": {"16": {"top1": 77.7, "top5": 99.0}},
        "checkpoint": "ff16",
    }
    other = results | {"dataset": "R", "data": "r", "images": 30}
    for name, content in (("main", results), ("ff16", fixed), ("r", other)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    shutil.copy(evaluated / "logits.npy", tmp_path)
    shutil.copy(evaluated / "gt.npy", tmp_path)
    files = [str(tmp_path / f"{name}.json") for name in ("main", "ff16", "r")]
    page = Text(page_of(evaluated, "--results", *files))
    shown = page.all()
    found = json.loads((evaluated / "analysis.json").read_text())
    assert {
        "accuracy",
        "sets",
        "baselines",
        "cascade",
        "oracle",
        "agreement",
        "calibration",
        "classes",
        "samples",
        "gradcam",
        "provenance",
    } <= page.ids
    assert not {"superclasses", "training"} & page.ids  # there is no evidence for them
    for dim, row in results["prefixes"].items():
        assert f"{row['top1']:.2f}" in shown, f"top-1 of prefix {dim} is missing"
        assert f"{found['calibration'][dim]['ece']:.1f}" in shown, f"ECE of prefix {dim} is missing"
    assert "77.70" in shown, "accuracy of the fixed feature is missing"
    assert "ImageNet-1K" in shown  # of 10 classes: the paper's curves are for reference, apart
    assert f"{found['oracle']['top1']:.2f} %" in shown, "accuracy of the oracle is missing"
    assert f"{found['cascade']['caps'][1]['expected_dim']['mean']:.2f}" in shown, (
        "mean dim of the cascade is missing"
    )
    assert "c0ffeec0ffee with changes" in shown
    assert "a <fast> one, 2 cores" in shown
    assert "30 images" in shown
    data = json.loads(
        re.search(r'id="class-data">(.*?)</script>', page_of(evaluated), re.DOTALL)[1]
    )
    assert [row[0] for row in data["rows"]] == results["class_names"]
    assert [row[4:] for row in data["rows"]] == [c["top1"] for c in found["per_class"]], (
        "accuracies of the classes differ from analysis.json"
    )
    assert capsys.readouterr().out.count("report.html") == 2


def test_nothing_is_loaded_and_nothing_escapes(evaluated):
    content = page_of(evaluated)
    page = Text(content)
    addresses = [attrs[key] for _, attrs in page.tags for key in ("src", "href") if attrs.get(key)]
    assert all(a.startswith(("data:", "#", "https://arxiv.org/")) for a in addresses)
    assert not [
        tag for tag, attrs in page.tags if tag in ("script", "img", "link") and "http" in str(attrs)
    ]
    assert EVIL not in content
    assert content.count("<script") == 2, "an unexpected script"  # the classes and the behaviour
    assert "@import" not in content
    assert len(content.encode()) < MAX_BYTES, "the page is too large"


def test_samples_are_the_images_and_their_answers(evaluated):
    content = page_of(evaluated, "--samples=60")
    cards = re.findall(r"<article>(.*?)</article>", content, re.DOTALL)
    logits, labels = np.load(evaluated / "logits.npy"), np.load(evaluated / "gt.npy")
    assert len(cards) == N, "number of samples"
    right = [len(re.findall(r'<li class="right">', card)) for card in cards]
    assert sum(right) == (logits.argmax(2) == labels).sum(), (
        "right answers on the page differ from the arrays"
    )
    first = base64.b64decode(re.search(r"base64,([^\"]+)", cards[0])[1])
    assert Image.open(io.BytesIO(first)).size == (160, 160), "size of a thumbnail"
    assert "<article>" not in page_of(evaluated, "--samples=0")


def test_models_are_distinguished(evaluated, tmp_path):
    """A nested model of one prefix is not a fixed feature; results on other images or classes are
    not in the same chart.
    """
    results = json.loads((evaluated / "results.json").read_text()) | {"arrays": {}}
    one = results | {
        "checkpoint": "b/m.safetensors",
        "prefixes": {"32": {"top1": 61.25, "top5": 99.0}},
        "dims": [32],
    }
    elsewhere = results | {"checkpoint": "c/m.safetensors", "data": "other", "head": "ff8"}
    classes = results | {"checkpoint": "d/m.safetensors", "classes": 77, "head": "ff8"}
    twice = results | {"tta": True}
    for name, content in (
        ("a", results),
        ("b", one),
        ("c", elsewhere),
        ("d", classes),
        ("e", twice),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    files = [str(tmp_path / f"{name}.json") for name in "abcde"]
    assert report.main(["--results", *files, f"--output={tmp_path / 'r.html'}"]) == 0
    shown = Text((tmp_path / "r.html").read_text()).all()
    assert "fixed features" not in shown
    assert "resnet10, MRL, run" in shown
    assert "resnet10, MRL, b" in shown
    assert "resnet10, MRL, mirrored images added, run" in shown
    assert "61.25" in shown


def test_the_class_count_of_imagenet_gets_the_papers_curves(evaluated, tmp_path):
    results = json.loads((evaluated / "results.json").read_text()) | {
        "classes": 1000,
        "arrays": {},
        "class_names": None,
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    content = page_of(tmp_path)
    assert f"paper: MRL, 8: {paper.LINEAR['MRL'][0]:.2f} %" in content
    assert "For reference" not in content
    assert "no samples" in content  # arrays were not saved


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 100), (17.3, 26.1), (99.1, 99.4), (0.001, 0.002)]
)
def test_ticks_are_round_and_span(low, high):
    ticks = charts.nice_ticks(low, high)
    assert ticks[0] <= low + 1e-9, f"ticks {ticks} start above {low}"
    assert ticks[-1] >= high - 1e-9, f"ticks {ticks} end below {high}"
    assert 2 <= len(ticks) <= 10, f"{len(ticks)} ticks"
    steps = np.diff(ticks)
    np.testing.assert_allclose(steps, steps[0])
    assert f"{steps[0]:.0e}"[0] in "125" or f"{steps[0]:.1e}".startswith("2.5")


MISTAKES = [
    ([], ["--results", "matryoshka eval"]),
    (["--run={}/nowhere"], ["--run", "nowhere"]),
    (["--run={}/empty"], ["has no results.json"]),
    (["--results", "{}/nowhere.json"], ["nowhere.json"]),
    (["--results", "{}/page.html"], ["page.html", "not valid JSON"]),
    (["--results", "{}/analysis.json"], ["analysis.json", "'prefixes'"]),
    (["--run={}", "--analysis={}/results.json"], ["results.json", "'top1'"]),
    (["--run={}", "--analysis={}/other.json"], ["other.json", "60 images", "7 images"]),
    (["--run={}", "--analysis={}/stale.json"], ["stale.json", "accuracies"]),
    (["--run={}", "--baselines={}/foreign.json"], ["foreign.json", "another/model.safetensors"]),
    (["--run={}", "--analysis={}/half.json"], ["JSON files", "make them again"]),
    (["--results", "{}/half.json"], ["half.json", "'prefixes'"]),
    (["--results", "{}/probe.json", "--samples=0"], ["probe.json", "'checkpoint'"]),
    (["--run={}", "--gradcam={}/outside"], ["'../secret.png'", "not the name of a picture"]),
    (["--run={}", "--gradcam={}/empty"], ["--gradcam", "matryoshka gradcam"]),
    (["--run={}", "--gradcam={}/torn"], ["gradcam.json", "damaged"]),
    (["--run={}", "--gradcam={}/lost"], ["1.png"]),
    (["--run={}", "--samples=-1"], ["--samples"]),
    (["--run={}", "--output=/nowhere/r.html"], ["--output", "/nowhere"]),
]


@pytest.mark.parametrize(("argv", "words"), MISTAKES)
def test_mistakes_are_one_line(evaluated, tmp_path, monkeypatch, capsys, *, argv, words):
    shutil.copytree(evaluated, tmp_path / "e")
    folder = tmp_path / "e"
    monkeypatch.chdir(tmp_path)
    (folder / "report.html").unlink(missing_ok=True)
    (folder / "page.html").write_text("<!doctype html>")
    found = json.loads((folder / "analysis.json").read_text())
    (folder / "other.json").write_text(json.dumps(found | {"images": 7}))
    (folder / "stale.json").write_text(
        json.dumps(found | {"top1": dict.fromkeys(found["top1"], 1.0)})
    )
    (folder / "foreign.json").write_text(
        '{"methods": {"a": {}}, "checkpoint": "another/model.safetensors"}'
    )
    half = {key: value for key, value in found.items() if key != "oracle"} | {
        "oracle": {"top1": "high"}
    }
    (folder / "half.json").write_text(json.dumps(half))
    (folder / "probe.json").write_text(
        json.dumps({"prefixes": {"8": {"top1": 50.0}}, "images": 60})
    )
    outside = '[{"image": "a", "file": "../secret.png"}]'
    for name, text in (
        ("outside", outside),
        ("torn", '[{"image": '),
        ("lost", '[{"image": "a", "file": "1.png"}]'),
    ):
        (folder / name).mkdir()
        (folder / name / "gradcam.json").write_text(text)
    (folder / "empty").mkdir()
    with pytest.raises(SystemExit) as end:
        report.main([word.format(folder) for word in argv])
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2
    assert len(lines) == 1, lines
    assert all(word in lines[0] for word in words), lines[0]
    assert not list(tmp_path.rglob("report.html"))


# ---------------------------------------------------------------- in a browser


def open_page(chromium, path, **options):
    """(page, console messages, requested URLs)"""
    page = chromium.new_context(**options).new_page()
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(f"dialog {dialog.message}"))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"file://{path}")
    return page, said, asked


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_the_page(chromium, evaluated, tmp_path, scheme):
    page_of(evaluated)
    page, said, asked = open_page(
        chromium,
        evaluated / "report.html",
        color_scheme=scheme,
        viewport={"width": 1200, "height": 900},
    )
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    pixels = np.asarray(Image.open(tmp_path / "page.png").convert("L")).astype(float)
    assert (pixels.mean() > 128) == (scheme == "light"), f"brightness of the {scheme} theme"
    assert pixels.std() > 10, "the page is empty"  # something is on it
    assert page.locator("h1").inner_text() == "resnet10 MRL 8,32,512 on val"
    assert page.locator("#accuracy svg circle").count() >= len(DIMS), (
        "points are missing in the chart"
    )
    page.locator("#theme").click()
    page.screenshot(path=tmp_path / "other.png", full_page=True)
    assert (np.asarray(Image.open(tmp_path / "other.png").convert("L")).mean() > 128) == (
        scheme == "dark"
    ), "the button does not change the theme"
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") == 390, (
        "the page is wider than a phone"
    )


def test_the_table_of_classes_is_used_by_keyboard(chromium, evaluated):
    page_of(evaluated)
    found = json.loads((evaluated / "analysis.json").read_text())["per_class"]
    page, said, _ = open_page(chromium, evaluated / "report.html")
    rows = page.locator("#class-table tbody tr")
    assert rows.count() == 10, "number of rows"
    for ascending in (
        True,
        False,
    ):  # by top-1 of the longest prefix; the least comes first at the start
        values = [
            float(v) for v in page.locator("#class-table tbody td:last-child").all_inner_texts()
        ]
        assert values == sorted(
            (c["top1"][-1] for c in found), reverse=not ascending
        ) or np.allclose(
            values, sorted((round(c["top1"][-1], 1) for c in found), reverse=not ascending)
        )
        button = page.locator("#class-table thead th:last-child button")
        button.focus()
        page.keyboard.press("Enter")
    sorted_by = page.locator("#class-table thead th[aria-sort]")
    assert sorted_by.count() == 1
    page.locator("#search").focus()
    page.keyboard.type("DIGIT 7")
    assert rows.count() == 1, "number of rows"
    assert "digit 7" in rows.inner_text()
    assert page.locator("#found").inner_text() == "1 of 10 classes"
    page.locator("#search").fill("<script>")
    assert rows.count() == 1, "number of rows"  # the evil name is text
    page.locator("#accuracy summary").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("#accuracy details").first.get_attribute("open") is not None
    assert said == []


def test_superclasses_are_drawn(chromium, evaluated, tmp_path):
    found = json.loads((evaluated / "analysis.json").read_text())
    found["superclasses"] = {
        "names": ["other", "dog", EVIL],
        "images": [20, 30, 10],
        "classes": [4, 4, 2],
        "within": {},
        "confusion": {
            str(d): [[20, 0, 0], [5, 20 + g, 5 - g], [0, 0, 10]] for g, d in enumerate(DIMS)
        },
        "top1": {"8": 83.3, "32": 85.0, "512": 86.7},
    }
    (tmp_path / "a.json").write_text(json.dumps(found))
    page_of(evaluated, f"--analysis={tmp_path / 'a.json'}")
    page, said, _ = open_page(chromium, evaluated / "report.html")
    assert page.locator("#confusion rect").count() == 9, "number of cells"
    assert "86.67 %" in page.locator("#confusion-said").inner_text()
    page.locator("#confusion-dim").select_option("8")
    assert "83.33 %" in page.locator("#confusion-said").inner_text()
    assert (
        f"dog predicted as {EVIL}: 5 of 30 (16.7 %)"
        in page.locator("#confusion rect title").all_text_contents()
    )
    assert said == []


def test_paper_is_white(chromium, evaluated, tmp_path):
    """Also with a dark theme, by the system or by the button."""
    page_of(evaluated)
    page, _, _ = open_page(chromium, evaluated / "report.html", color_scheme="dark")
    for _ in range(2):
        page.emulate_media(media="print", color_scheme="dark")
        page.screenshot(path=tmp_path / "print.png")
        assert np.asarray(Image.open(tmp_path / "print.png").convert("L")).mean() > 200, (
            "printed pages must be white"
        )
        page.emulate_media(media="screen", color_scheme="dark")
        page.evaluate("document.documentElement.dataset.theme = 'dark'")


def test_printed_pages_show_folded_sections(chromium, evaluated, tmp_path):
    found = json.loads((evaluated / "analysis.json").read_text())
    many = [found["per_class"][i % 10] | {"name": f"class {i}"} for i in range(70)]
    (tmp_path / "a.json").write_text(json.dumps(found | {"per_class": many}))
    page_of(evaluated, f"--analysis={tmp_path / 'a.json'}")
    page, said, _ = open_page(chromium, evaluated / "report.html")
    rows = page.locator("#class-table tbody tr")
    page.locator("#next").click()
    assert page.locator("#page").inner_text() == "page 2 of 3"
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    assert rows.count() == 70, "number of rows"
    page.pdf(path=tmp_path / "page.pdf", format="A4")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details:not([open])").count() > 0
    assert rows.count() == 25, "number of rows"
    assert page.locator("#page").inner_text() == "page 2 of 3"
    assert said == []
