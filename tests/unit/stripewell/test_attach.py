"""The lines of `attach`, parsed back as their readers would."""

from __future__ import annotations

import json
import re
import shlex
import string
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stripewell import output
from stripewell.attach import describe, nbd_client_commands, node_name, qemu_arguments
from stripewell.endpoints import Address, Endpoints

ODD_SOCKET = '/srv/a b/it\'s <&"x">.sock'
NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)


@pytest.mark.parametrize("path", ["/run/tank.sock", ODD_SOCKET])
def test_qemu_gets_two_nodes_and_a_disk(path: str) -> None:
    flags = qemu_arguments("vm1", Endpoints(path))
    assert flags[::2] == ["-blockdev", "-blockdev", "-device"]
    client, raw = json.loads(flags[1]), json.loads(flags[3])
    assert client["server"] == {"type": "unix", "path": path}
    assert client["export"] == "vm1"
    assert client["reconnect-delay"] == 60
    assert raw["file"] == client["node-name"]
    assert client["discard"] == raw["discard"] == "unmap"
    device = dict(part.partition("=")[::2] for part in flags[5].split(","))
    assert device["drive"] == raw["node-name"]
    assert device["werror"] == device["rerror"] == "stop"


@given(NAMES)
def test_node_names_are_well_formed_for_qemu(volume: str) -> None:
    name = node_name(volume) + "-nbd"
    assert len(name) <= 31
    assert re.fullmatch(r"[A-Za-z][A-Za-z0-9._-]*", name)


def test_long_names_give_distinct_nodes() -> None:
    volumes = ["x" * 63 + letter for letter in string.ascii_letters]
    assert len({node_name(volume) for volume in volumes}) == len(volumes)


@pytest.mark.parametrize("path", ["/run/tank.sock", ODD_SOCKET])
def test_libvirt_xml_is_well_formed(path: str) -> None:
    disk = ElementTree.fromstring(describe("tank", "vm1", Endpoints(path))["libvirt"])
    assert disk.attrib == {"type": "network", "device": "disk"}
    assert disk.find("source").attrib == {"protocol": "nbd", "name": "vm1"}
    assert disk.find("source/host").attrib == {"transport": "unix", "socket": path}
    assert disk.find("source/reconnect").attrib == {"delay": "60"}
    assert disk.find("driver").get("discard") == "unmap"
    assert disk.find("driver").get("error_policy") == "stop"


def test_nbd_client_lines() -> None:
    unix, tcp, detach = nbd_client_commands("vm1", Endpoints("/s", Address("h", 10810)))
    assert unix == ["nbd-client", "-unix", "/s", "/dev/nbd0", "-N", "vm1", "-C", "4"]
    assert tcp == ["nbd-client", "h", "10810", "/dev/nbd0", "-N", "vm1", "-C", "4"]
    assert detach == ["nbd-client", "-d", "/dev/nbd0"]


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_listening_everywhere_is_no_place_to_connect_to(host: str) -> None:
    lines = describe("tank", "vm1", Endpoints("/s", Address(host, 10809)))
    assert host not in lines["uris"][1].split("/")[2].rpartition(":")[0]


def test_the_text_can_be_pasted_into_a_shell() -> None:
    lines = describe("tank", "vm1", Endpoints(ODD_SOCKET))
    text = output.attachment(lines)
    start = text.index("qemu-system")
    command = text[start : text.index("\n\n", start)].replace("\\\n", " ")
    assert shlex.split(command)[2:] == lines["qemu"]
    assert lines["libvirt"] in text
    assert shlex.join(lines["nbd_client"][0]) in text.splitlines()
