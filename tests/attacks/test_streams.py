"""Standard output that is closed, full or without a reader; interrupts during the imports."""

from __future__ import annotations

import errno
import io
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from attacks.scale import scaled

from matryoshka import interrupts
from matryoshka.config import program

TEN_LINES = "from matryoshka.config import program\n"
TEN_LINES += "@program\ndef main():\n    for i in range({count}):\n        print('x' * 99{flush})\n"
TEN_LINES += "    open('done', 'w').close()\n    return {status}\n"
TEN_LINES += "raise SystemExit(main())\n"


def shell(command: str, folder, *, count=10, flush="", status=0) -> subprocess.CompletedProcess:
    """Run `command`, in which PROGRAM prints `count` lines and leaves the file `done`."""
    script = folder / "program.py"
    script.write_text(TEN_LINES.format(count=count, flush=flush, status=status))
    return subprocess.run(
        ["bash", "-c", command.replace("PROGRAM", f"{sys.executable} {script}")],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize("flush", ["", ", flush=True"])
@pytest.mark.parametrize(
    "command",
    [
        "PROGRAM >&-",  # closed
        "PROGRAM >&- 2>&-",
        "PROGRAM <&- >&- 2>&-",
        "PROGRAM | true; exit ${PIPESTATUS[0]}",
        "PROGRAM | head -c 1; exit ${PIPESTATUS[0]}",
        "PROGRAM 2>/dev/full",
    ],
)
def test_nobody_listens(command, flush, tmp_path):
    done = shell(command, tmp_path, count=2000, flush=flush)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "done").exists(), "the work was not done to its end"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_behind_standard_output(tmp_path):
    line = (
        "error: standard output: No space left on device; the program itself has ended as it should"
    )
    for flush in ("", ", flush=True"):
        done = shell("PROGRAM > /dev/full", tmp_path, flush=flush)
        assert (done.returncode, done.stderr) == (2, f"{line}\n")
        assert (tmp_path / "done").exists()
    # A program that fails says why, not that nobody can read it.
    done = shell("PROGRAM > /dev/full", tmp_path, status=75)
    assert (done.returncode, done.stderr) == (75, "")
    assert shell("PROGRAM > /dev/full 2>&1", tmp_path).returncode == 2


@pytest.mark.parametrize("argv", [["--help"], ["--version"], [], ["train", "--help"], ["trian"]])
@pytest.mark.parametrize("where", [">&-", "> /dev/full", "| true"])
def test_the_command_itself(argv, where, tmp_path):
    words = " ".join(argv)
    done = shell(
        f"{sys.executable} -m matryoshka {words} {where}; exit ${{PIPESTATUS[0]}}", tmp_path
    )
    failed = argv in ([], ["trian"])
    assert done.returncode == (2 if failed or "full" in where else 0)
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 1


def test_a_closed_descriptor_is_not_given_to_a_file(tmp_path):
    """A library that prints would write into it."""
    script = tmp_path / "program.py"
    script.write_text(
        "import os\nfrom matryoshka.config import program\n"
        "@program\ndef main():\n    os.write(os.open('numbers', os.O_RDWR | os.O_CREAT), b'7')\n"
        "    os.write(1, b'a line of a library')\nmain()\n"
    )
    shell_line = f"{sys.executable} {script} <&- >&- 2>&-"
    subprocess.run(["bash", "-c", shell_line], cwd=tmp_path, check=True, timeout=120)
    assert (tmp_path / "numbers").read_text() == "7"


def test_text_that_the_stream_cannot_hold(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))

    @program
    def main():
        print("caf\xe9 \udcff \u65e5")
        sys.stdout.flush()

    main()
    assert raw.getvalue() == b"caf\\xe9 \\udcff \\u65e5\n"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "error: No space left on device\n"),
        (OSError(errno.EMFILE, "Too many open files"), "error: Too many open files\n"),
        (OSError(errno.ENOENT, "none", "a\nb"), "error: 'a\\nb': none\n"),
        (MemoryError(), "error: not enough memory (no reason given): smaller"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 1"), "error: not enough memory"),
        (UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates"), "error: '\\udcff': not text"),
    ],
)
def test_errors_of_the_machine_are_one_line(error, line, capsys):
    @program
    def main():
        raise error

    with pytest.raises(SystemExit, match=r"^2$"):
        main()
    shown = capsys.readouterr().err
    assert shown.startswith(line)
    assert len(shown.splitlines()) == 1


# ---------------------------------------------------------------- interrupts


def test_an_interrupt_that_became_another_error_is_one_line(capsys):
    @program
    def main():
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise ImportError("cannot import name 'x'") from None

    with pytest.raises(SystemExit, match=r"^130$"):
        main()
    assert capsys.readouterr().err == "interrupted\n"


def test_the_handlers_of_imports():
    before = signal.getsignal(signal.SIGINT)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with interrupts.importing():
            assert signal.getsignal(signal.SIGINT) is interrupts.quit_at_once
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # nohup
        with interrupts.importing():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


# (a module that is imported once the handler is set, the command)
COMMANDS = [
    ("yaml", ["-m", "matryoshka", "eval", "--path=timm:resnet18", "--data-root=."]),
    ("yaml", ["-m", "matryoshka", "demo", "pyproject.toml"]),
    ("numpy.version", ["inference/analyze.py", "--results=pyproject.toml"]),
]


@pytest.fixture
def heeded_interrupts():
    """A shell starts what it runs in the background, and all that this starts, without them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeded_interrupts")
@pytest.mark.parametrize(("module", "words"), COMMANDS)
def test_an_interrupt_during_the_imports(module, words, pytestconfig):
    """Python's own start, before that, has no handler of ours."""
    rng = random.Random(words[0])
    for _ in range(scaled(1, 50)):
        child = subprocess.Popen(
            [sys.executable, "-X", "importtime", *words],
            cwd=pytestconfig.rootpath,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for line in child.stderr:
            if line.endswith(f" {module}\n"):
                break
        time.sleep(rng.uniform(0, scaled(1, 10) / 10))
        child.send_signal(signal.SIGINT)
        rest = child.stderr.read()
        said = [line for line in rest.splitlines() if not line.startswith("import time:")]
        child.wait()
        if child.returncode == 2:  # it has ended before the signal
            continue
        assert (child.returncode, said) == (interrupts.INTERRUPTED, ["interrupted"])
