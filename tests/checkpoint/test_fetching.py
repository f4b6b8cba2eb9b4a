"""Published weights: from the cache, or fetched without waiting for a dead network."""

import hashlib
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torchvision

from matryoshka.checkpoint import fetching
from matryoshka.checkpoint.transfer import FIRST_WEIGHTS

BODY = b"weights" * 1000
DIGEST = hashlib.sha256(BODY).hexdigest()[:8]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of torch."""
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    return tmp_path / "checkpoints"


@pytest.fixture
def server():
    """Address of a server on this machine: BODY for every path, and nothing for /stalled."""
    released = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(BODY)))
            self.end_headers()
            if "stalled" in self.path:
                released.wait(20)
                return
            self.wfile.write(BODY)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        thread = threading.Thread(target=served.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{served.server_port}"
        released.set()
        served.shutdown()
        thread.join()


def publish(monkeypatch, url):
    """torchvision publishes the weights of every model at `url`."""
    weights = {FIRST_WEIGHTS: SimpleNamespace(value=SimpleNamespace(url=url))}
    monkeypatch.setattr("torchvision.models.get_model_weights", lambda arch: weights)


def no_network(*_):
    raise OSError("no route")


def test_a_cached_file_needs_no_network(cache, monkeypatch):
    url = torchvision.models.get_model_weights("resnet18")[FIRST_WEIGHTS].value.url
    cache.mkdir()
    (cache / url.rpartition("/")[2]).touch()
    monkeypatch.setattr(socket, "create_connection", no_network)
    assert fetching.why_no_weights("resnet18") == ""


def test_models_without_published_weights(cache, monkeypatch):
    monkeypatch.setattr(socket, "create_connection", no_network)
    assert fetching.why_no_weights("resnet10") == "torchvision publishes no weights of resnet10"


def test_a_refused_connection_is_a_reason(cache, monkeypatch):
    monkeypatch.setattr(socket, "create_connection", no_network)
    reason = fetching.why_no_weights("resnet18")
    assert reason == "the published weights of resnet18 cannot be fetched (no route)"
    assert not cache.exists()


def test_a_network_that_does_not_answer_is_a_reason_in_time(cache, monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(socket, "create_connection", lambda *_: released.wait(20))
    monkeypatch.setattr(fetching, "NETWORK_SECONDS", 0.2)
    began = time.monotonic()
    try:
        reason = fetching.why_no_weights("resnet18")
    finally:
        released.set()
    assert reason == "no network to fetch the published weights of resnet18"
    assert time.monotonic() - began < 5


def test_a_file_is_fetched(cache, server, monkeypatch):
    publish(monkeypatch, f"{server}/resnet18-{DIGEST}.pth")
    monkeypatch.setattr(fetching, "reach", lambda host: None)
    assert fetching.why_no_weights("resnet18") == ""
    assert (cache / f"resnet18-{DIGEST}.pth").read_bytes() == BODY


def test_a_wrong_hash_is_refused_and_nothing_stays(cache, server, monkeypatch):
    publish(monkeypatch, f"{server}/resnet18-00000000.pth")
    monkeypatch.setattr(fetching, "reach", lambda host: None)
    reason = fetching.why_no_weights("resnet18")
    assert reason.startswith("the published weights of resnet18 cannot be fetched (invalid hash")
    assert "\n" not in reason
    assert list(cache.iterdir()) == []


def test_a_stalled_download_is_an_error_and_nothing_stays(cache, server, monkeypatch):
    monkeypatch.setattr(fetching, "NETWORK_SECONDS", 0.2)
    with pytest.raises(TimeoutError):
        fetching.download(f"{server}/stalled-{DIGEST}.pth", cache / f"stalled-{DIGEST}.pth")
    assert list(cache.iterdir()) == []
    assert socket.getdefaulttimeout() is None
