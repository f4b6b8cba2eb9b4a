"""Memory of batches: what is free under limits of control groups, and what is refused."""

import io
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from matryoshka import environment
from matryoshka.data import (
    CenterCrop,
    Loader,
    RandomResizedCrop,
    ResidentLoader,
    Subset,
    budget,
    write_beton,
)
from matryoshka.data.budget import BatchMemoryError, check_batches
from matryoshka.data.resident import NotResidentError

SIDE = 20


class Noise:
    """40 images of noise, SIDE pixels a side: a source for write_beton."""

    classes = ("a", "b")
    labels = np.arange(40) % 2

    def __len__(self):
        return len(self.labels)

    def read(self, index):
        file = io.BytesIO()
        pixels = np.random.default_rng(index).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        Image.fromarray(pixels).save(file, "png")
        return file.getvalue()

    def name(self, index):
        return str(index)


@pytest.fixture(scope="module")
def beton(tmp_path_factory):
    path = tmp_path_factory.mktemp("budget") / "noise.beton"
    write_beton(Noise(), path, max_resolution=SIDE, write_mode="raw")
    return path


@pytest.fixture
def free(monkeypatch):
    """Sets the bytes that are free."""

    def leave(count):
        for module in ("budget", "resident"):
            monkeypatch.setattr(f"matryoshka.data.{module}.free_memory", lambda: count)

    return leave


# ---------------------------------------------------------------- what is free


@pytest.fixture
def system(tmp_path, monkeypatch):
    """Writes files of a system below a folder that stands for its root: {path: content}."""
    monkeypatch.setattr(environment, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(environment, "_GROUPS", tmp_path / "sys/fs/cgroup")

    def write(files):
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)

    return write


MACHINE = {"proc/meminfo": "MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable: 5000 kB\n"}
VERSION_2 = MACHINE | {
    "proc/self/cgroup": "0::/user.slice/job\n",
    "sys/fs/cgroup/user.slice/memory.max": "max\n",
    "sys/fs/cgroup/user.slice/memory.current": "4000000\n",
    "sys/fs/cgroup/user.slice/job/memory.max": "3000000\n",
    "sys/fs/cgroup/user.slice/job/memory.current": "2500000\n",
    "sys/fs/cgroup/user.slice/job/memory.stat": "anon 9\nfile 900\nshmem 500\n"
    "inactive_file 300\nactive_file 100\n",
}
VERSION_1 = MACHINE | {
    "proc/self/cgroup": "5:cpu,cpuacct:/\n4:memory:/docker/abc\n0::/\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "2000000\n",  # as a container sees its own
    "sys/fs/cgroup/memory/memory.usage_in_bytes": "500000\n",
    "sys/fs/cgroup/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 70\n"
    "total_active_file 30\n",
}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (MACHINE, 5000 * 1024),
        (VERSION_2, 500_000 + 400),  # of files; shared memory stays
        (VERSION_2 | {"sys/fs/cgroup/user.slice/memory.max": "4100000\n"}, 100_000),
        (VERSION_2 | {"sys/fs/cgroup/user.slice/memory.max": "3900000\n"}, 0),  # lowered later
        (VERSION_2 | {"proc/meminfo": "MemAvailable: 7 kB\n"}, 7 * 1024),
        (VERSION_2 | {"proc/self/cgroup": "0::/../elsewhere\n"}, 5000 * 1024),
        (VERSION_2 | {"proc/self/cgroup": "\n:\n::\nx"}, 5000 * 1024),
        (VERSION_1, 1_500_000 + 100),
        (
            VERSION_1 | {"sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n"},
            5000 * 1024,
        ),
    ],
)
def test_limits_of_control_groups_count(system, files, expected):
    system(files)
    assert environment.free_memory() == expected


# ---------------------------------------------------------------- what is refused


def bytes_held(count, sizes, batches, as_floats):
    """Memory of batches, image by image."""
    pixels = count * sum(3 * side**2 for side in sizes)
    return pixels * batches + 4 * pixels * as_floats


