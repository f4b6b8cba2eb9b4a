"""Search kernels of other CPUs: cross-compiled and run in an emulator; skipped without one."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NATIVE = ROOT / "matryoshka" / "retrieval" / "native"
FLAGS = [
    "-std=c++17",
    "-O2",
    "-static",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
]


def build(compiler, folder, macro, sources):
    """Compile search_kernels.cpp with the kernels in `sources`: file -> its compiler options."""
    objects = []
    for name, options in (
        {"scan_kernels.cpp": [], "scan_kernels_portable.cpp": []} | sources
    ).items():
        objects.append(folder / f"{name}.o")
        command = [
            compiler,
            *FLAGS,
            *options,
            f"-D{macro}",
            "-c",
            str(NATIVE / name),
            "-o",
            str(objects[-1]),
        ]
        subprocess.run(command, check=True)
    program = folder / "search_kernels"
    check = str(Path(__file__).with_name("search_kernels.cpp"))
    subprocess.run(
        [compiler, *FLAGS, f"-I{NATIVE}", check, *map(str, objects), "-o", str(program)], check=True
    )
    return program


def run(*command):
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split("\n")[:-1]


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not shutil.which("g++"), reason="needs g++ on x86-64"
)
def test_the_check_itself_on_this_cpu(tmp_path):
    from matryoshka.retrieval import _native

    avx2 = ["-mavx2", "-mfma", "-mf16c", "-mpopcnt"]
    avx512 = [*avx2, *(f"-mavx512{part}" for part in ("f", "bw", "vl", "vnni", "vpopcntdq"))]
    program = build(
        "g++",
        tmp_path,
        "MATRYOSHKA_X86_64",
        {"scan_kernels_avx2.cpp": avx2, "scan_kernels_vnni.cpp": avx512},
    )
    assert run(program) == [f"{name} agrees" for name in _native.kernels()]


@pytest.mark.skipif(not shutil.which("aarch64-linux-gnu-g++"), reason="needs g++-aarch64-linux-gnu")
@pytest.mark.skipif(not shutil.which("qemu-aarch64"), reason="needs qemu-user")
def test_arm(tmp_path):
    sources = {
        "scan_kernels_neon.cpp": [],
        "scan_kernels_dotprod.cpp": ["-march=armv8.2-a+dotprod"],
    }
    program = build("aarch64-linux-gnu-g++", tmp_path, "MATRYOSHKA_ARM64", sources)
    assert run("qemu-aarch64", "-cpu", "max", program) == [
        "neon-dotprod agrees",
        "neon agrees",
        "portable agrees",
    ]
    assert run("qemu-aarch64", "-cpu", "cortex-a53", program) == ["neon agrees", "portable agrees"]
