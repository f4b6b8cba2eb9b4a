"""Model files: the only connection between training and everything after it."""

from typing import TYPE_CHECKING

from matryoshka import lazy

if TYPE_CHECKING:
    from matryoshka.checkpoint.contents import (
        FORMAT,
        TRAINING_FORMAT,
        CheckpointError,
        Contents,
        preprocessing_of,
    )
    from matryoshka.checkpoint.model_file import (
        describe,
        export_dims,
        load_model,
        read,
        save_model,
    )
    from matryoshka.checkpoint.options import CheckpointOptions
    from matryoshka.checkpoint.upstream import from_upstream, save_upstream, to_upstream
    from matryoshka.checkpoint.vit_pth import save_vit_pth

__all__ = [
    "FORMAT",
    "TRAINING_FORMAT",
    "CheckpointError",
    "CheckpointOptions",
    "Contents",
    "describe",
    "export_dims",
    "from_upstream",
    "load_model",
    "preprocessing_of",
    "read",
    "save_model",
    "save_upstream",
    "save_vit_pth",
    "to_upstream",
]

__getattr__ = lazy.attribute(
    __name__,
    {
        "contents": (
            "FORMAT",
            "TRAINING_FORMAT",
            "CheckpointError",
            "Contents",
            "preprocessing_of",
        ),
        "model_file": ("describe", "export_dims", "load_model", "read", "save_model"),
        "options": ("CheckpointOptions",),
        "upstream": ("from_upstream", "save_upstream", "to_upstream"),
        "vit_pth": ("save_vit_pth",),
    },
)
