"""An index whose files change under it: damaged, cut off, or opened before a fork."""

import faulthandler
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from attacks.scale import LONG, scaled
from hypothesis import given
from hypothesis import strategies as st
from matryoshka.inference import index as program
from stored_indexes import built, random_rows

from matryoshka.retrieval import RetrievalError, SearchParams, Stage, _native, store_part
from matryoshka.retrieval.checked_file import BLOCK, BlockSums, CheckedFile, sums_of
from matryoshka.retrieval.store import Index
from matryoshka.retrieval.store_part import MAYBE_LARGE, read_checked, with_checksum
from matryoshka.retrieval.store_writer import Writer

ROWS, COLUMNS, DIM = 3000, 48, 16
ASKED = random_rows(4, COLUMNS, seed=1)
PARAMS = (
    SearchParams("ivf", DIM, 100, (Stage(COLUMNS, 10),), nprobe=4),
    SearchParams("scan", DIM, 100, (Stage(COLUMNS, 10),)),
    SearchParams("exact", COLUMNS, 10),
)


@pytest.fixture(scope="module", params=["lists", "scan"])
def sound(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("index") / "photos.index"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        lists = 20 if request.param == "lists" else 0
        built(folder, random_rows(ROWS, COLUMNS), dim=DIM, lists=lists)
    return folder


@pytest.fixture(autouse=True)
def mapped(monkeypatch):
    """As if all files were large."""
    monkeypatch.setattr(store_part, "MMAP_MIN_BYTES", 1)


def large_files(folder):
    return sorted(file for file in folder.rglob("*") if file.name in MAYBE_LARGE)


def answers(index):
    """All that an index says, in a fixed order."""
    found = [index.search(ASKED, params, k=10).ids.tolist() for params in PARAMS]
    some = list(range(0, ROWS, 7))
    found.append(index.search(ASKED, k=10, only=some).ids.tolist())
    # Every file to its last byte: rows, labels and so on are arrays of all rows.
    names = [index.name(row) for row in range(ROWS)]
    found += [names, index.find(names).tolist()]
    for row in (*some, ROWS - 1):
        found += [index.class_name(row), index.origin(row)[1], index.vector(row).tobytes()]
    for part in index.parts:
        found += [array.tobytes() for array in (part.rows, part.labels, part.origins)]
    index.check_files()
    return found


# ---------------------------------------------------------------- checksums


@given(st.binary(max_size=200))
def test_checksums_are_those_of_xxhash(data):
    assert sums_of(data).tolist() == ([xxhash.xxh64_intdigest(data)] if data else [])


@given(
    sizes=st.lists(st.integers(0, 3 * BLOCK), max_size=6),
    seed=st.integers(0, 2**32 - 1),
)
def test_checksums_of_pieces(sizes, seed):
    data = np.random.default_rng(seed).bytes(sum(sizes))
    sums = BlockSums()
    at = 0
    for size in sizes:
        sums.add(memoryview(data)[at : at + size])
        at += size
    blocks = [data[first : first + BLOCK] for first in range(0, len(data), BLOCK)]
    assert sums.end().tolist() == [xxhash.xxh64_intdigest(block) for block in blocks]


def test_no_damage_is_accepted(sound):
    """Every flipped bit is found by `verify`, and by whoever reads all of the index."""
    rng = random.Random(scaled(1, time.time_ns()))
    expected = answers(Index(sound, 1))
    files = [file for file in sorted(sound.rglob("*")) if file.is_file() and file.stat().st_size]
    for turn in range(scaled(40, 50_000)):
        file = rng.choice(files)
        good = file.read_bytes()
        bit = rng.randrange(8 * len(good))
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bad)
        try:
            with pytest.raises(RetrievalError, match=file.name.replace(".", r"\.")) as caught:
                Index(sound, 1).verify()
            assert "index verify" in str(caught.value)
            if turn % 10 == 0:
                with pytest.raises(RetrievalError, match="damaged"):
                    answers(Index(sound, 1))
        finally:
            file.write_bytes(good)
    assert answers(Index(sound, 1)) == expected


