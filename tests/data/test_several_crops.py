"""Several views of every image: a pure function of (seed, epoch, sample, view), from any source."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from beton_files import raw_beton

from matryoshka.data import (
    BetonError,
    BetonFile,
    CenterCrop,
    ImageFolder,
    Loader,
    PadCrop,
    RandomResizedCrop,
    ResidentLoader,
    _native,
    open_dataset,
    write_beton,
)
from matryoshka.data.ffcv_backend import FFCVLoader

TWO = [RandomResizedCrop(24), RandomResizedCrop(24)]
THREE = [RandomResizedCrop(24), RandomResizedCrop(24), RandomResizedCrop(10, scale=(0.05, 0.3))]
SEED = 5


@pytest.fixture(scope="module")
def sources(tmp_path_factory, folder, digits):
    """{kind: path} of 20 photos as a .beton of JPEGs and as a folder, and of noise."""
    root = tmp_path_factory.mktemp("several")
    photos = folder / "train"
    write_beton(ImageFolder(photos), root / "jpg.beton", max_resolution=500, write_mode="jpg")
    raw_beton(root / "raw.beton", [(40 + i, 50) for i in range(20)])
    raw_beton(root / "alike.beton", [(40, 50)] * 20)
    return {
        "jpg": root / "jpg.beton",
        "raw": root / "raw.beton",
        "folder": photos,
        "alike": root / "alike.beton",
    }


def as_list(batch):
    return [view.numpy() for view in batch.images]


def pixels_of(loader):
    """{sample: the bytes of all its views}, of one epoch."""
    found = {}
    for batch in loader:
        views = as_list(batch)
        for row, index in enumerate(batch.index.tolist()):
            assert index not in found, f"sample {index} came twice"
            found[index] = b"".join(view[row].tobytes() for view in views)
    return found


# ---------------------------------------------------------------- what a batch is


@pytest.mark.parametrize("make", [Loader, ResidentLoader])
def test_shapes(sources, make):
    options = {"order": "random", "seed": SEED}
    (batch, *_) = make(sources["alike"], 6, crop=TWO, **options)
    assert batch.images.shape == (2, 6, 24, 24, 3)
    assert batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous()
    (batch, *_) = make(sources["alike"], 6, crop=TWO[:1], **options)
    assert batch.images.shape == (1, 6, 24, 24, 3)
    (batch, *_) = make(sources["alike"], 6, crop=THREE, **options)
    assert [tuple(view.shape) for view in batch.images] == [
        (6, 24, 24, 3),
        (6, 24, 24, 3),
        (6, 10, 10, 3),
    ]
    assert {view.dtype for view in batch.images} == {torch.uint8}
    assert all(view.is_contiguous() for view in batch.images)


@pytest.mark.parametrize("kind", ["jpg", "raw", "folder"])
@pytest.mark.parametrize("crop", [TWO, THREE], ids=["two", "three"])
def test_every_view_is_a_crop_of_its_own(sources, kind, crop):
    """Slow oracle: one image and one view at a time, with the crop that the formula draws."""
    pool = _native.Pool(1)
    data = open_dataset(sources[kind])
    loader = Loader(sources[kind], 8, order="random", crop=crop, seed=SEED)
    loader.epoch = 3
    for batch in loader:
        views = as_list(batch)
        for row, index in enumerate(batch.index.tolist()):
            (sample,) = data.fetch(np.array([index]))
            drawn = set()
            for v, view in enumerate(crop):
                box = _native.random_crops(
                    sample.width,
                    sample.height,
                    np.array([index]),
                    SEED,
                    3,
                    view.scale,
                    view.ratio,
                    view.flip,
                    v,
                )
                drawn.add(box.tobytes())
                out = np.empty((1, view.size, view.size, 3), np.uint8)
                status = _native.decode_batch(pool, *sample[:6], box, out, exact=False)
                assert not status.any()
                assert np.array_equal(views[v][row], out[0]), f"sample {index}, view {v}"
            assert len(drawn) == len(crop), f"sample {index}: two views have one crop"


@pytest.mark.parametrize("make", [Loader, ResidentLoader])
def test_view_0_is_the_single_crop(sources, make):
    options = {"order": "random", "seed": SEED}
    alone = make(sources["alike"], 8, crop=TWO[0], **options)
    for crop in (TWO, THREE):
        alone.epoch = 0
        for single, several in zip(
            alone, make(sources["alike"], 8, crop=crop, **options), strict=True
        ):
            assert torch.equal(single.images, several.images[0])
            assert torch.equal(single.index, several.index)
            assert torch.equal(single.labels, several.labels)
            assert not torch.equal(several.images[0], several.images[1])


def test_resident_views_are_those_of_the_loader(sources):
    options = {"order": "random", "crop": THREE, "seed": SEED}
    for a, b in zip(
        Loader(sources["alike"], 8, **options),
        ResidentLoader(sources["alike"], 8, **options),
        strict=True,
    ):
        assert torch.equal(a.index, b.index)
        for view, resident in zip(a.images, b.images, strict=True):
            assert (view.int() - resident.int()).abs().max() <= 1


# ---------------------------------------------------------------- what it does not depend on


@pytest.mark.parametrize("crop", [TWO, THREE], ids=["two", "three"])
@pytest.mark.parametrize("kind", ["jpg", "raw", "folder", "resident", "paged"])
def test_no_byte_depends_on_workers_ranks_and_resumes(sources, kind, crop):
    path = sources[{"resident": "alike", "paged": "jpg"}.get(kind, kind)]
    make = ResidentLoader if kind == "resident" else Loader
    options = {"order": "random", "crop": crop, "seed": SEED, "in_memory": kind != "paged"}
    whole = make(path, 6, num_workers=1, **options)
    whole.epoch = 2
    expected = pixels_of(whole)
    assert len(expected) == 20
    for workers, world in itertools.product((1, 2, 4), (1, 2, 3)):
        if kind == "resident" and workers > 1:
            continue  # it decodes before the first epoch: threads have no part in the batches
        ranks = [
            make(path, 6, num_workers=workers, rank=r, world=world, **options) for r in range(world)
        ]
        # batches before the interruption; a resident loader resumes by the same code
        for stop in (0, 2) if kind == "resident" else range(len(whole) + 1):
            found = {}
            for rank in ranks:
                rank.epoch = 2
                started = iter(rank)
                for batch in itertools.islice(started, stop):
                    views = as_list(batch)
                    for row, index in enumerate(batch.index.tolist()):
                        found[index] = b"".join(view[row].tobytes() for view in views)
                state = rank.state_dict()
                del started
                rank.load_state_dict(state)
                if state["epoch"] == 2:
                    found |= pixels_of(rank)
            assert found == expected, f"{workers} workers, {world} ranks, resumed at {stop}"


def test_other_sizes_between_epochs(sources):
    for make in (Loader, ResidentLoader):
        loader = make(sources["alike"], 20, crop=TWO, seed=SEED)
        for crop, shape in (
            (TWO, (2, 20, 24, 24, 3)),
            ([RandomResizedCrop(32)] * 3, (3, 20, 32, 32, 3)),
            (RandomResizedCrop(8), (20, 8, 8, 3)),
            (TWO, (2, 20, 24, 24, 3)),
        ):
            loader.crop = crop
            (batch,) = loader
            assert batch.images.shape == shape


def test_batches_of_views_that_are_kept_are_never_overwritten(sources):
    loader = Loader(sources["jpg"], 3, crop=THREE, prefetch=1, seed=SEED)
    kept = list(loader)
    copies = [[view.clone() for view in batch.images] for batch in kept]
    for _ in range(3):
        for _batch in loader:
            pass
    for batch, copy in zip(kept, copies, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch.images, copy, strict=True))


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("crop", [TWO, THREE], ids=["two", "three"])
def test_a_skipped_sample_leaves_all_views(sources, tmp_path, in_memory, crop):
    data = BetonFile(sources["jpg"])
    content = bytearray(sources["jpg"].read_bytes())
    broken = (0, 7, 13)
    for index in broken:
        start, size = int(data.offset[index]), int(data.size[index])
        content[start : start + size] = bytes(size)
    damaged = tmp_path / "damaged.beton"
    damaged.write_bytes(content)
    options = {"order": "random", "crop": crop, "seed": SEED, "in_memory": in_memory}
    expected = pixels_of(Loader(sources["jpg"], 8, **options))
    loader = Loader(damaged, 8, on_error="skip", **options)
    found = pixels_of(loader)
    assert sorted(s.index for s in loader.skipped) == list(broken)
    assert found == {i: pixels for i, pixels in expected.items() if i not in broken}
    loader.epoch = 0
    for batch in loader:
        for view in batch.images:
            assert view.is_contiguous()
            assert len(view) == len(batch.labels)
    with pytest.raises(BetonError, match=r"damaged\.beton: sample (0|7|13): not a JPEG"):
        list(Loader(damaged, 8, **options))


def test_lists_that_make_no_sense(sources):
    mistakes: list[tuple[Any, str]] = [
        ([], "expected one crop or more"),
        ([TWO[0], CenterCrop(24)], r"CenterCrop\(size=24.*expected RandomResizedCrop only"),
        ((PadCrop(32), TWO[0]), r"PadCrop\(size=32.*expected RandomResizedCrop only"),
    ]
    for crop, message in mistakes:
        with pytest.raises(ValueError, match=message):
            Loader(sources["jpg"], 4, crop=crop)
    loader = Loader(sources["jpg"], 4, crop=TWO)
    with pytest.raises(ValueError, match="expected one crop or more"):
        loader.crop = []
    assert loader.crop == tuple(TWO)
    with pytest.raises(BetonError, match=r"FFCV gives one view.*loader=native"):
        FFCVLoader(sources["jpg"], 4, crop=TWO)
