"""Names: the rule of pools and volumes leaves no room for path tricks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stripewell.errors import UserError
from stripewell.names import check_name, split_volume


@pytest.mark.parametrize("name", ["a", "0", "vm1", "A.b_c-d", "x" * 64, "a..b"])
def test_a_name(name: str) -> None:
    assert check_name("volume", name) == name


BAD = [
    "",
    ".",
    "..",
    ".hidden",
    "-x",
    "_x",
    "x" * 65,
    "a b",
    "a\n",
    "a\0b",
    "ä",
    "a/b",
    "a\\b",
    "$(x)",
]


@pytest.mark.parametrize("name", BAD)
def test_no_name(name: str) -> None:
    with pytest.raises(UserError, match="no volume name"):
        check_name("volume", name)


def test_a_path() -> None:
    assert split_volume("tank/vm1") == ("tank", "vm1")


@pytest.mark.parametrize(
    "path",
    [
        "",
        "tank",
        "/",
        "tank/",
        "/vm1",
        "tank/../x",
        "../tank/vm",
        "tank//x",
        "tank/a/b",
        "/etc/passwd",
    ],
)
def test_no_path(path: str) -> None:
    with pytest.raises(UserError):
        split_volume(path)


def complaint(text: str) -> str:
    try:
        check_name("pool", text)
    except UserError as error:
        return str(error)
    assert "/" not in text
    assert text not in {".", ".."}
    return ""


@given(st.text(max_size=100))
def test_any_text_is_a_name_or_one_short_line(text: str) -> None:
    assert len(complaint(text).splitlines()) <= 1
    assert len(complaint(text)) < 600
