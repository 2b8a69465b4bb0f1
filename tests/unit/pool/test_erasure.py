"""Erasure code: ISA-L makes zfec's bytes, and any k shares give all the others."""

from __future__ import annotations

import random
import sys
import threading
from itertools import combinations

import numpy as np
import pytest
import zfec
from hypothesis import given
from hypothesis import strategies as st

from backends.base import Buffer
from pool import erasure
from pool.erasure import MAX_DATA, MAX_PARITY, Backend, Codec, codec

CODES = [(1, 0), (1, 2), (2, 1), (3, 0), (4, 2), (5, 5), (8, 3), (10, 4), (32, 16), (64, 16)]
SMALL = [(1, 0), (1, 2), (2, 1), (3, 0), (2, 3), (4, 2), (5, 3)]
#: Around the widths of the vector code, and odd.
LENGTHS = [1, 15, 16, 17, 31, 33, 63, 64, 65, 127, 255, 257, 4096, 4099, 8193]

needs_isal = pytest.mark.skipif(
    erasure._load_isal() is None, reason="libisal.so.2 can't be loaded: install libisal2"
)
backends = pytest.mark.parametrize("backend", ["zfec", pytest.param("isal", marks=needs_isal)])
codes = pytest.mark.parametrize(("k", "m"), CODES, ids=lambda value: str(value))


def encode(code: Codec, data: list[bytes]) -> list[bytes]:
    """All shares of a stripe."""
    parity = [memoryview(bytearray(b"\xa5" * len(data[0]))) for _ in range(code.m)]
    code.encode(data, parity)
    return [*data, *(bytes(view) for view in parity)]


def reconstruct(code: Codec, present: dict[int, bytes], wanted: list[int]) -> list[bytes]:
    size = len(next(iter(present.values())))
    out = [memoryview(bytearray(b"\x5a" * size)) for _ in wanted]
    code.reconstruct(present, wanted, out)
    return [bytes(view) for view in out]


def stripe(code: Codec, size: int, seed: int = 0) -> list[bytes]:
    rng = random.Random(seed)
    return encode(code, [rng.randbytes(size) for _ in range(code.k)])


@backends
@codes
@pytest.mark.parametrize("size", LENGTHS)
def test_shares_are_those_of_zfec(backend: Backend, k: int, m: int, size: int) -> None:
    rng = random.Random(size)
    data = [rng.randbytes(size) for _ in range(k)]
    expected = [bytes(share) for share in zfec.Encoder(k, k + m).encode(tuple(data))]
    assert encode(codec(k, m, backend), data) == expected


@backends
@pytest.mark.parametrize(("k", "m"), SMALL)
@pytest.mark.parametrize("size", [1, 61, 512])
def test_every_erasure_pattern_of_small_codes(backend: Backend, k: int, m: int, size: int) -> None:
    code = codec(k, m, backend)
    shares = stripe(code, size)
    for present in combinations(range(k + m), k):
        lost = [number for number in range(k + m) if number not in present]
        held = {number: shares[number] for number in present}
        assert reconstruct(code, held, lost) == [shares[number] for number in lost]


@backends
@codes
def test_random_erasure_patterns(backend: Backend, k: int, m: int) -> None:
    code, rng = codec(k, m, backend), random.Random(k * m)
    shares = stripe(code, 97)
    for _ in range(12):
        present = rng.sample(range(k + m), rng.randint(k, k + m))
        wanted = rng.sample(range(k + m), rng.randint(0, min(k + m, 5)))
        held = {number: shares[number] for number in present}
        assert reconstruct(code, held, wanted) == [shares[number] for number in wanted]


@needs_isal
@given(
    st.integers(1, 20), st.integers(0, 8), st.integers(0, 300), st.randoms(use_true_random=False)
)
def test_each_codec_reads_what_the_other_wrote(
    k: int, m: int, size: int, rng: random.Random
) -> None:
    isal, reference = codec(k, m, "isal"), codec(k, m, "zfec")
    data = [rng.randbytes(size) for _ in range(k)]
    shares = encode(isal, data)
    assert shares == encode(reference, data)
    held = {number: shares[number] for number in rng.sample(range(k + m), k)}
    for reader in (isal, reference):
        assert reconstruct(reader, held, list(range(k + m))) == shares


@backends
def test_a_part_of_each_shard_is_enough_for_that_part(backend: Backend) -> None:
    code = codec(4, 2, backend)
    shares = stripe(code, 3 * 4096)
    block = slice(4096, 8192)
    held = {number: shares[number][block] for number in (1, 2, 4, 5)}
    assert reconstruct(code, held, [3]) == [shares[3][block]]


@backends
def test_all_kinds_of_buffers(backend: Backend) -> None:
    code = codec(4, 2, backend)
    shares = stripe(code, 4096)
    data: list[Buffer] = [
        shares[0],
        bytearray(shares[1]),
        memoryview(b"x" + shares[2])[1:],
        np.frombuffer(shares[3], np.uint32).data,
    ]
    arena = np.zeros(3 * 4096 + 1, np.uint8)
    parity: list[Buffer] = [arena[1:4097].data, bytearray(4096)]
    code.encode(data, parity)
    assert [bytes(share) for share in parity] == shares[4:]
    assert not arena[0]
    assert not arena[4097:].any()


