"""What `stripewell attach` prints works as it is: for QEMU, and for the kernel's own client.

The guest is the machine in which nbd-client runs, so its kernel is the client. There socat stands
for the host's sockets: what connects to the printed ones reaches the daemon's TCP port, over QEMU's
user network and the loopback of the host.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.deployment import Deployment
from bench.processes import wait_until
from tests.guest.harness import Extras, Guest
from tests.guest.initramfs import MissingParts, find_program

MIB = 1 << 20
#: QEMU's name for the host's loopback, and the guest's own address in that network.
HOST, GUEST = "10.0.2.2", "10.0.2.15"
TOOLS = {"nbd-client": "nbd-client", "socat": "socat"}
NETWORK = (
    *("-netdev", "user,id=net,restrict=off,ipv6=off"),
    *("-device", "virtio-net-pci,netdev=net,romfile="),
)


def missing() -> str:
    """What the host lacks of these, or nothing."""
    try:
        for tool, package in TOOLS.items():
            find_program(tool, package)
    except MissingParts as parts:
        return str(parts)
    return ""


pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(200),
    pytest.mark.skipif(bool(missing()), reason=missing()),
]


@pytest.fixture
def site(folder: Path) -> Iterator[Deployment]:
    """A pool with a volume for QEMU and one for nbd-client, on a TCP port of loopback too."""
    with Deployment(folder / "site") as deployment:
        deployment.create_pool(6, "256M", 4, 2)
        for volume in ("qemu", "kernel"):
            deployment.create_volume(volume, "256M")
        deployment.serve(options=("--tcp", "127.0.0.1:0"))
        yield deployment
        assert deployment.query("pool", "check", deployment.pool)["faults"] == []
        deployment.stop()


def boot(site: Deployment, *arguments: str) -> Guest:
    modules = ("virtio_net", "nbd")
    return Guest(site.folder / "guest", extras=Extras(modules, TOOLS, (*NETWORK, *arguments)))


def bring_up(guest: Guest) -> None:
    """The network of the guest."""
    guest.check("ip link set lo up && ip link set eth0 up")
    guest.check(f"ip addr add 127.0.0.1/8 dev lo; ip addr add {GUEST}/24 dev eth0")


def printed(site: Deployment, volume: str) -> list[str]:
    """The lines of `attach` that are no comment, continued ones joined."""
    text = site.run("attach", f"{site.pool}/{volume}").replace("\\\n", "")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def connections(guest: Guest) -> int:
    """TCP connections of the guest to the daemon's host."""
    return int(guest.check(f"netstat -tn | grep -c '{HOST}:.*ESTABLISHED' || true"))


def test_kernel_client(site: Deployment) -> None:
    """ext4 over several connections of nbd.ko: files, fstrim, fsck, and a clean end."""
    with boot(site) as guest:
        bring_up(guest)
        guest.check(f"nbd-client -N kernel {HOST} {site.tcp_port} /dev/nbd0 -C 2")
        assert connections(guest) == 2
        assert guest.check("blockdev --getsize64 /dev/nbd0") == f"{256 * MIB}\n"
        guest.check("mkfs.ext4 -q /dev/nbd0 && mount /dev/nbd0 /mnt", 120)
        script = "dd if=/dev/urandom of=/mnt/$i bs=256k count=8 conv=fsync && sha256sum /mnt/$i"
        jobs = [
            guest.start(f"for i in {names}; do {script} >>/run/sums.{names[0]} || exit 1; done")
            for names in ("1 2 3 4", "5 6 7 8")
        ]
        for job in jobs:
            assert guest.finish(job)[0] == 0
        before = used_bytes(site, "kernel")
        guest.check("rm /mnt/1 /mnt/5 && sync && fstrim /mnt")
        assert before - used_bytes(site, "kernel") > 3 * MIB
        guest.check("umount /mnt && echo 3 >/proc/sys/vm/drop_caches && mount /dev/nbd0 /mnt")
        guest.check("cat /run/sums.* | grep -v '/[15]$' >/run/sums && sha256sum -c /run/sums")
        assert guest.check("wc -l </run/sums") == "6\n"
        guest.check("umount /mnt && fsck.ext4 -fn /dev/nbd0", 120)
        assert guest.troubles() == []
        guest.check("nbd-client -d /dev/nbd0")
        wait_until(lambda: connections(guest) == 0, 10, what="the connections are closed")
        guest.power_off()


