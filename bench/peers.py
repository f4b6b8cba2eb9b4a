"""The loaders of the loader bench: ours, FFCV, DALI, torchvision, simplejpeg + cv2.

Every function prepares a loader and returns its Run. All produce uint8 batches: a random crop of a
photo, or its centre, resized to `size` and flipped; for small images, a window of the padded image.
A peer that is not installed raises Missing.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torchvision
from material import SMALL, Material
from measure import Missing, Run
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from matryoshka.data import BetonFile, CenterCrop, ImageFolder, Loader, RandomResizedCrop, _native
from matryoshka.data.crops import PadCrop
from matryoshka.data.layout import Samples

INSTALL = "make bench-peers"
PASSES = 3  # over the photos in one epoch of FFCV, which allocates all its buffers at every epoch


class Task(NamedTuple):
    """crop: random, center, pad, or two random ones of every image ("two views"). size: pixels per
    side of the output. file: for our loader and FFCV's.
    """

    crop: str
    size: int
    batch: int
    material: Material
    file: Path


def need(*modules: str) -> None:
    for module in modules:
        try:
            is_installed = find_spec(module) is not None
        except ModuleNotFoundError:  # of its parent package
            is_installed = False
        if not is_installed:
            raise Missing(f"{module} is not installed ({INSTALL})")


def ours(
    task: Task, threads: int, file: Path | None = None, loader_class: type[Loader] = Loader
) -> Run:
    crops = {
        "random": RandomResizedCrop,
        "center": CenterCrop,
        "pad": PadCrop,
        "two views": lambda size: [RandomResizedCrop(size)] * 2,
    }
    order = "sequential" if task.crop == "center" else "random"
    loader = loader_class(
        file or task.file,
        task.batch,
        order=order,
        crop=crops[task.crop](task.size),
        num_workers=threads,
    )
    return lambda: sum(len(batch.labels) for batch in loader)


class ViewByView(Loader):
    """Our loader with a decode for every view."""

    def _decode(
        self, samples: Samples, crops: np.ndarray, views: list[np.ndarray], exact: bool
    ) -> np.ndarray:
        status = [
            super(ViewByView, self)._decode(samples, crops[v : v + 1], [view], exact)
            for v, view in enumerate(views)
        ]
        return np.max(status, axis=0)


def ffcv(task: Task, threads: int, file: Path | None = None) -> Run:
    """FFCV's own Loader, without the copies that matryoshka.data.ffcv_backend makes."""
    need("ffcv")
    sys.unraisablehook = _without_numba
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.decoders import CenterCropRGBImageDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder
    from ffcv.loader import Loader as FFCVLoader
    from ffcv.loader import OrderOption
    from ffcv.transforms import RandomHorizontalFlip, RandomTranslate, ToTensor

    size = (task.size, task.size)
    image = {
        "random": lambda: [RandomResizedCropRGBImageDecoder(size), RandomHorizontalFlip()],
        "center": lambda: [CenterCropRGBImageDecoder(size, 224 / 256)],
        "pad": lambda: [
            SimpleRGBImageDecoder(),
            RandomHorizontalFlip(),
            RandomTranslate(padding=4),
        ],
    }[task.crop]()
    path = file or task.file
    with BetonFile(path) as data:
        several = np.tile(np.arange(len(data), dtype=np.uint64), PASSES)
    loader = FFCVLoader(
        str(path),
        task.batch,
        threads,
        indices=several,
        order=OrderOption.SEQUENTIAL if task.crop == "center" else OrderOption.RANDOM,
        pipelines={"image": [*image, ToTensor()], "label": [IntDecoder(), ToTensor()]},
        drop_last=False,
    )

    def run() -> int:
        epoch = iter(loader)
        images = 0
        while True:
            # FFCV waits forever if its thread has died
            while epoch.output_queue.empty() and epoch.is_alive():
                epoch.join(0.002)
            if epoch.output_queue.empty():
                raise RuntimeError("its loading thread died")
            batch = next(epoch, None)
            if batch is None:
                return images
            images += len(batch[0])

    return run


def _without_numba(unraisable: Any) -> None:
    """Hide numba's `KeyError in finalize`, a harmless error when a loader of FFCV is deleted."""
    if not isinstance(unraisable.exc_value, KeyError) or "finalize" not in repr(unraisable.object):
        sys.__unraisablehook__(unraisable)


