"""Embeddings of a data set: against single images through the model, killed at any moment, by
several processes.
"""

import hashlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from matryoshka.inference import embed
from oracles import one_by_one
from PIL import Image

from matryoshka.checkpoint.model_file import load_model, save_model
from matryoshka.checkpoint.upstream import save_upstream
from matryoshka.data import CenterCrop, Loader, open_dataset, write_beton
from matryoshka.data.augment import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from matryoshka.embeddings.reading import ARRAYS, open_embeddings, trunk_sha256
from matryoshka.embeddings.writing import merged, missing
from matryoshka.evaluation import embedding
from matryoshka.models import ModelError, ModelSpec, build


def run(model, data, output, *more):
    argv = [
        f"--path={model}",
        f"--data={data}",
        f"--output={output}",
        "--device=cpu",
        "--workers=1",
        "--batch-size=4",
    ]
    assert embed.main([*argv, *more]) == 0
    return open_embeddings(output)


def hashes(folder):
    """{file: sha256} of all that is there; of meta.json without the code's version, which others
    may change.
    """
    found = {}
    for file in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
        content = file.read_bytes()
        if file.name == "meta.json":
            content = json.dumps(
                {k: v for k, v in json.loads(content).items() if k != "code"}
            ).encode()
        found[str(file.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return found


def refused(argv, capsys, main=embed.main):
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(argv)
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2
    assert len(lines) == 1, lines
    return lines[0]


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("columns", "normalise", "dtype"),
    [(None, False, "float32"), (64, True, "float32"), (7, True, "float16")],
)
def test_embeddings_are_those_of_single_images(
    imagenet_root, imagenet_checkpoint, tmp_path, *, columns, normalise, dtype
):
    model = load_model(imagenet_checkpoint)
    folder = imagenet_root / "val"
    options = [f"--dtype={dtype}", *(["--normalize"] if normalise else [])]
    options += [f"--truncate-dim={columns}"] if columns else []
    found = run(imagenet_checkpoint, folder, tmp_path / "e", *options)
    rows, labels, names = one_by_one(model, folder)
    expected = rows[:, : columns or 512].astype(np.float64)
    if normalise:
        expected /= np.sqrt((expected**2).sum(1, keepdims=True))
    assert (found.X.dtype, found.y.dtype, found.X.shape) == (
        np.dtype(dtype),
        np.int64,
        expected.shape,
    )
    np.testing.assert_allclose(found.X, expected, atol=1e-3 if dtype == "float16" else 1e-4)
    np.testing.assert_array_equal(found.y, labels)
    assert list(found.ids) == found.ids[:] == names
    assert (found.ids[-1], found.ids[1:8:3]) == (names[-1], names[1:8:3])
    assert found.classes == sorted(p.name for p in folder.iterdir())
    assert found.meta["normalised"] is normalise
    assert found.meta["model"] == {
        "file": str(imagenet_checkpoint),
        "weights_sha256": trunk_sha256(model),
        "arch": "resnet10",
        "head": "mrl",
        "dims": [8, 64, 512],
        "width": 512,
    }
    assert np.array_equal(np.load(tmp_path / "e" / "X.npy", allow_pickle=False), found.X)
    with pytest.raises(ValueError, match="read-only"):
        found.X[0, 0] = 1


def test_a_beton_gives_the_same_with_its_names_or_numbers(
    imagenet_root, imagenet_checkpoint, tmp_path
):
    source = open_dataset(imagenet_root / "val")
    there = run(imagenet_checkpoint, source.path, tmp_path / "folder")
    for names in (True, False):
        beton = tmp_path / f"{names}.beton"
        write_beton(source, beton, write_mode="raw", max_resolution=32, names=names)
        here = run(imagenet_checkpoint, beton, tmp_path / f"{names}")
        assert np.array_equal(here.X, there.X)
        assert list(here.ids) == (list(there.ids) if names else [str(i) for i in range(9)])


def test_the_data_set_is_described(imagenet_root, imagenet_checkpoint, tmp_path, capsys):
    """The class names reveal a folder given at the wrong level."""
    for i, name in enumerate(("run 1", "run\x1b2", "a", "b", "c", "d")):
        (tmp_path / "stray" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "stray" / name / "plot.png")
        if i in (1, 5):
            run(imagenet_checkpoint, tmp_path / "stray", tmp_path / f"e{i}")
    write_beton(
        open_dataset(tmp_path / "stray"), tmp_path / "x.beton", write_mode="raw", max_resolution=32
    )
    (tmp_path / "x.beton.json").unlink()
    run(imagenet_checkpoint, tmp_path / "x.beton", tmp_path / "beton")
    out = capsys.readouterr().out
    assert f"{tmp_path / 'stray'}: 2 images of 2 classes (run\\x1b2, run 1) at 32 px\n" in out
    assert (
        f"{tmp_path / 'stray'}: 6 images of 6 classes (a, b, c, d, run\\x1b2, ...) at 32 px\n"
        in out
    )
    assert f"{tmp_path / 'x.beton'}: 6 images of 6 classes at 32 px\n" in out


def test_preprocessing_option(folder, tmp_path):
    torch.manual_seed(2)
    model = build(ModelSpec("resnet10", 3, (8, 512))).eval()
    model.preprocessing = Preprocessing(size=48, ratio=1.0)
    save_model(model, tmp_path / "m.safetensors")
    found = run(
        tmp_path / "m.safetensors",
        folder / "val",
        tmp_path / "upstream",
        "--preprocessing=upstream",
    )
    resize = torchvision.transforms.Compose(
        [torchvision.transforms.Resize(256), torchvision.transforms.CenterCrop(224)]
    )
    for name, row in zip(found.ids, found.X, strict=True):
        pixels = (
            np.asarray(resize(Image.open(folder / "val" / name))) / 255 - IMAGENET_MEAN
        ) / IMAGENET_STD
        with torch.inference_mode():
            alone = model.trunk(torch.tensor(pixels.transpose(2, 0, 1)[None], dtype=torch.float32))[
                0
            ]
        np.testing.assert_allclose(row, alone, atol=1e-3)
    ffcv = run(
        tmp_path / "m.safetensors", folder / "val", tmp_path / "ffcv", "--preprocessing=ffcv"
    )
    larger = run(tmp_path / "m.safetensors", folder / "val", tmp_path / "larger", "--resolution=64")
    for shown, crop in ((ffcv, CenterCrop(48, 224 / 256)), (larger, CenterCrop(64, 1.0))):
        batch = next(iter(Loader(folder / "val", 9, order="sequential", crop=crop, num_workers=1)))
        np.testing.assert_allclose(shown.X, model.encode(batch.images), atol=1e-4)


def test_upstreams_and_published_checkpoints(imagenet_root, tmp_path, monkeypatch, capsys):
    torch.manual_seed(4)
    model = build(ModelSpec("resnet10", 10, (16,))).eval()
    save_upstream(model, tmp_path / "final_weights.pt")
    found = run(
        tmp_path / "final_weights.pt", imagenet_root / "val", tmp_path / "ff", "--rep_size=16"
    )
    assert (
        "--truncate-dim 16" in capsys.readouterr().out
    )  # the rest of the trunk's columns was never trained
    assert found.X.shape == (9, 512), "9 images of 512 columns"
    assert found.meta["model"]["weights_sha256"] == trunk_sha256(model)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    published = torchvision.models.resnet18()
    url = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(published.state_dict(), tmp_path / "hub" / "checkpoints" / url.rsplit("/", 1)[1])
    found = run("torchvision:resnet18", imagenet_root / "val", tmp_path / "rn18")
    assert (found.X.shape, found.meta["preprocessing"]["size"]) == ((9, 512), 224), "shape, pixels"


def test_encode_takes_both_kinds_of_images_and_leaves_the_model_as_it_was():
    torch.manual_seed(0)
    model = build(ModelSpec("resnet10", 5, (8, 512)))
    model.train()
    model.trunk.get_submodule("layer1").eval()
    modes = [module.training for module in model.modules()]
    pixels = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8)
    floats = (pixels.double() / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    whole = model.encode(pixels)
    assert (whole.shape, whole.dtype, whole.requires_grad) == ((3, 512), torch.float32, False)
    torch.testing.assert_close(
        model.encode(floats.float().permute(0, 3, 1, 2)), whole, atol=1e-4, rtol=1e-4
    )
    part = model.encode(pixels, truncate_dim=64, normalize=True)
    torch.testing.assert_close(
        part, whole[:, :64] / whole[:, :64].square().sum(1, keepdim=True).sqrt()
    )
    assert [module.training for module in model.modules()] == modes
    torch.nn.Linear(64, 2)(part).sum().backward()  # a probe can be trained on them
    for wrong in (0, 513, -1):
        with pytest.raises(ModelError, match=f"truncate_dim={wrong}.*512"):
            model.encode(pixels, truncate_dim=wrong)
    for images in (pixels[0], pixels.long(), pixels.permute(0, 3, 1, 2), floats.float()):
        with pytest.raises(ModelError, match="images are"):
            model.encode(images)
    model.trunk.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.encode(pixels)
    assert [module.training for module in model.modules()] == modes


# ---------------------------------------------------------------- parts


@settings(max_examples=80)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 5), st.sets(st.integers(0, 59)))
def test_every_missing_row_is_in_one_batch_of_one_process(rows, batch, world, there):
    done = merged([(i, i + 1) for i in there if i < rows])
    missing_rows = missing(done, rows)
    assert {i for a, b in done for i in range(a, b)} == {i for i in there if i < rows}, (
        f"merged ranges {done}"
    )
    assert all(a < b for a, b in done), f"an empty range in {done}"
    assert all(b < c for (_, b), (c, _) in itertools.pairwise(done)), f"ranges touch: {done}"
    wanted = [i for i in range(rows) if i not in there]
    assert [i for a, b in missing_rows for i in range(a, b)] == wanted, (
        f"missing ranges {missing_rows}"
    )
    shares = [
        embedding.rows_of_rank(missing_rows, batch, rank, world).tolist() for rank in range(world)
    ]
    cut = [part[i : i + batch] for part in shares for i in range(0, len(part), batch)]
    assert cut == [
        wanted[i : i + batch] for i in range(0, len(wanted), batch)
    ]  # the batches of one process
    assert max(map(len, shares)) - min(map(len, shares)) < 2 * batch, "unequal shares of ranks"


