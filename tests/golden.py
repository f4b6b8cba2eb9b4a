"""Numbers that a refactoring must not change: hashes of pixels, files, weights and hits.

    python tests/golden.py record before.json      # writes them
    python tests/golden.py compare before.json     # recomputes; status 1 and every difference
    python tests/golden.py record --committed      # writes tests/golden.json for test_golden.py

`--only portable` or `--only machine` does one half. A file has three sections of names and values:

portable    does not depend on the CPU: decoded pixels, files without lossy encoding, orders
machine     equal on one machine: training, searches, JPEGs encoded here (by any libjpeg-turbo)
floats      numbers that come with `machine` and are near each other on other CPUs
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy, faiss and torch are loaded

import argparse
import contextlib
import hashlib
import io
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sklearn.datasets
import torch
from matryoshka.inference import analyze
from matryoshka.train import train_imagenet
from PIL import Image
from safetensors.torch import load_file

from matryoshka import data
from matryoshka.data import CenterCrop, Loader, PadCrop, RandomResizedCrop, ResidentLoader
from matryoshka.data.order import ORDERS, epoch_order
from matryoshka.retrieval import Searcher, SearchParams, Stage
from matryoshka.retrieval.hits import empty_bits, set_bits
from matryoshka.retrieval.store_writer import IndexRows, Writer

COMMITTED = Path(__file__).with_name("golden.json")
SECTIONS, KEPT = ("portable", "machine", "floats"), ("portable", "floats")  # by --committed
IMAGES = Path(sklearn.datasets.__file__).with_name("images")
PHOTOS = [(IMAGES / name).read_bytes() for name in ("china.jpg", "flower.jpg")]
VARYING = {"time", "seconds", "path", "version", "scores", "gt", "crc32", "parts", "deleted"}
Values = dict[str, Any]


def sha(*parts: Any) -> str:
    """Over bytes, arrays and tensors."""
    every = (p if isinstance(p, bytes) else np.ascontiguousarray(p).tobytes() for p in parts)
    return hashlib.sha256(b"".join(every)).hexdigest()


def sha_json(content: Any) -> str:
    """Without the keys that tell of times, places, versions and names drawn at random."""
    if isinstance(content, dict):
        content = {key: value for key, value in content.items() if key not in VARYING}
    return sha(json.dumps(content, sort_keys=True).encode())


def sha_tensors(tensors: Mapping[str, torch.Tensor]) -> str:
    """Over names, types, shapes and values, in the order of the names."""
    arrays = [(name, tensors[name].detach().numpy()) for name in sorted(tensors)]
    return sha(*(p for n, a in arrays for p in (f"{n} {a.dtype} {a.shape}".encode(), a)))


def named(prefix: str, values: Values) -> Values:
    return {f"{prefix}/{name}": value for name, value in values.items()}


def crops(count: int, height: int, width: int) -> list[bytes]:
    """Parts of the photos, a little different in size, as PNG: no encoder of JPEG has a say."""
    both = [Image.open(io.BytesIO(photo)).convert("RGB") for photo in PHOTOS]
    for i, file in enumerate(files := [io.BytesIO() for _ in range(count)]):
        w, h = width - 3 * (i % 5), height - 2 * (i % 7)
        left, top = 37 * i % (640 - w), 23 * i % (427 - h)
        both[i % 2].crop((left, top, left + w, top + h)).save(file, "PNG", compress_level=1)
    return [file.getvalue() for file in files]


def image_folder(root: Path, images: list[bytes]) -> data.ImageFolder:
    """The images in six classes by turns."""
    for i, image in enumerate(images):
        path = root / "abcdef"[i % 6] / f"{i:03d}.{'jpg' if image in PHOTOS else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    return data.ImageFolder(root)


Cases = dict[str, tuple[Any, int, str, dict[str, Any]]]  # source, max_resolution, write_mode, more


def beton_cases(folder: Path) -> tuple[Cases, Cases]:
    """.beton files of which no JPEG was encoded here, and others."""
    jpeg = image_folder(folder / "jpeg", PHOTOS * 7)
    large = image_folder(folder / "large", crops(48, 420, 470))
    mixed = image_folder(folder / "mixed", [*PHOTOS * 3, *crops(12, 150, 200)])
    digits = (data.Digits("train"), 32, "raw", {"subset": 150})
    portable: Cases = {
        "raw": (large, 640, "raw", {}),
        "raw-resized": (mixed, 150, "raw", {}),
        "digits": digits,
        "always": (jpeg, 640, "raw", {"transcode": "always"}),
        "fit": (jpeg, 640, "jpg", {"transcode": "fit", "names": True}),
        "fit-smart": (mixed, 640, "smart", {"smart_threshold": 200_000, "transcode": "fit"}),
    }
    machine: Cases = {
        "digits": digits,
        "jpg": (mixed, 640, "jpg", {"jpeg_quality": 90}),
        "jpg-resized": (mixed, 180, "jpg", {"subset": 9}),
        "proportion": (mixed, 640, "proportion", {"seed": 5}),
        "smart": (mixed, 640, "smart", {"smart_threshold": 80_000}),
        "fit-share": (mixed, 640, "proportion", {"seed": 1, "transcode": "fit"}),
    }
    return portable, machine


def written(cases: Cases, folder: Path) -> Values:
    """Hashes of <folder>/<name>.beton and side file, written by one thread and by two."""
    found: Values = {}
    for name, (source, size, mode, more) in cases.items():
        path, options = folder / f"{name}.beton", {"write_mode": mode, "chunk_size": 3, **more}
        for workers in (2, 1):
            data.write_beton(source, path, max_resolution=size, num_workers=workers, **options)
            side = json.loads(Path(f"{path}.json").read_bytes())
            for name_of_hash in ("xxh3_128", "checksum"):  # of the file that is hashed here itself
                del side[name_of_hash]
            found[f"beton/{name}/workers{workers}"] = sha(path.read_bytes())
            found[f"beton/{name}/workers{workers}/side"] = sha_json(side)
    return found


def pixels(folder: Path, cases: Sequence[tuple[Any, ...]]) -> Values:
    """Hashes of two epochs' batches: pixels, and labels with indices (the order)."""
    found: Values = {}
    for kind, file, image, order, world, *more in cases:
        options = dict(*more)
        shown = "".join(f"/{key}={value}" for key, value in options.items())
        case = f"{kind.__name__}/{file}/{type(image).__name__}{image.size}/{order}{shown}"
        path = folder / (file if file == "mixed" else f"{file}.beton")
        options = {"order": order, "crop": image, "world": world, "seed": 7, **options}
        for rank in range(world):
            loader = kind(path, 8, num_workers=2, rank=rank, **options)
            for epoch in range(2):
                batches, name = list(loader), f"{case}/world{world}/rank{rank}/epoch{epoch}"
                found[f"{name}/pixels"] = sha(*(batch.images for batch in batches))
                found[f"{name}/order"] = sha(*(a for b in batches for a in (b.labels, b.index)))
    return found