def test_noise_is_found_when_it_is_read_and_not_before(sound):
    (file,) = (file for file in large_files(sound) if file.name == "rows.f16")
    good = file.read_bytes()
    first = 3 * BLOCK // (2 * COLUMNS) + 1  # a row in the fourth block
    bad = bytearray(good)
    bad[3 * BLOCK : 3 * BLOCK + (64 << 10)] = np.random.default_rng(0).bytes(64 << 10)
    file.write_bytes(bad)
    try:
        index = Index(sound, 1)
        # Rows of other blocks are found as before.
        assert index.search(ASKED, k=5, only=range(100)).ids.max() < 100
        assert index.vector(5).shape == (COLUMNS,)
        for read in (
            lambda: index.vector(first),
            lambda: index.search(ASKED, k=5, only=[first]),
            lambda: index.search(ASKED, PARAMS[2]),
            lambda: index.search(ASKED, SearchParams("scan", DIM, ROWS, (Stage(COLUMNS, 9),))),
            index.warm,
            lambda: index.parts[0].rows,
        ):
            with pytest.raises(RetrievalError, match=r"rows\.f16: is damaged at byte"):
                read()
        with Writer(sound, 1) as writer, pytest.raises(RetrievalError, match="damaged"):
            writer.compact()
    finally:
        file.write_bytes(good)


def test_the_program_verifies(sound, capsys):
    assert program.main(["verify", str(sound)]) == 0
    assert "all checksums match" in capsys.readouterr().out
    file = large_files(sound)[0]
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    try:
        with pytest.raises(SystemExit) as stopped:
            program.main(["verify", str(sound)])
        assert stopped.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {file}: is damaged")
    finally:
        file.write_bytes(good)


def test_an_index_of_an_older_version_is_searched_as_before(sound, tmp_path, capsys):
    folder = tmp_path / "old.index"
    shutil.copytree(sound, folder)
    for file in folder.rglob("part.json"):
        about = read_checked(file)
        del about["blocks"], about["files"]["blocks.u64"]
        file.write_bytes(with_checksum(about))
        (file.parent / "blocks.u64").unlink()
    old = Index(folder, 1)
    assert answers(old) == answers(Index(sound, 1))
    assert program.main(["info", str(folder)]) == 0
    assert "without checksums of blocks; matryoshka index compact" in capsys.readouterr().out
    file = large_files(folder)[-1]
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    with pytest.raises(RetrievalError, match="damaged"):
        Index(folder, 1).verify()


# ---------------------------------------------------------------- files that are cut off


