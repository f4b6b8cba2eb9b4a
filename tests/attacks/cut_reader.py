"""A program: reads a .beton in every way while another thread cuts it off, many times.

    python cut_reader.py FOLDER CASES SEED

Prints one JSON object: by way, how often the reader raised BetonError that names the file. Any
other exception, a reader that does not notice, and any signal end the program.
"""

import itertools
import json
import shutil
import sys
import threading
import time
from pathlib import Path
from random import Random

import numpy as np

from matryoshka.data import BetonError, BetonFile, CenterCrop, Loader, RandomResizedCrop
from matryoshka.data.resident import ResidentLoader
from matryoshka.data.torch_datasets import TorchDataset

LONGEST = 60  # seconds after which a reader should have noticed


def epochs(loader):
    for _ in itertools.count():
        yield from loader


def training(path):
    return epochs(Loader(path, 16, crop=RandomResizedCrop(32), num_workers=2))


def evaluation(path):
    return epochs(Loader(path, 16, order="sequential", crop=CenterCrop(64), on_error="skip"))


def paged(path):
    return epochs(Loader(path, 16, crop=RandomResizedCrop(32), in_memory=False))


def whole_pages(path):
    return epochs(Loader(path, 16, order="quasi_random", in_memory=False, crop=CenterCrop(64)))


def resident(path):
    with BetonFile(path) as data:
        for _ in itertools.count():
            yield ResidentLoader(data, 16, crop=CenterCrop(64))


def items(path):
    dataset = TorchDataset(path)
    for index in itertools.count():
        yield dataset[index % len(dataset)]


def field(path):
    with BetonFile(path) as data:
        for _ in itertools.count():
            yield data.field("label", np.arange(len(data)))


def opening(path):
    for _ in itertools.count():
        yield BetonFile(path).close()


WAYS = (training, evaluation, paged, whole_pages, resident, items, field, opening)


def main():
    folder, cases, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    rng = Random(seed)
    sources = sorted(folder.glob("*.beton"))
    refused = dict.fromkeys((way.__name__ for way in WAYS), 0)
    for case, way in itertools.product(range(cases), WAYS):
        path = folder / f"cut {way.__name__}"
        shutil.copy(sources[case % len(sources)], path)
        whole = path.stat().st_size
        with BetonFile(path) as data:
            images = int((data.offset + data.size).max())
        if way not in (paged, whole_pages):  # these read no table: they may lose it
            images = whole
        size = rng.choice((0, rng.randrange(images), rng.randrange(images), images - 1))
        cut = threading.Timer(
            rng.uniform(0, 0.05), lambda p=path, s=size: p.open("r+b").truncate(s)
        )
        cut.start()
        end = time.monotonic() + LONGEST
        try:
            for _ in way(path):
                assert time.monotonic() < end, f"{way.__name__} did not notice"
        except BetonError as error:
            refused[way.__name__] += str(path) in str(error)
        cut.join()
    print(json.dumps(refused))


if __name__ == "__main__":
    main()
