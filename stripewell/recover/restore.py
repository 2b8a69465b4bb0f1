"""Writes a volume into a sink, block by block verified. Called by `command`."""

from __future__ import annotations

import numpy as np

from stripewell.recover.catalog import Volume
from stripewell.recover.ranges import Ranges
from stripewell.recover.remains import Finding, Progress, Remains, count
from stripewell.recover.root import BLOCK
from stripewell.recover.sinks import Sink

_WORDS = BLOCK // 8


async def restore(
    remains: Remains, volume: Volume, sink: Sink, progress: Progress, *, stop: bool = False
) -> Finding:
    """Write all that there is of a volume; the finding says which blocks are lost and left as
    zeros. With `stop` it ends before the first of them, for what cannot be taken back. The sink is
    neither finished nor abandoned. Raises OSError if it fails."""
    finding = Finding(volume, "", verified=True)
    content = remains.content(volume)
    async for part in content.parts():
        count(finding, part)
        data, lost = memoryview(b""), content.lost(part)
        if part.locations is not None:
            data, lost = await content.read(part)
        finding.lost.add_blocks(part.first, lost)
        if stop and finding.lost.blocks:
            _write(sink, part.first, data[: int(lost.argmax()) * BLOCK])
            break
        _write(sink, part.first, data)
        progress(part.first + part.count, content.blocks)
    return finding


def _write(sink: Sink, first: int, data: memoryview) -> None:
    """Hand over what is not zero of the blocks from `first`."""
    if not len(data):
        return
    words = np.frombuffer(data, np.uint64).reshape(-1, _WORDS)
    pieces = Ranges()
    pieces.add_blocks(0, np.asarray(words.any(axis=1)))
    for start, end in pieces.kept:
        sink.write((first + start) * BLOCK, data[start * BLOCK : end * BLOCK])
