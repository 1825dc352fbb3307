"""The web application: one exported model behind ``/predict``, and a page to try it on.

Nothing of a request is written anywhere. Every error is JSON and says what would have been taken.
No request of a page goes anywhere but here: there are no scripts or fonts from elsewhere.
"""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.types import ASGIApp, Receive, Scope, Send

from fedtl.errors import InputError
from fedtl.serve import page
from fedtl.serve.gate import Gate, Refused, read_body, refuse_length
from fedtl.serve.predictor import MAX_EXAMPLES, Predictor
from fedtl.serve.schema import describe

BODY_BYTES = 16 * 2**20
"""Of one request."""

BODY_SECONDS = 30.0
"""In which a body must have come."""

KINDS = {
    "images": ("multipart/form-data", "image/*", "application/octet-stream"),
    "texts": ("application/json",),
    "rows": ("application/json",),
}
"""Content types of a request, by what the model takes."""

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
    """

    body: int = BODY_BYTES
    seconds: float = BODY_SECONDS
    threads: int = 2
    hosts: tuple[str, ...] = ()
    gate: Gate = field(default_factory=Gate)


def make_app(predictor: Predictor, limits: Limits) -> FastAPI:
    """The application of one model."""
    app = FastAPI(
        title=f"fedtl: {predictor.card.get('name', 'model')}",
        version=str(predictor.card.get("format", 1)),
        docs_url=None,  # they are loaded from elsewhere
        redoc_url=None,
    )
    pool = ThreadPoolExecutor(limits.threads, "predict")
    body = describe(predictor)

    @app.post("/predict", **body)
    async def predict(request: Request) -> Response:
        refuse_length(request.headers.get("content-length"), limits.body)
        async with limits.gate.entered():
            examples = await _examples(request, predictor, limits)
            loop = asyncio.get_running_loop()
            found = await loop.run_in_executor(pool, predictor.answer, examples)
        return _json({"predictions": found})

    @app.get("/health")
    async def health() -> Response:
        """Whether the model is there, and how many requests wait."""
        name = predictor.card.get("name")
        return _json({"status": "ok", "model": name, "waiting": limits.gate.waits})

    @app.get("/metadata")
    async def metadata() -> Response:
        """Labels, preprocessing and the model's card."""
        labels, steps = list(predictor.labels), predictor.preprocessing
        return _json({"labels": labels, "preprocessing": steps, "card": predictor.card})

    @app.get("/", include_in_schema=False)
    async def start() -> Response:
        return _page(page.try_page(predictor))

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return _page(page.docs_page(app.openapi()))

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        return Response(status_code=204, headers=SAFE)

    _answer_errors(app)
    app.router.on_shutdown.append(pool.shutdown)
    if limits.hosts:
        app.add_middleware(_Known, hosts=limits.hosts)
    return app


async def _examples(request: Request, predictor: Predictor, limits: Limits) -> list[Any]:
    """The examples of a request, as ``Predictor.answer`` takes them."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not (kind in KINDS[predictor.kind] or (predictor.kind == "images" and kind[:6] == "image/")):
        allowed = ", ".join(KINDS[predictor.kind])
        raise Refused(415, "this model takes another kind of request", allowed=allowed)
    length = request.headers.get("content-length")
    content = await read_body(request.stream(), length, limits.body, limits.seconds)
    if kind == "multipart/form-data":
        return await _files(request.headers, content)
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


def _answer_errors(app: FastAPI) -> None:
    """Every error as JSON, none with a traceback or with what was sent."""

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        told = {"what": error.what, "allowed": error.allowed, "do": error.do}
        headers = {} if error.retry is None else {"Retry-After": str(error.retry)}
        if error.status in (408, 413):
            headers["Connection"] = "close"  # what it still sends is not read
        return _error(error.status, told, headers)

    @app.exception_handler(InputError)
    async def bad(request: Request, error: InputError) -> Response:
        told = {name: getattr(error, name) for name in ("what", "where", "got", "allowed", "do")}
        return _error(422, told)

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        allowed = ", ".join(sorted({getattr(route, "path", "") for route in app.routes}))
        return _error(error.status_code, {"what": str(error.detail), "allowed": allowed})

    @app.exception_handler(Exception)
    async def ours(request: Request, error: Exception) -> Response:
        return _error(500, {"what": f"this is a bug in fedtl ({type(error).__name__})"})


class _Known:
    """Lets only requests through that ask for one of some hosts."""

    def __init__(self, app: ASGIApp, hosts: tuple[str, ...]) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            host = Headers(scope=scope).get("host", "")
            name = host if host.endswith("]") or ":" not in host else host.rpartition(":")[0]
            if name.strip("[]").lower() not in self.hosts:
                allowed = ", ".join(sorted(set(self.hosts)))
                refusal = _error(421, {"what": "another host is asked for", "allowed": allowed})
                await refusal(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _error(status: int, told: dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    found = {name: value for name, value in told.items() if value is not None}
    return _json({"error": found}, status, headers)


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(
        json.dumps(content, allow_nan=False).encode(),
        status,
        {**SAFE, **(headers or {})},
        "application/json",
    )


def _page(found: tuple[str, str]) -> Response:
    content, policy = found
    headers = {**SAFE, "Content-Security-Policy": policy}
    return Response(content.encode(), 200, headers, "text/html; charset=utf-8")
