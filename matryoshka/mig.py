"""Slices of GPUs (NVIDIA's Multi-Instance GPU, MIG): each local rank gets one of its own.

CUDA shows a process a single slice, even if CUDA_VISIBLE_DEVICES lists several (NVIDIA MIG User
Guide, "CUDA Device Enumeration"). Ranks that share a machine would therefore all work on the first
slice.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from functools import cache

GPU = re.compile(r"GPU (\d+):.*\(UUID: (GPU-[^)]+)\)")
SLICE = re.compile(r"\s+MIG .*\(UUID: (MIG-[^)]+)\)")  # of the GPU in the lines above
PATIENCE = 60  # seconds; a driver that is not kept loaded takes several for 8 GPUs


class MigError(ValueError):
    """More processes than slices; the message gives the remedy."""

    user_error = True


def slices() -> list[str]:
    """UUIDs of the slices that this process may use, in nvidia-smi's order; [] without any.

    CUDA_VISIBLE_DEVICES, where it is set, says which: UUIDs of slices, or numbers or UUIDs of their
    GPUs. Runs nvidia-smi only where it may be needed and exists.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    named = None
    if visible is not None:
        named = [name.strip() for name in visible.split(",") if name.strip()]
        if any(name.startswith("MIG-") for name in named):
            return named
        if not named:
            return []
    found = []
    for number, uuid, own in _gpus():
        # CUDA accepts the beginning of a UUID.
        if named is None or any(name == number or uuid.startswith(name) for name in named):
            found += own
    return found


def _gpus() -> list[tuple[str, str, list[str]]]:
    """(number, UUID, UUIDs of the slices) of each GPU; [] without a driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        done = subprocess.run(
            [program, "-L"], capture_output=True, text=True, timeout=PATIENCE, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    gpus: list[tuple[str, str, list[str]]] = []
    for line in done.stdout.splitlines() if done.returncode == 0 else ():
        if found := GPU.match(line):
            gpus.append((found[1], found[2], []))
        elif (found := SLICE.match(line)) and gpus:
            gpus[-1][2].append(found[1])
    return gpus


@cache
def use_own_slice(local_rank: int, local_size: int) -> str | None:
    """Restrict this process to the slice of its local rank; its UUID, None on other machines.

    To be called before CUDA starts, which reads CUDA_VISIBLE_DEVICES once. Later calls return the
    answer of the first. MigError if the machine has fewer slices than processes.
    """
    available = slices()
    if not available:
        return None
    if local_size > len(available):
        raise MigError(
            f"{local_size} processes on a machine with {len(available)} MIG slices: start "
            f"{len(available)} (--nproc-per-node, dist.world_size), or use device=cpu"
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = available[local_rank]
    return available[local_rank]
