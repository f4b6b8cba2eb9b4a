"""The data path: image files -> .beton -> uint8 batches on the device."""

from typing import TYPE_CHECKING

from matryoshka import lazy

if TYPE_CHECKING:
    from matryoshka.data.crops import CenterCrop, PadCrop, RandomResizedCrop
    from matryoshka.data.images import image_files, read_images
    from matryoshka.data.layout import BetonError
    from matryoshka.data.loader import Batch, Loader
    from matryoshka.data.named import named_dataset, normalisation
    from matryoshka.data.options import WriterConfig
    from matryoshka.data.reader import BetonFile
    from matryoshka.data.resident import ResidentLoader
    from matryoshka.data.sources import Digits, ImageFolder, open_dataset
    from matryoshka.data.split import stratified_split
    from matryoshka.data.state import StateError
    from matryoshka.data.subset import Subset
    from matryoshka.data.torch_datasets import IterableDataset, TorchDataset
    from matryoshka.data.writer import write_beton

__all__ = [
    "Batch",
    "BetonError",
    "BetonFile",
    "CenterCrop",
    "Digits",
    "ImageFolder",
    "IterableDataset",
    "Loader",
    "PadCrop",
    "RandomResizedCrop",
    "ResidentLoader",
    "StateError",
    "Subset",
    "TorchDataset",
    "WriterConfig",
    "image_files",
    "named_dataset",
    "normalisation",
    "open_dataset",
    "read_images",
    "stratified_split",
    "write_beton",
]

__getattr__ = lazy.attribute(
    __name__,
    {
        "crops": ("CenterCrop", "PadCrop", "RandomResizedCrop"),
        "images": ("image_files", "read_images"),
        "layout": ("BetonError",),
        "loader": ("Batch", "Loader"),
        "named": ("named_dataset", "normalisation"),
        "options": ("WriterConfig",),
        "reader": ("BetonFile",),
        "resident": ("ResidentLoader",),
        "sources": ("Digits", "ImageFolder", "open_dataset"),
        "split": ("stratified_split",),
        "state": ("StateError",),
        "subset": ("Subset",),
        "torch_datasets": ("IterableDataset", "TorchDataset"),
        "writer": ("write_beton",),
    },
)