@backends
@pytest.mark.parametrize("size", LENGTHS)
def test_nothing_is_written_beside_the_targets(backend: Backend, size: int) -> None:
    code, guard = codec(4, 2, backend), b"\xa5" * 64
    shares = stripe(code, size)
    arenas = [bytearray(size + 128) for _ in range(2)]
    for arena in arenas:
        arena[:64] = arena[-64:] = guard
    held = {number: shares[number] for number in (1, 2, 3, 5)}
    code.reconstruct(held, [4, 0], [memoryview(arena)[64:-64] for arena in arenas])
    assert arenas == [guard + shares[number] + guard for number in (4, 0)]


@backends
def test_buffers_are_not_referenced_after_a_call(backend: Backend) -> None:
    code = codec(2, 1, backend)
    data, parity = [bytearray(64), bytearray(64)], bytearray(64)
    before = [sys.getrefcount(buffer) for buffer in (*data, parity)]
    code.encode(data, [parity])
    code.reconstruct({0: data[0], 2: parity}, [1], [data[1]])
    with pytest.raises(ValueError, match="one length"):
        code.encode([data[0], bytes(3)], [parity])
    assert [sys.getrefcount(buffer) for buffer in (*data, parity)] == before
    for buffer in (*data, parity):
        buffer.append(0)  # BufferError while anything holds an export


@backends
def test_threads_share_a_codec(backend: Backend) -> None:
    code, errors = codec(8, 3, backend), []
    shares = stripe(code, 20_000)

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(20):
            present = rng.sample(range(11), 8)
            lost = [number for number in range(11) if number not in present]
            held = {number: shares[number] for number in present}
            if reconstruct(code, held, lost) != [shares[number] for number in lost]:
                errors.append(present)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


@backends
def test_empty_shards_and_no_parity_are_legal(backend: Backend) -> None:
    assert stripe(codec(4, 2, backend), 0) == [b""] * 6
    assert reconstruct(codec(4, 2, backend), dict.fromkeys(range(4), b""), [5]) == [b""]
    assert len(stripe(codec(3, 0, backend), 10)) == 3


@backends
@pytest.mark.parametrize(
    ("data", "parity", "message"),
    [
        ([b"ab"], [2], "can't have 1 data and 1 parity"),
        ([b"ab", b"cd"], [], "can't have 2 data and 0 parity"),
        ([b"ab", b"cde"], [2], r"one length, not \[2, 3\]"),
        ([b"ab", b"cd"], [3], r"one length, not \[2, 3\]"),
        ([b"ab", memoryview(b"c-d-")[::2]], [2], "contiguous"),
        ([b"ab", "cd"], [2], "bytes-like"),
    ],
)
def test_misuse_of_encode(
    backend: Backend, data: list[Buffer], parity: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        codec(2, 1, backend).encode(data, [bytearray(size) for size in parity])


@backends
def test_targets_must_be_writable(backend: Backend) -> None:
    with pytest.raises(ValueError, match="writable"):
        codec(2, 1, backend).encode([b"ab", b"cd"], [memoryview(b"..")])


@backends
@pytest.mark.parametrize(
    ("present", "wanted", "targets", "message"),
    [
        ({0: b"ab"}, [1], 1, "2 shares needed to reconstruct, 1 present"),
        ({0: b"ab", 1: b"cd"}, [2], 2, "1 shares wanted, but 2 buffers"),
        ({0: b"ab", 3: b"cd"}, [1], 1, r"are 0\.\.2"),
        ({-1: b"ab", 1: b"cd"}, [0], 1, r"are 0\.\.2"),
        ({0: b"ab", 2: b"cd"}, [3], 1, r"are 0\.\.2"),
        ({0: b"ab", 2: b"cd"}, [-1], 1, r"are 0\.\.2"),
        ({0: b"ab", 2: b"cde"}, [1], 1, "one length"),
    ],
)
def test_misuse_of_reconstruct(
    backend: Backend, present: dict[int, bytes], wanted: list[int], targets: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        codec(2, 1, backend).reconstruct(present, wanted, [bytearray(2) for _ in range(targets)])


@pytest.mark.parametrize(
    ("k", "m"), [(0, 2), (-1, 0), (MAX_DATA + 1, 0), (4, -1), (4, MAX_PARITY + 1)]
)
def test_limits_are_named(k: int, m: int) -> None:
    with pytest.raises(ValueError, match=r"choose 1\.\.64 data and 0\.\.16 parity"):
        codec(k, m)


def test_codecs_are_shared_and_chosen_by_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert codec(7, 2) is codec(7, 2)
    assert codec(7, 2, "zfec").name == "zfec"
    monkeypatch.setattr(erasure, "_load_isal", lambda: None)
    # Another test may have made the very codec that cannot be had from here on.
    erasure._codec.cache_clear()
    assert codec(7, 2).name == "zfec"
    with pytest.raises(ValueError, match="install libisal2"):
        codec(7, 6, "isal")
    with pytest.raises(ValueError, match="unknown erasure codec"):
        codec(7, 2, "raid6")  # type: ignore[arg-type]


@needs_isal
def test_isal_is_preferred() -> None:
    assert codec(6, 2).name == "isal"
