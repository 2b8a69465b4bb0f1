"""The tool of last resort: reads a pool's devices with `docs/format.md` alone.

It shares nothing with the engine but the erasure code, so that a fault of the engine is no fault
of this, and it believes nothing that it reads: sizes, counts and offsets are held against what a
device has before anything is allocated, and every block against its checksum in the map. It never
writes to a device.

Way of the bytes: `sources` (open, read) → `superblock`, `root`, `choice` → `stripes` (table,
blocks, reconstruction) → `checkpoint` (pages) → `journal` (chain) → `overlay`, `catalog` (its
effect) → `content` (a volume's map and bytes) → `remains` (all of it, and how complete it is) →
`restore` (a volume into one of the `sinks`). What proves wrong on the way is counted in `damage`,
device by device. `command` is the command line, `report` its words.

Memory: 64 MiB of top page as JSON (some 20 times that as objects), the stripe table as it is on the
devices, the extents and checksums of the journal's live part, and for one volume at a time a
directory, a leaf and its 2 MiB of content.
"""
