"""Writes a volume into a sink, block by block verified. Called by `command`."""

from __future__ import annotations

import numpy as np

from stripewell.recover.catalog import Volume
from stripewell.recover.content import Part
from stripewell.recover.ranges import Ranges
from stripewell.recover.remains import Finding, Progress, Remains, count
from stripewell.recover.root import BLOCK
from stripewell.recover.sinks import Sink

_WORDS = BLOCK // 8


async def restore(remains: Remains, volume: Volume, sink: Sink, progress: Progress) -> Finding:
    """Write all that there is of a volume; the finding says which blocks are lost and left as
    zeros. The sink is neither finished nor abandoned. Raises OSError if it fails."""
    finding = Finding(volume, "")
    content = remains.content(volume)
    async for part in content.parts():
        count(finding, part)
        if part.locations is None:
            finding.lost.add(part.first, part.first + part.count)
        else:
            data, lost = await content.read(part)
            finding.lost.add_blocks(part.first, lost)
            _write(sink, part, data)
        progress(part.first + part.count, content.blocks)
    return finding


def _write(sink: Sink, part: Part, data: memoryview) -> None:
    """Hand over what is not zero."""
    words = np.frombuffer(data, np.uint64).reshape(part.count, _WORDS)
    pieces = Ranges()
    pieces.add_blocks(0, np.asarray(words.any(axis=1)))
    for start, end in pieces.kept:
        sink.write((part.first + start) * BLOCK, data[start * BLOCK : end * BLOCK])
