"""One random run of a pool per seed: chaos inside the fault budget, perhaps beyond it, then quiet.

*Chaos*: several lives. In each, users on several NBD connections overwrite each other, flush, trim,
zero and read; connections are cut and requests sent again; volumes come and go; as many devices as
parity can replace err, hang, rot, vanish or return old. A life ends at a device operation, at a
failpoint or as it should, by a kill or by power loss, and recovery may die as well. No client may
see an error or a wrong byte, and after each life the content must be explained (`oracle`).

*Beyond*: in some runs more devices fail than parity can replace. Only honest errors are right then,
and once they are back everything flushed must be there.

*Quiet*: faults end. The pool must heal, scrub clean, hold nothing that it does not need, and open
twice as the same.

`run_seed` is deterministic: the same seed gives the same digest.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from backends.fault_script import OPERATIONS, READS, WRITES, Fail, Rule, Vanish
from pool.errors import PoolError, PoolFull

from .actors import Stage, cable, mischief, operator, rot, upgrade, user
from .audit import check_accounts, check_stores, contents
from .clients import BLOCK_SECTORS, Client
from .devices import Crash
from .image import Image
from .loop import run
from .options import draw
from .oracle import Violation
from .scenarios import die_and_recover
from .stores import Objects
from .world import Rig

#: Device operations at which a life may end, and how often a failpoint may be passed before.
LIFE_OPERATIONS = 2500
PASSES = 12
#: Virtual seconds in which a pool without faults must have healed.
HEAL_SECONDS = 600
#: Checkpoints after which a pool that nobody uses must have come to rest.
CHECKPOINTS = 12


@dataclass(frozen=True, slots=True)
class Result:
    """What a seed did: its digest, and how often what happened."""

    digest: str
    events: Counter[str] = field(compare=False)


def run_seed(seed: int, **fixed: Any) -> Result:
    """Live through one seed, with some options `fixed` instead of drawn. Raises Violation (or
    whatever else broke), naming the seed."""
    try:
        return run(_Run(seed, **fixed).live())
    except BaseException as error:
        error.add_note(f"to repeat: make sim SEED={seed}")
        raise


class _Run:
    """All lives of one seed."""

    def __init__(self, seed: int, **fixed: Any) -> None:
        self.options = replace(draw(seed), **fixed)
        self.rng = Random(f"life {seed}")
        self.rig = Rig(
            seed, self.options.shape, latency=self.options.latency,
            leaf_budget=self.options.leaf_budget, sparse_max=self.options.sparse_max, checks=0.4,
        )  # fmt: skip
        self.rig.world.cached = self.options.cached
        self.stage = Stage(self.rig, self.options)
        self._shelf: dict[str, Image | Objects] = {}

    async def live(self) -> Result:
        rig = self.rig
        with rig.watching():
            await rig.create()
            parity = rig.shape.parity
            rig.unlucky = set(self.rng.sample(rig.shape.names, self.rng.randint(0, parity)))
            await rig.world.run(rig.open())
            for _ in range(self.options.lives):
                await self.chaos()
            if self.options.beyond:
                await self.beyond()
            await self.quiet()
        rig.events["requests"] = self.stage.answered
        return Result(rig.world.digest(), rig.events)

    # -- chaos -----------------------------------------------------------------------------------

    async def chaos(self) -> None:
        """One life, and the recovery from its end."""
        rig = self.rig
        self.draw_ending()
        try:
            await rig.world.run(self.act(sorted(rig.unlucky)))
            if rig.dies_at is None and rig.world.crash_at is None:
                await rig.world.run(self.leave())
        except Crash:
            rig.events["crashes"] += 1
        rig.dies_at = None
        self.change_luck()
        # What an unlucky replica has lost, only the lucky ones can vouch for.
        await die_and_recover(
            rig, power=self.rng.random() < self.options.power or bool(rig.unlucky)
        )

    def draw_ending(self) -> None:
        rig, rng = self.rig, self.rng
        rig.world.crash_at = rig.dies_at = None
        match rng.choice(self.options.endings):
            case "operation":
                rig.world.crash_at = rig.world.operations + rng.randrange(20, LIFE_OPERATIONS)
                rig.world.crash_after = rng.random() < 0.5
            case "failpoint":
                rig.die_at(rng.choice(self.options.failpoints), rng.randint(1, PASSES))

    async def act(self, targets: list[str]) -> None:
        """All actors at once, until they are done or the world ends."""
        rig, stage, options = self.rig, self.stage, self.options
        client = rig.client
        assert client is not None
        stage.names = [info.name for info in client.pool.volumes()]
        while len(stage.names) < 2:
            try:
                stage.names.append(await stage.new_volume(client))
            except PoolFull:
                rig.oracle.forget(stage.last_name)
                assert stage.names, "a pool without volumes cannot be full"
                break
            except (PoolError, OSError):
                if not stage.beyond:
                    raise
                break
        if not stage.names:
            return
        rig.serve()
        client.port = port = rig.nbd_port(
            self.fork(), latency=options.network, buffer=options.socket,
            connections=options.connections,
        )  # fmt: skip
        async with asyncio.TaskGroup() as group:
            for _ in range(options.users):
                work = user(stage, client, self.fork(), options.requests // options.users)
                group.create_task(work)
            group.create_task(operator(stage, client, self.fork()))
            group.create_task(cable(stage, port, self.fork()))
            group.create_task(upgrade(stage, port, self.fork()))
            group.create_task(mischief(stage, self.fork(), targets))

    def fork(self) -> Random:
        """A generator for one actor."""
        return Random(self.rng.random())

    async def leave(self) -> None:
        """Stop as the daemon does."""
        rig = self.rig
        assert rig.client is not None
        if rig.server is not None:
            await rig.server.stop(5)
        await rig.client.pool.close()
        rig.events["clean_ends"] += 1

    def change_luck(self) -> None:
        """Unlucky devices come back, as they are or as an old copy of themselves; or stay away."""
        rig = self.rig
        for name in sorted(rig.unlucky):
            old = self._shelf.get(name)
            if old is not None and "returns old" in self.options.faults and self.rng.random() < 0.4:
                _restore(rig, name, old)
                rig.events["old_copies"] += 1
            if name not in self._shelf or self.rng.random() < 0.3:
                self._shelf[name] = rig.world.images[name].copy()
            if self.rng.random() < 0.7:
                rig.world.scripts[name].clear()
        away = [name for name in sorted(rig.unlucky) if self.rng.random() < self.options.away]
        rig.missing = set(away)

    # -- beyond the budget -----------------------------------------------------------------------

    async def beyond(self) -> None:
        """One device more than parity fails. What is answered must be right, all else an error; and
        what was flushed, by then or meanwhile, is there once they work again."""
        rig, rng = self.rig, self.rng
        rig.world.crash_at = rig.dies_at = None
        self.stage.beyond = True
        healthy = [name for name in rig.shape.names if name not in rig.unlucky]
        extra = rig.shape.parity + 1 - len(rig.unlucky)
        for name in [*sorted(rig.unlucky), *rng.sample(healthy, extra)]:
            rule = rng.choice(
                (Rule(OPERATIONS, Vanish()), Rule(READS | WRITES, Fail(), times=None))
            )
            rig.world.scripts[name].add(rule)
        rig.events["beyond"] += 1
        await rig.world.run(self.act([]))
        for script in rig.world.scripts.values():
            script.clear()
        rig.missing = set()
        rig.end_life(power=True)
        self.stage.beyond = False
        client = await rig.open()
        await client.verify(power_lost=True)

    # -- quiet -----------------------------------------------------------------------------------

    async def quiet(self) -> None:
        """Without faults the pool must heal, scrub clean, serve, close, and open as it was."""
        rig = self.rig
        rig.world.crash_at = rig.dies_at = None
        rig.missing = set()
        for script in rig.world.scripts.values():
            script.clear()
        rig.end_life(power=True)
        for name in sorted(rig.unlucky)[:1]:
            # What rots while nobody reads it is found by a scrub alone.
            rot(rig.devices[name], self.rng, 200)
        client = await rig.open()
        await client.verify(power_lost=True)
        rig.power_lost = False
        await self.heal(client)
        rig.unlucky.clear()
        await self.serve(client)
        await self.rest(client)
        await self.open_twice(client)

    async def heal(self, client: Client) -> None:
        """Devices that returned catch up, and a scrub makes the rest right."""
        pool = client.pool
        maintenance = pool.engine.maintenance
        assert maintenance is not None
        await _until(lambda: not maintenance.catch_up.left, "catch up")
        first = await pool.scrub()
        again = await pool.scrub()
        self.rig.events["scrubbed"] += first.wrong.total()
        if first.unrepaired or again.wrong:
            raise Violation(f"a scrub left faults: {first.unrepaired[:3]} {again.wrong}")

    async def serve(self, client: Client) -> None:
        """Work goes on, through a root or two and whatever the pool still has to do."""
        names = [info.name for info in client.pool.volumes()]
        for name in names:
            for _ in range(10):
                block = self.options.first_block + self.rng.randrange(self.options.volume_blocks)
                await client.write(name, block * BLOCK_SECTORS, BLOCK_SECTORS)
            await client.flush(name)
        for _ in range(2):
            await client.pool.checkpoint()

    async def rest(self, client: Client) -> None:
        """Once nothing is under way, nothing is held that is not needed (R21)."""
        pool = client.pool
        state = pool.engine.state
        layers = state.catalog.layers
        await _until(lambda: not any(one.dropped for one in layers.values()), "forget layers")
        for _ in range(CHECKPOINTS):
            # A checkpoint releases what the one before it let go of, and the collector goes on.
            await pool.checkpoint()
            await asyncio.sleep(1)
            if not (state.table.dead() or state.gate.waiting or state.trash):
                break
        faults = await pool.check()
        if faults:
            raise Violation(f"at rest the pool's own check finds {faults[:3]}")
        status = pool.status()
        if status["state"] not in ("healthy", "full") or status["stripes"]["degraded"]:
            raise Violation(f"the pool did not heal: {status['state']}, {status['problems']}")
        await check_accounts(pool, at_rest=True)
        await check_stores(pool)

    async def open_twice(self, client: Client) -> None:
        """Closed and opened, to be read and to be written, the pool is always the same."""
        rig = self.rig
        before = await contents(client.pool)
        try:
            await client.pool.close()
        except PoolError as error:
            raise Violation(f"the pool did not close: {error}") from error
        rig.end_life(power=True)
        for read_only in (True, False, False):
            written = rig.world.changes
            client = await rig.open(read_only=read_only)
            if await contents(client.pool) != before:
                raise Violation("the pool opened as another than it was closed")
            if read_only and rig.world.changes != written:
                raise Violation("opening for reading changed a device")
            if not read_only:
                await rig.verify(client)
            await client.pool.close()
            rig.end_life(power=False)


async def _until(reached: Callable[[], bool], what: str) -> None:
    """Wait for something that must happen soon. Raises Violation."""
    for _ in range(HEAL_SECONDS):
        if reached():
            return
        await asyncio.sleep(1)
    raise Violation(f"without faults the pool did not {what} in {HEAL_SECONDS} s")


def _restore(rig: Rig, name: str, old: Image | Objects) -> None:
    """Put an old copy of a medium in the place of what is there."""
    medium = rig.world.images[name]
    copy = old.copy()
    if isinstance(medium, Image) and isinstance(copy, Image):
        medium.written, medium.synced, medium.unsynced = copy.written, copy.synced, copy.unsynced
    elif isinstance(medium, Objects) and isinstance(copy, Objects):
        medium.objects = copy.objects
