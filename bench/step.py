"""Compare training steps of MRL, MRL-E and a fixed feature (FF), our head and the paper's loops.

    python bench/step.py [--arch rn18 rn50] [--res 160 224] [--batch 256] [--modes eager compiled]
    [--blurpool 0 1] [--profile]
    python bench/step.py --cases rn50:224:256 rn18:64:1024

A step is a forward pass, the cross-entropy of every prefix with label smoothing, a backward pass
and fused SGD. All kinds take turns, block by block, with a matrix product and a copy, which measure
the machine's peaks. The clock is wall time on a GPU and the CPU time of all threads on a CPU;
`best` compares the fastest blocks, which a busy machine disturbs less than the median. The first
table measures head and loss alone and decides `fused` of nested_logits. Cases that do not fit into
memory, do not compile or have no time left are listed at the end. Rows are written after the first
turn, for a program that is killed, and again when all turns are done: the last row counts.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import NamedTuple

# GNU OpenMP's idle threads spin, which would count as CPU time; the library reads it when loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from machine import (
    COPY,
    MATMUL,
    Machine,
    Work,
    current_machine,
    finish,
    peaks,
    ratios,
    repeated,
    work_of,
)
from measure import Block, Run, rate, take_turns
from record import append, spread
from training import (
    FF,
    KINDS,
    MODES,
    MRL,
    MRL_E,
    OFFICIAL,
    OFFICIAL_E,
    Step,
    as_graph,
    head_call,
    synthetic,
)

GOAL = 1.02  # time of an MRL step over an FF step, at most


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--arch",
        nargs="*",
        help="backbones; none: heads alone; default: rn18 rn50 (GPU: and rn101)",
    )
    p.add_argument("--res", type=int, nargs="+", help="pixels; default: 64 (GPU: 224 160 192)")
    p.add_argument(
        "--batch", type=int, nargs="+", help="images; default: 32, from rn50 on 16 (GPU: 256 512)"
    )
    p.add_argument(
        "--cases",
        nargs="+",
        type=named_case,
        metavar="ARCH:RES:BATCH",
        help="in this order, in place of the three above",
    )
    p.add_argument(
        "--blurpool",
        type=int,
        nargs="+",
        choices=(0, 1),
        default=[0],
        help="without and with BlurPool, which the recipes have",
    )
    p.add_argument(
        "--modes",
        nargs="+",
        choices=MODES,
        help="default: eager (GPU: and compiled, by torch.compile)",
    )
    p.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    p.add_argument("--classes", type=int, default=1000)
    p.add_argument(
        "--widths",
        type=int,
        nargs="*",
        default=[512, 2048],
        help="of the table of heads; none: no table",
    )
    p.add_argument(
        "--head-batch",
        type=int,
        nargs="+",
        help="of that table; default: 16 64 256 (GPU: and 1024)",
    )
    p.add_argument("--device", default="auto")
    p.add_argument(
        "--precision", default="auto", help="bf16, fp16 or fp32; auto: bf16 on a GPU, fp32 on a CPU"
    )
    p.add_argument("--threads", type=int, default=1, help="of a CPU that does the steps")
    p.add_argument("--blocks", type=int, help="default: 9 (GPU: 5)")
    p.add_argument("--seconds", type=float, help="of a block; default: 0.6 (GPU: 0.4)")
    p.add_argument(
        "--limit",
        type=float,
        default=float("inf"),
        help="seconds after which no other case is begun",
    )
    p.add_argument(
        "--profile",
        action="store_true",
        help="only print where the time of each case's MRL step goes",
    )
    p.add_argument("--no-record", action="store_true", help="do not append to bench/results/")
    args = p.parse_args(argv)
    machine = current_machine(args.device, args.precision, args.threads)
    gpu = machine.device.type != "cpu"
    args.seconds = (0.4 if gpu else 0.6) if args.seconds is None else args.seconds
    args.blocks = args.blocks or (5 if gpu else 9)
    modes = args.modes or (["eager", "compiled"] if gpu else ["eager"])
    arches = args.arch
    if arches is None:
        arches = ["rn50", "rn18", "rn101"] if gpu else ["rn18", "rn50"]
    name = f"{machine.threads} CPU threads"
    if machine.device.type == "cuda":
        name = torch.cuda.get_device_name(machine.device)
    print(
        f"{name}, {machine.precision}, {args.classes} classes, torch {torch.__version__}",
        flush=True,
    )

    # ---- cases ----
    sizes = args.cases
    if sizes is None:
        sizes = []
        resolutions = args.res or ([224, 160, 192] if gpu else [64])
        for res, arch in itertools.product(resolutions, arches):
            on_cpu = [32 if arch == "rn18" else 16]
            for batch in args.batch or ([256, 512] if gpu else on_cpu):
                sizes.append((arch, res, batch))
    cases = []
    for mode, blurpool in itertools.product(modes, args.blurpool):
        for arch, res, batch in sizes:
            cases.append(Case(arch, res, batch, mode, bool(blurpool)))
    if args.profile:
        for case in cases:
            profile(case, args.classes, machine)
        return 0
    # ---- measurements ----
    report = Report(not args.no_record, time.monotonic() + args.limit)
    if args.widths:
        heads(args, args.head_batch or [16, 64, 256] + [1024] * gpu, machine, report)
    if cases:
        print(
            f"{'time of a step over FF':28} {'MRL':>7} {'goal':>6} {'low-high':>11} {'best':>7} "
            f"{'MRL-E':>7} {'official':>8} {'off. -E':>7}  {'FF':>8} {'MRL':>8} {'official':>8}  "
            f"images/s  {'of matmul':>9} {'of copy':>8}",
            flush=True,
        )
    for case in cases:
        if not report.late(case.name):
            steps(case, args, machine, report)
    for what, reason in report.failed.items():
        print(f"not measured: {what}: {reason}")
    return 0


class Case(NamedTuple):
    arch: str
    res: int
    batch: int
    mode: str
    blurpool: bool

    @property
    def name(self) -> str:
        pooling = ", BlurPool" if self.blurpool else ""
        return f"{self.arch} {self.res} px x {self.batch}, {self.mode}{pooling}"


def named_case(text: str) -> tuple[str, int, int]:
    """ARCH:RES:BATCH."""
    try:
        arch, res, batch = text.split(":")
        return arch, int(res), int(batch)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: expected ARCH:RES:BATCH") from None


class HeadCase(NamedTuple):
    """Head and loss alone. alone: as a CUDA graph, without the time of kernel launches."""

    kind: str
    width: int
    batch: int
    alone: bool

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.width} x {self.batch}" + ", as a graph" * self.alone


class Report:
    """Rows for bench/results/, written as they arrive, and the cases that were not measured."""

    def __init__(self, record: bool, deadline: float) -> None:
        self.record = record
        self.deadline = deadline
        self.failed: dict[str, str] = {}

    def late(self, name: str) -> bool:
        if time.monotonic() > self.deadline:
            self.failed[name] = "no time left (--limit)"
        return name in self.failed

    def add(self, rows: list[dict]) -> None:
        if self.record and rows:
            append("step", rows)


def steps(case: Case, args: argparse.Namespace, machine: Machine, report: Report) -> None:
    """Measure one case and print its line: all kinds of step, in turns with the peaks."""
    batch = synthetic(case.batch, case.res, args.classes, machine)
    needs: dict[str, Work] = {}

    def prepare(kind: str) -> Run:
        step = Step(kind, case.arch, args.classes, machine, blurpool=case.blurpool)
        # Counted before compilation, which hides the operators.
        needs[kind] = work_of(lambda: step(*batch))
        step.compile(case.mode)
        return repeated(machine, lambda: step(*batch), case.batch, args.seconds)

    # Compiled code of earlier cases is not needed again, and counts against a limit.
    torch.compiler.reset()
    make: dict[str, Callable[[], Run]] = {kind: partial(prepare, kind) for kind in args.kinds}
    outcome = take_turns(
        make | peaks(machine, args.seconds / 2),
        args.blocks,
        first_turn=lambda found: report.add(step_rows(case, args, machine, needs, found.blocks)),
    )
    report.failed |= {f"{name} ({case.name})": reason for name, reason in outcome.failed.items()}
    rows = step_rows(case, args, machine, needs, outcome.blocks)
    report.add(rows)
    print_line(case, rows)
    free_memory(machine)


def step_rows(
    case: Case,
    args: argparse.Namespace,
    machine: Machine,
    needs: dict[str, Work],
    blocks: dict[str, list[Block]],
) -> list[dict]:
    """A row for each kind of step. needs: the work of one step."""
    clock = machine.clock
    rows = []
    for kind in [kind for kind in args.kinds if blocks.get(kind)]:
        # Work per image, by the peak that limits it.
        per_image = {
            MATMUL: needs[kind].flops / case.batch,
            COPY: needs[kind].bytes / case.batch,
        }
        row = {
            "bench": "step",
            "case": case.name,
            "kind": kind,
            **case._asdict(),
            "classes": args.classes,
            "precision": machine.precision,
            "clock": clock,
            "threads": machine.threads,
            "images_per_s": spread(speeds(blocks[kind], clock)),
            "flops": per_image[MATMUL],
            "bytes": per_image[COPY],
        }
        reached = [peak for peak in (MATMUL, COPY) if blocks.get(peak)]
        for peak in reached:
            # What the step's operators need of the peak, over what the peak gave in the same turn.
            over_peak = median(ratios(blocks[kind], blocks[peak], clock))
            row[f"of {peak}"] = per_image[peak] * over_peak
        for peak in reached:
            row[peak] = rate(blocks[peak], clock)
        if blocks.get(FF):
            best = {name: max(speeds(blocks[name], clock)) for name in (FF, kind)}
            row["time / FF"] = spread(ratios(blocks[FF], blocks[kind], clock))
            row["time / FF, best blocks"] = best[FF] / best[kind]
        rows.append(row)
    return rows


def print_line(case: Case, rows: list[dict]) -> None:
    by = {row["kind"]: row for row in rows}

    def over(kind: str) -> str:
        return f"{by[kind]['time / FF']['median']:.3f}x" if FF in by and kind in by else "-"

    def speed(kind: str) -> str:
        return f"{by[kind]['images_per_s']['median']:.1f}" if kind in by else "-"

    shown = by.get(MRL) or next(iter(by.values()), None)
    if shown is None:
        print(f"{case.name:28} -", flush=True)
        return
    low_high = mark = best = ""
    if MRL in by and FF in by:
        found = by[MRL]["time / FF"]
        low_high = f"{found['min']:.3f}-{found['max']:.3f}"
        mark = f"{GOAL:g}x"
        if found["median"] > GOAL:
            mark += "!"
        best = f"{by[MRL]['time / FF, best blocks']:.3f}x"
    of = [f"{shown[f'of {peak}']:.0%}" if f"of {peak}" in shown else "-" for peak in (MATMUL, COPY)]
    print(
        f"{case.name:28} {over(MRL):>7} {mark:>6} {low_high:>11} {best:>7} {over(MRL_E):>7} "
        f"{over(OFFICIAL):>8} {over(OFFICIAL_E):>7}  {speed(FF):>8} {speed(MRL):>8} "
        f"{speed(OFFICIAL):>8}  {'':8}  {of[0]:>9} {of[1]:>8}",
        flush=True,
    )


def heads(args: argparse.Namespace, batches: list[int], machine: Machine, report: Report) -> None:
    """Print the table of head and loss alone: one product, prefix by prefix, the paper's loops."""
    print(
        f"{'head and loss, width x batch':28} {'fused over prefixes':>19} {'over official':>13} "
        f"{'prefixes over official':>22}  {'fused':>8} {'prefixes':>8} {'official':>8}  ms",
        flush=True,
    )
    graphs = (False, True) if machine.device.type == "cuda" else (False,)
    for kind in (MRL, MRL_E):
        for width, batch, alone in itertools.product(args.widths, batches, graphs):
            case = HeadCase(kind, width, batch, alone)
            if not report.late(case.name):
                head(case, args, machine, report)


