"""Loading leaves while a checkpoint moves their pages: nobody is told that anything is lost."""

from __future__ import annotations

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import Any

from pool.blockmap import LayerMap, Leaf
from pool.errors import DataLost
from pool.format.geometry import geometry
from pool.format.location import in_stripe
from pool.format.page import Page, Pointer
from pool.loader import PARALLEL, Loader
from pool.table import DATA, Stripe, StripeTable
from tests.sim.loop import run

LAYER = 1
OLD, NEW = 7, 8


class Pages:
    """A reader whose pages name a stripe that is in use as long as the page is."""

    def __init__(self, state: Any) -> None:
        self.state = state

    async def page(self, pointer: Pointer, kind: int) -> Page:
        if pointer.stripe not in self.state.table:
            raise DataLost(f"page of unknown stripe {pointer.stripe}")
        leaf = Leaf()
        leaf.set(0, in_stripe(pointer.stripe, 0, 0), 1)
        form, body = leaf.encode()
        await asyncio.sleep(1)
        return Page(kind, form, LAYER, pointer.offset, 1, memoryview(body))


def row(stripe: int) -> Stripe:
    return Stripe(stripe, DATA, geometry(2, 1, 4), ((0, 0), (1, 0), (2, 0)))


def checkpoint(state: Any) -> None:
    """Every page is elsewhere now, and the stripe that the old ones name is gone."""
    state.table.add(row(NEW), 1)
    state.table.remove(OLD)
    pointers = state.maps[LAYER].pointers
    for number in pointers:
        pointers[number] = Pointer(NEW, number, 64, 0)


def test_a_checkpoint_that_comes_between_is_no_loss() -> None:
    """It comes while the first leaves are read, and before the others are."""

    async def scenario() -> None:
        layer_map = LayerMap(LAYER)
        count = 2 * PARALLEL
        layer_map.pointers = {n: Pointer(OLD, n, 64, 0) for n in range(count)}
        table = StripeTable(3)
        table.add(row(OLD), 1)
        state: Any = SimpleNamespace(maps={LAYER: layer_map}, table=table, counters=Counter())
        loader = Loader(state, Pages(state))  # type: ignore[arg-type]
        asyncio.get_running_loop().call_later(0.5, checkpoint, state)
        while await loader.ensure((LAYER, n) for n in range(count)):
            pass
        found = {leaf.get(0)[0] for leaf in layer_map.leaves.values()}
        assert found == {in_stripe(NEW, 0, 0)}
        assert len(layer_map.leaves) == count

    run(scenario())


def test_leaves_that_somebody_waits_for_stay() -> None:
    """A request that needs two leaves, one of them slow, must find both at once."""
    layer_map = LayerMap(LAYER)
    for number in range(4):
        layer_map.leaves[number] = Leaf()
        layer_map.pointers[number] = Pointer(OLD, number, 64, 0)
    assert layer_map.evict(1 << 20, {1, 3})
    assert sorted(layer_map.leaves) == [1, 3]
