"""Embeddings of an encoder behind an adapter of `matryoshka adapt`, for indexes and searches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from matryoshka.checkpoint.adapter_file import adapted_model, load_adapter
from matryoshka.retrieval.tables import Table


class AdaptedRows:
    """Adapted rows behind an array's interface, computed when read: memory for a block only."""

    ndim = 2
    dtype = np.dtype(np.float32)

    def __init__(self, rows: np.ndarray, file: str) -> None:
        """AdapterError for a bad file, and rows of another width."""
        self._adapter = load_adapter(file)
        self._adapter.check_width(rows.shape[1], f"--adapter {file}: the embeddings have")
        self._rows = rows
        self.shape = (len(rows), self._adapter.width)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, part: Any) -> np.ndarray:
        """The rows of a slice or of an array of numbers; of a pair, the second selects columns."""
        rows, *columns = part if isinstance(part, tuple) else (part,)
        adapted = self._adapter.apply_to(self._rows[rows])
        return adapted[:, columns[0]] if columns else adapted

    def model(self, encoder: Mapping[str, Any], file: str, what: str) -> dict[str, Any]:
        """The entry `model` of meta.json for these rows, from that of the embeddings.

        AdapterError for an adapter that was fitted to another encoder.
        """
        return adapted_model(encoder, self._adapter, file, what)


def adapt_table(table: Table, file: str) -> Table:
    """A table behind the adapter of a file; an index, and embeddings that are behind this adapter
    already, stay as they are.

    AdapterError for another width, another encoder and embeddings behind another adapter.
    """
    if table.index is not None:
        return table
    stored = None if table.embeddings is None else table.embeddings.meta["model"]
    adapter = load_adapter(file)
    if stored is not None and stored.get("adapter", {}).get("sha256") == adapter.sha256():
        return table
    adapter.check_width(table.columns, f"--adapter {file}: {table.path} has")
    weights = None
    if stored is not None:
        weights = adapted_model(stored, adapter, file, str(table.path))["weights_sha256"]
    return replace(table, rows=adapter.apply_to(table.rows), weights=weights)
