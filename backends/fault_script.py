"""Which operation of a backend fails, and how: the script that `backends.faults` plays.

Deterministic: the only randomness is the generator that is passed in, the only clock that of the
running event loop. Used by tests, by the simulation and by failure drills of an operator.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Iterable
from dataclasses import dataclass
from random import Random

from .base import DeviceError, DeviceFull
from .failures import gone

READS = frozenset({"read", "try_read", "get"})
WRITES = frozenset({"write", "append", "put"})
OPERATIONS = READS | WRITES | {"sync", "delete", "list"}


@dataclass(frozen=True, slots=True)
class Fail:
    """Refuse the operation with this errno; nothing happens to the medium."""

    code: int = errno.EIO


@dataclass(frozen=True, slots=True)
class ApplyThenFail:
    """Do the operation, then report this errno."""

    code: int = errno.EIO


@dataclass(frozen=True, slots=True)
class Delay:
    """Do the operation this many seconds later; a `try_read` says that it would wait."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Hang:
    """Do the operation only after `Script.release`; a `try_read` says that it would wait."""


@dataclass(frozen=True, slots=True)
class FlipBits:
    """Return what was read with this many bits flipped."""

    count: int = 1


@dataclass(frozen=True, slots=True)
class ShortRead:
    """Get fewer bytes than asked for, which the contract makes an error."""


@dataclass(frozen=True, slots=True)
class Vanish:
    """Answer this and every later operation with `DeviceGone`."""


Action = Fail | ApplyThenFail | Delay | Hang | FlipBits | ShortRead | Vanish


@dataclass(slots=True)
class Rule:
    """Do `action` to some of the operations in `ops`.

    The `nth` (from 1) that matches is hit and the `times` - 1 after it; `times` None: all after it.
    Each of them is then spared with probability 1 - `chance`. `within` limits the rule to
    operations that touch this byte range of a device.
    """

    ops: frozenset[str]
    action: Action
    nth: int = 1
    times: int | None = 1
    chance: float = 1.0
    within: tuple[int, int] | None = None
    seen: int = 0

    def __post_init__(self) -> None:
        if unknown := self.ops - OPERATIONS:
            raise ValueError(f"unknown operations {sorted(unknown)}: use {sorted(OPERATIONS)}")
        if isinstance(self.action, FlipBits | ShortRead) and self.ops - READS:
            raise ValueError(f"{self.action} makes sense for reads only: use ops=READS")
        if isinstance(self.action, Delay | Hang) and "append" in self.ops:
            raise ValueError("append is synchronous: it cannot be delayed, only refused")

    def matches(self, op: str, offset: int, length: int) -> bool:
        """Whether the rule speaks of this operation at all."""
        if op not in self.ops:
            return False
        if self.within is None:
            return True
        start, end = self.within
        return offset < end and start < offset + length

    def hits(self, rng: Random) -> bool:
        """Count a matching operation and tell whether this one is hit."""
        self.seen += 1
        if self.seen < self.nth or (self.times is not None and self.seen >= self.nth + self.times):
            return False
        return self.chance >= 1.0 or rng.random() < self.chance


class Script:
    """Rules in order of precedence. Devices that share a script fail together."""

    def __init__(self, rng: Random, rules: Iterable[Rule] = ()) -> None:
        self._rng = rng
        self.rules = list(rules)
        self.vanished = False
        self._gate = asyncio.Event()

    @property
    def quiet(self) -> bool:
        """Whether nothing can happen: decorators then pass straight through."""
        return not self.rules and not self.vanished

    def add(self, rule: Rule) -> None:
        """Append a rule; earlier ones come first."""
        self.rules.append(rule)

    def clear(self) -> None:
        """End all faults, let hanging operations go on and bring a vanished device back."""
        self.rules.clear()
        self.vanished = False
        self.release()

    def release(self) -> None:
        """Let every operation that hangs now go on; later ones hang again."""
        self._gate.set()
        self._gate = asyncio.Event()

    def draw(self, op: str, offset: int = 0, length: int = 0) -> Action | None:
        """Return what happens to this operation. Atomic; every matching rule counts it."""
        if self.vanished:
            return Vanish()
        matching = [rule for rule in self.rules if rule.matches(op, offset, length)]
        hit = [rule for rule in matching if rule.hits(self._rng)]
        if hit and isinstance(hit[0].action, Vanish):
            self.vanished = True
        return hit[0].action if hit else None

    def would_wait(self, op: str, offset: int, length: int) -> bool:
        """Whether a rule of this script may make the operation wait. Counts nothing."""
        return any(
            isinstance(rule.action, Delay | Hang) and rule.matches(op, offset, length)
            for rule in self.rules
        )

    async def wait(self, action: Action | None) -> None:
        """Spend the time that `action` costs."""
        if isinstance(action, Delay):
            await asyncio.sleep(action.seconds)
        elif isinstance(action, Hang):
            await self._gate.wait()

    def damage(self, data: bytes, action: Action | None) -> bytes:
        """Return `data` as a reader gets it to see."""
        if not isinstance(action, FlipBits) or not data:
            return data
        spoiled = bytearray(data)
        for bit in self._rng.sample(range(len(data) * 8), min(action.count, len(data) * 8)):
            spoiled[bit // 8] ^= 1 << bit % 8
        return bytes(spoiled)


def raise_before(url: str, op: str, action: Action | None) -> None:
    """Raise the error of an operation that is refused."""
    if isinstance(action, Vanish):
        raise gone(url, "injected")
    if isinstance(action, Fail):
        raise injected(url, op, action.code)
    if isinstance(action, ShortRead):
        raise DeviceError(errno.EIO, f"{url}: short {op} (injected): clear the fault script")


def raise_after(url: str, op: str, action: Action | None) -> None:
    """Raise the error of an operation that was done and is reported as failed."""
    if isinstance(action, ApplyThenFail):
        raise injected(url, op, action.code)


def injected(url: str, op: str, code: int) -> DeviceError:
    """Return the error with this errno, of the class that the contract has for it."""
    if code == errno.ENODEV:
        return gone(url, "injected")
    if code == errno.ENOSPC:
        return DeviceFull(f"{url}: no room for {op} (injected): clear the fault script")
    text = os.strerror(code)
    return DeviceError(code, f"{url}: {op} failed: {text} (injected): clear the fault script")
