"""Damage in checkpoints, model files and JSON files: refused, in one line, and never used."""

import json
import os
import random
import signal
import zlib

import pytest
import torch
from attacks.scale import scaled
from matryoshka.train import train_imagenet
from safetensors.torch import load_file, save
from training_commands import options

from matryoshka import cli, json_files, tensor_files
from matryoshka.checkpoint import model_file
from matryoshka.checkpoint.adapter_file import load_adapter, save_adapter
from matryoshka.checkpoint.contents import CheckpointError
from matryoshka.models import ModelError, ModelSpec, build
from matryoshka.models.adapter import AdapterError, AdapterSpec, random_adapter
from matryoshka.models.vqvae import EncoderSizes, VqVae, read_encoder, save_vqvae
from matryoshka.training import snapshot
from matryoshka.training.guard import NonFiniteGuard
from matryoshka.training.snapshot import Snapshots

METADATA = {"config": {"lr.lr": 0.5, "data.classes": ["ant", "bee"]}, "global_batch": 16}
PROGRESS = {
    "step": 7,
    "epoch": 1,
    "best": 12.5,
    "rollbacks": 0,
    "calm_until": 0,
    "loader": {"epoch": 1, "batch": 3, "dataset": "0badcafe"},
    "scaler": {},
    "optimizer": {"numbers": {}, "param_groups": [{"lr": 0.25, "params": [0, 1]}]},
}


def tensors(seed=0):
    drawn = torch.Generator().manual_seed(seed)
    return {
        "model.a": torch.randn(3, 4, generator=drawn),
        "model.b": torch.arange(5),
        "rng": torch.arange(9, dtype=torch.uint8),
        "totals": torch.ones(1, 2, dtype=torch.float64),
        "empty": torch.zeros(0, 2),
    }


def write_steps(folder, steps):
    snapshots = Snapshots(folder, METADATA, keep_last=9)
    for step in steps:
        snapshots.save(step, tensors(step), PROGRESS | {"step": step})
    snapshots.wait()
    assert snapshots.problems() == []


def training(path):
    write_steps(path.parent, [7])
    (path.parent / "step_7.safetensors").rename(path)


def model(path):
    torch.manual_seed(0)
    # A whole net has millions of weights: this one is a file of its head alone.
    small = build(ModelSpec("resnet10", 2, (4, 8)))
    metadata = {"format": model_file.FORMAT, **model_file.describe(small), "config": {"lr.lr": 1}}
    head = {"head.heads.0.weight": torch.randn(2, 4), "head.heads.1.weight": torch.randn(2, 8)}
    path.write_bytes(b"".join(tensor_files.encode(head, metadata)))


def adapter(path):
    spec = AdapterSpec(width=6, dims=(2, 6), method="pca")
    save_adapter(path, random_adapter(spec, 0), {"rows": 12})


def vqvae(path):
    sizes = EncoderSizes(patch=2, hiddens=4, residual_hiddens=2, residual_layers=1, code_dim=2)
    save_vqvae(VqVae(sizes, 4), path, (0.5,) * 3, (0.5,) * 3)


# kind -> (writer, reader, its error)
FILES = {
    "training": (training, snapshot.read, CheckpointError),
    "training as a model": (training, model_file.read, CheckpointError),
    "model": (model, model_file.read, CheckpointError),
    "adapter": (adapter, load_adapter, AdapterError),
    "vqvae": (vqvae, read_encoder, ModelError),
}


def flipped(content, rng, header):
    """One bit: in the header in two of three cases, else anywhere."""
    damaged = bytearray(content)
    at = rng.randrange(header if rng.random() < 2 / 3 else len(content))
    damaged[at] ^= 1 << rng.randrange(8)
    return damaged


def noise(content, rng, header):
    """Random bytes over a part, or a part that is zeros, removed, doubled or moved."""
    at = rng.randrange(header if rng.random() < 2 / 3 else len(content))
    part = content[at : at + rng.choice((1, 2, 8, 64, 512))]
    kind = rng.randrange(6)
    changed = {
        0: rng.randbytes(len(part)),
        1: bytes(len(part)),
        2: b"",
        3: part + part,
        4: part[::-1],
        5: bytes(byte ^ 0x20 for byte in part),  # other letters, digits that are control characters
    }[kind]
    return content[:at] + changed + content[at + len(part) :]


