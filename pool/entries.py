"""Whether the entries of a leaf can be: known tags, and blocks that their stripes have. Pure.

Held against every leaf that is loaded, so that a location never leads out of the table or behind
the end of a shard. `pool.check.maps` looks closer, at all of them.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pool.blockmap import Leaf
from pool.errors import FormatError
from pool.format.location import (
    BLOCK_MASK,
    SHARD_MASK,
    SHARD_SHIFT,
    STRIPE_MASK,
    STRIPE_SHIFT,
    TAG_SHIFT,
    TAG_STRIPE,
    TAG_ZERO,
    ZERO,
)
from pool.table import DATA, StripeTable

U64 = npt.NDArray[np.uint64]


def split(locations: U64) -> tuple[U64, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Stripe, shard and block in it of locations with the stripe tag."""
    stripes = locations >> np.uint64(STRIPE_SHIFT) & np.uint64(STRIPE_MASK)
    shards = locations >> np.uint64(SHARD_SHIFT) & np.uint64(SHARD_MASK)
    return stripes, shards.astype(np.int64), (locations & np.uint64(BLOCK_MASK)).astype(np.int64)


def check_leaf(leaf: Leaf, table: StripeTable) -> None:
    """Raises FormatError."""
    locations = np.array(leaf.locations, np.uint64)
    if leaf.index is None:
        locations = locations[locations != 0]
    tags = locations >> np.uint64(TAG_SHIFT)
    if ((tags == 0) | ((tags == TAG_ZERO) & (locations != ZERO))).any():
        raise FormatError("it maps a block to a place that there cannot be")
    stripes, shards, blocks = split(locations[tags == TAG_STRIPE])
    for stripe in np.unique(stripes).tolist():
        at = table.rows.get(stripe)
        if at is None:
            raise FormatError(f"it maps a block to stripe {stripe}, which does not exist")
        row, here = table.raw(at), stripes == stripe
        inside = (shards[here] < row["data"]) & (blocks[here] < row["shard"])
        if row["kind"] != DATA or not inside.all():
            raise FormatError(f"it maps a block to where stripe {stripe} has none")