# ---------------------------------------------------------------- starts and stops

KILLED = """
import json, os, signal, socket, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from matryoshka.evaluation import embedding
from matryoshka.inference import embed

model, data, out = sys.argv[1:4]
argv = [f"--path={model}", f"--data={data}", "--batch-size=2", "--workers=1", "--device=cpu"]
argv.append("--overwrite")
embedding.FLUSH_SECONDS = 0.0
loaded = embed.load(embed.parser().parse_args([*argv, "--output=x"]))
embed.load, embedding.git_state = lambda args: loaded, dict  # faster
events = 0

def counted(function, last):
    def call(*args, **kwargs):
        global events
        events += 1
        if events == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

def start(folder, last, world=1):
    '''Start in child processes, killed before their event number `last`; the first's status.'''
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    children = []
    for rank in range(world):
        children.append(os.fork())
        if not children[-1]:
            if world > 1:
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            for name in ("pwrite", "fsync", "replace", "write", "unlink", "mkdir", "rmdir"):
                setattr(os, name, counted(getattr(os, name), last))
            code = 1
            try:
                code = embed.main([*argv, f"--output={folder}"])
                Path(out, "events").write_text(str(events))
            finally:
                sys.stdout.flush()
                os._exit(code)
    return [os.waitpid(child, 0)[1] for child in children][0]

assert start(Path(out, "whole"), 0) == 0
total = int(Path(out, "events").read_text())
kills = 0
for point in sorted({1, total, *range(2, total, max(1, total // 7))}):
    folder = Path(out, f"once-{point}")
    # a run with a flush less does not reach the last points
    kills += start(folder, point) == signal.SIGKILL
    assert start(folder, 0) == 0, point
folder, starts = Path(out, "often"), 0
while start(folder, 24) == signal.SIGKILL:  # resumes: every start gets a little further
    starts += 1
    assert starts < 40
assert start(Path(out, "two"), 0, world=2) == 0
folder = Path(out, "two-then-one")
assert start(folder, total // 2, world=2) != 0
assert list(folder.glob(".unfinished/progress-1.json"))  # the second process, too, has rows there
assert start(folder, 0) == 0
print(json.dumps([total, kills, starts]))
"""


