"""Connections of the search page: how many there may be, and for how long each may say nothing.

uvicorn waits for ever for the rest of a request's header, accepts connections until the process has
no descriptor left, and then answers nobody. Here a connection that sends no request is closed after
HEADER_TIMEOUT. With the limit reached, the oldest connection that waits for a request makes room
for a new one; if all are busy, the new one gets 503.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import socket
from collections.abc import Mapping
from functools import partial
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_TIMEOUT = 10.0  # seconds for a whole header, and between two requests
SEND_TIMEOUT = 10.0  # seconds in which a client must take some bytes of an answer
# A new connection has this time for its request before it may have to make room.
GRACE = 0.25  # seconds
MAX_CONNECTIONS = 1024
# Share of the free descriptors for connections. The rest is for those that are being accepted, and
# for the files of an index that is opened again.
SHARE = 0.6
QUEUE = 256  # connections that the system keeps until they are accepted
RETRY_SECONDS = 1
log = logging.getLogger(__name__)


def connection_limit() -> int:
    """How many connections the descriptors of this process allow, at least 4."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    try:
        used = len(os.listdir("/dev/fd"))
    except OSError:
        used = 64
    return max(4, min(MAX_CONNECTIONS, int((allowed - used) * SHARE)))


class Listener(socket.socket):
    """A listening socket where more clients may wait than the event loop accepts at once.

    A client that finds no place in the queue asks again after seconds only.
    """

    def listen(self, backlog: int = QUEUE, /) -> None:
        super().listen(max(backlog, QUEUE))


class Connections:
    """All connections of a server, and those that wait for a request, the oldest first."""

    def __init__(self, limit: int, headers: Mapping[str, str]) -> None:
        self.limit = limit
        self.headers = [(name.encode(), value.encode()) for name, value in headers.items()]
        self.open: set[Connection] = set()
        self.waiting: dict[Connection, float] = {}  # since when, by the clock of the loop

    def server_options(self) -> dict[str, Any]:
        """Options of uvicorn.Config with which a server has these connections."""
        return {
            "http": partial(Connection, connections=self),
            "ws": "none",
            # The event loop accepts this number at once, before it looks at any of them.
            "backlog": max(1, min(64, self.limit // 16)),
        }

    def make_room(self, now: float) -> bool:
        """Close the connection that has waited for the longest time; False if none may go."""
        for connection, since in self.waiting.items():
            if now - since < GRACE:
                break
            connection.abort()
            return True
        return False


class Connection(H11Protocol):
    """A connection with time limits; every answer of its own has the security headers."""

    def __init__(
        self,
        config: Config,
        server_state: Any,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        connections: Connections,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._all = connections
        self._timer: asyncio.TimerHandle | None = None
        self._unsent = 0  # bytes of the answer when the timer was set

    # ---- life ----

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        self._all.open.add(self)
        self._wait()
        is_full = len(self._all.open) > self._all.limit
        if is_full and not self._all.make_room(self.loop.time()):
            log.warning("%d connections are open: a further one is refused", self._all.limit)
            self._refuse(503, "too many connections; try again in a moment")

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        self._guarded(super().connection_lost, exc)

    def abort(self) -> None:
        """End the connection at once; what it has not sent is lost."""
        self._forget()
        self.transport.abort()

    def _forget(self) -> None:
        self._all.open.discard(self)
        self._all.waiting.pop(self, None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # ---- requests ----

    def data_received(self, data: bytes) -> None:
        self._guarded(super().data_received, data)
        is_busy = self.cycle is not None and not self.cycle.response_complete
        if is_busy and self._all.waiting.pop(self, None) is not None and self._timer is not None:
            self._timer.cancel()

    def on_response_complete(self) -> None:
        self._wait()
        self._guarded(super().on_response_complete)

    def shutdown(self) -> None:
        self._guarded(super().shutdown)

    def timeout_keep_alive_handler(self) -> None:
        self._guarded(super().timeout_keep_alive_handler)

    def _guarded(self, step: Any, *arguments: Any) -> None:
        """A step of uvicorn's; asyncio would log a traceback for what it raises."""
        try:
            step(*arguments)
        except Exception as error:
            # h11 refuses a step that does not fit the state of a broken conversation.
            if not isinstance(error, h11.ProtocolError):
                log.error("%s: %s", type(error).__name__, error)
            if self.transport is not None:
                self.abort()

    def _unsupported_upgrade_warning(self) -> None:
        """The request is answered as if it asked for no upgrade."""

    # ---- time limits ----

    def _wait(self) -> None:
        """Wait for the next request, which must be whole in HEADER_TIMEOUT, however it trickles."""
        if self not in self._all.open:
            return
        self._all.waiting.pop(self, None)
        self._all.waiting[self] = self.loop.time()
        self._unsent = self.transport.get_write_buffer_size()
        self._set_timer(HEADER_TIMEOUT)

    def _set_timer(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(seconds, self._time_is_up)

    def _time_is_up(self) -> None:
        """Close the connection, unless its client is still taking a long answer."""
        left = self.transport.get_write_buffer_size()
        if 0 < left < self._unsent:
            self._unsent = left
            self._set_timer(SEND_TIMEOUT)
            return
        self.abort()

    # ---- answers without the application ----

    def send_400_response(self, msg: str) -> None:
        if self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:
            # The body is broken: nobody waits for the application's answer any more.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._refuse(400, "this is not a request that the server can read")

    def _refuse(self, status: int, message: str) -> None:
        """Answer without the application, and close."""
        body = b'{"error":"%s"}' % message.encode()
        headers = [
            *self._all.headers,
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"cache-control", b"no-store"),
            (b"connection", b"close"),
        ]
        if status == 503:
            headers.append((b"retry-after", b"%d" % RETRY_SECONDS))
        lines = [b"HTTP/1.1 %d %s" % (status, {400: b"Bad Request"}.get(status, b"Busy"))]
        lines += [name + b": " + value for name, value in headers]
        self._all.waiting.pop(self, None)
        self.transport.write(b"\r\n".join(lines) + b"\r\n\r\n" + body)
        self.transport.close()
        # A client that takes nothing of it must not keep the descriptor.
        self._unsent = 0
        self._set_timer(SEND_TIMEOUT)
