"""Hostile clients of the search page, on real sockets: it answers others, and says little."""

import contextlib
import http.client
import io
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from attacks.scale import scaled
from PIL import Image

pytest.importorskip("fastapi", reason="fastapi is not installed (requirements-dev.txt)")

from matryoshka.search_page.app import HEADERS

BUILDERS = Path(__file__).resolve().parents[1] / "builders"
HEADER_TIMEOUT = 2.0
MEMORY = scaled(48 << 20, 512 << 20)
SIDE = scaled(1800, 7000)  # of the pictures that fill the memory: 8 bytes a pixel


class Server:
    """The page in a process with 200 descriptors."""

    def __init__(self, folder):
        self.log = folder / "log"
        command = [sys.executable, BUILDERS / "page_server.py", folder / "photos.index"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*map(str, command), "200", str(HEADER_TIMEOUT), str(MEMORY)],
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        self.port = int(self.process.stdout.readline())
        self.started = time.monotonic()

    def connected(self):
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def get(self, path="/", **headers):
        """(status, headers, body)"""
        return self.asked("GET", path, None, headers)

    def asked(self, method, path, body, headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def sent(self, request: bytes) -> bytes:
        """The whole answer to the bytes of a request."""
        with self.connected() as connection, contextlib.suppress(ConnectionError):
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
            received = b""
            while block := connection.recv(1 << 16):
                received += block
            return received
        return b""

    def peak(self):
        """Largest memory so far, bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) << 10

    def check(self):
        """It lives, and its log has at most one line a second, none of a traceback."""
        assert self.process.poll() is None
        lines = self.log.read_text().splitlines()
        assert len(lines) <= time.monotonic() - self.started + 1, lines[:5]
        assert max(map(len, lines), default=0) < 600
        assert not [line for line in lines if "Traceback" in line or 'File "' in line]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("attacked"))
    yield server
    server.check()
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(30) == 0


def has_headers(answer) -> bool:
    return all(answer.get(name) == value for name, value in HEADERS.items())


# ---------------------------------------------------------------- clients that say nothing


def test_half_sent_headers_keep_nobody_out(server):
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(server.connected()) for _ in range(260)]
        for client in silent:
            with contextlib.suppress(OSError):  # closed by then
                client.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: ")
        time.sleep(0.5)
        for _ in range(5):
            status, headers, _ = server.get()
            assert (status, has_headers(headers)) == (200, True)
        began = time.monotonic()
        for client in silent:  # the server closes all of them
            client.settimeout(20)
            with contextlib.suppress(ConnectionError):
                while client.recv(1 << 16):
                    pass
        assert time.monotonic() - began < 3 * HEADER_TIMEOUT + 2
    assert server.get()[0] == 200
    server.check()


def test_a_header_that_trickles_is_cut_off(server):
    with server.connected() as client:
        client.settimeout(0.1)
        began = time.monotonic()
        closed = False
        client.sendall(b"GET / HTTP/1.1\r\n")
        while not closed and time.monotonic() - began < 20:
            try:
                client.sendall(b"X-A: b\r\n")
                closed = client.recv(100) == b""
            except TimeoutError:
                continue
            except ConnectionError:
                closed = True
        assert closed
        assert time.monotonic() - began < HEADER_TIMEOUT + 5


def test_bodies_that_do_not_arrive(server):
    head = (
        b"POST /api/query HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n"
        b"Connection: close\r\n\r\nabc"
    )
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(server.connected()) for _ in range(8)]
        for client in silent:
            client.sendall(head)
        answers = []
        for client in silent:
            client.settimeout(20)
            received = b""
            while block := client.recv(1 << 16):
                received += block
            answers.append(received.partition(b"\r\n")[0].split()[1])
            assert b"Content-Security-Policy" in received or b"content-security" in received
    assert set(answers) == {b"408", b"503"}
    assert answers.count(b"408") == 4


def test_many_requests_at_once_are_answered(server):
    answers = []

    def ask():
        for _ in range(20):
            status, headers, _ = server.get("/api/index")
            answers.append((status, has_headers(headers)))
            if status == 200:
                break
            assert headers["retry-after"] == "1"
            time.sleep(0.3)

    threads = [threading.Thread(target=ask) for _ in range(scaled(120, 500))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(headers for _, headers in answers)
    assert sum(status == 200 for status, _ in answers) == len(threads)


# ---------------------------------------------------------------- pictures that fill the memory


def test_pictures_share_their_memory(server):
    file = io.BytesIO()
    Image.fromarray(np.zeros((SIDE, SIDE, 3), np.uint8)).save(file, "PNG", compress_level=6)
    small = io.BytesIO()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(small, "PNG")
    assert server.asked("POST", "/api/query", small.getvalue(), {})[0] == 200
    before = server.peak()
    answers = []

    def upload():
        answers.append(server.asked("POST", "/api/query", file.getvalue(), {}))

    threads = [threading.Thread(target=upload) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {status for status, _, _ in answers} <= {200, 503}
    for status, headers, _ in answers:
        assert has_headers(headers)
        assert (headers["retry-after"] is None) == (status == 200)
    assert 200 in {status for status, _, _ in answers}
    # 16 MB for the uploads and the strips in which Pillow's pixels are converted.
    assert server.peak() - before < MEMORY + (16 << 20)
    # It has what the others have given back.
    assert server.asked("POST", "/api/query", file.getvalue(), {})[0] == 200


# ---------------------------------------------------------------- requests that are none

ORIGINS = ("http://[", "http://[::1", "//[", "http://]", "null", "", "http://[v1.x]", "http://\x80")


def test_an_origin_that_is_no_address(server):
    for origin in ORIGINS:
        request = b"GET /api/index HTTP/1.1\r\nHost: 127.0.0.1\r\nOrigin: %s\r\n\r\n"
        answer = server.sent(request % origin.encode("latin-1"))
        assert answer.startswith(b"HTTP/1.1 403 "), (origin, answer[:100])
        assert b"same-origin" in answer


PIECES = (
    b"GET",
    b"POST",
    b"HEAD",
    b"CONNECT",
    b"\xff",
    b" ",
    b"/",
    b"/api/neighbours?row=1&k=3",
    b"/api/neighbours?row=1e9&class=%ff",
    b"/api/query",
    b"/image/1?size=99999999999999999999",
    b"/api/map?dim=-1",
    b"http://127.0.0.1/",
    b"*",
    b" HTTP/1.1",
    b" HTTP/9.9",
    b" HTTP/1.0",
    b"\r\n",
    b"\n",
    b"\r",
    b"Host: 127.0.0.1\r\n",
    b"Host: [\r\n",
    b"Host:\r\n",
    b"Origin: http://[\r\n",
    b"Sec-Fetch-Site: same-origin\r\n",
    b"Content-Length: 5\r\n",
    b"Content-Length: -1\r\n",
    b"Content-Length: 99999999999999999999\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: gzip, chunked\r\n",
    b"Expect: 100-continue\r\n",
    b"Connection: Upgrade\r\nUpgrade: websocket\r\n",
    b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n",
    b"X: " + b"y" * 70_000 + b"\r\n",
    b"\x00",
    b"5\r\nhello\r\n0\r\n\r\n",
    b"zz\r\n",
    b"hello",
)


def hostile_request(rng: random.Random) -> bytes:
    """A request with something wrong in it, or nothing."""
    lines = [rng.choice(PIECES[:5]), b" ", rng.choice(PIECES[6:14]), rng.choice(PIECES[14:17])]
    lines.append(b"\r\n")
    if rng.random() < 0.8:
        lines.append(b"Host: 127.0.0.1\r\n")
    lines += [rng.choice(PIECES) for _ in range(rng.randrange(5))]
    lines.append(b"\r\n")
    if rng.random() < 0.5:
        lines += [rng.choice(PIECES) for _ in range(rng.randrange(4))]
    request = bytearray(b"".join(lines))
    for _ in range(rng.choice((0, 0, 1, 3))):
        request[rng.randrange(len(request))] = rng.randrange(256)
    return bytes(
        request[: rng.choice((len(request), len(request), rng.randrange(len(request)))) + 1]
    )


def test_no_request_gets_a_traceback_or_an_answer_without_headers(server):
    rng = random.Random(scaled(1, time.time_ns()))
    statuses = set()
    for turn in range(scaled(150, 20_000)):
        request = hostile_request(rng)
        answer = server.sent(request)
        for part in answer.split(b"HTTP/1.1 ")[1:]:
            status = int(part[:3])
            if status == 100:
                continue
            statuses.add(status)
            head = part.partition(b"\r\n\r\n")[0].lower()
            assert status < 500, (turn, request[:300], part[:300])
            for name in HEADERS:
                assert name.lower().encode() in head, (turn, request[:300], part[:300])
    assert {200, 400, 403} <= statuses
    server.check()
    assert server.get()[0] == 200
