"""Compare loaders on the same photos: ours, FFCV, DALI, torchvision, simplejpeg + cv2.

    python bench/loader.py [--photos FOLDER] [--threads 1 2] [--blocks 5] [--cases "RRC 224" ...]

All take turns, block by block; a block is one pass over the photos (long side 500, quality 90). The
figure is images per second of CPU time over all threads and processes, which a busy machine
disturbs little; the last column is the ratio of wall times. `make bench-peers` installs the peers;
those that are missing or fail are named at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

# GNU OpenMP's idle threads spin, which would count as FFCV's CPU time. The library reads this when
# it is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import peers
import torch
from entropy import mean_needed, needed_by_views
from material import Material, kilobytes, write_many
from measure import OURS, Block, Outcome, Run, rate, ratio, take_turns
from record import append, spread

from matryoshka.data import (
    BetonFile,
    ImageFolder,
    RandomResizedCrop,
    _native,
    open_dataset,
    write_beton,
)
from matryoshka.data.dataset import Dataset
from matryoshka.data.writer import WriteOptions

BATCH = 64
FFCV_FILE = "matryoshka, FFCV's file"
BARE = "bare decode"
MANY = 1_281_167  # images of ImageNet-1K's training set


class Case(NamedTuple):
    """One comparison with every rival. goal: the least speed, as a multiple of a rival's."""

    crop: str
    size: int
    file: str
    rivals: tuple[str, ...]
    goal: dict[str, float]


ALL = ("FFCV", "DALI", "torchvision PIL", "torchvision v2", "simplejpeg + cv2")
RIVALS: dict[str, Callable[[peers.Task, int], Run]] = {
    "FFCV": peers.ffcv,
    "DALI": peers.dali,
    "torchvision PIL": peers.torchvision_pil,
    "torchvision v2": peers.torchvision_v2,
    "simplejpeg + cv2": peers.simplejpeg_cv2,
}
CASES = {
    "RRC 224": Case("random", 224, "jpg", ALL, {"FFCV": 2.5, FFCV_FILE: 1.8}),
    "RRC 160": Case("random", 160, "jpg", ALL, {"FFCV": 2.5}),
    "centre 224": Case("center", 224, "jpg", ALL, {"FFCV": 1.7}),
    "raw 256, RRC 224": Case("random", 224, "raw", ("FFCV",), {"FFCV": 1.2}),
    "small 32, pad-crop": Case(
        "pad", 32, "small", ("FFCV", "torchvision PIL"), {"torchvision PIL": 3}
    ),
}
# Two views of every photo: the file, and the least speed as a multiple of a decode for each view.
VIEWS = {"two views 224": ("jpg", 1.2), "two views 224, no markers": ("folder", 1.4)}
VIEW_BY_VIEW = "view by view"
WRITERS = {"write": 1.5, "write, lossless": 3.0}
OPEN = "open 1.28 M"


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--photos",
        type=Path,
        help="folder of class folders; default: pieces of scikit-learn's two photos",
    )
    p.add_argument(
        "--small",
        type=Path,
        help="folder of class folders of 32-pixel images (CIFAR); default: pieces of a photo",
    )
    p.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    p.add_argument("--blocks", type=int, default=5)
    p.add_argument("--images", type=int, default=450, help="least photos in a block, by repetition")
    p.add_argument("--many", type=int, default=MANY, help="samples of the file that is opened")
    p.add_argument(
        "--cases", nargs="+", choices=[*CASES, *VIEWS, *WRITERS, OPEN], help="default: all"
    )
    p.add_argument("--peers", nargs="*", choices=ALL, default=ALL, help="default: all")
    p.add_argument("--no-record", action="store_true", help="do not append to bench/results/")
    args = p.parse_args(argv)
    names = args.cases or [*CASES, *VIEWS, *WRITERS, OPEN]
    torch.set_num_threads(1)

    with tempfile.TemporaryDirectory() as scratch:
        table = Table()
        if OPEN in names:  # first, because it forks, which threads would disturb
            opening(Path(scratch), args.many, args.blocks, args.peers, table)
        material = Material(
            Path(scratch), args.photos, args.images, "FFCV" in args.peers, args.small
        )
        table.failed |= material.failed
        describe(material)
        for name in names:
            for threads in args.threads:
                options = {"blocks": args.blocks, "chosen": args.peers, "table": table}
                if name in CASES:
                    loading(name, material, threads, **options)
                elif name in VIEWS:
                    viewing(name, material, threads, blocks=args.blocks, table=table)
                elif name in WRITERS:
                    writing(name, material, threads, **options)
        table.scaling()
        for name, reason in table.failed.items():
            print(f"not measured: {name}: {reason}")
        if not args.no_record:
            print(f"appended to {append('loader', table.rows).name}")
    return 0


