"""Names of pools and volumes. Pure; called by the CLI and by `state`.

They end up in file names, NBD export names and shell lines, so the rule is narrow: it leaves no
room for path tricks or quoting.
"""

from __future__ import annotations

import re

from stripewell.errors import UserError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)
_RULE = "use up to 64 letters, digits, '.', '_' and '-', a letter or digit first"


def check_name(kind: str, name: str) -> str:
    """The name itself; `kind` ("pool", "volume") is for the message. Raises `UserError`."""
    if _NAME.fullmatch(name) is None:
        raise UserError(f"{name[:80]!r} is no {kind} name: {_RULE}")
    return name


def split_volume(path: str) -> tuple[str, str]:
    """POOL and VOLUME of "POOL/VOLUME". Raises `UserError`."""
    pool, slash, volume = path.partition("/")
    if not slash:
        raise UserError(f"{path[:80]!r} names no volume: write POOL/VOLUME, as in tank/vm1")
    return check_name("pool", pool), check_name("volume", volume)
