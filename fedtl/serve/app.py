"""The web application: one exported model behind ``/predict``, and a page to try it on.

Nothing of a request is written anywhere. Every error is JSON and says what would have been taken.
No request of a page goes anywhere but here: there are no scripts or fonts from elsewhere.
"""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.types import ASGIApp, Receive, Scope, Send

from fedtl.errors import InputError
from fedtl.serve import page
from fedtl.serve.gate import Gate, HungUp, Refused, body_size, read_body
from fedtl.serve.predictor import MAX_EXAMPLES, Predictor
from fedtl.serve.schema import describe
from fedtl.serve.workers import Workers

BODY_BYTES = 16 * 2**20
"""Of one request."""

BODY_SECONDS = 30.0
"""In which a body must have come."""

SMALL_BYTES = 2**20
"""Bodies up to here have memory of their own: long ones that come slowly never keep them out."""

KINDS = {
    "images": ("multipart/form-data", "image/*", "application/octet-stream"),
    "texts": ("application/json",),
    "rows": ("application/json",),
}
"""Content types of a request, by what the model takes."""

_log = logging.getLogger("uvicorn.error")

SAFE = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}


@dataclass(frozen=True)
class Limits:
    """What a server takes.

    Attributes:
        body: bytes of one request.
        seconds: in which it must have come.
        threads: that answer side by side.
        hosts: names that a request may give in its header Host; empty: any. On the loopback this
            keeps a page of elsewhere, whose name was made to point here, from asking.
        small, large: bytes of all bodies in memory, up to ``SMALL_BYTES`` each and beyond. Room is
            made before a body is read, for all of it, and kept until it is answered.
        work: requests worked on, each of which may hold decoded pictures. Only those whose body is
            whole: however slowly others come, they take no place.
    """

    body: int = BODY_BYTES
    seconds: float = BODY_SECONDS
    threads: int = 2
    hosts: tuple[str, ...] = ()
    small: Gate = field(default_factory=lambda: Gate(128 * 2**20))
    large: Gate = field(default_factory=lambda: Gate(384 * 2**20))
    work: Gate = field(default_factory=lambda: Gate(8))

    @property
    def waits(self) -> int:
        """Requests that wait for room or for a place."""
        return self.small.waits + self.large.waits + self.work.waits


def make_app(predictor: Predictor, limits: Limits) -> ASGIApp:
    """The application of one model."""
    app = FastAPI(
        title=f"fedtl: {predictor.card.get('name', 'model')}",
        version=str(predictor.card.get("format", 1)),
        docs_url=None,  # they are loaded from elsewhere
        redoc_url=None,
    )
    workers = Workers(limits.threads)
    body = describe(predictor)

    @app.post("/predict", **body)
    async def predict(request: Request) -> Response:
        kind = _content_type(request.headers, predictor)
        size = body_size(request.headers.get("content-length"), limits.body)
        memory = limits.small if size <= SMALL_BYTES else limits.large
        await memory.enter(size)
        try:
            content = await read_body(request.receive, size, limits.seconds)
            await limits.work.enter()
            try:
                examples = await _examples(request.headers, kind, content, predictor)
                found = await workers.do(predictor.answer, examples)
            finally:
                limits.work.leave()
        finally:
            memory.leave(size)
        return _Json({"predictions": found})

    @app.get("/health")
    async def health() -> Response:
        """Whether the model is there, and how many requests wait."""
        name = predictor.card.get("name")
        return _Json({"status": "ok", "model": name, "waiting": limits.waits})

    @app.get("/metadata")
    async def metadata() -> Response:
        """Labels, preprocessing and the model's card."""
        labels, steps = list(predictor.labels), predictor.preprocessing
        return _Json({"labels": labels, "preprocessing": steps, "card": predictor.card})

    @app.get("/", include_in_schema=False)
    async def start() -> Response:
        return _page(page.try_page(predictor))

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return _page(page.docs_page(app.openapi()))

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        return Response(status_code=204, headers=SAFE)

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        allowed = ", ".join(sorted({getattr(route, "path", "") for route in app.routes}))
        return _error(error.status_code, {"what": str(error.detail), "allowed": allowed})

    @app.exception_handler(Exception)
    async def ours(request: Request, error: Exception) -> Response:
        return _refusal(error)

    app.router.on_shutdown.append(workers.close)
    return _Front(app, predict, limits.hosts)


