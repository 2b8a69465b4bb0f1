"""Erasure code of a stripe: systematic Reed-Solomon over GF(2^8), in zfec's format.

A stripe of `k` data and `m` parity shards has share numbers `0..k+m-1`, data first; any `k` of them
give all the others. The bytes are those of zfec for `k` of `k + m` shares, whichever codec makes
them: ISA-L is given zfec's generator matrix (design, section 5) and is only faster. zfec is always
there and is the reference.

Invariants: codecs hold no state that a call changes but a bounded cache, so threads may share them;
no buffer is copied on its way into the code (zfec returns fresh bytes, which are copied out), and
none is referenced after the call.

Called by the destager and movers (whole shards), by degraded reads (single blocks) and by scrub.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Literal, Protocol

import zfec

from backends.base import Buffer

#: How the bytes are made, never which bytes.
Backend = Literal["isal", "zfec"]

#: Most data shards of a stripe, and most parity shards.
MAX_DATA = 64
MAX_PARITY = 16

#: Erasure patterns whose matrices a codec keeps: more than any two lost devices of 8+3 produce.
_PATTERNS = 256

#: ISA-L expands each coefficient to two 16-byte shuffle tables.
_TABLE_BYTES = 32


class Codec(Protocol):
    """Encodes and reconstructs stripes of `k` data and `m` parity shards."""

    @property
    def k(self) -> int:
        """Data shards."""

    @property
    def m(self) -> int:
        """Parity shards."""

    @property
    def name(self) -> str:
        """The `Backend` that does the work."""

    def encode(self, data: Sequence[Buffer], parity: Sequence[Buffer]) -> None:
        """Fill `m` writable parity buffers from `k` data shards, all of one length.

        Raises `ValueError` for another number of buffers, unequal lengths, or a buffer that is not
        contiguous or (parity) not writable.
        """

    def reconstruct(
        self, present: Mapping[int, Buffer], wanted: Sequence[int], out: Sequence[Buffer]
    ) -> None:
        """Fill `out[i]` with share `wanted[i]`, from any `k` shares of `present`.

        Shares may be parts of shards, as long as they are the same part. Of more than `k`, the
        lowest numbers are used. `out` must not overlap `present`. Raises `ValueError` as `encode`
        does, for fewer than `k` shares and for numbers outside `0..k+m-1`.
        """


def codec(k: int, m: int, backend: Backend | None = None) -> Codec:
    """Return the shared codec for `k` data and `m` parity shards; by default the fastest there is.

    Raises `ValueError` unless 1 <= k <= 64 and 0 <= m <= 16, or when `backend` can't be had.
    """
    if not (1 <= k <= MAX_DATA and 0 <= m <= MAX_PARITY):
        limits = f"1..{MAX_DATA} data and 0..{MAX_PARITY} parity"
        raise ValueError(f"no code with {k} data and {m} parity shards: choose {limits}")
    if backend is None:
        backend = "zfec" if _load_isal() is None else "isal"
    return _codec(k, m, backend)


@cache
def _codec(k: int, m: int, backend: str) -> Codec:
    if backend == "zfec":
        return ZfecCodec(k, m)
    if backend != "isal":
        raise ValueError(f"unknown erasure codec {backend!r}: use 'isal' or 'zfec'")
    library = _load_isal()
    if library is None:
        raise ValueError("libisal.so.2 can't be loaded: install libisal2, or use 'zfec'")
    return IsalCodec(k, m, library)


class ZfecCodec:
    """The reference: zfec does all the work."""

    name = "zfec"

    def __init__(self, k: int, m: int) -> None:
        self.k = k
        self.m = m
        self._encoder = zfec.Encoder(k, k + m)
        self._decoder = zfec.Decoder(k, k + m)

    def encode(self, data: Sequence[Buffer], parity: Sequence[Buffer]) -> None:
        """See `Codec.encode`."""
        _check_encode(self, data, parity)
        shares = tuple(_flat(shard) for shard in data)
        self._produce(shares, range(self.k, self.k + self.m), parity)

    def reconstruct(
        self, present: Mapping[int, Buffer], wanted: Sequence[int], out: Sequence[Buffer]
    ) -> None:
        """See `Codec.reconstruct`."""
        chosen = _choose(self, present, wanted, out)
        shares = tuple(_flat(present[number]) for number in chosen)
        _one_length(share.nbytes for share in shares)
        self._produce(tuple(self._decoder.decode(shares, chosen)), wanted, out)

    def _produce(
        self, data: tuple[Buffer, ...], numbers: Sequence[int], out: Sequence[Buffer]
    ) -> None:
        targets = [_flat(target) for target in out]
        if not _one_length(len(view) for view in (*data, *targets)) or not targets:
            return
        if any(target.readonly for target in targets):
            raise ValueError("a buffer to be filled is not writable")
        shares = self._encoder.encode(data, tuple(numbers))
        for target, share in zip(targets, shares, strict=True):
            target[:] = share


class IsalCodec:
    """zfec's matrix, multiplied by ISA-L's vector code outside of the interpreter lock."""

    name = "isal"

    def __init__(self, k: int, m: int, library: ctypes.CDLL) -> None:
        self.k = k
        self.m = m
        self._init_tables = library.ec_init_tables
        self._encode_data = library.ec_encode_data
        self._invert = library.gf_invert_matrix
        self._parity_tables = self._expand(_generator(k, m)[k * k :])
        self._decode_tables = lru_cache(_PATTERNS)(self._build_decode_tables)

    def encode(self, data: Sequence[Buffer], parity: Sequence[Buffer]) -> None:
        """See `Codec.encode`."""
        _check_encode(self, data, parity)
        self._multiply(self._parity_tables, data, parity)

    def reconstruct(
        self, present: Mapping[int, Buffer], wanted: Sequence[int], out: Sequence[Buffer]
    ) -> None:
        """See `Codec.reconstruct`."""
        chosen = _choose(self, present, wanted, out)
        tables = self._decode_tables(chosen, tuple(wanted))
        self._multiply(tables, [present[number] for number in chosen], out)

    def _multiply(
        self, tables: ctypes.Array[ctypes.c_char], sources: Sequence[Buffer], out: Sequence[Buffer]
    ) -> None:
        """Fill `out` with the products of the matrix behind `tables` and the `k` sources."""
        buffers = len(sources) + len(out)
        views = (_PyBuffer * buffers)()
        try:
            _export(views, sources, out)
            length = _one_length([view.len for view in views])
            if length and out:
                pointers = (ctypes.c_void_p * buffers)(*[view.buf for view in views])
                first = ctypes.addressof(pointers)
                targets = first + self.k * ctypes.sizeof(ctypes.c_void_p)
                self._encode_data(length, self.k, len(out), tables, first, targets)
        finally:
            _release(views)

    def _build_decode_tables(
        self, chosen: tuple[int, ...], wanted: tuple[int, ...]
    ) -> ctypes.Array[ctypes.c_char]:
        """Tables that give the shares `wanted` from the `k` shares `chosen`.

        chosen = G[chosen] x data, hence wanted = G[wanted] x G[chosen]^-1 x chosen. The product of
        the two matrices is the encoding of the inverse's rows by the coefficients G[wanted].
        """
        matrix = _generator(self.k, self.m)
        rows = [matrix[i : i + self.k] for i in range(0, len(matrix), self.k)]
        square = ctypes.create_string_buffer(b"".join(rows[i] for i in chosen), self.k**2)
        inverse = bytearray(self.k**2)
        if self._invert(square, (ctypes.c_char * len(inverse)).from_buffer(inverse), self.k):
            raise ArithmeticError(f"shares {chosen} of {self.k}+{self.m} don't determine the data")
        shares = memoryview(inverse)
        product = memoryview(bytearray(len(wanted) * self.k))
        self._multiply(
            self._expand(b"".join(rows[i] for i in wanted)),
            [shares[i : i + self.k] for i in range(0, len(shares), self.k)],
            [product[i : i + self.k] for i in range(0, len(product), self.k)],
        )
        return self._expand(bytes(product))

    def _expand(self, matrix: bytes) -> ctypes.Array[ctypes.c_char]:
        tables = ctypes.create_string_buffer(max(1, len(matrix) * _TABLE_BYTES))
        self._init_tables(self.k, len(matrix) // self.k, matrix, tables)
        return tables


@cache
def _generator(k: int, m: int) -> bytes:
    """zfec's generator matrix, k+m rows of k coefficients: what it makes of the unit vectors."""
    unit = tuple(bytes(i == j for j in range(k)) for i in range(k))
    return b"".join(zfec.Encoder(k, k + m).encode(unit, tuple(range(k + m))))


