"""Cost of evaluation: all prefixes against one, the loop against the loader alone, and an analysis
of ImageNet's size.

    python bench/evaluation.py [--photos FOLDER] [--arch rn18 rn50] [--res 64]

prefixes   time of predict + accuracy of nine prefixes (MRL) over that of the whole feature (FF),
           with the same trunk
loop       rate of evaluating a .beton with a trunk that costs nothing, over the rate of its loader:
           the overhead of Python
analysis   `matryoshka analyze --only cascade` of logits [9, 50000, 1000], 30 splits: seconds and
           peak memory

Competitors take turns, block by block. The clock is the CPU time of all threads; on a GPU, wall
time.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

# GNU OpenMP's idle threads spin, which would count as CPU time; read when the library is loaded
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from machine import Machine, current_machine, finish, ratios, repeated
from material import Material
from measure import OURS, Run, rate, take_turns
from record import append, spread
from torch import nn

from matryoshka.data import CenterCrop, Loader
from matryoshka.data.loader import Batch
from matryoshka.evaluation.accuracy import PrefixAccuracy
from matryoshka.evaluation.predict import predict
from matryoshka.models import ModelSpec, NestedModel, build
from matryoshka.nested import NestedLinear, default_dims

ARCHS = {"rn18": "resnet18", "rn50": "resnet50"}
CASES = ("prefixes", "loop", "analysis")
GOAL = 1.02  # nine prefixes take at most this many times the time of one


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--photos",
        help="folder of class folders of JPEG photos, for the loop; default: synthetic ones",
    )
    p.add_argument("--arch", nargs="+", default=["rn18", "rn50"])
    p.add_argument("--res", type=int, default=64, help="pixels of the images of `prefixes`")
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--classes", type=int, default=1000)
    p.add_argument("--images", type=int, default=50_000, help="of `analysis`")
    p.add_argument("--loop-images", type=int, default=450, help="of a block of `loop`")
    p.add_argument("--device", default="auto")
    p.add_argument("--precision", default="auto")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--blocks", type=int, default=9)
    p.add_argument("--seconds", type=float, default=1.0, help="of a block")
    p.add_argument("--only", nargs="+", choices=CASES, default=CASES)
    p.add_argument("--no-record", action="store_true", help="do not append to bench/results/")
    args = p.parse_args(argv)
    machine = current_machine(args.device, args.precision, args.threads)

    # ---- measurements ----
    rows = []
    if "prefixes" in args.only:
        rows += [prefixes(arch, args, machine) for arch in args.arch]
    if "loop" in args.only:
        rows.append(loop(args, machine))
    if "analysis" in args.only:
        rows.append(analysis(args))
    if not args.no_record:
        print(f"rows     {append('evaluation', rows)}")
    return 0


def prefixes(arch: str, args: argparse.Namespace, machine: Machine) -> dict:
    """Ratio of times, MRL over FF: forward pass and accuracy of every prefix, for one repeated
    batch.
    """
    # One trunk for both kinds, so that they differ in head and accuracy only.
    torch.manual_seed(0)
    shared = build(ModelSpec(ARCHS.get(arch, arch), args.classes, (8,)))
    images = torch.randint(
        0, 256, (args.batch, args.res, args.res, 3), dtype=torch.uint8, device=machine.device
    )
    labels = torch.randint(0, args.classes, (args.batch,), device=machine.device)
    batch = Batch(images, labels, torch.arange(args.batch, device=machine.device))

    def kind(dims: tuple[int, ...]) -> Run:
        spec = ModelSpec(shared.spec.arch, args.classes, dims)
        model = NestedModel(shared.trunk, NestedLinear(dims, args.classes), shared.width, spec)
        model = model.to(machine.device).to(memory_format=torch.channels_last)
        metric = PrefixAccuracy(dims).to(machine.device)

        def call() -> None:
            for prediction in predict(model, [batch], machine.precision):
                metric.update(prediction.logits, prediction.labels)

        return repeated(machine, call, args.batch, args.seconds)

    dims = default_dims(shared.width)
    made = {"MRL": lambda: kind(dims), "FF": lambda: kind(dims[-1:])}
    blocks = take_turns(made, args.blocks).blocks
    # FF's rate over MRL's is MRL's time over FF's.
    times = ratios(blocks["FF"], blocks["MRL"], machine.clock)
    row = {
        "case": "prefixes",
        "arch": arch,
        "res": args.res,
        "batch": args.batch,
        "classes": args.classes,
        "dims": list(dims),
        "precision": machine.precision,
        "threads": machine.threads,
        "time / FF": spread(times),
        "images/s": rate(blocks["MRL"], machine.clock),
    }
    print(
        f"{len(dims)} prefixes over one, {arch} {args.res} px x {args.batch}: "
        f"{median(times):.3f}x the time "
        f"({min(times):.3f} to {max(times):.3f}), goal {GOAL}; {row['images/s']:.0f} images/s",
        flush=True,
    )
    return row


class FreeTrunk(nn.Module):
    """A trunk that costs nearly nothing: the mean of the first pixels, repeated."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, :, 0, 0].mean(1, keepdim=True).expand(-1, 8).contiguous()