class Table:
    """Prints a line per result and keeps the rows for bench/results/."""

    def __init__(self) -> None:
        self.rows: list[dict] = []
        self.failed: dict[str, str] = {}
        self._wall: dict[str, dict[int, float]] = {}  # case: {threads: our images/s}
        print(
            f"{'case':25} {'threads':>7} {'ratio':>6} {'goal':>5}  {'peer':24} "
            f"{'ours':>7} {'peer':>7}  images per CPU second   {'wall':>6}",
            flush=True,
        )

    def add(
        self, case: str, threads: int, outcome: Outcome, goal: dict[str, float], **metadata
    ) -> None:
        """Add a line per rival, and one for our run on FFCV's file, if there is one."""
        self.failed |= {f"{name} ({case})": reason for name, reason in outcome.failed.items()}
        blocks = outcome.blocks
        if OURS not in blocks:
            return
        ours = [name for name in blocks if name.startswith(OURS)]
        self._wall.setdefault(case, {})[threads] = rate(blocks[OURS], "wall")
        for name in blocks:
            row = {"bench": "loader", "case": case, "peer": name, "threads": threads, **metadata}
            row |= {
                clock: spread([b.images / getattr(b, clock) for b in blocks[name]])
                for clock in ("cpu", "wall")
            }
            if name not in ours:
                for us in ours:
                    row[f"ratio of {us}"] = round(ratio(blocks[us], blocks[name]), 3)
            self.rows.append(row)
            if name not in (*ours, BARE):
                both = blocks[OURS], blocks[name]
                self._line(case, threads, name, both=both, goal=goal.get(name))
        if FFCV_FILE in blocks and "FFCV" in blocks:
            self._line(
                f"{case}, FFCV's file",
                threads,
                "FFCV",
                both=(blocks[FFCV_FILE], blocks["FFCV"]),
                goal=goal.get(FFCV_FILE),
            )
        if len(blocks) == len(ours):
            print(
                f"{case:25} {threads:7d} {'':6} {'':5}  {'(no peer)':24} {rate(blocks[OURS]):7.0f}",
                flush=True,
            )

    @staticmethod
    def _line(
        case: str,
        threads: int,
        peer: str,
        *,
        both: tuple[list[Block], list[Block]],
        goal: float | None,
    ) -> None:
        """Print a comparison of `both`, our blocks and the peer's."""
        ours, theirs = both
        value = ratio(ours, theirs)
        mark = "" if goal is None else f"{goal:g}x" + ("" if value >= goal else "!")
        print(
            f"{case:25} {threads:7d} {value:5.2f}x {mark:>5}  {peer:24} {rate(ours):7.0f} "
            f"{rate(theirs):7.0f}  "
            f"{'':20} {ratio(ours, theirs, 'wall'):5.2f}x",
            flush=True,
        )

    def scaling(self) -> None:
        for case, wall in self._wall.items():
            if 1 in wall and len(wall) > 1:
                most = max(wall)
                print(
                    f"{case}: {wall[1]:.0f} -> {wall[most]:.0f} images/s of wall time from 1 to "
                    f"{most} threads, "
                    f"{wall[most] / wall[1]:.2f}x"
                )


