"""Search packed codes and rows that are damaged under their checksums, with hostile arguments.

A search either raises DamagedBlock, IndexError or ValueError, or its answer is that of the sound
arrays: blocks that it has not read may differ.
"""

from random import Random

import numpy as np
from probe import Failure

from matryoshka.retrieval import _native

MOST_ROWS = 300
REFUSALS = (_native.DamagedBlock, IndexError, ValueError)


def probe_search(pool, rng: Random) -> str:
    """One search of random arrays; what came of it: sound, damaged or refused."""
    numbers = np.random.default_rng(rng.randrange(2**32))
    return rng.choice((_lists, _rerank, _scan))(pool, rng, numbers)


def _sums(pool, data: np.ndarray, block: int) -> tuple:
    content = data.reshape(-1).view(np.uint8)
    sums = _native.sum_blocks(pool, content, block)
    return content, sums, np.zeros(len(sums), np.uint8), block


def _damage(rng: Random, *arrays: np.ndarray) -> bool:
    """Flip a bit of some of the arrays, in place."""
    changed = False
    for array in arrays:
        content = array.reshape(-1).view(np.uint8)
        if len(content) and rng.random() < 0.4:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            changed = True
    return changed


def _hostile(rng: Random, array: np.ndarray) -> bool:
    """Write one number that cannot be a row, a position or a length into the array."""
    if not array.size or rng.random() < 0.8:
        return False
    limits = np.iinfo(array.dtype)
    value = rng.choice((-1, 0, 1, 63, 64, 2**31 - 1, 2**32 - 1, limits.min, limits.max))
    array.reshape(-1)[rng.randrange(array.size)] = min(max(value, limits.min), limits.max)
    return True


def _same(found, expected, what: str) -> None:
    for these, those in zip(found, expected, strict=True):
        if not np.array_equal(these, those):
            raise Failure(f"{what}: another answer than without damage, and no error")


def _refused(call) -> str:
    """Run a search of hostile arguments: any answer, or one of the errors."""
    try:
        call()
    except REFUSALS:
        return "refused"
    return "sound"


def _compared(call, expected, what: str) -> str:
    try:
        found = call()
    except _native.DamagedBlock:
        return "damaged"
    _same(found, expected, what)
    return "sound"


