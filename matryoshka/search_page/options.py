"""Options of serve.py, without torch."""

from __future__ import annotations

from dataclasses import dataclass

from matryoshka.config import FlagParser, flat_parser, option
from matryoshka.runtime import DeviceOptions, ThreadOptions


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Options of the server and its page."""

    index: str = option(help="folder of the index", metavar="DIR", positional=True, existing=True)
    model: str | None = option(
        None,
        help="model that made the index; unset: the file that the index names",
        metavar="FILE",
        existing=True,
    )
    adapter: str | None = option(
        None,
        help="adapter of the index's embeddings; unset: the file that the index names",
        metavar="FILE",
        existing=True,
    )
    data: tuple[str, ...] | None = option(
        None,
        help="data set of the pictures, if it has moved; for an index of several, once for each in "
        "their order",
        metavar="PATH",
        repeat=True,
        file_name=True,
    )
    host: str = option("127.0.0.1", help="address to listen on; the default: this computer only")
    port: int = option(8000, help="0: any free one", low=0, high=65535)
    max_upload_mb: float = option(
        16.0, help="largest size of an uploaded image", above=0, high=1024
    )


def serve_parser() -> FlagParser:
    """The options of serve.py."""
    return flat_parser(
        "matryoshka retrieve serve",
        "A page to try an index: upload an image, see its neighbours at every prefix, and the "
        "recall of the fast search.\n\n"
        "    matryoshka retrieve serve photos.index\n"
        "    matryoshka retrieve serve photos.index --model model.safetensors --data photos "
        "--port 8080\n\n"
        "Only this computer can open it unless --host allows others; there are no passwords. If "
        "the embedded data set no longer exists, the page shows names. The index may change "
        "meanwhile.",
        ServeOptions,
        DeviceOptions,
        ThreadOptions,
    )
