"""The sound files that the fuzzer damages."""

import io
import json
import struct
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
from beton_files import build
from mutate import ALONE, EVERYTHING, IMAGE_LABEL, LABEL_IMAGE, Draft
from PIL import Image


def picture(width: int, height: int, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 5, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    noisy = np.asarray(small) + rng.normal(0, 10, (height, width, 3))
    return Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))


PLAIN = [("RGB", {"subsampling": s, "quality": q}) for s, q in ((0, 90), (1, 60), (2, 90))]
PLAIN += [
    ("L", {}),
    ("RGB", {"progressive": True}),
    ("RGB", {"optimize": True, "subsampling": 0}),
    None,
]
TILED = [
    ("RGB", {"restart_marker_blocks": b, "subsampling": s})
    for b, s in ((1, 2), (2, 0), (3, 1), (4, 2))
]
TILED += [("L", {"restart_marker_blocks": 2}), ("RGB", {"restart_marker_rows": 1})]
TILED += [("RGB", {"progressive": True, "restart_marker_rows": 1})]
# As other encoders sample: written with Pillow's MCU of as many blocks, whose shape the header then
# changes.
SHAPED = [
    ("RGB", {"subsampling": 1, "restart_marker_blocks": b, "shape": (0x12, 8, 16)}) for b in (0, 3)
]
SHAPED += [
    ("RGB", {"subsampling": 2, "restart_marker_blocks": b, "shape": (0x41, 32, 8)}) for b in (0, 2)
]
SIZES = [(64, 48), (61, 37), (33, 70), (120, 90), (16, 16), (1, 1), (90, 7)]


def stored(kind, width: int, height: int, seed: int) -> tuple[int, int, int, bytes]:
    """(mode, width, height, bytes); kind: (Pillow mode, options) or None for raw pixels."""
    if kind is None:
        return 1, width, height, picture(width, height, seed).tobytes()
    mode, options = kind[0], dict(kind[1])
    factors, mcu_width, mcu_height = options.pop("shape", (0, 1, 1))
    size = width, height
    if factors:
        size = -(-width // mcu_width) * 16, -(-height // mcu_height) * 8 * options["subsampling"]
    file = io.BytesIO()
    picture(*size, seed).convert(mode).save(file, "JPEG", **options)
    data = bytearray(file.getvalue())
    if factors:
        sof = data.index(b"\xff\xc0")
        struct.pack_into(">HH", data, sof + 5, height, width)
        data[sof + 11] = factors
    return 0, width, height, bytes(data)


def ours(width: int, height: int, seed: int) -> tuple[int, int, int, bytes]:
    """As our own writer stores it."""
    from matryoshka.data import _native

    return 0, width, height, _native.encode(np.asarray(picture(width, height, seed)), 90)


@cache
def bases() -> list[Draft]:
    """Sound files: FFCV's layout without and with restart markers, other shapes and orders, all
    types of field.
    """

    def images(kinds, first, sizes=SIZES):
        return [
            stored(kind, *sizes[(first + k) % len(sizes)], first + k)
            for k, kind in enumerate(kinds)
        ]

    own = [ours(170, 100, 5), ours(130, 40, 6), ours(48, 48, 7)]
    files = [
        (IMAGE_LABEL, [(*image, i % 3) for i, image in enumerate(images(PLAIN, 0))]),
        (IMAGE_LABEL, [(*image, i % 3) for i, image in enumerate(images(TILED, 0))]),
        (LABEL_IMAGE, [(i, *image) for i, image in enumerate(images([*PLAIN[2:], *TILED[3:]], 3))]),
        (ALONE, [*own, *images(TILED[:4], 0, [(150, 60), (200, 33), (64, 64), (31, 120)])]),
        (IMAGE_LABEL, [(*image, i % 3) for i, image in enumerate(images(SHAPED, 0))]),
    ]
    everything = []
    for i, image in enumerate([*images([*TILED[1:5], None], 1), own[0]]):
        info, blob = json.dumps({"i": i}).encode() + b"\0", b"" if i == 2 else bytes(range(i + 3))
        array, tensor = np.arange(6, dtype="<i4").tobytes(), np.ones(1, "<f8").tobytes()
        everything.append((*image, i, i / 4, blob, len(blob), info, len(info), array, tensor))
    files.append((EVERYTHING, everything))
    drafts = []
    with tempfile.TemporaryDirectory() as folder:
        for layout, samples in files:
            backwards = layout in (
                LABEL_IMAGE,
                EVERYTHING,
            )  # FFCV's table is in the order its workers finished
            order = reversed if backwards else list
            drafts.append(
                Draft(
                    layout,
                    build(
                        Path(folder) / "x", layout.fields, layout.record, samples, order
                    ).read_bytes(),
                )
            )
    for k, shape, name in ((5, (2, 3), b'[["", "<i4"]]'), (6, (1,), b'[["", "<f8"]]')):
        text = struct.pack("<32QQ", *shape, *[0] * (32 - len(shape)), len(name)) + name
        place = 24 + 1041 * k + 17
        drafts[-1].head[place : place + len(text)] = text
    return drafts
