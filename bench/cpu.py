"""What has to be said before the libraries are loaded."""

from __future__ import annotations

from pathlib import Path


def blas_kernels() -> dict[str, str]:
    """Environment for faiss-cpu's OpenBLAS: it is of 2021 and takes newer CPUs for a Pentium 4, 62
    instead of 273 GFLOP/s on a Xeon with AVX-512. Empty where this is another kind of CPU.
    """
    about = Path("/proc/cpuinfo")
    flags = about.read_text() if about.exists() else ""
    kind = "SkylakeX" if " avx512bw " in flags else "Haswell" if " avx2 " in flags else ""
    return {"OPENBLAS_CORETYPE": kind} if kind else {}
