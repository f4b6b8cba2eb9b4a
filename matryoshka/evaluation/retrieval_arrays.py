"""Upstream's `pytorch_inference.py --retrieval`: features of the database and the queries as two
arrays each.

    <prefix><data set>_<val|train>_mrl<0|1>_e<0|1>_ff<D>-X.npy    float32 [N, D], not normalised
    <...>-y.npy       int64 [N, 1]; upstream's float16 cannot represent labels above 2048
    <...>-meta.json   the data and the model, as `matryoshka embed` writes it

val are the queries, train the database. <prefix> is --retrieval_array_path, prepended unchanged, as
upstream does.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from matryoshka import distributed
from matryoshka.data import BetonFile, ImageFolder, open_dataset
from matryoshka.data.imagenet import FOLDERS, ImageNetError, wnids
from matryoshka.data.subset import Subset
from matryoshka.embeddings.reading import META, EmbeddingError, open_embeddings
from matryoshka.embeddings.writing import differences
from matryoshka.evaluation.embedding import EmbeddingJob, Report, embed
from matryoshka.evaluation.saved_arrays import write_array
from matryoshka.files import read_regular
from matryoshka.models import NestedModel

# Data set -> split -> possible files or folders below --data-root; the first that exists is used.
# V2 consists of queries only, which are searched in 1K's database.
SPLITS = {
    "1K": {"val": ("val", "val.beton"), "train": ("train", "train.beton")},
    "V2": {"val": FOLDERS["V2"]},
    "4K": {
        "val": ("imagenet4k_queries.beton", "imagenet4k_test"),
        "train": ("imagenet4k_database.beton", "imagenet4k_train"),
    },
}

# ---------------------------------------------------------------- data


def open_splits(name: str, root: str | Path) -> dict[str, BetonFile | ImageFolder]:
    """{split: data set} of a data set of SPLITS, queries first.

    ImageNetError for a missing split and for splits with different classes.
    """
    if name not in SPLITS:
        raise ImageNetError(f"--dataset {name}: --retrieval supports {', '.join(SPLITS)}")
    datasets = {}
    for split, candidates in SPLITS[name].items():
        datasets[split] = open_dataset(_find_split(name, root, candidates))
    if "train" in datasets and datasets["train"].classes != datasets["val"].classes:
        raise ImageNetError(
            f"{datasets['train'].path}: its classes differ from those of {datasets['val'].path}"
        )
    return datasets


def _find_split(name: str, root: str | Path, candidates: Sequence[str]) -> Path:
    for candidate in candidates:
        if (Path(root) / candidate).exists():
            return Path(root) / candidate
    raise ImageNetError(
        f"--data-root {root}: --retrieval --dataset {name} needs {' or '.join(candidates)} in it"
    )


def sample(
    name: str, dataset: BetonFile | ImageFolder, max_images: int
) -> tuple[BetonFile | ImageFolder | Subset, np.ndarray]:
    """(data, labels int64 [N]): at most `max_images` images, with the labels of class_indices."""
    labels = class_indices(name, dataset)
    rows = random_rows(len(dataset), max_images)
    if rows is None:
        return dataset, labels
    return Subset(dataset, rows), labels[rows]


def random_rows(count: int, size: int) -> np.ndarray | None:
    """A random sample of `size` of 0 to count - 1, int64, increasing; None for all of them.

    The same in every run.
    """
    if size >= count:
        return None
    stream = np.random.Philox(key=0).random_raw(count)  # NumPy guarantees this stream for ever
    return np.sort(np.argsort(stream, kind="stable")[:size])


def class_indices(name: str, dataset: BetonFile | ImageFolder) -> np.ndarray:
    """Labels int64 [N]; for ImageNet-1K and V2 class indices 0 to 999, independent of which folders
    are present.
    """
    index = {} if name == "4K" else {wnid: label for label, wnid in enumerate(wnids())}
    if name == "V2":  # its class folders are numbers
        index |= {str(label): label for label in range(len(index))}
    names = dataset.classes or []
    unknown = [folder for folder in names if folder not in index]
    if name == "V2" and unknown:
        raise ImageNetError(
            f"{dataset.path}: {unknown[0]!r} is not a class of V2, whose folders are 0 to 999"
        )
    if not names or unknown:
        return dataset.labels
    return np.array([index[folder] for folder in names], np.int64)[dataset.labels]


# ---------------------------------------------------------------- arrays


def array_path(prefix: str, name: str, split: str, model: NestedModel) -> str:
    """Common beginning of the file names of one split."""
    head = model.spec.head_name
    mrl, efficient = int(head.startswith("mrl")), int(head == "mrl-e")
    return f"{prefix}{name}_{split}_mrl{mrl}_e{efficient}_ff{model.dims[-1]}"


def write_arrays(job: EmbeddingJob, target: str, *, report: Report) -> None:
    """Write <target>-X.npy, -y.npy and -meta.json unless they are complete.

    Called by every process. Resumes a killed run: the rows are first embedded into the folder
    <target>-embeddings.
    """
    # A finished split is skipped; an unfinished one continues in its folder.
    if not is_published(target, job):
        folder = f"{target}-embeddings"
        embed(job, folder, report=report, overwrite=not is_embedded(folder, job))
        distributed.on_main(lambda: publish(target), job.world)


def is_published(target: str, job: EmbeddingJob) -> bool:
    """Whether all files of `target` exist and are of this job."""
    try:
        stored = json.loads(read_regular(f"{target}-{META}"))
    except (OSError, ValueError):
        return False
    exist = all(Path(f"{target}-{kind}.npy").exists() for kind in "Xy")
    return exist and isinstance(stored, dict) and not differences(stored, job.meta())


def is_embedded(folder: str, job: EmbeddingJob) -> bool:
    """Whether `folder` has this job's embeddings, of a process that was killed before `publish`."""
    try:
        return not differences(open_embeddings(folder).meta, job.meta())
    except EmbeddingError:
        return False


def publish(target: str) -> None:
    """Move the arrays of the folder <target>-embeddings to upstream's names."""
    folder, meta = Path(f"{target}-embeddings"), Path(f"{target}-{META}")
    meta.unlink(missing_ok=True)  # it must never describe other arrays
    write_array(Path(f"{target}-y.npy"), np.asarray(open_embeddings(folder).y)[:, None])
    os.replace(folder / "X.npy", f"{target}-X.npy")
    os.replace(folder / META, meta)
    shutil.rmtree(folder)
