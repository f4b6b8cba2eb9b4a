"""Search in torch, as a GPU does it, against the native one and against loops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matryoshka.retrieval import RetrievalError, Searcher, SearchParams, Stage, exact_search
from matryoshka.retrieval import device as module
from matryoshka.retrieval.device import DeviceSearcher
from matryoshka.retrieval.hits import empty_bits, set_bits

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def table(n, dim, seed):
    """float32, few different numbers: equal rows, zeros."""
    return np.random.default_rng(seed).integers(0, 3, (n, dim)).astype(np.float32)


@pytest.mark.parametrize("device", DEVICES)
@given(
    n=st.integers(1, 70),
    k=st.integers(1, 90),
    block=st.sampled_from([16, 64]),
    seed=st.integers(0, 99),
)
@settings(max_examples=30)
def test_exhaustive_search_and_funnel_against_the_cpus(device, n, k, block, seed):
    rows, queries = table(n, 32, seed), table(9, 32, seed + 1)
    bits = empty_bits(n)
    set_bits(bits, np.flatnonzero(np.random.default_rng(seed).random(n) < 0.2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ROWS", block)
        patch.setattr(module, "TILE", 4000)  # some queries at a time
        searcher = DeviceSearcher(rows, device)
        for deleted in (None, bits):
            found = searcher.search(queries, SearchParams("exact", 8, k), deleted=deleted)
            expected = exact_search(rows, queries, 8, k, deleted=deleted)
            np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
            assert set(found.ids[found.ids >= 0].tolist()) <= set(range(n)), "ids out of range"
            # shortlists that hold everything: rounding in the first part decides nothing
            setting = SearchParams("exact", 8, n, (Stage(16, n), Stage(32, k)))
            found, expected = (
                searcher.search(queries, setting, deleted=deleted),
                Searcher(rows).search(queries, setting, deleted=deleted),
            )
            np.testing.assert_allclose(found.scores, expected.scores, atol=1e-5)
            for a, b, score in zip(found.ids, expected.ids, expected.scores, strict=True):
                apart = np.abs(np.diff(np.nan_to_num(score, neginf=-5), append=-9)) > 1e-4
                # of a run of equal scores only the set is certain
                for run in np.split(np.arange(k), np.flatnonzero(apart) + 1):
                    if len(run) and run[-1] < k - 1:
                        assert set(a[run].tolist()) == set(b[run].tolist())


@pytest.mark.parametrize("device", DEVICES)
def test_half_rows_and_bad_numbers(device):
    rows = np.random.default_rng(0).random((200, 24)).astype(np.float16)
    rows[3], rows[4, 20], rows[5, 1] = 0, np.inf, np.nan
    queries = rows[[10, 3, 5]].astype(np.float32)
    found = DeviceSearcher(rows, device).search(
        queries, SearchParams("exact", 8, 150, (Stage(24, 3),))
    )
    assert found.ids[0, 0] == 10
    assert found.ids[1].tolist() == [0, 1, 2]  # zeros: all cosines 0
    assert found.ids[2].tolist() == [-1, -1, -1]
    assert not {4, 5} & set(found.ids.ravel().tolist())
    assert (rows[3] == 0).all()


def test_what_does_not_fit():
    rows = table(5, 8, 0)
    with pytest.raises(RetrievalError, match="prefix of 16"):
        DeviceSearcher(rows, "cpu").search(rows, SearchParams("exact", 16, 1))
    with pytest.raises(RetrievalError, match="queries: has 4 dim"):
        DeviceSearcher(rows, "cpu").search(rows[:, :4], SearchParams("exact", 8, 1))
    with pytest.raises(RetrievalError, match="is empty"):
        DeviceSearcher(rows[:0], "cpu")
