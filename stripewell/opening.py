"""From device URLs to an open pool: the only module that joins `backends.open` and `pool`.

Called by the daemon, and by commands when no daemon serves the pool. Everything raised here is a
`UserError`, and every backend that was opened is closed again.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from backends.base import Device, DeviceBusy, DeviceError, ObjectStore
from backends.open import open_backend
from backends.signature import HEAD_SIZE, foreign_signature
from backends.url import parse_url
from pool import MemberSpec, Pool, PoolError, PoolSpec, ProbeResult, create_pool, probe
from pool.mover import InlineMover, Mover
from stripewell.control import Progress
from stripewell.controller import Controller
from stripewell.errors import UserError, one_line
from stripewell.names import check_name
from stripewell.state import PoolRecord

Backend = Device | ObjectStore

#: How long a busy device is asked again, and how often.
BUSY_SECONDS = 4.0
BUSY_TRIES = 20

#: Bytes at both ends of a device that must be zeros before a pool is made on it. No data is
#: recognised everywhere, but hardly any leaves both ends blank.
EDGE_BYTES = 1 << 20

#: Schemes whose path is one of this host; "" is a bare path.
_LOCAL = {"", "file", "block", "dir"}


@dataclass(frozen=True, slots=True)
class OpenPool:
    """A pool and what could not be opened of it, one line each; `elsewhere` if it was opened for
    looking only and another process serves it."""

    pool: Pool
    problems: list[str]
    elsewhere: bool = False


@asynccontextmanager
async def open_pool(
    record: PoolRecord, *, read_only: bool, make_mover: Callable[[], Mover] = InlineMover
) -> AsyncIterator[OpenPool]:
    """The pool of a record, closed at the end.

    A device that can't be opened is left out and named in `problems`; whether the rest is enough is
    for the pool to say. A busy one refuses all (R22).
    """
    async with _opened() as backends:
        absent = await _open_those_there(record.devices, backends, writable=not read_only)
        pool = await _open(record, backends, absent, read_only, make_mover())
        try:
            if pool.uuid != record.uuid:
                raise UserError(
                    f"the devices belong to another pool {pool.name!r} now ({pool.uuid}, not"
                    f" {record.uuid}): `stripewell pool import URL...` it with another --state"
                )
            elsewhere = read_only and await _elsewhere(record.devices)
            yield OpenPool(pool, list(absent.values()), elsewhere)
        finally:
            with _told():
                await pool.close()


async def create(
    spec: PoolSpec, data: Sequence[str], journal: Sequence[str], *, force: bool, progress: Progress
) -> PoolRecord:
    """Make a pool of device URLs; `journal` names those that hold the journal."""
    urls = [*data, *journal]
    async with _opened() as backends:
        with _told():
            refuse_twice(urls)
            for url in urls:
                backends.append(await open_backend(url, create=True))
                if not force:
                    await _refuse_foreign(backends[-1])
            members = [
                MemberSpec(backend, journal=index >= len(data), force=force)
                for index, backend in enumerate(backends)
            ]
            uuid = await create_pool(spec, members, rng=random.Random(), progress=progress)
    return PoolRecord(spec.name, uuid, [absolute(url) for url in urls])


async def identify(urls: Sequence[str]) -> tuple[PoolRecord, dict[str, Any]]:
    """The pool that the devices behind `urls` belong to, and its status. Changes nothing."""
    with _told():
        refuse_twice(urls)
        found = [await _probe(url) for url in urls]
    newest = max(found, key=lambda result: result.generation)
    for url, result in zip(urls, found, strict=True):
        if result.pool_uuid != newest.pool_uuid:
            raise UserError(
                f"{url} belongs to another pool ({result.pool_name}, {result.pool_uuid}) than the"
                f" rest ({newest.pool_name}, {newest.pool_uuid}): leave it out"
            )
    name = check_name("pool", newest.pool_name)
    record = PoolRecord(name, newest.pool_uuid, [absolute(url) for url in urls])
    absent = _absent(newest.members, {result.device_uuid for result in found})
    missing = [_phrase(member) for member in absent]
    try:
        async with open_pool(record, read_only=True) as opened:
            controller = Controller(opened.pool, elsewhere=opened.elsewhere)
            status = await controller.call("pool.status")
    except UserError as error:
        raise UserError("; ".join([str(error), *missing])) from None
    if sum(member["state"] == "active" for member in absent) > status["parity"]:
        raise UserError("; ".join(["too few devices to serve the pool", *missing]))
    return record, status


async def _probe(url: str) -> ProbeResult:
    try:
        backend = await open_backend(url, writable=False)
    except DeviceError as error:
        raise UserError(f"{one_line(error)}; if it is lost, leave it out") from None
    try:
        found = await probe(backend)
    finally:
        await backend.close()
    if found is None:
        raise UserError(f"{url} belongs to no pool: leave it out")
    return found


def _absent(members: Sequence[dict[str, Any]], here: set[str]) -> list[dict[str, Any]]:
    """Members that are not here, also those that the pool has gone on without."""
    return [member for member in members if member["uuid"] not in here]


def _phrase(member: dict[str, Any]) -> str:
    return f"device {member['index']} is missing, last seen at {member['url']}"


async def _elsewhere(urls: Sequence[str]) -> bool:
    """True if another process holds the lock of one of these devices (R22). Changes nothing."""
    for url in urls:
        if parse_url(url).scheme not in {"", "file", "block"}:
            continue  # opening a store for writing tidies it up
        try:
            backend = await open_backend(url)
        except DeviceBusy:
            return True
        except DeviceError:
            continue
        await backend.close()
    return False


def refuse_twice(urls: Sequence[str]) -> None:
    """Raises `UserError` if two URLs name one device: the same URL, file or inode."""
    seen: dict[object, int] = {}
    for index, url in enumerate(urls):
        for identity in _identities(url):
            first = seen.setdefault(identity, index)
            if first != index:
                raise UserError(f"{url} is given twice (it is the same as {urls[first]})")


def absolute(url: str) -> str:
    """A URL that means the same from any working directory."""
    target = parse_url(url)
    if target.scheme not in _LOCAL or target.host or os.path.isabs(target.path):
        return url
    scheme, place = url[: len(target.scheme) + 1], url[len(target.scheme) + 1 :]
    return scheme + os.path.abspath(place) if target.scheme else os.path.abspath(url)


def _identities(url: str) -> list[object]:
    """What two URLs of one device have in common."""
    target = parse_url(url)
    if target.scheme not in _LOCAL:
        return [url]
    path = os.path.realpath(target.path)
    try:
        status = os.stat(path)
    except OSError:
        return [path]
    return [path, (status.st_dev, status.st_ino)]


async def _open(
    record: PoolRecord,
    backends: Sequence[Backend],
    absent: Mapping[str, str],
    read_only: bool,
    mover: Mover,
) -> Pool:
    try:
        with _told(list(absent.values())):
            return await Pool.open(
                backends,
                mover=mover,
                rng=random.Random(),
                read_only=read_only,
                expect_pool=record.name,
                absent=absent,
            )
    except BaseException:
        await mover.close()
        raise


async def _refuse_foreign(backend: Backend) -> None:
    """Raises `UserError` for a device that somebody else's data is on."""
    if not isinstance(backend, Device):
        return
    head = await backend.read(0, min(EDGE_BYTES, backend.size))
    start = max(0, backend.size - EDGE_BYTES)
    tail = await backend.read(start, backend.size - start)
    found = foreign_signature(head[:HEAD_SIZE])
    if found:
        raise UserError(f"{backend.url} holds a {found}: choose another device, or --force")
    if await probe(backend) is None and (any(head) or any(tail)):
        raise UserError(
            f"{backend.url} is not blank, it holds data of an unknown kind: choose another device,"
            " or --force to overwrite it"
        )