def describe(m: Material) -> None:
    stored = [f"{kilobytes(m.jpg):.1f} kB each in our file"]
    if m.ffcv.exists():
        stored.append(f"{kilobytes(m.ffcv):.1f} kB in FFCV's")
    print(
        f"{len(ImageFolder(m.folder))} photos of at most 500 pixels, quality 90: "
        f"{', '.join(stored)}",
        flush=True,
    )


def loading(
    name: str, m: Material, threads: int, *, blocks: int, chosen: list[str], table: Table
) -> None:
    """Measure one of CASES."""
    case = CASES[name]
    batch = 8 * BATCH if case.crop == "pad" else BATCH  # small images

    # ---- competitors ----
    task = peers.Task(case.crop, case.size, batch, m, getattr(m, case.file))
    make: dict[str, Callable[[], Run]] = {OURS: partial(peers.ours, task, threads)}
    theirs = m.ffcv if case.file == "jpg" else None  # FFCV reads what FFCV wrote
    if theirs is not None and theirs.exists():
        make[FFCV_FILE] = partial(peers.ours, task, threads, theirs)
    for rival in case.rivals:
        if rival in chosen:
            extra = {"file": theirs} if rival == "FFCV" else {}
            make[rival] = partial(RIVALS[rival], task, threads, **extra)

    # ---- measurements ----
    limit = name == "RRC 224" and threads == 1  # the case for the physical limit
    if limit:
        make[BARE] = partial(peers.bare_decode, m.jpg)
    outcome = take_turns(make, blocks)
    table.add(name, threads, outcome, case.goal, size=case.size, kB=round(kilobytes(task.file), 1))

    # ---- bytes that must be decoded, per second: ours, and libjpeg-turbo alone ----
    if limit and {OURS, BARE} <= set(outcome.blocks):
        with BetonFile(m.jpg) as data:
            needed, stored = mean_needed(data, case.size)
        ours, bare = (
            rate(outcome.blocks[who]) * size / 1e6 for who, size in ((OURS, needed), (BARE, stored))
        )
        print(
            f"physical limit: libjpeg-turbo alone decodes {bare:.1f} MB per core-second, of "
            "whole images; we decode "
            f"{ours:.1f} MB, of the {needed / stored:.0%} that the crops need, and do all the "
            f"rest: {ours / bare:.0%}",
            flush=True,
        )
        table.rows.append(
            {
                "bench": "loader",
                "case": "physical limit",
                "peer": BARE,
                "bare_mb": bare,
                "ours_mb": ours,
            }
            | {"needed_kB": needed / 1e3, "stored_kB": stored / 1e3}
        )


def viewing(name: str, m: Material, threads: int, *, blocks: int, table: Table) -> None:
    """Measure one of VIEWS against our own loader that decodes view by view, and what decoding is
    of the work.
    """
    file, goal = VIEWS[name]
    task = peers.Task("two views", 224, BATCH, m, getattr(m, file))
    make = {
        OURS: partial(peers.ours, task, threads),
        VIEW_BY_VIEW: partial(peers.ours, task, threads, None, peers.ViewByView),
    }
    table.add(name, threads, take_turns(make, blocks), {VIEW_BY_VIEW: goal}, size=task.size)
    if threads > 1:
        return
    data = open_dataset(task.file)
    share = decoding_share(data, task.size, blocks)
    together, apart = needed_by_views(data, task.size, 2)
    print(
        f"{name}: decoding is {share:.0%} of the work of one view; both together need "
        f"{together / apart:.0%} of the bytes that they need one by one",
        flush=True,
    )
    row = {"bench": "loader", "case": f"{name}: decoding", "peer": VIEW_BY_VIEW, "share": share}
    table.rows.append(row | {"together_kB": together / 1e3, "apart_kB": apart / 1e3})


