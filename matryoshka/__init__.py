"""Matryoshka: nested visual representations, from image files to a trained, evaluated, deployable
model.

    result = matryoshka.fit("photos", minutes=10)
    model = matryoshka.load("trainlogs/first/model.safetensors")     # or torchvision:resnet50
    index = matryoshka.Index("photos.index")
    hits = index.search(model.encode_files("cat.jpg"), k=10)

Read first: `nested.py` (the idea), `data/loader.py` (the path of one image),
`train/train_imagenet.py` (the loop).
"""

from typing import TYPE_CHECKING

from matryoshka import lazy

if TYPE_CHECKING:
    from matryoshka.checkpoint.published import load_any as load
    from matryoshka.data.crops import CenterCrop, RandomResizedCrop
    from matryoshka.data.loader import Batch, Loader
    from matryoshka.data.sources import open_dataset
    from matryoshka.data.writer import write_beton
    from matryoshka.fitting import fit
    from matryoshka.retrieval.store import Index

__version__ = "0.2.0"
__all__ = [
    "Batch",
    "CenterCrop",
    "Index",
    "Loader",
    "RandomResizedCrop",
    "fit",
    "load",
    "open_dataset",
    "write_beton",
]

__getattr__ = lazy.attribute(
    __name__,
    {
        "checkpoint.published": ("load",),
        "data.crops": ("CenterCrop", "RandomResizedCrop"),
        "data.loader": ("Batch", "Loader"),
        "data.sources": ("open_dataset",),
        "data.writer": ("write_beton",),
        "fitting": ("fit",),
        "retrieval.store": ("Index",),
    },
    renamed={"load": "load_any"},
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
