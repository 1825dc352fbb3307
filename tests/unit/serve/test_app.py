"""What the server answers: predictions as the file gives them, and errors that can be mended."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from fedtl.serve import predictor
from fedtl.serve.app import Limits, make_app
from fedtl.serve.gate import Gate
from fedtl.serve.predictor import Predictor, open_predictor

JSON = {"Content-Type": "application/json"}


def picture(seed: int = 0, size: tuple[int, int] = (30, 20), kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def call(predictor: Predictor, *requests: dict[str, Any], **limits: Any) -> list[httpx.Response]:
    """Requests one after the other, in this process."""

    async def run() -> list[httpx.Response]:
        app = make_app(predictor, Limits(**limits))
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return [await client.request(**{"url": "/predict", "method": "POST", **r})
                    for r in requests]  # fmt: skip

    return asyncio.run(run())


@pytest.fixture(scope="module")
def images(model_file: Callable[[str], Path]) -> Predictor:
    return open_predictor(model_file("images"))


@pytest.fixture(scope="module")
def rows(model_file: Callable[[str], Path]) -> Predictor:
    return open_predictor(model_file("rows"))


def test_a_picture_gets_what_the_file_says(
    images: Predictor, model_file: Callable[[str], Path]
) -> None:
    """Against Pillow and onnxruntime alone."""
    import onnxruntime

    data = picture(3, (41, 64))
    shown = Image.open(io.BytesIO(data)).convert("RGB")
    scale = 10 / min(shown.size)
    small = shown.resize((int(shown.width * scale), int(shown.height * scale)), Image.BILINEAR)
    left, top = round((small.width - 8) / 2), round((small.height - 8) / 2)  # half to even
    crop = np.asarray(small.crop((left, top, left + 8, top + 8)))[None]
    session = onnxruntime.InferenceSession(model_file("images"), providers=["CPUExecutionProvider"])
    wanted = session.run(["probabilities"], {"pixels": crop})[0][0]
    for request in (
        {"content": data, "headers": {"Content-Type": "image/png"}},
        {"content": data, "headers": {"Content-Type": "application/octet-stream"}},
        {"files": {"file": ("a.png", data)}},
    ):
        (answer,) = call(images, request)
        assert answer.status_code == 200
        (found,) = answer.json()["predictions"]
        np.testing.assert_allclose(list(found["probabilities"].values()), wanted, atol=1e-5)
        assert found["label"] == images.labels[int(wanted.argmax())]
        assert found["probability"] == max(found["probabilities"].values())


def test_several_files_are_answered_in_their_order(images: Predictor) -> None:
    data = [picture(seed) for seed in range(3)]
    answers = call(
        images,
        {"files": [("file", (f"{i}.png", one)) for i, one in enumerate(data)]},
        *({"content": one, "headers": {"Content-Type": "image/png"}} for one in data),
    )
    together = answers[0].json()["predictions"]
    for found, alone in zip(together, answers[1:], strict=True):
        wanted = alone.json()["predictions"][0]["probabilities"]
        np.testing.assert_allclose(
            list(found["probabilities"].values()), list(wanted.values()), atol=2e-6
        )
    assert len({tuple(one["probabilities"].values()) for one in together}) == 3


def test_rows_are_answered_and_bad_ones_named(rows: Predictor) -> None:
    good, bad = [[1, 2.5, -3, 4]], [[1, 2, 3, 4], [1, 2, 3]]
    found = call(
        rows,
        *({"content": json.dumps({"rows": one}), "headers": JSON} for one in (good, bad)),
        {"content": '{"rows": [[1, 2, NaN, 4]]}', "headers": JSON},
        {"content": '{"rows": [[1, 2, true, 4]]}', "headers": JSON},
        {"content": '{"rows": [[1, 2, 1e300, 4]]}', "headers": JSON},
        {"content": json.dumps({"rows": [[0] * 4] * 65}), "headers": JSON},
        {"content": '{"rows": []}', "headers": JSON},
        {"content": '{"rows": "abcd"}', "headers": JSON},
        {"content": '{"rows": [[1,2,3,4]], "more": 1}', "headers": JSON},
        {"content": "[" * 100_000, "headers": JSON},
        {"content": f'{{"rows": [[1, 2, 3, {"9" * 5000}]]}}', "headers": JSON},
    )
    assert found[0].status_code == 200
    told = [one.json()["error"] for one in found[1:]]
    assert [one.status_code for one in found[1:]] == [422] * 6 + [400] * 4
    assert told[0] == {"what": "a row of another width", "where": "row 2", "got": 3, "allowed": 4}
    assert "missing or infinite" in told[1]["what"]
    assert "no number" in told[2]["what"]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"no picture at all", "not a JPEG"),
        (picture()[:200], "cannot be decoded"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\x75\x30\0\0\x75\x30\x08\x02\0\0\0", "cannot"),
    ],
)
def test_what_is_no_picture_is_said_to_be_none(images: Predictor, data: bytes, reason: str) -> None:
    (answer,) = call(images, {"content": data, "headers": {"Content-Type": "image/png"}})
    assert answer.status_code == 422
    assert reason in answer.json()["error"]["what"]
    assert "Traceback" not in answer.text


def test_a_picture_bomb_is_refused_before_it_is_decoded(images: Predictor) -> None:
    import struct
    import zlib

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in parts
    )
    (answer,) = call(images, {"content": data, "headers": {"Content-Type": "image/png"}})
    assert answer.status_code == 422
    assert "claims 30000 x 30000 pixels" in answer.json()["error"]["what"]


def test_many_large_pictures_are_more_than_one_request_may_cost(
    images: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictor, "MAX_ALL_PIXELS", 1500)
    files = [("file", (f"{i}.png", picture(i))) for i in range(3)]  # of 600 each
    two, three = call(images, {"files": files[:2]}, {"files": files})
    assert two.status_code == 200
    assert three.status_code == 422
    assert three.json()["error"]["where"] == "picture 3"
    assert "more than the limit = 300" in three.json()["error"]["what"]


def test_half_a_character_is_said_to_be_one(rows: Predictor) -> None:
    texts = replace(rows, kind="texts")
    request = {"content": b'{"texts": ["good", "a \\ud800 b"]}', "headers": JSON}
    (answer,) = call(texts, request)
    assert answer.status_code == 422
    assert answer.json()["error"]["where"] == "text 2"


def test_too_long_is_too_long_whatever_it_says_itself(images: Predictor) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(10_000):
            yield b"x" * 1000
            seen.append(1)

    seen: list[int] = []
    headers = {"Content-Type": "image/png"}
    declared = {"content": b"x", "headers": {**headers, "Content-Length": str(2**30)}}
    (answer,) = call(images, {"content": endless(), "headers": headers}, body=5000)
    assert answer.status_code == 413
    assert len(seen) < 10
    (answer,) = call(images, declared, body=5000)
    assert answer.status_code == 413
    assert answer.headers["connection"] == "close"


def test_a_slow_body_is_given_up(images: Predictor) -> None:
    async def slow() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.sleep(30)
        yield b"y"

    request = {"content": slow(), "headers": {"Content-Type": "image/png"}}
    assert call(images, request, seconds=0.05)[0].status_code == 408


@pytest.mark.parametrize("name", ["small", "large", "work"])
def test_who_finds_no_place_is_told_to_come_again(images: Predictor, name: str) -> None:
    gate = Gate(0, patience=0.02)
    request = {"content": picture(), "headers": {"Content-Type": "image/png"}}
    if name == "large":  # as long as a request may be, for all that it says
        request["content"] = pieces([picture()])
    answer = call(images, request, **{name: gate})[0]
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"]["do"] == "Try again in a moment"
    assert gate.waits == 0


async def pieces(
    content: list[bytes], goes_on: asyncio.Event | None = None
) -> AsyncIterator[bytes]:
    """A body of no stated length, of which the rest comes when it is told to."""
    for i, one in enumerate(content):
        if i and goes_on is not None:
            await goes_on.wait()
        yield one


async def until(reached: Callable[[], bool]) -> None:
    """Lets the others go on until it is so."""
    for _ in range(10_000):
        if reached():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never came to that")


def test_slow_bodies_take_no_place_from_a_fast_one(images: Predictor) -> None:
    """Twice as many as there are places: pieces of unknown length, and stated lengths."""
    data, goes_on = picture(), asyncio.Event()
    headers = {"Content-Type": "image/png"}
    stated = {**headers, "Content-Length": str(len(data))}
    limits = Limits(seconds=600, work=Gate(8, patience=0))

    async def run() -> tuple[httpx.Response, list[httpx.Response]]:
        app = make_app(images, limits)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            slow = [
                asyncio.create_task(
                    client.post(
                        "/predict",
                        content=pieces([data[:50], data[50:]], goes_on),
                        headers=stated if i % 2 else headers,
                    )
                )
                for i in range(16)
            ]
            await until(lambda: limits.small.used == 8 * len(data))
            await until(lambda: limits.large.used == 8 * limits.body)
            fast = await client.post("/predict", content=data, headers=headers)
            assert not any(one.done() for one in slow)
            goes_on.set()
            limits.work.patience = 30
            return fast, await asyncio.gather(*slow)

    fast, slow = asyncio.run(run())
    assert fast.status_code == 200
    assert [one.json() for one in slow] == [fast.json()] * 16
    assert [gate.used for gate in (limits.small, limits.large, limits.work)] == [0, 0, 0]


@pytest.mark.parametrize("patience", [0.02, 30], ids=["told to come again", "waits"])
def test_bodies_never_take_more_memory_than_is_theirs(images: Predictor, patience: float) -> None:
    """Of ten bodies three fit; what is counted is what has come, not what is said of it."""
    data, held, most, size = picture(), 0, [0], 20_000
    goes_on = asyncio.Event()
    memory = Gate(3 * size, patience=patience)
    limits = Limits(body=size, seconds=600, small=memory)

    async def watched() -> AsyncIterator[bytes]:
        nonlocal held
        for piece in (data, bytes(size - len(data))):
            held += len(piece)
            most.append(held)
            yield piece
        await goes_on.wait()
        held -= size

    async def run() -> list[httpx.Response]:
        transport = httpx.ASGITransport(make_app(images, limits))
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            headers = {"Content-Type": "image/png"}
            asked = [
                asyncio.create_task(client.post("/predict", content=watched(), headers=headers))
                for _ in range(10)
            ]
            await until(lambda: held >= 3 * size)
            assert (held, memory.used) == (3 * size, 3 * size)
            if patience < 1:
                await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            await until(lambda: memory.waits == (0 if patience < 1 else 7))
            goes_on.set()
            return await asyncio.gather(*asked)

    statuses = sorted(one.status_code for one in asyncio.run(run()))
    assert statuses == ([200] * 3 + [503] * 7 if patience < 1 else [200] * 10)
    assert max(most) == 3 * size
    assert (memory.used, memory.waits) == (0, 0)


def test_who_hangs_up_gives_back_what_was_kept(images: Predictor) -> None:
    limits, sent = Limits(), []

    async def receive() -> dict[str, Any]:
        assert limits.small.used == 1000
        return next(messages)

    async def send(message: Any) -> None:
        sent.append(message)

    first = {"type": "http.request", "body": b"x" * 10, "more_body": True}
    messages = iter([first, {"type": "http.disconnect"}])
    headers = [(b"content-type", b"image/png"), (b"content-length", b"1000")]
    scope = {"type": "http", "method": "POST", "path": "/predict", "headers": headers}
    asyncio.run(make_app(images, limits)(scope, receive, send))
    assert sent == []
    assert limits.small.used == 0


@pytest.mark.parametrize("length", ["9" * 30, "9" * 5000, "17000000"])
def test_lengths_beyond_all_limits(images: Predictor, length: str) -> None:
    headers = {"Content-Type": "image/png", "Content-Length": length}
    (answer,) = call(images, {"content": b"x", "headers": headers})
    assert answer.status_code == 413


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ({"url": "/nowhere", "method": "GET"}, 404),
        ({"method": "PUT"}, 405),
        ({"content": b"{}", "headers": JSON}, 415),
        ({"content": b"--x", "headers": {"Content-Type": "multipart/form-data"}}, 400),
        ({"data": {"file": "text"}, "files": {"a": b""}}, 422),
    ],
)
def test_every_error_is_json(images: Predictor, request_: dict[str, Any], status: int) -> None:
    (answer,) = call(images, request_)
    assert answer.status_code == status
    assert answer.json()["error"]["what"]
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_our_own_bug_shows_nothing(images: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Predictor, examples: Any) -> Any:
        raise ZeroDivisionError("secret of a request")

    monkeypatch.setattr(Predictor, "answer", broken)
    (answer,) = call(images, {"content": b"x", "headers": {"Content-Type": "image/png"}})
    assert answer.status_code == 500
    assert "secret" not in answer.text


def test_only_known_hosts_are_answered(images: Predictor) -> None:
    hosts = ("localhost", "127.0.0.1", "::1")
    asked = {"url": "/health", "method": "GET"}
    found = call(
        images,
        *({**asked, "headers": {"Host": host}}
          for host in ("localhost:8000", "127.0.0.1", "[::1]:8000", "evil.example", "")),
        hosts=hosts,
    )  # fmt: skip
    assert [one.status_code for one in found] == [200, 200, 200, 421, 421]


def test_health_metadata_and_openapi(images: Predictor, rows: Predictor) -> None:
    urls = ("/health", "/metadata", "/openapi.json", "/docs", "/")
    health, metadata, schema, docs, page = call(
        images, *({"url": url, "method": "GET"} for url in urls)
    )
    assert health.json() == {"status": "ok", "model": "small", "waiting": 0}
    assert metadata.json()["labels"] == list(images.labels)
    assert metadata.json()["preprocessing"]["crop"] == 8
    body = schema.json()["paths"]["/predict"]["post"]["requestBody"]["content"]
    assert "multipart/form-data" in body
    assert "curl" in docs.text
    for one in (docs, page):
        assert "http://" not in one.text
        assert "https://" not in one.text
        assert "default-src 'none'" in one.headers["content-security-policy"]
        assert "<b>dog</b>" not in one.text
        assert "<i>three</i>" not in one.text
    (schema,) = call(rows, {"url": "/openapi.json", "method": "GET"})
    body = schema.json()["paths"]["/predict"]["post"]["requestBody"]["content"]
    items = body["application/json"]["schema"]["properties"]["rows"]["items"]
    assert (items["minItems"], items["maxItems"]) == (4, 4)