@pytest.mark.slow
def test_killed_at_any_moment_and_in_two_processes_it_ends_with_the_same_files(
    imagenet_root, imagenet_checkpoint, tmp_path
):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    out = tmp_path / "out"
    out.mkdir()
    command = [sys.executable, script, imagenet_checkpoint, imagenet_root / "val", out]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)), env=env, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    events, kills, starts = json.loads(done.stdout.splitlines()[-1])
    assert events > 24, "vacuous: the last folder needs several starts"
    assert kills > 5, "too few kills to prove anything"
    assert starts >= 1, "no run was killed twice"
    whole = hashes(out / "whole")
    assert sorted(whole) == sorted([*ARRAYS, "meta.json"])
    for folder in [p for p in out.iterdir() if p.is_dir()]:
        assert hashes(folder) == whole, folder
    assert np.array_equal(
        open_embeddings(out / "whole").X,
        run(imagenet_checkpoint, imagenet_root / "val", tmp_path / "e", "--batch-size=2").X,
    )


def test_a_finished_folder_is_reported_and_other_options_are_refused(
    imagenet_root, imagenet_checkpoint, tmp_path, capsys
):
    data, output = imagenet_root / "val", tmp_path / "e"
    run(imagenet_checkpoint, data, output)
    before = {p: p.stat().st_mtime_ns for p in output.iterdir()}
    run(imagenet_checkpoint, data, output, "--batch-size=2", "--workers=2")
    assert "already finished" in capsys.readouterr().out
    other = load_model(imagenet_checkpoint)
    with torch.no_grad():
        next(other.trunk.parameters()).mul_(1.01)
    save_model(other, tmp_path / "other.safetensors")
    argv = [f"--output={output}", "--device=cpu", "--workers=1"]
    path, here = f"--path={imagenet_checkpoint}", f"--data={data}"
    for more, words in (
        ([path, here, "--dtype=float16"], ["dtype float32", "not float16", "--overwrite"]),
        (
            [path, here, "--truncate-dim=64", "--normalize"],
            ["columns 512", "not 64", "1 more difference"],
        ),
        ([f"--path={tmp_path / 'other.safetensors'}", here], ["model.weights_sha256"]),
        ([path, f"--data={imagenet_root / 'sketch'}"], ["data.fingerprint"]),
        ([path, here, "--precision=bf16"], ["precision fp32"]),
    ):
        line = refused([*argv, *more], capsys)
        assert all(word in line for word in [str(output), *words]), line
    assert {p: p.stat().st_mtime_ns for p in output.iterdir()} == before
    half = run(imagenet_checkpoint, data, output, "--dtype=float16", "--overwrite")
    assert half.X.dtype == np.float16


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--path=nothing.pt"], ["nothing.pt", "no such"]),
        (["--data=nothing"], ["nothing", "no such"]),
        (["--truncate-dim=513"], ["--truncate-dim 513", "512"]),
        (["--truncate-dim=0"], ["--truncate-dim 0"]),
        (["--batch-size=0"], ["--batch-size"]),
        (["--resolution=64", "--preprocessing=upstream"], ["--resolution 64", "upstream"]),
        (["--mrl", "--efficient"], ["efficient was requested", "head is mrl"]),
        (["--output=file"], ["file", "--output"]),
        (["--output=foreign"], ["X.npy", "meta.json", "--overwrite"]),
        (["--path=nan.safetensors"], ["0.png", "not finite", "broken"]),
        (["--path=big.safetensors", "--dtype=float16"], ["float16", "--dtype float32"]),
        (["--device=cpu", "--precision=fp16"], ["fp16"]),
    ],
)
def test_mistakes_are_one_line(
    imagenet_root, imagenet_checkpoint, tmp_path, *, monkeypatch, capsys, more, words
):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("foreign").mkdir()
    Path("foreign/X.npy").write_text("mine")
    for name, factor in (("nan", np.nan), ("big", 1e6)):
        if f"--path={name}.safetensors" in more:
            model = load_model(imagenet_checkpoint)
            with torch.no_grad():
                model.trunk.get_submodule("layer4.0.bn2").weight.mul_(factor)
            save_model(model, f"{name}.safetensors")
    argv = [
        f"--path={imagenet_checkpoint}",
        f"--data={imagenet_root / 'val'}",
        "--output=e",
        "--device=cpu",
    ]
    line = refused([*argv, "--workers=1", *more], capsys)
    assert all(word in line for word in words), line
    assert not Path("e/meta.json").exists()
    assert Path("foreign/X.npy").read_text() == "mine"
