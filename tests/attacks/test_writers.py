"""Every program that writes, on a disk that fails, and killed or stopped at every call that writes.

After a kill: what has its final name is whole, the next start works, and nothing is left but its
outputs. After an error or a signal: one line, and nothing unfinished.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import small_commands
import yaml
from attacks.scale import LONG, scaled
from faulty_disk import Action, Ended, FaultyDisk
from PIL import Image

from matryoshka import tensor_files
from matryoshka.data.reader import BetonFile
from matryoshka.embeddings import open_embeddings
from matryoshka.retrieval.store import Index
from matryoshka.training import snapshot

RESUME = ["--training.resume=auto"]
# Program: the words with which it is started again. The first are fast enough for every run of the
# tests.
AGAIN = {
    "write": [],
    "index build": ["--overwrite"],
    "embed": ["--overwrite"],
    "report": [],
    "retrieve": ["--overwrite"],
    "eval": [],
    "vqvae": [],
    "train": RESUME,
    "cifar": RESUME,
    "ssl": RESUME,
    "probe": [],
    "dims": [],
    "adapt": ["--overwrite"],
    "analyze": [],
    "gradcam": [],
    "baselines": [],
    "export": ["--overwrite"],
    "index add": ["--replace"],
    "index delete": ["--missing-ok"],
    "index compact": [],
    "sweep": [],
}
# Every call of these; of the others, trained in seconds, some.
EVERY = ("write", "index build", "index add", "index compact", "index delete", "embed", "report")
EVERY += ("sweep", "export", "retrieve", "eval", "vqvae", "adapt", "analyze")
MOST, SOME = 100, 10
QUICK = ("write", "index build", "report", "retrieve")
PROGRAMS = list(AGAIN) if LONG else list(QUICK)
HIDDEN = re.compile(r"(^|/)\.[^/]*\.tmp$")
# What an interrupted program continues from, and locks that are free.
KEPT = re.compile(r"(^|/)\.unfinished/|(^|/)(run|fit|\.?index)?\.?lock$|\.lock$")
# Drawn once the run is finished; the report draws its own.
CHARTS = {"run/accuracy.png"}
TRIAL = """
import json, os, sys
given = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:])
folder = os.path.join(given["logging.folder"], given["logging.run_id"])
os.makedirs(folder)
with open(os.path.join(folder, "log"), "w") as log:
    log.write(json.dumps({"epoch": 0, "top_1": float(given["x"])}) + "\\n")
