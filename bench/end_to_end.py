"""Compare a training step fed by our loader with the same step on a batch already on the device.

    python bench/end_to_end.py [--data FILE.beton | --photos FOLDER] [--arch rn50] [--res 224]
    [--batch 256]

Without --data, a file is written from photos (long side 500, quality 90), repeated until an epoch
has enough batches. Both steps take turns, block by block, with the same weights. The first figure
is the share of the synthetic speed that remains with the loader; the wait is the share of a block
in which the training loop waits for a batch.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Generator
from contextlib import closing
from functools import partial
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as in step.py

import torch
from machine import Machine, current_machine, finish, ratios
from material import Material
from measure import Block, Outcome, Run, take_turns
from record import append, spread
from training import MODES, MRL, Step, synthetic

from matryoshka.data import ImageFolder, Loader, RandomResizedCrop, open_dataset, write_beton
from matryoshka.data.slots import Batch

SYNTHETIC = "synthetic"
EPOCH = 32  # batches of an epoch, in a file written by this program


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--data", type=Path, help=".beton file or image folder to train on")
    p.add_argument(
        "--photos",
        type=Path,
        help="folder of class folders; default: pieces of scikit-learn's two photos",
    )
    p.add_argument(
        "--images", type=int, help=f"of the file that is written; default: {EPOCH} batches"
    )
    p.add_argument("--arch", help="default: rn18 (GPU: rn50)")
    p.add_argument("--res", type=int, help="default: 64 (GPU: 224)")
    p.add_argument("--batch", type=int, help="default: 32 (GPU: 256)")
    p.add_argument("--blurpool", action="store_true", help="as in the recipes")
    p.add_argument("--mode", choices=MODES, default="eager", help="of torch.compile")
    p.add_argument(
        "--threads",
        type=int,
        nargs="+",
        help="of the loader, in turns; default: 1 (GPU: all cores, 0)",
    )
    p.add_argument("--train-threads", type=int, default=1, help="of a CPU that does the steps")
    p.add_argument("--loader", choices=["native"], default="native")
    p.add_argument("--steps", type=int, help="of a block; default: 4 (GPU: 40)")
    p.add_argument("--blocks", type=int, default=5)
    p.add_argument("--classes", type=int, default=1000)
    p.add_argument("--device", default="auto")
    p.add_argument(
        "--precision", default="auto", help="bf16, fp16 or fp32; auto: bf16 on a GPU, fp32 on a CPU"
    )
    p.add_argument("--no-record", action="store_true", help="do not append to bench/results/")
    args = p.parse_args(argv)
    machine = current_machine(args.device, args.precision, args.train_threads)
    gpu = machine.device.type != "cpu"
    args.arch = args.arch or ("rn50" if gpu else "rn18")
    for name, on_gpu, on_cpu in (("res", 224, 64), ("batch", 256, 32), ("steps", 40, 4)):
        setattr(args, name, getattr(args, name) or (on_gpu if gpu else on_cpu))

    # ---- data and measurements ----
    with tempfile.TemporaryDirectory() as scratch:
        data = args.data
        if data is None:
            data = written(Path(scratch), args.photos, args.images or EPOCH * args.batch)
        failed = measured(args, data, args.threads or [0 if gpu else 1], machine)
        for name, reason in failed.items():
            print(f"not measured: {name}: {reason}")
    return 0


def written(folder: Path, photos: Path | None, images: int) -> Path:
    """Write a .beton of `images` photos, which repeats a few hundred."""
    material = Material(folder / "material", photos, min(images, 200), with_ffcv=False)
    source = Repeated(ImageFolder(material.folder), images)
    path = folder / "train.beton"
    # The photos are small enough: copying avoids a second lossy compression.
    write_beton(source, path, max_resolution=500, write_mode="jpg", transcode="fit")
    return path


class Repeated:
    """A source repeated until it has `length` samples."""

    def __init__(self, source: ImageFolder, length: int) -> None:
        self.source = source
        self.length = length
        self.classes = source.classes
        self.labels = source.labels[torch.arange(length).numpy() % len(source)]

    def __len__(self) -> int:
        return self.length

    def name(self, index: int) -> str:
        return f"{index}-{self.source.name(index % len(self.source))}"

    def read(self, index: int) -> bytes:
        return self.source.read(index % len(self.source))


def forever(loader: Loader) -> Generator[Batch]:
    while True:
        yield from loader


def measured(
    args: argparse.Namespace, data: Path, threads: list[int], machine: Machine
) -> dict[str, str]:
    """Measure, print, and append to bench/results/, also after the first turn; the failures."""
    dataset = open_dataset(data)
    # The disk is not measured.
    dataset.preload()
    classes = max(args.classes, dataset.num_classes)
    step = Step(MRL, args.arch, classes, machine, blurpool=args.blurpool)
    step.compile(args.mode)
    waits: dict[str, list[float]] = {}

    def fed(name: str, workers: int) -> Run:
        crop = RandomResizedCrop(args.res)
        loader = Loader(
            dataset,
            args.batch,
            crop=crop,
            num_workers=workers,
            device=machine.device,
            drop_last=True,
        )

        def run() -> int:
            torch.set_num_threads(machine.threads)
            before = loader.wait
            # A new iterator: nothing is decoded ahead during the turns of the others.
            with closing(forever(loader)) as batches:
                for batch in itertools.islice(batches, args.steps):
                    step(batch.images, batch.labels)
            finish(machine.device)
            waits.setdefault(name, []).append(loader.wait - before)
            return args.steps * args.batch

        return run

    def on_device() -> Run:
        batch = synthetic(args.batch, args.res, classes, machine)

        def run() -> int:
            torch.set_num_threads(machine.threads)
            for _ in range(args.steps):
                step(*batch)
            finish(machine.device)
            return args.steps * args.batch

        return run

    # ---- measurements ----
    names = {f"loader, {n or 'all'} threads": n for n in threads}
    make: dict[str, Callable[[], Run]] = {SYNTHETIC: on_device}
    make |= {name: partial(fed, name, workers) for name, workers in names.items()}
    pooling = ", BlurPool" if args.blurpool else ""
    case = f"{args.arch} {args.res} px x {args.batch}, {args.mode}{pooling}"

    def keep(outcome: Outcome) -> list[dict]:
        rows = feed_rows(case, names, args, machine, blocks=outcome.blocks, waits=waits)
        if rows and not args.no_record:
            append("end_to_end", rows)
        return rows

    outcome = take_turns(make, args.blocks, first_turn=keep)
    print(
        f"{case:28} {'of synthetic':>12} {'low-high':>11} {'images/s':>9} {'synthetic':>9} "
        f"{'data wait':>9} {'CPU s/1000':>10} {'synthetic':>9}",
        flush=True,
    )
    for row in keep(outcome):
        print_line(row["feed"], row)
    return outcome.failed


def feed_rows(
    case: str,
    names: dict[str, int],
    args: argparse.Namespace,
    machine: Machine,
    *,
    blocks: dict[str, list[Block]],
    waits: dict[str, list[float]],
) -> list[dict]:
    """A row for each feed. names: of the feeds -> threads. waits: seconds of each block."""
    rows = []
    for name in [name for name in names if blocks.get(name)]:
        row = {
            "bench": "end_to_end",
            "case": case,
            "feed": name,
            "arch": args.arch,
            "res": args.res,
            "batch": args.batch,
            "mode": args.mode,
            "blurpool": args.blurpool,
            "precision": machine.precision,
            "loader": args.loader,
            "workers": names[name],
            "train_threads": machine.threads,
            "steps": args.steps,
        }
        pairs = zip(blocks[name], waits[name][1:], strict=True)  # the first block is a warm-up
        row["data_wait"] = spread([wait / block.wall for block, wait in pairs])
        for feed, prefix in ((name, ""), (SYNTHETIC, "synthetic ")):
            if blocks.get(feed):
                row[f"{prefix}images_per_s"] = spread([b.images / b.wall for b in blocks[feed]])
                row[f"{prefix}cpu_s_per_1000"] = 1000 * median(
                    b.cpu / b.images for b in blocks[feed]
                )
        if blocks.get(SYNTHETIC):
            row["of synthetic"] = spread(ratios(blocks[name], blocks[SYNTHETIC], "wall"))
        rows.append(row)
    return rows


def print_line(name: str, row: dict) -> None:
    share = other = cpu = "-"
    low_high = ""
    if "of synthetic" in row:
        relative = row["of synthetic"]
        share = f"{relative['median']:.1%}"
        low_high = f"{relative['min']:.2f}-{relative['max']:.2f}"
        other = f"{row['synthetic images_per_s']['median']:.0f}"
        cpu = f"{row['synthetic cpu_s_per_1000']:.2f}"
    print(
        f"{name:28} {share:>12} {low_high:>11} {row['images_per_s']['median']:9.0f} {other:>9} "
        f"{row['data_wait']['median']:9.1%} {row['cpu_s_per_1000']:10.2f} {cpu:>9}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
