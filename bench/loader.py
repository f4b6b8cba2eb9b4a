"""Images per second of our loader beside torchvision's ImageFolder + DataLoader, on the same photos.

    python bench/loader.py [--photos FOLDER] [--threads 1 2] [--blocks 5] [--size 224]

Both read the same JPEGs (long side 500, quality 90), make a RandomResizedCrop, a flip and uint8 batches. The two
take turns, block by block; a block is one pass. One thread: images per second of CPU time, which a busy machine
disturbs less than wall time. More threads: wall time, with as many DataLoader workers as we have threads.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from PIL import Image
from record import append, spread
from sklearn.datasets import load_sample_images

from matryoshka.data import ImageFolder, Loader, RandomResizedCrop, write_beton

BATCH = 64


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--photos", type=Path, help="folder of class folders; default: pieces of scikit-learn's two photos")
    p.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    p.add_argument("--blocks", type=int, default=5)
    p.add_argument("--size", type=int, default=224)
    p.add_argument("--images", type=int, default=600, help="at least so many images in a block, by repetition")
    p.add_argument("--no-record", action="store_true", help="do not append to bench/results/")
    args = p.parse_args(argv)
    torch.set_num_threads(1)

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "photos"
        prepare(args.photos, folder, args.images)
        beton = Path(scratch) / "photos.beton"
        write_beton(ImageFolder(folder), beton, max_resolution=500, write_mode="jpg", jpeg_quality=90)
        kilobytes = sum(f.stat().st_size for f in folder.rglob("*.jpg")) / len(ImageFolder(folder)) / 1000
        print(f"{len(ImageFolder(folder))} photos, {kilobytes:.1f} kB each, RandomResizedCrop({args.size}) + flip")
        rows = []
        columns = f"{'threads':>7}  {'ratio':>6}  {'ours':>9}  {'DataLoader':>10}"
        print(f"{columns}   images/s (CPU time for 1 thread, else wall)")
        for threads in args.threads:
            clock = time.process_time if threads == 1 else time.perf_counter
            peers = {"matryoshka": ours(beton, args.size, threads), "torchvision": theirs(folder, args.size, threads)}
            rates: dict[str, list[float]] = {name: [] for name in peers}
            for block in range(args.blocks + 1):
                for name, run in peers.items():
                    start = clock()
                    images = run()
                    if block:  # the first one warms the page cache and the allocator up
                        rates[name].append(images / (clock() - start))
            ratio = statistics.median(a / b for a, b in zip(*rates.values(), strict=True))
            a, b = (statistics.median(r) for r in rates.values())
            print(f"{threads:7d}  {ratio:5.2f}x  {a:9.0f}  {b:10.0f}")
            for name, values in rates.items():
                rows.append(
                    {"bench": "loader", "peer": name, "threads": threads, "size": args.size, "kB": round(kilobytes, 1)}
                    | {"clock": clock.__name__, "ratio": round(ratio, 3), "images_per_s": spread(values)}
                )
        if not args.no_record:
            print(f"appended to {append('loader', rows).name}")
    return 0


def prepare(photos: Path | None, folder: Path, images: int) -> None:
    """An image folder of at least `images` JPEGs with a long side of at most 500 pixels, quality 90."""
    if photos is None:
        pieces = [Image.fromarray(im) for im in load_sample_images().images]
        sources = [im.crop((8 * k, 4 * k, 540 + 8 * k, 380 + 4 * k)) for im in pieces for k in range(10)]
    else:
        data = ImageFolder(photos)
        sources = [Image.open(data.path / data.name(i)).convert("RGB") for i in range(len(data))]
    for i in range(-(-images // len(sources)) * len(sources)):
        image = sources[i % len(sources)]
        if max(image.size) > 500:
            image = image.copy()
            image.thumbnail((500, 500))
        path = folder / f"class{i % 2}" / f"{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, quality=90)


def ours(path: Path, size: int, threads: int) -> Callable[[], int]:
    loader = Loader(path, BATCH, order="random", image=RandomResizedCrop(size), num_workers=threads)
    return lambda: sum(len(batch.images) for batch in loader)


def theirs(folder: Path, size: int, threads: int) -> Callable[[], int]:
    transforms = torchvision.transforms
    steps = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), transforms.PILToTensor()]
    data = torchvision.datasets.ImageFolder(str(folder), transforms.Compose(steps))
    workers = {} if threads == 1 else {"num_workers": threads, "persistent_workers": True}  # 1: in this process
    loader = torch.utils.data.DataLoader(data, BATCH, shuffle=True, **workers)
    return lambda: sum(len(images) for images, _ in loader)


if __name__ == "__main__":
    sys.exit(main())
