"""Reads the URL of a backend as an operator writes it. Pure.

`scheme:path?option=value`, `scheme:///path?option=value`, or a bare path, which has no scheme yet.
Called by `backends.open`.
"""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from urllib.parse import parse_qsl, unquote, urlsplit

from .base import BLOCK_SIZE, DeviceError

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:")
_SIZE = re.compile(r"([0-9]{1,19})([KMGT]?)(?:i?B)?", re.IGNORECASE)
_FACTORS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_FORBIDDEN = frozenset("\0\r\n")
_SIZE_MAX = (1 << 63) - BLOCK_SIZE


@dataclass(frozen=True, slots=True)
class BackendUrl:
    """The parts of `text`; `scheme` is empty for a bare path, `host` for what is on this one."""

    text: str
    scheme: str
    host: str
    path: str
    options: dict[str, str]

    def size(self) -> int | None:
        """Return the option `size` in bytes, None when it is not given. Raises `DeviceError`."""
        text = self.options.get("size")
        return None if text is None else parse_size(self.text, text)

    def check_options(self, known: frozenset[str]) -> None:
        """Raise `DeviceError` when an option is given that this scheme does not have."""
        if unknown := sorted(self.options.keys() - known):
            hint = f"use {', '.join(sorted(known))}" if known else "leave it out"
            raise invalid(self.text, f"unknown option {unknown[0]}", hint)


def parse_url(text: str) -> BackendUrl:
    """Return the parts of the URL or path `text`. Raises `DeviceError` when it makes no sense."""
    if not text or not _FORBIDDEN.isdisjoint(text):
        raise invalid(repr(text), "no path", "give a path or a URL such as file:///path?size=10G")
    if not _SCHEME.match(text):
        path, options = _split_options(text)
        return BackendUrl(text, "", "", path, options)
    try:
        parts = urlsplit(text, allow_fragments=False)
        options = _options(parts.query)
    except ValueError as cause:
        raise invalid(text, str(cause), "correct the URL") from cause
    return BackendUrl(text, parts.scheme, parts.netloc, unquote(parts.path), options)


def parse_size(where: str, text: str) -> int:
    """Return `text` such as `10G` in bytes, a multiple of `BLOCK_SIZE`. Raises `DeviceError`."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise invalid(where, f"{text!r} is no size", "write for instance 512M, 10G or 4T")
    size = int(match[1]) * _FACTORS[match[2].upper()]
    if size == 0 or size % BLOCK_SIZE:
        raise invalid(where, f"size {text} is no multiple of {BLOCK_SIZE}", "write one, above 0")
    if size > _SIZE_MAX:
        raise invalid(where, f"size {text} is too large", f"stay below {_SIZE_MAX} bytes")
    return size


def invalid(where: str, problem: str, remedy: str) -> DeviceError:
    """Return the error of a URL that cannot be used."""
    return DeviceError(errno.EINVAL, f"{where}: {problem}: {remedy}")


def _split_options(text: str) -> tuple[str, dict[str, str]]:
    """A bare path may end in `?size=10G`; any other question mark is part of the name."""
    path, mark, query = text.rpartition("?")
    if not mark or not re.fullmatch(r"\w+=.*", query):
        return text, {}
    return path, _options(query)


def _options(query: str) -> dict[str, str]:
    if not query:
        return {}
    return dict(parse_qsl(query, keep_blank_values=True, strict_parsing=True))
