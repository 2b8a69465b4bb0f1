"""Sizes: powers of 1024, exact, one clear error for everything else."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stripewell.errors import UserError
from stripewell.sizes import MAX_SIZE, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("4096", 4096),
        ("20G", 20 << 30),
        ("20g", 20 << 30),
        ("20GiB", 20 << 30),
        ("1.5T", 3 << 39),
        ("0.5K", 512),
        (" 64M ", 64 << 20),
        (str(MAX_SIZE), MAX_SIZE),
    ],
)
def test_a_size(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "G",
        "0",
        "0G",
        "-1",
        "-5G",
        "20X",
        "20 G",
        "1e9",
        "0x10",
        "NaN",
        "inf",
        "1,5G",
        "..",
        "٣G",
    ],
)
def test_no_size(text: str) -> None:
    with pytest.raises(UserError, match="size"):
        parse_size(text)


@pytest.mark.parametrize(
    "text", ["8E", "9223372036854775808", "9" * 20, "9" * 10_000, "1" * 20 + "E"]
)
def test_too_large_a_size(text: str) -> None:
    with pytest.raises(UserError) as raised:
        parse_size(text)
    assert len(str(raised.value)) < 200


def test_a_part_of_a_byte_is_no_size() -> None:
    with pytest.raises(UserError, match="whole number of bytes"):
        parse_size("0.3K")


def complaint(text: str) -> str:
    try:
        assert 0 < parse_size(text) <= MAX_SIZE
    except UserError as error:
        return str(error)
    return ""


@given(st.text(max_size=40))
def test_any_text_is_a_size_or_one_line(text: str) -> None:
    assert len(complaint(text).splitlines()) <= 1


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (20 << 30, "20 GiB")],
)
def test_format(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(0, 8), st.integers(1, 1023))
def test_whole_units_survive_formatting(power: int, count: int) -> None:
    size = count << 10 * min(power, 5)
    assert parse_size(format_size(size).replace(" ", "")) == size
