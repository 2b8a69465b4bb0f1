"""Addresses and NBD URIs, read back by a URI parser."""

from __future__ import annotations

from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stripewell.endpoints import Address, Endpoints, parse_address
from stripewell.errors import UserError


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:10809", Address("127.0.0.1", 10809)),
        ("localhost:0", Address("localhost", 0)),
        ("[::1]:1234", Address("::1", 1234)),
        ("host.example", Address("host.example", 9)),
        ("[::]", Address("::", 9)),
    ],
)
def test_an_address(text: str, address: Address) -> None:
    assert parse_address(text, 9) == address
    assert parse_address(str(address)) == address


@pytest.mark.parametrize("text", ["", ":", ":80", "h:", "h:x", "h:65536", "h:-1", "a b:1", "::1:8"])
def test_no_address(text: str) -> None:
    with pytest.raises(UserError, match="no address"):
        parse_address(text, 9)


def test_a_port_may_be_required() -> None:
    with pytest.raises(UserError, match="no address"):
        parse_address("localhost")


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1))
def test_a_unix_uri_names_its_socket(path: str) -> None:
    [uri] = Endpoints(f"/{path}").uris("vm1")
    parts = urlsplit(uri)
    assert (parts.scheme, parts.path) == ("nbd+unix", "/vm1")
    assert parse_qs(parts.query, strict_parsing=True) == {"socket": [f"/{path}"]}


def test_a_tcp_uri() -> None:
    _, uri = Endpoints("/s", Address("::1", 10809)).uris("vm 1")
    parts = urlsplit(uri)
    assert (parts.scheme, parts.hostname, parts.port) == ("nbd", "::1", 10809)
    assert unquote(parts.path) == "/vm 1"
