"""The nearest rows by a pass over all of them in full: the truth that other searches are held
against.
"""

from __future__ import annotations

import numpy as np
import torch

from matryoshka.retrieval.hits import Hits, check_k, check_rows, get_bits, unit
from matryoshka.retrieval.rerank import Stage, rerank

ROWS = 16_384  # at a time: with 1000 queries 64 MB of scores
MORE = 32  # rows beyond k that the pass hands on
# cosines that differ by less may be equal: BLAS adds in another order at the edges of its blocks
EQUAL = 4e-6


def exact_search(
    rows: np.ndarray,
    queries: np.ndarray,
    dim: int,
    k: int,
    device: str | torch.device = "cpu",
    rows_at_once: int = ROWS,
    deleted: np.ndarray | None = None,
) -> Hits:
    """The k rows of highest cosine of the first `dim` dimensions, in float32; equal rows by rising
    id.

    deleted: bits of rows to leave out, see hits.set_bits. A pass by BLAS finds k + MORE rows, which
    `rerank` puts in order: it adds up every row alike. Queries of which those may be too few,
    because still more rows are as near, pass once more in float64, whose errors are gone when it is
    rounded to float32.
    """
    check_rows(rows, dim, "database")
    check_rows(queries, dim, "queries")
    check_k(k)
    plain = rows.dtype in (np.float16, np.float32)
    out = Hits(
        np.full((len(queries), k), -1, np.int64), np.full((len(queries), k), -np.inf, np.float32)
    )
    again = np.ones(len(queries), bool)
    if plain:
        near = _pass(rows, queries, dim, k + MORE, torch.float32, device, rows_at_once, deleted)
        found = rerank(rows, np.asarray(queries, np.float32), near.ids, [Stage(dim, k)])
        out.ids[:], out.scores[:] = found
        if near.ids.shape[1] < k + MORE:  # all rows
            again[:] = False
        else:
            with np.errstate(invalid="ignore"):  # -inf: all that there are
                again = near.scores[:, k - 1] - near.scores[:, -1] < EQUAL
    if again.any():
        found = _pass(rows, queries[again], dim, k, torch.float64, device, rows_at_once, deleted)
        width = found.ids.shape[1]
        out.ids[again, :width], out.scores[again, :width] = found
        out.ids[again, width:], out.scores[again, width:] = -1, -np.inf
    return out


def _pass(
    rows: np.ndarray,
    queries: np.ndarray,
    dim: int,
    k: int,
    dtype: torch.dtype,
    device: str | torch.device,
    rows_at_once: int,
    deleted: np.ndarray | None,
) -> Hits:
    """The k rows of highest cosine, or all of them where there are fewer; products in `dtype`,
    compared as float32.
    """
    asked = torch.from_numpy(unit(queries, dim)).to(device, dtype)
    best = torch.empty(len(asked), 0, device=device)
    index = torch.empty(len(asked), 0, dtype=torch.int64, device=device)
    for first in range(0, len(rows), rows_at_once):
        prefixes = unit(rows[first : first + rows_at_once], dim)
        if deleted is not None:
            prefixes[get_bits(deleted, first, len(prefixes))] = np.nan
        part = torch.from_numpy(prefixes).to(device, dtype)
        score = (asked @ part.T).float().nan_to_num_(-torch.inf, -torch.inf, -torch.inf)
        if best.shape[1] == k:  # only what is better than the k-th so far is sorted
            some = (score > best[:, -1:]).any(1)
        else:
            some = torch.ones(len(asked), dtype=torch.bool, device=device)
        if not some.any():
            continue
        top, place = first_of_equals(score[some], k)
        both, ids = torch.cat([best[some], top], 1), torch.cat([index[some], first + place], 1)
        top, place = first_of_equals(both, k)
        if best.shape[1] != top.shape[1]:
            best = torch.empty(len(asked), top.shape[1], device=device)
            index = torch.empty(best.shape, dtype=torch.int64, device=device)
        best[some], index[some] = top, ids.gather(1, place)
    ids, scores = index.cpu().numpy(), best.cpu().numpy()
    ids[np.isneginf(scores)] = -1
    return Hits(ids, scores)


def first_of_equals(score: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k highest scores [Q, N] of each row, falling, and their columns; of equal ones the first."""
    k = min(k, score.shape[1])
    top, place = score.topk(k, dim=1)
    crowded = (score >= top[:, -1:]).sum(1) > k  # topk takes any of equal ones
    if crowded.any():
        place[crowded] = score[crowded].sort(dim=1, descending=True, stable=True).indices[:, :k]
    place = place.sort(dim=1).values
    top, order = score.gather(1, place).sort(dim=1, descending=True, stable=True)
    return top, place.gather(1, order)
