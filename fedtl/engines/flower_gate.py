"""What stands between the network and Flower's server: who may ask what, and how much.

Flower 1.41 serves three interfaces on one port. The one for nodes checks a node's signature, but
only after the whole body was read; the one that registers keys and starts runs asks nobody for
anything. Here, before a byte of a body is read:

- a request for nodes must be signed by an approved key and be of bounded size;
- everything else needs a token that only our own server process has;
- a request's head must come in time and be small (slow or endless heads are cut off).

``HELLO`` answers a client's question whether its key is approved, without side effects.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from base64 import b64decode
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from datetime import datetime
from typing import Any

import h11
import uvicorn
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_HEADER, TIMESTAMP_TOLERANCE
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER
from flwr.supercore.date import now
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, verify_signature
from starlette.concurrency import run_in_threadpool
from uvicorn.protocols.http.h11_impl import H11Protocol

HELLO = "/fedtl/hello"
READY = "/fedtl/ready"
TOKEN = "fedtl-token"
FLEET = "/v1/fleet/"

MAX_BODY_BYTES = 64 * 2**20
"""Of one request of a node. Updates of heads are far below; backbones only travel down."""

HEAD_SECONDS = 20.0
"""In which a request's head must be complete, counted from its first byte or the connection."""

MAX_CONNECTIONS = 1000

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Gate:
    """Wraps Flower's application.

    Args:
        app: Flower's.
        token: what our own server process shows.
        facts: what HELLO tells: versions and protocol.
    """

    def __init__(self, app: Any, token: str, facts: Mapping[str, Any]) -> None:
        self._app, self._token, self._facts = app, token.encode(), facts
        self._ready = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, refuse or pass on one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        path, headers = scope["path"], dict(scope["headers"])
        if secrets.compare_digest(headers.get(TOKEN.encode(), b""), self._token):
            if path == READY:
                self._ready = True
                await _reply(send, 200, self._facts)
            else:
                await self._app(scope, receive, send)
        elif path != HELLO and not path.startswith(FLEET):
            await _reply(send, 404, {"reason": "not here"})
        elif not self._ready:
            await _reply(send, 503, {"reason": "starting"})
        else:
            await self._for_node(path, headers, scope, receive, send)

    async def _for_node(
        self, path: str, headers: Mapping[bytes, bytes], scope: Scope, receive: Receive, send: Send
    ) -> None:
        """A request that must come from an approved key."""
        reason, node, online = await run_in_threadpool(self._look, headers)
        facts = {**self._facts, "reason": reason, "node": node, "online": online}
        if path == HELLO or reason:
            await _reply(send, 401 if reason else 200, facts)
            return
        length = headers.get(b"content-length", b"")
        if not length.isdigit() or int(length) > MAX_BODY_BYTES:
            await _reply(send, 413, {"reason": f"at most {MAX_BODY_BYTES} bytes, length given"})
            return
        await self._app(scope, receive, send)

    def _look(self, headers: Mapping[bytes, bytes]) -> tuple[str, int, bool]:
        """Why the sender is not let in ("" where it is), its node's id, whether that is online."""
        try:
            public = b64decode(headers[FLEET_HTTP_PUBLIC_KEY_HEADER.encode()], validate=True)
            signature = b64decode(headers[FLEET_HTTP_SIGNATURE_HEADER.encode()], validate=True)
            stamp = headers[TIMESTAMP_HEADER.encode()]
            age = (now() - datetime.fromisoformat(stamp.decode("ascii"))).total_seconds()
            state = self._app.state.linkstate_factory.state()
            node = state.get_node_id_by_public_key(public)
            if node is None:
                return "key", 0, False
            if not -SYSTEM_TIME_TOLERANCE < age < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE:
                return "clock", 0, False
            if not verify_signature(bytes_to_public_key(public), stamp, signature):
                return "signature", 0, False
        except (KeyError, ValueError, TypeError):
            return "malformed", 0, False
        info = state.get_node_info(node_ids=[node])
        return "", node, bool(info) and info[0].status == "online"


async def _reply(send: Send, status: int, facts: Mapping[str, Any]) -> None:
    """A short JSON reply; the connection closes where a body may be left unread."""
    headers = [(b"content-type", b"application/json")]
    if status != 200:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(facts).encode()})


class ImpatientProtocol(H11Protocol):
    """HTTP whose requests' heads must come in time; h11 itself bounds their size (64 KiB)."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock with the connection."""
        super().connection_made(transport)
        self._deadline = self.loop.call_later(HEAD_SECONDS, transport.abort)

    def data_received(self, data: bytes) -> None:
        """Stop the clock when the head is whole, start it with the next request's first byte."""
        super().data_received(data)
        waiting = self.conn.their_state is h11.IDLE
        if not waiting and self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        elif waiting and self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        if self._deadline is not None:
            self._deadline.cancel()
        super().connection_lost(exc)


def serve(app: Any, settings: Mapping[str, Any], **options: Any) -> None:
    """Serve Flower's application behind the gate; takes the place of ``uvicorn.run``."""
    uvicorn.run(
        Gate(app, settings["token"], settings["facts"]),
        host=options["host"],
        port=options["port"],
        ssl_keyfile=options["ssl_keyfile"],
        ssl_certfile=options["ssl_certfile"],
        http=ImpatientProtocol,
        ws="none",
        access_log=False,  # five lines a second and node would bury everything else
        log_config=options["log_config"],
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=3,
        proxy_headers=False,
        server_header=False,
    )
