"""Downloads from a server on this machine: whole, interrupted, damaged, refused."""

import hashlib
import os
import re
import resource
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from matryoshka.data import downloads
from matryoshka.data.catalogue import RemoteFile
from matryoshka.data.downloads import DownloadError, downloaded, within

BODY = bytes(range(256)) * 40


class Server:
    """What the handler does, and what it was asked for.

    cuts: bytes after which the next answers end. ranges: whether parts of a file are sent.
    """

    def __init__(self):
        self.cuts: list[int] = []
        self.ranges = True
        self.asked: list[str | None] = []
        self.url = ""
        self.body = BODY


@pytest.fixture(scope="module")
def running():
    server = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            wanted = self.headers.get("Range")
            server.asked.append(wanted)
            if "missing" in self.path:
                self.send_error(404)
                return
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted else 0
            start = start if server.ranges else 0
            if start >= len(server.body):
                self.send_error(416)
                return
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(server.body) - start))
            self.end_headers()
            end = start + server.cuts.pop(0) if server.cuts else None
            self.wfile.write(server.body[start:end])

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        server.url = f"http://127.0.0.1:{served.server_port}"
        thread = threading.Thread(target=served.serve_forever, args=(0.01,))
        thread.start()
        yield server
        served.shutdown()
        thread.join()


@pytest.fixture
def server(running):
    running.cuts, running.ranges, running.asked, running.body = [], True, [], BODY
    return running


def remote(server, name="a.tar.gz", body=BODY):
    md5 = hashlib.md5(body).hexdigest()
    return RemoteFile(f"{server.url}/{name}", md5=md5, size=len(body))


def test_a_file_is_fetched_once(server, tmp_path):
    steps = []
    folder = tmp_path / "new" / "data"
    path = downloaded(remote(server), folder, lambda *step: steps.append(step))
    assert path == folder / "a.tar.gz"
    assert path.read_bytes() == BODY
    assert steps[-1] == ("download a.tar.gz", len(BODY), len(BODY))
    assert downloaded(remote(server), folder) == path
    assert server.asked == [None]
    assert [p.name for p in folder.iterdir()] == ["a.tar.gz"]


@settings(max_examples=25)
@given(cuts=st.lists(st.integers(1, 4000), max_size=5), ranges=st.booleans())
def test_an_interrupted_download_continues(running, tmp_path_factory, cuts, ranges):
    tmp_path = tmp_path_factory.mktemp("cut")
    running.cuts, running.ranges, running.asked, running.body = list(cuts), ranges, [], BODY
    for _ in range(len(cuts) + 1):
        try:
            path = downloaded(remote(running), tmp_path)
            break
        except DownloadError:
            assert [p.name for p in tmp_path.iterdir()] == ["a.tar.gz.part"]
    assert path.read_bytes() == BODY
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar.gz"]
    if ranges:
        positions = [0]
        for cut in cuts:
            positions.append(positions[-1] + cut)
        expected = [f"bytes={k}-" if k else None for k in positions if k < len(BODY)]
        assert running.asked == expected, "only the missing bytes are asked for"


def test_the_part_of_an_earlier_call_is_continued(server, tmp_path):
    (tmp_path / "a.tar.gz.part").write_bytes(BODY[:3000])
    assert downloaded(remote(server), tmp_path).read_bytes() == BODY
    assert server.asked == ["bytes=3000-"]
    whole = tmp_path / "b.tar.gz.part"
    whole.write_bytes(BODY)  # stopped before the last step
    assert downloaded(remote(server, "b.tar.gz"), tmp_path).read_bytes() == BODY
    assert server.asked == ["bytes=3000-"]


