"""Loader states: resumes with other numbers of workers and ranks; refused states."""

import json
import time
from itertools import zip_longest

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matryoshka.data import (
    BetonFile,
    ImageFolder,
    Loader,
    RandomResizedCrop,
    ResidentLoader,
    StateError,
    write_beton,
)
from matryoshka.data.order import ORDERS

EPOCHS = 3


@pytest.fixture(scope="module")
def beton(tmp_path_factory, folder):
    path = tmp_path_factory.mktemp("state") / "train.beton"
    write_beton(
        ImageFolder(folder / "train"), path, max_resolution=500, write_mode="jpg", jpeg_quality=95
    )
    return path


def loaders(data, world, **options):
    return [
        Loader(data, rank=rank, world=world, crop=RandomResizedCrop(12), **options)
        for rank in range(world)
    ]


def rest_of(ranks, epochs):
    """[(epoch, index, labels, images)] of global batches until all epochs are done; ranks take
    turns.
    """
    seen = []
    while ranks[0].epoch < epochs:
        epoch = ranks[0].epoch
        for shares in zip_longest(
            *(list(rank) for rank in ranks)
        ):  # a last small batch has no share for some
            there = [share for share in shares if share is not None]
            seen.append((epoch, *(torch.cat(parts) for parts in zip(*there, strict=True))))
    return seen


def same(a, b):
    return a[0] == b[0] and all(torch.equal(x, y) for x, y in zip(a[1:], b[1:], strict=True))


whole_runs = {}


@settings(max_examples=40)
@given(
    epoch=st.integers(0, EPOCHS - 1),
    taken=st.integers(0, 5),
    batch=st.integers(3, 7),
    drop=st.booleans(),
    order=st.sampled_from(ORDERS),
    in_memory=st.booleans(),
    prefetch=st.integers(1, 4),
    before=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    after=st.tuples(st.integers(1, 3), st.integers(1, 3)),
)
def test_the_rest_of_an_interrupted_run(
    *, beton, epoch, taken, batch, drop, order, in_memory, prefetch, before, after
):
    options = {"batch_size": batch, "order": order, "drop_last": drop, "seed": 11}
    key = tuple(options.values())
    if key not in whole_runs:
        whole_runs[key] = rest_of(loaders(beton, 1, **options), EPOCHS)
    expected = whole_runs[key]
    per_epoch = len(expected) // EPOCHS
    taken = min(taken, per_epoch)

    (workers, world), (new_workers, new_world) = before, after
    first = loaders(beton, world, num_workers=workers, prefetch=prefetch, **options)
    for rank in first:
        rank.epoch = epoch
        iterator = iter(rank)
        for _ in range(taken):
            next(
                iterator, None
            )  # a rank may have no share of a last small batch: its epoch has ended then
    states = [json.dumps(rank.state_dict()) for rank in first]
    assert len(states[0]) < 1000, f"a state of {len(states[0])} bytes"
    assert json.loads(states[0])["batch"] == taken
    second = loaders(beton, new_world, num_workers=new_workers, in_memory=in_memory, **options)
    for rank in second:
        rank.load_state_dict(json.loads(states[0]))
    rest = rest_of(second, EPOCHS)
    wanted = expected[epoch * per_epoch + taken :]
    assert len(rest) == len(wanted), f"{len(rest)} batches are left, not {len(wanted)}"
    assert all(same(a, b) for a, b in zip(rest, wanted, strict=True))


def test_what_a_state_is_at_every_point(beton):
    loader = Loader(beton, 6, seed=2, crop=RandomResizedCrop(8), prefetch=3)

    def where():
        return loader.state_dict()["epoch"], loader.state_dict()["batch"]

    assert where() == (0, 0)
    iterator = iter(loader)
    assert where() == (0, 0)
    for k in range(4):
        next(iterator)
        assert where() == (0, k + 1)
    assert next(iterator, None) is None
    assert where() == (1, 0)
    list(loader)
    assert where() == (2, 0)
    next(iter(loader))
    assert where() == (2, 1)
    assert loader.epoch == 3
    loader.epoch = 7
    assert where() == (7, 0)

    loader.load_state_dict(
        {**loader.state_dict(), "epoch": 5, "batch": 4}
    )  # all batches handed out, not yet ended
    assert where() == (5, 4)
    assert loader.epoch == 5
    assert list(loader) == []
    assert where() == (6, 0)
    assert len(list(loader)) == 4, "batches of the epoch"


