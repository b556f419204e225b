"""Devices written in Python, under a real kernel: the examples."""

from __future__ import annotations

from pathlib import Path

import pytest

import vmm
from guests.initramfs import build, kernel_tree
from tests.boot.conftest import UP, Boot

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "devices"


class Panel(vmm.MmioDevice):
    """pvpanic with a register in memory: reading it tells what can be reported."""

    SIZE, IRQ, HID = 2, False, "QEMU0001"
    reads = 0

    def read(self, offset: int, size: int) -> int:
        self.reads += 1
        return 3


@pytest.mark.parametrize("transport", ["pci", "mmio"])
def test_the_stock_console_driver_talks_to_python(boot: Boot, transport: str) -> None:
    script = """\
for i in 1 2 3 4 5 6 7 8; do [ -c /dev/hvc0 ] && break; sleep 0.2; done
exec 3<>/dev/hvc0
stty raw -echo <&3
printf 'hello from a guest\\n' >&3
read heard <&3
echo "heard=$heard"
"""
    booted = boot(script, devices=f"{EXAMPLES}/shout.py:Shout", transport=transport).ok()
    assert booted.value("heard") == "HELLO FROM A GUEST"
    assert not any(d.unclaimed() for d in booted.machine.devices if d.name == "shout0")


def test_the_kernel_finds_registers_by_acpi(boot: Boot) -> None:
    """A platform device with its memory; the registers answer."""
    script = """\
echo "path=$(cat /sys/bus/acpi/devices/VMMX0001:00/path)"
where=$(grep VMMX0001:00 /proc/iomem)
echo "where=$where"
base=0x$(echo $where | cut -d- -f1)
echo "before=$(devmem $base 32)"
devmem $base 32 1
n=0x00000000
while [ $n = 0x00000000 ]; do n=$(devmem $base 32); done
echo "after=$n"
"""
    booted = boot(script, devices=f"{EXAMPLES}/alarm.py:Alarm").ok()
    assert booted.value("path") == r"\_SB_.U000"
    assert booted.value("where").startswith("f0000000-f0000007")
    assert (booted.value("before"), booted.value("after")) == ("0x00000000", "0x00000001")


def test_a_stock_driver_binds_to_registers_in_python(boot: Boot) -> None:
    script = """\
cd /sys/bus/platform/drivers/pvpanic-mmio/QEMU0001:00
echo "capability=$(cat capability)"
"""
    text = f'echo "{UP}"\n{script}\npoweroff -f'
    archive = build(text, kernel_tree(), modules=("pvpanic_mmio",))
    panel = Panel()
    booted = boot(devices=panel, pvpanic=False, initrds=[str(archive)]).ok()
    assert booted.value("capability") == "3"
    assert panel.reads > 0
