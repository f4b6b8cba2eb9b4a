"""JPEGs of every kind that the native core must read."""

import io

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
