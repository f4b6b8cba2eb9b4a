"""Upstream's `pytorch_inference.py --retrieval`: features of database and queries as two arrays
each.

    <--retrieval_array_path><data set>_<val|train>_mrl<0|1>_e<0|1>_ff<D>-X.npy    float32 [N, D], not normalised
    <...>-y.npy       int64 [N, 1]; upstream's float16 holds no label above 2048
    <...>-meta.json   what they are of, as `matryoshka embed` writes it

val are the queries, train the database. The path is put before the names as it is, as upstream
does.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from matryoshka import config, distributed
from matryoshka.data import BetonFile, ImageFolder, open_dataset
from matryoshka.data.imagenet import FOLDERS, ImageNetError, wnids
from matryoshka.data.subset import Subset
from matryoshka.embeddings.reading import META, EmbeddingError, open_embeddings
from matryoshka.embeddings.writing import differences
from matryoshka.evaluation.embedding import (
    Job,
    check,
    embed,
    load,
)
from matryoshka.evaluation.saved_arrays import write_array

# --dataset of --retrieval: split, and where it lies below --data-root, the first that is there
SPLITS = {
    "1K": {"val": ("val", "val.beton"), "train": ("train", "train.beton")},
    "V2": {"val": FOLDERS["V2"]},
    "4K": {
        "val": ("imagenet4k_queries.beton", "imagenet4k_test"),
        "train": ("imagenet4k_database.beton", "imagenet4k_train"),
    },
}
NOT_FOR_RETRIEVAL = (
    "tta",
    "ood",
    "nesting_list",
    "output",
    "upstream_names",
    *(f"save_{kind}" for kind in ("logits", "softmax", "predictions", "gt")),
)


def retrieval(args: Any, tell: Callable[[str], None]) -> int:
    """Write the arrays of one --dataset, queries first. V2 has no database but 1K's.

    args: those of pytorch_inference.py. --random_sample_dim: so many images at random, the same in
    every run, of whatever has more. Goes on after a kill, as `matryoshka embed` does.
    """
    check(args)
    name = args.dataset.upper()
    if name not in SPLITS:
        raise ImageNetError(f"--dataset {args.dataset}: --retrieval knows {', '.join(SPLITS)}")
    if given := [flag for flag in NOT_FOR_RETRIEVAL if getattr(args, flag)]:
        raise config.ConfigError(
            f"--{given[0].replace('nesting_list', 'nesting-list')} is not for --retrieval"
        )
    stem = args.retrieval_array_path
    folder = Path(f"{stem}X").parent
    if not folder.is_dir():
        raise config.ConfigError(
            f"--retrieval_array_path {stem}: the folder {folder} does not exist; make it first"
        )
    found = {
        split: open_dataset(find(name, args.data_root, where))
        for split, where in SPLITS[name].items()
    }
    if "train" in found and found["train"].classes != found["val"].classes:
        raise ImageNetError(
            f"{found['train'].path}: its classes are not those of {found['val'].path}"
        )
    model = load(SimpleNamespace(**{**vars(args), "truncate_dim": None}))
    columns, head = model.dims[-1], model.spec.head_name
    own = SimpleNamespace(
        **{**vars(args), "truncate_dim": columns, "normalize": False, "dtype": "float32"}
    )
    with distributed.joined(args.device) as world:
        for split, dataset in found.items():
            data, labels = dataset, class_numbers(name, dataset)
            sample = random_rows(len(dataset), args.random_sample_dim)
            if sample is not None:
                data, labels = Subset(dataset, sample), labels[sample]
            job = Job(model, data, labels, own, world, tell)
            flags = f"mrl{int(head.startswith('mrl'))}_e{int(head == 'mrl-e')}_ff{columns}"
            target = f"{stem}{name}_{split}_{flags}"
            job.announce()
            if not there_already(target, job):
                folder = f"{target}-embeddings"
                embed(job, folder, not finished(folder, job))
                distributed.on_main(lambda target=target: publish(target), world)
            job.tell(f"written  {target}-X.npy {target}-y.npy")
    return 0


def find(name: str, root: str | Path, places: Sequence[str]) -> Path:
    for place in places:
        if (Path(root) / place).exists():
            return Path(root) / place
    raise ImageNetError(
        f"--data-root {root}: --retrieval --dataset {name} needs {' or '.join(places)} in it"
    )


def random_rows(count: int, wanted: int) -> np.ndarray | None:
    """`wanted` of 0 to count - 1 at random, int64, increasing; None for all of them."""
    if wanted >= count:
        return None
    stream = np.random.Philox(key=0).random_raw(count)  # NumPy promises it for ever
    return np.sort(np.argsort(stream, kind="stable")[:wanted])


def class_numbers(name: str, dataset: BetonFile | ImageFolder) -> np.ndarray:
    """Labels int64 [N]; of ImageNet-1K and V2 the class numbers 0 to 999, whatever the rank of a
    folder's name.
    """
    number = {wnid: label for label, wnid in enumerate(wnids())} if name != "4K" else {}
    if name == "V2":
        number |= {str(label): label for label in range(len(number))}
    names = dataset.classes or []
    strangers = [folder for folder in names if folder not in number]
    if name == "V2" and strangers:
        raise ImageNetError(
            f"{dataset.path}: {strangers[0]!r} is no class of V2, whose folders are 0 to 999"
        )
    if not names or strangers:
        return dataset.labels
    return np.array([number[folder] for folder in names], np.int64)[dataset.labels]


def there_already(target: str, job: Job) -> bool:
    try:
        stored = json.loads(Path(f"{target}-{META}").read_bytes())
    except (OSError, ValueError):
        return False
    arrays = all(Path(f"{target}-{kind}.npy").exists() for kind in "Xy")
    return arrays and isinstance(stored, dict) and not differences(stored, job.meta())


def finished(folder: str, job: Job) -> bool:
    """Whether these are the embeddings: of a process that was killed before it published them."""
    try:
        return not differences(open_embeddings(folder).meta, job.meta())
    except EmbeddingError:
        return False


def publish(target: str) -> None:
    """The arrays of the folder <target>-embeddings under upstream's names."""
    folder, meta = Path(f"{target}-embeddings"), Path(f"{target}-{META}")
    meta.unlink(missing_ok=True)  # it must never describe other arrays
    write_array(Path(f"{target}-y.npy"), np.asarray(open_embeddings(folder).y)[:, None])
    os.replace(folder / "X.npy", f"{target}-X.npy")
    os.replace(folder / META, meta)
    shutil.rmtree(folder)
