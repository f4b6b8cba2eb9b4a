"""Random views of a batch, flipped, jittered, grey, blurred, solarised: ours against torchvision.

    python bench/views.py [--size 32 224] [--batch 256] [--blocks 7]

Both get uint8 images that are cropped, and draw for every image of its own; probabilities and
strengths are SimCLR's (and BYOL's solarisation). torchvision's v2 transforms draw once for a call,
so they are called once for each image. The two take turns, block by block; the clock is the CPU
time of all threads, on a GPU wall time.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from functools import partial

# GNU OpenMP's idle threads spin, which would count as CPU time; the library reads it when loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from machine import Machine, current_machine, ratios, repeated
from measure import OURS, Run, rate, take_turns
from record import append, spread
from torchvision.transforms import v2

from matryoshka.data.views import ViewOptions, apply_views, draw_views

BLUR = 0.5  # probability
SOLARISE = 0.1
STRENGTHS = (0.4, 0.4, 0.4, 0.1)
TORCHVISION = "torchvision v2"


def ours(size: int, args: argparse.Namespace, machine: Machine) -> Run:
    options = ViewOptions(blur=BLUR, kernel=kernel(size), solarise=SOLARISE, strengths=STRENGTHS)
    images = drawn(args.batch, size).to(machine.device)
    index = np.arange(args.batch)
    epochs = itertools.count()

    def one_batch() -> None:
        draws = draw_views(index, options, seed=0, epoch=next(epochs), view=0)
        apply_views(images, draws)

    return repeated(machine, one_batch, args.batch, args.seconds)


def torchvision(size: int, args: argparse.Namespace, machine: Machine) -> Run:
    view = v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(*STRENGTHS)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(kernel(size), (0.1, 2.0))], p=BLUR),
            v2.RandomSolarize(128, SOLARISE),
        ]
    )
    images = drawn(args.batch, size).permute(0, 3, 1, 2).contiguous().to(machine.device)
    return repeated(
        machine, lambda: torch.stack([view(image) for image in images]), args.batch, args.seconds
    )


def drawn(count: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, size, size, 3), dtype=torch.uint8, generator=generator)


def kernel(size: int) -> int:
    """Odd number of pixels, a tenth of the side."""
    return max(3, size // 10 | 1)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--size", type=int, nargs="+", default=[32, 224], help="pixels")
    p.add_argument("--batch", type=int, default=256, help="images; default: 256")
    p.add_argument("--device", default="auto")
    p.add_argument("--threads", type=int, default=1, help="of a CPU")
    p.add_argument("--blocks", type=int, default=7, help="pairs; default: 7")
    p.add_argument("--seconds", type=float, default=1.0, help="of a block; default: 1")
    p.add_argument("--no-record", action="store_true", help="do not append to bench/results/")
    args = p.parse_args(argv)
    machine = current_machine(args.device, "fp32", args.threads)
    rows = []
    for size in args.size:
        make = {
            OURS: partial(ours, size, args, machine),
            TORCHVISION: partial(torchvision, size, args, machine),
        }
        outcome = take_turns(make, args.blocks)
        if outcome.failed:
            name, reason = next(iter(outcome.failed.items()))
            raise SystemExit(f"error: {size} px, {name}: {reason}")
        first, second = outcome.blocks[OURS], outcome.blocks[TORCHVISION]
        # of times: how many times as long torchvision takes
        over = spread(ratios(first, second, machine.clock))
        speeds = {name: rate(outcome.blocks[name], machine.clock) for name in make}
        print(
            f"{size} px: {over['median']:.2f}x ({over['min']:.2f} to {over['max']:.2f}, "
            f"n = {over['n']}); " + ", ".join(f"{n} {s:,.0f} images/s" for n, s in speeds.items())
        )
        rows.append(
            {
                "bench": "views",
                "size": size,
                "batch": args.batch,
                "threads": machine.threads,
                "clock": machine.clock,
                "time / ours": over,
                "images/s": speeds,
            }
        )
    if not args.no_record:
        append("views", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
