"""Logits, softmax, predictions and labels of an evaluation as files, in the data set's order for
any number of ranks.

    <data
    set>[-<folder>]_<run>-<checkpoint>_<head>_<dims>_<preprocessing>_<precision>[_tta]_<kind>.npy

logits, softmax: float32 [G, N, C]. predictions: int64 [G, N]. gt: int64 [N]. With `upstream`,
upstream's names and torch.save instead, and without the axis G for a fixed feature.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from matryoshka.distributed import World, gather
from matryoshka.evaluation.predict import Prediction
from matryoshka.files import write_atomically


def file_names(
    kinds: Sequence[str],
    head: str,
    dims: Sequence[int],
    checkpoint: str,
    dataset: str,
    variant: str,
    settings: Sequence[str],
    tta: bool,
    upstream: bool = False,
) -> dict[str, str]:
    """{kind: file name}. head: mrl, mrl-e or ff<width>. checkpoint: as --path says it. variant: the
    data's own name where that is not the usual one.

    settings: what else changes the numbers.
    """
    if upstream:
        shown = "sketch" if dataset == "Sketch" else dataset
        stem = f"mrl={head.startswith('mrl')}_efficient={head == 'mrl-e'}_dataset={shown}_tta={tta}"
        return {
            kind: f"gt_dataset={shown}.pth" if kind == "gt" else f"{stem}_{kind}.pth"
            for kind in kinds
        }
    path = Path(checkpoint)
    where = (
        f"{path.resolve().parent.name}-{path.stem}" if path.is_file() else checkpoint
    )  # every run has model.*
    words = [
        "-".join(filter(None, (dataset, _word(variant)))),
        _word(where),
        head,
        *([dims_word(dims)] if head.startswith("mrl") else []),
        *settings,
    ]
    return {kind: "_".join([*words, *(["tta"] if tta else []), f"{kind}.npy"]) for kind in kinds}


def _word(text: str) -> str:
    return re.sub(r"[^\w.=-]+", "-", text)[:80]


def dims_word(dims: Sequence[int]) -> str:
    """The prefixes, joined; of more than 16 the first, the last and their number."""
    return "-".join(map(str, dims)) if len(dims) <= 16 else f"{dims[0]}-{dims[-1]}x{len(dims)}"


class Collected:
    """What one rank has seen, on the CPU. Logits are kept only where `kinds` needs them: 4 bytes x
    G x N x C.
    """

    def __init__(self, kinds: Sequence[str]) -> None:
        self.kinds = tuple(kinds)
        self._index: list[Tensor] = []
        self._rows: dict[str, list[Tensor]] = {kind: [] for kind in ("logits", "predictions", "gt")}

    def add(self, prediction: Prediction) -> None:
        if not self.kinds:
            return
        self._index.append(prediction.index.cpu())
        if {"logits", "softmax"} & set(self.kinds):
            self._rows["logits"].append(prediction.logits.cpu())
        if "predictions" in self.kinds:
            self._rows["predictions"].append(prediction.logits.argmax(2).cpu())
        if "gt" in self.kinds:
            self._rows["gt"].append(prediction.labels.cpu()[None])

    def arrays(self, total: int, world: World) -> Iterator[tuple[str, np.ndarray]]:
        """(kind, array) on rank 0, in the data set's order, one at a time: an array is used again
        for the next.

        Every rank has to exhaust it.
        """
        if not self.kinds:
            return
        mine = torch.cat(self._index) if self._index else torch.empty(0, dtype=torch.int64)
        sizes = gather([len(mine)], world)
        order = _to_main(mine, sizes, world)
        for kind in ("gt", "predictions", "logits"):
            array = self._assembled(self._rows[kind], order, sizes, total, world)
            if array is None:
                continue
            if kind in self.kinds:
                yield kind, array[0] if kind == "gt" else array
            if kind == "logits" and "softmax" in self.kinds:
                for prefix in array:
                    prefix[...] = torch.from_numpy(prefix).softmax(1).numpy()
                yield "softmax", array

    @staticmethod
    def _assembled(
        rows: list[Tensor], order: Tensor | None, sizes: list[int], total: int, world: World
    ) -> np.ndarray | None:
        """[G, N, ...] on rank 0, from every rank's [G, b, ...]; None elsewhere, and where no rank
        has any.
        """
        like = next((shape for shape in gather([_layout(rows)], world) if shape), None)
        if like is None:
            return None
        prefixes, tail, dtype = like
        array = (
            np.empty((prefixes, total, *tail), torch.empty(0, dtype=dtype).numpy().dtype)
            if world.is_main
            else None
        )
        for g in range(prefixes):  # one prefix at a time: a tenth of the memory on the way
            mine = (
                torch.cat([batch[g] for batch in rows])
                if rows
                else torch.empty((0, *tail), dtype=dtype)
            )
            everything = _to_main(mine, sizes, world)
            if array is not None and everything is not None and order is not None:
                array[g, order.numpy()] = everything.numpy()
        return array


def _layout(rows: list[Tensor]) -> tuple[int, tuple[int, ...], torch.dtype] | None:
    return (len(rows[0]), tuple(rows[0].shape[2:]), rows[0].dtype) if rows else None


def _to_main(rows: Tensor, sizes: list[int], world: World) -> Tensor | None:
    """Every rank's `rows` [n, ...], one rank after the other, on rank 0's CPU; None on other ranks."""
    if not world.is_main:
        if len(rows):
            dist.send(rows.contiguous().to(world.device), 0)
        return None
    parts = [rows]
    for rank in range(1, world.size):
        if sizes[rank]:
            part = torch.empty(
                (sizes[rank], *rows.shape[1:]), dtype=rows.dtype, device=world.device
            )
            dist.recv(part, rank)
            parts.append(part.cpu())
    return torch.cat(parts)


def write_array(path: Path, array: np.ndarray) -> None:
    """One file, whole or not at all: .npy, or for .pth what torch.save writes, without an axis G of
    length 1.
    """
    header = io.BytesIO()
    if path.suffix == ".pth":
        single = array.ndim > 1 and len(array) == 1
        torch.save(torch.from_numpy(array[0] if single else array), header)
        write_atomically(path, header.getbuffer())
        return
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    write_atomically(path, header.getvalue(), np.ascontiguousarray(array).data.cast("B"))
