"""The documentation fits the code: generated pages are fresh, links and paths exist."""

import pkgutil
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "bench/NOTES.md"])
PAGES += [ROOT / "tests/README.md"]
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)]*)?\)")
SOURCE = re.compile(
    r"`((?:matryoshka|train|inference|bench|tests|docs)/[\w./-]+\.(?:py|md|sh|json|cpp|hpp|png))`"
)
DOTTED = re.compile(r"\b(matryoshka(?:\.[A-Za-z]\w*)+)\b(?!\.)")
GENERATORS = {
    "docs/results.md": "bench/results_page.py",
    "docs/code_map.md": "docs/make_code_map.py",
}


def page_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize(("page", "program"), GENERATORS.items())
def test_generated_pages_are_fresh(page, program, tmp_path):
    fresh = tmp_path / "page.md"
    # a process of its own: the programs need no installed package
    subprocess.run([sys.executable, "-S", ROOT / program, fresh], check=True, capture_output=True)
    stored = (ROOT / page).read_text(encoding="utf-8")
    assert fresh.read_text(encoding="utf-8") == stored, f"{page} is out of date: run `make docs`"


def test_the_code_map_describes_every_module():
    code_map = (ROOT / "docs/code_map.md").read_text(encoding="utf-8")
    modules = [*(ROOT / "matryoshka").rglob("*.py"), *(ROOT / "bench").glob("*.py")]
    missing = [str(p) for p in modules if f"| `{p.name}` |" not in code_map]
    assert missing == [], "each needs a docstring, whose first sentence the page shows"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_and_paths_exist(page):
    text = page.read_text(encoding="utf-8")
    links = [m[1] for m in LINK.finditer(text) if "://" not in m[1]]
    broken = [link for link in links if not (page.parent / link).exists()]
    broken += [m[1] for m in SOURCE.finditer(text) if not (ROOT / m[1]).exists()]
    assert broken == [], f"{page_id(page)} names files that do not exist"


def test_architecture_names_functions_that_exist():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \|", text, re.MULTILINE)
    assert len(rows) > 30
    missing = []
    for file, functions in rows:
        folder = ROOT if file.startswith(("train/", "inference/")) else ROOT / "matryoshka"
        sources = "".join(p.read_text() for p in folder.glob(file))
        for call in re.findall(r"`([^`]+)`", functions):
            name = call.split("(")[0].split(".")[-1]  # `Index.search(queries)` -> search
            if not re.search(rf"\b(def|class) {name}\b|\b{name}\(", sources):
                missing.append(f"{file}: {call}")
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_dotted_names_exist(page):
    """`matryoshka.folder.module.name` in a page can be imported."""
    missing = []
    for name in sorted(set(DOTTED.findall(page.read_text(encoding="utf-8")))):
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError) as error:
            missing.append(f"{name}: {error}")
    assert missing == []


def test_the_first_sentence_of_a_docstring():
    first_sentence = runpy.run_path(str(ROOT / "docs/make_code_map.py"))["first_sentence"]
    assert first_sentence("Read a file.\n\nMore.") == "Read a file"
    assert first_sentence("Read a\nfile, e.g.\none. Then more.") == "Read a file, e.g. one"
    assert first_sentence("") == ""


def test_numbers_of_the_results_page():
    page = runpy.run_path(str(ROOT / "bench/results_page.py"))
    assert [page["number"](x) for x in (1234.5, 99.97, 1.0046, 0.012345)] == [
        "1,234",
        "100",
        "1.00",
        "0.0123",
    ]
    spread = {"n": 3, "median": 2.0, "min": 1.5, "max": 1000.0}
    assert page["measured"](spread) == "2.00 (1.50 to 1,000)"
    rows = [{"case": "a", "v": 1}, {"case": "b", "v": 2}, {"case": "a", "v": 3}]
    assert page["latest"](rows, "case") == [{"case": "a", "v": 3}, {"case": "b", "v": 2}]
