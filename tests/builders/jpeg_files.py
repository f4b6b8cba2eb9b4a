"""JPEGs of every kind that the native core must read."""

import io

import numpy as np
from PIL import Image

KINDS = {  # options of Pillow's encoder
    "444": {"subsampling": 0},
    "422": {"subsampling": 1},
    "420": {"subsampling": 2},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_blocks": 2},
    "grey": {"mode": "L"},
    "grey progressive": {"mode": "L", "progressive": True},
}


def jpeg(pixels, kind="420", quality=90):
    """A JPEG of `pixels`. kind: one of KINDS, or a mode of Pillow."""
    file = io.BytesIO()
    options = {"mode": "RGB", "quality": quality} | KINDS.get(kind, {"mode": kind})
    Image.fromarray(pixels).convert(options.pop("mode")).save(file, "JPEG", **options)
    return file.getvalue()


def three_components(pixels, scans, end=b"\xff\xd9"):
    """A grey 8x8 JPEG's data for each of three components, one component per scan."""
    data = jpeg(pixels, "grey")
    sof, sos = data.index(b"\xff\xc0"), data.index(b"\xff\xda")
    frame = (
        b"\xff\xc0\x00\x11\x08" + data[sof + 5 : sof + 9] + bytes([3, 1, 17, 0, 2, 17, 0, 3, 17, 0])
    )
    starts = [b"\xff\xda\x00\x08\x01" + bytes([1 + k % 3, 0, 0, 63, 0]) for k in range(scans)]
    return (
        data[:sof]
        + frame
        + data[sof + 13 : sos]
        + b"".join(s + data[sos + 10 : -2] for s in starts)
        + end
    )


# name: (Pillow's options, luma sampling factors, MCU width, MCU height). Pillow writes 4:4:4, 4:2:2
# and 4:2:0; another shape with as many blocks in its MCU is the same data behind another size.
SAMPLINGS = {
    "grey": ("L", None, None, 8, 8),
    "grey 2x2": ("L", None, 0x22, 8, 8),
    "444": ("RGB", 0, None, 8, 8),
    "422": ("RGB", 1, None, 16, 8),
    "420": ("RGB", 2, None, 16, 16),
    "440": ("RGB", 1, 0x12, 8, 16),
    "411": ("RGB", 2, 0x41, 32, 8),
    "141": ("RGB", 2, 0x14, 8, 32),
}


def picture(height, width, seed=0):
    rng = np.random.default_rng(seed)
    base = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((width, height))
    return np.clip(np.asarray(base) + rng.normal(0, 25, (height, width, 3)), 0, 255).astype(
        np.uint8
    )


def sampled(width, height, sampling="420", quality=90, **options):
    """A JPEG of noise. sampling: one of SAMPLINGS. options: Pillow's."""
    mode, subsampling, factors, mcu_width, mcu_height = SAMPLINGS[sampling]
    columns, rows = -(-width // mcu_width), -(-height // mcu_height)
    plain = {None: (8, 8), 0: (8, 8), 1: (16, 8), 2: (16, 16)}[subsampling]
    reshaped = plain != (mcu_width, mcu_height)
    size = (columns * plain[0], rows * plain[1]) if reshaped else (width, height)
    image = Image.fromarray(picture(size[1], size[0], seed=width * 1000 + height)).convert(mode)
    file = io.BytesIO()
    chosen = {} if subsampling is None else {"subsampling": subsampling}
    image.save(file, "JPEG", quality=quality, **chosen, **options)
    data = bytearray(file.getvalue())
    if factors is not None:
        sof = data.index(b"\xff\xc0")
        data[sof + 5 : sof + 9] = height.to_bytes(2, "big") + width.to_bytes(2, "big")
        data[sof + 11] = factors
    return bytes(data)
