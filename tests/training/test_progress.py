"""Progress of a run: remaining time against a simulated run, and lines without a terminal."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from matryoshka.training.progress import Forecast, Progress, duration

UNITS = {"d": 86400, "h": 3600, "min": 60, "s": 1}


class Clock:
    """A clock that stands still until `now` is changed."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0 s"),
        (0, "0 s"),
        (0.4, "0 s"),
        (42, "42 s"),
        (59.6, "1 min"),
        (60, "1 min"),
        (200, "3 min 20 s"),
        (3599, "59 min 59 s"),
        (3599.9, "1 h"),
        (3601, "1 h"),
        (4 * 3600 + 10 * 60, "4 h 10 min"),
        (86400 + 60, "1 d"),
        (3 * 86400 + 4 * 3600, "3 d 4 h"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@given(st.floats(0, 1e8))
def test_a_duration_reads_back_to_less_than_its_smaller_unit(seconds):
    words = duration(seconds).split()
    numbers = [int(word) for word in words[::2]]
    units = words[1::2]
    back = sum(n * UNITS[unit] for n, unit in zip(numbers, units, strict=True))
    # After the largest unit, only the next smaller one is shown.
    names = list(UNITS)
    smaller = UNITS[names[min(names.index(units[0]) + 1, 3)]]
    assert 0 <= round(seconds) - back < smaller
    assert all(n < 60 for n in numbers[1:])


# ---------------------------------------------------------------- forecast

SIZES = [64] * 4 + [128] * 4
STEPS = 10
SECONDS = {64: 1.0, 128: 3.4}
EVALUATION = 5.0


def test_forecast_of_a_simulated_run():
    forecast = Forecast(SIZES, STEPS)
    assert forecast.remaining(0) is None
    with pytest.raises(ValueError, match="no step"):
        forecast.seconds_per_step(64)
    total = sum(STEPS * SECONDS[size] + EVALUATION for size in SIZES)
    passed = 0.0
    for epoch, size in enumerate(SIZES):
        for step in range(STEPS):
            # Steps differ by 5 %.
            seconds = SECONDS[size] * (1.05 if step % 2 else 0.95)
            forecast.add_step(epoch, seconds)
            passed += seconds
            # The evaluation between two epochs does not count as left once the last step is done.
            if set(SIZES[:epoch]) == set(SIZES) and step < STEPS - 1:
                left = forecast.remaining(epoch * STEPS + step + 1)
                assert left == pytest.approx(total - passed, rel=0.1)
        passed += EVALUATION
        forecast.add_evaluation(EVALUATION)
    assert passed == pytest.approx(total)
    assert forecast.timed == pytest.approx(total - len(SIZES) * EVALUATION)
    assert forecast.remaining(STEPS * len(SIZES)) == 0


def test_sizes_without_a_step_scale_with_their_size():
    forecast = Forecast([64, 96, 128], 2)
    forecast.add_step(0, 1.0)
    forecast.add_step(0, 3.0)
    assert forecast.seconds_per_step(128) == pytest.approx(2.0 * 2**1.5)
    assert forecast.remaining(2) == pytest.approx(2 * 2.0 * (1.5**1.5 + 2**1.5))
    forecast.add_step(2, 6.0)
    assert forecast.seconds_per_step(64) == 2.0
    assert forecast.seconds_per_step(160) == pytest.approx(6.0 * (160 / 128) ** 1.5)


# ---------------------------------------------------------------- lines


def make_progress(steps=1000, hint=""):
    lines = []
    clock = Clock()
    progress = Progress(Forecast([64], steps), lines.append, hint=hint, clock=clock)
    return progress, lines, clock


def run(progress, clock, steps, seconds):
    progress.start_steps()
    for step in range(1, steps + 1):
        clock.now += seconds
        progress.step(0, step)


def test_the_time_is_announced_once():
    progress, lines, clock = make_progress()
    # The first step is not timed, so 6 steps are 5 s.
    run(progress, clock, 5, 1.0)
    assert lines == []
    run(progress, clock, 100, 1.0)
    assert len(lines) == 1
    progress.announce(100)
    assert len(lines) == 1


def test_the_announced_time():
    progress, lines, clock = make_progress()
    run(progress, clock, 6, 1.0)
    assert lines == ["time     about 16 min 34 s left"]  # 994 s


def test_nothing_is_announced_at_the_end():
    progress, lines, clock = make_progress(steps=4)
    run(progress, clock, 4, 1.0)
    progress.announce(4)
    assert lines == []


def test_nothing_is_announced_before_a_step_was_timed():
    progress, lines, clock = make_progress()
    progress.announce(0)
    run(progress, clock, 1, 100.0)
    assert lines == []
    assert progress.eta(1) == "time left unknown"
    run(progress, clock, 2, 2.0)
    assert progress.eta(998) == "4 s left"


@pytest.mark.parametrize(("seconds", "hinted"), [(3.5, False), (3.7, True)])
def test_the_hint_is_for_more_than_an_hour(seconds, hinted):
    progress, lines, clock = make_progress(hint="; use a GPU")
    run(progress, clock, 3, seconds)
    assert [line.endswith("left; use a GPU") for line in lines] == [hinted]


def test_lines_come_after_ten_seconds_of_silence():
    progress, lines, clock = make_progress()
    clock.now += 9.9
    assert not progress.is_due()
    clock.now += 0.1
    assert progress.is_due()
    progress.print0("a line")
    assert not progress.is_due()
    clock.now += 9.9
    assert not progress.is_due()
    assert lines == ["a line"]


def test_batches_are_all_yielded_with_a_line_every_ten_seconds():
    progress, lines, clock = make_progress()
    seen = []
    for batch in progress.batches(range(50), 50, "evaluated"):
        seen.append(batch)
        clock.now += 1.0
    assert seen == list(range(50))
    assert lines == [f"evaluated {percent} %" for percent in (20, 40, 60, 80)]
