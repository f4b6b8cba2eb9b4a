"""Measure what the checksums of a checkpoint cost: CPU and wall time of writing and reading.

    OMP_NUM_THREADS=1 python bench/checkpoints.py --megabytes 300 --turns 9

`plain` is the same file with the checksum of the data alone, as before headers had one. Each turn
writes and reads both; the table has medians and the overhead in percent. With --beton FILE, the
fingerprint of a data set is measured, too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import torch

from matryoshka import tensor_files
from matryoshka.data import BetonFile
from matryoshka.files import write_atomically
from matryoshka.training import snapshot
from matryoshka.training.snapshot import Snapshots

TENSORS = 300  # of a ResNet-50 with its optimizer there are about as many


def parts_of(path: Path) -> tuple[dict, str, bytes]:
    """(entries, metadata, data) of a file."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    entries = json.loads(content[8:end])
    own = entries.pop("__metadata__")
    return entries, own[tensor_files.KEY], content[end:]


def write_plain(path: Path, entries: dict, metadata: str, data: bytes) -> None:
    """As `Snapshots` wrote checkpoints before their headers had a checksum."""
    own = {"matryoshka": metadata, "crc32": f"{zlib.crc32(data):08x}"}
    header = json.dumps({"__metadata__": own, **entries}).encode()
    header += b" " * (-len(header) % 8)
    write_atomically(path, len(header).to_bytes(8, "little"), header, data)


def measured(work: Callable[[], object]) -> tuple[float, float]:
    """(CPU seconds, seconds)."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--megabytes", type=int, default=300)
    p.add_argument("--turns", type=int, default=9)
    p.add_argument("--beton", type=Path)
    args = p.parse_args(argv)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        numbers = args.megabytes * 1_000_000 // 4 // TENSORS
        tensors = {f"model.layer{k}.weight": torch.randn(numbers) for k in range(TENSORS)}
        snapshots = Snapshots(folder, {"config": {}}, keep_last=1)
        snapshots.save(0, tensors, {})
        snapshots.wait()
        entries, metadata, data = parts_of(folder / "last.safetensors")
        sealed, plain = folder / "sealed.safetensors", folder / "plain.safetensors"

        def write_sealed() -> None:
            write_atomically(sealed, tensor_files.encode_header(metadata, entries, data), data)

        works: dict[str, Callable[[], object]] = {
            "write plain": lambda: write_plain(plain, entries, metadata, data),
            "write sealed": write_sealed,
            "read plain": lambda: tensor_files.read(plain).tensors(),
            "read sealed": lambda: snapshot.read(sealed),
        }
        times: dict[str, list[tuple[float, float]]] = {key: [] for key in works}
        for _ in range(args.turns):
            for key, work in works.items():
                times[key].append(measured(work))
    for kind in ("write", "read"):
        medians = {}
        for key in (f"{kind} plain", f"{kind} sealed"):
            medians[key] = [statistics.median(column) for column in zip(*times[key], strict=True)]
            cpu, wall = medians[key]
            print(f"{key:13} {1000 * cpu:8.1f} ms CPU {1000 * wall:8.1f} ms")
        before, now = medians[f"{kind} plain"][0], medians[f"{kind} sealed"][0]
        print(f"{kind} overhead {100 * (now / before - 1):+.2f} % CPU")
    if args.beton:
        opened = BetonFile(args.beton)
        found = [measured(opened.content) for _ in range(args.turns)]
        cpu, wall = (1000 * statistics.median(column) for column in zip(*found, strict=True))
        print(f"fingerprint of {len(opened):,} samples {cpu:.1f} ms CPU {wall:.1f} ms")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
