"""Views of self-supervised learning against torchvision's transforms, and their random numbers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torchvision.transforms.v2 import functional as tv

from matryoshka.data import views as views_module
from matryoshka.data.views import (
    ViewDraws,
    ViewOptions,
    apply_views,
    blurred,
    draw_views,
    uniform_numbers,
)

ALL = ViewOptions(
    jitter=1, strengths=(0.4, 0.4, 0.4, 0.1), grey=0.3, blur=0.5, solarise=0.3, kernel=5
)


def pictures(count, height=13, width=11, seed=0):
    """Smooth in one half, noise in the other: uint8 [count, H, W, 3]."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    ramp = np.linspace(0, 255, width, dtype=np.uint8)[None, None, :, None]
    noise[:, : height // 2] = ramp
    return torch.from_numpy(noise)


def by_torchvision(image, draws, row):
    """One image, uint8 [H, W, 3], by torchvision's functions with the same numbers."""
    x = image.permute(2, 0, 1)
    if draws.flip[row]:
        x = tv.horizontal_flip(x)
    adjust = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    if draws.jitter[row]:
        for k in draws.order[row]:
            x = adjust[k](x, float(draws.factors[row, k]))
    if draws.grey[row]:
        x = tv.rgb_to_grayscale(x, num_output_channels=3)
    if draws.sigma[row] > 0:
        x = tv.gaussian_blur(x, [draws.kernel] * 2, [float(draws.sigma[row])] * 2)
    if draws.solarise[row]:
        x = tv.solarize(x, 128)
    return x.permute(1, 2, 0)


@pytest.mark.parametrize("only", ["flip", "jitter", "grey", "blur", "solarise"])
def test_each_operation_is_torchvisions(only):
    off = dict.fromkeys(("flip", "jitter", "grey", "blur", "solarise"), 0.0)
    options = ViewOptions(**off | {only: 0.5}, kernel=5)
    images = pictures(40)
    draws = draw_views(np.arange(40), options, seed=1, epoch=2, view=0)
    views = apply_views(images, draws)
    changed = 0
    for row, image in enumerate(images):
        wanted = by_torchvision(image, draws, row)
        difference = (views[row].int() - wanted.int()).abs()
        # torchvision's grey is cut off, ours rounded. A jitter rounds after each of four steps.
        assert difference.max() <= (6 if only == "jitter" else 1)
        changed += not torch.equal(views[row], image)
    assert 8 <= changed <= 32, "about half of the images"


def test_the_input_is_left_alone():
    images = pictures(6)
    before = images.clone()
    apply_views(images, draw_views(np.arange(6), ALL, seed=0, epoch=0, view=0))
    assert torch.equal(images, before)


@settings(max_examples=20)
@given(st.data())
def test_a_view_depends_on_the_sample_alone(data):
    """Any part of any order of the samples gets the same pixels."""
    images = pictures(12)
    whole = apply_views(images, draw_views(np.arange(12), ALL, seed=3, epoch=1, view=1))
    part = data.draw(st.lists(st.integers(0, 11), min_size=1, max_size=12, unique=True))
    draws = draw_views(np.array(part), ALL, seed=3, epoch=1, view=1)
    assert torch.equal(apply_views(images[part], draws), whole[part])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(views_module, "_IN_CACHE", 3 * images[0].numel() + 1)
        assert torch.equal(apply_views(images[part], draws), whole[part]), "in parts of three"


def test_every_word_of_the_key_counts():
    index = np.arange(4)
    numbers = [
        uniform_numbers(index, key, 3) for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    ]
    assert len(np.unique(np.stack(numbers))) == 4 * 4 * 3


def test_the_numbers_are_uniform_and_independent():
    u = uniform_numbers(np.arange(20_000), (7, 0, 1), 4)
    assert u.min() >= 0
    assert u.max() < 1
    for column in u.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-4
    correlation = np.corrcoef(np.c_[u, np.roll(u, 1, axis=0)].T)
    assert abs(correlation - np.eye(8)).max() < 0.035  # 5 standard errors of 1 / sqrt(20,000)


def test_splitmix_by_hand():
    """The first outputs of SplitMix64 from the state 1234567, as published with its C code."""
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    state, found = 1234567, []
    for _ in known:
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        found.append(z ^ (z >> 31))
    assert found == known
    u = uniform_numbers(np.array([1234567]), (), 3)[0]
    assert [int(value * 2**53) for value in u] == [value >> 11 for value in known]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"grey": 1.5}, "grey=1.5"),
        ({"strengths": (0, 0, 0, 0.6)}, "at most 0.5 for the hue"),
        ({"kernel": 4}, "kernel=4"),
        ({"sigma": (2.0, 1.0)}, "sigma="),
    ],
)
def test_options_are_checked(change, text):
    with pytest.raises(ValueError, match=text):
        ViewOptions(**change)


def test_a_kernel_that_is_too_large():
    with pytest.raises(ValueError, match="images of 11x13 are too small"):
        blurred(pictures(1), np.array([1.0]), 23)
    assert isinstance(draw_views(np.arange(2), ALL, seed=0, epoch=0, view=0), ViewDraws)
