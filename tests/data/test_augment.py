"""Device augmentation against loops over pixels, Pillow and torchvision, image by image."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps
from scipy import stats
from torchvision.transforms.v2 import RandAugment
from torchvision.transforms.v2 import functional as tv

from matryoshka.data import rand_augment as module
from matryoshka.data.augment import Mixed, mix, mixed_loss, normalise, step_rng
from matryoshka.data.rand_augment import OPERATIONS, distorted, rand_augment
from matryoshka.nested import nested_cross_entropy

NAMES = list(OPERATIONS)
GEOMETRY = NAMES[1:6]


def batch(b, height, width, seed=0, layout=torch.channels_last):
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(rng.normal(size=(b, 3, height, width)).astype(np.float32))
    return images.contiguous(memory_format=layout), torch.from_numpy(rng.integers(0, 10, b))


# ---------------------------------------------------------------- mixtures


@settings(max_examples=60)
@given(
    b=st.integers(1, 5),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    alpha=st.sampled_from([0.1, 1.0, 8.0]),
    seed=st.integers(0, 2**32),
    layout=st.sampled_from([torch.channels_last, torch.contiguous_format]),
)
def test_mixup_equals_the_formula(*, b, height, width, alpha, seed, layout):
    images, labels = batch(b, height, width, seed, layout)
    before = images.clone()
    mixed = mix(images, labels, alpha, 0, np.random.default_rng(seed))
    assert torch.equal(images, before)
    assert type(mixed.share) is float
    assert 0 <= mixed.share <= 1, f"share {mixed.share}"
    assert mixed.images.stride() == images.stride()
    for i in range(b):
        expected = mixed.share * before[i].double() + (1 - mixed.share) * before[i - 1].double()
        torch.testing.assert_close(mixed.images[i].double(), expected, rtol=0, atol=1e-6)
        assert (mixed.labels[i], mixed.other[i]) == (labels[i], labels[i - 1])


@settings(max_examples=150)
@given(
    b=st.integers(1, 5),
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    alpha=st.sampled_from([0.1, 1.0, 8.0]),
    seed=st.integers(0, 2**32),
    layout=st.sampled_from([torch.channels_last, torch.contiguous_format]),
)
def test_cutmix_shows_one_rectangle_and_counts_it(*, b, height, width, alpha, seed, layout):
    images, labels = batch(b, height, width, seed, layout)
    before = images.clone()
    mixed = mix(images, labels, 0, alpha, np.random.default_rng(seed))
    assert torch.equal(images, before)
    assert type(mixed.share) is float
    assert mixed.images.stride() == images.stride()
    assert torch.equal(mixed.other, torch.tensor([labels[i - 1] for i in range(b)]))
    if b == 1:
        assert torch.equal(mixed.images, before)
        return
    foreign = [
        [
            (y, x)
            for y in range(height)
            for x in range(width)
            if (mixed.images[i, :, y, x] != before[i, :, y, x]).any()
        ]
        for i in range(b)
    ]
    assert all(pixels == foreign[0] for pixels in foreign)
    assert mixed.share == 1 - len(foreign[0]) / (height * width)
    if foreign[0]:
        (top, left), (bottom, right) = foreign[0][0], foreign[0][-1]
        rectangle = [(y, x) for y in range(top, bottom + 1) for x in range(left, right + 1)]
        assert foreign[0] == rectangle
        for i in range(b):
            assert all(
                torch.equal(mixed.images[i, :, y, x], before[i - 1, :, y, x]) for y, x in rectangle
            )


def test_shares_are_beta_and_both_kinds_take_turns():
    images, labels = batch(2, 1, 1)
    rng = np.random.default_rng(0)
    shares = [mix(images, labels, 0.4, 0, rng).share for _ in range(2000)]
    assert stats.kstest(shares, stats.beta(0.4, 0.4).cdf).pvalue > 0.01, (
        "shares are not Beta(0.4, 0.4)"
    )
    large = torch.zeros(2, 3, 400, 300)
    rng, replay = np.random.default_rng(1), np.random.default_rng(1)
    for _ in range(300):  # unclipped, the rectangle has sides of the root of the share
        share = mix(large, labels, 0, 0.7, rng).share
        side = math.sqrt(1 - replay.beta(0.7, 0.7))
        sizes = [(int(400 * side), 400), (int(300 * side), 300)]
        seen = 1
        for size, length in sizes:
            start = replay.integers(length) - size // 2
            seen *= len(set(range(start, start + size)) & set(range(length)))
        assert share == 1 - seen / (400 * 300)
    kinds = [
        set(
            mix(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1), labels, 1, 1, rng)
            .images.flatten()
            .tolist()
        )
        for _ in range(2000)
    ]
    mixups = sum(kind != {0.0, 1.0} for kind in kinds)
    assert stats.binomtest(mixups, 2000).pvalue > 0.01, f"mixup in {mixups} of 2000 batches"


def test_both_off_is_the_batch_itself():
    images, labels = batch(3, 4, 5)
    rng = np.random.default_rng(0)
    state = rng.bit_generator.state
    assert mix(images, labels, 0, 0, rng) == Mixed(images, labels, labels, 1.0)
    assert rng.bit_generator.state == state


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("weights", [None, [0.5, 1.0, 2.0]])
def test_the_loss_is_that_of_the_mixed_target(share, weights):
    rng = np.random.default_rng(3)
    logits, labels, other = rng.normal(size=(3, 4, 6)), rng.integers(0, 6, 4), rng.integers(0, 6, 4)
    target = np.zeros((4, 6))
    for i in range(4):
        target[i, labels[i]] += share
        target[i, other[i]] += 1 - share
    per_prefix = [
        np.mean([-(target[i] * (z[i] - np.log(np.exp(z[i]).sum()))).sum() for i in range(4)])
        for z in logits
    ]
    calls = []

    def loss_of(*arguments):
        calls.append(arguments)
        return nested_cross_entropy(
            *arguments, weights=None if weights is None else torch.tensor(weights)
        )

    mixed = Mixed(torch.empty(0), torch.from_numpy(labels), torch.from_numpy(other), share)
    loss, shown = mixed_loss(loss_of, torch.from_numpy(logits), mixed)
    np.testing.assert_allclose(shown, per_prefix, rtol=1e-6)
    np.testing.assert_allclose(loss, np.dot(per_prefix, weights or [1, 1, 1]), rtol=1e-6)
    assert len(calls) == (1 if share == 1 else 2), f"{len(calls)} losses"


# ---------------------------------------------------------------- RandAugment


def one(name, image, level):
    """An operation on one uint8 [H, W, 3] array."""
    return distorted(
        torch.from_numpy(image.copy())[None], np.array([NAMES.index(name)]), np.array([level])
    )[0].numpy()


def by_pillow(name, image, level):
    height, width = image.shape[:2]
    picture, nearest = Image.fromarray(image), Image.Resampling.NEAREST
    strength = abs(level)

    def affine(*numbers):
        return picture.transform((width, height), Image.Transform.AFFINE, numbers, nearest)

    enhance = {
        "brightness": "Brightness",
        "color": "Color",
        "contrast": "Contrast",
        "sharpness": "Sharpness",
    }
    if name in enhance:
        return np.asarray(getattr(ImageEnhance, enhance[name])(picture).enhance(1 + 0.9 * level))
    operations = {
        "identity": lambda: picture,
        "shear_x": lambda: affine(1, 0.3 * level, 0, 0, 1, 0),
        "shear_y": lambda: affine(1, 0, 0, 0.3 * level, 1, 0),
        "translate_x": lambda: affine(1, 0, -level * 150 / 331 * width, 0, 1, 0),
        "translate_y": lambda: affine(1, 0, 0, 0, 1, -level * 150 / 331 * height),
        "rotate": lambda: picture.rotate(30 * level, nearest),
        "posterize": lambda: ImageOps.posterize(picture, 8 - round(4 * strength)),
        "solarize": lambda: ImageOps.solarize(picture, math.ceil(np.float32(255 * (1 - strength)))),
        "autocontrast": lambda: ImageOps.autocontrast(picture),
        "equalize": lambda: ImageOps.equalize(picture),
    }
    return np.asarray(operations[name]())


@pytest.mark.parametrize("level", [-1.0, -0.9, -0.35, 0.0, 0.12, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_each_operation_is_that_of_pillow(name, level, photo):
    level *= (
        0.99 if name == "rotate" else 1
    )  # with sin(30 degrees) = 1/2 many centres meet the edge of two pixels
    for image in (
        photo(61, 47),
        photo(32, 32, 1),
        np.full((9, 9, 3), 77, np.uint8),
        photo(3, 5, 2),
        photo(2, 2, 3),
    ):
        difference = np.abs(
            one(name, image, level).astype(int) - by_pillow(name, image, level)
        ).max(2)
        if name in GEOMETRY:  # Pillow's coordinates are rounded to 1/65536 pixel
            assert (difference > 0).mean() < 0.003 or (difference > 0).sum() <= 1, (
                f"{name}: too many pixels differ"
            )
        else:
            assert difference.max() <= (1 if name == "autocontrast" else 0), (
                f"{name}: a pixel differs by {difference.max()}"
            )


@settings(max_examples=60)
@given(
    name=st.sampled_from(GEOMETRY),
    level=st.floats(-1, 1),
    height=st.integers(1, 14),
    width=st.integers(1, 14),
    seed=st.integers(0, 2**32),
)
def test_geometry_equals_the_formula_pixel_by_pixel(name, level, height, width, seed):
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    result = one(name, image, level)
    angle = math.radians(30 * level)
    for row in range(height):
        for column in range(width):
            x, y = column + 0.5, row + 0.5
            dx, dy = x - width / 2, y - height / 2
            source = {
                "shear_x": (x + 0.3 * level * y, y),
                "shear_y": (x, y + 0.3 * level * x),
                "translate_x": (x - level * 150 / 331 * width, y),
                "translate_y": (x, y - level * 150 / 331 * height),
                "rotate": (
                    width / 2 + math.cos(angle) * dx - math.sin(angle) * dy,
                    height / 2 + math.sin(angle) * dx + math.cos(angle) * dy,
                ),
            }[name]
            if min(abs(place - round(place)) for place in source) < 1e-4:
                continue  # on the edge of two pixels, a matter of rounding
            u, v = (math.floor(place) for place in source)
            inside = 0 <= u < width and 0 <= v < height
            assert (result[row, column] == (image[v, u] if inside else 0)).all()


@pytest.mark.parametrize("level", [-0.9, -0.3, 0.3, 0.9])
@pytest.mark.parametrize("name", NAMES)
def test_each_operation_is_near_torchvision(name, level, photo):
    image = photo(61, 47)
    planes = torch.from_numpy(image).permute(2, 0, 1)
    shear = math.degrees(math.atan(0.3 * level))
    nothing = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    expected = {
        "identity": lambda: planes,
        "shear_x": lambda: tv.affine(planes, **nothing | {"shear": [shear, 0.0]}, center=[0, 0]),
        "shear_y": lambda: tv.affine(planes, **nothing | {"shear": [0.0, shear]}, center=[0, 0]),
        "translate_x": lambda: tv.affine(
            planes, **nothing | {"translate": [round(150 / 331 * 61 * level), 0]}
        ),
        "translate_y": lambda: tv.affine(
            planes, **nothing | {"translate": [0, round(150 / 331 * 47 * level)]}
        ),
        "rotate": lambda: tv.rotate(planes, 30 * level),
        "brightness": lambda: tv.adjust_brightness(planes, 1 + 0.9 * level),
        "color": lambda: tv.adjust_saturation(planes, 1 + 0.9 * level),
        "contrast": lambda: tv.adjust_contrast(planes, 1 + 0.9 * level),
        "sharpness": lambda: tv.adjust_sharpness(planes, 1 + 0.9 * level),
        "posterize": lambda: tv.posterize(planes, 8 - round(4 * abs(level))),
        "solarize": lambda: tv.solarize(planes, 255 * (1 - abs(level))),
        "autocontrast": lambda: tv.autocontrast(planes),
        "equalize": lambda: tv.equalize(planes),
    }[name]()
    difference = np.abs(
        one(name, image, level).astype(int) - expected.permute(1, 2, 0).numpy()
    ).max(2)
    assert (difference > (0 if name in GEOMETRY else 1)).mean() < 0.003, (
        f"{name}: too many pixels differ"
    )


def test_operations_and_ranges_are_those_of_torchvision():
    space = RandAugment._AUGMENTATION_SPACE
    assert [name.replace("_", "") for name in NAMES] == [name.lower() for name in space]
    most = {name: ranges(31, 331, 331)[-1] for name, (ranges, signed) in space.items() if signed}
    signed = {"ShearX": 0.3, "ShearY": 0.3, "TranslateX": 150, "TranslateY": 150, "Rotate": 30}
    signed |= dict.fromkeys(["Brightness", "Color", "Contrast", "Sharpness"], 0.9)
    assert {name: float(value) for name, value in most.items()} == pytest.approx(signed), (
        "strongest value of every operation"
    )


@settings(max_examples=40)
@given(
    b=st.integers(0, 6),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    magnitude=st.floats(0, 10),
    seed=st.integers(0, 2**32),
)
def test_any_shape_is_augmented_image_by_image(b, height, width, magnitude, seed):
    images = torch.from_numpy(
        np.random.default_rng(seed).integers(0, 256, (b, height, width, 3), dtype=np.uint8)
    )
    before = images.clone()
    result = rand_augment(images, magnitude, np.random.default_rng(seed))
    assert (result.shape, result.dtype) == (images.shape, torch.uint8)
    assert torch.equal(images, before)
    rng = np.random.default_rng(seed)
    if magnitude:
        for _ in range(2):
            operations, signs = rng.integers(len(NAMES), size=b), 1 - 2 * rng.integers(2, size=b)
            alone = [
                one(NAMES[k], image.numpy(), sign * (magnitude / 10))
                for k, sign, image in zip(operations, signs, before, strict=True)
            ]
            # an operation that would leave one colour is not applied
            alone = [
                after if (after != after[0, 0]).any() else image.numpy()
                for after, image in zip(alone, before, strict=True)
            ]
            before = torch.from_numpy(np.array(alone, np.uint8).reshape(images.shape))
    assert torch.equal(result, before)


def test_magnitudes():
    images = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    )
    assert torch.equal(rand_augment(images, 0, np.random.default_rng(0)), images)
    changes = [
        (rand_augment(images, m, np.random.default_rng(0)).int() - images.int())
        .abs()
        .float()
        .mean()
        for m in (0.5, 3, 10)
    ]
    assert 0 < changes[0] < changes[1] < changes[2], f"mean change by magnitude: {changes}"
    for wrong in (-0.1, 10.5, math.nan):
        with pytest.raises(ValueError, match=f"magnitude={wrong}: expected 0 to 10"):
            rand_augment(images, wrong, np.random.default_rng(0))


def one_colour(images) -> int:
    """How many pictures have the same pixel everywhere, counted one by one."""
    return sum((image == image[0, 0]).all() for image in images.numpy())


def small_pictures(photo, n):
    """Pictures of 32 px, of every brightness and contrast."""
    rng = np.random.default_rng(3)
    pictures = []
    for i in range(n):
        low = rng.uniform(0, 225)
        high = rng.uniform(low + 30, 256)
        pictures.append(low + (high - low) / 255 * photo(32, 32, i).astype(float))
    return torch.from_numpy(np.array(pictures).astype(np.uint8))


@pytest.mark.parametrize("magnitude", range(1, 11))
def test_no_small_picture_becomes_blank(magnitude, photo):
    """Pixels as a unit of translations, as in AutoAugment, blank 22 % of pictures of 32 px."""
    pictures = small_pictures(photo, 500).repeat(9, 1, 1, 1)  # 4,500 draws
    assert one_colour(pictures) == 0
    blank = one_colour(rand_augment(pictures, magnitude, np.random.default_rng(magnitude), 2))
    assert blank == 0, f"{blank} of {len(pictures)} pictures are blank"


def test_without_the_guard_some_would_be_blank(photo):
    pictures = small_pictures(photo, 500)
    darker = distorted(pictures, np.full(500, NAMES.index("brightness")), np.full(500, -1.0))
    posterized = distorted(darker, np.full(500, NAMES.index("posterize")), np.full(500, 1.0))
    assert one_colour(posterized) > 100


@pytest.mark.parametrize("ops", [1, 3])
def test_the_number_of_operations(ops, monkeypatch):
    drawn = []
    monkeypatch.setattr(module, "distorted", lambda images, *n: drawn.append(n) or images)
    rand_augment(torch.zeros(5, 2, 2, 3, dtype=torch.uint8), 9, np.random.default_rng(0), ops)
    assert len(drawn) == ops


def test_images_draw_their_operations_and_signs_independently(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        module, "distorted", lambda images, *numbers: drawn.append(numbers) or images
    )
    rand_augment(torch.zeros(3000, 1, 1, 3, dtype=torch.uint8), 9, np.random.default_rng(5))
    (first, one_level), (second, other_level) = drawn
    assert set(one_level) == set(other_level) == {-0.9, 0.9}
    table = np.zeros((len(NAMES), 2, len(NAMES), 2))
    np.add.at(table, (first, (one_level > 0).astype(int), second, (other_level > 0).astype(int)), 1)
    assert stats.chisquare(table.sum((1, 3)).ravel()).pvalue > 0.01, "operations are not uniform"
    assert stats.chisquare(table.sum((0, 2)).ravel()).pvalue > 0.01, "signs are not uniform"


# ---------------------------------------------------------------- all


def test_pure_functions_of_the_generator():
    images, labels = batch(6, 9, 7)
    pixels = torch.randint(0, 256, (6, 9, 7, 3), dtype=torch.uint8)
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002 (the global state that must stay)
    results = []
    for seed in (1, 1, 2):
        rng = step_rng(seed, 3, 0)
        results.append(
            [mix(images, labels, 1, 1, rng) for _ in range(4)] + [rand_augment(pixels, 9, rng)]
        )
    assert all(
        torch.equal(a.images, b.images) and a.share == b.share
        for a, b in zip(results[0][:4], results[1][:4], strict=True)
    )
    assert torch.equal(results[0][4], results[1][4])
    assert not torch.equal(results[0][4], results[2][4])
    after = torch.rand(3), np.random.rand(3)  # noqa: NPY002
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002
    assert torch.equal(after[0], torch.rand(3))
    assert np.array_equal(after[1], np.random.rand(3))  # noqa: NPY002


def test_nothing_is_read_back_from_the_device():
    """A meta tensor has no values: reading one raises."""
    pixels = torch.empty(400, 9, 7, 3, dtype=torch.uint8, device="meta")
    rng = np.random.default_rng(0)
    assert rand_augment(pixels, 9, rng).shape == pixels.shape
    images, labels = (
        torch.empty(5, 3, 9, 7, device="meta"),
        torch.empty(5, dtype=torch.int64, device="meta"),
    )
    for mixup, cutmix in ((1, 0), (0, 1)):
        assert mix(images, labels, mixup, cutmix, rng).images.shape == images.shape


def test_step_rng():
    def words(rng, n=64):
        return set(rng.bit_generator.random_raw(n).tolist())

    keys = [
        (seed, step, rank) for seed in (0, 1, 2**63) for step in (0, 1, 2**40) for rank in (0, 1, 7)
    ]
    assert len(set().union(*(words(step_rng(*key)) for key in keys))) == 64 * len(keys), (
        "two streams share words"
    )
    assert step_rng(3, 5, 1).random() == step_rng(3, 5, 1).random()
    # the order's stream of epoch 2
    taken = set(np.random.Philox(key=np.array([1, 2], dtype=np.uint64)).random_raw(10_000).tolist())
    assert not taken & set().union(*(words(step_rng(1, step, 2)) for step in range(50)))


def test_normalise_after_inference():
    mean, std = (0.11, 0.2, 0.3), (0.5, 0.6, 0.7)  # of no other test: nothing is kept for them yet
    images = torch.randint(0, 256, (2, 4, 5, 3), dtype=torch.uint8)
    with torch.inference_mode():
        normalise(images, mean, std)
    weight = torch.ones(1, 3, 1, 1, requires_grad=True)
    torch.nn.functional.conv2d(normalise(images, mean, std), weight).sum().backward()
    expected = ((images.numpy() / 255 - mean) / std).sum((0, 1, 2))
    np.testing.assert_allclose(weight.grad.flatten(), expected, rtol=1e-5, atol=1e-4)
