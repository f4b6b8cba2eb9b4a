"""Embed a data set with a model, as `matryoshka embed` does.

job = EmbeddingJob(model, data, EmbeddingOptions(checkpoint="model.safetensors"), world=world)
for line in job.summary():
    print(line)
embed(job, "embeddings/train", report=print)
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from matryoshka import __version__, devices, distributed
from matryoshka.checkpoint.adapter_file import adapted_model
from matryoshka.data import BetonFile, CenterCrop, ImageFolder, Loader
from matryoshka.data.order import rank_slice
from matryoshka.data.reader import printable
from matryoshka.data.resized_images import ResizedImages
from matryoshka.data.subset import Subset
from matryoshka.embeddings.reading import FORMAT, EmbeddingError, trunk_sha256
from matryoshka.embeddings.writing import EmbeddingWriter, Plan, RowWriter
from matryoshka.environment import git_state
from matryoshka.models import ModelError, NestedModel

FLUSH_SECONDS = 20.0  # a kill loses the work of at most this time and the batches being written
SHOWN_CLASSES = 5  # in the summary
SAMPLED_IMAGES = 64  # images whose bytes are part of a data set's fingerprint

Data = BetonFile | ImageFolder | Subset
Report = Callable[[str], None]


# ---------------------------------------------------------------- the job


@dataclass(frozen=True, kw_only=True)
class EmbeddingOptions:
    """Settings of an embedding run. meta.json records all but batch_size and workers."""

    checkpoint: str  # as the user named it
    adapter: str | None = None  # the file of the model's adapter
    preprocessing: str = "checkpoint"  # its name; the model has the values
    truncate_dim: int | None = None  # keep the first columns only; None: all
    normalize: bool = False  # to length 1, after truncation
    dtype: str = "float32"  # on disk: float32 or float16
    precision: str = "fp32"  # of the forward pass
    batch_size: int = 256  # images per process
    workers: int = 0  # decoding threads per process, 0: all cores


class EmbeddingJob:
    """A model, a data set and the options that together determine every number on disk."""

    def __init__(
        self,
        model: NestedModel,
        data: Data,
        options: EmbeddingOptions,
        *,
        world: distributed.World,
        labels: np.ndarray | None = None,
    ) -> None:
        """Move the model to the device. labels: int64 [N], default: the data set's own.

        ModelError for a truncate_dim that the model does not have.
        """
        columns = options.truncate_dim
        width = model.embedding_width
        if columns is not None and not 1 <= columns <= width:
            what = "the feature width of this model" if model.adapter is None else "the adapter's"
            raise ModelError(f"--truncate-dim {columns}: expected 1 to {width}, {what}")
        self.model = model.to(world.device).to(memory_format=torch.channels_last)
        self.data = data
        self.options = options
        self.world = world
        self.labels = data.labels if labels is None else labels
        self.columns: int = columns or width
        self.precision = devices.pick_precision(options.precision, world.device)

    @property
    def source(self) -> BetonFile | ImageFolder:
        """The data set behind a Subset."""
        source = self.data.dataset if isinstance(self.data, Subset) else self.data
        assert isinstance(source, BetonFile | ImageFolder)  # nothing makes subsets of subsets
        return source

    def source_indices(self, rows: np.ndarray) -> np.ndarray:
        """Positions in `source` of the rows of `data`."""
        return self.data.indices[rows] if isinstance(self.data, Subset) else rows

    def meta(self) -> dict[str, Any]:
        """The content of meta.json."""
        model = self.model
        data = self.data
        options = self.options
        preprocessing = {"name": options.preprocessing, **asdict(model.preprocessing)}
        return {
            "format": FORMAT,
            "rows": len(data),
            "columns": self.columns,
            "dtype": options.dtype,
            "normalised": bool(options.normalize),
            "model": self._model_entry(),
            # tuples become lists, as they are when meta.json is read and compared
            "preprocessing": json.loads(json.dumps(preprocessing)),
            "precision": self.precision,
            "data": {
                "path": str(data.path),
                "fingerprint": fingerprint(data, self.labels),
                "num_classes": data.num_classes,
                "classes": data.classes or None,  # images without classes have an empty list
            },
            "code": {"version": __version__, **(git_state() or {})},
        }

    def _model_entry(self) -> dict[str, Any]:
        model = self.model
        options = self.options
        entry = {
            "file": options.checkpoint,
            "weights_sha256": trunk_sha256(model),
            "arch": model.spec.arch,
            "head": model.spec.head_name,
            "dims": list(model.dims),
            "width": model.width,
        }
        if model.adapter is None:
            return entry
        return adapted_model(entry, model.adapter, str(options.adapter), options.checkpoint)

    def name(self, row: int) -> str:
        """The image's file relative to the data set; its number in a .beton file without names."""
        index = int(self.data.indices[row]) if isinstance(self.data, Subset) else row
        source = self.source
        if isinstance(source, ImageFolder):
            return source.name(index)
        names = (source.manifest or {}).get("names")
        return names[index] if names else str(index)

    def summary(self) -> list[str]:
        """Lines for the user: notes, the model, the data."""
        model = self.model
        data = self.data
        options = self.options
        lines = [f"note: {note}" for note in model.notes]
        longest = model.embedding_dims[-1]
        if longest < self.columns:
            lines.append(
                f"note: no classifier of this model was trained on columns {longest} to "
                f"{self.columns - 1}; --truncate-dim {longest} leaves them out"
            )
        lines.append(
            f"{options.checkpoint}: {model.spec.arch}, {model.spec.head_name}, {self.columns} of "
            f"{model.embedding_width} columns"
        )
        if model.adapter is not None:
            lines.append(f"{options.adapter}: {model.adapter.summary()}")
        classes = f"of {data.num_classes:,} classes"
        if not data.num_classes:
            classes = "without classes"
        if data.classes:  # the names reveal a folder given at the wrong level
            shown = ", ".join(map(printable, data.classes[:SHOWN_CLASSES]))
            more = ", ..." if len(data.classes) > SHOWN_CLASSES else ""
            classes += f" ({shown}{more})"
        lines.append(
            f"{data.path}: {len(data):,} images {classes} at {model.preprocessing.size} px"
        )
        return lines


