"""HTTP interface of the search page, for loopback, where any open web page can send requests.

    GET /  /static/NAME              the page, from files of this package
    GET /api/index                   size, model and default search of the index
    GET /api/classes                 name and number of rows of each class
    GET /api/map ?dim                points of the map of a prefix
    GET /api/random                  a random row number
    POST /api/query                  the bytes of an image -> {"query": key}
    GET /api/prediction ?row|query   the most probable classes by the model's head
    GET /api/neighbours ?SEARCH      exact neighbours at each prefix, and the fast search's
    GET /api/neighbours.json, .csv ?SEARCH                   the same, to save
    GET /api/adaptive ?SEARCH        the fast search's only
    GET /image/ROW ?size&version     JPEG

SEARCH: row=ROW or query=KEY; k=1..100; class=NAME, repeated, to find these classes only; and
shortlist, nprobe and rerank of the fast search.

Errors are {"error": one line} and reveal no paths of this machine.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Collection
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import urlsplit

from anyio import CapacityLimiter, to_thread
from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect

from matryoshka.retrieval import RetrievalError
from matryoshka.search_page.comparison import NEIGHBOURS, Choice
from matryoshka.search_page.download import as_csv, as_json
from matryoshka.search_page.log_lines import described
from matryoshka.search_page.pictures import SIZES, Refusal
from matryoshka.search_page.service import Service, Wanted

MAX_UPLOAD = 16 << 20
MAX_CONCURRENT_UPLOADS = 4  # more are refused, because each may hold MAX_UPLOAD bytes
WORKERS = 4  # concurrent searches, and concurrent pictures; more requests wait
UPLOAD_TIMEOUT = 30.0  # seconds
RETRY_SECONDS = 1  # after which a client that got 503 may ask again
LOOPBACK = frozenset(("localhost", "127.0.0.1", "[::1]"))
# A fixed list: no request can name another file.
STATIC = {
    "page.html": "text/html",
    "style.css": "text/css",
    "behaviour.js": "text/javascript",
    "dom.js": "text/javascript",
    "map.js": "text/javascript",
    "viewer.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
# The page loads scripts, styles and data from this server only. blob: shows an upload.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]/@]+)(:\d{1,5})?")
# Answers never have a traceback, which contains paths of this machine.
INTERNAL_ERROR = "the server failed; see its output"
T = TypeVar("T")
log = logging.getLogger(__name__)


def make_app(
    service: Service,
    hosts: Collection[str] = (),
    *,
    any_address: bool = False,
    max_upload: int = MAX_UPLOAD,
) -> SameOriginGuard:
    """The ASGI application.

    hosts: accepted Host names besides those of loopback. any_address: accept every IP address as
    well; unlike a name, an address cannot be made to resolve to this machine. max_upload: bytes.
    """
    # Without FastAPI's documentation pages, which load scripts from a CDN.
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    folder = Path(__file__).parent
    files = {name: (folder / name).read_bytes() for name in STATIC}
    searches = CapacityLimiter(WORKERS)
    # Separate limits: pictures and uploads must not wait for searches, nor these for them.
    pictures = CapacityLimiter(WORKERS)
    decoders = CapacityLimiter(WORKERS)
    uploads = 0

    async def work(
        function: Callable[..., T], *args: Any, limiter: CapacityLimiter = searches
    ) -> T:
        return await to_thread.run_sync(partial(function, *args), limiter=limiter)

    def static(name: str) -> Response:
        if name not in files:
            raise HTTPException(404, "no such file")
        return Response(files[name], media_type=STATIC[name], headers={"Cache-Control": "no-cache"})

    @app.get("/")
    async def page() -> Response:
        return static("page.html")

    @app.get("/static/{name}")
    async def page_file(name: str) -> Response:
        return static(name)

    @app.get("/api/index")
    async def index() -> JSONResponse:
        return JSONResponse(await work(service.index_info) | {"max_upload": max_upload})

    @app.get("/api/classes")
    async def classes() -> JSONResponse:
        return JSONResponse({"classes": await work(service.class_sizes)})

    @app.get("/api/map")
    async def map_points(dim: int) -> JSONResponse:
        return JSONResponse(await work(service.map_points, dim))

    @app.get("/api/random")
    async def random() -> JSONResponse:
        return JSONResponse({"row": await work(service.random_row)})

    @app.post("/api/query")
    async def query(request: Request) -> JSONResponse:
        nonlocal uploads
        if uploads >= MAX_CONCURRENT_UPLOADS:
            raise Refusal(503, "too many uploads at once; try again in a moment")
        # Without a lock: no `await` is between the check and the addition.
        uploads += 1
        try:
            data = await body(request, max_upload)
            return JSONResponse({"query": await work(service.add_query, data, limiter=decoders)})
        finally:
            uploads -= 1

    @app.get("/api/prediction")
    async def prediction(row: int | None = None, query: str | None = None) -> JSONResponse:
        return JSONResponse({"classes": await work(service.prediction, row, query)})

    @app.get("/api/neighbours")
    async def neighbours(search: Annotated[Wanted, Depends(wanted)]) -> JSONResponse:
        return JSONResponse(await work(service.neighbours, search))

    @app.get("/api/neighbours.json")
    async def neighbours_json(search: Annotated[Wanted, Depends(wanted)]) -> Response:
        return attachment(as_json(await work(service.neighbours, search)), "application/json")

    @app.get("/api/neighbours.csv")
    async def neighbours_csv(search: Annotated[Wanted, Depends(wanted)]) -> Response:
        return attachment(as_csv(await work(service.neighbours, search)), "text/csv")

    @app.get("/api/adaptive")
    async def adaptive(search: Annotated[Wanted, Depends(wanted)]) -> JSONResponse:
        return JSONResponse(await work(service.adaptive, search))

    @app.get("/image/{row}")
    async def image(row: int, size: int = 160, version: str | None = None) -> Response:
        if not SIZES[0] <= size <= SIZES[1]:
            raise Refusal(400, f"size: expected {SIZES[0]} to {SIZES[1]}")
        jpeg = await work(service.picture, row, size, version, limiter=pictures)
        # Another version of the index has other row numbers.
        keep = "no-store" if version is None else "private, max-age=86400, immutable"
        return Response(jpeg, media_type="image/jpeg", headers={"Cache-Control": keep})

    handlers: dict[type[Exception], Callable[[Exception], tuple[int, str]]] = {
        Refusal: lambda error: (getattr(error, "status", 400), str(error)),
        RequestValidationError: lambda error: (400, _first(error)),
        StarletteHTTPException: lambda error: (
            getattr(error, "status_code", 500),
            str(getattr(error, "detail", "")),
        ),
        RetrievalError: _damaged,
        Exception: lambda _: (500, INTERNAL_ERROR),  # SameOriginGuard logs it
    }
    for kind, status_and_message in handlers.items():
        app.add_exception_handler(kind, partial(_answer, status_and_message))
    # A wrapper, because middleware does not see answers to unhandled errors.
    return SameOriginGuard(app, frozenset(host.lower() for host in hosts) | LOOPBACK, any_address)


async def wanted(
    row: int | None = None,
    query: str | None = None,
    k: int = NEIGHBOURS,
    classes: Annotated[list[str] | None, Query(alias="class")] = None,
    *,
    shortlist: int | None = None,
    nprobe: int | None = None,
    rerank: int | None = None,
) -> Wanted:
    """A search from the parameters of its address."""
    choice = None  # unless all sliders are given
    if shortlist is not None and nprobe is not None and rerank is not None:
        choice = Choice(shortlist, nprobe, rerank)
    return Wanted(row, query, k, tuple(sorted(set(classes or ()))), choice)


def attachment(content: str, media_type: str) -> Response:
    """An answer that browsers save as neighbours.json or neighbours.csv."""
    name = f"neighbours.{media_type.rpartition('/')[2]}"
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return Response(content, media_type=media_type, headers=headers)


async def body(request: Request, most: int) -> bytes:
    """The request's body. Refusal as soon as it exceeds `most` bytes."""
    too_large = Refusal(413, f"the picture has more than {most / (1 << 20):g} MB")
    try:
        # Before anything is read; the header may be absent or wrong, so the bytes count as well.
        length = request.headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()):
            raise Refusal(400, "content-length: expected a number")
        if len(length) > 18 or int(length) > most:
            raise too_large
        data = bytearray()
        async with asyncio.timeout(UPLOAD_TIMEOUT):
            async for block in request.stream():
                data += block
                if len(data) > most:
                    raise too_large
    except TimeoutError:
        raise Refusal(408, "the upload took too long") from None
    except ClientDisconnect:
        raise Refusal(400, "the upload was interrupted") from None
    return bytes(data)


