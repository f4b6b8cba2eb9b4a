"""FFCV's writer and loader behind our interfaces, for comparison.

    source = ImageFolder("imagenet/train")
    write_with_ffcv(source, "train.beton", max_resolution=500, write_mode="jpg")
    for batch in FFCVLoader("train.beton", 256, order="random", crop=RandomResizedCrop(224)):
        ...

Needs the extra `[ffcv]`, which installs on Python 3.11 only. An option that FFCV does not have is
an error, never ignored. No other file of the library depends on this one.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from functools import cached_property
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Any

import numpy as np
import torch

from matryoshka.data import layout
from matryoshka.data import writer as native
from matryoshka.data.crops import EVALUATION_CROP, CenterCrop, Crop, RandomResizedCrop
from matryoshka.data.fingerprint import Content
from matryoshka.data.layout import BetonError
from matryoshka.data.loader import Batch
from matryoshka.data.reader import BetonFile, manifest_path
from matryoshka.data.sources import decode_image, upright
from matryoshka.data.state import StateError, check_state, content_state, expected_content
from matryoshka.data.writer import Source, WriteOptions
from matryoshka.environment import available_cores, is_installed
from matryoshka.files import AtomicFile, as_text

# The options of FFCV's image field, then those that we implement around it (subset, EXIF, names).
_SUPPORTED_OPTIONS = {
    "max_resolution",
    "write_mode",
    "compress_probability",
    "smart_threshold",
    "jpeg_quality",
}
_SUPPORTED_OPTIONS |= {"subset", "seed", "exif_rotate", "names"}
_ORDERS = {"random": "RANDOM", "quasi_random": "QUASI_RANDOM", "sequential": "SEQUENTIAL"}


def check_installed(option: str) -> None:
    """BetonError with installation instructions if FFCV, which `option` needs, is missing."""
    if not is_installed("ffcv"):
        raise _not_installed(option, "which is not installed")


def _not_installed(option: str, reason: str) -> BetonError:
    return BetonError(
        f"{option} needs FFCV, {reason}: with Python 3.11, "
        "apt-get install g++ pkg-config libopencv-dev libturbojpeg0-dev && pip install '.[ffcv]'"
    )


def _import_ffcv(option: str) -> None:
    check_installed(option)
    try:
        import ffcv.loader  # noqa: F401
        import ffcv.writer  # noqa: F401
    except (ImportError, OSError) as error:  # ctypes raises OSError for a missing system library
        raise _not_installed(option, f"which cannot be imported here ({error})") from error


# ---------------------------------------------------------------- writing


def write_with_ffcv(
    source: Source,
    path: str | os.PathLike,
    *,
    num_workers: int = 0,
    chunk_size: int = 100,
    progress: Callable[[int, int], None] | None = None,
    **options,
) -> dict:
    """`write_beton` with FFCV's DatasetWriter: same arguments, same side file, worker processes.

    The manifest counts only jpg and raw. The order of the bytes depends on the timing of the
    workers. BetonError also for options that FFCV does not have, and for an image that cannot be
    read: FFCV cannot leave an image out.
    """
    path = Path(path)
    settings = WriteOptions(**options)
    for option in fields(settings):
        value = getattr(settings, option.name)
        if option.name not in _SUPPORTED_OPTIONS and value != option.default:
            raise BetonError(
                f"{option.name}={value}: FFCV does not have this option; use writer=native"
            )
    if settings.write_mode == "proportion" and settings.seed != 0:
        raise BetonError(
            f"seed={settings.seed}: writer=ffcv draws without a seed for write_mode=proportion; "
            "use "
            "writer=native"
        )
    native.check_arguments(path, num_workers, chunk_size, settings.subset, len(source))
    native.check_destination(path)
    # After the checks of the arguments: their messages do not depend on an installed FFCV.
    _import_ffcv("writer=ffcv")
    if settings.write_mode == "proportion" and settings.compress_probability is None:
        settings = replace(settings, compress_probability=0.5)
    indices = native.select_subset(source.labels, settings.subset, settings.seed)
    images = _Images(source, settings.exif_rotate)

    with AtomicFile(path) as file, AtomicFile(manifest_path(path)) as side:
        _run_writer(
            images,
            indices,
            settings,
            temporary=str(file.temporary),
            path=path,
            num_workers=num_workers,
            chunk_size=chunk_size,
            progress=progress,
        )
        # Opening validates the whole file before it gets its name.
        with BetonFile(file.temporary) as written:
            jpg = int((written.mode == layout.JPG).sum())
            content = {
                "num_samples": len(written),
                "num_bytes": file.temporary.stat().st_size,
                "classes": source.classes,
                "options": {"writer": "ffcv"} | asdict(settings),
                "counts": {"jpg": jpg, "raw": len(written) - jpg},
                **native.left_out(source),
            }
        if settings.names:
            content["names"] = [as_text(source.name(index)) for index in indices.tolist()]
        side.append(json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n")
        file.flush()
        side.flush()
        side.publish()
        file.publish()
    return content


class _Images:
    """The dataset that FFCV's workers read: (RGB, label).

    An exception in a worker would leave FFCV's writer waiting forever. So images that cannot be
    read are marked in `failed`, shared memory, and reported by the parent process.
    """

    def __init__(self, source: Source, exif_rotate: bool) -> None:
        self.source = source
        self.exif_rotate = exif_rotate
        self.failed = RawArray("b", len(source))

    def __len__(self) -> int:
        return len(self.source)

    def pixels(self, index: int) -> np.ndarray:
        image = decode_image(self.source.read(index))
        return upright(image.pixels, image.orientation) if self.exif_rotate else image.pixels

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        try:
            return self.pixels(index), int(self.source.labels[index])
        except Exception:  # the parent's `check` reports it
            self.failed[index] = 1
            return np.zeros((1, 1, 3), np.uint8), 0

    def check(self, path: Path) -> None:
        """BetonError naming the first image that failed."""
        failed = np.flatnonzero(np.frombuffer(self.failed, np.int8))
        if len(failed):
            first = int(failed[0])
            # Shared memory has room for a flag only: the image is read again for the reason.
            try:
                self.pixels(first)
                reason = "it could not be read"
            except Exception as error:
                reason = str(error)
            raise BetonError(
                f"{path}: not written: {self.source.name(first)}: {reason}; FFCV cannot leave "
                "an image out, use writer=native"
            )


def _run_writer(
    images: _Images,
    indices: np.ndarray,
    settings: WriteOptions,
    *,
    temporary: str,
    path: Path,
    num_workers: int,
    chunk_size: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Run FFCV's DatasetWriter, which writes to `temporary`; `path` is for messages.

    FFCV's writer prints a progress bar and waits forever for a worker that has died. Its module's
    `tqdm` and `sleep` are replaced meanwhile: by the caller's progress and by a check of the
    workers.
    """
    import ffcv.writer
    from ffcv.fields import IntField, RGBImageField

    image = RGBImageField(
        settings.write_mode,
        settings.max_resolution,
        settings.smart_threshold,
        int(settings.jpeg_quality),
        settings.compress_probability or 0,
    )
    page = layout.page_size_for(3 * settings.max_resolution**2)
    workers = num_workers or available_cores()
    writer = ffcv.writer.DatasetWriter(
        temporary, {"image": image, "label": IntField()}, page, workers
    )
    before = set(multiprocessing.active_children())
    started: set = set()

    class Bar:  # replaces the progress bar that FFCV prints
        done = 0

        def __init__(self, total: int) -> None:
            self.total = int(total)

        def update(self, n: int) -> None:
            self.done += int(n)
            if progress is not None:
                progress(self.done, self.total)

        def close(self) -> None:
            started.update(set(multiprocessing.active_children()) - before)

    def pause(seconds: float) -> None:
        # FFCV's loop sleeps here while it waits for its workers, also for a dead one
        started.update(set(multiprocessing.active_children()) - before)
        images.check(path)
        if any(worker.exitcode for worker in started):
            raise BetonError(
                f"{path}: not written: a worker of FFCV's writer failed (its error is above); "
                "free space?"
            )
        time.sleep(seconds)

    names = {"tqdm": Bar, "sleep": pause}
    original = {name: getattr(ffcv.writer, name) for name in names}
    try:
        for name, value in names.items():
            setattr(ffcv.writer, name, value)
        writer.from_indexed_dataset(images, indices.tolist(), chunksize=chunk_size)
    except BaseException:
        for worker in set(multiprocessing.active_children()) - before:
            worker.terminate()
        if getattr(writer, "metadata_sm", None) is not None:
            writer.metadata_sm.unlink()
        raise
    finally:
        for name, value in original.items():
            setattr(ffcv.writer, name, value)
        for worker in started | (set(multiprocessing.active_children()) - before):
            worker.join()
    images.check(path)


