"""Choices of a run that fits into a time, against brute force and train's own options."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matryoshka.training import recipe
from matryoshka.training.loaders import resolution_at
from matryoshka.training.options import parser
from matryoshka.training.recipe import Costs, Facts, Sizes

FACTS = st.builds(
    Facts,
    images=st.integers(1, 2_000_000),
    side=st.integers(1, 4000),
    classes=st.integers(2, 1000),
    gpu=st.booleans(),
    pretrained=st.booleans(),
)
RATES = st.floats(0.1, 1e5)
SECONDS = st.floats(1, 1e6)
ARCHS = st.none() | st.sampled_from(sorted(recipe.COST))
RESOLUTIONS = st.sampled_from([8, 20, *range(32, 225, 32)])
EPOCHS = st.integers(1, recipe.MAX_EPOCHS)


def make_costs(step, evaluated_image=0.0, epoch=0.0):
    """Costs with a time per step in proportion to the pixels; step: seconds at 64 px."""
    return Costs(lambda size: step * (size / 64) ** 2, evaluated_image, epoch)


COSTS = st.builds(make_costs, st.floats(1e-4, 1), st.floats(0, 0.1), st.floats(0, 5))


@given(facts=FACTS, seconds=SECONDS, rate=RATES, arch=ARCHS)
def test_images_are_never_enlarged(facts, seconds, rate, arch):
    sizes = recipe.choose_model(facts, seconds=seconds, rate=rate, arch=arch)
    assert sizes.resolution <= min(facts.side, 224)
    assert sizes.resolution % 32 == 0 or sizes.resolution == facts.side < 32
    assert arch is None or sizes.arch == arch


@given(facts=FACTS, seconds=SECONDS, rate=RATES, arch=ARCHS, factor=st.floats(1, 100))
def test_more_time_never_chooses_a_smaller_resolution(facts, seconds, rate, arch, factor):
    less, more = (
        recipe.choose_model(facts, seconds=time, rate=rate, arch=arch)
        for time in (seconds, factor * seconds)
    )
    assert more.resolution >= less.resolution


@pytest.mark.parametrize(
    ("side", "expected"),
    [(20, [20]), (32, [32]), (100, [96, 64, 32]), (5000, [224, 192, 160, 128, 96, 64, 32])],
)
def test_resolutions(side, expected):
    assert recipe.resolutions(side) == expected


@given(images=st.integers(1, 10_000_000), gpu=st.booleans())
def test_batch_size_is_a_power_of_two_with_thirty_steps(images, gpu):
    batch = recipe.batch_size(images, gpu=gpu)
    if images < 16:
        assert batch == images
        return
    largest = 512 if gpu else 64
    powers = [size for size in (16, 32, 64, 128, 256, 512) if size <= largest]
    enough = [size for size in powers if images // size >= 30]
    assert batch == max(enough, default=16)


def slow_seconds(resolution, epochs, *, steps, val_images, costs):
    """Time of a run, epoch by epoch and step by step."""
    cfg = parser().parse_args(recipe.flags(recipe.ramp(resolution, epochs)))
    total = 0.0
    for epoch in range(epochs):
        total += steps * costs.step(resolution_at(epoch, cfg.resolution))
        total += val_images * costs.evaluated_image + costs.epoch
    return total


PLAN = {"steps": st.integers(1, 1000), "val_images": st.integers(0, 10_000), "costs": COSTS}


@settings(max_examples=50)
@given(resolution=RESOLUTIONS, epochs=EPOCHS, plan=st.fixed_dictionaries(PLAN))
def test_run_seconds_against_a_sum_over_epochs(resolution, epochs, plan):
    seconds = recipe.run_seconds(resolution, epochs, **plan)
    assert math.isclose(seconds, slow_seconds(resolution, epochs, **plan), rel_tol=1e-9)


@settings(max_examples=10)
@given(resolution=RESOLUTIONS, plan=st.fixed_dictionaries(PLAN), factor=st.floats(0.5, 400))
def test_epochs_are_the_largest_number_that_fits(resolution, plan, factor):
    seconds = factor * recipe.run_seconds(resolution, 1, **plan)
    times = [recipe.run_seconds(resolution, n, **plan) for n in range(1, recipe.MAX_EPOCHS + 1)]
    fitting = [n for n, time in enumerate(times, 1) if time <= seconds]
    assert recipe.choose_epochs(resolution, seconds=seconds, **plan) == max(fitting, default=1)
    # One more epoch always takes longer, so more time never gives fewer epochs.
    assert (np.diff(times) > 0).all()


@settings(max_examples=100)
@given(facts=FACTS, arch=ARCHS, data=st.data(), epochs=EPOCHS)
def test_train_accepts_the_options(facts, arch, data, epochs):
    resolution = data.draw(st.sampled_from(recipe.resolutions(facts.side)))
    stored = data.draw(st.integers(facts.side, 2 * facts.side))
    sizes = Sizes(arch or "resnet18", resolution)
    chosen = recipe.options(facts, sizes, stored=stored) | recipe.ramp(resolution, epochs)
    cfg = parser().parse_args(recipe.flags(chosen))
    for name, value in chosen.items():
        section, key = name.split(".")
        assert getattr(getattr(cfg, section), key) == value
    ramp = cfg.resolution
    assert ramp.min_res <= ramp.max_res == resolution
    assert 0 <= ramp.start_ramp < ramp.end_ramp
    assert 0 <= cfg.lr.lr_peak_epoch < epochs
    assert all(size % 32 == 0 or size == facts.side for size in (ramp.min_res, ramp.max_res))
    # The run ends at the resolution that is evaluated, but where it is too short for a ramp.
    assert epochs < 3 or resolution_at(epochs - 1, ramp) == cfg.validation.resolution
