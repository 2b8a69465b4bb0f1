"""Parsing of the data of options that carry more than a name. Pure.

Every length inside the data is checked against its end, and every string against the protocol's
rules, before anything is made of it. Called by `handshake`.
"""

from __future__ import annotations

from struct import Struct

from nbd_server.constants import MAX_STRING

_U16 = Struct(">H")
_U32 = Struct(">I")


class MalformedOption(Exception):
    """The data of an option is not what it must be; answered with REP_ERR_INVALID."""


class _Reader:
    """Takes values off the front of option data."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def _take(self, size: int) -> bytes:
        end = self._at + size
        if end > len(self._data):
            raise MalformedOption("a length points past the end of the option")
        part = self._data[self._at : end]
        self._at = end
        return part

    def u16(self) -> int:
        value: int = _U16.unpack(self._take(2))[0]
        return value

    def u32(self) -> int:
        value: int = _U32.unpack(self._take(4))[0]
        return value

    def string(self) -> str:
        length = self.u32()
        part = self._take(length)
        if length > MAX_STRING or b"\0" in part:
            raise MalformedOption(f"strings have at most {MAX_STRING} bytes and no NUL")
        try:
            return part.decode()
        except UnicodeDecodeError:
            raise MalformedOption("strings are UTF-8") from None

    def finish(self) -> None:
        if self._at != len(self._data):
            raise MalformedOption("bytes left over at the end of the option")


def parse_info(data: bytes) -> tuple[str, frozenset[int]]:
    """Name of the export and the kinds of information that INFO or GO ask for."""
    reader = _Reader(data)
    name = reader.string()
    wanted = frozenset(reader.u16() for _ in range(reader.u16()))
    reader.finish()
    return name, wanted


def parse_meta_context(data: bytes) -> tuple[str, frozenset[str]]:
    """Name of the export and the queries of LIST_META_CONTEXT or SET_META_CONTEXT."""
    reader = _Reader(data)
    name = reader.string()
    # A count that lies ends at the end of the data: each query takes four bytes at least.
    queries = frozenset(reader.string() for _ in range(reader.u32()))
    reader.finish()
    return name, queries
