"""Persistent memory and the watchdog, under guests on /dev/kvm."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.waiting import wait_for
from vmm import Machine
from vmm.devices.virtio.pmem import ALIGN, Pmem
from vmm.devices.watchdog import Watchdog

BUILT = Path(__file__).resolve().parents[2] / "build" / "guests"
#: jmp $
SPIN = bytes.fromhex("ebfe")

pytestmark = pytest.mark.usefixtures("kvm")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "pmem"
    path.write_bytes(b"\x78\x56\x34\x12".ljust(ALIGN, b"\0"))
    return path


def run(image: Path, suffix: str = "", **options: Any) -> tuple[Any, Pmem]:
    vm = Machine(
        kernel=BUILT / "pmem",
        memory="4M",
        testdev=True,
        timeout=30,
        pmem=f"{image}{suffix}",
        **options,
    )
    try:
        vm.start()
        (pmem,) = [d for d in vm.devices if isinstance(d, Pmem)]
        return vm.wait(), pmem
    finally:
        vm.close()


@pytest.mark.parametrize("transport", ["pci", "mmio"])
def test_the_guest_has_the_file(image: Path, transport: str) -> None:
    result, pmem = run(image, transport=transport)
    assert result.status == 1, result.console
    assert "pmem: 12345678" in result.console
    assert image.read_bytes()[8:12] == b"\x44\x33\x22\x11"
    assert not pmem.faults()


def test_a_read_only_file_stays_as_it_was(image: Path) -> None:
    before = image.read_bytes()
    result, pmem = run(image, ",ro")
    assert result.status == 3, result.console
    assert "pmem: 12345678" in result.console
    assert "does not read back" in result.console
    assert image.read_bytes() == before
    assert "wrote 1 times" in pmem.faults()[0]


def test_a_file_that_is_cut_off_takes_nothing_but_the_guest(image: Path) -> None:
    vm = Machine(kernel=BUILT / "pmem", memory="4M", testdev=True, timeout=30, pmem=str(image))
    vm.start()
    try:
        vm.pause()
        os.truncate(image, 0)
        vm.resume()
        result = vm.wait()
    finally:
        vm.close()
    # Unless it was through already.
    assert result.reason in ("lost", "debug-exit"), result.console


@pytest.fixture
def spin(tmp_path: Path) -> Path:
    path = tmp_path / "spin"
    path.write_bytes(SPIN)
    return path


def start_dog(vm: Machine) -> Watchdog:
    """As a driver would, with a millisecond for each stage."""
    assert vm._board is not None
    (dog,) = [d for d in vm._board.pci if isinstance(d, Watchdog)]
    with vm._device_lock:
        feed(dog)
        host = vm._board.find("pci-host")
        host.config_write(dog.slot, 0x60, 2, 3)  # type: ignore[union-attr]
        host.config_write(dog.slot, 0x68, 1, 2)  # type: ignore[union-attr]
    return dog


def feed(dog: Watchdog) -> None:
    for register, value in ((0x0, 1), (0x4, 1), (0xC, 0x100)):
        for key in (0x80, 0x86):
            dog.write(0xC, 2, key)
        dog.write(register, 4, value)


def test_a_watchdog_ends_the_run_and_says_where_the_guest_was(spin: Path) -> None:
    with Machine(kernel=spin, boot="flat", memory="2M", timeout=30, watchdog=True) as vm:
        dog = start_dog(vm)
        result = vm.wait()
    assert (result.reason, result.status, dog.fired) == ("watchdog", 255, 1)
    assert "did not feed its watchdog" in result.message
    assert "7c00" in result.diagnosis.lower()


def test_a_watchdog_that_pauses(spin: Path) -> None:
    with Machine(kernel=spin, boot="flat", memory="2M", timeout=30, watchdog="pause") as vm:
        dog = start_dog(vm)
        assert vm._board is not None
        wait_for(vm._board.paused)
        assert vm.vcpus[0].regs.rip == 0x7C00
        feed(dog)  # which does not run out while the machine is held
        vm.resume()
        wait_for(lambda: dog.fired == 2 and vm._board.paused())  # type: ignore[union-attr]
        vm.resume()
        vm.stop()
        assert vm.wait().reason == "stopped"


def test_closing_while_it_runs_out(spin: Path) -> None:
    """The watchdog's thread looks at vCPUs that are being closed."""
    for _ in range(20):
        vm = Machine(kernel=spin, boot="flat", memory="2M", timeout=30, watchdog=True)
        vm.start()
        start_dog(vm)
        vm.close()
