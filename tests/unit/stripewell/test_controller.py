"""Operations on an open pool: checked arguments, JSON results, errors as one line."""

from __future__ import annotations

import json
from typing import Any

import pytest

from backends.base import DeviceFull
from pool import PoolError
from stripewell.controller import Controller
from stripewell.endpoints import Address, Endpoints
from stripewell.errors import UserError
from tests.unit.stripewell.fakes import FakePool


@pytest.fixture
def pool() -> FakePool:
    return FakePool()


@pytest.fixture
def controller(pool: FakePool) -> Controller:
    return Controller(pool)  # type: ignore[arg-type]


async def test_a_volume_is_made_listed_and_deleted(pool: FakePool) -> None:
    dropped: list[str] = []
    controller = Controller(pool, dropped=dropped.append)  # type: ignore[arg-type]
    made = await controller.call("volume.create", {"name": "vm1", "size": 4096})
    assert (made["pool"], made["name"], made["size"]) == ("tank", "vm1", 4096)
    assert await controller.call("volume.list") == [made]
    await controller.call("volume.delete", {"name": "vm1"})
    assert await controller.call("volume.list") == []
    assert dropped == ["vm1"]


async def test_results_are_json(controller: Controller) -> None:
    await controller.call("volume.create", {"name": "vm1", "size": 4096})
    for operation in ("pool.status", "pool.check", "pool.endpoints", "volume.list"):
        result = await controller.call(operation)
        assert json.loads(json.dumps(result)) == result


async def test_check_reports_progress(pool: FakePool, controller: Controller) -> None:
    pool.faults = ["stripe 7: shard 2 is bad"]
    seen: list[tuple[int, int]] = []
    report = await controller.call("pool.check", {}, lambda *pair: seen.append(pair))
    assert report["faults"] == ["stripe 7: shard 2 is bad"]
    assert [finding["severity"] for finding in report["findings"]] == ["wrong"]
    assert seen == [(1, 2), (2, 2)]


async def test_endpoints_of_a_daemon(pool: FakePool) -> None:
    where = Endpoints("/s", Address("::1", 10809))
    controller = Controller(pool, where)  # type: ignore[arg-type]
    assert await controller.call("pool.endpoints") == {
        "unix": "/s",
        "tcp": {"host": "::1", "port": 10809},
        "tls": False,
    }


@pytest.mark.parametrize(
    ("operation", "args"),
    [
        ("volume.create", {}),
        ("volume.create", {"name": "vm1"}),
        ("volume.create", {"name": "vm1", "size": "20G"}),
        ("volume.create", {"name": "vm1", "size": True}),
        ("volume.create", {"name": 5, "size": 5}),
        ("volume.create", {"name": "vm1", "size": 5, "more": 1}),
        ("volume.create", {"name": "../vm1", "size": 5}),
        ("volume.delete", {"name": None}),
        ("pool.status", {"x": 1}),
        ("no.such", {}),
        ("__class__", {}),
    ],
)
async def test_wrong_calls_change_nothing(
    pool: FakePool, controller: Controller, operation: str, args: dict[str, Any]
) -> None:
    with pytest.raises(UserError):
        await controller.call(operation, args)
    assert pool.made == {}


@pytest.mark.parametrize(
    "failure",
    [PoolError("the pool is full"), DeviceFull("the pool is full"), OSError(28, "is full")],
)
async def test_errors_of_the_pool_are_one_line(
    pool: FakePool, controller: Controller, failure: Exception
) -> None:
    pool.failure = failure
    with pytest.raises(UserError, match="is full$"):
        await controller.call("volume.create", {"name": "vm1", "size": 4096})
