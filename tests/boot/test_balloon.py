"""Linux's balloon driver on both transports: memory goes back to the host, and comes again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guests.initramfs import VIRTIO_MODULES, build, kernel_tree
from tests.conftest import count_boot
from tests.linux import BOOT_TIMEOUT
from tests.memory_cost import resident
from vmm import Machine
from vmm.devices.virtio.balloon import Balloon

MIB = 1 << 20

transports = pytest.mark.parametrize("transport", ["pci", "mmio"])


def balloon_of(vm: Machine) -> Balloon:
    return next(d for d in vm.devices if isinstance(d, Balloon))


def until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + BOOT_TIMEOUT
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


@pytest.fixture
def start(kernel: str) -> Iterator[Callable[..., Machine]]:
    machines = []

    def run(script: str, transport: str, **options: object) -> Machine:
        modules = (*VIRTIO_MODULES, "virtio_balloon")
        archive = build(script + "\npoweroff -f", kernel_tree(), modules=modules)
        vm = Machine(
            kernel=kernel,
            initrds=[archive],
            append="quiet",
            memory="256M",
            transport=transport,
            timeout=BOOT_TIMEOUT,
            **options,  # type: ignore[arg-type]
        )
        machines.append(vm)
        vm.start()
        vm.console.expect("vmm-guest: up", timeout=BOOT_TIMEOUT)
        count_boot()
        return vm

    yield run
    for vm in machines:
        vm.close()


@pytest.mark.parametrize(("transport", "packed"), [("pci", False), ("mmio", False), ("pci", True)])
def test_inflate_and_deflate(start: Callable[..., Machine], transport: str, packed: bool) -> None:
    """The guest fills memory and frees it; the balloon takes it, so the host has it."""
    script = """\
mount -t tmpfs -o size=160m tmp /mnt
dd if=/dev/zero of=/mnt/file bs=1M count=128 2>/dev/null
rm /mnt/file
echo "vmm-guest: up"
read line
echo "total=$(awk '/MemFree/{print $2}' /proc/meminfo)"
"""
    vm = start(script, transport, balloon="0,reporting=off,stats=1", packed=packed)
    balloon = balloon_of(vm)
    full = resident(vm.memory.ranges)
    free = balloon.stats(timeout=60)["free_memory"]
    balloon.set_target(128 * MIB)
    until(lambda: balloon.actual == 128 * MIB, "the balloon took 128 MiB")
    assert balloon.counts()["inflated"] >= 128 * MIB
    assert resident(vm.memory.ranges) < full - 96 * MIB
    assert balloon.stats(timeout=60)["free_memory"] < free - 96 * MIB
    balloon.set_target(0)
    until(lambda: balloon.actual == 0, "the balloon gave all back")
    assert balloon.stats(timeout=60)["free_memory"] > free - 32 * MIB
    assert balloon.counts()["ignored"] == balloon.counts()["failed"] == 0
    vm.console.send(b"\n")
    assert vm.wait().reason == "poweroff"
    assert balloon.faults() == []


@transports
def test_free_pages_are_reported(start: Callable[..., Machine], transport: str) -> None:
    script = """\
mount -t tmpfs -o size=160m tmp /mnt
dd if=/dev/zero of=/mnt/file bs=1M count=128 2>/dev/null
echo "vmm-guest: up"
read line
rm /mnt/file
echo "vmm-guest: freed"
read line
dd if=/dev/zero of=/mnt/file bs=1M count=128 2>/dev/null && echo "again=ok"
"""
    vm = start(script, transport, balloon="0")
    balloon = balloon_of(vm)
    full = resident(vm.memory.ranges)
    vm.console.send(b"\n")
    vm.console.expect("freed", timeout=BOOT_TIMEOUT)
    until(lambda: resident(vm.memory.ranges) < full - 96 * MIB, "the host has what was freed")
    assert balloon.counts()["reported"] >= 96 * MIB
    vm.console.send(b"\n")
    vm.console.expect("again=ok", timeout=BOOT_TIMEOUT)
    assert vm.wait().reason == "poweroff"
    assert balloon.faults() == []


def test_hints(start: Callable[..., Machine]) -> None:
    vm = start('echo "vmm-guest: up"; read line', "pci", balloon="64M,reporting=off")
    balloon = balloon_of(vm)
    until(lambda: balloon.actual == 64 * MIB, "the balloon took what it shall from the start")
    balloon.start_hints()
    hints = balloon.hints(timeout=60)
    balloon.end_hints()
    assert sum(size for _, size in hints) > 16 * MIB
    assert all(vm.memory.contains(gpa, size) for gpa, size in hints)
    vm.console.send(b"\n")
    assert vm.wait().reason == "poweroff"


@pytest.fixture
def huge_pages() -> Iterator[Callable[[], int]]:
    """A pool of 2 MiB pages; how many of them are free."""
    pool = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
    number = pool / "nr_hugepages"
    if not os.access(number, os.W_OK):
        pytest.skip("only root can reserve huge pages")
    before = number.read_text()
    number.write_text("192")
    if int(number.read_text()) < 192:
        number.write_text(before)
        pytest.skip("this host has no 192 huge pages")
    yield lambda: int((pool / "free_hugepages").read_text())
    number.write_text(before)


def test_huge_pages_go_back(start: Callable[..., Machine], huge_pages: Callable[[], int]) -> None:
    """Linux gives 4 KiB at a time; a huge page is free once all of it is in the balloon."""
    script = """\
mount -t tmpfs -o size=160m tmp /mnt
dd if=/dev/zero of=/mnt/file bs=1M count=128 2>/dev/null
rm /mnt/file
echo "vmm-guest: up"
read line
dd if=/dev/zero of=/mnt/file bs=1M count=128 2>/dev/null && echo "again=ok"
"""
    vm = start(script, "pci", balloon="0,reporting=off", hugepages=True)
    balloon = balloon_of(vm)
    full = huge_pages()
    balloon.set_target(128 * MIB)
    until(lambda: balloon.actual == 128 * MIB, "the balloon took 128 MiB")
    assert huge_pages() >= full + 32
    assert balloon.counts()["inflated"] >= 64 * MIB
    balloon.set_target(0)
    until(lambda: balloon.actual == 0, "the balloon gave all back")
    vm.console.send("\n")
    vm.console.expect("again=ok", timeout=BOOT_TIMEOUT)
    assert vm.wait().reason == "poweroff"