def _first(error: Any) -> str:
    """The first invalid parameter of a request and the reason, without its value."""
    first = error.errors()[0]
    return f"{first['loc'][-1]}: {first['msg']}"


def _damaged(error: Exception) -> tuple[int, str]:
    log.error("%s", error)
    return 500, INTERNAL_ERROR


async def _answer(
    status_and_message: Callable[[Exception], tuple[int, str]], _: Request, error: Exception
) -> JSONResponse:
    status, message = status_and_message(error)
    headers = {"Cache-Control": "no-store"}
    if status == 503:
        headers["Retry-After"] = str(RETRY_SECONDS)
    return JSONResponse({"error": message}, status, headers)


class SameOriginGuard:
    """Accepts requests of this page only, and adds HEADERS to every answer.

    It checks the Host, against DNS rebinding (a foreign name that resolves to this machine), and
    Sec-Fetch-Site and Origin, against requests of other sites' pages. What the application raises
    ends here, as one line of the log.
    """

    def __init__(
        self, app: Callable[..., Awaitable[None]], hosts: frozenset[str], any_address: bool
    ) -> None:
        self._app = app
        self._hosts = hosts
        self._any_address = any_address

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        begun = False

        async def guarded(message: Any) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            try:
                refused = self._refused(scope)
                answer = self._app if refused is None else JSONResponse({"error": refused}, 403)
                await answer(scope, receive, guarded)
            except Exception as error:
                log.error("%s", described(error))
                if not begun:
                    await JSONResponse({"error": INTERNAL_ERROR}, 500)(scope, receive, guarded)

    def _refused(self, scope: Any) -> str | None:
        """Why a request is refused; None if it is not."""
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._known(hosts[0].lower()):
            return "the server does not have this address; open the one that it printed"
        refusal = "pages of other sites may not send requests to this server"
        # A link on another page may open this page, which then sends requests of its own.
        is_link = scope["method"] == "GET" and scope["path"] == "/"
        sites = set(headers.getlist("sec-fetch-site"))
        if sites - {"none", "same-origin"} and not is_link:
            return refusal
        origins = headers.getlist("origin")
        if len(origins) > 1 or not all(_is_of(origin, hosts[0]) for origin in origins):
            return refusal
        return None

    def _known(self, host: str) -> bool:
        """Whether a Host header names this server; any port is accepted."""
        matched = HOST.fullmatch(host)
        if matched is None:
            return False
        name = matched[1]
        if name in self._hosts:
            return True
        try:
            return self._any_address and bool(ip_address(name.strip("[]")))
        except ValueError:
            return False


def _is_of(origin: str, host: str) -> bool:
    """Whether an Origin header names a page of this host; "null" and what is no address do not."""
    try:
        return urlsplit(origin).netloc.lower() == host.lower()
    except ValueError:
        return False
