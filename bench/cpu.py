"""Environment variables to set before libraries are loaded."""

from __future__ import annotations

from pathlib import Path


def blas_kernels() -> dict[str, str]:
    """Environment for faiss-cpu's OpenBLAS, {} for CPUs without AVX2.

    Its version of 2021 treats newer CPUs as a Pentium 4: 62 instead of 273 GFLOP/s on a Xeon with
    AVX-512.
    """
    about = Path("/proc/cpuinfo")
    flags = about.read_text() if about.exists() else ""
    kind = "SkylakeX" if " avx512bw " in flags else "Haswell" if " avx2 " in flags else ""
    return {"OPENBLAS_CORETYPE": kind} if kind else {}
