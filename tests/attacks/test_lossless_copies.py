"""`transcode=always` over damaged photos: what is kept as a copy has the source's pixels, and
everything else is stored or listed as without copying.
"""

from random import Random

import numpy as np
import pytest
from attacks.damaged_jpegs import KINDS, damaged
from attacks.scale import scaled
from jpeg_files import SAMPLINGS, sampled

from matryoshka.data import BetonFile, CenterCrop, ImageFolder, Loader, layout, write_beton
from matryoshka.data.sources import decode_image

SIDE = 48
MOST = 4096  # pixels of a stored side; the header of a damaged photo may say more


def stored_sides(sides):
    """(height, width) in the file: the long side is reduced to MOST, as in FFCV's RGBImageField."""
    ratio = min(1, MOST / max(sides))
    return tuple(max(1, int(ratio * side)) for side in sides)


@pytest.fixture
def folder(tmp_path):
    """Photos with every kind of damage, and sound ones; of one size, so that crops are whole."""
    (tmp_path / "in" / "a").mkdir(parents=True)
    rng = Random(17)
    names = list(SAMPLINGS)
    changes = list(KINDS.values())
    for k in range(scaled(150, 3000)):
        data = sampled(SIDE, SIDE, names[k % len(names)], 80, restart_marker_blocks=1 + k % 3)
        if k % 10 and k % 3:
            data = changes[k % len(changes)](data, rng) or data
        elif k % 10:
            data = damaged(data, rng)[0]
        (tmp_path / "in" / "a" / f"{k:05}.jpg").write_bytes(data)
    return ImageFolder(tmp_path / "in")


def test_damaged_photos_are_copied_exactly_or_not_at_all(folder, tmp_path):
    options = {"max_resolution": MOST, "write_mode": "raw", "num_workers": 1}
    manifest = write_beton(folder, tmp_path / "copied", transcode="always", names=1, **options)
    decoded = write_beton(folder, tmp_path / "decoded", names=1, **options)
    assert manifest["broken"] == decoded["broken"]
    assert manifest["damaged"] == decoded["damaged"], "reported as with transcode=never"
    assert manifest["names"] == decoded["names"]
    assert manifest["counts"]["transcoded"] > len(folder) / 10
    assert manifest["counts"]["raw"] > len(folder) / 10

    data = BetonFile(tmp_path / "copied")
    for index, name in enumerate(manifest["names"]):
        expected = decode_image((folder.path / name).read_bytes()).pixels
        assert (data.height[index], data.width[index]) == stored_sides(expected.shape[:2]), name
    same_size = np.flatnonzero((data.width == SIDE) & (data.height == SIDE))
    assert len(same_size) > len(folder) / 2
    for batch in Loader(data, 1, order="sequential", crop=CenterCrop(SIDE, ratio=1.0)):
        index = int(batch.index[0])
        if index in same_size:
            expected = decode_image((folder.path / manifest["names"][index]).read_bytes()).pixels
            np.testing.assert_array_equal(batch.images[0].numpy(), expected)
    assert (data.mode == layout.JPG).sum() == manifest["counts"]["transcoded"]


@pytest.mark.parametrize("transcode", ["fit", "always"])
def test_every_written_image_is_readable(folder, tmp_path, transcode):
    manifest = write_beton(
        folder, tmp_path / "x", transcode=transcode, max_resolution=64, write_mode="jpg"
    )
    read = 0
    for exact_crop in (CenterCrop(32),):
        for batch in Loader(tmp_path / "x", 16, order="sequential", crop=exact_crop):
            read += len(batch.labels)
    assert read == manifest["num_samples"]
