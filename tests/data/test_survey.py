"""A look at every photo, against Pillow and NumPy; what is a copy, and what is warned of."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from matryoshka.data import survey
from matryoshka.data.photos import Photos
from matryoshka.data.survey import look


def smooth_photo(width, height, seed):
    """A photo of shapes of 25 pixels or more: its hash is nearly the same at half the size."""
    rng = np.random.default_rng(seed)
    cells = rng.integers(0, 256, (height // 25, width // 25, 3), np.uint8)
    return Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    """Folder of 12 photos of different sizes, and of files that are hard cases."""
    root = tmp_path_factory.mktemp("album")
    for i in range(12):
        image = smooth_photo(200 + 20 * i, 300 - 10 * i, seed=i)
        image.save(root / f"{i:02}.jpg", quality=92)
    image = Image.open(root / "00.jpg")
    image.save(root / "quality.jpg", quality=30)
    image.resize((100, 150)).save(root / "half.png")
    (root / "copy.jpg").write_bytes((root / "03.jpg").read_bytes())
    Image.new("RGB", (80, 60), (200, 10, 10)).save(root / "red.png")
    Image.new("RGB", (90, 60), (10, 10, 200)).save(root / "blue.png")
    (root / "text.jpg").write_text("not an image")
    (root / "empty.jpg").touch()
    (root / "cut.png").write_bytes((root / "half.png").read_bytes()[:300])
    (root / "gone.jpg").symlink_to(root / "nowhere")
    return root


DAMAGED = ["text.jpg", "empty.jpg", "cut.png", "gone.jpg"]


def take(root, names=None, labels=None):
    """Photos of a folder, of one class or of the given labels."""
    names = sorted(file.name for file in root.iterdir()) if names is None else names
    labels = np.zeros(len(names), np.int64) if labels is None else np.array(labels)
    classes = [f"class {label}" for label in range(int(labels.max()) + 1)]
    return Photos(root, list(names), labels, classes)


def of_counts(counts):
    """Photos that are never read, of classes of these sizes."""
    labels = np.repeat(np.arange(len(counts)), counts)
    names = [f"{row}.jpg" for row in range(len(labels))]
    return Photos(Path("none"), names, labels, [f"class {c}" for c in range(len(counts))])


def test_sizes_and_damage(album):
    photos = take(album)
    calls = []
    looked = look(photos, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(done + 1, len(photos)) for done in range(len(photos))]
    damaged = [photos.names.index(name) for name in DAMAGED]
    assert list(looked.problems) == sorted(damaged)
    assert looked.problems[photos.names.index("gone.jpg")] == "No such file or directory"
    assert all(text and "\n" not in text for text in looked.problems.values())
    assert np.flatnonzero(~looked.readable).tolist() == sorted(damaged)
    for row, name in enumerate(photos.names):
        size = (0, 0) if name in DAMAGED else Image.open(album / name).size
        assert (looked.width[row], looked.height[row]) == size


def test_no_time_reaches_nothing(album):
    looked = look(take(album), seconds=0)
    assert not looked.readable.any()
    assert looked.problems == {}


def test_take(album):
    looked = look(take(album))
    rows = np.array([5, 2])
    taken = looked.take(rows)
    assert taken.width.tolist() == looked.width[rows].tolist()
    assert (taken.thumbnail == looked.thumbnail[rows]).all()
    assert taken.problems == {}


def test_thumbnails_are_means_of_cells(photo):
    pixels = photo(17 * 4, 16 * 4)
    grey = np.asarray(Image.fromarray(pixels).convert("L"), np.float64)
    means = grey.reshape(16, 4, 17, 4).mean((1, 3))
    assert np.abs(survey.grey_thumbnail(pixels) - means).max() <= 1
    # Large images are first reduced.
    large = survey.grey_thumbnail(pixels.repeat(8, 0).repeat(8, 1))
    assert np.abs(large - means).max() <= 2


def test_difference_hash_against_a_loop():
    thumbnails = np.random.default_rng(0).integers(0, 4, (3, 16, 17), np.uint8)
    hashes = survey.difference_hash(thumbnails)
    assert hashes.shape == (3, 256)
    for image, bits in zip(thumbnails, hashes, strict=True):
        for y in range(16):
            for x in range(16):
                assert bits[16 * y + x] == (int(image[y, x]) < int(image[y, x + 1]))


def test_correlations_against_numpy(monkeypatch):
    monkeypatch.setattr(survey, "COMPARED_AT_ONCE", 3)
    thumbnails = np.random.default_rng(0).integers(0, 256, (6, 16, 17), np.uint8)
    thumbnails[5] = 7
    left = np.array([0, 1, 2, 3, 0, 0, 5])
    right = np.array([1, 2, 0, 4, 0, 5, 5])
    values = survey._correlations(thumbnails, left, right)
    expected = [
        np.corrcoef(thumbnails[a].ravel(), thumbnails[b].ravel())[0, 1]
        for a, b in zip(left[:5], right[:5], strict=True)
    ]
    assert values == pytest.approx([*expected, 0, 0])


# ---------------------------------------------------------------- copies


def test_exact_copies(album):
    photos = take(album)
    copies = survey.exact_copies(look(photos))
    found = [(photos.names[row], photos.names[of]) for row, of in copies]
    # Damaged files have no bytes to compare.
    assert found == [("copy.jpg", "03.jpg")]


@pytest.mark.parametrize("compared_at_once", [1024, 5])
def test_near_groups(album, monkeypatch, compared_at_once):
    monkeypatch.setattr(survey, "COMPARED_AT_ONCE", compared_at_once)
    photos = take(album)
    groups = survey.near_groups(look(photos))
    assert groups.dtype == np.int64
    members = {}
    for name, group in zip(photos.names, groups.tolist(), strict=True):
        members.setdefault(group, set()).add(name)
    several = [names for names in members.values() if len(names) > 1]
    assert sorted(several, key=min) == [
        {"00.jpg", "quality.jpg", "half.png"},
        {"03.jpg", "copy.jpg"},
    ]


def test_near_groups_of_many_have_equal_hashes(album, monkeypatch):
    monkeypatch.setattr(survey, "MAX_COMPARED", 5)
    photos = take(album)
    looked = look(photos)
    groups = survey.near_groups(looked)
    hashes = survey.difference_hash(looked.thumbnail)
    flat = {"red.png", "blue.png", *DAMAGED}
    for a, name in enumerate(photos.names):
        for b, other in enumerate(photos.names):
            equal = bool((hashes[a] == hashes[b]).all()) and not {name, other} & flat
            assert (groups[a] == groups[b]) == (equal or a == b)


def test_near_groups_of_nothing():
    empty = look(Photos(Path("none"), [], np.empty(0, np.int64), ["class"]))
    assert survey.near_groups(empty).tolist() == []
    assert survey.exact_copies(empty) == []


# ---------------------------------------------------------------- warnings


@pytest.mark.parametrize("counts", [[10], [10, 100], [50, 50, 50]])
def test_no_class_warnings(counts):
    assert survey.class_warnings(of_counts(counts)) == []


@pytest.mark.parametrize(
    ("counts", "text"),
    [
        ([9, 20], "1 class with fewer than 10 images to train on: class 0 (9); "),
        (
            [1, 20, 2, 3, 4],
            "4 classes with fewer than 10 images to train on: class 0 (1), class 2 (2), "
            "class 3 (3), ...; ",
        ),
        ([101, 10], "very unequal classes: class 0 has 101 images, class 1 10; "),
        ([30, 20_000], "very unequal classes: class 1 has 20,000 images, class 0 30; "),
    ],
)
def test_class_warnings(counts, text):
    warnings = survey.class_warnings(of_counts(counts))
    assert any(warning.startswith(text) for warning in warnings)
    assert all("\n" not in warning for warning in warnings)


def seen(root, names):
    photos = take(root, names)
    return photos, look(photos)


def test_overlap_warnings(album):
    train = [f"{i:02}.jpg" for i in range(6)]
    parts = {
        "train": seen(album, train),
        "val": seen(album, ["06.jpg", "copy.jpg", "07.jpg"]),
        "test": seen(album, ["half.png", "08.jpg"]),
    }
    copied, near = survey.overlap_warnings(parts)
    assert copied.startswith(
        "1 of 3 images of val are also in train (copy.jpg is 03.jpg): their accuracy"
    )
    assert near.startswith("1 of 2 images of test are nearly the same as one in train")
    assert "(the first: half.png)" in near


def test_no_overlap_warnings(album, monkeypatch):
    train = seen(album, ["00.jpg", "01.jpg", "red.png"])
    val = seen(album, ["02.jpg", "04.jpg", "blue.png"])
    assert survey.overlap_warnings({"train": train, "val": val}) == []
    assert survey.overlap_warnings({"train": train}) == []
    # One near duplicate of three is below a share of one half.
    monkeypatch.setattr(survey, "NEAR_SHARE", 0.5)
    near = seen(album, ["02.jpg", "04.jpg", "half.png"])
    assert survey.overlap_warnings({"train": train, "val": near}) == []


@pytest.mark.parametrize(("labels", "conflict"), [([0, 0, 1], False), ([0, 1, 1], True)])
def test_label_conflicts(album, labels, conflict):
    photos = take(album, ["03.jpg", "copy.jpg", "00.jpg"], labels)
    lines = survey.label_conflicts(photos, survey.exact_copies(look(photos)))
    expected = "1 image in two classes: copy.jpg is 03.jpg; left out in the second class"
    assert lines == ([expected] if conflict else [])