def decoding_share(data: Dataset, size: int, blocks: int) -> float:
    """The part of the CPU time of a view that is decoding. The rest, resampling, is what one more
    view with the same crop costs.
    """
    more = 8
    index = np.arange(len(data))
    (samples,) = data.fetch(index)
    crops = RandomResizedCrop(size).crops(samples.width, samples.height, index, 0, 0)
    out = [np.empty((len(index), size, size, 3), np.uint8) for _ in range(1 + more)]
    pool = _native.Pool(1)

    def views(count: int) -> Run:
        rows = np.stack([crops] * count)

        def run() -> int:
            _native.decode_views(pool, *samples[:6], rows, out[:count], False)
            return len(index)

        return run

    turns = take_turns({"one": lambda: views(1), "many": lambda: views(1 + more)}, blocks)
    one, many = (1 / rate(turns.blocks[name]) for name in ("one", "many"))
    return 1 - (many - one) / more / one


def writing(
    name: str, m: Material, threads: int, *, blocks: int, chosen: list[str], table: Table
) -> None:
    """Measure a writer: originals to 500 px q90; with "lossless", photos that fit are copied, which
    FFCV cannot do.
    """
    options: dict = {"max_resolution": 500, "write_mode": "jpg", "jpeg_quality": 90}
    lossless = name != "write"
    if lossless and "transcode" not in {f.name for f in fields(WriteOptions)}:
        table.failed[name] = "our writer has no cfg.transcode"
        return
    source = ImageFolder(m.folder if lossless else m.originals)
    options |= {"subset": min(len(source), len(ImageFolder(m.originals)))}

    def make_ours() -> Run:
        more = {"transcode": "fit"} if lossless else {}
        return lambda: write_beton(source, m.root / "w", num_workers=threads, **more, **options)[
            "num_samples"
        ]

    def make_ffcv() -> Run:
        peers.need("ffcv")
        from matryoshka.data.ffcv_backend import write_with_ffcv

        return lambda: write_with_ffcv(source, m.root / "w", num_workers=threads, **options)[
            "num_samples"
        ]

    rivals = {"FFCV": make_ffcv} if "FFCV" in chosen else {}
    outcome = take_turns({OURS: make_ours} | rivals, blocks)
    table.add(name, threads, outcome, {"FFCV": WRITERS[name]})


def opening(folder: Path, samples: int, blocks: int, chosen: list[str], table: Table) -> None:
    path = folder / "many.beton"
    write_many(path, samples)
    rivals = ["FFCV"] if "FFCV" in chosen else []
    # A separate process, which imports the two readers only.
    program = [sys.executable, Path(__file__).with_name("opening.py"), path, str(blocks), *rivals]
    try:
        done = subprocess.run(program, capture_output=True, text=True, timeout=600, check=True)
    except (subprocess.TimeoutExpired, subprocess.CalledProcessError) as error:
        table.failed[OPEN] = str(error)
        return
    finally:
        path.unlink()
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    for peer in dict.fromkeys(row["peer"] for row in rows):
        values = {
            key: spread([row[key] for row in rows if row["peer"] == peer])
            for key in rows[0]
            if key != "peer"
        }
        table.rows.append(
            {"bench": "loader", "case": OPEN, "peer": peer, "samples": samples} | values
        )
        print(
            f"open {samples:,} samples: {peer:12} {values['cpu']['median']:.3f} s of CPU time, "
            f"{values['peak_mb']['median']:.0f} MB at most, {values['held_mb']['median']:.0f} MB "
            "held",
            flush=True,
        )
    if rivals and "FFCV" not in {row["peer"] for row in rows}:
        table.failed[f"FFCV ({OPEN})"] = f"missing: ffcv is not installed ({peers.INSTALL})"


if __name__ == "__main__":
    sys.exit(main())
