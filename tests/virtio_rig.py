"""One virtio device behind a transport, on a bus, with RAM, an I/O thread and a driver."""

from __future__ import annotations

import time
from collections.abc import Callable

from tests.virtio_mock import NEEDS_RESET, Driver, MmioRegs
from vmm._native import lib
from vmm.bus import Bus
from vmm.devices.virtio.device import VirtioDevice
from vmm.devices.virtio.mmio import VirtioMmio
from vmm.irq import NullIrqChip
from vmm.memory import GuestMemory

BASE = 0xFEB0_0000
RAM = 4 << 20
HIGH = 1 << 32

#: How tests reach a device.
TRANSPORTS = ("mmio",)


class Rig:
    def __init__(self, device: VirtioDevice, transport: str = "mmio") -> None:
        self.device = device
        self.memory = GuestMemory([(0, RAM), (HIGH, 1 << 20)])
        self.loop = lib.vmm_loop_create()
        device.attach(self.memory, self.loop)
        self.bus = Bus("mmio", 1 << 40)
        self.irq = NullIrqChip().edge(5)
        self.transport = VirtioMmio(device, self.memory, self.irq)
        self.transport.place(self.bus, BASE)
        self.driver = Driver(MmioRegs(self.bus, BASE), self.memory)

    @property
    def broken(self) -> bool:
        return bool(self.driver.regs.status & NEEDS_RESET)

    def settle(self) -> None:
        """Until the I/O thread has done what it was kicked for before this call."""
        lib.vmm_loop_barrier(self.loop)

    def until(self, true: Callable[[], bool], what: str, timeout: float = 5.0) -> None:
        deadline = time.monotonic() + timeout
        while not true():
            assert time.monotonic() < deadline, f"{what} did not happen in {timeout} s"
            time.sleep(0.0005)

    def until_broken(self) -> None:
        self.until(lambda: self.broken, "DEVICE_NEEDS_RESET")

    def close(self) -> None:
        self.transport.close()
        lib.vmm_loop_destroy(self.loop)
        self.memory.close()
