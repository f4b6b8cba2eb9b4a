"""Self-supervised methods, nested: one file each.

    method = make_method(encoder, config)     # encoder: a NestedModel, config: section `ssl`

To add one: write a file with a subclass of Method (method.py), its loss in losses.py, and enter the
name in methods.METHODS and in options.METHODS. Options are read without torch: what needs it is
imported where it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from matryoshka import lazy
from matryoshka.ssl.options import SslConfig, ViewsConfig

if TYPE_CHECKING:
    from matryoshka.ssl.method import Method
    from matryoshka.ssl.methods import METHODS, make_method
    from matryoshka.ssl.towers import LearnedTemperature, Towers, momentum_at

__all__ = [
    "METHODS",
    "LearnedTemperature",
    "Method",
    "SslConfig",
    "Towers",
    "ViewsConfig",
    "make_method",
    "momentum_at",
]

__getattr__ = lazy.attribute(
    __name__,
    {
        "method": ("Method",),
        "methods": ("METHODS", "make_method"),
        "towers": ("LearnedTemperature", "Towers", "momentum_at"),
    },
)
