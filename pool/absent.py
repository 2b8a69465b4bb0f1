"""Why members are not there: by what was found at the URLs that led to none. Pure.

What was found at the URL where a member was last seen is about that member. What was found at other
URLs may be about any that is still unexplained, and is told for each. Called by `pool.pool`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pool.member import Member

#: What the root says of a member that was not there when a term began.
ABSENT = "absent when the pool was opened"
NOT_LOOKED_FOR = (
    "it is none of the devices that the pool was opened from: `pool import` it together with them"
)


def explain(members: Iterable[Member], found: Mapping[str, str]) -> None:
    """Note with each absent member what was `found` of it, URL → reason."""
    absent = [member for member in members if member.backend is None and not member.finding]
    urls = {member.url for member in absent}
    elsewhere = "; ".join(reason for url, reason in found.items() if url not in urls)
    for member in absent:
        member.finding = found.get(member.url, "") or elsewhere
        if not member.finding and member.reason in ("", ABSENT):
            member.finding = NOT_LOOKED_FOR
