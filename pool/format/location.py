"""Where a block is: the 64-bit location of a map entry (`docs/format.md`, "Map entry").

Top two bits are the tag. A location never contains a device address: only the stripe table knows
where the shards of a stripe are, so moving a shard changes one row and no map entry. Locations
never repeat (stripe ids and journal positions are never reused), which is what makes the map's
compare-and-swap safe (R11).
"""

from __future__ import annotations

HOLE = 0
TAG_SHIFT = 62
JOURNAL = 1 << TAG_SHIFT
STRIPE = 2 << TAG_SHIFT
#: A block that reads as zeros, hides the parent layer and keeps its space.
ZERO = 3 << TAG_SHIFT

TAG_JOURNAL = 1
TAG_STRIPE = 2
TAG_ZERO = 3

POSITION_MASK = JOURNAL - 1
STRIPE_SHIFT = 22
STRIPE_MASK = (1 << 40) - 1
SHARD_SHIFT = 16
SHARD_MASK = (1 << 6) - 1
BLOCK_MASK = (1 << 16) - 1


def in_stripe(stripe: int, shard: int, block: int) -> int:
    """The location of block `block` of data shard `shard` of stripe `stripe`."""
    return STRIPE | stripe << STRIPE_SHIFT | shard << SHARD_SHIFT | block


def stripe_of(location: int) -> int:
    """The stripe id in a location with the stripe tag."""
    return location >> STRIPE_SHIFT & STRIPE_MASK