def cut(content, rng, header):
    return content[: rng.randrange(len(content))]


def lengthened(content, rng, header):
    return content + rng.randbytes(rng.choice((1, 8, 100)))


def exchanged(content, rng, header):
    """Two names, or two of anything else, in the header."""
    text = content[8:header]
    words = [word for word in text.split(b'"') if len(word) > 2]
    one, two = rng.sample(words, 2)
    swapped = text.replace(one, b"\0").replace(two, one).replace(b"\0", two)
    return len(swapped).to_bytes(8, "little") + swapped + content[header:]


def mutated(content, rng):
    header = 8 + int.from_bytes(content[:8], "little")
    how = rng.choice([flipped] * 6 + [noise] * 3 + [cut, lengthened, exchanged])
    return bytes(how(content, rng, header)), how.__name__


@pytest.mark.parametrize("kind", FILES)
def test_damage_is_refused(tmp_path, kind):
    write, read, error = FILES[kind]
    path = tmp_path / "file.safetensors"
    write(path)
    if kind == "training as a model":  # it has no model: the checksums come first all the same
        with pytest.raises(error):
            read(path)
    elif kind == "model":
        assert len(read(path).state) == 2
    else:
        read(path)
    assert load_file(path)  # the real library reads it
    content = path.read_bytes()
    rng = random.Random(17)
    for number in range(scaled(150, 100_000)):
        damaged, how = mutated(content, rng)
        if damaged == content:
            continue
        path.write_bytes(damaged)
        with pytest.raises(error) as refusal:
            read(path)
        line = str(refusal.value)
        assert str(path) in line, (number, how)
        assert "\n" not in line, (number, how)


