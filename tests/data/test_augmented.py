"""Colour jitter and random erasing against torchvision and loops; all augmentations in a row."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matryoshka.train import train_imagenet
from torchvision.transforms.v2 import functional as tv
from training_commands import options as program_options

from matryoshka.config import ConfigError
from matryoshka.data.augment import (
    ERASED_AREA,
    ERASED_RATIO,
    Preprocessing,
    augmented,
    erased_rectangles,
    mix,
    normalise,
    random_erasing,
)
from matryoshka.data.colour_jitter import ADJUSTMENTS, colour_jitter
from matryoshka.data.rand_augment import one_for_each, rand_augment
from matryoshka.training.options import DataConfig, parser

NAMES = list(ADJUSTMENTS)
BY_TORCHVISION = {
    "brightness": tv.adjust_brightness,
    "contrast": tv.adjust_contrast,
    "saturation": tv.adjust_saturation,
    "hue": tv.adjust_hue,
}


def pixels(b, height, width, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (b, height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", NAMES)
def test_each_adjustment_is_that_of_torchvision(name, photo):
    images = torch.from_numpy(np.stack([photo(40, 30, seed) for seed in range(6)]))
    images[0] = 90  # grey has no hue; torchvision's weights of grey add up to 0.9999, and it has 89
    images[1] = pixels(1, 30, 40)[0]
    factors = [-0.5, -0.21, 0.0, 0.1, 0.33, 0.5] if name == "hue" else [0, 0.3, 0.8, 1, 1.4, 1.9]
    which = np.full(6, NAMES.index(name))
    results = one_for_each(images, ADJUSTMENTS, which, np.array(factors, float))
    for image, factor, result in zip(images, factors, results, strict=True):
        expected = BY_TORCHVISION[name](image.permute(2, 0, 1), factor).permute(1, 2, 0)
        difference = (result.int() - expected.int()).abs()
        assert difference.max() <= 2, f"{name} {factor}: a pixel differs by {difference.max()}"
        assert difference.float().mean() <= 1, f"{name} {factor}: mean {difference.float().mean()}"


def test_factors_and_orders_of_the_jitter(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "matryoshka.data.colour_jitter.one_for_each",
        lambda images, table, which, factors: drawn.append((which, factors)) or images,
    )
    strengths = (0.4, 1.5, 0.2, 0.1)
    colour_jitter(pixels(4000, 1, 1), strengths, np.random.default_rng(0))
    which = np.array([round_[0] for round_ in drawn])  # [4 rounds, images]
    factors = np.array([round_[1] for round_ in drawn])
    assert (np.sort(which, axis=0) == np.arange(4)[:, None]).all(), "each adjustment once"
    assert len(np.unique(which, axis=1).T) == 24, "every order"
    for k, (low, high) in enumerate([(0.6, 1.4), (0, 2.5), (0.8, 1.2), (-0.1, 0.1)]):
        values = factors[which == k]
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 0.03 * (high - low)


def test_an_adjustment_that_is_off_is_left_out():
    images = pixels(5, 6, 7)
    rng = np.random.default_rng(0)
    state = rng.bit_generator.state
    assert colour_jitter(images, (0, 0, 0, 0), rng) is images
    assert rng.bit_generator.state == state
    turned = colour_jitter(images, (0, 0, 0, 0.3), rng)
    assert torch.equal(turned.amax(3), images.amax(3)), "hue keeps the largest channel"
    assert not torch.equal(turned, images)


@settings(max_examples=50)
@given(
    b=st.integers(1, 5),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    probability=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 2**32),
    layout=st.sampled_from([torch.channels_last, torch.contiguous_format]),
)
def test_erasing_sets_the_rectangles_to_zero(*, b, height, width, probability, seed, layout):
    images = torch.rand(b, 3, height, width) + 1
    images = images.contiguous(memory_format=layout)
    result = random_erasing(images, probability, np.random.default_rng(seed))
    rectangles = erased_rectangles(
        b, height, width, probability=probability, rng=np.random.default_rng(seed)
    )
    expected = images.clone()
    for image, (top, left, bottom, right) in zip(expected, rectangles, strict=True):
        assert 0 <= top <= bottom <= height
        assert 0 <= left <= right <= width
        image[:, top:bottom, left:right] = 0
    assert torch.equal(result, expected)
    assert result.is_contiguous(memory_format=layout)


def test_erased_areas_and_ratios():
    side = 400
    rng = np.random.default_rng(0)
    rows = erased_rectangles(8000, side, side, probability=0.25, rng=rng)
    height, width = rows[:, 2] - rows[:, 0], rows[:, 3] - rows[:, 1]
    erased = height > 0
    assert abs(erased.mean() - 0.25) < 0.02
    area = (height * width)[erased] / side**2
    ratio = (height[erased] / width[erased]).astype(float)
    assert ERASED_AREA[0] * 0.95 < area.min() < area.max() < ERASED_AREA[1] * 1.05
    assert ERASED_RATIO[0] * 0.95 < ratio.min() < ratio.max() < ERASED_RATIO[1] * 1.05
    assert abs(np.log(ratio).mean()) < 0.05, "as often high as wide"
    assert (rows[erased, 0] == 0).any()
    assert (rows[erased, 2] == side).any()


# ---------------------------------------------------------------- all of them


def test_augmented_is_all_of_them_in_this_order():
    images, labels = pixels(6, 16, 16), torch.arange(6)
    options = DataConfig(
        color_jitter=(0.2, 0.2, 0.2, 0.1),
        randaugment=9.0,
        randaugment_ops=3,
        random_erasing=0.7,
        cutmix=1.0,
    )
    preprocessing = Preprocessing(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    result = augmented(images, labels, options, preprocessing, np.random.default_rng(1))
    rng = np.random.default_rng(1)
    step = colour_jitter(images, (0.2, 0.2, 0.2, 0.1), rng)
    step = normalise(rand_augment(step, 9.0, rng, 3), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    expected = mix(random_erasing(step, 0.7, rng), labels, 0, 1.0, rng)
    assert torch.equal(result.images, expected.images)
    assert torch.equal(result.other, expected.other)
    assert result.share == expected.share


def test_augmented_without_options_is_the_normalised_batch():
    images, labels = pixels(3, 5, 4), torch.arange(3)
    rng = np.random.default_rng(0)
    state = rng.bit_generator.state
    result = augmented(images, labels, DataConfig(), Preprocessing(), rng)
    assert torch.equal(result.images, normalise(images))
    assert result.images.is_contiguous(memory_format=torch.channels_last)
    assert rng.bit_generator.state == state


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--data.color_jitter=.4,.4,.4,.6", "expected a hue of 0 to 0.5, got 0.6"),
        ("--data.color_jitter=.4,.4,.4", "expected float,float,float,float"),
        ("--data.random_erasing=1.5", "data.random_erasing=1.5: expected 0 to 1"),
        ("--data.randaugment_ops=0", "data.randaugment_ops=0: expected 1 to 16"),
        ("--data.crop=pad", "expected one of resized, padded"),
    ],
)
def test_illegal_options(option, message):
    with pytest.raises(ConfigError) as error:
        parser().parse_args([option])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--data.crop=padded"], "data.scale=0.7,1 is not used with data.crop=padded"),
        (["--data.padding=2"], "data.padding=2 is not used with data.crop=resized"),
        (["--data.crop=padded", "--data.scale=.08,1", "--data.padding=33"], "padding=33: expected"),
    ],
)
def test_options_of_the_other_crop_are_refused(more, message, digits, tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        train_imagenet.main(program_options(digits, tmp_path, "run", *more))
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_training_with_every_augmentation(digits, tmp_path):
    more = ["--data.crop=padded", "--data.scale=.08,1", "--data.padding=3", "--training.epochs=1"]
    more += ["--data.color_jitter=.3,.3,.3,.1", "--data.random_erasing=.5", "--data.cutmix=1"]
    more += ["--data.randaugment=5", "--data.randaugment_ops=1"]
    assert train_imagenet.main(program_options(digits, tmp_path, "run", *more)) == 0
    line = json.loads((tmp_path / "run" / "log").read_text())
    assert 0 < line["train_loss"] < 100
