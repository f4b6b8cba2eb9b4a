"""Packages that only an export needs: the extra [export]."""

from __future__ import annotations

from collections.abc import Sequence

from matryoshka.environment import is_installed
from matryoshka.export.options import ExportError

ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def check_packages(formats: Sequence[str]) -> None:
    """ExportError if a package that `formats` need is not installed."""
    for name in formats:
        if name not in ("onnx", "int8"):
            continue
        missing = [package for package in ONNX_PACKAGES if not is_installed(package)]
        if missing:
            raise ExportError(
                f"--format {name} needs {', '.join(missing)}: "
                "pip install 'matryoshka-vision[export]'"
            )