def fingerprint(data: Data, labels: np.ndarray) -> str:
    """16 hex digits that change with the images or their labels.

    Hash of the lengths or names of all images, their labels, and the bytes of a few images.
    """
    digest = hashlib.sha256(f"{data.fingerprint():08x}".encode())
    digest.update(np.ascontiguousarray(labels, np.int64).data)
    # The lengths or names are known without reading the images. A few are read, to detect other
    # contents of the same length.
    sampled = np.unique(np.linspace(0, len(data) - 1, SAMPLED_IMAGES).astype(np.int64))
    if isinstance(data, Subset):
        source = data.dataset
        sampled = data.indices[sampled]
    else:
        source = data
    if isinstance(source, ImageFolder):
        for i in sampled.tolist():
            digest.update(source.read(i))
    else:
        (samples,) = source.fetch(sampled)
        for offset, size in zip(samples.offset.tolist(), samples.size.tolist(), strict=True):
            digest.update(np.ascontiguousarray(samples.data[offset : offset + size]).data)
        samples.check()
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------- the run


class RankResult(NamedTuple):
    """Result of one process."""

    rows: int
    seconds: float
    wait: float  # of these seconds, spent waiting for data


def embed(
    job: EmbeddingJob, output: str | Path, *, report: Report, overwrite: bool = False
) -> bool:
    """Fill the folder `output`; return False if it was already finished.

    Called by every process. Resumes a killed run. `report` receives lines on the main process.
    """
    world = job.world
    meta = job.meta()
    _loader(job, np.arange(len(job.data)))  # an error before the folder is made
    with EmbeddingWriter(output) as writer:
        plan = distributed.on_main(
            lambda: writer.begin(meta, job.labels, job.name, overwrite), world
        )
        if plan is None:
            if world.is_main:
                report(
                    f"{output}: already finished, {len(job.data):,} x {job.columns} "
                    f"{job.options.dtype}"
                )
            return False
        missing = sum(end - start for start, end in plan.missing_rows)
        if world.is_main and missing < plan.rows:
            report(f"{output}: resumes, {plan.rows - missing:,} of {plan.rows:,} rows are written")
        parts: list[RankResult] = distributed.gather([write_rows(job, output, plan)], world)
        distributed.on_main(writer.finish, world)
    if world.is_main:
        seconds = max(part.seconds for part in parts)
        wait = max(part.wait / part.seconds for part in parts)
        speed = sum(part.rows for part in parts) / seconds
        report(f"{speed:.0f} images/s, {100 * wait:.0f} % of the time waiting for data")
    return True