"""


@dataclass
class Writer:
    """A program and its outputs. before: an earlier result, which every run begins with."""

    disk: FaultyDisk
    program: str
    argv: list[str]
    out: Path
    before: Path | None = None
    names: frozenset[str] = frozenset()
    calls: int = 0

    def run(self, *more: str, **fault) -> Ended:
        return self.disk.run([*self.argv, *more], below=self.out, **fault)

    def reset(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        if self.before is None:
            self.out.mkdir()
        else:
            shutil.copytree(self.before, self.out, symlinks=True)

    def places(self, count: int) -> list[int]:
        """Numbers of calls, from the first to the last."""
        every = range(1, self.calls + 1)
        if LONG:
            count = MOST if self.program in EVERY else SOME
        return sorted(random.Random(self.program).sample(every, min(count, self.calls)))


def writer_of(disk: FaultyDisk, program: str, root: Path, folder: Path) -> Writer:
    """A writer that has run once, without a fault."""
    out = folder / "out"
    before = None
    if program == "sweep":
        (folder / "trial.py").write_text(TRIAL)
        sweep = {
            "program": "trial.py",
            "method": "grid",
            "metric": {"name": "top_1", "goal": "maximize"},
            "parameters": {"x": {"values": [1, 2]}},
        }
        (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))
        argv = ["sweep", str(folder / "sweep.yaml"), f"--study={out / 'study'}"]
    elif program.startswith("index ") and program != "index build":
        before = folder / "before"
        shutil.copytree(root / "inputs" / "photos.index", before / "photos.index")
        argv = [*program.split(), str(out / "photos.index"), "--threads=1"]
        if program == "index add":
            argv += [f"--embeddings={root / 'inputs/embeddings'}", "--prefix=b/"]
        if program == "index delete":
            argv.append("0")
    else:
        argv = small_commands.command(program, root, out)
    writer = Writer(disk, program, argv, out, before)
    writer.reset()
    done = writer.run()
    assert done.status == 0, done.err
    writer.calls = len(done.calls)
    writer.names = names_in(out)
    assert not [name for name in writer.names if HIDDEN.search(name)]
    check_whole(out)
    return writer


def names_in(folder: Path) -> frozenset[str]:
    found = set()
    for path in folder.rglob("*"):
        if path.is_file() or path.is_symlink():
            name = str(path.relative_to(folder))
            found.add(re.sub(r"(part|deleted)-[0-9a-f]{8}", r"\1", name))
    return frozenset(found)


def litter(writer: Writer) -> list[str]:
    """Files that no complete run leaves, besides those from which the next start continues."""
    extra = names_in(writer.out) - writer.names
    return sorted(name for name in extra if not KEPT.search(name))


def check_whole(folder: Path) -> None:
    """Every file that has its final name can be read to its end."""
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        # Of an index, what its manifest names is read below: other parts are of nobody.
        if not path.is_file() or path.name.startswith(".") or "/part-" in f"/{name}":
            continue
        if ".unfinished" in name:
            continue
        if path.name in ("log", "events.jsonl"):
            *whole, _unfinished = path.read_text().split("\n")
            for line in whole:
                json.loads(line)
        elif path.suffix == ".json" and path.name != "meta.json":
            json.loads(path.read_bytes())
        elif path.suffix == ".npy":
            np.load(path)
        elif path.suffix == ".safetensors":
            tensor_files.read(path).tensors()
        elif path.suffix == ".pt":
            assert zipfile.ZipFile(path).testzip() is None
        elif path.suffix == ".png":
            with Image.open(path) as picture:
                picture.load()
        elif path.suffix == ".html":
            assert path.read_text().rstrip().endswith("</html>")
        elif path.suffix == ".yaml":
            yaml.safe_load(path.read_text())
        elif path.suffix == ".beton":
            BetonFile(path).close()
        elif path.name == "index.json":
            Index(path.parent).verify()
        elif path.name == "meta.json":
            open_embeddings(path.parent)


def check_line(ended: Ended, what: str) -> None:
    """An error is one line that names a file of the outputs."""
    assert ended.status == 2, f"{what}: {ended.status} {ended.err[-2000:]}"
    lines = ended.err.splitlines()
    assert len(lines) == 1, f"{what}: {ended.err[-2000:]}"
    assert lines[0].startswith("error: "), f"{what}: {lines}"
    assert "/out" in lines[0], f"{what}: {lines}"


def start_again(writer: Writer, what: str) -> None:
    """The next start works, or finds that the work was done."""
    is_done = writer.program == "probe" and (writer.out / "run" / "model.safetensors").exists()
    ended = writer.run(*AGAIN[writer.program])
    assert ended.status == (2 if is_done else 0), f"{what}, then: {ended.status} {ended.err}"
    assert "Traceback" not in ended.err, f"{what}, then: {ended.err}"


# ---------------------------------------------------------------- kills


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_kill_at_a_call_that_writes(program, disk, inputs, tmp_path):
    """Before the call, and in the middle of a write."""
    writer = writer_of(disk, program, inputs, tmp_path)
    for action in (Action.SIGNAL, Action.TORN):
        for number in writer.places(4):
            what = f"{program} {action.name} at {number}"
            writer.reset()
            ended = writer.run(at=number, action=action)
            assert ended.status in (-signal.SIGKILL, 0), f"{what}: {ended}"
            check_whole(writer.out)
            start_again(writer, what)
            missing = writer.names - names_in(writer.out)
            assert not missing - CHARTS, f"{what}: {missing}"
            extra = [name for name in names_in(writer.out) if HIDDEN.search(name)]
            extra = [name for name in extra if "/.accuracy.png." not in name]  # see CHARTS
            assert not extra, f"{what}: {extra}"
            check_whole(writer.out)


# ---------------------------------------------------------------- errors of the disk


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_disk_that_fills_up(program, disk, inputs, tmp_path):
    writer = writer_of(disk, program, inputs, tmp_path)
    for number in writer.places(4):
        what = f"{program} full at {number}"
        writer.reset()
        ended = writer.run(at=number, action=Action.FULL)
        if ended.status != 0:
            check_line(ended, what)
        assert not litter(writer), f"{what}: {litter(writer)}"
        check_whole(writer.out)
        start_again(writer, what)
        missing = writer.names - names_in(writer.out)
        assert not missing - CHARTS, f"{what}: {missing}"
        assert not litter(writer) or program == "index add", what  # what it has replaced


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("action", [Action.READ_ONLY, Action.FAILED])
def test_a_disk_that_fails(program, action, disk, inputs, tmp_path):
    """From a call on everything, as a disk that the system makes read-only; or one call alone."""
    writer = writer_of(disk, program, inputs, tmp_path)
    for number in writer.places(2):
        what = f"{program} {action.name} at {number}"
        writer.reset()
        ended = writer.run(at=number, action=action)
        if ended.status != 0:
            check_line(ended, what)
        check_whole(writer.out)


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_signal_at_a_call_that_writes(program, disk, inputs, tmp_path):
    writer = writer_of(disk, program, inputs, tmp_path)
    lines = {
        signal.SIGTERM: "stopped by SIGTERM\n",
        signal.SIGHUP: "stopped by SIGHUP\n",
        signal.SIGINT: "interrupted\n",
    }
    for turn, number in enumerate(writer.places(3)):
        for which, line in list(lines.items())[turn % 3 :][: scaled(1, 3)]:
            what = f"{program} {which.name} at {number}"
            writer.reset()
            ended = writer.run(at=number, action=Action.SIGNAL, value=which)
            assert ended.status in (0, 75, 128 + which), f"{what}: {ended}"
            expected = line if ended.status == 128 + which else ""
            assert ended.err == expected, f"{what}: {ended}"
            assert not litter(writer), f"{what}: {litter(writer)}"
            check_whole(writer.out)
            start_again(writer, what)


@pytest.mark.skipif(not LONG, reason="takes minutes: `make attack`")
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_signal_at_any_time(program, disk, inputs, tmp_path):
    """Also while it computes, reads or imports."""
    writer = writer_of(disk, program, inputs, tmp_path)
    rng = random.Random(program)
    began = time.monotonic()
    writer.reset()
    writer.run()
    seconds = time.monotonic() - began
    for _ in range(12):
        which = rng.choice([signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
        delay = rng.uniform(0.001, seconds)
        what = f"{program} {which.name} after {delay:.3f} s"
        writer.reset()
        ended = writer.run(seconds=delay, signal_after=which)
        assert ended.status in (0, 75, 128 + which), f"{what}: {ended}"
        assert len(ended.err.splitlines()) == (ended.status == 128 + which), f"{what}: {ended}"
        assert not litter(writer), f"{what}: {litter(writer)}"
        check_whole(writer.out)
        start_again(writer, what)


# ---------------------------------------------------------------- full disks of the system itself


@pytest.mark.parametrize("program", PROGRAMS)
def test_files_of_a_limited_size(program, disk, inputs, tmp_path):
    """`ulimit -f`: SIGXFSZ kills no program; an earlier result stays."""
    writer = writer_of(disk, program, inputs, tmp_path)
    largest = max(path.stat().st_size for path in writer.out.rglob("*") if path.is_file())
    for share in (0.5, 0.01)[: scaled(1, 2)]:
        writer.reset()
        ended = writer.run(file_size=max(1, int(share * largest)))
        if ended.status != 0:
            check_line(ended, program)
            assert "File too large" in ended.err, ended.err
        assert not litter(writer), litter(writer)
        check_whole(writer.out)


@pytest.fixture
def small(tmp_path):
    """A file system of 256 kB; skips where mount is refused."""
    root = tmp_path / "out"
    root.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(root)]
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("needs root")
    if subprocess.run(words, capture_output=True, check=False).returncode != 0:
        pytest.skip("mount is refused here")
    try:
        yield root
    finally:
        subprocess.run(["umount", str(root)], check=True)


def test_a_small_file_system(small, disk, inputs):
    """Filled up, but for a few pages; then there is space again."""
    for program in PROGRAMS:
        if program == "sweep" or (program.startswith("index ") and program != "index build"):
            continue
        out = small / program.replace(" ", "-")
        argv = small_commands.command(program, inputs, out)
        for pages in (0, 1, 3)[: scaled(2, 3)]:
            out.mkdir()
            ballast = small / "ballast"
            free = os.statvfs(small).f_bavail - pages
            ballast.write_bytes(bytes(4096 * max(0, free)))
            ended = disk.run(argv, below=out)
            if ended.status != 0:
                check_line(ended, program)
            found = [name for name in names_in(out) if HIDDEN.search(name)]
            assert not found, f"{program}: {found}"
            check_whole(out)
            ballast.unlink()
            shutil.rmtree(out)


def test_a_disk_that_fills_up_while_a_run_saves(disk, inputs, tmp_path):
    """The run ends in one line, keeps its last whole checkpoint, and resumes from it."""
    writer = writer_of(disk, "train", inputs, tmp_path)
    writer.argv += ["--training.checkpoint_every_steps=1", "--training.batch_size=8"]
    writer.reset()
    calls = writer.run().calls
    writes = [i for i, call in enumerate(calls, 1) if re.match(r"write .*/\.step_", call)]
    at = writes[len(writes) // 2]
    writer.reset()
    ended = writer.run(at=at, action=Action.FULL)
    check_line(ended, "train")
    checkpoint, notes = snapshot.newest(writer.out / "run" / "checkpoints")
    assert checkpoint is not None
    assert notes == []
    assert not [name for name in names_in(writer.out) if HIDDEN.search(name)]
    ended = writer.run(*RESUME)
    assert (ended.status, ended.err) == (0, "")
    assert f"after step {checkpoint.metadata['step']}" in ended.out
    check_whole(writer.out)
