"""The pool: a log-structured, erasure-coded block store on top of `backends.base`.

Way of a write: `volume` → `journal` → `apply`; later `destage` → `moving` → `stripe_writer`.
Way of a read: `volume` → `blockmap` → `reader`. Opening: `pool` → `recovery`.
What is on the devices: `format/`. See `docs/architecture.md`.
"""

from pool.create import MemberSpec, PoolSpec, ProbeResult, create_pool, probe
from pool.errors import PoolError
from pool.pool import Pool, VolumeInfo
from pool.status import Health

__all__ = [
    "Health",
    "MemberSpec",
    "Pool",
    "PoolError",
    "PoolSpec",
    "ProbeResult",
    "VolumeInfo",
    "create_pool",
    "probe",
]
