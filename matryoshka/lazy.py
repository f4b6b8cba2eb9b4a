"""Lazy imports: a package imports a module when one of its names is first used.

Importing torch takes two seconds. A wing's `__init__` names its public objects without importing
the modules that define them, so that `--help` and a mistyped option are answered at once:

    __getattr__ = lazy.attribute(__name__, {"crops": ("CenterCrop", "RandomResizedCrop")})

A TYPE_CHECKING block with the same imports shows them to type checkers and editors.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def attribute(
    package: str,
    modules: Mapping[str, Sequence[str]],
    renamed: Mapping[str, str] | None = None,
) -> Callable[[str], Any]:
    """The `__getattr__` (PEP 562) of `package`: {module below it: names that it defines}.

    renamed: {name in the package: its name in its module}.
    """
    home = {name: module for module, names in modules.items() for name in names}
    inside = renamed or {}

    def __getattr__(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{home[name]}"), inside.get(name, name))
        setattr(sys.modules[package], name, value)  # found at once from now on
        return value

    return __getattr__
