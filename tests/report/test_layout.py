"""The page in a browser: nothing overflows, overlaps or is cut off; charts of unusual numbers."""

import numpy as np
import pytest
from dims_results import write_dims
from matryoshka.inference import analyze, report
from random_scores import write_scores

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


def page_of(folder, dims, strengths, names, images=50):
    """A report of random scores in which the label weighs `strengths`."""
    write_scores(
        folder,
        np.random.default_rng(0),
        dims=dims,
        strengths=strengths,
        chance=np.full(len(names), 1 / len(names)),
        images=images,
        checkpoint="run/model.safetensors",
        arch="resnet10",
        head="mrl",
        dataset="V1",
        data="val.beton",
        classes=len(names),
        class_names=names,
        resolution=32,
        mirrored={"prefixes": {}},  # a key of another version
    )
    assert analyze.main([f"--results={folder / 'results.json'}", "--splits=2"]) == 0
    write_dims(folder, dims=dims, names=names, images=images)
    assert report.main([str(folder), "--samples=0"]) == 0
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
