"""Exhaustive and funnel search of rows that lie on a GPU (or any device of torch), in plain torch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from matryoshka.retrieval.exact import first_of_equals
from matryoshka.retrieval.hits import Hits, RetrievalError, check_rows, get_bits
from matryoshka.retrieval.pipeline import Setting

ROWS = 1 << 18  # that are scored together
TILE = 1 << 28  # numbers in the largest intermediate: 1 GB


class DeviceSearcher:
    """DeviceSearcher(rows, "cuda").search(queries, Setting.funnel("exact", [16, 32, 2048], [200,
    50])).

    rows: float16 or float32 [N, D]; they are kept on the device as they are, 5.2 GB for 1.28 M x
    2048 float16, and for every dim that a setting names N float32 lengths. Shortlists are
    exhaustive, whatever index a setting names.
    """

    def __init__(self, rows: np.ndarray, device: str | torch.device = "cuda") -> None:
        check_rows(rows, 1, "database")
        if not len(rows):
            raise RetrievalError("database: is empty; nothing can be found in it")
        self.device = torch.device(device)
        self.rows = torch.empty(
            rows.shape, dtype=torch.from_numpy(np.empty(0, rows.dtype)).dtype, device=self.device
        )
        for first in range(0, len(rows), ROWS):
            self.rows[first : first + ROWS] = torch.from_numpy(
                np.array(rows[first : first + ROWS])
            ).to(self.device)
        self._scales: dict[int, torch.Tensor] = {}

    def _scale(self, dim: int) -> torch.Tensor:
        """float32 [N]: 1 / length of each prefix, 0 of zeros, NaN where the prefix is not finite."""
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
        self, queries: np.ndarray, setting: Setting, deleted: np.ndarray | None = None
    ) -> Hits:
        """As Searcher.search with index "exact"; scores are products of the rows' own type for the
        shortlist, of float32 for the stages.
        """
        widest = max([setting.dim, *(stage.dim for stage in setting.stages)])
        for what, width in (("database", self.rows.shape[1]), ("queries", queries.shape[1])):
            if widest > width:
                raise RetrievalError(
                    f"{what}: has {width} dimensions, a prefix of {widest} was asked for"
                )
        keep = setting.stages[-1].keep if setting.stages else setting.k
        out = Hits(
            np.full((len(queries), keep), -1, np.int64),
            np.full((len(queries), keep), -np.inf, np.float32),
        )
        gone = None
        if deleted is not None:
            gone = torch.from_numpy(get_bits(deleted, 0, len(self.rows))).to(self.device)
        largest = max([ROWS, *(setting.k * stage.dim for stage in setting.stages)])
        at_once = max(1, TILE // largest)
        for first in range(0, len(queries), at_once):
            asked = torch.from_numpy(np.asarray(queries[first : first + at_once], np.float32)).to(
                self.device
            )
            ids, scores = self._shortlist(asked, setting, gone)
            for stage in setting.stages:
                ids, scores = self._stage(asked, ids, stage.dim, stage.keep)
            found = np.s_[first : first + len(asked), : ids.shape[1]]
            out.scores[found] = scores.cpu().numpy()
            out.ids[found] = ids.cpu().numpy()
        return out

    def _blocks(self, dim: int) -> Iterator[tuple[int, torch.Tensor]]:
        """(first row, unit prefixes in the rows' type)."""
        scale = self._scale(dim)
        for first in range(0, len(self.rows), ROWS):
            part = self.rows[first : first + ROWS, :dim].float() * scale[first : first + ROWS, None]
            yield first, part.to(self.rows.dtype)

    def _shortlist(
        self, asked: torch.Tensor, setting: Setting, gone: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        q = torch.nn.functional.normalize(asked[:, : setting.dim], dim=1).to(self.rows.dtype)
        best = torch.empty(len(q), 0, device=self.device)
        index = torch.empty(len(q), 0, dtype=torch.int64, device=self.device)
        for first, part in self._blocks(setting.dim):
            score = (q @ part.T).float().nan_to_num_(-torch.inf, -torch.inf, -torch.inf)
            if gone is not None:
                score[:, gone[first : first + len(part)]] = -torch.inf
            top, place = first_of_equals(score, setting.k)
            best, place2 = first_of_equals(torch.cat([best, top], 1), setting.k)
            index = torch.cat([index, first + place], 1).gather(1, place2)
        return index.masked_fill(best.isneginf(), -1), best

    def _stage(
        self, asked: torch.Tensor, ids: torch.Tensor, dim: int, keep: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ids = ids.sort(1).values  # equal scores go by id
        missing, ids = ids < 0, ids.clamp(min=0)
        rows = self.rows[ids.flatten(), :dim].float().view(*ids.shape, dim)
        q = torch.nn.functional.normalize(asked[:, :dim], dim=1)
        score = torch.einsum("qkd,qd->qk", rows, q) * self._scale(dim)[ids]
        score = score.masked_fill(missing, -torch.inf).nan_to_num(
            -torch.inf, -torch.inf, -torch.inf
        )
        top, place = first_of_equals(score, keep)
        return ids.gather(1, place).masked_fill(top.isneginf(), -1), top
