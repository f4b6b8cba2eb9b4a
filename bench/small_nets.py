"""Training steps of nets for small images: MRL against a plain head, in paired turns.

    python bench/small_nets.py [--arch fast_cnn vit_tiny] [--batch 256] [--threads 1] [--blocks 9]

A step is a forward pass, the cross-entropy of every prefix from 8 to the width, a backward pass and
SGD, on random images of the net's default size. Both heads take turns, block by block; the clock is
the CPU time of all threads, on a GPU wall time. Two neighbouring blocks are a pair; the goal is a
median ratio of 1.03 or less.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial

# GNU OpenMP's idle threads spin, which would count as CPU time; the library reads it when loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from machine import Machine, current_machine, ratios, repeated
from measure import Run, rate, take_turns
from record import append, spread
from training import FF, MRL, Step, synthetic

from matryoshka.models import BACKBONES

GOAL = 1.03  # time of an MRL step over a plain step, at most
SIZES = {"mobilevit": 64, "vit_timm": 384}  # pixels; 32 for all others


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--arch", nargs="+", choices=list(BACKBONES), default=["fast_cnn", "vit_tiny"])
    p.add_argument("--batch", type=int, default=256, help="images per step; default: 256")
    p.add_argument("--classes", type=int, default=10)
    p.add_argument("--device", default="auto")
    p.add_argument("--precision", default="auto")
    p.add_argument("--threads", type=int, default=1, help="of a CPU that does the steps")
    p.add_argument("--blocks", type=int, default=9, help="pairs; default: 9")
    p.add_argument("--seconds", type=float, default=1.0, help="of a block; default: 1")
    p.add_argument("--no-record", action="store_true", help="do not append to bench/results/")
    args = p.parse_args(argv)
    machine = current_machine(args.device, args.precision, args.threads)
    print(
        f"{machine.device.type}, {machine.threads} threads, {machine.precision}, batch "
        f"{args.batch}, torch {torch.__version__}"
    )
    print(f"{'net':26} {'MRL / plain':>11} {'low-high':>13} {'pairs':>5}  images/s plain, MRL")
    missed = 0
    for arch in args.arch:
        row = measure(arch, args, machine)
        found = row["time / plain"]
        over = found["median"] > GOAL
        missed += over
        print(
            f"{arch:26} {found['median']:10.3f}{'!' if over else ' '} "
            f"{found['min']:6.3f}-{found['max']:.3f} {found['n']:5d}  "
            f"{row['plain images/s']:.0f}, {row['MRL images/s']:.0f}",
            flush=True,
        )
        if not args.no_record:
            append("small_nets", [row])
    print(f"goal {GOAL:g}: {'missed' if missed else 'reached'}")
    return 0


def measure(arch: str, args: argparse.Namespace, machine: Machine) -> dict:
    """One row of results for a net."""
    size = SIZES.get(arch, 32)
    batch = synthetic(args.batch, size, args.classes, machine)

    def prepare(kind: str) -> Run:
        step = Step(kind, arch, args.classes, machine)
        return repeated(machine, lambda: step(*batch), args.batch, args.seconds)

    outcome = take_turns({kind: partial(prepare, kind) for kind in (FF, MRL)}, args.blocks)
    if outcome.failed:
        name, reason = next(iter(outcome.failed.items()))
        raise SystemExit(f"error: {arch}, {name}: {reason}")
    plain, nested = outcome.blocks[FF], outcome.blocks[MRL]
    pairs = ratios(plain, nested, machine.clock)
    return {
        "bench": "small_nets",
        "arch": arch,
        "size": size,
        "batch": args.batch,
        "classes": args.classes,
        "precision": machine.precision,
        "threads": machine.threads,
        "clock": machine.clock,
        "time / plain": spread(pairs),
        "plain images/s": rate(plain, machine.clock),
        "MRL images/s": rate(nested, machine.clock),
    }


if __name__ == "__main__":
    sys.exit(main())