PAGED = {"in_memory": False, "window_pages": 2}
PORTABLE_PIXELS = (  # loader, file, crop, order, world, perhaps more options
    (Loader, "always", RandomResizedCrop(224), "random", 1),
    (Loader, "always", RandomResizedCrop(96), "random", 2),
    (Loader, "always", RandomResizedCrop(32, scale=(0.5, 1.0)), "sequential", 1),
    (Loader, "always", CenterCrop(128), "sequential", 2),
    (Loader, "fit-smart", RandomResizedCrop(64), "random", 1, {"in_memory": False}),
    (Loader, "raw", RandomResizedCrop(160), "random", 1),
    (Loader, "raw", RandomResizedCrop(64), "quasi_random", 1, {"window_pages": 2}),
    (Loader, "raw", RandomResizedCrop(64), "quasi_random", 2, PAGED),
    (Loader, "raw", CenterCrop(224, 1.0), "sequential", 1, {"drop_last": True}),
    (Loader, "digits", RandomResizedCrop(24), "random", 2),
    (Loader, "always", PadCrop(32), "random", 1),
    (Loader, "mixed", RandomResizedCrop(80), "random", 1),
    (Loader, "mixed", CenterCrop(64), "sequential", 2),
    (ResidentLoader, "digits", PadCrop(32), "random", 2),
)
MACHINE_PIXELS = (
    (Loader, "jpg", RandomResizedCrop(112), "random", 1),
    (Loader, "jpg", CenterCrop(96), "sequential", 1),
    (Loader, "proportion", RandomResizedCrop(48), "random", 2),
    (ResidentLoader, "digits", RandomResizedCrop(24), "random", 1),  # resized in float by torch
)


