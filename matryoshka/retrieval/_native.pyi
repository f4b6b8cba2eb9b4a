"""The native search module (matryoshka/retrieval/native/). Arrays must have these types."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

BLOCK: int
CHUNK: int

class Pool:
    """Threads that searches run on; they end with this object."""

    def __init__(self, num_threads: int) -> None: ...
    @property
    def num_threads(self) -> int: ...

# The bytes of a file, a checksum of each block, the state of each block, bytes of a block.
Blocks = tuple[NDArray[np.uint8], NDArray[np.uint64], NDArray[np.uint8], int]

class DamagedBlock(RuntimeError):
    """A block of a file differs from its checksum."""

def check_blocks(pool: Pool, blocks: Blocks, begin: int, end: int) -> None: ...
def sum_blocks(pool: Pool, data: NDArray[np.uint8], block: int) -> NDArray[np.uint64]: ...

IdsAndScores = tuple[NDArray[np.int64], NDArray[np.int32]]  # both [queries, k]

def kernels() -> list[str]: ...
def pack(pool: Pool, codes: NDArray[np.uint8], packed: NDArray[np.uint8]) -> None: ...
def pack_bits(bits: NDArray[np.uint64], packed: NDArray[np.uint64]) -> None: ...
def search_codes(
    pool: Pool,
    packed: NDArray[np.uint8],
    count: int,
    queries: NDArray[np.int8],
    k: int,
    deleted: NDArray[np.uint64] | None = None,
    kernels: str = "",
) -> IdsAndScores: ...
def search_bits(
    pool: Pool,
    packed: NDArray[np.uint64],
    count: int,
    queries: NDArray[np.uint64],
    k: int,
    deleted: NDArray[np.uint64] | None = None,
    kernels: str = "",
) -> IdsAndScores: ...
def search_lists(
    pool: Pool,
    packed: NDArray[np.uint8],
    starts: NDArray[np.int64],
    sizes: NDArray[np.int32],
    ids: NDArray[np.uint32],
    num_ids: int,
    queries: NDArray[np.int8],
    probes: NDArray[np.int32],
    k: int,
    deleted: NDArray[np.uint64] | None = None,
    kernels: str = "",
    code_blocks: Blocks | None = None,
    id_blocks: Blocks | None = None,
) -> IdsAndScores: ...
def rerank(
    pool: Pool,
    stages: Sequence[tuple[np.ndarray, int, int, int]],
    queries: NDArray[np.float32],
    candidates: NDArray[np.int64],
    kernels: str = "",
    blocks: Blocks | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]: ...
