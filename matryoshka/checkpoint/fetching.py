"""Published weights of torchvision: cached, or fetched without waiting for a dead network."""

from __future__ import annotations

import socket
from pathlib import Path

from matryoshka.checkpoint.transfer import FIRST_WEIGHTS
from matryoshka.data.downloads import NETWORK_SECONDS, within


def why_no_weights(arch: str) -> str:
    """Why published weights of a torchvision model are not available; "" if they are.

    Looks into torch's cache, then fetches them. Without a network this takes NETWORK_SECONDS at
    most; a slow download continues as long as bytes arrive.
    """
    from torch.hub import get_dir
    from torchvision.models import get_model_weights

    try:
        published = get_model_weights(arch)[FIRST_WEIGHTS]
    except (ValueError, KeyError):
        return f"torchvision publishes no weights of {arch}"
    url = published.value.url
    file = Path(get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if file.exists():
        return ""
    host = url.split("/")[2]
    try:
        if not within(NETWORK_SECONDS, lambda: reach(host)):
            return f"no network to fetch the published weights of {arch}"
        download(url, file)
    except socket.gaierror:
        return f"no network to fetch the published weights of {arch}"
    except Exception as error:  # urllib and ssl raise many types
        return f"the published weights of {arch} cannot be fetched ({error})"
    return ""


def reach(host: str) -> None:
    """Open and close a connection."""
    socket.create_connection((host, 443), NETWORK_SECONDS).close()


def download(url: str, file: Path) -> None:
    """Fetch a file of torch's cache; a stall of NETWORK_SECONDS is an error."""
    from torch.hub import download_url_to_file

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_SECONDS)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # torchvision's files end with the first digits of their SHA-256: resnet18-f37072fd.pth
        download_url_to_file(url, str(file), file.stem.rpartition("-")[2], progress=False)
    finally:
        socket.setdefaulttimeout(before)
