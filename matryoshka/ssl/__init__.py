"""Self-supervised methods, nested: one file each.

    method = make_method(encoder, config)     # encoder: a NestedModel, config: section `ssl`

To add one: write a file with a subclass of Method (method.py), its loss in losses.py, and enter the
name here and in options.METHODS.
"""

from __future__ import annotations

from matryoshka.models import NestedModel
from matryoshka.ssl.byol import Byol
from matryoshka.ssl.method import Method
from matryoshka.ssl.moco import Moco
from matryoshka.ssl.options import SslConfig
from matryoshka.ssl.relic import Relic
from matryoshka.ssl.sigreg import SigReg
from matryoshka.ssl.simclr import SimClr
from matryoshka.ssl.towers import LearnedTemperature, Towers, momentum_at
from matryoshka.ssl.vicreg import VicReg

METHODS: dict[str, type[Method]] = {
    "relic": Relic,
    "moco": Moco,
    "simclr": SimClr,
    "byol": Byol,
    "vicreg": VicReg,
    "sigreg": SigReg,
}


def make_method(encoder: NestedModel, config: SslConfig) -> Method:
    """The method that `ssl.method` names, around an encoder, whose dims are the prefixes."""
    return METHODS[config.method](encoder, config)


__all__ = [
    "METHODS",
    "LearnedTemperature",
    "Method",
    "SslConfig",
    "Towers",
    "make_method",
    "momentum_at",
]
