"""The gate: never more inside than there is room for, in order, and nobody is forgotten."""

from __future__ import annotations

import asyncio
import random

import pytest

from fedtl.serve.gate import Gate, Refused


async def settle() -> None:
    """Everything that can go on has gone on."""
    for _ in range(10):
        await asyncio.sleep(0)


def test_any_order_of_coming_leaving_and_giving_up_keeps_to_the_room() -> None:
    """Against a plain count of who is inside; a third gives up at some moment, also when let in."""

    async def run(seed: int) -> None:
        chance, gate = random.Random(seed), Gate(10, waiting=1000)
        inside: list[int] = []
        peak = 0

        async def visit(amount: int, stays: int) -> None:
            nonlocal peak
            await gate.enter(amount)
            try:
                inside.append(amount)
                peak = max(peak, sum(inside))
                for _ in range(stays):
                    await asyncio.sleep(0)
                inside.remove(amount)
            except asyncio.CancelledError:
                inside.remove(amount)
                raise
            finally:
                gate.leave(amount)

        visits = []
        for _ in range(60):
            visits.append(asyncio.create_task(visit(chance.randint(1, 10), chance.randint(0, 5))))
            for _ in range(chance.randint(0, 3)):
                await asyncio.sleep(0)
            if chance.random() < 1 / 3:
                chance.choice(visits).cancel()
        await asyncio.wait_for(asyncio.gather(*visits, return_exceptions=True), 30)
        assert 5 < peak <= 10
        assert (gate.used, gate.waits) == (0, 0)

    for seed in range(50):
        asyncio.run(run(seed))


def test_first_come_first_served_and_one_who_gives_up_holds_up_nobody() -> None:
    async def run() -> None:
        gate, came = Gate(10), []

        async def visit(name: str, amount: int) -> None:
            await gate.enter(amount)
            came.append(name)

        await gate.enter(6)
        visits = [
            asyncio.create_task(visit(name, amount))
            for name, amount in (("large", 8), ("small", 3), ("last", 2))
        ]
        await settle()
        assert came == []  # small ones would fit, but large has come before them
        visits[0].cancel()
        await settle()
        assert came == ["small"]
        gate.leave(6)
        await settle()
        assert came == ["small", "last"]
        assert (gate.used, gate.waits) == (5, 0)

    asyncio.run(run())


def test_who_would_be_one_too_many_to_wait_is_refused_at_once() -> None:
    async def run() -> None:
        gate = Gate(1, waiting=2)
        await gate.enter()
        waiting = [asyncio.create_task(gate.enter()) for _ in range(2)]
        await settle()
        with pytest.raises(Refused) as refused:
            await gate.enter()
        assert refused.value.status == 503
        for _ in range(3):
            gate.leave()
            await settle()
        await asyncio.gather(*waiting)
        assert (gate.used, gate.waits) == (0, 0)

    asyncio.run(run())
