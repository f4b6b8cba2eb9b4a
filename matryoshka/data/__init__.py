"""The data path: image files -> .beton -> uint8 batches on the device."""

from typing import TYPE_CHECKING

from matryoshka.data.layout import BetonError
from matryoshka.data.reader import BetonFile
from matryoshka.data.sources import Digits, ImageFolder, open_dataset
from matryoshka.data.writer import WriterConfig, write_beton

if TYPE_CHECKING:
    from matryoshka.data.loader import Batch, CenterCrop, Loader, RandomResizedCrop

__all__ = [
    "Batch",
    "BetonError",
    "BetonFile",
    "CenterCrop",
    "Digits",
    "ImageFolder",
    "Loader",
    "RandomResizedCrop",
    "WriterConfig",
    "open_dataset",
    "write_beton",
]


def __getattr__(name: str):
    # the loader imports torch, which takes seconds that writing and inspecting files can do without
    if name in ("Batch", "CenterCrop", "Loader", "RandomResizedCrop"):
        from matryoshka.data import loader

        return getattr(loader, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
