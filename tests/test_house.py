"""Rules of the code that a machine can check: import order, names, forbidden calls."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = sorted((ROOT / "matryoshka").rglob("*.py"))
PROGRAMS = sorted([*(ROOT / "train").glob("*.py"), *(ROOT / "inference").glob("*.py")])
TESTS = sorted((ROOT / "tests").rglob("*.py"))
FACES = sorted(ROOT.glob("*.py"))  # names of the papers' repositories, in the root
ALL = [*LIBRARY, *PROGRAMS, *TESTS, *sorted((ROOT / "bench").glob("*.py")), *FACES]

# From the top of the library to its base: a wing imports only itself and wings below it.
ORDER = [
    "search_page",
    "training",
    "evaluation",
    "export",
    "retrieval",
    "checkpoint",
    "embeddings",
    "ssl",
    "models",
    "report",
    "data",
    "losses",
    "nested",
    "distributed",
    "devices",
    "mig",
    "runtime",
    "config",
    "environment",
    "tensor_files",
    "json_files",
    "files",
    "interrupts",
    "arrays",
    "lazy",
]
ABOVE = ("__main__", "cli", "fitting")  # the command: only these files name programs


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def wings(path: Path) -> set[str]:
    """The parts of `matryoshka` that a file imports: {"data", "nested", ...}."""
    names = {name.split(".")[1] for name in imports(path) if name.startswith("matryoshka.")}
    return names - {"__version__"}


def wing_of(path: Path) -> str:
    """The wing, or the single file, of the library that holds `path`."""
    return path.relative_to(ROOT / "matryoshka").parts[0].removesuffix(".py")


def test_every_wing_has_its_place():
    found = {wing_of(path) for path in LIBRARY} - {"__init__", *ABOVE}
    unknown = found - set(ORDER)
    assert unknown == set(), f"add {unknown} to ORDER, where its imports allow"


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_down(path):
    wing = wing_of(path)
    if wing in (*ABOVE, "__init__"):
        return
    below = ORDER[ORDER.index(wing) :]
    upward = wings(path) - set(below)
    assert upward == set(), f"{path.relative_to(ROOT)} imports {upward}, which are above {wing}"


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_library_does_not_know_the_programs(path):
    # The package's own __init__ names `fit`, which is imported when it is first used.
    if wing_of(path) not in (*ABOVE, "__init__"):
        assert not wings(path) & {"train", "inference", *ABOVE}, f"{path} imports a program"
    if path.relative_to(ROOT) != Path("matryoshka/config/flags.py"):
        assert not imports(path) & {"argparse", "optparse"}, f"{path} parses a command line"


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_program_imports_no_program(path):
    assert not wings(path) & {"train", "inference"}, f"{path} imports a program"


def test_no_import_of_ours_is_hidden_from_the_type_checker():
    hidden = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in [*LIBRARY, *PROGRAMS]
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if "matryoshka" in line and "pyright: ignore" in line
    ]
    assert hidden == []


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_library_prints_nothing_and_moves_nothing_to_a_gpu(path):
    calls = [
        node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)
    ]
    if wing_of(path) not in ("config", *ABOVE):
        assert not [c for c in calls if isinstance(c, ast.Name) and c.id == "print"], (
            "the library prints nothing"
        )
    assert not [c for c in calls if isinstance(c, ast.Attribute) and c.attr == "cuda"], (
        "use .to(device)"
    )


@pytest.mark.parametrize("path", ALL, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_has_a_name_that_says_its_subject(path):
    assert not re.search(r"(^|_)(utils?|common|helpers?|misc)(_|$)", path.stem)


@pytest.mark.parametrize("path", [*LIBRARY, *PROGRAMS], ids=lambda p: str(p.relative_to(ROOT)))
def test_the_formatter_skips_no_line(path):
    assert not re.search(r"#\s*fmt:\s*(skip|off)", path.read_text()), f"{path}: `# fmt:` comment"


def test_test_modules_import_no_test_module():
    """What tests share is in builders/ and fuzzing/."""
    modules = {path.stem for path in TESTS if path.stem.startswith("test_")}
    found = {}
    for path in TESTS:
        parts = {part for name in imports(path) for part in name.split(".")}
        if parts & modules:
            found[str(path.relative_to(ROOT))] = parts & modules
    assert found == {}


def test_no_test_folder_hides_a_standard_module():
    folders = {p.name for p in (ROOT / "tests").rglob("*") if p.is_dir()}
    assert folders & set(sys.stdlib_module_names) == set()


# Formats of PyTorch that can run code: read only from the bytes that this process has just written.
OWN_BYTES = {
    "matryoshka/export/torch_export.py": "torch.export.load(io.BytesIO(written))",
    "matryoshka/export/torchscript.py": "torch.jit.load(io.BytesIO(written))",
}


def test_pickle_is_never_loaded():
    for path in [*LIBRARY, *PROGRAMS]:
        allowed = OWN_BYTES.get(path.relative_to(ROOT).as_posix())
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in ("load", "loads")
            ):
                owner = ast.unparse(node.func.value)
                if ast.unparse(node) == allowed:
                    continue
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
            if (
                isinstance(node, ast.ClassDef)
                and not node.name.startswith("_")
                and not ast.get_docstring(node)
            ):
                fields_only = all(isinstance(n, (ast.AnnAssign, ast.Assign)) for n in node.body)
                if not fields_only:
                    missing.append(f"{path.name}: {node.name}")
    assert missing == []


# Files of the package itself, and of the kernel: their content is not the user's.
OWN_FILES = (
    *("search_page/app.py", "evaluation/superclasses.py", "report/page/__init__.py"),
    *("data/imagenet.py", "environment.py", "export/int8.py"),
)
KERNEL = ("/proc/", "status")
BY_NAME = ("safe_open", "open_memmap", "torch.load", "Image.open")  # readers of other libraries


@pytest.mark.parametrize("path", [*LIBRARY, *PROGRAMS], ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_read_through_one_door(path):
    """files.py, which refuses pipes and devices: they would be read for ever."""
    if path.as_posix().endswith((*OWN_FILES, "matryoshka/files.py")):
        return
    text = path.read_text()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        shown = ast.unparse(node)
        name = ast.unparse(node.func)
        is_kernel = any(word in shown for word in KERNEL)
        if name.endswith((".read_text", ".read_bytes")) and not is_kernel:
            assert name == "fields.read_bytes", f"{shown}: use files.read_regular"
        if name == "open" or name.endswith(("path.open", "file.open")):
            mode = [ast.unparse(word) for word in node.args[name == "open" :]]
            writes = mode and mode[0].strip("'\"")[0] in "wax"
            assert writes, f"{shown}: use files.open_regular"
        if name.endswith(BY_NAME) and "BytesIO" not in shown and "(file," not in shown:
            assert "check_regular" in text or "open_regular" in text, (
                f"{shown}: check_regular first"
            )
