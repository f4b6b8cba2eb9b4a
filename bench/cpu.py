"""Environment variables to set before libraries are loaded."""

from __future__ import annotations

from pathlib import Path


def blas_kernels() -> dict[str, str]:
    """Environment for faiss-cpu's OpenBLAS, {} for CPUs without AVX2.

    Its version of 2021 treats newer CPUs as a Pentium 4: 62 instead of 273 GFLOP/s on a Xeon with
    AVX-512.
    """
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    if " avx512bw " in flags:
        return {"OPENBLAS_CORETYPE": "SkylakeX"}
    if " avx2 " in flags:
        return {"OPENBLAS_CORETYPE": "Haswell"}
    return {}
