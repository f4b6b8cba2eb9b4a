"""Safetensors files whose header says something else: ours, older ones, sealed anew, and foreign.

A file under our checksums is refused. Of the others, a header may describe another legal file; it
is never a traceback, a hang or much memory.
"""

from __future__ import annotations

import contextlib
import json
import random
import resource
import signal

import pytest
import torch
from attacks.scale import scaled
from safetensors.torch import save

from matryoshka import tensor_files
from matryoshka.checkpoint import load_model
from matryoshka.checkpoint.adapter_file import load_adapter, save_adapter
from matryoshka.checkpoint.contents import CheckpointError
from matryoshka.checkpoint.transfer import check_start
from matryoshka.models import ModelConfig, ModelError, model_spec
from matryoshka.models.adapter import AdapterError, AdapterSpec, random_adapter
from matryoshka.models.vqvae import EncoderSizes, VqVae, read_encoder, save_vqvae
from matryoshka.training import snapshot
from matryoshka.training.snapshot import Snapshots

SECONDS = 20  # for one file: a hang
MEMORY = 2 << 30  # bytes beyond what the process has
HOSTILE = [
    *(None, True, -1, 0, 1, 1 << 31, 1 << 63, 1 << 64, 10**30, -(10**30), 0.5, 1e308),
    *("", "x", "\0", "\ud800", "9" * 5000, "../../etc/passwd", "F32", "F8_E4M3", "BOOL"),
    *([], {}, [0], [-1], [0, 0], [1 << 40, 1 << 40], [[1]], [None], [1e9], {"a": {}}, [0] * 1000),
    *(float("nan"), float("inf"), [10**12, 10**12], ["a"], "model.", "ä", "\n"),
]
DEEP = ["@2@", "@900@", "@100000@"]  # lists in lists, which json cannot write


def adapter(path):
    save_adapter(path, random_adapter(AdapterSpec(width=6, dims=(2, 6), method="pca"), 0), {})


def vqvae(path):
    sizes = EncoderSizes(patch=2, hiddens=4, residual_hiddens=2, residual_layers=1, code_dim=2)
    save_vqvae(VqVae(sizes, 4), path, (0.5,) * 3, (0.5,) * 3)


def training(path):
    loader = {"epoch": 1, "batch": 3, "dataset": "0badcafe"}
    numbers = {"step": 1, "epoch": 1, "best": 1.5, "rollbacks": 0, "calm_until": 0}
    progress = {**numbers, "loader": loader, "scaler": {}, "optimizer": {}}
    snapshots = Snapshots(path.parent, {"config": {}, "global_batch": 4}, keep_last=1)
    snapshots.save(1, {"model.a": torch.ones(3, 4), "rng": torch.arange(9)}, progress)
    snapshots.wait()
    (path.parent / "step_1.safetensors").rename(path)


def start(path):
    """`--model.init` of a net like the small model."""
    options = ("dim=16", "depth=1", "heads=2", "patch=4", "image_size=8")
    config = ModelConfig(arch="vit", arch_options=options, mrl=True, dims=(4, 16), init=str(path))
    check_start(config, model_spec(config, 2))


READERS = {
    "model": (load_model, CheckpointError),
    "model.init": (start, (CheckpointError, ModelError)),
    "adapter": (load_adapter, AdapterError),
    "vqvae": (read_encoder, ModelError),
    "training": (snapshot.read, CheckpointError),
}
WRITERS = {"adapter": adapter, "vqvae": vqvae, "training": training}


@pytest.fixture
def bounded():
    """A hang and a header that makes us take much memory are errors."""

    def stop(*_):
        raise TimeoutError

    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, limits[1]))
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    resource.setrlimit(resource.RLIMIT_AS, limits)


def places(tree, path=()):
    """The paths of all values in a tree of dicts and lists."""
    yield path
    items = ()
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, list):
        items = enumerate(tree)
    for key, value in items:
        yield from places(value, (*path, key))


def changed(tree, rng):
    """One value is another one, moved, doubled or gone; or it has another name."""
    tree = json.loads(json.dumps(tree))
    path = rng.choice([path for path in places(tree) if path])
    owner = tree
    for key in path[:-1]:
        owner = owner[key]
    kind = rng.randrange(6)
    if kind <= 2:
        owner[path[-1]] = rng.choice(HOSTILE)
    elif kind == 3:
        value = owner.pop(path[-1])
        if isinstance(owner, dict):
            owner[rng.choice(["x", "", "__metadata__", "\0", path[-1] + " "])] = value
    elif kind == 4:
        owner[path[-1]] = rng.choice(DEEP)
    else:
        del owner[path[-1]]
    return tree


