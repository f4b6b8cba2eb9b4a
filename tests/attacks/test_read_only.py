"""Folders on read-only media, as the place of outputs, of inputs, of a run and of the caches."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import small_commands
from attacks.scale import LONG
from faulty_disk import Action
from writing_programs import check_line

WRITERS = ("write", "train", "cifar", "ssl", "vqvae", "probe", "eval", "dims", "embed", "adapt")
WRITERS += ("index build", "retrieve", "analyze", "gradcam", "baselines", "export", "report")
READERS = (*WRITERS, "data info", "data verify", "runs", "index info")
QUICK = ("write", "report", "data verify", "runs", "index info")
CACHES = ("HOME", "XDG_CACHE_HOME", "TORCH_HOME", "HF_HOME", "MPLCONFIGDIR", "TMPDIR")
CACHES += ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")


def of_this_run(programs: tuple[str, ...]) -> list[str]:
    return [name for name in programs if LONG or name in QUICK]


@pytest.mark.parametrize("program", of_this_run(WRITERS))
def test_outputs(program, disk, inputs, tmp_path):
    """One line before the work, or after it; nothing else."""
    out = tmp_path / "out"
    out.mkdir()
    argv = small_commands.command(program, inputs, out)
    ended = disk.run(argv, below=out, at=1, action=Action.READ_ONLY)
    check_line(ended, program)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("program", of_this_run(READERS))
def test_inputs(program, disk, inputs, tmp_path):
    """Nothing is written beside what is only read."""
    out = tmp_path / "out"
    out.mkdir()
    argv = small_commands.command(program, inputs, out)
    ended = disk.run(argv, below=inputs, at=1, action=Action.READ_ONLY)
    assert (ended.status, ended.err) == (0, ""), program
    assert ended.calls == [], program


@pytest.mark.parametrize("program", of_this_run(READERS))
def test_caches(program, disk, inputs, tmp_path):
    out, home = tmp_path / "out", tmp_path / "home"
    out.mkdir()
    home.mkdir()
    argv = small_commands.command(program, inputs, out)
    environment = dict.fromkeys(CACHES[:-3], str(home))
    ended = disk.run(argv, below=home, at=1, action=Action.READ_ONLY, environment=environment)
    assert ended.status == 0, f"{program}: {ended.err}"
    assert "Traceback" not in ended.err


@pytest.fixture
def mounted(inputs, tmp_path):
    """The inputs on a small file system that is mounted read-only; skips where mount is refused."""
    root = tmp_path / "mounted"
    root.mkdir()

    def mount(*options: str) -> bool:
        words = ["mount", *options]
        return subprocess.run(words, capture_output=True, check=False).returncode == 0

    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("needs root")
    if not mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", str(root)):
        pytest.skip("mount is refused here")
    try:
        shutil.copytree(inputs, root, symlinks=True, dirs_exist_ok=True)
        link = root / "model.safetensors"
        target = root / "inputs" / "run" / "model.safetensors"
        link.unlink()
        link.symlink_to(target)
        assert mount("-o", "remount,ro", str(root))
        yield root
    finally:
        subprocess.run(["umount", str(root)], check=True)


def test_a_mounted_file_system(mounted, disk, tmp_path):
    """The same with the system's own errors."""
    for program in of_this_run(READERS):
        out = tmp_path / "out"
        out.mkdir()
        ended = disk.run(small_commands.command(program, mounted, out), below=out)
        assert (ended.status, ended.err) == (0, ""), program
        shutil.rmtree(out)
    for program in of_this_run(WRITERS):
        place = Path(mounted) / "photos"  # a folder that exists
        ended = disk.run(small_commands.command(program, mounted, place), below=place)
        assert ended.status == 2, f"{program}: {ended.status} {ended.err}"
        assert len(ended.err.splitlines()) == 1, f"{program}: {ended.err}"
        assert "Read-only file system" in ended.err or "exists" in ended.err, ended.err
