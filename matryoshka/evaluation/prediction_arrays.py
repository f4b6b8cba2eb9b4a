"""Saved logits, softmax or predictions and their labels, checked: ours by results.json, or any
files by name.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from matryoshka.data.imagenet import CLASSES, wnids
from matryoshka.evaluation.analysis import top_confidence
from matryoshka.evaluation.options import SCORES

MAX_CLASSES = 10_000_000


class ArrayError(ValueError):
    """Arrays that are not there or do not fit together; the message names the file or option and
    the remedy.
    """

    user_error = True


@dataclass(frozen=True)
class Arrays:
    """scores: float [G, N, C] logits or softmax, a memory map; None where there are only
    predictions, int64 [G, N].

    labels int64 [N]; class_names: of the C classes, where they are known; about: what produced
    them.
    """

    scores: np.ndarray | None
    are_logits: bool
    predictions: np.ndarray
    labels: np.ndarray
    dims: tuple[int, ...]
    num_classes: int
    class_names: list[str] | None
    about: dict[str, Any]

    def answers(self, images: np.ndarray | slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """(predictions int64 [G, n], confidence float32 [G, n]) of some images or all; NaN without
        scores.
        """
        if self.scores is None:
            said = self.predictions[:, images]
            return said, np.full(said.shape, np.nan, np.float32)
        return top_confidence(
            self.scores if isinstance(images, slice) else self.scores[:, images], self.are_logits
        )

    def logits(self, g: int, images: np.ndarray) -> np.ndarray:
        """float32 [n, C] of some images; the logarithm of softmax is as good."""
        assert self.scores is not None
        rows = np.asarray(self.scores[g][images], np.float32)
        return rows if self.are_logits else np.log(np.maximum(rows, np.finfo(np.float32).tiny))


def from_results(path: str | Path) -> Arrays:
    """The arrays that a results.json names, which lie beside it."""
    file = Path(path)
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        names, dims = dict(results["arrays"]), [int(d) for d in results["prefixes"]]
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        raise ArrayError(
            f"{file}: not the results.json of an evaluation; make one with eval --output"
        ) from None
    classes = results.get("class_names")
    if not all(isinstance(name, str) for name in names.values()) or not (
        classes is None
        or (isinstance(classes, list) and all(isinstance(name, str) for name in classes))
    ):
        raise ArrayError(
            f"{file}: damaged: arrays and class_names hold texts; make it again with eval --output"
        )
    kind = next((kind for kind in SCORES if kind in names), None)
    if kind is None or "gt" not in names:
        raise ArrayError(
            f"{file}: names no {'gt' if kind else 'logits'} array; evaluate with --save_logits "
            "--save_gt"
        )
    about = {
        key: results.get(key)
        for key in ("checkpoint", "arch", "head", "dataset", "data", "tta", "precision")
    }
    return _checked(
        kind, file.parent / names[kind], file.parent / names["gt"], dims, classes, about
    )


def from_files(given: Mapping[str, Any]) -> Arrays:
    """Of --logits, --softmax or --predictions with --gt and --dims."""
    kinds = [kind for kind in SCORES if given[kind]]
    if len(kinds) != 1 or not given["gt"] or not given["dims"]:
        raise ArrayError(
            "give --results, or one of --logits, --softmax and --predictions with --gt and --dims"
        )
    dims = list(given["dims"])
    about = {"scores": given[kinds[0]], "gt": given["gt"]}
    return _checked(kinds[0], Path(given[kinds[0]]), Path(given["gt"]), dims, None, about)


def _checked(
    kind: str, file: Path, gt: Path, dims: list[int], names: list[str] | None, about: dict[str, Any]
) -> Arrays:
    array, labels = _read(file), _read(gt)
    axes = 2 if kind == "predictions" else 3
    if array.ndim == axes - 1:  # upstream saves a fixed feature without the axis of prefixes
        array = array[None]
    numbers = np.integer if kind == "predictions" else np.floating
    if array.ndim != axes or not np.issubdtype(array.dtype, numbers) or not array.size:
        shape = "[prefixes, images]" if axes == 2 else "[prefixes, images, classes]"
        raise ArrayError(f"{file}: is {array.dtype} {list(array.shape)}, expected {kind} {shape}")
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ArrayError(
            f"{gt}: is {labels.dtype} {list(labels.shape)}, expected one integer label for each "
            "image"
        )
    if len(labels) != array.shape[1]:
        raise ArrayError(
            f"{gt}: has {len(labels)} labels, {file.name} {array.shape[1]} images; give those of "
            "one run"
        )
    if len(dims) != len(array):
        raise ArrayError(
            f"{file}: has {len(array)} prefixes, --dims {','.join(map(str, dims))} names "
            f"{len(dims)}"
        )
    if dims != sorted(set(dims)) or dims[0] < 1:
        raise ArrayError(
            f"--dims {','.join(map(str, dims))}: expected positive and increasing lengths"
        )
    labels = np.asarray(labels, np.int64)
    if kind in ("logits", "softmax") and kind != (really := _kind_of(array)):
        raise ArrayError(f"{file}: holds {really}, not {kind}; give it as --{really}")
    if kind == "predictions":
        if array.max() > MAX_CLASSES:
            raise ArrayError(
                f"{file}: has predictions of {array.max()}, more than {MAX_CLASSES:,} classes"
            )
        classes = len(names) if names else int(max(array.max(), labels.max())) + 1
        if not 0 <= array.min() <= array.max() < classes:
            raise ArrayError(f"{file}: has predictions outside of 0 to {classes - 1}")
    else:
        classes = array.shape[2]
    if not 0 <= labels.min() <= labels.max() < classes:
        raise ArrayError(
            f"{gt}: has labels outside of 0 to {classes - 1}; they belong to another array"
        )
    if names is None and classes == CLASSES:
        names = wnids()  # upstream's arrays have no names, and its models no other classes
    if names is not None and len(names) != classes:
        raise ArrayError(f"{file}: has {classes} classes, results.json names {len(names)}")
    scores = None if kind == "predictions" else array
    predictions = (
        np.asarray(array, np.int64) if kind == "predictions" else np.empty((0, 0), np.int64)
    )
    return Arrays(scores, kind == "logits", predictions, labels, tuple(dims), classes, names, about)


def _kind_of(array: np.ndarray) -> str:
    """softmax where some rows lie between 0 and 1 and sum to 1, else logits."""
    rows = np.asarray(array[:, :: max(1, array.shape[1] // 16)], np.float64)
    return "softmax" if rows.min() >= 0 and np.allclose(rows.sum(2), 1, atol=0.02) else "logits"


def _read(path: Path) -> np.ndarray:
    """A .npy file as a memory map; upstream's .pth, a tensor, with weights_only."""
    if not path.is_file():
        raise ArrayError(f"{path}: no such file")
    try:
        if path.suffix == ".npy":
            return np.lib.format.open_memmap(path, "r")
        tensor = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return tensor.numpy()
    except (
        ValueError,
        RuntimeError,
        EOFError,
        KeyError,
        AttributeError,
        TypeError,
        pickle.UnpicklingError,
    ):
        raise ArrayError(
            f"{path}: not a whole array; expected .npy, or a tensor that torch.save wrote"
        ) from None