def test_a_damaged_download_is_not_kept(server, tmp_path):
    server.body = BODY[:-1] + b"?"
    with pytest.raises(DownloadError, match=r"a\.tar\.gz: the file received has the MD5 .* start"):
        downloaded(remote(server), tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a.tar.gz.part").write_bytes(b"wrong" * 10)
    server.body = BODY
    with pytest.raises(DownloadError, match="the file received has the MD5"):
        downloaded(remote(server), tmp_path)
    assert downloaded(remote(server), tmp_path).read_bytes() == BODY


def test_another_file_of_the_server_is_not_received(server, tmp_path):
    server.body = b"<html>moved</html>"
    with pytest.raises(DownloadError, match="the server's file has 18 bytes, not 10,240"):
        downloaded(remote(server), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [BODY[:-1] + b"?", BODY[:100], b""])
def test_a_wrong_file_of_the_user_is_named_and_kept(server, tmp_path, content):
    path = tmp_path / "a.tar.gz"
    path.write_bytes(content)
    with pytest.raises(DownloadError, match=re.escape(f"{path}: ")) as error:
        downloaded(remote(server), tmp_path)
    assert "move it away and start again" in str(error.value)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == content
    assert server.asked == []


def test_without_a_network_the_message_says_where_the_file_goes(server, tmp_path):
    for file, reason in (
        (remote(server, "missing.zip"), "HTTP 404"),
        (RemoteFile("http://127.0.0.1:9/a.zip", md5="", size=9), "Connection refused"),
        (RemoteFile("http://no.such.host.invalid/a.zip", md5="", size=9), "cannot"),
    ):
        with pytest.raises(DownloadError, match=reason) as error:
            downloaded(file, tmp_path)
        message = str(error.value)
        assert message.startswith(f"{file.url}: cannot be fetched (")
        assert message.endswith(f"or put the file at {tmp_path / file.name}")
        assert "\n" not in message
        assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named(server, tmp_path):
    """What was received stays, and is continued once there is space."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(BODY) // 2, limits[1]))
    try:
        with pytest.raises(DownloadError, match=r"a\.tar\.gz: cannot be written: File too large"):
            downloaded(remote(server), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(server.asked) == 1
    assert not (tmp_path / "a.tar.gz").exists()
    assert downloaded(remote(server), tmp_path).read_bytes() == BODY


@pytest.mark.parametrize("kind", ["pipe", "device", "loop"])
def test_a_part_that_is_no_regular_file(server, tmp_path, kind):
    part = tmp_path / "a.tar.gz.part"
    if kind == "pipe":
        os.mkfifo(part)
    else:
        part.symlink_to("/dev/zero" if kind == "device" else part)
    with pytest.raises(DownloadError, match=r"a\.tar\.gz\.part: "):
        downloaded(remote(server), tmp_path)


def test_a_server_that_always_stops_is_given_up(server, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "_ATTEMPTS", 2)
    server.cuts = [5000, 0, 0]
    with pytest.raises(DownloadError, match="cannot be fetched after 5,000 of 10,240 bytes"):
        downloaded(remote(server), tmp_path)
    assert (tmp_path / "a.tar.gz.part").read_bytes() == BODY[:5000]
    assert downloaded(remote(server), tmp_path).read_bytes() == BODY


def test_two_at_a_time_give_one_file(server, tmp_path):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(downloaded(remote(server), tmp_path)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / "a.tar.gz"] * 4
    assert found[0].read_bytes() == BODY
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar.gz"]


@pytest.mark.parametrize("what", ["part", "refused"])
def test_a_download_continues_what_another_process_left(server, tmp_path, monkeypatch, what):
    """While this one waited, the other has received a part, or has deleted what it received."""
    lock = downloads.fcntl.flock
    part = tmp_path / "a.tar.gz.part"

    def after_waiting(output, operation):
        monkeypatch.setattr(downloads.fcntl, "flock", lock)
        if what == "part":
            part.write_bytes(BODY[:1000])
        else:
            part.unlink()
        lock(output, operation)

    monkeypatch.setattr(downloads.fcntl, "flock", after_waiting)
    file = remote(server)
    assert downloaded(file, tmp_path).read_bytes() == BODY
    assert server.asked == (["bytes=1000-"] if what == "part" else [None])


def test_a_folder_that_cannot_be_created(server, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DownloadError, match="file"):
        downloaded(remote(server), tmp_path / "file" / "data")


def test_within():
    assert within(5, lambda: None)
    assert not within(0.02, lambda: time.sleep(0.3))
    with pytest.raises(KeyError):
        within(5, lambda: {}["x"])
