"""The rules of the house that a machine can check."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = sorted((ROOT / "matryoshka").rglob("*.py"))
PROGRAMS = sorted([*(ROOT / "train").glob("*.py"), *(ROOT / "inference").glob("*.py")])
ALL = [
    *LIBRARY,
    *PROGRAMS,
    *sorted((ROOT / "tests").glob("*.py")),
    *sorted((ROOT / "bench").glob("*.py")),
    ROOT / "MRL.py",
]


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms(path: Path) -> set[str]:
    """The parts of `matryoshka` that a file imports: {"data", "nested", ...}."""
    return {name.split(".")[1] for name in imports(path) if name.startswith("matryoshka.")}


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_library_does_not_know_the_programs(path):
    if path.name != "cli.py":
        assert not rooms(path) & {"train", "inference", "cli"}
    assert not imports(path) & {"argparse", "optparse"}


def test_rooms_without_siblings():
    for name in ("nested.py", "losses.py", "metrics.py", "analysis.py"):
        path = ROOT / "matryoshka" / name
        if path.exists():
            assert rooms(path) == set(), name
    for room in ("data", "retrieval"):
        for path in (ROOT / "matryoshka" / room).glob("*.py"):
            assert rooms(path) <= {room}, path


def test_train_and_inference_meet_only_through_the_checkpoint():
    for path in PROGRAMS:
        other = "inference" if path.parent.name == "train" else "train"
        assert other not in rooms(path), path


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_library_prints_nothing_and_moves_nothing_to_a_gpu(path):
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    if path.name not in ("cli.py", "config.py"):
        assert not [c for c in calls if isinstance(c, ast.Name) and c.id == "print"]
    assert not [c for c in calls if isinstance(c, ast.Attribute) and c.attr == "cuda"]


@pytest.mark.parametrize("path", ALL, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_has_one_subject(path):
    assert len(path.read_text().splitlines()) <= 400, "split it, or lose something"
    assert not re.search(r"(^|_)(utils?|common|helpers?|misc)(_|$)", path.stem)


def test_pickle_is_never_loaded():
    for path in [*LIBRARY, *PROGRAMS]:
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in ("load", "loads")
            ):
                owner = ast.unparse(node.func.value)
                assert owner in ("json", "torch"), f"{path}: {ast.unparse(node)}"
                if owner == "torch":
                    assert "weights_only=True" in ast.unparse(node), path


def test_public_functions_say_what_they_do():
    missing = []
    for path in LIBRARY:
        tree = ast.parse(path.read_text())
        if not ast.get_docstring(tree):
            missing.append(str(path))
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node):
                fields_only = all(isinstance(n, (ast.AnnAssign, ast.Assign)) for n in node.body)
                if not fields_only:
                    missing.append(f"{path.name}: {node.name}")
    assert missing == []


def test_the_readme_names_every_file():
    text = (ROOT / "README.md").read_text()
    shown = [p for p in [*LIBRARY, *PROGRAMS] if p.name != "__init__.py"]
    assert [p.name for p in shown if p.name not in text] == []