class _Front:
    """Before FastAPI: hosts are checked, and ``/predict`` is answered, whatever becomes of it.

    FastAPI describes that call; on its way to it there are its matching of routes, three exit
    stacks and its search for dependencies, of which a model's one call has none. They cost a fifth
    of a millisecond, next to three of a small model's whole answer.
    """

    def __init__(
        self,
        app: ASGIApp,
        predict: Callable[[Request], Awaitable[Response]],
        hosts: tuple[str, ...],
    ) -> None:
        self.app, self.predict, self.hosts = app, predict, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response: ASGIApp = self.app
        if scope["type"] == "http":
            try:
                self._refuse_host(scope)
                if scope["path"] == "/predict" and scope["method"] == "POST":
                    response = await self.predict(Request(scope, receive))
            except HungUp:
                return
            except Exception as error:
                response = _refusal(error)
        await response(scope, receive, send)

    def _refuse_host(self, scope: Scope) -> None:
        if not self.hosts:
            return
        host = Headers(scope=scope).get("host", "")
        name = host if host.endswith("]") or ":" not in host else host.rpartition(":")[0]
        if name.strip("[]").lower() not in self.hosts:
            allowed = ", ".join(sorted(set(self.hosts)))
            raise Refused(421, "another host is asked for", allowed=allowed)


def _content_type(headers: Headers, predictor: Predictor) -> str:
    """The request's, where the model takes it."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in KINDS[predictor.kind] or (predictor.kind == "images" and kind[:6] == "image/"):
        return kind
    allowed = ", ".join(KINDS[predictor.kind])
    raise Refused(415, "this model takes another kind of request", allowed=allowed)


async def _examples(headers: Headers, kind: str, content: bytes, predictor: Predictor) -> list[Any]:
    """The examples of a request, as ``Predictor.answer`` takes them."""
    if kind == "multipart/form-data":
        return await _files(headers, content)
    return [content] if predictor.kind == "images" else _listed(content, predictor.kind)


async def _files(headers: Headers, content: bytes) -> list[Any]:
    """The files of a form, which never go to disk."""

    async def once() -> Any:
        yield content

    parser = MultiPartParser(headers, once(), max_files=MAX_EXAMPLES, max_fields=8)
    parser.spool_max_size = len(content) + 1
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise Refused(400, "this is no form with files in it", do="Send it as 'file'") from error
    found = [value for _, value in form.multi_items() if not isinstance(value, str)]
    try:
        return [await one.read() for one in found]
    finally:
        await form.close()


def _listed(content: bytes, kind: str) -> list[Any]:
    """The examples of a JSON request."""
    try:
        told = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Refused(400, "this is not JSON", do=f'Send {{"{kind}": [...]}}') from error
    if not isinstance(told, dict) or set(told) != {kind} or not isinstance(told[kind], list):
        raise Refused(400, "the request has another form", allowed=f'{{"{kind}": [...]}}')
    found: list[Any] = told[kind]
    return found


def _refusal(error: Exception) -> Response:
    """Every error as JSON, none with a traceback or with what was sent."""
    if isinstance(error, Refused):
        told = {"what": error.what, "allowed": error.allowed, "do": error.do}
        headers = {} if error.retry is None else {"Retry-After": str(error.retry)}
        if error.status in (408, 413):
            headers["Connection"] = "close"  # what it still sends is not read
        return _error(error.status, told, headers)
    if isinstance(error, InputError):
        names = ("what", "where", "got", "allowed", "do")
        return _error(422, {name: getattr(error, name) for name in names})
    kind, place = type(error).__name__, traceback.extract_tb(error.__traceback__)[-1]
    _log.error("a bug in fedtl: %s in %s, line %s", kind, place.filename, place.lineno)
    return _error(500, {"what": f"this is a bug in fedtl ({kind})"})


def _error(status: int, told: dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    found = {name: value for name, value in told.items() if value is not None}
    return _Json({"error": found}, status, headers)


class _Json(Response):
    """An answer whose usual headers are written once, not for each."""

    def __init__(
        self, content: Any, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        self.status_code, self.background = status, None
        self.body = json.dumps(content, allow_nan=False).encode()
        self.raw_headers = [*_HEADERS, (b"content-length", b"%d" % len(self.body))]
        if headers:
            self.headers.update(headers)


_HEADERS = [
    (name.lower().encode(), value.encode())
    for name, value in {**SAFE, "Content-Type": "application/json"}.items()
]


def _page(found: tuple[str, str]) -> Response:
    content, policy = found
    headers = {**SAFE, "Content-Security-Policy": policy}
    return Response(content.encode(), 200, headers, "text/html; charset=utf-8")
