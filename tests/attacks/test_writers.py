"""Every program that writes, on a disk that fails, and killed or stopped at every call that writes.

After a kill: what has its final name is whole, the next start works, and nothing is left but its
outputs. After an error or a signal: one line, and nothing unfinished.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import time

import pytest
import small_commands
from attacks.scale import LONG, scaled
from faulty_disk import Action
from writing_programs import (
    CHARTS,
    HIDDEN,
    PROGRAMS,
    RESUME,
    check_line,
    check_whole,
    litter,
    names_in,
    start_again,
    writer_of,
)

from matryoshka.training import snapshot

# ---------------------------------------------------------------- kills


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_kill_at_a_call_that_writes(program, disk, inputs, tmp_path):
    """Before the call, and in the middle of a write."""
    writer = writer_of(disk, program, inputs, tmp_path)
    for action in (Action.SIGNAL, Action.TORN):
        for number in writer.places(3):
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
    for number in writer.places(3):
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
    for turn, number in enumerate(writer.places(2)):
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
        # -which: before the program handles it, when it holds nothing.
        assert ended.status in (0, 75, 128 + which, -which), f"{what}: {ended}"
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


@pytest.mark.skipif(not LONG, reason="trains: `make attack`")
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