@given(
    free=st.integers(0, 2**44),
    count=st.integers(1, 5000),
    sizes=st.lists(st.integers(1, 20_000), min_size=1, max_size=4),
    batches=st.integers(1, 6),
    as_floats=st.booleans(),
    processes=st.integers(1, 9),
)
def test_what_is_said_to_fit_fits(*, free, count, sizes, batches, as_floats, processes):
    options = {"batches": batches, "as_floats": as_floats, "processes": processes}
    share = free // processes
    size = sizes[0] if len(sizes) == 1 else tuple(sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "free_memory", lambda: free)
        if bytes_held(count, sizes, batches, as_floats) <= share:
            check_batches("x", count, size, **options)
            return
        with pytest.raises(BatchMemoryError) as refusal:
            check_batches("x", count, size, **options)
        said = str(refusal.value)
        assert "\n" not in said
        if smaller := re.search(r"the batch size to (\d+)", said):
            assert 0 < int(smaller[1]) < count
            check_batches("x", int(smaller[1]), size, **options)
        if lower := re.search(r"the resolution to (\d+) pixels", said):
            assert 0 < int(lower[1]) < sizes[0]
            check_batches("x", count, int(lower[1]), **options)


def test_a_loader_refuses_before_it_allocates(beton, free):
    need = bytes_held(16, [1000], 3, True)  # three batches are an epoch
    free(need)
    assert len(Loader(beton, 16, crop=CenterCrop(1000))) == 3
    free(need - 1)
    with pytest.raises(
        BatchMemoryError,
        match=r"noise\.beton: memory for 3 batches of 16 images of 1000x1000 pixels, one of them "
        r"as floats, too, is 0\.336 GB, 0\.336 GB are free; lower the batch size to 14 or the "
        r"resolution to 948 pixels$",
    ):
        Loader(beton, 16, crop=CenterCrop(1000))
    # A set of fewer images; a share of them; views.
    Loader(Subset(Loader(beton, 16).dataset, np.arange(4)), 16, crop=CenterCrop(1000))
    Loader(beton, 16, crop=CenterCrop(1000), rank=0, world=2)
    views = [RandomResizedCrop(900), RandomResizedCrop(500)]
    with pytest.raises(BatchMemoryError, match="16 images in 2 views of 900x900, 500x500 pixels"):
        Loader(beton, 16, crop=views)
    free(None)
    Loader(beton, 16, crop=CenterCrop(16_384))


def test_processes_of_one_machine_share_its_memory(beton, free, monkeypatch):
    free(2 * bytes_held(8, [100], 3, True))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    Loader(beton, 16, crop=CenterCrop(100), rank=1, world=2)
    Loader(beton, 16, crop=CenterCrop(100))  # which only one of them has
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(BatchMemoryError, match="GB are free for each of 4 processes"):
        Loader(beton, 32, crop=CenterCrop(100), rank=1, world=4)


def test_an_epoch_asks_for_more_only(beton, free):
    free(bytes_held(8, [64], 4, True))
    loader = Loader(beton, 8, crop=CenterCrop(64), order="sequential")
    free(0)  # what the loader itself uses by now
    assert sum(len(batch.labels) for batch in loader) == 40
    loader.crop = CenterCrop(48)
    assert sum(len(batch.labels) for batch in loader) == 40
    loader.crop = CenterCrop(65)
    with pytest.raises(BatchMemoryError, match="65x65"):
        next(iter(loader))
    with pytest.raises(BatchMemoryError, match="65x65"):
        loader.check_memory(CenterCrop(65))


def test_no_batch_is_larger_than_counted(beton, monkeypatch):
    """Every slot that an epoch allocates, while its consumer holds one batch and asks for one."""
    allocated = []
    empty = np.empty

    def counted(shape, *args, **options):
        if shape == bytes_held(4, [32], 1, False):
            allocated.append(shape)
        return empty(shape, *args, **options)

    monkeypatch.setattr("matryoshka.data.slots.np.empty", counted)
    for batch in Loader(beton, 4, crop=CenterCrop(32), num_workers=1):
        assert batch.images.dtype == torch.uint8
    assert 0 < len(allocated) <= 4


def test_a_resident_set_that_does_not_fit_is_refused(beton, free):
    whole = 3 * 40 * SIDE**2
    crop = CenterCrop(SIDE + 1, 0.9)
    batch = bytes_held(2, [SIDE + 1], 2, True)
    assert batch < whole
    free(2 * whole)
    assert len(ResidentLoader(beton, 2, crop=crop)) == 20
    free(2 * whole - 1)
    with pytest.raises(NotResidentError, match=r"noise\.beton: its 40 images of 20x20 need"):
        ResidentLoader(beton, 2, crop=crop)
    free(2 * whole)
    with pytest.raises(BatchMemoryError, match="for 2 batches of 2 images of 500x500"):
        ResidentLoader(beton, 2, crop=CenterCrop(500))
