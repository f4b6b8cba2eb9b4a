"""A page to try an index: drop an image, see its neighbours at every prefix, and what the fast
search keeps of them.

    matryoshka retrieve serve photos.index matryoshka retrieve serve photos.index --model
    runs/demo/mrl/model.safetensors --data photos --port 8080

For this computer alone, unless --host says otherwise; there are no passwords. Pictures are those of
the data set that was embedded, made smaller; where it is not there any more, the page shows names.
The index may be changed meanwhile.
"""

from __future__ import annotations

import ipaddress
import os
import shlex
import socket
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # two thread pools that spin fight: a third of the speed

import numpy as np
import torch
from PIL import Image

from matryoshka import config, distributed
from matryoshka.checkpoint.published import PREFIXES, load_any
from matryoshka.data import CenterCrop
from matryoshka.data.augment import Preprocessing
from matryoshka.data.images import central_square
from matryoshka.data.resized_images import resize_and_crop
from matryoshka.embeddings.reading import trunk_sha256
from matryoshka.evaluation.embedding import fingerprint
from matryoshka.models import NestedModel
from matryoshka.retrieval.store import Index
from matryoshka.search_page.options import serve_parser as parser

ANY = ("0.0.0.0", "::", "")


@config.program
def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    search_page, uvicorn = required()
    index = Index(args.index, args.threads)
    replaced = moved(index, args.data)
    with listening(args.host, args.port) as door:
        model = load(args, index)
        pictures = search_page.Pictures(replaced, lambda data: fingerprint(data, data.labels))
        service = search_page.Service(
            index, encoder(model, index.preprocessing), trunk_sha256(model), pictures
        )
        announce(args, index, service, door)
        app = search_page.make_app(
            service, hosts(args.host), args.host in ANY, int(args.max_upload_mb * (1 << 20))
        )
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_level="warning",
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=3,
            )
        )
        try:
            server.run(sockets=[door])
        except KeyboardInterrupt:  # raised once more when everything is closed
            print()
    return 0


def required() -> tuple[Any, Any]:
    """(matryoshka.search_page, uvicorn)"""
    try:
        import uvicorn

        from matryoshka import search_page
        from matryoshka.search_page import make_app  # noqa: F401 - needs fastapi
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn"):
            raise
        raise config.ConfigError(
            f"retrieve serve needs {error.name}: pip install 'matryoshka[serve]'"
        ) from None
    return search_page, uvicorn


def moved(index: Index, given: Sequence[str] | None) -> dict[str, str]:
    """Where the index's data sets lie, by where it says that they do."""
    if not given:
        return {}
    if missing := [path for path in given if not os.path.exists(path)]:
        raise config.ConfigError(f"--data {missing[0]}: there is no such file or folder")
    known = list(
        dict.fromkeys(str(source.get("path") or "") for part in index.parts for source in part.data)
    )
    if len(given) != len(known):
        number = "1 data set" if len(known) == 1 else f"{len(known)} data sets"
        options = " ".join(f"--data {shlex.quote(path) if path else 'PATH'}" for path in known)
        order = ", in this order" if len(known) > 1 else ""
        raise config.ConfigError(
            f"--data: {index.path} has {number}; give {options}{order}, or where they lie now"
        )
    return dict(zip(known, given, strict=True))


def listening(host: str, port: int) -> socket.socket:
    """The open door: before the model is loaded, that a port in use is said at once."""
    try:
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, _, _, _, address = found[0]
    except (OSError, UnicodeError):
        raise config.ConfigError(f"--host {host}: is no address or name of this computer") from None
    try:
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise config.ConfigError(
            f"--port {port} of --host {host}: {error.strerror}; choose another"
        ) from None


def load(args: Namespace, index: Index) -> NestedModel:
    """The index's model, on its device. ConfigError, RetrievalError, CheckpointError."""
    name = args.model or str(index.model.get("file") or "")
    if not name.startswith(PREFIXES) and not os.path.isfile(name):
        whose = "" if args.model else f", of which {args.index} was made"
        raise config.ConfigError(
            f"--model {name}: there is no such file{whose}; give the model's file by --model"
        )
    head, flags = str(index.model.get("head")), {}
    if name.endswith(".pt"):  # upstream's files do not all say what they are
        flags = {"mrl": head == "mrl", "efficient": head == "mrl-e"}
    model = load_any(name, "--model", **flags)
    index.check_model(trunk_sha256(model), f"--model {name}")
    if args.threads:
        torch.set_num_threads(args.threads)
    return model.to(distributed.pick_device(args.device, 0))


def encoder(
    model: NestedModel, preprocessing: Mapping[str, Any]
) -> Callable[[np.ndarray], np.ndarray]:
    """uint8 [H, W, 3] -> float32 [D], prepared as the index's images were: see embed.py."""
    try:
        size, ratio, mean, std = (preprocessing[key] for key in ("size", "ratio", "mean", "std"))
        model.preprocessing = Preprocessing(size, ratio, tuple(mean), tuple(std))
        crop = CenterCrop(size, ratio)
    except (KeyError, TypeError, ValueError):
        raise config.ConfigError(
            f"the index does not say how its images were prepared ({dict(preprocessing)}); embed "
            "them again"
        ) from None

    def encode(pixels: np.ndarray) -> np.ndarray:
        if preprocessing.get("name") == "upstream":
            square = resize_and_crop(Image.fromarray(pixels))
        else:
            square = central_square(pixels, crop)
        return model.encode(torch.from_numpy(np.array(square))[None])[0].cpu().numpy()

    return encode


def hosts(host: str) -> list[str]:
    """Names under which a browser may ask for the page, besides loopback's."""
    if host in ANY:
        return [socket.gethostname(), socket.getfqdn()]
    return [f"[{host}]" if ":" in host else host]


def announce(args: Namespace, index: Index, service: Any, door: socket.socket) -> None:
    places = service.places()
    usable = [place for place, reason in places.items() if reason is None]
    pictures = f", pictures from {', '.join(usable)}" if usable else ""
    print(f"{args.index}: {len(index):,} rows of {index.columns} dimensions{pictures}")
    if lacking := [
        f"{place}: {reason}" if place else reason for place, reason in places.items() if reason
    ]:
        which = "the data set" if len(places) == 1 else f"{len(lacking)} of {len(places)} data sets"
        print(
            f"note: {which} cannot be used, names are shown ({'; '.join(lacking)}); --data says "
            "where pictures are"
        )
    if not _is_loopback(door.getsockname()[0]):
        print(
            f"note: with --host {args.host} everybody who reaches this computer sees the data set"
        )
    shown = args.host if args.host not in ANY else "localhost"
    shown = f"[{shown}]" if ":" in shown else shown
    print(f"http://{shown}:{door.getsockname()[1]}   (Ctrl-C ends)", flush=True)


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


if __name__ == "__main__":
    raise SystemExit(main())