def test_kernel_client_does_not_notice_successors(site: Deployment) -> None:
    """It survives no lost connection; two successors take over under its writers."""
    with boot(site) as guest:
        bring_up(guest)
        port = site.tcp_port
        guest.check(f"nbd-client -N kernel {HOST} {port} /dev/nbd0 -C 2")
        guest.check("mkfs.ext4 -q /dev/nbd0 && mount /dev/nbd0 /mnt", 120)
        script = (
            "i=0; while [ ! -e /run/stop ]; do i=$((i+1));"
            " dd if=/dev/urandom of=/mnt/$((i%8)) bs=64k count=8 conv=fsync 2>/dev/null || exit 1;"
            " sha256sum /mnt/$((i%8)) >/run/sum.$((i%8)); echo $i >/run/rounds; done"
        )
        job = guest.start(script)
        for _ in range(2):
            wait_until(
                lambda: int(guest.check("cat /run/rounds 2>/dev/null || echo 0")) > 2,
                60,
                what="load",
            )
            site.take_over(("--tcp", f"127.0.0.1:{port}"))
            guest.check("rm /run/rounds; sleep 1")
        wait_until(
            lambda: int(guest.check("cat /run/rounds 2>/dev/null || echo 0")) > 2, 60, what="load"
        )
        guest.check("touch /run/stop")
        assert guest.finish(job)[0] == 0
        guest.check("umount /mnt && echo 3 >/proc/sys/vm/drop_caches && mount /dev/nbd0 /mnt")
        guest.check("cat /run/sum.* >/run/sums && sha256sum -c /run/sums")
        guest.check("umount /mnt && fsck.ext4 -fn /dev/nbd0", 120)
        assert guest.troubles() == []
        assert connections(guest) == 2
        guest.check("nbd-client -d /dev/nbd0")
        guest.power_off()


def used_bytes(site: Deployment, volume: str) -> int:
    [used] = [v["used_bytes"] for v in site.query("volume", "list") if v["name"] == volume]
    return int(used)


def test_printed_lines_for_nbd_client(site: Deployment) -> None:
    """Every line is run, in order; what one connection wrote the other one reads."""
    load, *connects, disconnect = [
        line for line in printed(site, "kernel") if line.startswith(("modprobe", "nbd-client"))
    ]
    assert len(connects) == 2  # the unix socket, and TCP
    with boot(site) as guest:
        bring_up(guest)
        provide_module(guest)
        guest.check(load)
        stand_in(guest, site)
        guest.check("seq 1000000 1600000 | head -c 4194304 >/run/raw")
        for number, line in enumerate(connects):
            guest.check(line)
            assert connections(guest) == 4
            if number == 0:
                guest.check("dd if=/run/raw of=/dev/nbd0 bs=1M conv=fsync")
            guest.check("dd if=/dev/nbd0 bs=1M count=4 iflag=direct | cmp - /run/raw")
            assert guest.troubles() == []
            guest.check(disconnect)
            wait_until(lambda: connections(guest) == 0, 10, what="the connections are closed")
        guest.power_off()


def provide_module(guest: Guest) -> None:
    """Put nbd.ko where modprobe looks for it, and not in the kernel."""
    guest.check(
        "rmmod nbd && cd /lib/modules && mkdir -p $(uname -r) && cp nbd.ko $(uname -r)"
        " && echo nbd.ko: >$(uname -r)/modules.dep"
    )


def stand_in(guest: Guest, site: Deployment) -> None:
    """Listen in the guest where the daemon does on the host, and pass everything on."""
    target = f"TCP:{HOST}:{site.tcp_port}"
    guest.check(f"mkdir -p {site.socket.parent}")
    guest.start(f"socat UNIX-LISTEN:{site.socket},fork {target}")
    guest.start(f"socat TCP-LISTEN:{site.tcp_port},bind=127.0.0.1,fork {target}")
    guest.check(f"until [ -S {site.socket} ]; do usleep 10000; done")
    guest.check(f"until netstat -ltn | grep -q :{site.tcp_port}; do usleep 10000; done")


def test_printed_arguments_for_qemu(site: Deployment) -> None:
    """The disk is there, trims, and waits for the daemon when that is killed."""
    [line] = [line for line in printed(site, "qemu") if line.startswith("qemu-system-x86_64 ... ")]
    with boot(site, *shlex.split(line)[2:]) as guest:
        guest.check("seq 1000000 1600000 | head -c 4194304 >/run/raw")
        guest.check("dd if=/run/raw of=/dev/vda bs=1M conv=fsync")
        assert used_bytes(site, "qemu") == 4 * MIB
        guest.check(f"/sbin/blkdiscard -o {2 * MIB} -l {2 * MIB} /dev/vda")
        assert used_bytes(site, "qemu") == 2 * MIB
        assert site.kill() == []
        job = guest.start("dd if=/run/raw of=/dev/vda bs=1M conv=fsync")
        site.serve()
        assert guest.finish(job)[0] == 0
        guest.check("dd if=/dev/vda bs=1M count=4 iflag=direct | cmp - /run/raw")
        assert guest.troubles() == []
        guest.power_off()