def orders() -> Values:
    found: Values = {}
    for n, kind, epoch in itertools.product((1, 10, 1000, 50_000), ORDERS, (0, 3)):
        order = epoch_order(
            n, kind, 11, epoch, pages=np.arange(n, dtype=np.int64) // 37, window_pages=5
        )
        found[f"order/{kind}/{n}/epoch{epoch}"] = sha(order.astype("<i8"))
    return found


RUNS = {
    "mrl-ema": "--model.mrl=1 --model.dims=8,64 --training.ema=0.9",
    "mrl-e": "--model.efficient=1 --model.dims=16,512 --data.mixup=0.2 "
    "--training.batch_size=10 --training.accumulate=2",
    "ff-adamw": "--model.fixed_feature=16 --training.optimizer=adamw --lr.lr=0.00003",
}
ALL_RUNS = (
    "--model.arch=resnet10 --training.epochs=2 --training.batch_size=20 --training.device=cpu "
    "--training.deterministic=1 --training.checkpoint_every_steps=2 --training.keep_last=3 "
    "--training.checkpoint_every_minutes=0 --resolution.min_res=32 --resolution.max_res=32 "
    "--validation.resolution=32 --data.num_workers=1 --data.resident=0 --lr.lr_peak_epoch=1 "
    "--lr.lr=0.00003"
)


def run_values(run: Path) -> Values:
    """Weights, checkpoints and log; accuracies as text, for they are exact."""
    final = torch.load(run / "final_weights.pt", weights_only=True)
    found: Values = {"final_weights": sha_tensors(final)}
    for path in [*run.glob("*.safetensors"), *run.glob("checkpoints/step_*")]:  # others are links
        found[path.relative_to(run).as_posix()] = sha_tensors(load_file(path))
    for line in map(json.loads, (run / "log").read_text().splitlines()):
        epoch = {key: repr(value) for key, value in line.items() if "top_" in key}
        found |= named(f"epoch{line['epoch']}", {**epoch, "loss": line["train_loss"]})
    weights = load_file(run / "model.safetensors")
    for group in {".".join(name.split(".")[:2]) for name in weights}:
        numbers = [v.double().flatten() for n, v in weights.items() if n.startswith(group)]
        found[f"weights/{group}"] = float(torch.cat(numbers).abs().mean())
    return found


def training(folder: Path) -> Values:
    """Runs of three steps an epoch, so slow that rounding in one CPU does not grow much."""
    found: Values = {}
    options = [f"--logging.folder={folder}", *ALL_RUNS.split()]
    for split, count in (("train", 60), ("val", 30)):
        photos = image_folder(folder / split, crops(count, 64, 60))
        data.write_beton(photos, folder / f"{split}.beton", max_resolution=64, write_mode="raw")
        options.append(f"--data.{split}_dataset={folder / split}.beton")
    for name, more in RUNS.items():
        status = train_imagenet.main([*options, f"--logging.run_id={name}", *more.split()])
        assert status == 0, f"training {name} ended with status {status}"
        found |= named(f"train/{name}", run_values(folder / name))
    return found


K, DIM, LISTS = 10, 32, 24
SETTINGS = {
    "exact": SearchParams("exact", 64, K),
    "exact-stages": SearchParams("exact", 16, 100, (Stage(64, K),)),
    "scan": SearchParams("scan", 16, 100, (Stage(32, 40), Stage(64, K))),
    "ivf": SearchParams("ivf", 32, 100, (Stage(64, K),), nprobe=96),
    "binary": SearchParams("binary", 64, 200, (Stage(64, K),)),
    "funnel": SearchParams.funnel("scan", [8, 16, 64], [200, K]),
}


