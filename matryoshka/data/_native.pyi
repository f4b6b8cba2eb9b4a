"""The native core (matryoshka/data/native/), as Python sees it. Arrays must have these types:
nothing is converted.
"""

import numpy as np
from numpy.typing import NDArray

Buffer = bytes | bytearray | memoryview | np.ndarray

class Pool:
    """Threads that decode_batch runs on; they end with this object."""

    def __init__(self, num_threads: int) -> None: ...
    @property
    def num_threads(self) -> int: ...

class FileMap:
    """An open file mapped into memory, read-only. Where the file has lost bytes since, readers find
    zeros; with Python's mmap, SIGBUS ends the process.

    data: uint8 [size], read-only; keeps the map. torn: whether a reader has found such zeros.
    OSError if the file cannot be mapped.
    """

    def __init__(self, descriptor: int) -> None: ...
    @property
    def data(self) -> NDArray[np.uint8]: ...
    @property
    def torn(self) -> bool: ...
    def begin_reading(self) -> int:
        """The file's size now. Call it before a group of reads."""

    def expect(self) -> None:
        """Let the system read the file into its cache."""

    def forget(self, offset: int, size: int) -> None:
        """Release the pages of a part."""

def random_crops(
    width: NDArray[np.int32],
    height: NDArray[np.int32],
    index: NDArray[np.int64],
    seed: int,
    epoch: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: float,
    view: int = 0,
) -> NDArray[np.int32]: ...
def center_crops(
    width: NDArray[np.int32], height: NDArray[np.int32], ratio: float
) -> NDArray[np.int32]: ...
def decode_batch(
    pool: Pool,
    data: Buffer,
    offset: NDArray[np.uint64],
    size: NDArray[np.uint64],
    mode: NDArray[np.uint8],
    width: NDArray[np.int32],
    height: NDArray[np.int32],
    crops: NDArray[np.int32],
    out: NDArray[np.uint8],
    exact: bool = True,
) -> NDArray[np.uint8]: ...
def decode_views(
    pool: Pool,
    data: Buffer,
    offset: NDArray[np.uint64],
    size: NDArray[np.uint64],
    mode: NDArray[np.uint8],
    width: NDArray[np.int32],
    height: NDArray[np.int32],
    crops: NDArray[np.int32],
    out: list[NDArray[np.uint8]],
    exact: bool = True,
) -> NDArray[np.uint8]: ...
def decode(data: Buffer) -> NDArray[np.uint8]: ...
def jpeg_size(data: Buffer) -> tuple[int, int, int]: ...
def encode(image: NDArray[np.uint8], quality: int, tile: int = 64) -> bytes: ...
def transcode(data: Buffer, tile: int = 64) -> bytes: ...
def resize(image: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]: ...
def status_message(code: int) -> str: ...
