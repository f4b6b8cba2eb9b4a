"""Self-supervised training steps: nested against the full width alone, in paired turns.

    python bench/ssl_steps.py [--method relic moco sigreg] [--arch fast_cnn] [--blocks 9]

A step is both towers' passes over two random views, the losses of every prefix from 8 to the width
(each with its projector), a backward pass, SGD, and the target's and the queue's update. Nested and
plain take turns, block by block; the clock is the CPU time of all threads, on a GPU wall time. Two
neighbouring blocks are a pair; the goal is a median ratio of 1.05 or less.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from functools import partial

# GNU OpenMP's idle threads spin, which would count as CPU time; the library reads it when loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from machine import Machine, current_machine, ratios, repeated
from measure import Run, rate, take_turns
from record import append, spread

from matryoshka.devices import autocast
from matryoshka.models import BACKBONES, ModelSpec, backbone, build
from matryoshka.nested import default_dims
from matryoshka.ssl import METHODS, SslConfig, make_method
from matryoshka.training.ssl_step import BN_GROUP

GOAL = 1.05  # time of a nested step over a plain one, at most
KINDS = ("plain", "nested")


class Step:
    """A training step on random views; the loss is not read, so nothing waits for a GPU."""

    def __init__(self, kind: str, args: argparse.Namespace, method: str, machine: Machine) -> None:
        options = json.loads(args.arch_options)
        _, width = backbone(args.arch, options=options)
        dims = (width,) if kind == "plain" else default_dims(width, 8)
        torch.manual_seed(0)
        encoder = build(ModelSpec(args.arch, 10, tuple(dims), arch_options=options))
        config = SslConfig(method=method, queue=16 * args.batch)
        self.method = make_method(encoder, config).to(machine.device).train()
        self.method.bn_group = BN_GROUP if method == "moco" else 0  # as a run on one process
        self.machine = machine
        trained = [p for p in self.method.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=0.01, momentum=0.9)
        self.generator = torch.Generator().manual_seed(0)
        shape = (args.batch, 3, args.size, args.size)
        self.views = [torch.randn(shape, device=machine.device) for _ in range(2)]

    def __call__(self) -> None:
        queries = [self.views[v] for v in self.method.query_views(2, 2)]
        keys = [self.views[v] for v in self.method.key_views(2)]
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.machine.device, self.machine.precision):
            own = self.method(queries, keys)
        own = own.map(torch.Tensor.float)
        loss, _ = self.method.loss(own, own, first=0, generator=self.generator)
        loss.backward()
        self.optimizer.step()
        self.method.after_step(own.map(torch.Tensor.detach), 0.99)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--method", nargs="+", choices=list(METHODS), default=["relic", "moco", "sigreg"]
    )
    p.add_argument("--arch", choices=list(BACKBONES), default="fast_cnn")
    p.add_argument("--arch-options", default='{"dim": 128}', help='JSON; default: {"dim": 128}')
    p.add_argument("--batch", type=int, default=256, help="images per step; default: 256")
    p.add_argument("--size", type=int, default=32, help="pixels; default: 32")
    p.add_argument("--device", default="auto")
    p.add_argument("--precision", default="auto")
    p.add_argument("--threads", type=int, default=1, help="of a CPU that does the steps")
    p.add_argument("--blocks", type=int, default=9, help="pairs; default: 9")
    p.add_argument("--seconds", type=float, default=1.0, help="of a block; default: 1")
    p.add_argument("--no-record", action="store_true", help="do not append to bench/results/")
    args = p.parse_args(argv)
    machine = current_machine(args.device, args.precision, args.threads)
    print(
        f"{machine.device.type}, {machine.threads} threads, {machine.precision}, {args.arch}, "
        f"batch {args.batch}, torch {torch.__version__}"
    )
    print(f"{'method':10} {'nested / plain':>14} {'low-high':>13} {'pairs':>5}  images/s")
    missed = 0
    for method in args.method:
        row = measure(method, args, machine)
        found = row["time / plain"]
        over = found["median"] > GOAL
        missed += over
        print(
            f"{method:10} {found['median']:13.3f}{'!' if over else ' '} "
            f"{found['min']:6.3f}-{found['max']:.3f} {found['n']:5d}  "
            f"{row['plain images/s']:.0f}, {row['nested images/s']:.0f}",
            flush=True,
        )
        if not args.no_record:
            append("ssl_steps", [row])
    print(f"goal {GOAL:g}: {'missed' if missed else 'reached'}")
    return 0


def measure(method: str, args: argparse.Namespace, machine: Machine) -> dict:
    """One row of results for a method."""

    def prepare(kind: str) -> Run:
        return repeated(machine, Step(kind, args, method, machine), args.batch, args.seconds)

    outcome = take_turns({kind: partial(prepare, kind) for kind in KINDS}, args.blocks)
    if outcome.failed:
        name, reason = next(iter(outcome.failed.items()))
        raise SystemExit(f"error: {method}, {name}: {reason}")
    plain, nested = (outcome.blocks[kind] for kind in KINDS)
    return {
        "bench": "ssl_steps",
        "method": method,
        "arch": args.arch,
        "arch_options": json.loads(args.arch_options),
        "size": args.size,
        "batch": args.batch,
        "precision": machine.precision,
        "threads": machine.threads,
        "clock": machine.clock,
        "time / plain": spread(ratios(plain, nested, machine.clock)),
        "plain images/s": rate(plain, machine.clock),
        "nested images/s": rate(nested, machine.clock),
    }


if __name__ == "__main__":
    sys.exit(main())
