"""Linux's virtio-mem driver on both transports: memory comes and goes while the guest runs."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import pytest

from guests.initramfs import VIRTIO_MODULES, build, kernel_tree
from tests.conftest import count_boot
from tests.linux import BOOT_TIMEOUT
from tests.memory_cost import resident
from vmm import Machine
from vmm.devices.virtio.virtio_mem import VirtioMem

MIB = 1 << 20

#: A line on the console lets the guest go on.
SCRIPT = """\
total() { echo "$1=$(awk '/MemTotal/{print $2}' /proc/meminfo)"; }
total before
echo "vmm-guest: up"
read line
total plugged
mount -t tmpfs -o size=400m tmp /mnt
dd if=/dev/zero of=/mnt/file bs=1M count=300 2>/dev/null && echo "filled=ok"
read line
rm /mnt/file
echo "vmm-guest: freed"
read line
total unplugged
poweroff -f
"""


def until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + BOOT_TIMEOUT
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def kib(vm: Machine, name: str) -> int:
    found = vm.console.expect(re.compile(rf"{name}=(\d+)\s"), timeout=BOOT_TIMEOUT)
    return int(found.group(1))


@pytest.mark.parametrize(("transport", "packed"), [("pci", False), ("mmio", False), ("mmio", True)])
def test_memory_is_plugged_and_unplugged(kernel: str, transport: str, packed: bool) -> None:
    archive = build(SCRIPT, kernel_tree(), modules=(*VIRTIO_MODULES, "virtio_mem"))
    with Machine(
        kernel=kernel,
        initrds=[archive],
        append="quiet",
        memory="256M",
        virtio_mem="1G",
        transport=transport,
        packed=packed,
        timeout=BOOT_TIMEOUT,
    ) as vm:
        device = next(d for d in vm.devices if isinstance(d, VirtioMem))
        before = kib(vm, "before")
        vm.console.expect("vmm-guest: up", timeout=BOOT_TIMEOUT)
        count_boot()
        device.set_requested(512 * MIB)
        until(lambda: device.plugged == 512 * MIB, "Linux plugged 512 MiB")
        vm.console.send("\n")
        assert kib(vm, "plugged") > before + 500 * 1024
        vm.console.expect("filled=ok", timeout=BOOT_TIMEOUT)
        full = resident(vm.memory.added)
        assert full > 128 * MIB
        vm.console.send("\n")
        vm.console.expect("vmm-guest: freed", timeout=BOOT_TIMEOUT)
        device.set_requested(0)
        until(lambda: device.plugged == 0, "Linux unplugged all")
        assert resident(vm.memory.added) == 0
        vm.console.send("\n")
        assert kib(vm, "unplugged") == before
        assert vm.wait().reason == "poweroff"
        assert device.faults() == []
