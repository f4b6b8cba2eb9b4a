"""Exact search of every row: the ground truth of all other searches."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import numpy as np
import torch

from matryoshka.arrays import as_float32
from matryoshka.retrieval.hits import Hits, as_rows, check_bits, check_k, get_bits, unit
from matryoshka.retrieval.rerank import Stage, rerank

BLOCK_ROWS = 16_384  # with 1000 queries 64 MB of scores
MARGIN = 32  # rows beyond k that the first pass finds
# Cosines that differ by less may be equal: BLAS sums in another order at the edges of its blocks.
TIE_TOLERANCE = 4e-6


IMPORTED_BY = os.getpid()


@cache
def prepare_torch(process: int) -> None:
    """In a forked process, let torch compute in one thread.

    The threads of OpenMP do not survive a fork, and GNU's waits for them for ever.
    """
    if process != IMPORTED_BY:
        torch.set_num_threads(1)


def exact_search(
    rows: np.ndarray,
    queries: np.ndarray,
    dim: int,
    k: int,
    *,
    device: str | torch.device = "cpu",
    rows_at_once: int = BLOCK_ROWS,
    deleted: np.ndarray | None = None,
) -> Hits:
    """The k rows of highest cosine of the first `dim` dimensions, in float32; ties by rising id.

    deleted: bits of rows to leave out, see hits.set_bits.

    A pass with BLAS finds k + MARGIN rows. `rerank` orders them, because it sums every row in the
    same order. If still more rows may tie with the k-th, the query takes another pass in float64,
    whose errors vanish when the result is rounded to float32.
    """
    prepare_torch(os.getpid())
    rows = as_rows(rows, dim, "database")
    queries = as_rows(queries, dim)
    check_k(k)
    if deleted is not None:
        check_bits(deleted, len(rows))
    pass_options: Any = {"device": device, "rows_at_once": rows_at_once, "deleted": deleted}
    out = Hits(
        np.full((len(queries), k), -1, np.int64), np.full((len(queries), k), -np.inf, np.float32)
    )
    unsure = np.ones(len(queries), bool)  # queries that need the pass in float64
    if rows.dtype in (np.float16, np.float32):
        near = _pass(rows, queries, dim, k + MARGIN, dtype=torch.float32, **pass_options)
        found = rerank(rows, as_float32(queries), near.ids, [Stage(dim, k)])
        out.ids[:], out.scores[:] = found
        if near.ids.shape[1] < k + MARGIN:  # the pass kept every row
            unsure[:] = False
        else:
            with np.errstate(invalid="ignore"):  # -inf - -inf: fewer valid rows than k
                unsure = near.scores[:, k - 1] - near.scores[:, -1] < TIE_TOLERANCE
    if unsure.any():
        found = _pass(rows, queries[unsure], dim, k, dtype=torch.float64, **pass_options)
        width = found.ids.shape[1]
        out.ids[unsure, :width], out.scores[unsure, :width] = found
        # Results of the first pass beyond the width of this one.
        out.ids[unsure, width:] = -1
        out.scores[unsure, width:] = -np.inf
    return out


def _pass(
    rows: np.ndarray,
    queries: np.ndarray,
    dim: int,
    k: int,
    *,
    dtype: torch.dtype,
    device: str | torch.device,
    rows_at_once: int,
    deleted: np.ndarray | None,
) -> Hits:
    """The k rows of highest cosine, or every row if there are fewer.

    Products are computed in `dtype` and compared as float32.
    """
    units = torch.from_numpy(unit(queries, dim)).to(device, dtype)
    best = torch.empty(len(units), 0, device=device)
    index = torch.empty(len(units), 0, dtype=torch.int64, device=device)
    for first in range(0, len(rows), rows_at_once):
        prefixes = unit(rows[first : first + rows_at_once], dim)
        if deleted is not None:
            # NaN scores become -inf below, as those of invalid rows.
            prefixes[get_bits(deleted, first, len(prefixes))] = np.nan
        part = torch.from_numpy(prefixes).to(device, dtype)
        score = (units @ part.T).float().nan_to_num_(-torch.inf, -torch.inf, -torch.inf)
        if best.shape[1] == k:  # sort only queries with a score above their k-th so far
            some = (score > best[:, -1:]).any(1)
        else:
            some = torch.ones(len(units), dtype=torch.bool, device=device)
        if not some.any():
            continue
        # Rows so far come first: `stable_top_k` then keeps the lower id of equal scores.
        top, column = stable_top_k(score[some], k)
        scores = torch.cat([best[some], top], 1)
        ids = torch.cat([index[some], first + column], 1)
        top, order = stable_top_k(scores, k)
        if best.shape[1] != top.shape[1]:
            best = torch.empty(len(units), top.shape[1], device=device)
            index = torch.empty(best.shape, dtype=torch.int64, device=device)
        best[some] = top
        index[some] = ids.gather(1, order)
    ids = index.cpu().numpy()
    scores = best.cpu().numpy()
    ids[np.isneginf(scores)] = -1
    return Hits(ids, scores)


def stable_top_k(score: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k highest of the scores [Q, N], falling, and their columns; the first of equal ones.

    NaN counts as the highest, as in torch.topk.
    """
    k = min(k, score.shape[1])
    top, column = score.topk(k, dim=1)
    # torch.topk picks any of equal scores, so all columns with the k-th score are looked at again.
    # A stable sort of them would take 15 to 35 times as long as topk; one running count does.
    crowded = (score >= top[:, -1:]).sum(1) > k
    if crowded.any():
        column[crowded] = _first_of_equal(score[crowded], top[crowded, -1:], k)
    # Its order of equal scores is arbitrary as well: first by column, then stably by score.
    column = column.sort(dim=1).values
    top, order = score.gather(1, column).sort(dim=1, descending=True, stable=True)
    return top, column.gather(1, order)


def _first_of_equal(score: torch.Tensor, kth: torch.Tensor, k: int) -> torch.Tensor:
    """Columns [Q, k], rising: all scores above kth [Q, 1], filled up with the first equal to it."""
    above = (score <= kth).logical_not_()  # and not >, which leaves NaN out
    equal = score == kth
    missing = k - above.sum(1, keepdim=True, dtype=torch.int32)
    kept = above | (equal & (equal.cumsum(1, dtype=torch.int32) <= missing))
    return kept.nonzero()[:, 1].view(len(score), k)