def loop(args: argparse.Namespace, machine: Machine) -> dict:
    """Rate of evaluation with a free trunk over that of the loader alone; the rest is the loop's
    cost.
    """
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(args.photos) if args.photos else None
        path = Material(Path(folder), photos, args.loop_images, with_ffcv=False).jpg
        options = {
            "order": "sequential",
            "crop": CenterCrop(224),
            "num_workers": 1,
            "device": machine.device,
        }
        model = NestedModel(FreeTrunk(), NestedLinear((8,), 10), 8, ModelSpec("free", 10, (8,)))
        model = model.to(machine.device)
        waited: list[float] = []

        def alone() -> Run:
            loader = Loader(path, 64, **options)
            return lambda: sum(len(batch.labels) for batch in loader)

        def evaluated() -> Run:
            loader = Loader(path, 64, **options)

            def run() -> int:
                torch.set_num_threads(machine.threads)
                before = loader.wait
                started = time.perf_counter()
                metric = PrefixAccuracy((8,)).to(machine.device)
                # % 10: the free trunk's head has 10 classes.
                for prediction in predict(model, loader, "fp32"):
                    metric.update(prediction.logits, prediction.labels % 10)
                finish(machine.device)
                waited.append((loader.wait - before) / (time.perf_counter() - started))
                return int(metric.count)

            return run

        blocks = take_turns({"loader": alone, OURS: evaluated}, args.blocks).blocks
    shares = ratios(blocks[OURS], blocks["loader"], "wall")
    row = {
        "case": "loop",
        "threads": machine.threads,
        "of the loader": spread(shares),
        "waiting": spread(waited[1:]),
        "images/s": rate(blocks[OURS], "wall"),
        "loader images/s": rate(blocks["loader"], "wall"),
    }
    print(
        f"evaluation with a free trunk: {100 * median(shares):.1f} % of the loader's rate "
        f"({row['images/s']:.0f} of "
        f"{row['loader images/s']:.0f} images/s), {100 * median(waited[1:]):.0f} % of the time "
        "waiting for data",
        flush=True,
    )
    return row


def analysis(args: argparse.Namespace) -> dict:
    """One process from the files to analysis.json. Its memory includes pages of the mapped file."""
    dims = default_dims(2048)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rng = np.random.default_rng(0)
        labels = rng.integers(0, args.classes, args.images)
        shape = (len(dims), args.images, args.classes)
        logits = np.lib.format.open_memmap(folder / "logits.npy", "w+", np.float32, shape)
        ease = rng.standard_normal(args.images, dtype=np.float32)
        for g, start in np.ndindex(len(dims), -(-args.images // 5000)):
            part = slice(5000 * start, 5000 * (start + 1))
            rows = rng.standard_normal((len(labels[part]), args.classes), dtype=np.float32)
            rows[np.arange(len(rows)), labels[part]] += 3.2 + 0.25 * g + 1.5 * ease[part]
            logits[g, part] = 1.6 * rows
        logits.flush()
        np.save(folder / "gt.npy", labels)
        # A separate process, whose peak memory the system then reports.
        command = [
            *(sys.executable, "-m", "matryoshka.cli", "analyze"),
            f"--logits={folder / 'logits.npy'}",
            f"--gt={folder / 'gt.npy'}",
            f"--dims={','.join(map(str, dims))}",
            "--only=cascade",
            "--splits=30",
            f"--output={folder / 'analysis.json'}",
        ]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    row = {
        "case": "analysis",
        "shape": list(shape),
        "splits": 30,
        "seconds": seconds,
        "cpu seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak bytes": after.ru_maxrss * 1024,
    }
    print(
        f"cascade of {list(shape)}, 30 splits: {seconds:.1f} s, {row['cpu seconds']:.1f} s of "
        "CPU, peak "
        f"{row['peak bytes'] / 1e9:.2f} GB (the file has {4 * np.prod(shape) / 1e9:.2f})",
        flush=True,
    )
    return row


if __name__ == "__main__":
    raise SystemExit(main())
