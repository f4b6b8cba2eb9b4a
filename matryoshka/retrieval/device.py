"""Exhaustive and funnel search on a GPU, or any other torch device, in plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from matryoshka.arrays import as_float32
from matryoshka.retrieval.exact import stable_top_k
from matryoshka.retrieval.hits import Hits, RetrievalError, as_rows, check_bits, get_bits
from matryoshka.retrieval.params import SearchParams

ROWS = 1 << 18  # rows per matrix product
TILE = 1 << 28  # numbers in the largest intermediate: 1 GB of float32


class DeviceSearcher:
    """Search engine for rows in device memory; shortlists are exhaustive for every `params.index`.

        DeviceSearcher(rows, "cuda").search(queries, SearchParams.funnel("exact", dims, ks))

    rows: float16 or float32 [N, D], kept in their type: 5.2 GB for 1.28 M x 2048 float16. Each
    prefix length adds N float32 norms.
    """

    def __init__(self, rows: np.ndarray, device: str | torch.device = "cuda") -> None:
        rows = as_rows(rows, 1, "database")
        if not len(rows):
            raise RetrievalError("database: is empty; a search needs rows")
        self.device = torch.device(device)
        dtype = torch.from_numpy(np.empty(0, rows.dtype)).dtype  # torch's name of NumPy's type
        self.rows = torch.empty(rows.shape, dtype=dtype, device=self.device)
        # Block by block: a memory map of 5 GB would otherwise be in host memory as well.
        for first in range(0, len(rows), ROWS):
            self.rows[first : first + ROWS] = torch.from_numpy(
                np.array(rows[first : first + ROWS])
            ).to(self.device)
        self._scales: dict[int, torch.Tensor] = {}

    def _scale(self, dim: int) -> torch.Tensor:
        """1 / norm of each prefix, float32 [N]; 0 for zero vectors, NaN where not finite."""
        if dim not in self._scales:
            length = torch.cat(
                [part[:, :dim].float().norm(dim=1) for part in self.rows.split(ROWS)]
            )
            scale = torch.where(length > 0, 1 / length, torch.zeros_like(length))
            self._scales[dim] = torch.where(
                length.isfinite(), scale, torch.full_like(length, torch.nan)
            )
        return self._scales[dim]

    def search(
        self,
        queries: Any,
        params: SearchParams,
        *,
        k: int | None = None,
        deleted: np.ndarray | None = None,
    ) -> Hits:
        """As Searcher.search with index "exact".

        The shortlist multiplies numbers of the rows' own type and adds in float32, the stages
        compute in float32.
        """
        if k is not None:
            params = params.with_k(k)
        queries = as_rows(queries)
        for what, width in (("database", self.rows.shape[1]), ("queries", queries.shape[1])):
            if params.widest > width:
                raise RetrievalError(
                    f"{what}: has {width} dimensions, the search needs a prefix of {params.widest}"
                )
        keep = params.stages[-1].keep if params.stages else params.k
        out = Hits(
            np.full((len(queries), keep), -1, np.int64),
            np.full((len(queries), keep), -np.inf, np.float32),
        )
        deleted_rows = None  # bool [N] on the device
        if deleted is not None:
            check_bits(deleted, len(self.rows))
            deleted_rows = torch.from_numpy(get_bits(deleted, 0, len(self.rows))).to(self.device)
        # Per query: scores of ROWS rows in the shortlist, gathered prefixes in the stages.
        largest = max([ROWS, *(params.k * stage.dim for stage in params.stages)])
        at_once = max(1, TILE // largest)
        for first in range(0, len(queries), at_once):
            part = np.ascontiguousarray(as_float32(queries[first : first + at_once]))
            on_device = torch.from_numpy(part).to(self.device)
            ids, scores = self._shortlist(on_device, params, deleted_rows)
            for stage in params.stages:
                ids, scores = self._stage(on_device, ids, stage.dim, stage.keep)
            # Narrower than `keep` if the database has fewer rows.
            block = np.s_[first : first + len(part), : ids.shape[1]]
            out.scores[block] = scores.cpu().numpy()
            out.ids[block] = ids.cpu().numpy()
        return out

    @property
    def memory_bytes(self) -> int:
        """Norms of the prefixes, without the rows."""
        return sum(scale.nbytes for scale in self._scales.values())

    def _blocks(self, dim: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (first row, unit prefixes in the rows' type)."""
        scale = self._scale(dim)
        for first in range(0, len(self.rows), ROWS):
            part = self.rows[first : first + ROWS, :dim].float() * scale[first : first + ROWS, None]
            yield first, part.to(self.rows.dtype)

    def _shortlist(
        self, queries: torch.Tensor, params: SearchParams, deleted_rows: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and scores of the k best rows, each [Q, k]."""
        q = torch.nn.functional.normalize(queries[:, : params.dim], dim=1).to(self.rows.dtype)
        best = torch.empty(len(q), 0, device=self.device)
        index = torch.empty(len(q), 0, dtype=torch.int64, device=self.device)
        for first, part in self._blocks(params.dim):
            score = products(q, part).nan_to_num_(-torch.inf, -torch.inf, -torch.inf)
            if deleted_rows is not None:
                score[:, deleted_rows[first : first + len(part)]] = -torch.inf
            # Rows so far come first: `stable_top_k` then keeps the lower id of equal scores.
            top, column = stable_top_k(score, params.k)
            best, order = stable_top_k(torch.cat([best, top], 1), params.k)
            index = torch.cat([index, first + column], 1).gather(1, order)
        return index.masked_fill(best.isneginf(), -1), best

    def _stage(
        self, queries: torch.Tensor, ids: torch.Tensor, dim: int, keep: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and cosines of the candidates ids [Q, m] that one stage keeps."""
        ids = ids.sort(1).values  # so that ties are ordered by id
        missing = ids < 0
        ids = ids.clamp(min=0)
        rows = self.rows[ids.flatten(), :dim].float().view(*ids.shape, dim)
        q = torch.nn.functional.normalize(queries[:, :dim], dim=1)
        score = torch.einsum("qkd,qd->qk", rows, q) * self._scale(dim)[ids]
        score = score.masked_fill(missing, -torch.inf).nan_to_num(
            -torch.inf, -torch.inf, -torch.inf
        )
        top, column = stable_top_k(score, keep)
        return ids.gather(1, column).masked_fill(top.isneginf(), -1), top


def products(queries: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """queries [Q, D] times rows [N, D] of the same type, float32 [Q, N].

    Results of float16 would be coarse: it has 1,024 numbers between 0.5 and 1, so that most
    searches of 262,144 rows would have ties for the last place.
    """
    if queries.dtype == torch.float32:
        return queries @ rows.T
    if queries.device.type == "cuda":  # the only device that has such a product
        return torch.mm(queries, rows.T, out_dtype=torch.float32)
    return queries.float() @ rows.float().T
