"""The socket that is listened on."""

from __future__ import annotations

import asyncio
import socket

from fedtl.serve import Place, _listen


def test_answers_are_not_held_back() -> None:
    """An answer is sent as head and body: Nagle's algorithm would wait 40 ms between them."""

    async def run() -> int:
        delays: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            accepted = writer.get_extra_info("socket")
            delays.set_result(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listening = _listen(Place("127.0.0.1", 0))
        async with await asyncio.start_server(answer, sock=listening):
            reader, writer = await asyncio.open_connection(*listening.getsockname())
            await reader.read()
            writer.close()
            await writer.wait_closed()
            return await delays

    assert asyncio.run(run()) == 1
