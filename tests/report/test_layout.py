"""The page in a browser: nothing overflows, overlaps or is cut off; charts of unusual numbers."""

import json
import shutil

import numpy as np
import pytest
from matryoshka.inference import analyze, report

BROWSER = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)

# Elements beyond the page's edges, texts beyond their chart, and numbers of an axis that touch.
PROBLEMS = """() => {
  const found = [];
  const wide = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth > wide) found.push("the page scrolls sideways");
  const scrolls = (node) => node.closest(".scroll, nav, .hidden, .skip");
  for (const node of document.querySelectorAll("main *, header *")) {
    const box = node.getBoundingClientRect();
    if (!box.width || scrolls(node)) continue;
    if (box.left < -0.5 || box.right > wide + 0.5) {
      found.push(`${node.tagName} ${node.className} is cut off: ${node.textContent.slice(0, 40)}`);
    }
  }
  for (const svg of document.querySelectorAll("svg.chart")) {
    const frame = svg.getBoundingClientRect();
    if (!frame.width) continue;
    const chart = svg.getAttribute("aria-label");
    const nodes = [...svg.querySelectorAll("text")];
    const texts = nodes.map((node) => [node, node.getBoundingClientRect()]);
    for (const [node, box] of texts) {
      const inside = box.left >= frame.left - 1 && box.right <= frame.right + 1
        && box.top >= frame.top - 2 && box.bottom <= frame.bottom + 2;
      if (!inside) found.push(`${chart}: ${node.textContent} is cut off`);
    }
    const ticks = texts.filter(([node]) => node.classList.contains("tick"));
    ticks.forEach(([a, p], i) => ticks.slice(i + 1).forEach(([b, q]) => {
      const beside = p.right <= q.left || q.right <= p.left;
      const above = p.bottom <= q.top + 3 || q.bottom <= p.top + 3;
      if (!beside && !above) found.push(`${chart}: ${a.textContent} overlaps ${b.textContent}`);
    }));
  }
  for (const node of document.querySelectorAll(".scroll")) {
    if (wide >= 1280 && node.scrollWidth > node.clientWidth + 1) {
      found.push(`a table of ${node.closest("section").id} scrolls on a wide page`);
    }
  }
  return found;
}"""


@pytest.fixture(scope="module")
def chromium():
    sync = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if BROWSER is None:
        pytest.skip("no Chromium: sh system-deps.sh browser")
    with sync.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


def page_of(folder, dims, strengths, names, images=50):
    """A report of random scores in which the label weighs `strengths`."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, len(names), images)
    logits = rng.standard_normal((len(dims), images, len(names))).astype(np.float32)
    for g, strength in enumerate(strengths):
        logits[g, np.arange(images), labels] += strength
    np.save(folder / "logits.npy", logits)
    np.save(folder / "gt.npy", labels)
    top1 = 100 * (logits.argmax(2) == labels).mean(1)
    results = {
        "prefixes": {str(d): {"top1": float(a)} for d, a in zip(dims, top1, strict=True)},
        "checkpoint": "run/model.safetensors",
        "arch": "resnet10",
        "head": "mrl",
        "dims": dims,
        "dataset": "V1",
        "data": "val.beton",
        "classes": len(names),
        "class_names": names,
        "images": images,
        "resolution": 32,
        "arrays": {"logits": "logits.npy", "gt": "gt.npy"},
        "mirrored": {"prefixes": {}},  # a key of another version
    }
    (folder / "results.json").write_text(json.dumps(results))
    assert analyze.main([f"--results={folder / 'results.json'}", "--splits=2"]) == 0
    assert report.main([f"--run={folder}", "--samples=0"]) == 0
    return folder / "report.html"


ELEVEN = [2**i for i in range(11)]
LONG = [f"a class with quite a long name of many words {i}" for i in range(12)]
PAGES = {
    "eleven prefixes, long names": (ELEVEN, np.linspace(0.5, 3, 11), LONG),
    "every prefix right": (ELEVEN[:7], [50] * 7, list("abc")),
    "low accuracy": ([8, 16, 512], [-9, -9, -9], list("abcdef")),
    "one prefix": ([512], [2], list("abc")),
    "two neighbours": ([500, 512], [1, 2], list("abc")),
    "one class": ([8, 512], [1, 1], ["a"]),
    "an unbroken name": ([8, 512], [1, 1], ["x" * 90, "y"]),
}


@pytest.mark.parametrize("name", PAGES)
def test_nothing_overflows(chromium, tmp_path, name):
    file = page_of(tmp_path, *PAGES[name])
    for width in (390, 1280):
        context = chromium.new_context(viewport={"width": width, "height": 900})
        page = context.new_page()
        said = []
        page.on("pageerror", lambda error, said=said: said.append(str(error)))
        page.goto(f"file://{file}")
        page.evaluate("for (const d of document.querySelectorAll('details')) d.open = true")
        assert said == []
        assert page.evaluate(PROBLEMS) == [], f"{name} at {width} pixels"
        context.close()


def test_charts_that_would_show_nothing_are_not_shown(tmp_path):
    content = page_of(tmp_path, *PAGES["every prefix right"]).read_text()
    assert "All prefixes predict the same class for every image." in content
    assert 'aria-label="agreement between prefixes"' not in content
    content = page_of(tmp_path, *PAGES["one prefix"]).read_text()
    assert 'aria-label="top-1 accuracy by dimension"' not in content
    assert 'id="oracle"' not in content
