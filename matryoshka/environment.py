"""Provenance of a result: versions, commit, hardware."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path


def is_installed(package: str) -> bool:
    """Whether a package can be imported.

    A folder of its name without `__init__.py` does not count, though Python would import it: after
    `git clone` of FFCV beside this repository, its editable installation finds a folder `ffcv`.
    """
    found = find_spec(package)
    return found is not None and found.origin is not None


def available_cores() -> int:
    """Number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux: containers and job schedulers restrict it
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_memory() -> int | None:
    """Bytes of memory that this process can still use; None where the system does not say."""
    limits = _group_limits()
    if (available := _number_in(_PROC / "meminfo", "MemAvailable:")) is not None:
        limits.append(1024 * available)
    if not limits and "SC_PHYS_PAGES" in os.sysconf_names:  # macOS: all of it
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return max(min(limits), 0) if limits else None


_PROC = Path("/proc")
_GROUPS = Path("/sys/fs/cgroup")
# Of Linux's control groups: the limit, what is used, and in memory.stat the pages of files, which
# count as used and are dropped when memory is needed. Version 2, then 1.
_VERSION_2 = ("memory.max", "memory.current", ("inactive_file ", "active_file "))
_VERSION_1 = (
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_inactive_file ", "total_active_file "),
)


def _group_limits() -> list[int]:
    """What the control groups of this process leave it: each group's limit holds for all below."""
    left = []
    try:
        lines = (_PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return left
    for line in lines:
        _, _, controllers_and_path = line.partition(":")
        controllers, _, path = controllers_and_path.partition(":")
        if controllers == "":
            root, (limit, usage, dropped) = _GROUPS, _VERSION_2
        elif "memory" in controllers.split(","):
            root, (limit, usage, dropped) = _GROUPS / "memory", _VERSION_1
        else:
            continue
        # A container may see the host's path, and its own group at the root.
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            most = _number_in(folder / limit)
            used = _number_in(folder / usage)
            if most is not None and used is not None:
                pages = [_number_in(folder / "memory.stat", name) or 0 for name in dropped]
                left.append(most - used + sum(pages))
            if folder == root:
                break
    return left


class VariableError(ValueError):
    """An environment variable that is not the number that its name promises."""

    user_error = True


def count_in(variable: str, default: int | None = None) -> int:
    """The whole number, 0 or more, in an environment variable such as torchrun's WORLD_SIZE."""
    text = os.environ.get(variable, None if default is None else str(default))
    if text is None or not text.isascii() or not text.isdecimal() or len(text) > 9:
        shown = "unset" if text is None else repr(text[:50])
        raise VariableError(f"environment variable {variable}: {shown}, expected a whole number")
    return int(text)


def _number_in(path: Path, prefix: str = "") -> int | None:
    """The number after `prefix`, in the first line that starts with it; None without one."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(prefix):
            words = line.removeprefix(prefix).split()
            return int(words[0]) if words and words[0].isdigit() else None
    return None


def environment() -> dict:
    """Versions, commit and hardware, as JSON holds them (env.json)."""
    import torch  # here: it takes seconds, and the other functions do not need it

    names = ("torch", "torchvision", "torchmetrics", "numpy", "pillow", "safetensors")
    # The distribution has another name on PyPI; the key in run folders stays.
    versions = {"matryoshka": _version("matryoshka-vision")}
    versions |= {name: _version(name) for name in names}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "versions": versions,
        "git": git_state(),
        "hardware": {"cpu": _cpu_name(), "cores": available_cores(), "gpus": gpus},
        "platform": platform.platform(),
        "world_size": count_in("WORLD_SIZE", 1),
    }


def _version(name: str) -> str | None:
    """Version of an installed distribution; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def git_state() -> dict | None:
    """{"commit": .., "dirty": bool} of the source tree.

    Outside a git checkout, as on a machine that got the files alone, the variable
    MATRYOSHKA_COMMIT says it: a commit, with "-dirty" behind it for changed files. None without it.
    Raises VariableError where it is something else.
    """
    root = Path(__file__).resolve().parents[1]
    # An installed package is not a checkout, although a folder above it may be.
    if not (root / ".git").exists():
        return _stated_commit()
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        )
        status = subprocess.run(
            ["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return _stated_commit()
    return {"commit": commit.stdout.strip(), "dirty": bool(status.stdout.strip())}


def _stated_commit() -> dict | None:
    text = os.environ.get("MATRYOSHKA_COMMIT")
    if not text:
        return None
    if not re.fullmatch("[0-9a-f]{7,64}(-dirty)?", text):
        raise VariableError(
            f"environment variable MATRYOSHKA_COMMIT: {text[:50]!r}, expected a git commit"
        )
    return {"commit": text.removesuffix("-dirty"), "dirty": text.endswith("-dirty")}


def _cpu_name() -> str:
    """Model name of the CPU; platform.processor() is empty on most Linux systems."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
