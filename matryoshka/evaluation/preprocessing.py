"""Choose how evaluation images are resized and cropped: `--preprocessing` and `--resolution`."""

from __future__ import annotations

from dataclasses import replace

from matryoshka.data.resized_images import CROP, RESIZE
from matryoshka.models import ModelError, NestedModel


def set_preprocessing(model: NestedModel, name: str, resolution: int | None = None) -> None:
    """Set `model.preprocessing` to a name of options.PREPROCESSING.

    checkpoint: central crop and size of the checkpoint, or `resolution` pixels
    upstream:   shorter side resized to 256 by Pillow, central 224 pixels (data/resized_images.py)
    ffcv:       central crop of 224/256 of the shorter side, resized by area to the same size

    Mean and std remain those of the checkpoint. ModelError for a resolution with upstream, whose
    crop has a fixed size.
    """
    if name == "upstream":
        if resolution is not None:
            raise ModelError(
                f"--resolution {resolution}: --preprocessing upstream always crops {CROP} pixels; "
                "drop one of the two"
            )
        model.preprocessing = replace(model.preprocessing, size=CROP, ratio=CROP / RESIZE)
        return
    if resolution is not None:
        model.preprocessing = replace(model.preprocessing, size=resolution)
    if name == "ffcv":
        model.preprocessing = replace(model.preprocessing, ratio=224 / 256)