# ---------------------------------------------------------------- loading


class FFCVLoader:
    """FFCV's Loader with the interface of `Loader`: same arguments, same batches with the index.

    Differences: crops and flips come from FFCV's own generators, which `seed` does not control; a
    sample that cannot be decoded yields the old contents of its buffer; order="random" under
    several processes repeats some samples if the dataset does not divide evenly; only the size of
    `crop` may change between epochs; a run resumes at the start of an epoch only, because FFCV
    cannot skip batches. in_memory: FFCV's os_cache. If FFCV's thread dies, this raises BetonError,
    where FFCV itself waits forever.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        batch_size: int,
        *,
        order: str = "random",
        crop: Crop | Sequence[RandomResizedCrop] = EVALUATION_CROP,
        num_workers: int = 0,
        device: str | torch.device = "cpu",
        seed: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        world: int = 1,
        in_memory: bool = True,
    ) -> None:
        if order not in _ORDERS:
            raise ValueError(f"order={order!r}: expected one of {', '.join(_ORDERS)}")
        if isinstance(crop, Sequence):
            raise BetonError("crop: FFCV gives one view of an image, not a list; use loader=native")
        if os.path.isdir(path):
            raise BetonError(
                f"{os.fspath(path)}: is a folder; FFCV reads .beton files: write one, or use "
                "loader=native"
            )
        self.notes: list[str] = []
        self.dataset = BetonFile(path)  # FFCV checks nothing
        if batch_size % world:
            raise BetonError(
                f"batch_size={batch_size}: FFCV needs a multiple of the {world} processes"
            )
        if order == "quasi_random" and world > 1:
            raise BetonError(
                "order=quasi_random: FFCV supports it in one process only; use loader=native"
            )
        _import_ffcv("loader=ffcv")
        from ffcv.loader import Loader, OrderOption

        self.batch_size = batch_size
        self.device = torch.device(device)
        self.wait = 0.0
        self.skipped: list = []  # always empty: FFCV hands out old pixels for a broken sample
        self._batch = 0  # handed out in the running epoch
        self._crop = crop
        # FFCV's distributed sampler repeats samples to even out the ranks, which would change the
        # results of an evaluation
        part = None
        if order == "sequential":
            part = np.arange(rank, len(self.dataset), world).astype(np.uint64)
        self._loader = Loader(
            str(path),
            batch_size=batch_size // world,
            num_workers=min(num_workers or available_cores(), available_cores()),  # FFCV's limit
            os_cache=in_memory,
            order=getattr(OrderOption, _ORDERS[order]),
            distributed=world > 1 and order == "random",
            seed=seed,
            indices=part,
            pipelines=self._pipelines(),
            drop_last=drop_last,
        )

    def _pipelines(self) -> dict[str, Any]:
        """FFCV's pipelines, which end in tensors: on a CPU it hangs if a compiled operation follows
        `ToTensor`.
        """
        from ffcv.fields.basics import IntDecoder
        from ffcv.fields.decoders import CenterCropRGBImageDecoder, RandomResizedCropRGBImageDecoder
        from ffcv.pipeline import PipelineSpec
        from ffcv.transforms import RandomHorizontalFlip, ToDevice, ToTensor

        class Index(IntDecoder):
            """The position of each sample in the file, which FFCV does not hand out."""

            def generate_code(self) -> Callable:
                def decode(indices, destination, metadata, storage_state):
                    for i in range(len(indices)):
                        destination[i] = indices[i]
                    return destination[: len(indices)]

                return decode

        size = (self._crop.size, self._crop.size)
        flip = []
        if isinstance(self._crop, RandomResizedCrop):
            self._decoder = RandomResizedCropRGBImageDecoder(
                size, self._crop.scale, self._crop.ratio
            )
            flip = [RandomHorizontalFlip(self._crop.flip)] if self._crop.flip else []
        elif isinstance(self._crop, CenterCrop):
            self._decoder = CenterCropRGBImageDecoder(size, self._crop.ratio)
        else:
            raise BetonError(
                f"{type(self._crop).__name__}: FFCV does not have this crop; use loader=native"
            )

        def to_tensor() -> list:
            return [ToTensor(), *([] if self.device.type == "cpu" else [ToDevice(self.device)])]

        image = _named(self.dataset, layout.IMAGE, "image")
        label = _named(self.dataset, layout.INT, "label")
        index = "index" + "_" * 16  # longer than any name in a file
        pipelines: dict[str, Any] = {name: None for name, _ in self.dataset.fields}
        pipelines[image] = [self._decoder, *flip, *to_tensor()]
        pipelines[label] = [IntDecoder(), *to_tensor()]
        pipelines[index] = PipelineSpec(label, Index(), to_tensor())
        outputs = [name for name in pipelines if pipelines[name] is not None]
        self._positions = [outputs.index(name) for name in (image, label, index)]
        return pipelines

    @property
    def crop(self) -> Crop:
        return self._crop

    @crop.setter
    def crop(self, value: Crop) -> None:
        if (
            type(value) is not type(self._crop)
            or replace(value, size=self._crop.size) != self._crop
        ):
            raise BetonError(
                "only the size of the crops can change between epochs with loader=ffcv"
            )
        self._crop = value
        self._decoder.output_size = (value.size, value.size)

    @property
    def epoch(self) -> int:
        """Number of the next epoch."""
        return self._loader.next_epoch

    @epoch.setter
    def epoch(self, value: int) -> None:
        self._loader.next_epoch = value

    @cached_property
    def _content(self) -> Content:
        return self.dataset.content()

    def state_dict(self) -> dict[str, Any]:
        """The running epoch, the number of its batches that were handed out, and what tells the
        images from others.
        """
        position = {"epoch": self.epoch - bool(self._batch), "batch": self._batch}
        return position | content_state(self._content)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the state's epoch. StateError inside an epoch, because FFCV cannot skip
        batches, and for other images.
        """
        expected, note = expected_content(state, self.dataset, self._content)
        if "dataset" in state:
            check_state(state, expected, len(self), self.dataset.path)
        else:
            note = f"{self.dataset.path}: the run began with a version that noted nothing of it"
        if note:
            self.notes.append(note)
        if state["batch"]:
            raise StateError(
                f"{self.dataset.path}: FFCV's loader cannot resume after batch {state['batch']} of "
                f"epoch {state['epoch']}, only at the start of an epoch; use data.loader=native"
            )
        self.epoch = state["epoch"]
        self._batch = 0

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        self._batch = 0
        return self._batches(iter(self._loader))

    def _batches(self, epoch) -> Iterator[Batch]:
        try:
            while True:
                start = time.perf_counter()
                # FFCV's `next` blocks on this queue, also after its thread has died: poll the
                # thread meanwhile.
                while epoch.output_queue.empty():
                    if not epoch.is_alive() and epoch.output_queue.empty():
                        raise BetonError(
                            f"{self.dataset.path}: FFCV's loading thread died (its error is above)"
                        )
                    time.sleep(0.0005)
                try:
                    values = next(epoch)
                except StopIteration:
                    self._batch = 0
                    return
                finally:
                    self.wait += time.perf_counter() - start
                # copies, because FFCV reuses the memory for later batches
                images, labels, index = (values[k].clone() for k in self._positions)
                self._batch += 1
                yield Batch(images, labels.view(-1), index.view(-1))
        finally:
            epoch.close()


def _named(dataset: BetonFile, kind: int, preferred: str) -> str:
    """The field that `dataset` uses as image or label."""
    names = [name for name, t in dataset.fields if t == kind]
    if not names:
        raise BetonError(f"{dataset.path}: has no field that could be the {preferred}")
    return preferred if preferred in names else names[0]
