"""libnbd's Python bindings as the client: every command, both reply formats, many in flight."""

from __future__ import annotations

import errno
import os
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.interop.conftest import SIZE, Served

# Debian's bindings live outside of virtual environments.
if "/usr/lib/python3/dist-packages" not in sys.path:
    sys.path.append("/usr/lib/python3/dist-packages")
nbd = pytest.importorskip("nbd", reason="python3-libnbd is not installed")
if not hasattr(nbd, "NBD"):
    pytest.skip("the module nbd is not libnbd's", allow_module_level=True)

Connect = Callable[..., Any]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Handles that do not check requests themselves, so that the server has to."""
    handles = []

    def begin(uri: str, *, structured: bool = True, negotiate: bool = False) -> Any:
        handle = nbd.NBD()
        handles.append(handle)
        handle.set_strict_mode(0)
        handle.set_request_structured_replies(structured)
        handle.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
        handle.set_opt_mode(negotiate)
        handle.connect_uri(uri)
        return handle

    yield begin
    for handle in handles:
        if handle.aio_is_ready():
            handle.shutdown()


@pytest.mark.parametrize("structured", [True, False])
def test_commands(served: Served, connect: Connect, structured: bool) -> None:
    h = connect(served.uri, structured=structured)
    assert h.get_size() == SIZE
    assert h.get_structured_replies_negotiated() is structured
    for length in (1, 511, 4097, 100_000, (5 << 20) + 1, 32 << 20):
        data = os.urandom(length)
        h.pwrite(data, 3)
        assert h.pread(length, 3) == data
    h.pwrite(b"x" * 8192, 0, nbd.CMD_FLAG_FUA)
    h.zero(4096, 4096, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
    assert h.pread(8192, 0) == b"x" * 4096 + bytes(4096)
    h.trim(SIZE, 0, nbd.CMD_FLAG_FUA)
    assert h.pread(8192, 0) == bytes(8192)
    h.flush()


def test_block_status(served: Served, connect: Connect) -> None:
    h = connect(served.uri)
    h.pwrite(b"x" * 8192, 1 << 20)
    h.zero(4096, 4096, nbd.CMD_FLAG_NO_HOLE)
    found: list[int] = []

    def collect(context: str, offset: int, entries: list[int], error: Any) -> int:
        assert context == "base:allocation"
        found[:] = entries
        return 0

    h.block_status(SIZE, 0, collect)
    assert found[:3] == [4096, 3, 4096]
    assert not found[3] & nbd.STATE_HOLE
    assert sum(found[0::2]) == SIZE
    h.block_status(SIZE, 0, collect, nbd.CMD_FLAG_REQ_ONE)
    assert found == [4096, 3]


@pytest.mark.parametrize("structured", [True, False])
def test_errors(served: Served, connect: Connect, structured: bool) -> None:
    h = connect(served.uri, structured=structured)
    cases: list[tuple[int, Callable[[], Any]]] = [
        (errno.ENOSPC, lambda: h.pwrite(b"xx", SIZE - 1)),
        (errno.ENOSPC, lambda: h.pwrite(b"x" * 200_000, SIZE - 1)),
        (errno.EINVAL, lambda: h.pread(2, SIZE - 1)),
        (errno.EINVAL, lambda: h.trim(2, SIZE - 1)),
        (errno.ENOSPC, lambda: h.zero(2, SIZE - 1)),
        (errno.ENOTSUP, lambda: h.zero(2, 0, nbd.CMD_FLAG_FAST_ZERO)),
        (errno.EINVAL, lambda: h.cache(2, SIZE - 1)),
    ]
    for code, call in cases:
        with pytest.raises(nbd.Error) as caught:
            call()
        assert caught.value.errnum == code
        assert h.pread(1, 0) == b"\0"


def test_a_read_only_export_refuses_changes(frozen: Served, connect: Connect) -> None:
    h = connect(frozen.uri)
    assert h.is_read_only()
    assert not h.can_trim()
    changes: list[Callable[[], Any]] = [
        lambda: h.pwrite(b"x", 0),
        lambda: h.trim(4096, 0),
        lambda: h.zero(4096, 0),
    ]
    for call in changes:
        with pytest.raises(nbd.Error) as caught:
            call()
        assert caught.value.errnum == errno.EPERM
    assert h.pread(1, 0) == b"\0"


def test_options(served: Served, connect: Connect) -> None:
    h = connect(served.tcp_uri, negotiate=True)
    names: list[tuple[str, str]] = []

    def collect(name: str, description: str) -> int:
        names.append((name, description))
        return 0

    assert h.opt_list(collect) == 1
    assert names == [(served.name, served.description)]
    h.set_export_name("other")
    with pytest.raises(nbd.Error):
        h.opt_info()
    h.set_export_name(served.name)
    h.opt_info()
    assert h.get_size() == SIZE
    h.opt_go()
    assert h.pread(1, 0) == b"\0"


def test_abort(served: Served, connect: Connect) -> None:
    h = connect(served.uri, negotiate=True)
    h.opt_abort()
    assert h.aio_is_closed()


def test_many_requests_in_flight(served: Served, connect: Connect) -> None:
    h, noise, mirror = connect(served.uri), random.Random(3), bytearray(SIZE)
    for _ in range(20):
        pending, reads = [], []
        for slot in noise.sample(range(SIZE >> 18), 64):
            offset = (slot << 18) + noise.randrange(1000)
            length = noise.choice([1, 512, 4096, 70_000, 200_000])
            if noise.random() < 0.5:
                data = noise.randbytes(length)
                mirror[offset : offset + length] = data
                pending.append(h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(data)), offset))
            else:
                buffer = nbd.Buffer(length)
                reads.append((offset, length, buffer))
                pending.append(h.aio_pread(buffer, offset))
        while h.aio_in_flight():
            h.poll(-1)
        assert all(h.aio_command_completed(cookie) for cookie in pending)
        for offset, length, buffer in reads:
            assert buffer.to_bytearray() == mirror[offset : offset + length]


def test_a_flush_covers_other_connections(served: Served, connect: Connect) -> None:
    first, second = connect(served.uri), connect(served.tcp_uri)
    assert first.can_multi_conn()
    first.pwrite(b"shared", 12345)
    second.flush()
    assert second.pread(6, 12345) == b"shared"