def test_every_bit_of_a_header(tmp_path):
    path = tmp_path / "file.safetensors"
    training(path)
    content = path.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    for bit in range(0, 8 * size, scaled(29, 1)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            snapshot.read(path)


def test_the_newest_whole_one_is_used_and_the_others_are_named(tmp_path):
    write_steps(tmp_path, range(1, 5))
    rng = random.Random(5)
    for name in ("last", "step_4", "step_3"):
        path = tmp_path / f"{name}.safetensors"
        content = path.read_bytes()
        path.unlink()  # `last` is another name of step_4
        path.write_bytes(flipped(content, rng, 8 + int.from_bytes(content[:8], "little")))
    found, notes = snapshot.newest(tmp_path)
    assert found.metadata["step"] == 2
    assert torch.equal(found.tensors["model.a"], tensors(2)["model.a"])
    assert ["step_4" in notes[0], "step_3" in notes[1], len(notes)] == [True, True, 2]


# ---------------------------------------------------------------- files of older versions


def older(path):
    """A training checkpoint as versions without a checksum of the header wrote it."""
    stored = snapshot.read(path)
    content = save(stored.tensors)
    data = content[8 + int.from_bytes(content[:8], "little") :]
    own = {"matryoshka": json.dumps(stored.metadata), "crc32": f"{zlib.crc32(data):08x}"}
    path.unlink()
    path.write_bytes(save(stored.tensors, own))


def test_older_files_are_read_with_a_note(tmp_path):
    write_steps(tmp_path, [1, 2])
    for step in (1, 2):
        older(tmp_path / f"step_{step}.safetensors")
    found, notes = snapshot.newest(tmp_path)
    assert (found.metadata["step"], found.is_sealed) == (2, False)
    assert torch.equal(found.tensors["model.a"], tensors(2)["model.a"])
    assert len(notes) == 1
    assert "step_2.safetensors: written by an older version" in notes[0]

    path = tmp_path / "model.safetensors"
    model(path)
    assert model_file.read(path).notes == []
    stored = tensor_files.read(path)
    path.write_bytes(save(stored.tensors(), {"matryoshka": json.dumps(stored.metadata)}))
    assert model_file.read(path).notes == [tensor_files.OLD_NOTE]


def test_damage_in_the_header_of_older_files_ends_no_resume(tmp_path):
    """It may go unnoticed there, but nothing is worse than the file before it."""
    write_steps(tmp_path, [1, 2])
    path = tmp_path / "step_2.safetensors"
    (tmp_path / "last.safetensors").unlink()
    older(path)
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    rng = random.Random(3)
    rejected = 0
    for _ in range(scaled(150, 20_000)):
        path.write_bytes(flipped(content[:header], rng, header) + content[header:])
        found, notes = snapshot.newest(tmp_path)
        assert found is not None
        assert len(notes) == 1
        rejected += found.metadata["step"] == 1
    assert rejected


def test_an_older_file_that_does_not_fit_gives_way(digits, tmp_path, monkeypatch, capsys):
    """A run is stopped; a tensor of its newest checkpoint, of an older version, has another name.

    The run resumes from the checkpoint before it, and prints why.
    """
    small = ["--resolution.min_res=16", "--resolution.max_res=16", "--validation.resolution=16"]
    words = options(
        digits,
        tmp_path,
        "run",
        *small,
        "--training.epochs=1",
        "--training.checkpoint_every_steps=1",
        "--model.fixed_feature=8",
        "--data.num_workers=1",
        "--lr.lr_peak_epoch=0",
    )
    before_step, steps = NonFiniteGuard.before_step, []

    def at_step(self):
        steps.append(0)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return before_step(self)

    monkeypatch.setattr(NonFiniteGuard, "before_step", at_step)
    monkeypatch.setattr(train_imagenet, "draw_chart", lambda *_: None)
    assert train_imagenet.main(words) == 75
    folder = tmp_path / "run" / "checkpoints"
    (folder / "last.safetensors").unlink()
    newest = folder / "step_3.safetensors"
    older(newest)
    newest.write_bytes(
        newest.read_bytes().replace(b'"model.trunk.conv1.weight"', b'"model.trunk.conv9.weight"')
    )
    assert train_imagenet.main([*words, "--training.resume=auto"]) == 0
    out = capsys.readouterr().out
    assert "step_3.safetensors: does not fit this run" in out
    assert "resuming from step_2.safetensors" in out
    assert "resume   after step 2" in out


# ---------------------------------------------------------------- JSON


CONTENT = {
    "model.arch": "resnet18",
    "model.dims": [8, 64],
    "lr.lr": 0.1,
    "training.resume": None,
    "classes": {"0": "ant", "10": "bee", "9": "ä \udcff"},
    "data.flip": True,
}


def test_every_bit_of_a_json_file():
    """Refused, or of the same content: a space may become another kind of space."""
    text = json_files.encode(CONTENT)
    assert json_files.decode(text) == (CONTENT, True)
    accepted = 0
    refusals = set()
    for bit in range(8 * len(text)):
        damaged = bytearray(text)
        damaged[bit // 8] ^= 1 << (bit % 8)
        try:
            content, sealed = json_files.decode(bytes(damaged))
        except json_files.JsonFileError as error:
            refusals.add(str(error))
            continue
        assert (content, sealed) == (CONTENT, True), damaged
        accepted += 1
    assert accepted < 100
    assert not any("\n" in line for line in refusals)


def test_a_json_file_without_a_checksum_is_read_as_it_is():
    for content in (CONTENT, {}, [], 7, None):
        text = json.dumps(content).encode()
        assert json_files.decode(text) == (content, False)


def test_a_json_file_may_be_sealed_twice():
    once = json_files.seal(CONTENT)
    assert json_files.seal(once) == once
    assert json_files.decode(json_files.encode({1: (2, 3)})) == ({"1": [2, 3]}, True)


@pytest.mark.parametrize("change", [{"model.arch": "resnet50"}, {"model.dims": [8]}])
def test_options_that_were_changed_are_refused(tmp_path, change, capsys):
    """params.json decides which model a state_dict is."""
    (tmp_path / "run").mkdir()
    sealed = json_files.seal(CONTENT)
    (tmp_path / "run" / "params.json").write_text(json.dumps(sealed | change))
    with pytest.raises(SystemExit) as end:
        cli.main(["runs", str(tmp_path)])
    assert end.value.code == 2
    assert (
        "params.json: damaged: its checksum does not match its contents" in capsys.readouterr().err
    )
    torch.save({"module.fc.weight": torch.zeros(2, 8)}, tmp_path / "run" / "final_weights.pt")
    with pytest.raises(CheckpointError, match=r'params.json: its checksum .* entry "checksum"'):
        model_file.read(tmp_path / "run" / "final_weights.pt")
