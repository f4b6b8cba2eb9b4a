"""Programs that write, small ones: how each is started again, and what it may leave.

writer = writer_of(disk, "embed", inputs, tmp_path)
writer.reset()
writer.run(at=3, action=Action.SIGNAL)
check_whole(writer.out)
"""

from __future__ import annotations

import json
import random
import re
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import small_commands
import yaml
from attacks.scale import LONG
from faulty_disk import Ended, FaultyDisk
from PIL import Image

from matryoshka import tensor_files
from matryoshka.data.reader import BetonFile
from matryoshka.embeddings import open_embeddings
from matryoshka.retrieval.store import Index

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
QUICK = ("write", "index build", "report")
PROGRAMS = list(AGAIN) if LONG else list(QUICK)
HIDDEN = re.compile(r"(^|/)\.[^/]*\.tmp$")
# What an interrupted program continues from, and locks that are free. SQLite repairs its file.
KEPT = re.compile(r"(^|/)\.unfinished/|\.lock$|/step_\d+\.safetensors$|\.db-journal$")
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
            # Of a sweep, trials that were killed are repeated under other numbers.
            found.add(re.sub(r"(part|deleted|trial)[-_][0-9a-f]{5,8}", r"\1", name))
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