def head(case: HeadCase, args: argparse.Namespace, machine: Machine, report: Report) -> None:
    """Measure one case and print its line: speed ratios between the three ways."""

    def prepare(kind: str, fused: bool | None) -> Run:
        call = head_call(
            kind, case.width, case.batch, classes=args.classes, fused=fused, machine=machine
        )
        return repeated(machine, as_graph(call) if case.alone else call, 1, args.seconds / 4)

    make: dict[str, Callable[[], Run]] = {
        "fused": partial(prepare, case.kind, True),
        "prefixes": partial(prepare, case.kind, False),
        "official": partial(prepare, OFFICIAL if case.kind == MRL else OFFICIAL_E, None),
    }
    blocks, failed = take_turns(make, args.blocks)
    clock = machine.clock
    report.failed |= {f"{name} ({case.name})": reason for name, reason in failed.items()}

    def times(a: str, b: str) -> str:
        if a not in blocks or b not in blocks:
            return "-"
        return f"{median(ratios(blocks[a], blocks[b], clock)):.2f}x"

    ms = []
    for way in make:
        ms.append(f"{1e3 / rate(blocks[way], clock):8.3f}" if way in blocks else f"{'-':>8}")
    print(
        f"{case.name:28} {times('fused', 'prefixes'):>19} {times('fused', 'official'):>13} "
        f"{times('prefixes', 'official'):>22}  {' '.join(ms)}",
        flush=True,
    )
    settings = {
        "bench": "step",
        "case": "head and loss",
        **case._asdict(),
        "classes": args.classes,
        "precision": machine.precision,
        "clock": clock,
        "threads": machine.threads,
    }
    rows = []
    for way, found in blocks.items():
        rows.append(settings | {"way": way, "per_s": spread(speeds(found, clock))})
    report.add(rows)
    free_memory(machine)


def speeds(blocks: list[Block], clock: str) -> list[float]:
    return [block.images / getattr(block, clock) for block in blocks]


def free_memory(machine: Machine) -> None:
    """Free memory between cases."""
    gc.collect()
    if machine.device.type == "cuda":
        torch.cuda.empty_cache()


def profile(case: Case, classes: int, machine: Machine) -> None:
    """Print torch.profiler's table of three MRL steps."""
    from torch.profiler import ProfilerActivity

    torch.set_num_threads(machine.threads)
    batch = synthetic(case.batch, case.res, classes, machine)
    step = Step(MRL, case.arch, classes, machine, blurpool=case.blurpool)
    step.compile(case.mode)
    for _ in range(3):
        step(*batch)
    finish(machine.device)
    gpu = machine.device.type == "cuda"
    with torch.profiler.profile(
        activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * gpu]
    ) as found:
        for _ in range(3):
            step(*batch)
        finish(machine.device)
    by = "self_cuda_time_total" if gpu else "self_cpu_time_total"
    print(f"{case.name}, three steps of MRL")
    print(
        found.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=60), flush=True
    )


if __name__ == "__main__":
    sys.exit(main())