def clustered_rows() -> tuple[np.ndarray, np.ndarray]:
    """(float16 [3000, 64], float32 queries [40, 64]): k-means finds the same centres anywhere."""
    rng = np.random.default_rng(42)
    centres = 3 * rng.standard_normal((LISTS, 64))
    rows = centres[rng.integers(0, LISTS, 3000)] + rng.standard_normal((3000, 64))
    queries = centres[rng.integers(0, LISTS, 40)] + rng.standard_normal((40, 64))
    return rows.astype(np.float16), queries.astype(np.float32)


def hits_values(hits: Any, truth: np.ndarray) -> Values:
    """Hashes, the mean score and the recall of the true neighbours."""
    pairs = zip(hits.ids.tolist(), truth.tolist(), strict=True)
    recall = float(np.mean([len(set(a) & set(b)) / len(b) for a, b in pairs]))
    score = float(hits.scores.astype(np.float64).mean())
    return {"ids": sha(hits.ids), "scores": sha(hits.scores), "score": score, "recall": recall}


def searches() -> Values:
    """Every setting, with all rows and without a third of them."""
    rows, queries = clustered_rows()
    searcher = Searcher(rows, num_threads=2, seed=3)
    found, gone = Values(), empty_bits(len(rows))
    set_bits(gone, np.arange(0, len(rows), 3))
    for what, deleted in (("all", None), ("some", gone)):
        truth = searcher.search(queries, SETTINGS["exact"], deleted=deleted).ids
        for name, setting in SETTINGS.items():
            hits = searcher.search(queries, setting, deleted=deleted)
            found |= named(f"search/{what}/{name}", hits_values(hits, truth))
    return found


def index_files(folder: Path) -> Values:
    """Hashes of an index's files; parts by their place, for their names are drawn at random."""
    about = json.loads((folder / "index.json").read_bytes())
    found: Values = {}
    for i, part in enumerate(about["parts"]):
        for path in sorted((folder / part).iterdir()):
            found[f"part{i}/{path.name}"] = sha(path.read_bytes())
    for path in folder.glob("deleted-*"):
        found["deleted"] = sha(path.read_bytes())
    return found | {"index.json": sha_json(about)}


def index_changes(folder: Path, lists: int) -> Iterator[tuple[str, Any]]:
    """(step, the index after it)."""
    rows, _ = clustered_rows()
    names, labels = [f"image {i}" for i in range(3000)], np.arange(3000) % 5 - 1
    made_by = {"weights_sha256": "ab" * 32, "file": "model.safetensors"}, {"size": 32}
    first = IndexRows(
        rows[:2500],
        names[:2500],
        labels[:2500],
        *made_by,
        classes=["ant", "bee"],
        data=[{"set": 1}],
    )
    second = IndexRows(
        rows[2400:],
        names[2400:],
        labels[2400:],
        *made_by,
        classes=["ant", "bee"],
        data=[{"set": 2}],
    )
    with Writer(folder, 2) as writer:
        yield "built", writer.build(first, DIM, lists=lists, seed=3)
        yield "added", writer.add(second, replace=True)
        yield "deleted", writer.delete(names[::7])
        yield "compact", writer.compact()


def k_means_cosine(part: Path) -> float:
    """The mean cosine of a part's rows with their nearest centroids."""
    rows = np.fromfile(part / "rows.f16", np.float16).reshape(-1, 64)[:, :DIM].astype(float)
    centres = np.fromfile(part / "centroids.f32", np.float32).reshape(-1, DIM).astype(float)
    cosines = rows @ centres.T / np.linalg.norm(rows, axis=1)[:, None]
    return float((cosines / np.linalg.norm(centres, axis=1)).max(1).mean())


def indexes(folder: Path) -> Values:
    """Files and hits after every change of two indexes, one of them with lists."""
    _, queries = clustered_rows()
    found: Values = {}
    for lists in (0, LISTS):
        for step, index in index_changes(folder / f"index{lists}", lists):
            exact = index.search(queries, SearchParams("exact", 64, K)).ids
            some = index.search(queries, k=K, only=np.arange(0, index.total, 2))
            values = named("default", hits_values(index.search(queries, k=K), exact))
            values |= named("filter", hits_values(some, exact)) | index_files(index.path)
            found |= named(f"index/lists{lists}/{step}", values)
    (part,) = (folder / f"index{LISTS}").glob("part-*")
    return found | {"index/k-means/cosine": k_means_cosine(part)}