def in_child(function):
    """The exit status of a forked child that calls the function; -N if a signal N ended it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(scaled(120, 3600))
            function()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def test_a_file_that_is_cut_off_is_an_error(sound, tmp_path):
    report = tmp_path / "report"

    def cut_many_times():
        rng = random.Random(scaled(2, time.time_ns()))
        refused = 0
        for _ in range(scaled(16, 1000)):
            file = rng.choice(large_files(sound))
            good = file.read_bytes()
            length = rng.choice((0, 1, 4096, len(good) - 1, rng.randrange(len(good))))
            index = Index(sound, 1)
            if rng.random() < 0.5:
                answers(index)  # all of it is mapped and checked
            os.truncate(file, min(length, len(good) - 1))
            message = ""
            try:
                answers(index)
            except RetrievalError as error:
                message = str(error)
            del index
            file.write_bytes(good)
            assert "cut off" in message, (file, length, message)
            assert str(file) in message
            refused += 1
        report.write_text(str(refused))

    assert in_child(cut_many_times) == 0, "a signal, or another result"
    assert int(report.read_text()) == scaled(16, 1000)


def silence_faulthandler():
    """Where pytest has enabled it, it writes the stack before the process ends."""
    if faulthandler.is_enabled():
        faulthandler.enable(os.open(os.devnull, os.O_WRONLY))


def test_other_bus_errors_still_end_the_process(tmp_path):
    def read_beyond():
        file = tmp_path / "other"
        file.write_bytes(bytes(1 << 16))
        ours = CheckedFile(file, 1 << 16, None, 1)
        other = np.memmap(file, np.uint8, "r")
        os.truncate(file, 10)
        assert not ours.bytes[40_000]
        with pytest.raises(RetrievalError, match="cut off"):
            ours.check_whole()
        silence_faulthandler()
        print(other[40_000])

    def send_the_signal():
        silence_faulthandler()
        os.kill(os.getpid(), signal.SIGBUS)

    assert in_child(read_beyond) == -signal.SIGBUS
    assert in_child(send_the_signal) == -signal.SIGBUS


def test_a_handler_of_somebody_else_does_not_take_the_signal_away(sound):
    def search():
        index = Index(sound, 1)
        signal.signal(signal.SIGBUS, signal.SIG_DFL)  # as torch's workers, which set their own
        (file,) = (file for file in large_files(sound) if file.name == "rows.f16")
        os.truncate(file, 0)
        with pytest.raises(RetrievalError, match="cut off"):
            index.search(ASKED, PARAMS[0])

    (file,) = (file for file in large_files(sound) if file.name == "rows.f16")
    good = file.read_bytes()
    try:
        assert in_child(search) == 0
    finally:
        file.write_bytes(good)


def test_maps_of_something_else(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "none"):
        with pytest.raises((RetrievalError, OSError)):
            CheckedFile(path, 0 if path == tmp_path else 5, None, 1)
    with pytest.raises(ValueError, match="outside"):
        _native.check_blocks(_native.Pool(1), None, 0, 1)


# ---------------------------------------------------------------- forks


def test_forked_workers_search(sound):
    """As gunicorn does it with --preload: the index is opened and used before the fork."""
    index = Index(sound, 2)
    expected = [index.search(ASKED, params, k=10).ids.tolist() for params in PARAMS]

    def work():
        for opened in (index, Index(sound, 2)):
            for params, ids in zip(PARAMS, expected, strict=True):
                for _ in range(3):
                    assert opened.search(ASKED, params, k=10).ids.tolist() == ids

    assert [in_child(work) for _ in range(3)] == [0, 0, 0]
    work()


FORKED_EXACT_SEARCH = """
import os, signal, sys, torch
from stored_indexes import random_rows
from matryoshka.retrieval import exact_search
torch.set_num_threads(2)
rows = random_rows(20_000, 128)
expected = exact_search(rows, rows[:200], 128, 10).ids
child = os.fork()
if child == 0:
    signal.alarm(300)
    found = exact_search(rows, rows[:200], 128, 10).ids
    os._exit(0 if (found == expected).all() else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not LONG, reason="only in `make attack`: it imports torch once more")
def test_exact_search_in_a_fork_of_a_process_with_threads():
    builders = Path(__file__).resolve().parents[1] / "builders"
    command = [sys.executable, "-c", FORKED_EXACT_SEARCH]
    environment = {**os.environ, "PYTHONPATH": str(builders), "OMP_NUM_THREADS": "2"}
    assert subprocess.run(command, env=environment, check=False).returncode == 0


class Searched(torch.utils.data.Dataset):
    """The neighbours of each query, found in a worker."""

    def __init__(self, index):
        self.index = index

    def __len__(self):
        return len(ASKED)

    def __getitem__(self, at):
        return self.index.search(ASKED[at : at + 1], k=5).ids[0]


def test_workers_of_a_data_loader_search(sound):
    index = Index(sound, 2)
    expected = index.search(ASKED, k=5).ids
    loader = torch.utils.data.DataLoader(
        Searched(index), batch_size=2, num_workers=2, multiprocessing_context="fork"
    )
    for _ in range(2):
        found = torch.cat(list(loader))
        np.testing.assert_array_equal(found.numpy(), expected)