@cache
def _load_isal() -> ctypes.CDLL | None:
    """Load ISA-L and declare what is used of it; None where it is not installed."""
    try:
        library = ctypes.CDLL("libisal.so.2")
    except OSError:
        return None
    number, pointer = ctypes.c_int, ctypes.c_void_p
    library.ec_init_tables.argtypes = [number, number, pointer, pointer]
    library.ec_init_tables.restype = None
    library.ec_encode_data.argtypes = [number, number, number, pointer, pointer, pointer]
    library.ec_encode_data.restype = None
    library.gf_invert_matrix.argtypes = [pointer, pointer, number]
    library.gf_invert_matrix.restype = number
    return library


class _PyBuffer(ctypes.Structure):
    """CPython's `Py_buffer`. A zeroed one may be released: that does nothing."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_void_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_READ = 0  # PyBUF_SIMPLE: contiguous bytes
_WRITE = 1  # PyBUF_WRITABLE

# Private function objects: those of `ctypes.pythonapi` are shared with every other library.
_python = ctypes.PyDLL(None)
_get_buffer = _python.PyObject_GetBuffer
_get_buffer.argtypes = [ctypes.py_object, ctypes.c_void_p, ctypes.c_int]
_release_buffer = _python.PyBuffer_Release
_release_buffer.argtypes = [ctypes.c_void_p]
_release_buffer.restype = None


def _export(
    views: ctypes.Array[_PyBuffer], sources: Sequence[Buffer], targets: Sequence[Buffer]
) -> None:
    """Hold the buffers in place. A third of the time that numpy takes to tell their addresses."""
    address, step = ctypes.addressof(views), ctypes.sizeof(_PyBuffer)
    try:
        for buffer in sources:
            _get_buffer(buffer, address, _READ)
            address += step
        for buffer in targets:
            _get_buffer(buffer, address, _WRITE)
            address += step
    except (BufferError, TypeError) as error:
        raise ValueError(f"a share's buffer can't be used: {error}") from error


def _release(views: ctypes.Array[_PyBuffer]) -> None:
    first, step = ctypes.addressof(views), ctypes.sizeof(_PyBuffer)
    for address in range(first, first + len(views) * step, step):
        _release_buffer(address)


def _flat(buffer: Buffer) -> memoryview:
    """The bytes of any contiguous buffer, as zfec and slice assignment want them."""
    try:
        view = memoryview(buffer)
    except TypeError as error:
        raise ValueError(f"a share's buffer can't be used: {error}") from error
    if not view.c_contiguous:
        raise ValueError("a share's buffer can't be used: it is not contiguous")
    return view.cast("B") if view.nbytes else memoryview(b"")


def _one_length(lengths: Iterable[int]) -> int:
    different = set(lengths)
    if len(different) != 1:
        raise ValueError(f"shares must be of one length, not {sorted(different)} bytes")
    return different.pop()


def _check_encode(code: Codec, data: Sequence[Buffer], parity: Sequence[Buffer]) -> None:
    if len(data) != code.k or len(parity) != code.m:
        given = f"{len(data)} data and {len(parity)} parity"
        raise ValueError(f"a {code.k}+{code.m} stripe can't have {given} shards")


def _choose(
    code: Codec, present: Mapping[int, Buffer], wanted: Sequence[int], out: Sequence[Buffer]
) -> tuple[int, ...]:
    """The `k` shares to compute from: data first, they cost least."""
    if len(present) < code.k:
        raise ValueError(f"{code.k} shares needed to reconstruct, {len(present)} present")
    if len(wanted) != len(out):
        raise ValueError(f"{len(wanted)} shares wanted, but {len(out)} buffers to fill")
    numbers = sorted(present)
    last = code.k + code.m - 1
    if numbers[0] < 0 or numbers[-1] > last or any(not 0 <= number <= last for number in wanted):
        raise ValueError(f"share numbers of {code.k}+{code.m} are 0..{last}")
    return tuple(numbers[: code.k])
