"""The methods by name."""

from __future__ import annotations

from matryoshka.models import NestedModel
from matryoshka.ssl.byol import Byol
from matryoshka.ssl.method import Method
from matryoshka.ssl.moco import Moco
from matryoshka.ssl.options import SslConfig
from matryoshka.ssl.relic import Relic
from matryoshka.ssl.sigreg import SigReg
from matryoshka.ssl.simclr import SimClr
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
