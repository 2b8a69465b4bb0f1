"""The virtual loop: time jumps, deadlocks are found, order does not depend on addresses."""

from __future__ import annotations

import asyncio
import time

import pytest

from .loop import Deadlock, VirtualLoop, run


def test_an_hour_of_sleep_takes_no_time() -> None:
    async def main() -> float:
        await asyncio.sleep(3600)
        return asyncio.get_running_loop().time()

    began = time.perf_counter()
    assert run(main()) == pytest.approx(3600)
    assert time.perf_counter() - began < 1


def test_timeouts_and_task_groups_follow_virtual_time() -> None:
    log: list[str] = []

    async def say(word: str, after: float) -> None:
        await asyncio.sleep(after)
        log.append(word)

    async def main() -> None:
        async with asyncio.timeout(2), asyncio.TaskGroup() as group:
            for word, after in (("c", 3.0), ("a", 1.0), ("b", 1.5)):
                group.create_task(say(word, after))

    with pytest.raises(TimeoutError):
        run(main())
    assert log == ["a", "b"]


def test_waiting_for_nothing_is_a_deadlock() -> None:
    async def main() -> None:
        await asyncio.Event().wait()

    with pytest.raises(Deadlock, match="wait for ever"):
        run(main())


def test_threads_run_in_the_loop() -> None:
    async def main() -> list[object]:
        seen: list[object] = [await asyncio.to_thread(lambda: 7)]
        with pytest.raises(ZeroDivisionError):
            await asyncio.to_thread(lambda: 1 // 0)
        asyncio.get_running_loop().call_soon_threadsafe(seen.append, "soon")
        await asyncio.sleep(0)
        return seen

    assert run(main()) == [7, "soon"]


def test_an_error_that_nobody_awaited_fails_the_run() -> None:
    async def broken() -> None:
        raise LookupError("lost")

    async def main() -> None:
        task = asyncio.create_task(broken())
        await asyncio.sleep(1)
        del task

    with pytest.raises(LookupError, match="lost"):
        run(main())


def test_tasks_are_listed_and_hashed_in_order_of_creation() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        tasks = [loop.create_task(asyncio.sleep(1)) for _ in range(20)]
        assert [task for task in loop.live_tasks() if task in tasks] == tasks
        assert list(dict.fromkeys(sorted(set(tasks), key=hash))) == tasks
        await asyncio.gather(*tasks)

    run(main())
