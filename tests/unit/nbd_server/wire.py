"""The client's side of the protocol, for tests: encodes requests, decodes replies.

Written independently of the server's encoders, so that a mistake there is not made here again.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import struct
from dataclasses import dataclass, field
from typing import Any

IHAVEOPT = 0x49484156454F5054
NBDMAGIC = 0x4E42444D41474943
FIXED, NO_ZEROES = 1, 2
EXPORT_NAME, ABORT, LIST, STARTTLS, INFO, GO = 1, 2, 3, 5, 6, 7
STRUCTURED, LIST_META, SET_META, EXTENDED = 8, 9, 10, 11
ACK, SERVER, REP_INFO, META = 1, 2, 3, 4
UNSUP, INVALID, UNKNOWN, TOO_BIG, EXT_REQD = ((1 << 31) + n for n in (1, 3, 6, 9, 10))
READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD = 1, 2, 4, 8, 16, 32


def client_flags(flags: int = FIXED | NO_ZEROES) -> bytes:
    return struct.pack(">I", flags)


def option(number: int, data: bytes = b"", *, length: int | None = None) -> bytes:
    return struct.pack(">QII", IHAVEOPT, number, len(data) if length is None else length) + data


def string(text: str) -> bytes:
    return struct.pack(">I", len(text.encode())) + text.encode()


def info(name: str, *wanted: int) -> bytes:
    return string(name) + struct.pack(f">H{len(wanted)}H", len(wanted), *wanted)


def meta(name: str, *queries: str) -> bytes:
    return string(name) + struct.pack(">I", len(queries)) + b"".join(map(string, queries))


def option_replies(data: bytes) -> list[tuple[int, int, bytes]]:
    """(option, type, data) of every reply; fails on anything that is none."""
    found = []
    while data:
        magic, number, kind, length = struct.unpack_from(">QIII", data)
        assert magic == 0x0003E889045565A9
        assert len(data) >= 20 + length
        found.append((number, kind, data[20 : 20 + length]))
        data = data[20 + length :]
    return found


def request(
    kind: int,
    cookie: int = 1,
    offset: int = 0,
    length: int = 0,
    flags: int = 0,
    payload: bytes = b"",
    *,
    longer: bool = False,
) -> bytes:
    """A request; `longer` is one with an extended header."""
    layout, magic = (">IHHQQQ", 0x21E41C71) if longer else (">IHHQQI", 0x25609513)
    return struct.pack(layout, magic, flags, kind, cookie, offset, length) + payload


extended = functools.partial(request, longer=True)


def write(cookie: int, offset: int, payload: bytes, flags: int = 0) -> bytes:
    return request(WRITE, cookie, offset, len(payload), flags, payload)


@dataclass
class Answer:
    """One reply: `data` of a read, `extents` of a status, `error` 0 on success.

    `holes` are (offset, bytes) of what a read was told to be zeros, `statuses` the extents of every
    context by its number, `where` the offset of an error."""

    cookie: int
    error: int = 0
    data: bytes = b""
    extents: tuple[tuple[int, int], ...] = ()
    text: str = ""
    holes: tuple[tuple[int, int], ...] = ()
    statuses: dict[int, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    where: int | None = None


def decode(data: bytes, reads: dict[int, int]) -> list[Answer]:
    """All replies in `data`; `reads` says for which cookies a simple reply carries how much."""
    answers = []
    while data:
        answer, data = decode_one(data, reads)
        answers.append(answer)
    return answers


def decode_one(data: bytes, reads: dict[int, int]) -> tuple[Answer, bytes]:
    magic = struct.unpack_from(">I", data)[0]
    if magic == 0x67446698:
        _, error, cookie = struct.unpack_from(">IIQ", data)
        length = 0 if error else reads.get(cookie, 0)
        assert len(data) >= 16 + length
        return Answer(cookie, error, data[16 : 16 + length]), data[16 + length :]
    chunks: list[tuple[int, bytes]] = []
    cookie = _cookie(data)
    while True:
        flags, kind, of, body, data = chunk(data)
        # Chunks of different replies may be mixed; this server sends those of one together.
        assert of == cookie
        assert flags in (0, 1)
        chunks.append((kind, body))
        if flags:
            return _assemble(cookie, chunks), data


def answer_size(data: bytes | bytearray, reads: dict[int, int]) -> int | None:
    """Bytes of the first answer with all its chunks; None if it has not arrived as a whole."""
    end = 0
    while len(data) >= end + 16:
        magic, error, cookie = struct.unpack_from(">IIQ", data, end)
        if magic == 0x67446698:
            end += 16 + (0 if error else reads.get(cookie, 0))
            return end if end <= len(data) else None
        head = 32 if magic == 0x6E8A278C else 20
        if len(data) < end + head:
            return None
        done = data[end + 5] & 1
        length = struct.unpack_from(">Q" if head == 32 else ">4xI", data, end + head - 8)[0]
        end += head + length
        if done:
            return end if end <= len(data) else None
    return None


def chunk(data: bytes) -> tuple[int, int, int, bytes, bytes]:
    """Flags, type, cookie and body of the first chunk, and what follows it."""
    magic = struct.unpack_from(">I", data)[0]
    if magic == 0x668E33EF:
        _, flags, kind, cookie, length = struct.unpack_from(">IHHQI", data)
        start = 20
    else:
        assert magic == 0x6E8A278C
        _, flags, kind, cookie, _, length = struct.unpack_from(">IHHQQQ", data)
        start = 32
    body = data[start : start + length]
    assert len(body) == length
    return flags, kind, cookie, body, data[start + length :]


def _assemble(cookie: int, chunks: list[tuple[int, bytes]]) -> Answer:
    """One answer of all its chunks; what a read got must fit together without gap or overlap."""
    answer = Answer(cookie)
    pieces: list[tuple[int, bytes]] = []
    for kind, body in chunks:
        if kind == 1:
            assert len(body) > 8
            pieces.append((struct.unpack_from(">Q", body)[0], body[8:]))
        elif kind == 2:
            where, length = struct.unpack(">QI", body)
            assert length
            pieces.append((where, bytes(length)))
            answer.holes += ((where, length),)
        else:
            _add(answer, kind, body)
    pieces.sort()
    for (at, piece), (following, _) in itertools.pairwise(pieces):
        assert at + len(piece) == following
    answer.data = b"".join([piece for _, piece in pieces])
    if len(answer.statuses) == 1:
        answer.extents = next(iter(answer.statuses.values()))
    return answer


def decode_any(data: bytes, requests: list[tuple[int, int, int, int, int, int]]) -> list[int]:
    """Cookies of all replies in `data`, where requests may share a cookie.

    Which of them a simple reply belongs to is found by trying."""
    if not data:
        return []
    lengths = {r[4] for r in requests if r[1] == READ} | {0}
    for length in sorted(lengths):
        cookie = _cookie(data)
        try:
            answer, rest = decode_one(data, {cookie: length})
            return [answer.cookie, *decode_any(rest, requests)]
        except (AssertionError, struct.error):
            continue
    raise AssertionError("no reply here")


def _cookie(data: bytes) -> int:
    # Simple replies and chunks have it at the same place.
    cookie: int = struct.unpack_from(">Q", data, 8)[0]
    return cookie


def _add(answer: Answer, kind: int, body: bytes) -> None:
    if kind == 0:
        assert not body
    elif kind in (5, 6):
        if kind == 5:
            context, *numbers = struct.unpack(f">{len(body) // 4}I", body)
        else:
            context, count = struct.unpack_from(">II", body)
            numbers = list(struct.unpack_from(f">{2 * count}Q", body, 8))
            assert len(body) == 8 + 16 * count
        assert len(numbers) >= 2
        assert context not in answer.statuses
        answer.statuses[context] = tuple(zip(numbers[::2], numbers[1::2], strict=True))
    else:
        assert kind in ((1 << 15) + 1, (1 << 15) + 2)
        answer.error, size = struct.unpack_from(">IH", body)
        assert answer.error
        answer.text = body[6 : 6 + size].decode()
        if kind == (1 << 15) + 2:
            answer.where = struct.unpack_from(">Q", body, 6 + size)[0]
            assert len(body) == 14 + size
        else:
            assert len(body) == 6 + size


class Client:
    """A raw connection that can do what no proper client would."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.reads: dict[int, int] = {}
        self._inbound = bytearray()
        #: Whether extended headers were negotiated.
        self.longer = False

    @classmethod
    async def connect(cls, where: str | int) -> Client:
        """To the unix socket at a path, or to a TCP port of this machine."""
        if isinstance(where, int):
            return cls(*await asyncio.open_connection("127.0.0.1", where, limit=1 << 26))
        return cls(*await asyncio.open_unix_connection(where, limit=1 << 26))

    @classmethod
    async def ready(
        cls, where: str | int, name: str = "vol", *, structured: bool = True, longer: bool = False
    ) -> Client:
        """Connected, negotiated and in the transmission phase."""
        client = await cls.connect(where)
        await client.greet()
        if structured:
            client.longer = longer
            client.send(option(EXTENDED if longer else STRUCTURED))
            client.send(option(SET_META, meta(name, "base:allocation")))
            while (await client.option_reply())[:2] != (SET_META, ACK):
                pass
        client.send(option(GO, info(name)))
        while (await client.option_reply())[1] != ACK:
            pass
        return client

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def greet(self, flags: int = FIXED | NO_ZEROES) -> None:
        greeting = await self.reader.readexactly(18)
        assert greeting == struct.pack(">QQH", NBDMAGIC, IHAVEOPT, FIXED | NO_ZEROES)
        self.send(client_flags(flags))

    async def option_reply(self) -> tuple[int, int, bytes]:
        header = await self.reader.readexactly(20)
        size = struct.unpack_from(">I", header, 16)[0]
        return option_replies(header + await self.reader.readexactly(size))[0]

    async def answer(self) -> Answer:
        while (size := answer_size(self._inbound, self.reads)) is None:
            more = await self.reader.read(1 << 20)
            if not more:
                raise asyncio.IncompleteReadError(bytes(self._inbound), None)
            self._inbound += more
        answer, rest = decode_one(bytes(self._inbound[:size]), self.reads)
        assert not rest
        del self._inbound[:size]
        return answer

    async def ask(self, kind: int, cookie: int = 1, **fields: Any) -> Answer:
        if kind == READ:
            self.reads[cookie] = fields.get("length", 0)
        self.send(request(kind, cookie, longer=self.longer, **fields))
        return await self.answer()

    async def ended(self) -> bool:
        """Whether the server has closed without another byte."""
        try:
            return await asyncio.wait_for(self.reader.read(1), 5) == b""
        except ConnectionResetError:
            return True

    async def close(self) -> None:
        self.writer.close()
        try:
            await self.writer.wait_closed()
        except (BrokenPipeError, ConnectionResetError):
            return
