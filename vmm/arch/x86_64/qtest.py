"""The machines of QEMU's that qtest clients of an x86-64 know. See vmm.arch.base.Qtest."""

from __future__ import annotations

OWN: str = "x86"
DEFAULT: str = "pc"
MACHINES = {
    OWN: "vmm's own machine, with PCI: 0xcf8 and ECAM at 0xe0000000",
    "pc": "PCI without ECAM; base addresses from 0xc0000000 to 0xfeb00000",
    "q35": "PCI with ECAM at 0xb0000000; base addresses as pc",
    "microvm": "virtio-mmio at vmm's addresses, from 0xfeb00000",
    "virt": "the same",
    "none": "no devices at all",
}
MACHINE_PREFIXES: tuple[tuple[str, str], ...] = (
    ("pc-q35", "q35"), ("pc-i440fx", "pc"), ("virt-", "virt"), ("vmm", OWN),
)  # fmt: skip
MMIO_MACHINES: tuple[str, ...] = ("microvm", "virt")
#: From the end of RAM to the first fixed device.
WINDOW: tuple[int, int] = (0xC000_0000, 0x3EB0_0000)
#: Where q35's firmware puts configuration space; RAM has to end below.
ECAM = {"q35": 0xB000_0000}
FIRST_SLOT = {"pc": 2}
CONTROLLERS: tuple[str, ...] = ("ioapic", "ioapic[0]", "gsi", "i8259")
PINS: int = 24
