"""The ways in which QEMU shows a disk to a guest for which the cloud kernel has a driver.

There is none for AHCI in it; IDE is the PIIX4's. Called by `harness.Disk` and the tests.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bus:
    """A disk's device, and the controller it needs if it is none itself."""

    name: str
    device: str
    controller: str = ""
    #: What the guest's kernel loads for it.
    modules: tuple[str, ...] = ()
    #: Where the kernel shows the disk, below its PCI device.
    path: str = ""

    def arguments(self, drive: str, policy: str = "") -> list[str]:
        """QEMU's options for a disk on a controller of its own."""
        bus = f"{drive}-bus"
        controller = ["-device", f"{self.controller},id={bus}"] if self.controller else []
        place = f",bus={bus}.0" if self.controller else ""
        return [*controller, "-device", f"{self.device},drive={drive}{place}{policy}"]

    @property
    def find(self) -> str:
        """The guest's command that prints the name of its only disk on such a bus."""
        return f"basename /sys/devices/pci0000:00/*/{self.path}"


VIRTIO_BLK = Bus("virtio-blk", "virtio-blk-pci", path="virtio*/block/*")
VIRTIO_SCSI = Bus(
    "virtio-scsi",
    "scsi-hd",
    "virtio-scsi-pci",
    ("virtio_scsi", "sd_mod"),
    "virtio*/host*/target*/*/block/*",
)
IDE = Bus("ide", "ide-hd", "piix4-ide", ("ata_piix", "sd_mod"), "ata*/host*/target*/*/block/*")
NVME = Bus("nvme", "nvme,serial=stripewell", path="nvme/*/nvme*n*")

BUSES = (VIRTIO_BLK, VIRTIO_SCSI, IDE, NVME)
