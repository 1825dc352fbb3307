"""Threads that answer: results and errors come back to who asked, and the threads end."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref

import pytest

from fedtl.serve.workers import Workers


def test_each_gets_its_own_result_or_error() -> None:
    def half(number: int) -> tuple[float, str]:
        return 1 / (number - 7), threading.current_thread().name

    async def run() -> None:
        workers = Workers(2)
        asked = [workers.do(half, i) for i in range(20)]
        found = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(found.pop(7), ZeroDivisionError)
        wanted = [1 / (i - 7) for i in range(20) if i != 7]
        assert [value for value, _ in found] == wanted
        assert {name for _, name in found} <= {"predict-0", "predict-1"}
        workers.close()
        assert not any(thread.is_alive() for thread in workers._threads)

    asyncio.run(run())


def test_two_work_side_by_side_and_a_third_waits() -> None:
    meet = threading.Barrier(2, timeout=30)

    async def run() -> None:
        workers = Workers(2)
        assert sorted(await asyncio.gather(*(workers.do(meet.wait, None) for _ in range(4)))) == [
            0, 0, 1, 1,
        ]  # fmt: skip
        workers.close()

    asyncio.run(run())


def test_who_no_longer_waits_is_not_told_and_nothing_of_it_stays() -> None:
    class Secret:
        pass

    let_go, gone, seen = threading.Event(), threading.Event(), []

    def work(secret: Secret) -> None:
        seen.append(weakref.finalize(secret, gone.set))
        let_go.wait(30)

    async def run() -> None:
        workers = Workers(1)
        asked = asyncio.create_task(workers.do(work, Secret()))
        while not seen:
            await asyncio.sleep(0)
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        del asked
        await asyncio.sleep(0)  # until here the loop holds what it was woken by
        gc.collect()
        assert not gone.is_set()
        let_go.set()
        assert gone.wait(30)  # although no other request has come
        assert await workers.do(str, 1) == "1"
        (thread,) = workers._threads
        del workers  # without a close
        gc.collect()
        thread.join(30)
        assert not thread.is_alive()

    asyncio.run(run())
