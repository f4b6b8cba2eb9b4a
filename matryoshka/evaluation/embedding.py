"""A data set through a model: the work of `matryoshka embed`."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from matryoshka import __version__, config, distributed
from matryoshka.checkpoint.published import load_any
from matryoshka.data import BetonFile, CenterCrop, ImageFolder, Loader
from matryoshka.data.order import share
from matryoshka.data.reader import printable
from matryoshka.data.resized_images import CROP, RESIZE, ResizedImages
from matryoshka.data.subset import Subset
from matryoshka.embeddings.reading import FORMAT, EmbeddingError, trunk_sha256
from matryoshka.embeddings.writing import Plan, RowWriter, Unfinished
from matryoshka.environment import git_state
from matryoshka.models import ModelError, NestedModel

FLUSH_SECONDS = (
    20.0  # at most so much work, and the batches being written, is done again after a kill
)
SHOWN = 5  # names of classes
LOOKED_AT = 64  # images whose bytes are part of a data set's fingerprint


def check(args: Any) -> None:
    """ConfigError for options that contradict each other."""
    if args.resolution is not None and args.preprocessing == "upstream":
        raise config.ConfigError(
            f"--resolution {args.resolution}: --preprocessing upstream always takes {CROP} pixels"
        )


def load(args: Any) -> NestedModel:
    """The model with the preprocessing that was asked for."""
    # the flags of upstream say --mrl --efficient for MRL-E; the checkpoint's own words are mrl and
    # efficient
    flags = {
        "mrl": args.mrl and not args.efficient,
        "efficient": args.efficient,
        "rep_size": args.rep_size,
    }
    model = load_any(args.path, **flags, old_ckpt=args.old_ckpt)
    given = model.preprocessing = replace(
        model.preprocessing, size=args.resolution or model.preprocessing.size
    )
    if args.preprocessing == "upstream":
        model.preprocessing = replace(given, size=CROP, ratio=CROP / RESIZE)
    elif args.preprocessing == "ffcv":
        model.preprocessing = replace(given, ratio=224 / 256)
    columns = args.truncate_dim
    if columns is not None and not 1 <= columns <= model.width:
        raise ModelError(
            f"--truncate-dim {columns}: expected 1 to {model.width}, the width of this model's "
            "features"
        )
    return model


Data = BetonFile | ImageFolder | Subset


class Job:
    """What is embedded, with which numbers: labels int64 [N], args as `parser` reads them."""

    def __init__(
        self,
        model: NestedModel,
        data: Data,
        labels: np.ndarray,
        args: Any,
        world: distributed.World,
        tell: Callable[[str], None],
    ) -> None:
        self.precision = distributed.pick_precision(args.precision, world.device)
        self.model = model.to(world.device).to(memory_format=torch.channels_last)
        self.data, self.labels, self.args, self.world = data, labels, args, world
        self.tell = tell if world.is_main else lambda _: None
        self.columns: int = args.truncate_dim or model.width

    @property
    def source(self) -> BetonFile | ImageFolder:
        return self.data.dataset if isinstance(self.data, Subset) else self.data

    def meta(self) -> dict[str, Any]:
        """What goes to meta.json."""
        model, data, code = self.model, self.data, git_state() or {}
        shown = {"name": self.args.preprocessing, **asdict(model.preprocessing)}
        return {
            "format": FORMAT,
            "rows": len(data),
            "columns": self.columns,
            "dtype": self.args.dtype,
            "normalised": bool(self.args.normalize),
            "model": {
                "file": self.args.path,
                "weights_sha256": trunk_sha256(model),
                "arch": model.spec.arch,
                "head": model.spec.head_name,
                "dims": list(model.dims),
                "width": model.width,
            },
            "preprocessing": json.loads(json.dumps(shown)),
            "precision": self.precision,
            "data": {
                "path": str(data.path),
                "fingerprint": fingerprint(data, self.labels),
                "num_classes": data.num_classes,
                "classes": data.classes,
            },
            "code": {"version": __version__, **code},
        }

    def name(self, index: int) -> str:
        """The image's file, relative to the data set; its number where a .beton does not know it."""
        i = int(self.data.indices[index]) if isinstance(self.data, Subset) else index
        if isinstance(self.source, ImageFolder):
            return self.source.name(i)
        names = (self.source.manifest or {}).get("names")
        return names[i] if names else str(i)

    def announce(self) -> None:
        model, last = self.model, self.model.dims[-1]
        for note in model.notes:
            self.tell(f"note: {note}")
        if last < self.columns:
            self.tell(
                f"note: no classifier of this model has seen columns {last} to {self.columns - 1}; "
                f"--truncate-dim {last} leaves them out"
            )
        self.tell(
            f"{self.args.path}: {model.spec.arch}, {model.spec.head_name}, {self.columns} of "
            f"{model.width} columns"
        )
        classes = f"{self.data.num_classes:,} classes"
        if names := self.data.classes:  # images that lie where nobody meant them show here
            classes += f" ({', '.join(map(printable, names[:SHOWN]))}{', ...' if len(names) > SHOWN else ''})"
        self.tell(
            f"{self.data.path}: {len(self.data):,} images of {classes} at "
            f"{model.preprocessing.size} px"
        )


