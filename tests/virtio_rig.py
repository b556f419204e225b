"""The driver mock's rig, with an I/O thread behind the device."""

from __future__ import annotations

import time
from collections.abc import Callable

from tests import virtio_mock
from vmm._native import lib
from vmm.devices.virtio.device import VirtioDevice
from vmm.memory import GuestMemory

RAM = 4 << 20
HIGH = 1 << 32
TRANSPORTS = ("mmio", "pci")


class Rig(virtio_mock.Rig):
    """Owns the memory and the I/O thread too."""

    def __init__(
        self,
        device: VirtioDevice,
        transport: str,
        *,
        backing: str = "anon",
        packed: bool = False,
    ) -> None:
        """``packed``: offer packed queues, which the driver takes."""
        device.packed = packed
        memory = GuestMemory([(0, RAM), (HIGH, 1 << 20)], backing=backing)
        self.loop = lib.vmm_loop_create()
        device.attach(memory, self.loop)
        super().__init__(transport, device, memory)

    @property
    def broken(self) -> bool:
        return bool(self.regs.status & virtio_mock.NEEDS_RESET)

    def settle(self) -> None:
        """Until the I/O threads have finished what they were doing."""
        for thread in self.device.io_threads():
            lib.vmm_loop_barrier(thread.native)
        lib.vmm_loop_barrier(self.loop)

    def until(self, true: Callable[[], bool], what: str, timeout: float = 5.0) -> None:
        deadline = time.monotonic() + timeout
        while not true():
            assert time.monotonic() < deadline, f"{what} did not happen in {timeout} s"
            time.sleep(0.0005)

    def until_broken(self) -> None:
        self.until(lambda: self.broken, "DEVICE_NEEDS_RESET")

    def close(self) -> None:
        super().close()
        lib.vmm_loop_destroy(self.loop)
        self.memory.close()