def test_an_older_iterator_does_not_change_the_state(beton):
    loader = Loader(beton, 6, crop=RandomResizedCrop(8))
    old, new = iter(loader), iter(loader)
    next(new)
    next(old)
    next(old)
    assert (loader.state_dict()["epoch"], loader.state_dict()["batch"]) == (1, 1)


def test_states_of_other_runs_are_refused(beton, folder, digits):
    base = {"batch_size": 6, "order": "random", "seed": 1, "drop_last": True}
    state = Loader(beton, **base).state_dict()
    for name, value in (
        ("batch_size", 5),
        ("order", "sequential"),
        ("seed", 2),
        ("drop_last", False),
    ):
        with pytest.raises(
            StateError, match=rf"train\.beton: .*another run: {name} was .* and is {value!r}$"
        ):
            Loader(beton, **(base | {name: value})).load_state_dict(state)
    with pytest.raises(
        StateError, match=r"seed was 1 and is 3; samples was 20 and is 400; dataset was"
    ):
        Loader(digits["train"], **(base | {"seed": 3})).load_state_dict(state)
    with pytest.raises(StateError, match="dataset was"):  # as many images, other bytes
        Loader(folder / "train", **base).load_state_dict(state)
    quasi = base | {"order": "quasi_random"}
    state_of_quasi = Loader(beton, **quasi).state_dict()
    with pytest.raises(StateError, match="window_pages was 128 and is 4"):
        Loader(beton, **quasi, window_pages=4).load_state_dict(state_of_quasi)
    loader = Loader(beton, **base)
    for bad, words in (
        (None, "not a dict"),
        ([1], "not a dict"),
        ({}, "lacks epoch, batch, seed"),
        ({**state, "epoch": -1}, "epoch -1"),
        ({**state, "batch": 4}, "batch 4; expected epoch 0 or more and batch 0 to 3"),
        ({**state, "batch": "1"}, "batch '1'"),
        ({**state, "epoch": True}, "epoch True"),
    ):
        with pytest.raises(StateError, match=words) as caught:
            loader.load_state_dict(bad)
        assert "\n" not in str(caught.value)
    assert loader.state_dict() == state  # a refused state changes nothing
    loader.load_state_dict(state)


def test_a_resident_loader_continues_a_streaming_one(digits):
    options = {"order": "random", "seed": 5, "crop": RandomResizedCrop(16)}
    streaming, resident = (
        Loader(digits["train"], 50, **options),
        ResidentLoader(digits["train"], 50, **options),
    )
    iterator = iter(streaming)
    for _ in range(3):
        next(iterator)
    resident.load_state_dict(streaming.state_dict())
    for a, b in zip(iterator, resident, strict=True):
        assert torch.equal(a.index, b.index)
        assert torch.equal(a.labels, b.labels)
    assert resident.state_dict() == streaming.state_dict()


def test_a_large_set_is_not_iterated(beton, monkeypatch):
    """A state near the end of a large set: nothing before it is looked at."""
    loader = Loader(beton, 4, crop=RandomResizedCrop(8))
    fetched = []
    original = BetonFile.fetch
    monkeypatch.setattr(
        BetonFile, "fetch", lambda self, i: (fetched.append(i), original(self, i))[1]
    )
    loader.load_state_dict({**loader.state_dict(), "batch": 4})
    start = time.perf_counter()
    assert len(list(loader)) == 1, "batches that are left"
    assert time.perf_counter() - start < 30, "skipping to the last batch takes 30 seconds"
    assert np.concatenate(fetched).size == 4
