"""Serve a page that searches an index: drop an image and compare exact and fast neighbours.

    matryoshka retrieve serve photos.index
    matryoshka retrieve serve photos.index --model runs/demo/mrl/model.safetensors --data photos

The server listens on this computer only, unless --host is given; it has no passwords. The page
shows small pictures from the embedded data set, or names if the data set is missing. The index may
change while the server runs.
"""

from __future__ import annotations

import ipaddress
import os
import shlex
import socket
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

# Two spinning thread pools compete for the cores: a third of the speed is lost. Read at import.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from matryoshka import config
from matryoshka.search_page.options import serve_parser as parser

if __name__ == "__main__":
    config.check_first(parser())  # torch takes two seconds to import

import numpy as np
import torch
from PIL import Image

from matryoshka import devices, distributed
from matryoshka.checkpoint.adapter_file import add_adapter
from matryoshka.checkpoint.published import PREFIXES, load_any
from matryoshka.data import CenterCrop
from matryoshka.data.augment import Preprocessing
from matryoshka.data.images import central_square
from matryoshka.data.resized_images import resize_and_crop
from matryoshka.embeddings.reading import embedding_sha256
from matryoshka.evaluation.embedding import fingerprint
from matryoshka.models import NestedModel, widest
from matryoshka.retrieval.store import Index

TOP = 3  # predicted classes of a query
ANY_ADDRESS = ("0.0.0.0", "::", "")  # --host values that listen on all interfaces


@config.program
def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    search_page = import_server()
    index = Index(args.index, args.threads)
    moved = moved_data_sets(index, args.data)
    # The port is taken before the model is loaded, so that a port in use is reported at once.
    with open_socket(args.host, args.port) as server_socket:
        model = load(args, index)
        pictures = search_page.Pictures(moved, lambda data: fingerprint(data, data.labels))
        service = search_page.Service(
            index,
            encoder(model, index.preprocessing),
            embedding_sha256(model),
            pictures,
            classify=classifier(model),
        )
        announce(args, index, service, server_socket)
        app = search_page.make_app(
            service,
            hosts(args.host),
            any_address=args.host in ANY_ADDRESS,
            max_upload=int(args.max_upload_mb * (1 << 20)),
        )
        run_server(app, server_socket)
    return 0


def run_server(app: Any, server_socket: socket.socket) -> None:
    """Answer requests until Ctrl-C."""
    import uvicorn

    from matryoshka.search_page.app import HEADERS
    from matryoshka.search_page.connections import Connections, Listener, connection_limit
    from matryoshka.search_page.log_lines import quiet_log

    allowed = Connections(connection_limit(), HEADERS)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=3,
            **allowed.server_options(),
        )
    )
    try:
        with quiet_log():
            server.run(sockets=[Listener(fileno=server_socket.detach())])
    except KeyboardInterrupt:  # uvicorn raises it again after its shutdown
        print()


def import_server() -> Any:
    """matryoshka.search_page. ConfigError if one of its packages is missing."""
    try:
        import uvicorn  # noqa: F401 - for run_server

        from matryoshka import search_page
        from matryoshka.search_page import make_app  # noqa: F401 - needs fastapi
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "uvicorn"):
            raise
        raise config.ConfigError(
            f"retrieve serve needs {error.name}: pip install {error.name}"
        ) from None
    return search_page


def moved_data_sets(index: Index, paths: Sequence[str] | None) -> dict[str, str]:
    """--data as a map: the path that the index has -> where the data set is now."""
    if not paths:
        return {}
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        raise config.ConfigError(f"--data {missing[0]}: no such file or folder")
    known = list(
        dict.fromkeys(str(source.get("path") or "") for part in index.parts for source in part.data)
    )
    if len(paths) != len(known):
        number = "1 data set" if len(known) == 1 else f"{len(known)} data sets"
        # The error shows the options in the index's order, ready to copy.
        options = " ".join(f"--data {shlex.quote(path) if path else 'PATH'}" for path in known)
        order = ", in this order" if len(known) > 1 else ""
        raise config.ConfigError(
            f"--data: {index.path} has {number}; give {options}{order}, or their present paths"
        )
    return dict(zip(known, paths, strict=True))


def open_socket(host: str, port: int) -> socket.socket:
    """A listening socket. ConfigError for an address or port that cannot be used."""
    try:
        addresses = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, _, _, _, address = addresses[0]
    except (OSError, UnicodeError):
        raise config.ConfigError(
            f"--host {host}: is not an address or name of this computer"
        ) from None
    try:
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        raise config.ConfigError(
            f"--port {port} of --host {host}: {error.strerror}; choose another"
        ) from None


