"""A .beton that is cut off while it is read: BetonError that names it, never a signal, never an
image that is made of zeros.
"""

import itertools
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from attacks.scale import scaled
from jpeg_files import sampled

from matryoshka.data import BetonError, BetonFile, CenterCrop, Loader, _native, write_beton

CASES = scaled(4, 150)  # of each way to read
IMAGES = 64


class Photos:
    """Two photos, repeated: a source for write_beton."""

    classes = ("a", "b")
    labels = np.arange(IMAGES) % 2

    def __init__(self, side):
        self.data = [sampled(side, side, name) for name in ("420", "444")]

    def __len__(self):
        return IMAGES

    def read(self, index):
        return self.data[index % 2]

    def name(self, index):
        return f"{index}.jpg"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut")
    for mode in ("jpg", "raw"):
        write_beton(Photos(160), folder / f"{mode}.beton", max_resolution=500, write_mode=mode)
    return folder


def test_readers_survive_cuts(files):
    """Every way of reading; each ends with BetonError that names the file."""
    program = Path(__file__).with_name("cut_reader.py")
    command = [sys.executable, str(program), str(files), str(CASES), "17"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-2000:]}"
    counts = json.loads(done.stdout.splitlines()[-1])
    assert len(counts) == 8
    assert set(counts.values()) == {CASES}


@pytest.mark.parametrize("mode", ["jpg", "raw"])
@pytest.mark.parametrize("on_error", ["error", "skip"])
def test_bytes_lost_after_the_look_at_the_size(files, tmp_path, mode, on_error):
    """The file is cut off between `fetch` and decoding, where no look at its size can help."""
    path = tmp_path / "x.beton"
    path.write_bytes((files / f"{mode}.beton").read_bytes())
    with BetonFile(path) as data:
        (samples,) = data.fetch(np.arange(8))
        with path.open("r+b") as file:
            file.truncate(1 << 20)
        out = np.zeros((8, 64, 64, 3), np.uint8)
        crops = np.tile(np.array([0, 0, 160, 160, 0], np.int32), (8, 1))
        _native.decode_batch(_native.Pool(2), *samples[:6], crops, out)
        with pytest.raises(BetonError, match=r"x\.beton: was truncated while in use: 1048576 of"):
            samples.check()
        # The size is back, the bytes are not.
        with path.open("r+b") as file:
            file.truncate(data.num_bytes)
        with pytest.raises(BetonError, match=r"x\.beton: was truncated while in use, or its disk"):
            samples.check()
        with pytest.raises(BetonError, match="was truncated"):
            next(iter(Loader(data, 4, crop=CenterCrop(32), on_error=on_error)))


def test_views_of_lost_bytes_are_zeros(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(bytes(range(1, 251)) * 400)
    with path.open("rb") as file:
        mapped = _native.FileMap(file.fileno())
    bytes_of = mapped.data
    with pytest.raises(ValueError, match="read-only"):
        bytes_of[0] = 1
    with path.open("r+b") as file:
        file.truncate(50)
    assert bytes_of[:50].tolist() == list(range(1, 51))
    assert not mapped.torn
    assert not bytes_of[8192:].any()
    assert mapped.torn
    assert mapped.begin_reading() == 50
    del mapped
    assert not bytes_of[9000:].any()  # the array keeps the map


@pytest.mark.parametrize("signal_source", ["kill", "another map"])
def test_other_faults_still_end_the_process(tmp_path, signal_source):
    """Only our maps are guarded: what the process did for SIGBUS before, it still does."""
    (tmp_path / "x").write_bytes(bytes(100_000))
    fault = {
        "kill": "os.kill(os.getpid(), signal.SIGBUS)",
        "another map": "m = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ); "
        "os.truncate('x', 10); m[50_000]",
    }[signal_source]
    program = (
        "import mmap, os, signal\n"
        "from matryoshka.data import _native\n"
        "f = open('x', 'rb')\n"
        "guarded = _native.FileMap(f.fileno())\n"
        f"{fault}\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=False)
    assert done.returncode == -signal.SIGBUS


IMPORTS = ("data._native", "retrieval._native")
CUT = ("photos.beton", "rows.f16")
TURNS = [
    (" ".join(imports), " ".join(cut), taken)
    for imports in itertools.permutations(IMPORTS)
    for cut in itertools.permutations(CUT)
    for taken in ("taken", "left")
]


@pytest.mark.parametrize(("imports", "cut", "taken"), TURNS[:: scaled(3, 1)])
def test_a_beton_and_an_index_in_one_process(files, tmp_path, imports, cut, taken):
    """One handler serves both native modules, whichever was loaded or cut off first."""
    (tmp_path / "photos.beton").write_bytes((files / "jpg.beton").read_bytes())
    (tmp_path / "rows.f16").write_bytes(bytes(range(1, 251)) * 400)
    program = Path(__file__).with_name("cut_both.py")
    command = [sys.executable, str(program), str(tmp_path), imports, cut, taken]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == cut.split(), done.stderr[-2000:]
    assert done.returncode == -signal.SIGBUS


HANDLERS = {
    "faulthandler": ("import faulthandler; faulthandler.enable()", "Fatal Python error: Bus error"),
    "ignored": ("signal.signal(signal.SIGBUS, signal.SIG_IGN)", ""),
    "Python": ("signal.signal(signal.SIGBUS, lambda *_: print('ours to handle'))", ""),
}


@pytest.mark.parametrize("handler", HANDLERS)
@pytest.mark.parametrize("installed", ["before", "after", "between"])
def test_handlers_of_other_code_get_their_signals(tmp_path, handler, installed):
    """kill -BUS does what it does without us, also where others install theirs again and again."""
    (tmp_path / "x").write_bytes(bytes(range(1, 251)) * 400)
    install, says = HANDLERS[handler]
    place = {
        "before": (install, "", ""),
        "after": ("", install, ""),
        "between": (install, install, "guarded.begin_reading()"),
    }[installed]
    program = (
        "import os, signal\n"
        "from matryoshka.data import _native\n"
        f"{place[0]}\n"
        "f = open('x', 'rb')\n"
        "guarded = _native.FileMap(f.fileno())\n"
        f"{place[1]}\n"
        f"{place[2]}\n"
        "guarded.begin_reading()\n"
        "os.truncate('x', 10)\n"
        "assert not guarded.data[50_000:].any() and guarded.torn\n"
        "os.kill(os.getpid(), signal.SIGBUS)\n"
        "print('alive')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert says in done.stderr
    if handler == "faulthandler":
        assert done.returncode == -signal.SIGBUS
        return
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == "alive"
    assert ("ours to handle" in done.stdout) == (handler == "Python")
