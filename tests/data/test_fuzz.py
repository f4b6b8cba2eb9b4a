"""Thousands of damaged files (fuzz.py, in child processes), and the named ones of attacks/."""

import os
import re
import subprocess
import sys
from pathlib import Path
from random import Random

import mutate
import mutate_jpeg  # noqa: F401 (registers its kinds)
import numpy as np
import pytest
from hostile import AT_OPENING, ATTACKS
from mutate_bases import bases

from matryoshka.data import BetonError, BetonFile, CenterCrop, Loader

FUZZING = Path(__file__).resolve().parents[1] / "fuzzing"


def test_thousands_of_damaged_files(tmp_path):
    """No crash, no hang, no silent change, every error names its file; `make fuzz` runs more of
    them.
    """
    cases = os.environ.get("FUZZ_CASES", "3000")
    command = [
        sys.executable,
        str(FUZZING / "fuzz.py"),
        "--cases",
        cases,
        "--out",
        str(tmp_path / "failures"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    assert f"\n{int(cases):,} cases in " in done.stdout
    assert "failures: 0" in done.stdout


def test_cases_are_the_same_in_every_run(tmp_path):
    names = sorted(mutate.KINDS)
    for case in range(20):
        files = []
        for _ in range(2):
            rng, draft = Random(case), bases()[case % 4].copy()
            mutate.apply(draft, rng.choice(names), rng)
            draft.write(tmp_path / "x")
            files.append((tmp_path / "x").read_bytes())
        assert files[0] == files[1]


def test_every_kind_of_damage_changes_something():
    def state(draft):
        return draft.head, draft.body, draft.rows, draft.cut

    sound = [state(base) for base in bases()]
    for name in mutate.KINDS:
        changed = 0
        for seed in range(40):
            draft = bases()[seed % len(sound)].copy()
            mutate.apply(draft, name, Random(seed))
            changed += state(draft) != sound[seed % len(sound)]
        assert changed, name
    assert [state(base) for base in bases()] == sound  # copies share nothing with their base


def decoded(path):
    """(every image up to the first error, the error)"""
    found, error = [], ""
    try:
        for batch in Loader(path, 1, order="sequential", crop=CenterCrop(32, ratio=1.0)):
            found.append(batch.images.numpy().copy())
    except BetonError as raised:
        error = str(raised)
    return found, error


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("base", [0, 1])
def test_named_attacks(tmp_path, name, base):
    change, when, message = ATTACKS[name]
    draft, sample = bases()[base].copy(), 1 + base
    draft.write(tmp_path / "sound")
    if "restart" in name and base == 0:
        pytest.skip("this file has no restart markers")
    change(draft, sample)
    draft.write(tmp_path / "x")
    expected = re.escape(f"{tmp_path / 'x'}: ") + ".*" + re.escape(message.format(sample))
    if when == AT_OPENING:
        with pytest.raises(BetonError, match=expected):
            BetonFile(tmp_path / "x")
        return
    found, error = decoded(tmp_path / "x")
    assert re.match(expected, error)
    assert len(found) == sample, f"{len(found)} of {sample} cases ran"
    for image, sound in zip(found, decoded(tmp_path / "sound")[0], strict=False):
        np.testing.assert_array_equal(image, sound)  # its neighbours are as they were