def load(args: SimpleNamespace, index: Index) -> NestedModel:
    """The index's model, on its device.

    ConfigError, RetrievalError or CheckpointError if it is missing, another model, or damaged.
    """
    name = args.model or str(index.model.get("file") or "")
    # PREFIXES: published models (torchvision:NAME, ...), which are not files.
    if not name.startswith(PREFIXES) and not os.path.isfile(name):
        source = "" if args.model else f", which made {args.index}"
        raise config.ConfigError(
            f"--model {name}: no such file{source}; give the model's file with --model"
        )
    head = str(index.model.get("head"))
    flags = {}
    if name.endswith(".pt"):  # weights alone do not always identify the head
        flags = {"mrl": head == "mrl", "efficient": head == "mrl-e"}
    model = widest(load_any(name, "--model", **flags))
    made_by = index.model.get("adapter")
    adapter = args.adapter or (made_by["file"] if made_by else None)
    if adapter:
        if not os.path.isfile(adapter):
            raise config.ConfigError(
                f"--adapter {adapter}: no such file, which made {args.index}; give its present path"
            )
        add_adapter(model, adapter, f"--model {name}")
    index.check_model(embedding_sha256(model), f"--model {name}")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = distributed.pick_device(args.device, 0)
    devices.choose_kernels(device)
    return model.to(device)


def encoder(
    model: NestedModel, preprocessing: Mapping[str, Any]
) -> Callable[[np.ndarray], np.ndarray]:
    """A function uint8 [H, W, 3] -> float32 [D], with the preprocessing of the index's images."""
    try:
        size = preprocessing["size"]
        ratio = preprocessing["ratio"]
        mean = tuple(preprocessing["mean"])
        std = tuple(preprocessing["std"])
        model.preprocessing = Preprocessing(size, ratio, mean, std)
        crop = CenterCrop(size, ratio)
    except (KeyError, TypeError, ValueError):
        raise config.ConfigError(
            f"the index has no usable preprocessing ({dict(preprocessing)}); embed its images again"
        ) from None

    def encode(pixels: np.ndarray) -> np.ndarray:
        # The two ways in which `matryoshka embed` prepares images.
        if preprocessing.get("name") == "upstream":
            square = resize_and_crop(Image.fromarray(pixels))
        else:
            square = central_square(pixels, crop)
        return model.encode(torch.from_numpy(np.array(square))[None])[0].cpu().numpy()

    return encode


def classifier(model: NestedModel) -> Callable[[np.ndarray], list[tuple[str, float]]] | None:
    """A function embedding, float32 [D] -> (class, probability) of the TOP most probable classes.

    By the classifier of the longest prefix. None for a model without class names, and behind an
    adapter, whose embeddings are not what the classifier sees.
    """
    names = model.classes
    if not names or model.adapter is not None:
        return None
    device = next(model.parameters()).device

    @torch.no_grad()
    def classify(features: np.ndarray) -> list[tuple[str, float]]:
        logits = model.head(torch.from_numpy(features)[None].to(device))[-1, 0]  # [C]
        best = logits.float().softmax(0).topk(min(TOP, len(names)))
        return [
            (names[label], probability)
            for label, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    return classify


def hosts(host: str) -> list[str]:
    """Host names of the page, besides those of loopback."""
    if host in ANY_ADDRESS:
        return [socket.gethostname(), socket.getfqdn()]
    return [f"[{host}]" if ":" in host else host]


def announce(
    args: SimpleNamespace, index: Index, service: Any, server_socket: socket.socket
) -> None:
    """Print the index, notes about missing pictures and open access, and the address."""
    missing = service.missing_pictures()
    usable = [path for path, reason in missing.items() if reason is None]
    pictures = f", pictures from {', '.join(usable)}" if usable else ""
    print(f"{args.index}: {len(index):,} rows of {index.columns} dimensions{pictures}")
    reasons = [
        f"{path}: {reason}" if path else reason for path, reason in missing.items() if reason
    ]
    if reasons:
        which = "the data set"
        if len(missing) > 1:
            which = f"{len(reasons)} of {len(missing)} data sets"
        print(
            f"note: {which} cannot be used, the page shows names ({'; '.join(reasons)}); --data "
            "gives another path"
        )
    if not _is_loopback(server_socket.getsockname()[0]):
        print(
            f"note: with --host {args.host} everyone who can reach this computer sees the data set"
        )
    shown = args.host if args.host not in ANY_ADDRESS else "localhost"
    shown = f"[{shown}]" if ":" in shown else shown
    print(f"http://{shown}:{server_socket.getsockname()[1]}   (Ctrl-C ends)", flush=True)


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


if __name__ == "__main__":
    raise SystemExit(main())
