"""Runs the real FFCV for test_interop.py in a child process, so that a hang is a failed test.

python tests/builders/ffcv_child.py write FOLDER        write files with FFCV's writer
python tests/builders/ffcv_child.py load OUT FILE...    FFCV's batches, as OUT/<file name>.npz
python tests/builders/ffcv_child.py loader FILE         batches of FFCVLoader, as JSON
"""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

N, SIDE = 12, 192


def picture(i, width=SIDE, height=SIDE):
    """uint8 [H, W, 3], smooth with some noise, of sample i."""
    rng = np.random.default_rng(i)
    small = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return np.clip(smooth + rng.integers(-6, 7, smooth.shape), 0, 255).astype(np.uint8)


def values(i):
    """Every kind of field of sample i."""
    i = int(i)  # FFCV's writer counts in NumPy's integers, which JSON does not take
    rng = np.random.default_rng(1000 + i)
    return {
        "image": picture(i),
        "label": (7 * i) % 5,
        "weight": float(rng.normal()),
        "blob": rng.integers(0, 256, 1 + i, np.uint8),
        "about": {"name": f"sample {i}", "tags": ["é", i]},
        "array": rng.normal(size=(2, 3)).astype(np.float32),
        "tensor": rng.integers(-9, 9, 4).astype(np.int32),
    }


# file name: (fields in their order, options of FFCV's image field)
FILES = {
    "jpg": (("image", "label"), {"write_mode": "jpg", "jpeg_quality": 95}),
    "raw": (("image", "label"), {"write_mode": "raw"}),
    "proportion": (("image", "label"), {"write_mode": "proportion", "compress_probability": 0.5}),
    "smart": (
        ("image", "label"),
        {"write_mode": "smart", "smart_threshold": 1000, "jpeg_quality": 95},
    ),
    "smart_raw": (("image", "label"), {"write_mode": "smart"}),
    "reduced": (("image", "label"), {"write_mode": "raw", "max_resolution": 101}),
    "label_first": (("label", "image"), {"write_mode": "raw"}),
    "label_first_jpg": (("label", "image"), {"write_mode": "jpg", "jpeg_quality": 95}),
    "fields": (
        ("about", "weight", "image", "blob", "label", "array", "tensor"),
        {"write_mode": "raw"},
    ),
    "fields_jpg": (
        ("tensor", "label", "array", "image", "weight", "about", "blob"),
        {"write_mode": "jpg"},
    ),
}


def write(folder):
    import torch
    from ffcv.fields import (
        BytesField,
        FloatField,
        IntField,
        JSONField,
        NDArrayField,
        RGBImageField,
        TorchTensorField,
    )
    from ffcv.writer import DatasetWriter

    for file, (names, options) in FILES.items():

        class Samples:
            fields, wide = names, file == "reduced"

            def __len__(self):
                return N

            def __getitem__(self, i):
                sample = values(i)
                sample["tensor"] = torch.from_numpy(sample["tensor"])
                if self.wide:
                    sample["image"] = picture(i, 301, 200)
                return tuple(sample[name] for name in self.fields)

        kinds = {
            "image": RGBImageField(**options),
            "label": IntField(),
            "weight": FloatField(),
            "blob": BytesField(),
            "about": JSONField(),
            "array": NDArrayField(np.dtype(np.float32), (2, 3)),
            "tensor": TorchTensorField(torch.int32, (4,)),
        }
        writer = DatasetWriter(
            str(Path(folder) / file), {name: kinds[name] for name in names}, num_workers=2
        )
        writer.from_indexed_dataset(Samples(), chunksize=5)


def load(out, *files):
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import ToTensor

    for file in files:
        pipelines = {
            "image": [SimpleRGBImageDecoder(), ToTensor()],
            "label": [IntDecoder(), ToTensor()],
        }
        loader = Loader(
            file, 5, 2, order=OrderOption.SEQUENTIAL, drop_last=False, pipelines=pipelines
        )
        parts = zip(*[[part.numpy().copy() for part in batch] for batch in loader], strict=True)
        arrays = dict(zip(loader.reader.field_names, map(np.concatenate, parts), strict=True))
        np.savez(
            Path(out) / f"{Path(file).name}.npz",
            images=arrays["image"],
            labels=arrays["label"].reshape(-1),
        )


def loader(file):
    from matryoshka.data import BetonFile, CenterCrop, RandomResizedCrop
    from matryoshka.data.ffcv_backend import FFCVLoader

    labels = BetonFile(file).labels

    def seen(batches):
        found = []
        for batch in batches:
            assert (labels[batch.index.numpy()] == batch.labels.numpy()).all()
            found += batch.index.tolist()
        return found

    random = FFCVLoader(file, 5, crop=RandomResizedCrop(48), num_workers=1, seed=3)
    epochs = [seen(random) for _ in range(2)]
    again = FFCVLoader(file, 5, crop=RandomResizedCrop(48), num_workers=1, seed=3)
    random.crop = RandomResizedCrop(32)
    ranks = [
        FFCVLoader(
            file, 4, order="sequential", crop=CenterCrop(SIDE, 1), num_workers=1, rank=r, world=2
        )
        for r in (0, 1)
    ]
    batch = next(iter(ranks[0]))
    print(
        json.dumps(
            {
                "epochs": epochs,
                "again": seen(again),
                "shapes": [list(b.images.shape) for b in random],
                "lengths": [len(random), len(ranks[0])],
                "ranks": [seen(rank) for rank in ranks],
                "first": batch.images[1, :2, :2].tolist(),
                "wait": random.wait,
            }
        )
    )


if __name__ == "__main__":
    {"write": write, "load": load, "loader": loader}[sys.argv[1]](*sys.argv[2:])
