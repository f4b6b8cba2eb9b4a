"""Measure the share of a training step that crops and augmentations of a resident set take.

    python bench/resident.py [--arch resnet18] [--batch 128] [--threads 1]

Images of 32 pixels, as CIFAR's, are drawn from a ResidentLoader, cropped, flipped, augmented and
normalised; the MRL step of the backbone takes turns with that, block by block. The clock is wall
time on a GPU and the CPU time of all threads on a CPU. torchvision's resnet18 shrinks such images
to a single position before its last stage: of the usual nets, its step is among the shortest.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
from collections.abc import Callable

# GNU OpenMP's idle threads spin, which would count as CPU time; the library reads it when loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
from machine import current_machine, ratios, repeated
from measure import Run, rate, take_turns
from record import append, spread
from training import MRL, Step, synthetic

from matryoshka.data import PadCrop, ResidentLoader, named_dataset
from matryoshka.data.augment import Preprocessing, augmented
from matryoshka.training.options import DataConfig

GOAL = 0.05  # of a step, at most
SIZE = 32
CASES = {
    "crop, flip": DataConfig(),
    "+ RandAugment 9": DataConfig(randaugment=9.0),
    "+ CutMix, erasing": DataConfig(cutmix=1.0, random_erasing=0.25),
    "+ colour jitter": DataConfig(color_jitter=(0.4, 0.4, 0.4, 0.1)),
    "all of them": DataConfig(
        randaugment=9.0, cutmix=1.0, random_erasing=0.25, color_jitter=(0.4, 0.4, 0.4, 0.1)
    ),
}


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--arch", nargs="+", default=["resnet18"], help="backbones")
    p.add_argument("--batch", type=int, default=128, help="images")
    p.add_argument("--device", default="auto")
    p.add_argument("--precision", default="auto")
    p.add_argument("--threads", type=int, default=1, help="of a CPU that does the steps")
    p.add_argument("--blocks", type=int, default=7)
    p.add_argument("--seconds", type=float, default=0.5, help="of a block")
    p.add_argument("--no-record", action="store_true", help="do not append to bench/results/")
    args = p.parse_args(argv)
    machine = current_machine(args.device, args.precision, args.threads)

    with tempfile.TemporaryDirectory() as folder:
        loader = ResidentLoader(
            named_dataset("digits", "train", folder),
            args.batch,
            crop=PadCrop(SIZE, 4),
            device=machine.device,
            drop_last=True,
        )

    def pipeline(options: DataConfig) -> Callable[[], Run]:
        # epoch after epoch, without an end
        batches = itertools.chain.from_iterable(iter(loader) for _ in itertools.count())
        rng = np.random.default_rng(0)

        def one_batch() -> None:
            batch = next(batches)
            augmented(batch.images, batch.labels, options, Preprocessing(), rng)

        return lambda: repeated(machine, one_batch, args.batch, args.seconds)

    def step_of(arch: str) -> Callable[[], Run]:
        def prepare() -> Run:
            step = Step(MRL, arch, 10, machine)
            images, labels = synthetic(args.batch, SIZE, 10, machine)
            return repeated(machine, lambda: step(images, labels), args.batch, args.seconds)

        return prepare

    make = {name: pipeline(options) for name, options in CASES.items()}
    make |= {arch: step_of(arch) for arch in args.arch}
    outcome = take_turns(make, args.blocks)
    print(f"{args.batch} images of {SIZE} px; share of a step, goal for crop, flip: {GOAL:.0%}")
    rows = []
    for arch in (arch for arch in args.arch if arch in outcome.blocks):
        steps = outcome.blocks[arch]
        print(f"{arch}: {rate(steps, machine.clock):,.0f} images/s")
        for name in (name for name in CASES if name in outcome.blocks):
            # ratios: the time of the pipeline over that of the step, turn by turn
            over = ratios(steps, outcome.blocks[name], machine.clock)
            share = spread([x / (1 + x) for x in over])
            speed = rate(outcome.blocks[name], machine.clock)
            print(f"  {name:20} {share['median']:6.2%}  {speed:12,.0f} images/s")
            rows.append(
                {
                    "bench": "resident",
                    "case": f"{arch}, {name}",
                    "arch": arch,
                    "batch": args.batch,
                    "clock": machine.clock,
                    "threads": machine.threads,
                    "precision": machine.precision,
                    "share of a step": share,
                    "images_per_s": speed,
                }
            )
    for name, reason in outcome.failed.items():
        print(f"not measured: {name}: {reason}")
    if rows and not args.no_record:
        append("resident", rows)
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
