"""Search in torch, as a GPU does it, against the native one and against loops."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from matryoshka.retrieval import RetrievalError, Searcher, SearchParams, Stage, exact_search
from matryoshka.retrieval import device as module
from matryoshka.retrieval.device import DeviceSearcher, products
from matryoshka.retrieval.exact import stable_top_k
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


class _Sorts(TorchDispatchMode):
    """Notes the numbers that every call of torch's sorts orders, and those of the largest topk."""

    def __init__(self):
        super().__init__()
        self.sorted = 0
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "sort" in func.overloadpacket.__name__:
            self.sorted = max(self.sorted, args[0].shape[-1])
        if func.overloadpacket.__name__ == "topk":
            self.most = max(self.most, args[0].shape[-1])
        return func(*args, **(kwargs or {}))


def by_score_then_column(score, k):
    """The definition, with NumPy: columns in the order of falling score, then of rising column."""
    columns = np.arange(score.shape[1])
    return np.stack([np.lexsort((columns, -row))[:k] for row in score])


@pytest.mark.parametrize("device", DEVICES)
@given(
    n=st.integers(1, 60),
    k=st.integers(1, 70),
    values=st.integers(1, 30),
    seed=st.integers(0, 999),
)
@settings(max_examples=60, deadline=None)
def test_the_order_of_equal_scores(device, n, k, values, seed):
    rng = np.random.default_rng(seed)
    score = rng.integers(0, values, (7, n)).astype(np.float32) / values
    score[rng.random(score.shape) < 0.1] = -np.inf
    top, column = stable_top_k(torch.from_numpy(score).to(device), k)
    expected = by_score_then_column(score, min(k, n))
    np.testing.assert_array_equal(column.cpu().numpy(), expected)
    np.testing.assert_array_equal(top.cpu().numpy(), np.take_along_axis(score, expected, 1))


def test_not_a_number_is_the_highest():
    score = torch.tensor([[1.0, 2.0, torch.nan, 2.0, 2.0, 2.0]])
    assert set(stable_top_k(score, 3)[1][0].tolist()) == {1, 2, 3}


@pytest.fixture(scope="module")
def bench_rows():
    """float32 rows [16384, 64] and queries [64, 64], as bench/retrieval_device.py makes them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "bench"))
        import retrieval_device
    torch.manual_seed(0)
    points = torch.from_numpy(retrieval_device.maker(torch.device("cpu"))(2**14 + 64)).float()
    sys.modules.pop("retrieval_device")
    return points[:-64, :64].clone(), points[-64:, :64].clone()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("dim", "k"), [(64, 50), (16, 50)])
def test_no_search_sorts_all_columns(bench_rows, dtype, dim, k):
    """With products in the rows' own type most queries have ties for the last place, with float32
    next to none; in both cases the order is exact and nothing wider than k is sorted.
    """
    rows, queries = (
        torch.nn.functional.normalize(part[:, :dim], dim=1).to(dtype) for part in bench_rows
    )
    exact = products(queries, rows)
    assert exact.dtype == torch.float32
    np.testing.assert_allclose(
        exact.numpy(), queries.double().numpy() @ rows.double().numpy().T, atol=2e-6
    )
    crowded = {}
    for name, score in (("float32", exact), ("own", exact.to(dtype).float())):
        with _Sorts() as sorts:
            _, column = stable_top_k(score, k)
        assert sorts.most == 2**14, "topk must see all columns"
        assert sorts.sorted <= k, f"numbers in the widest sort: {sorts.sorted}"
        np.testing.assert_array_equal(column.numpy(), by_score_then_column(score.numpy(), k))
        kth = score.gather(1, column[:, -1:])
        crowded[name] = ((score >= kth).sum(1) > k).float().mean().item()
    assert crowded["own"] > 0.2, f"share of queries with a tie at place k: {crowded['own']}"
    assert crowded["float32"] < 0.05, f"the same with float32 products: {crowded['float32']}"


def test_a_search_of_half_rows_multiplies_to_float32(bench_rows):
    """Its scores differ where those of float16 would be equal."""
    rows = bench_rows[0][:2000].half().numpy()
    found = DeviceSearcher(rows, "cpu").search(
        bench_rows[1][:8].numpy(), SearchParams("exact", 64, 100)
    )
    steps = np.diff(-found.scores, axis=1)
    assert (steps > 0).mean() > 0.99, "share of neighbouring scores that differ"


def test_products_on_a_gpu_are_one_call():
    """Without a GPU: shapes and types of the call that only CUDA has."""
    with FakeTensorMode():
        rows = torch.empty(9, 16, device="cuda", dtype=torch.float16)
        found = products(rows[:4], rows)
    assert (found.shape, found.dtype, found.device.type) == ((4, 9), torch.float32, "cuda")
