"""The data path: image files -> .beton -> uint8 batches on the device."""

from typing import TYPE_CHECKING

from matryoshka.data.crops import CenterCrop, PadCrop, RandomResizedCrop
from matryoshka.data.images import read_images
from matryoshka.data.layout import BetonError
from matryoshka.data.reader import BetonFile
from matryoshka.data.sources import Digits, ImageFolder, open_dataset
from matryoshka.data.state import StateError
from matryoshka.data.writer import WriterConfig, write_beton

if TYPE_CHECKING:
    from matryoshka.data.loader import Batch, Loader
    from matryoshka.data.resident import ResidentLoader

__all__ = [
    "Batch",
    "BetonError",
    "BetonFile",
    "CenterCrop",
    "Digits",
    "ImageFolder",
    "Loader",
    "PadCrop",
    "RandomResizedCrop",
    "ResidentLoader",
    "StateError",
    "WriterConfig",
    "open_dataset",
    "read_images",
    "write_beton",
]


def __getattr__(name: str):
    # the loader imports torch, which takes seconds that writing and inspecting files can do without
    if name in ("Batch", "Loader"):
        from matryoshka.data import loader

        return getattr(loader, name)
    if name == "ResidentLoader":
        from matryoshka.data.resident import ResidentLoader

        return ResidentLoader
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