def fingerprint(data: Data, labels: np.ndarray) -> str:
    """16 hex digits that change with the images or their labels: lengths or names of all, the bytes
    of a few.
    """
    digest = hashlib.sha256(f"{data.fingerprint():08x}".encode())
    digest.update(np.ascontiguousarray(labels, np.int64).data)
    few = np.unique(np.linspace(0, len(data) - 1, LOOKED_AT).astype(np.int64))
    where = data.indices[few] if isinstance(data, Subset) else few
    source = data.dataset if isinstance(data, Subset) else data
    if isinstance(source, ImageFolder):
        for i in where.tolist():
            digest.update(source.read(i))
    else:
        samples = source.fetch(where)
        for offset, size in zip(samples.offset.tolist(), samples.size.tolist(), strict=True):
            digest.update(np.ascontiguousarray(samples.data[offset : offset + size]).data)
    return digest.hexdigest()[:16]


class Done(NamedTuple):
    """One process's part of one start. seconds: of all; of them `wait` waiting for data."""

    rows: int
    seconds: float
    wait: float


def embed(job: Job, output: str | Path, overwrite: bool) -> bool:
    """Fill the folder `output`; False where it is full already. For every process; prints on the
    main one.
    """
    world = job.world
    meta = job.meta()
    with Unfinished(output) as unfinished:
        plan = distributed.on_main(
            lambda: unfinished.begin(meta, job.labels, job.name, overwrite), world
        )
        if plan is None:
            if world.is_main:
                job.tell(
                    f"{output}: finished already, {len(job.data):,} x {job.columns} "
                    f"{job.args.dtype}"
                )
            return False
        left = sum(end - start for start, end in plan.todo)
        if world.is_main and left < plan.rows:
            job.tell(f"{output}: goes on, {plan.rows - left:,} of {plan.rows:,} rows are there")
        parts: list[Done] = distributed.gather([write_rows(job, output, plan)], world)
        distributed.on_main(unfinished.finish, world)
    if world.is_main:
        seconds = max(part.seconds for part in parts)
        wait = max(part.wait / part.seconds for part in parts)
        speed = sum(part.rows for part in parts) / seconds
        job.tell(f"{speed:.0f} images/s, {100 * wait:.0f} % of the time waiting for data")
    return True


def rows_of(todo: Sequence[tuple[int, int]], batch: int, rank: int, world: int) -> np.ndarray:
    """This rank's rows, int64, one after the other, in whole batches: those that one process would
    make.
    """
    rows = np.concatenate([np.arange(0), *(np.arange(start, end) for start, end in todo)])
    part = share(-(-len(rows) // batch), rank, world)
    return rows[part.start * batch : part.stop * batch]


def write_rows(job: Job, output: str | Path, plan: Plan) -> Done:
    """This process's part of the missing rows, until they are on the disk."""
    args, model, world = job.args, job.model, job.world
    started = time.perf_counter()
    rows = rows_of(plan.todo, args.batch_size, world.rank, world.size)
    if not len(rows):
        return Done(0, max(time.perf_counter() - started, 1e-9), 0.0)
    options = {"order": "sequential", "num_workers": args.workers, "device": world.device}
    indices = job.data.indices[rows] if isinstance(job.data, Subset) else rows
    subset = Subset(job.source, indices)
    if args.preprocessing == "upstream":
        loader = ResizedImages(subset, args.batch_size, **options)
    else:
        crop = CenterCrop(model.preprocessing.size, model.preprocessing.ratio)
        loader = Loader(subset, args.batch_size, image=crop, **options)
    dtype = torch.float16 if plan.dtype == "float16" else torch.float32
    bar = tqdm(
        loader, leave=False, unit="batch", disable=not (world.is_main and sys.stderr.isatty())
    )
    with writing(RowWriter(output, plan, world.rank)) as write, torch.inference_mode():
        for batch in bar:
            with distributed.autocast(world.device, job.precision):
                features = model.encode(batch.images, args.truncate_dim, args.normalize)
            values = features.to(dtype).cpu().numpy()
            where = rows[batch.index.cpu().numpy()]
            finite = np.isfinite(values).all(1)
            if not finite.all():
                first = job.name(int(where[finite.argmin()]))
                remedy = (
                    " in float16; use --dtype float32"
                    if dtype is torch.float16
                    else "; the checkpoint is broken"
                )
                raise EmbeddingError(
                    f"{job.data.path}: {first}: its embedding has no finite numbers{remedy}"
                )
            write(where, values)
    return Done(len(rows), time.perf_counter() - started, loader.wait)


@contextmanager
def writing(writer: RowWriter) -> Iterator[Callable[[np.ndarray, np.ndarray], None]]:
    """RowWriter.write, with a flush in the background every FLUSH_SECONDS and one at the end."""
    with ThreadPoolExecutor(1, "matryoshka-flush") as background:
        flushing: Future[None] | None = None
        last = time.perf_counter()

        def write(rows: np.ndarray, values: np.ndarray) -> None:
            nonlocal flushing, last
            writer.write(rows, values)
            if time.perf_counter() - last >= FLUSH_SECONDS and (
                flushing is None or flushing.done()
            ):
                if flushing is not None:
                    flushing.result()  # its error, if it had one
                flushing, last = background.submit(writer.flush), time.perf_counter()

        try:
            yield write
            if flushing is not None:
                flushing.result()
            writer.flush()
        finally:
            background.shutdown(wait=True)
            writer.close()
