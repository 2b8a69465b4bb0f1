"""Fixed newstyle negotiation. Pure: bytes in, reply bytes out; no socket, no clock.

`receive` handles at most one option a call, so that the caller can stop between two while replies
wait to be sent. Invariants: a header makes nothing be allocated; option data beyond `option_bytes`
is skipped unseen; every option gets exactly one final reply, except EXPORT_NAME, which has none for
errors. What a client may do wrong without losing its connection is answered, the rest raises
`ProtocolError`. Called by `session` until `outcome` is set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from struct import Struct

from nbd_server import constants as nbd
from nbd_server.errors import ProtocolError
from nbd_server.export import Export
from nbd_server.limits import Limits
from nbd_server.options import MalformedOption, parse_info, parse_meta_context
from nbd_server.replies import Framing
from nbd_server.tls import Tls

_GREETING = Struct(">QQH")
_CLIENT_FLAGS = Struct(">I")
_OPTION = Struct(">QII")
_REPLY = Struct(">QIII")
_LENGTH = Struct(">I")
_INFO_EXPORT = Struct(">HQH")
_INFO_BLOCK_SIZE = Struct(">HIII")
_EXPORT_NAME_REPLY = Struct(">QH")
_HANDSHAKE_FLAGS = nbd.FLAG_FIXED_NEWSTYLE | nbd.FLAG_NO_ZEROES
_CLIENT_FLAGS_KNOWN = nbd.FLAG_C_FIXED_NEWSTYLE | nbd.FLAG_C_NO_ZEROES

GREETING = _GREETING.pack(nbd.NBDMAGIC, nbd.IHAVEOPT, _HANDSHAKE_FLAGS)


@dataclass(frozen=True, slots=True)
class Agreement:
    """What the transmission phase goes by."""

    export: Export
    framing: Framing
    #: The metadata contexts that were selected for this export, by their numbers.
    contexts: Mapping[int, str]
    #: What offsets and lengths are multiples of, by the client's promise.
    alignment: int = 1


@dataclass(frozen=True, slots=True)
class Exports:
    """The exports of a server, as it was given them."""

    find: Callable[[str], Export | None]
    list: Callable[[], list[Export]]

    def get(self, name: str) -> Export | None:
        """The export, unless it is unknown or was deleted."""
        export = self.find(name)
        return None if export is None or export.closed else export

    def seen_by(self, tls: Tls, subject: str | None) -> Exports:
        """Those that a client may see, by the subject of its certificate."""

        def find(name: str) -> Export | None:
            export = self.find(name)
            return export if export is not None and tls.permits(subject, export.name) else None

        return Exports(find, lambda: [e for e in self.list() if tls.permits(subject, e.name)])


class Security(Enum):
    """What a connection has to do with TLS."""

    NONE = "not offered"
    OFFERED = "offered"
    REQUIRED = "required first"
    DONE = "in use"


class Handshake:
    """The negotiation of one connection. Send `GREETING` first.

    When `starttls` is set, TLS begins behind the replies, and a new object goes on: nothing that
    was negotiated before counts."""

    def __init__(
        self, exports: Exports, limits: Limits, security: Security = Security.NONE,
        flags: int | None = None,
    ) -> None:  # fmt: skip
        self._exports = exports
        self._limits = limits
        self._security = security
        self._replies: list[bytes] = []
        self._flags = flags
        self._skip = 0
        self._structured = False
        self._extended = False
        #: Name of the export that contexts were selected for, and which.
        self._contexts_of: str | None = None
        self._contexts: dict[int, str] = {}
        self._handlers: dict[int, Callable[[bytes], None]] = {
            nbd.OPT_EXPORT_NAME: self._export_name,
            nbd.OPT_LIST: self._list,
            nbd.OPT_INFO: lambda data: self._info(nbd.OPT_INFO, data),
            nbd.OPT_GO: lambda data: self._info(nbd.OPT_GO, data),
            nbd.OPT_STRUCTURED_REPLY: self._structured_reply,
            nbd.OPT_LIST_META_CONTEXT: self._list_meta_context,
            nbd.OPT_SET_META_CONTEXT: self._set_meta_context,
            nbd.OPT_EXTENDED_HEADERS: self._extended_headers,
        }
        if security is not Security.NONE:
            self._handlers[nbd.OPT_STARTTLS] = self._starttls
        self.outcome: Agreement | None = None
        self.aborted = False
        self.starttls = False

    @property
    def flags(self) -> int | None:
        """The client's flags, once they are there."""
        return self._flags

    def replies(self) -> bytes:
        """What is to be sent since the last call."""
        result = b"".join(self._replies)
        self._replies.clear()
        return result

    def receive(self, data: memoryview) -> int:
        """Handle what is at the start of `data`; how many bytes of it are done with.

        Zero means that more are needed. Raises `ProtocolError` if the connection must be closed
        without another word."""
        if self._skip:
            skipped = min(self._skip, len(data))
            self._skip -= skipped
            return skipped
        if self._flags is None:
            return self._client_flags(data)
        return self._option(data)

    def _client_flags(self, data: memoryview) -> int:
        if len(data) < _CLIENT_FLAGS.size:
            return 0
        flags: int = _CLIENT_FLAGS.unpack_from(data)[0]
        if flags & ~_CLIENT_FLAGS_KNOWN:
            raise ProtocolError(f"unknown client flags {flags:#x}")
        self._flags = flags
        return _CLIENT_FLAGS.size

    def _option(self, data: memoryview) -> int:
        if len(data) < _OPTION.size:
            # The magic is judged as soon as it is there: garbage need not wait for the timeout.
            if len(data) >= 8 and int.from_bytes(data[:8], "big") != nbd.IHAVEOPT:
                raise ProtocolError("wrong option magic")
            return 0
        magic, option, length = _OPTION.unpack_from(data)
        if magic != nbd.IHAVEOPT:
            raise ProtocolError(f"option magic {magic:#x} is not {nbd.IHAVEOPT:#x}")
        if option == nbd.OPT_ABORT:
            self._reply(option, nbd.REP_ACK)
            self.aborted = True
            return _OPTION.size
        if length > self._limits.option_bytes:
            self._oversized(option, length)
            return _OPTION.size
        end: int = _OPTION.size + length
        if len(data) < end:
            return 0
        self._handle(option, bytes(data[_OPTION.size : end]))
        return end

    def _oversized(self, option: int, length: int) -> None:
        if length > self._limits.skipped_option_bytes or option == nbd.OPT_EXPORT_NAME:
            raise ProtocolError(f"option {option} with {length} bytes of data")
        if option == nbd.OPT_SET_META_CONTEXT:
            self._contexts_of = None
        known = option in self._handlers
        self._fail(option, nbd.REP_ERR_TOO_BIG if known else nbd.REP_ERR_UNSUP, "too much data")
        self._skip = length

    def _handle(self, option: int, data: bytes) -> None:
        fixed = (self._flags or 0) & nbd.FLAG_C_FIXED_NEWSTYLE
        handler = self._handlers.get(option)
        if option != nbd.OPT_EXPORT_NAME and not fixed:
            self._fail(option, nbd.REP_ERR_INVALID, "the client did not ask for fixed newstyle")
        elif self._security is Security.REQUIRED and option != nbd.OPT_STARTTLS:
            if option == nbd.OPT_EXPORT_NAME:
                raise ProtocolError("EXPORT_NAME without TLS")
            self._fail(option, nbd.REP_ERR_TLS_REQD, "this server requires TLS: send STARTTLS")
        elif handler is None:
            self._fail(option, nbd.REP_ERR_UNSUP, f"option {option} is not supported")
        else:
            try:
                handler(data)
            except MalformedOption as error:
                self._fail(option, nbd.REP_ERR_INVALID, str(error))

    def _starttls(self, data: bytes) -> None:
        if data:
            raise MalformedOption("STARTTLS takes no data")
        if self._security is Security.DONE:
            raise MalformedOption("TLS is in use already")
        self._reply(nbd.OPT_STARTTLS, nbd.REP_ACK)
        self.starttls = True

    # --- options -----------------------------------------------------------------------------

    def _export_name(self, data: bytes) -> None:
        if self._extended:
            raise ProtocolError("EXPORT_NAME after EXTENDED_HEADERS")
        try:
            name = data.decode()
        except UnicodeDecodeError:
            raise ProtocolError("EXPORT_NAME is not UTF-8") from None
        export = self._exports.get(name) if len(data) <= nbd.MAX_STRING else None
        if export is None:
            raise ProtocolError(f"EXPORT_NAME for the unknown export {name[:64]!r}")
        self._replies.append(_EXPORT_NAME_REPLY.pack(export.size, self._transmission_flags(export)))
        if not (self._flags or 0) & nbd.FLAG_C_NO_ZEROES:
            self._replies.append(bytes(124))
        self._agree(name, export)

    def _list(self, data: bytes) -> None:
        if data:
            raise MalformedOption("LIST takes no data")
        for export in self._exports.list():
            name = export.name.encode()
            description = export.description.encode()[: nbd.MAX_STRING]
            description = description.decode(errors="ignore").encode()
            body = _LENGTH.pack(len(name)) + name + description
            self._reply(nbd.OPT_LIST, nbd.REP_SERVER, body)
        self._reply(nbd.OPT_LIST, nbd.REP_ACK)

    def _info(self, option: int, data: bytes) -> None:
        name, wanted = parse_info(data)
        export = self._exports.get(name)
        if export is None:
            self._fail(option, nbd.REP_ERR_UNKNOWN, f"export {name[:64]!r} is unknown")
            return
        for body in self._information(export, wanted):
            self._reply(option, nbd.REP_INFO, body)
        self._reply(option, nbd.REP_ACK)
        if option == nbd.OPT_GO:
            obeys = nbd.INFO_BLOCK_SIZE in wanted
            self._agree(name, export, self._limits.minimum_block if obeys else 1)

    def _information(self, export: Export, wanted: frozenset[int]) -> list[bytes]:
        """EXPORT and BLOCK_SIZE go out unasked, the rest where it was asked for."""
        flags = self._transmission_flags(export)
        smallest = self._limits.minimum_block
        sizes = smallest, max(smallest, nbd.PREFERRED_BLOCK), self._limits.payload_bytes
        bodies = [
            _INFO_EXPORT.pack(nbd.INFO_EXPORT, export.size, flags),
            _INFO_BLOCK_SIZE.pack(nbd.INFO_BLOCK_SIZE, *sizes),
        ]
        texts = {nbd.INFO_NAME: export.name, nbd.INFO_DESCRIPTION: export.description}
        for kind, text in texts.items():
            if kind in wanted and text:
                bodies.append(kind.to_bytes(2, "big") + text.encode()[: nbd.MAX_STRING])
        return bodies

    def _structured_reply(self, data: bytes) -> None:
        if data:
            raise MalformedOption("STRUCTURED_REPLY takes no data")
        if self._extended:
            text = "EXTENDED_HEADERS includes it"
            self._fail(nbd.OPT_STRUCTURED_REPLY, nbd.REP_ERR_EXT_HEADER_REQD, text)
            return
        self._structured = True
        self._reply(nbd.OPT_STRUCTURED_REPLY, nbd.REP_ACK)

    def _extended_headers(self, data: bytes) -> None:
        if data:
            raise MalformedOption("EXTENDED_HEADERS takes no data")
        self._structured = self._extended = True
        self._reply(nbd.OPT_EXTENDED_HEADERS, nbd.REP_ACK)

    def _list_meta_context(self, data: bytes) -> None:
        option = nbd.OPT_LIST_META_CONTEXT
        name, queries = parse_meta_context(data)
        export = self._exports.get(name)
        if export is None:
            self._fail(option, nbd.REP_ERR_UNKNOWN, f"export {name[:64]!r} is unknown")
            return
        for context in _contexts(export).values():
            namespace = context.partition(":")[0] + ":"
            if not queries or not queries.isdisjoint({namespace, context}):
                self._meta_context(option, 0, context)
        self._reply(option, nbd.REP_ACK)

    def _set_meta_context(self, data: bytes) -> None:
        option = nbd.OPT_SET_META_CONTEXT
        # Whatever comes of it: contexts selected earlier are gone.
        self._contexts_of = None
        if not self._structured:
            raise MalformedOption("SET_META_CONTEXT needs STRUCTURED_REPLY first")
        name, queries = parse_meta_context(data)
        export = self._exports.get(name)
        if export is None:
            self._fail(option, nbd.REP_ERR_UNKNOWN, f"export {name[:64]!r} is unknown")
            return
        chosen = {n: context for n, context in _contexts(export).items() if context in queries}
        self._contexts_of, self._contexts = name, chosen
        for number, context in chosen.items():
            self._meta_context(option, number, context)
        self._reply(option, nbd.REP_ACK)

    # --- replies -----------------------------------------------------------------------------

    def _agree(self, name: str, export: Export, alignment: int = 1) -> None:
        contexts = self._contexts if self._contexts_of == name else {}
        framing = Framing(self._structured, self._extended)
        self.outcome = Agreement(export, framing, contexts, alignment)

    def _transmission_flags(self, export: Export) -> int:
        flags = (
            nbd.TRANSMIT_HAS_FLAGS
            | nbd.TRANSMIT_SEND_FLUSH
            | nbd.TRANSMIT_SEND_FUA
            | nbd.TRANSMIT_CAN_MULTI_CONN
            | nbd.TRANSMIT_SEND_CACHE
        )
        if export.read_only:
            flags |= nbd.TRANSMIT_READ_ONLY
        else:
            flags |= nbd.TRANSMIT_SEND_TRIM | nbd.TRANSMIT_SEND_WRITE_ZEROES
            flags |= nbd.TRANSMIT_SEND_FAST_ZERO
        if self._structured:
            flags |= nbd.TRANSMIT_SEND_DF
        return flags | nbd.TRANSMIT_BLOCK_STATUS_PAYLOAD if self._extended else flags

    def _meta_context(self, option: int, identity: int, name: str) -> None:
        body = _LENGTH.pack(identity) + name.encode()
        self._reply(option, nbd.REP_META_CONTEXT, body)

    def _fail(self, option: int, kind: int, text: str) -> None:
        self._reply(option, kind, text.encode())

    def _reply(self, option: int, kind: int, body: bytes = b"") -> None:
        header = _REPLY.pack(nbd.OPTION_REPLY_MAGIC, option, kind, len(body))
        self._replies.append(header + body)


def _contexts(export: Export) -> dict[int, str]:
    """All metadata contexts of an export, by the numbers that they get when they are selected."""
    return dict(enumerate((nbd.BASE_ALLOCATION, *export.contexts), start=1))
