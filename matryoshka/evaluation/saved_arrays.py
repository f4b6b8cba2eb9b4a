"""Save the logits, softmax, predictions and labels of an evaluation, in data set order for any
number of ranks.

    <data set>[-<folder>]_<run>-<checkpoint>_<head>_<dims>
    _<preprocessing>_<precision>[_tta]_<kind>.npy, in one word

logits, softmax: float32 [G, N, C]. predictions: int64 [G, N]. gt: int64 [N]. With `upstream`:
upstream's names and torch.save, without the axis G for a fixed feature.
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

# ---------------------------------------------------------------- names of files


def file_names(
    kinds: Sequence[str],
    *,
    head: str,
    dims: Sequence[int],
    checkpoint: str,
    dataset: str,
    variant: str,
    settings: Sequence[str],
    tta: bool,
    upstream: bool = False,
) -> dict[str, str]:
    """{kind: file name}.

    head: mrl, mrl-e or ff<width>. checkpoint: the value of --path. variant: the name of the data's
    folder if it is not the usual one. settings: everything else that changes the numbers.
    """
    if upstream:
        shown = "sketch" if dataset == "Sketch" else dataset
        stem = f"mrl={head.startswith('mrl')}_efficient={head == 'mrl-e'}_dataset={shown}_tta={tta}"
        names = {kind: f"{stem}_{kind}.pth" for kind in kinds}
        if "gt" in names:
            names["gt"] = f"gt_dataset={shown}.pth"
        return names

    # Everything that changes the numbers is in the name: two evaluations never share a file.
    path = Path(checkpoint)
    if path.is_file():  # the folder too: every run has a model.safetensors
        model_name = f"{path.resolve().parent.name}-{path.stem}"
    else:
        model_name = checkpoint
    words = [f"{dataset}-{_word(variant)}" if _word(variant) else dataset, _word(model_name), head]
    if head.startswith("mrl"):
        words.append(dims_word(dims))
    words += settings
    if tta:
        words.append("tta")
    return {kind: "_".join([*words, f"{kind}.npy"]) for kind in kinds}


def _word(text: str) -> str:
    """`text` as part of a file name."""
    return re.sub(r"[^\w.=-]+", "-", text)[:80]


def dims_word(dims: Sequence[int]) -> str:
    """The prefixes as part of a file name; more than 16 are shortened to first, last and count."""
    return "-".join(map(str, dims)) if len(dims) <= 16 else f"{dims[0]}-{dims[-1]}x{len(dims)}"


# ---------------------------------------------------------------- collecting over ranks


class ArrayCollector:
    """The predictions of one rank, on the CPU, to be assembled into arrays on rank 0.

    Keeps logits (4 bytes x G x N x C) only if `kinds` needs them.
    """

    def __init__(self, kinds: Sequence[str]) -> None:
        self.kinds = tuple(kinds)
        self._index: list[Tensor] = []
        # batches of logits [G, B, C], predictions [G, B], gt [1, B]
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
        """Yield (kind, array in data set order) on rank 0; `total` is N.

        Every rank must exhaust the iterator, because it communicates. Write an array before asking
        for the next one: softmax is computed in the memory of the logits.
        """
        if not self.kinds:
            return
        index = torch.cat(self._index) if self._index else torch.empty(0, dtype=torch.int64)
        sizes = gather([len(index)], world)
        order = _to_main(index, sizes, world)
        for kind in ("gt", "predictions", "logits"):
            array = _assemble(self._rows[kind], order, sizes, total=total, world=world)
            if array is None:
                continue
            if kind in self.kinds:
                yield kind, array[0] if kind == "gt" else array
            if kind == "logits" and "softmax" in self.kinds:
                # The caller has written the logits: see above.
                for prefix in array:
                    prefix[...] = torch.from_numpy(prefix).softmax(1).numpy()
                yield "softmax", array


def _assemble(
    rows: list[Tensor], order: Tensor | None, sizes: list[int], *, total: int, world: World
) -> np.ndarray | None:
    """[G, N, ...] on rank 0, from the batches [G, b, ...] of every rank.

    order: the positions of all rows in the data set. None on other ranks, and if no rank has rows.
    """
    # A rank without images, which may be rank 0, learns the shape from the others.
    layouts = gather([_layout(rows)], world)
    layout = next((found for found in layouts if found), None)
    if layout is None:
        return None
    prefixes, tail, dtype = layout
    array = None
    if world.is_main:
        array = np.empty((prefixes, total, *tail), torch.empty(0, dtype=dtype).numpy().dtype)

    for g in range(prefixes):  # one prefix at a time: a G-th of the memory in transit
        if rows:
            own = torch.cat([batch[g] for batch in rows])
        else:
            own = torch.empty((0, *tail), dtype=dtype)
        gathered = _to_main(own, sizes, world)
        if array is not None and gathered is not None and order is not None:
            array[g, order.numpy()] = gathered.numpy()
    return array


def _layout(rows: list[Tensor]) -> tuple[int, tuple[int, ...], torch.dtype] | None:
    """(G, shape of one row, type); None on a rank without rows."""
    return (len(rows[0]), tuple(rows[0].shape[2:]), rows[0].dtype) if rows else None


def _to_main(rows: Tensor, sizes: list[int], world: World) -> Tensor | None:
    """Concatenate the `rows` [n, ...] of every rank on rank 0's CPU; None on other ranks."""
    if not world.is_main:
        if len(rows):
            dist.send(rows.contiguous().to(world.device), 0)
        return None
    parts = [rows]
    for rank in range(1, world.size):
        if sizes[rank]:
            shape = (sizes[rank], *rows.shape[1:])
            part = torch.empty(shape, dtype=rows.dtype, device=world.device)
            dist.recv(part, rank)
            parts.append(part.cpu())
    return torch.cat(parts)


# ---------------------------------------------------------------- writing


def write_array(path: Path, array: np.ndarray) -> None:
    """Write one file atomically: .npy, or torch.save for .pth, without an axis G of length 1."""
    header = io.BytesIO()
    if path.suffix == ".pth":
        single = array.ndim > 1 and len(array) == 1
        torch.save(torch.from_numpy(array[0] if single else array), header)
        write_atomically(path, header.getbuffer())
        return
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(array))
    write_atomically(path, header.getvalue(), np.ascontiguousarray(array).data.cast("B"))