def dali(task: Task, threads: int) -> Run:
    """CPU operators, without prefetching, whose work would happen during the others' blocks."""
    need("nvidia.dali")
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(
        batch_size=task.batch,
        num_threads=threads,
        device_id=None,
        exec_async=False,
        exec_pipelined=False,
        prefetch_queue_depth=1,
        seed=0,
    )
    def pipeline():
        data, labels = fn.readers.file(
            file_root=str(task.material.folder),
            random_shuffle=task.crop == "random",
            name="files",
            prefetch_queue_depth=1,
        )
        if task.crop == "random":
            images = fn.decoders.image_random_crop(
                data, device="cpu", random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3]
            )
            images = fn.resize(images, size=[task.size, task.size], interp_type=types.INTERP_LINEAR)
            images = fn.flip(images, horizontal=fn.random.coin_flip())
        else:
            images = fn.resize(
                fn.decoders.image(data, device="cpu"), resize_shorter=task.size * 256 / 224
            )
            images = fn.crop(images, crop=(task.size, task.size))
        return images, labels

    built: Any = pipeline()
    built.build()
    batches = -(-built.epoch_size("files") // task.batch)

    def run() -> int:
        return sum(len(built.run()[0]) for _ in range(batches))

    return run


def _data_loader(data: Any, task: Task, threads: int) -> Run:
    workers: dict[str, Any] = (
        {} if threads == 1 else {"num_workers": threads, "persistent_workers": True}
    )
    loader = torch.utils.data.DataLoader(data, task.batch, shuffle=task.crop != "center", **workers)
    return lambda: sum(len(images) for images, _ in loader)


def torchvision_pil(task: Task, threads: int) -> Run:
    """ImageFolder + DataLoader; in this process for one thread."""
    steps = torchvision.transforms
    crop = {
        "random": [steps.RandomResizedCrop(task.size), steps.RandomHorizontalFlip()],
        "center": [steps.Resize(task.size * 256 // 224), steps.CenterCrop(task.size)],
        "pad": [steps.RandomCrop(SMALL, padding=4), steps.RandomHorizontalFlip()],
    }[task.crop]
    transform = steps.Compose([*crop, steps.PILToTensor()])
    if task.crop == "pad":
        return _data_loader(_InMemory(task.material.pieces, transform), task, threads)
    return _data_loader(
        torchvision.datasets.ImageFolder(str(task.material.folder), transform), task, threads
    )


class _InMemory(torch.utils.data.Dataset):
    """torchvision's CIFAR10, without its download."""

    def __init__(self, pixels: np.ndarray, transform: Callable) -> None:
        self.pixels = pixels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), index % 2


def torchvision_v2(task: Task, threads: int) -> Run:
    """io.decode_jpeg and transforms on tensors."""
    antialias = {"interpolation": InterpolationMode.BILINEAR, "antialias": True}
    transform = {
        "random": v2.Compose(
            [v2.RandomResizedCrop(task.size, **antialias), v2.RandomHorizontalFlip()]
        ),
        "center": v2.Compose(
            [v2.Resize(task.size * 256 // 224, **antialias), v2.CenterCrop(task.size)]
        ),
    }[task.crop]

    warnings.filterwarnings("ignore", "The image decoding", DeprecationWarning)

    def load(path: str) -> Any:
        return torchvision.io.decode_jpeg(
            torchvision.io.read_file(path), torchvision.io.ImageReadMode.RGB
        )

    data = torchvision.datasets.ImageFolder(str(task.material.folder), transform, loader=load)
    return _data_loader(data, task, threads)


def simplejpeg_cv2(task: Task, threads: int) -> Run:
    """Full decode, crop, INTER_AREA, flip, on threads."""
    need("simplejpeg", "cv2")
    import cv2
    import simplejpeg

    # The thread pool below has the parallelism; OpenCV's own threads would add to it.
    cv2.setNumThreads(0)
    data = ImageFolder(task.material.folder)
    out = np.empty((task.batch, task.size, task.size, 3), np.uint8)
    pool = ThreadPoolExecutor(threads)

    def load(slot: int, index: int) -> None:
        pixels = simplejpeg.decode_jpeg(data.read(index), fastdct=True)
        height, width = pixels.shape[:2]
        if task.crop == "random":
            x, y, w, h, flip = random_crop(width, height)
        else:
            w = h = int(224 / 256 * min(width, height))
            x = (width - w) // 2
            y = (height - h) // 2
            flip = False
        resized = cv2.resize(
            pixels[y : y + h, x : x + w], (task.size, task.size), interpolation=cv2.INTER_AREA
        )
        out[slot] = resized[:, ::-1] if flip else resized

    def run() -> int:
        order = np.random.permutation(len(data)).tolist()  # noqa: NPY002
        for start in range(0, len(order), task.batch):
            batch = order[start : start + task.batch]
            list(pool.map(load, range(len(batch)), batch))
        return len(order)

    return run


def random_crop(width: int, height: int) -> tuple[int, int, int, int, bool]:
    """(x, y, w, h, flip) as torchvision's RandomResizedCrop draws them."""
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1)
        aspect = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
        w = round((area * aspect) ** 0.5)
        h = round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            return (
                random.randint(0, width - w),
                random.randint(0, height - h),
                w,
                h,
                random.random() < 0.5,
            )
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side, side, random.random() < 0.5


def bare_decode(file: Path) -> Run:
    """Full decodes by libjpeg-turbo and nothing else."""
    with BetonFile(file) as data:
        (samples,) = data.fetch(np.arange(len(data)))
        streams = [
            samples.data[at : at + size].tobytes()
            for at, size in zip(samples.offset.tolist(), samples.size.tolist(), strict=True)
        ]

    def run() -> int:
        for stream in streams:
            _native.decode(stream)
        return len(streams)

    return run