async def _open_those_there(
    urls: Sequence[str], backends: list[Backend], *, writable: bool
) -> dict[str, str]:
    """Why the others could not be opened, by URL. Raises `UserError` if one is busy."""
    absent = {}
    for url in urls:
        try:
            backends.append(await _when_free(url, writable=writable))
        except DeviceBusy as error:
            raise UserError(one_line(error)) from error
        except DeviceError as error:
            absent[url] = one_line(error)
    return absent


async def _when_free(url: str, *, writable: bool) -> Backend:
    """Open a backend; one that is busy may belong to a daemon that was killed and is still going:
    its last calls must end before anybody else may write (R22)."""
    for _ in range(BUSY_TRIES):
        with suppress(DeviceBusy):
            return await open_backend(url, writable=writable)
        await asyncio.sleep(BUSY_SECONDS / BUSY_TRIES)
    return await open_backend(url, writable=writable)


@asynccontextmanager
async def _opened() -> AsyncIterator[list[Backend]]:
    """A list for backends that closes what is in it at the end."""
    backends: list[Backend] = []
    try:
        yield backends
    finally:
        for backend in backends:
            await backend.close()


@contextmanager
def _told(problems: Sequence[str] = ()) -> Iterator[None]:
    """Errors of pool and devices as one line, with what went wrong before."""
    try:
        yield
    except (PoolError, OSError) as error:
        raise UserError("; ".join([one_line(error), *problems])) from error
