"""Stratified splits against counts by hand, and loaders on the parts."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from beton_files import raw_beton
from hypothesis import given, settings
from hypothesis import strategies as st

from matryoshka.data import (
    BetonFile,
    CenterCrop,
    ImageFolder,
    Loader,
    PadCrop,
    RandomResizedCrop,
    ResidentLoader,
    Subset,
    stratified_split,
)

PARTS_AND_SEEDS = {
    "labels": st.lists(st.integers(-1, 4), min_size=2, max_size=80),
    "share": st.fractions(Fraction(1, 50), Fraction(49, 50), max_denominator=50),
    "seed": st.integers(0, 2**64 - 1),
}


@settings(max_examples=150)
@given(**PARTS_AND_SEEDS)
def test_the_counts_are_those_of_largest_remainders(labels, share, seed):
    labels = np.array(labels)
    counts = {c: int((labels == c).sum()) for c in np.unique(labels)}
    # by hand, with exact fractions: one seat after the other, to the largest remainder
    seats = {c: min(int(share * n), n - 1) for c, n in counts.items()}
    wanted = round(float(share) * len(labels))
    for c in sorted(counts, key=lambda c: seats[c] - share * counts[c]):
        if sum(seats.values()) < wanted and seats[c] < counts[c] - 1:
            seats[c] += 1
    if sum(seats.values()) == 0:
        with pytest.raises(ValueError, match="leaves no sample to validate on"):
            stratified_split(labels, float(share), seed)
        return
    train, val = stratified_split(labels, float(share), seed)
    assert np.array_equal(np.sort(np.concatenate([train, val])), np.arange(len(labels)))
    for part in (train, val):
        assert part.dtype == np.int64
        assert (np.diff(part) > 0).all()
    found = {c: int((labels[val] == c).sum()) for c in counts}
    assert sum(found.values()) == sum(seats.values())
    for c, n in counts.items():
        assert abs(found[c] - seats[c]) <= 1  # equal remainders, which floats may order otherwise
        assert n - found[c] >= 1


def test_it_is_a_function_of_the_seed():
    labels = np.repeat(np.arange(10), 500)
    train, val = stratified_split(labels, 0.1, 7)
    assert (len(train), len(val)) == (4500, 500)
    assert (np.bincount(labels[val]) == 50).all()
    again = stratified_split(labels, 0.1, 7)
    assert np.array_equal(val, again[1])
    other = stratified_split(labels, 0.1, 8)[1]
    assert 0 < len(np.intersect1d(val, other)) < 120, "another seed takes other samples"
    places = np.concatenate([stratified_split(labels, 0.1, seed)[1] for seed in range(200)]) % 500
    counts = np.bincount(places, minlength=500)  # 10 classes x 200 seeds x 0.1
    assert abs(counts - 200).max() < 75, "every place is equally likely"


@pytest.mark.parametrize("share", [0, 1, -0.1, float("nan")])
def test_illegal_shares(share):
    with pytest.raises(ValueError, match=f"share={share}: expected more than 0"):
        stratified_split(np.arange(5), share, 0)
    with pytest.raises(ValueError, match="leaves no sample to validate on, of 5 samples in 5"):
        stratified_split(np.arange(5), 0.4, 0)


# ---------------------------------------------------------------- loaders on the parts


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    path = raw_beton(tmp_path_factory.mktemp("noise") / "noise.beton", [(20, 20)] * 60)
    return BetonFile(path)


@pytest.mark.parametrize("crop", [PadCrop(20, 3), RandomResizedCrop(12), CenterCrop(16, 1.0)])
@pytest.mark.parametrize("kind", [Loader, ResidentLoader])
def test_loaders_of_two_parts(kind, crop, noise):
    """Each part has its own images and labels; one opened data set serves both."""
    train, val = stratified_split(np.arange(60) % 3, 0.25, 1)
    options = {"crop": crop, "seed": 5, "num_workers": 2}
    for indices in (train, val):
        loader = kind(Subset(noise, indices), 7, order="random", **options)
        for _ in range(2):
            batches = list(loader)
            index = torch.cat([batch.index for batch in batches])
            assert sorted(index.tolist()) == list(range(len(indices)))
            whole = indices[index.numpy()]
            labels = torch.cat([batch.labels for batch in batches])
            assert labels.tolist() == noise.labels[whole].tolist()
            images = torch.cat([batch.images for batch in batches])
            if isinstance(crop, CenterCrop):
                expected = Loader(noise, 60, order="sequential", **options)
                assert torch.equal(images, next(iter(expected)).images[whole])
            else:
                reference = Loader(Subset(noise, indices), len(indices), order="random", **options)
                reference.epoch = loader.epoch - 1
                other = next(iter(reference))
                rows = {int(i): image for i, image in zip(other.index, other.images, strict=True)}
                for i, image in zip(index, images, strict=True):
                    assert (image.int() - rows[int(i)].int()).abs().max() <= 1


@pytest.mark.parametrize("kind", [Loader, ResidentLoader])
def test_a_broken_image_of_a_part_is_skipped(kind, tmp_path, photo):
    from PIL import Image

    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for i in range(6):
            Image.fromarray(photo(24, 24, i)).save(tmp_path / name / f"{i}.jpg")
    (tmp_path / "ant" / "3.jpg").write_bytes(b"broken")
    part = Subset(ImageFolder(tmp_path), np.array([9, 3, 0, 7]))
    loader = kind(part, 4, order="sequential", crop=CenterCrop(24, 1.0), on_error="skip")
    (batch,) = loader
    assert batch.index.tolist() == [0, 2, 3]
    assert batch.labels.tolist() == [1, 0, 1]
    (skipped,) = loader.skipped
    assert (skipped.index, skipped.name) == (1, "ant/3.jpg")