def dumped(tree) -> str:
    text = json.dumps(tree)
    for name in DEEP:
        depth = int(name.strip("@"))
        text = text.replace(f'"{name}"', "[" * depth + "]" * depth)
    return text


def assembled(header: str, data: bytes, rng) -> bytes:
    text = header.encode("utf-8", "surrogatepass")
    if rng.random() < 0.2:  # characters: names, digits, brackets
        at = rng.randrange(len(text))
        text = (
            text[:at] + rng.choice([b"", b"\xff", b"{", b'"', b"9", b",", b"\0"]) + text[at + 1 :]
        )
    length = len(text)
    if rng.random() < 0.1:
        length = rng.choice([0, 1, length - 1, length + 1, 1 << 26, 1 << 40, (1 << 64) - 1])
    return length.to_bytes(8, "little") + text + data


def mutated(content: bytes, rng) -> tuple[bytes, str]:
    """A file with another header, and which checksums it has."""
    size = 8 + int.from_bytes(content[:8], "little")
    tree = json.loads(content[8:size])
    data = content[size:]
    own = tree.get("__metadata__", {})
    about = json.loads(own.get(tensor_files.KEY, "{}"))
    kind = rng.choice(["sealed", "resealed", "old", "plain"])
    entries = {name: entry for name, entry in tree.items() if name != "__metadata__"}
    if about and rng.random() < 0.5:
        about = changed(about, rng)
    else:
        entries = changed(entries, rng)
    if kind == "plain":
        own = {}
    elif kind == "old":
        own = {tensor_files.KEY: dumped(about)}
    elif kind == "sealed":
        own = own | {tensor_files.KEY: dumped(about)}
    else:
        with contextlib.suppress(RecursionError, ValueError, tensor_files.TensorFileError):
            return tensor_files.encode_header(dumped(about), entries, data) + data, kind
    return assembled(dumped({**entries, "__metadata__": own}), data, rng), kind


def refusal(read, errors, path) -> str | None:
    """What a reader says of a file; None if it takes it."""
    signal.alarm(SECONDS)
    try:
        read(path)
    except errors as error:
        return str(error)
    finally:
        signal.alarm(0)
    return None


@pytest.mark.parametrize("kind", READERS)
def test_a_header_that_says_something_else(kind, inputs, tmp_path, bounded):
    read, errors = READERS[kind]
    path = tmp_path / "file.safetensors"
    if kind in WRITERS:
        WRITERS[kind](path)
    else:
        path.write_bytes((inputs / "model.safetensors").read_bytes())
    read(path)
    content = path.read_bytes()
    path.unlink()
    rng = random.Random(kind)
    refused = 0
    for number in range(scaled(200, 20_000)):
        damaged, sealed = mutated(content, rng)
        path.write_bytes(damaged)
        line = refusal(read, errors, path)
        if line is None:
            assert sealed != "sealed" or damaged == content, number
            continue
        refused += 1
        assert len(line.splitlines()) == 1, (number, line)
        assert str(path) in line, (number, line)
    assert refused


def test_a_foreign_file(tmp_path, bounded):
    """Of another program: no metadata, or those of its own."""
    path = tmp_path / "foreign.safetensors"
    tensors = {"a.weight": torch.ones(4, 3), "a.bias": torch.ones(4)}
    contents = [
        save(tensors),
        save(tensors, {"format": "pt"}),
        save({}),
        save(tensors, {"x": "{}"}),
    ]
    rng = random.Random(0)
    for number in range(scaled(200, 20_000)):
        content = rng.choice(contents)
        if number >= len(contents):
            size = 8 + int.from_bytes(content[:8], "little")
            tree = json.loads(content[8:size]) or {"a": []}
            content = assembled(dumped(changed(tree, rng)), content[size:], rng)
        path.write_bytes(content)
        for read, errors in READERS.values():
            line = refusal(read, errors, path)
            assert line is not None, number
            assert len(line.splitlines()) == 1, (number, line)
