"""An event loop with a virtual clock: simulated hours pass in real milliseconds.

Theory of operation: the loop has a selector that never waits. When nothing is runnable, it moves
the clock to the next timer; when there is no timer either, nothing can ever happen again and
`Deadlock` is raised; so it is when the clock passes `limit`, since somebody may look again for
ever. Calls for a thread pool run in the loop's own thread, sockets are those of
`tests.sim.network`. Tasks hash by their number, so that the sets of tasks inside asyncio have the
same order in every process.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Generator
from concurrent.futures import Executor
from contextvars import Context
from typing import Any, TypeVar, TypeVarTuple

from .network import SimSocket, bind

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


#: Virtual seconds after which a simulation must have ended.
LIMIT = 1e5


class Deadlock(Exception):
    """Nothing is runnable and no timer is left, or the time is up."""


class _Task(asyncio.Task[T]):
    """A task whose hash does not depend on its address."""

    def __init__(self, coro: Coroutine[Any, Any, T], *, loop: VirtualLoop, **options: Any) -> None:
        self.number = next(loop.numbers)
        super().__init__(coro, loop=loop, **options)

    def __hash__(self) -> int:
        return self.number


class VirtualLoop(asyncio.BaseEventLoop):
    """Deterministic as long as what runs in it is: no input, no thread, no real time."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = itertools.count(1)
        self.unhandled: list[BaseException] = []
        self.limit = LIMIT
        self._now = 0.0
        self._selector = self  # the base class asks it for events once per turn
        self.set_task_factory(_make_task)
        self.set_exception_handler(_note_exception)

    def time(self) -> float:
        """Return the virtual time in seconds; it starts at 0."""
        return self._now

    def select(self, timeout: float | None) -> list[Any]:
        """Jump `timeout` seconds instead of waiting for events. Raises `Deadlock`."""
        if timeout is None or self._now > self.limit:
            waiting = [task.get_name() for task in self.live_tasks()]
            raise Deadlock(f"at {self._now:.6f} s these tasks wait for ever: {waiting}")
        self._now += timeout
        return []

    def live_tasks(self) -> list[asyncio.Task[Any]]:
        """Return the tasks that are not done, in the order of their creation."""
        return sorted(asyncio.all_tasks(self), key=hash)

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[*Ts], T], *args: *Ts
    ) -> asyncio.Future[T]:
        """Call `func` in this thread, in the next turn of the loop."""
        future: asyncio.Future[T] = self.create_future()
        self.call_soon(_call_into, future, func, args)
        return future

    def add_reader(self, fd: Any, callback: Callable[..., Any], *args: Any) -> None:
        """Sockets are objects here; see `tests.sim.network`."""
        assert isinstance(fd, SimSocket)
        fd.watch_reading(bind(callback, args))

    def remove_reader(self, fd: Any) -> bool:
        assert isinstance(fd, SimSocket)
        return fd.watch_reading(None)

    def add_writer(self, fd: Any, callback: Callable[..., Any], *args: Any) -> None:
        """As `add_reader`."""
        assert isinstance(fd, SimSocket)
        fd.watch_writing(bind(callback, args))

    def remove_writer(self, fd: Any) -> bool:
        assert isinstance(fd, SimSocket)
        return fd.watch_writing(None)

    def _process_events(self, event_list: list[Any]) -> None:
        """There are no events: timers and callbacks are the base class's own."""

    def _write_to_self(self) -> None:
        """Nobody to wake up: `call_soon_threadsafe` comes from this thread."""


def run(main: Coroutine[Any, Any, T]) -> T:
    """Return the result of `main` in a fresh `VirtualLoop`; tasks that it leaves are cancelled.

    Raises what `main` raises, `Deadlock`, and the first error of a task that nobody awaited.
    """
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, VirtualLoop)
        result = runner.run(main)
    if loop.unhandled:
        raise loop.unhandled[0]
    return result


def _make_task(
    loop: asyncio.AbstractEventLoop,
    coro: Coroutine[Any, Any, T] | Generator[Any, None, T],
    context: Context | None = None,
) -> asyncio.Task[T]:
    assert isinstance(loop, VirtualLoop)
    assert asyncio.iscoroutine(coro)
    return _Task(coro, loop=loop, context=context)


def _note_exception(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Keep errors of forgotten tasks for `run`; a simulated crash, a BaseException, is none."""
    assert isinstance(loop, VirtualLoop)
    error = context.get("exception")
    if isinstance(error, Exception):
        loop.unhandled.append(error)


def _call_into(future: asyncio.Future[T], func: Callable[..., T], args: tuple[Any, ...]) -> None:
    if future.cancelled():
        return
    try:
        future.set_result(func(*args))
    except BaseException as error:
        future.set_exception(error)