def rows_of_rank(
    missing_rows: Sequence[tuple[int, int]], batch: int, rank: int, world: int
) -> np.ndarray:
    """The rows of one rank, int64, increasing.

    Ranks share whole batches, so that the batches are those of a single process.
    """
    ranges = [np.arange(start, end) for start, end in missing_rows]
    rows = np.concatenate([np.arange(0), *ranges])  # arange(0): nothing may be missing
    batches = rank_slice(-(-len(rows) // batch), rank, world)
    return rows[batches.start * batch : batches.stop * batch]


def write_rows(job: EmbeddingJob, output: str | Path, plan: Plan) -> RankResult:
    """Compute and write this process's share of the missing rows; return when they are on disk."""
    options, world = job.options, job.world
    started = time.perf_counter()
    rows = rows_of_rank(plan.missing_rows, options.batch_size, world.rank, world.size)
    if not len(rows):
        seconds = max(time.perf_counter() - started, 1e-9)  # `embed` divides by it
        return RankResult(rows=0, seconds=seconds, wait=0.0)

    loader = _loader(job, rows)
    dtype = torch.float16 if plan.dtype == "float16" else torch.float32
    bar = tqdm(
        loader, leave=False, unit="batch", disable=not (world.is_main and sys.stderr.isatty())
    )
    with flushing(RowWriter(output, plan, world.rank)) as write, torch.inference_mode():
        for batch in bar:
            with devices.autocast(world.device, job.precision):
                features = job.model.encode(batch.images, options.truncate_dim, options.normalize)
            values = features.to(dtype).cpu().numpy()  # [B, D]
            batch_rows = rows[batch.index.cpu().numpy()]
            finite = np.isfinite(values).all(1)
            if not finite.all():
                raise _not_finite(job, int(batch_rows[finite.argmin()]), dtype)
            write(batch_rows, values)
    return RankResult(len(rows), time.perf_counter() - started, loader.wait)


def _loader(job: EmbeddingJob, rows: np.ndarray) -> Loader:
    """Batches of these rows in order; `index` of a batch is the position in `rows`."""
    options, preprocessing = job.options, job.model.preprocessing
    subset = Subset(job.source, job.source_indices(rows))
    settings: dict[str, Any] = {
        "order": "sequential",
        "num_workers": options.workers,
        "device": job.world.device,
    }
    if options.preprocessing == "upstream":
        return ResizedImages(subset, options.batch_size, **settings)
    crop = CenterCrop(preprocessing.size, preprocessing.ratio)
    return Loader(subset, options.batch_size, crop=crop, **settings)


def _not_finite(job: EmbeddingJob, row: int, dtype: torch.dtype) -> EmbeddingError:
    file = f"{job.data.path}: {job.name(row)}"
    if dtype is torch.float16:
        return EmbeddingError(
            f"{file}: its embedding is not finite in float16; use --dtype float32"
        )
    return EmbeddingError(f"{file}: its embedding is not finite; the checkpoint is broken")


@contextmanager
def flushing(writer: RowWriter) -> Iterator[Callable[[np.ndarray, np.ndarray], None]]:
    """RowWriter.write with a flush in the background every FLUSH_SECONDS and one at the end.

    A flush waits for the disk; the GPU must not wait with it.
    """
    with ThreadPoolExecutor(1, "matryoshka-flush") as background:
        flush: Future[None] | None = None
        last = time.perf_counter()

        def write(rows: np.ndarray, values: np.ndarray) -> None:
            nonlocal flush, last
            writer.write(rows, values)
            # At most one flush at a time; a slow disk makes them rarer, not more.
            is_due = time.perf_counter() - last >= FLUSH_SECONDS
            if is_due and (flush is None or flush.done()):
                if flush is not None:
                    flush.result()  # raises the flush's error
                flush = background.submit(writer.flush)
                last = time.perf_counter()

        try:
            yield write
            if flush is not None:
                flush.result()
            writer.flush()
        finally:
            background.shutdown(wait=True)
            writer.close()