def analysis(folder: Path) -> Values:
    """Hashes of what `analyze` says of drawn logits; its accuracies and temperatures."""
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 10, 400)
    logits = rng.standard_normal((4, 400, 10)).astype(np.float32)
    logits[:, np.arange(400), labels] += np.array([[1.0], [1.5], [2.0], [2.5]], np.float32)
    np.save(folder / "logits.npy", logits)
    np.save(folder / "gt.npy", labels)
    files = {"logits": "logits.npy", "gt": "gt.npy", "output": "analysis.json"}
    options = [f"--{key}={folder / name}" for key, name in files.items()]
    status = analyze.main([*options, "--dims=8,16,32,64", "--splits=5"])
    assert status == 0, f"analyze ended with status {status}"
    said = json.loads((folder / "analysis.json").read_bytes())
    found: Values = {f"analyze/{k}": sha_json(v) for k, v in said.items() if k not in VARYING}
    found["analyze/oracle/expected_dim"] = said["oracle"]["expected_dim"]
    for dim, one in said["calibration"].items():
        found[f"analyze/top1/{dim}"] = said["top1"][dim]
        found[f"analyze/temperature/{dim}"] = one["temperature"]
    return found


def computed(only: str | None = None) -> dict[str, Values]:
    """{section: {name: value}} of both halves, or of one."""
    threads, found = torch.get_num_threads(), dict[str, Values]()
    torch.set_num_threads(1)  # sums do not depend on the number of cores
    quiet = contextlib.redirect_stdout(io.StringIO())
    with tempfile.TemporaryDirectory(prefix="golden-") as name, quiet:
        portable, machine = beton_cases(folder := Path(name))
        if only != "machine":
            values = orders() | written(portable, folder)
            found["portable"] = values | pixels(folder, PORTABLE_PIXELS)
        if only != "portable":
            values = written(machine, folder) | pixels(folder, MACHINE_PIXELS)
            values |= training(folder) | searches() | indexes(folder) | analysis(folder)
            found["floats"] = {k: v for k, v in values.items() if isinstance(v, float)}
            found["machine"] = {k: v for k, v in values.items() if k not in found["floats"]}
    torch.set_num_threads(threads)
    return found


def compare(before: dict[str, Values], now: dict[str, Values]) -> tuple[list[str], int]:
    """(a line for each name that differs, how many were looked at), of sections in both."""
    lines, count = [], 0
    for section in (s for s in SECTIONS if s in before and s in now):
        old, new = before[section], now[section]
        count += len(old | new)
        for name in sorted(old | new):
            if old.get(name) != new.get(name):
                lines.append(f"{section}: {name}: was {old.get(name)} and is {new.get(name)}")
    return lines, count


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description="Records golden numbers, compares them.")
    p.add_argument("action", choices=("record", "compare"))
    p.add_argument("file", type=Path, nargs="?", help="JSON")
    p.add_argument("--committed", action="store_true", help="tests/golden.json, without `machine`")
    p.add_argument("--only", choices=("portable", "machine"), help="`machine` is with its floats")
    args = p.parse_args(argv)
    if (args.file is None) != args.committed or (args.committed and args.only):
        p.error("give a file, or --committed, which is both halves")
    path = COMMITTED if args.committed else args.file
    before = json.loads(path.read_text()) if args.action == "compare" else {}
    now = computed(args.only)
    if args.action == "record":
        kept = {s: v for s, v in now.items() if not args.committed or s in KEPT}
        path.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
        print(f"{path}: {sum(map(len, kept.values()))} values")
        return 0
    lines, count = compare(before, now)
    print(*lines, f"{count - len(lines)} of {count} equal", sep="\n")
    return 1 if lines or not count else 0


if __name__ == "__main__":
    sys.exit(main())