def _lists(pool, rng: Random, numbers: np.random.Generator) -> str:
    """Inverted lists; the scores of the sound ones against sums of integers."""
    dim = 4 * rng.randint(1, 12)
    count = rng.randint(1, 5)
    sizes = numbers.integers(0, MOST_ROWS // count + 1, count).astype(np.int32)
    padded = -(-sizes // _native.BLOCK) * _native.BLOCK
    starts = (np.cumsum(padded) - padded).astype(np.int64)
    slots = int(padded.sum())
    codes = numbers.integers(0, 128, (slots, dim)).astype(np.uint8)
    packed = np.zeros(max(slots, 1) * dim, np.uint8)
    _native.pack(pool, codes, packed)
    ids = numbers.permutation(slots).astype(np.uint32)
    queries = numbers.integers(-127, 128, (rng.randint(1, 3), dim)).astype(np.int8)
    probes = np.stack([numbers.permutation(count) for _ in queries]).astype(np.int32)
    probes = np.ascontiguousarray(probes[:, : rng.randint(1, count)])
    k = rng.choice((1, 5, MOST_ROWS))
    blocks = rng.choice((1, 64, 100, 4096))
    code_blocks, id_blocks = _sums(pool, packed, blocks), _sums(pool, ids, blocks)
    kernels = rng.choice(("", *_native.kernels()))

    def search(**checks):
        return _native.search_lists(
            pool,
            packed,
            starts,
            sizes,
            ids,
            num_ids=slots,
            queries=queries,
            probes=probes,
            k=k,
            kernels=kernels,
            **checks,
        )

    expected = search()
    for row, query in enumerate(queries.astype(int)):
        all_scores = []
        for probe in probes[row]:
            rows = codes[starts[probe] : starts[probe] + sizes[probe]].astype(int)
            all_scores += (rows @ query).tolist()
        best = sorted(all_scores, reverse=True)[:k]
        if expected[1][row][: len(best)].tolist() != best:
            raise Failure(f"lists: scores {expected[1][row].tolist()} instead of {best}")
    is_hostile = [_hostile(rng, array) for array in (starts, sizes, probes)]
    is_damaged = _damage(rng, packed, ids)
    checks = {"code_blocks": code_blocks, "id_blocks": id_blocks}
    if any(is_hostile):
        return _refused(lambda: search(**checks)) if rng.random() < 0.5 else _refused(search)
    if is_damaged and rng.random() < 0.2:
        return _refused(search)  # without checksums: wrong rows, but no others' memory
    return _compared(lambda: search(**checks), expected, "lists")


def _rerank(pool, rng: Random, numbers: np.random.Generator) -> str:
    """Stages over rows, whose blocks are checked where they are read."""
    count, columns = rng.randint(1, MOST_ROWS), rng.randint(2, 40)
    rows = numbers.standard_normal((count, columns)).astype(rng.choice((np.float16, np.float32)))
    queries = numbers.standard_normal((rng.randint(1, 3), columns)).astype(np.float32)
    candidates = numbers.integers(-1, count, (len(queries), rng.randint(1, 50))).astype(np.int64)
    first = rng.randint(1, columns - 1)
    stages = [(rows, 0, first, rng.randint(1, 20)), (rows, first, columns, rng.randint(1, 10))]
    if rng.random() < 0.3:
        stages = [(rows, 0, columns, 5)]
    blocks = _sums(pool, rows, rng.choice((1, 64, 100, 4096)))

    def search(**checks):
        return _native.rerank(pool, stages, queries, candidates, **checks)

    expected = search()
    if _hostile(rng, candidates):
        return _refused(lambda: search(blocks=blocks))
    if _damage(rng, rows) and rng.random() < 0.2:
        return _refused(search)
    return _compared(lambda: search(blocks=blocks), expected, "rerank")


def _scan(pool, rng: Random, numbers: np.random.Generator) -> str:
    """The checks of blocks themselves, whole and in part, and a scan of what they cover."""
    count, dim = rng.randint(1, MOST_ROWS), 4 * rng.randint(1, 12)
    codes = numbers.integers(0, 128, (count, dim)).astype(np.uint8)
    packed = np.zeros(-(-count // _native.BLOCK) * _native.BLOCK * dim, np.uint8)
    _native.pack(pool, codes, packed)
    size = rng.choice((1, 7, 100, 4096, len(packed), 2 * len(packed)))
    blocks = _sums(pool, packed, size)
    queries = numbers.integers(-127, 128, (2, dim)).astype(np.int8)
    found = _native.search_codes(pool, packed, count, queries, rng.choice((1, 10, 400)))
    best = np.sort(codes.astype(int) @ queries.T.astype(int), axis=0)[::-1]
    length = min(found[1].shape[1], count)
    if not np.array_equal(found[1][:, :length], best[:length].T):
        raise Failure("scan: other scores than sums of integers")
    before = packed.copy()
    _damage(rng, packed)
    first, end = sorted(rng.randrange(len(packed) + 1) for _ in range(2))
    touched = slice(first // size * size, -(-end // size) * size if end > first else 0)
    differs = bool((before[touched] != packed[touched]).any())
    try:
        _native.check_blocks(pool, blocks, first, end)
    except _native.DamagedBlock:
        if not differs:
            raise Failure("a sound block is called damaged") from None
        return "damaged"
    if differs:
        raise Failure("a damaged block is called sound")
    return _refused(lambda: _native.check_blocks(pool, blocks, end, len(packed) + first + 1))
