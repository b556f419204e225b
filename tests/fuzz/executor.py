"""Who runs what the generator made: an executor has a guest's memory and a device's registers.

``InProcess`` is the C core in this process (under the sanitizers by tools/asan.sh). Another, such
as a process that is spoken to over a socket, needs the same few members; the Python twin of the
rings is in session.py, which foretells what each of them must do.
"""

from __future__ import annotations

from typing import Any, Protocol

from tests import virtio_mock
from tests.fuzz.twin import Twin
from tests.virtio_mock import MmioRegs, PciRegs
from vmm._native import lib
from vmm.devices.virtio.device import VirtioDevice
from vmm.devices.virtio.queue import VERDICTS
from vmm.memory import GuestMemory

RAM = 0x4_0000
HIGH = 1 << 32
HIGH_RAM = 0x4_0000

NAMES = list(VERDICTS)


class Executor(Protocol):
    #: With the ranges (0, RAM) and (HIGH, HIGH_RAM).
    memory: Any
    regs: MmioRegs | PciRegs
    #: Of each queue, in descriptors.
    sizes: tuple[int, ...]

    def broken(self) -> bool:
        """Whether the device asks for a reset."""

    def breaks(self, queue: int) -> tuple[int, str] | None:
        """How often the driver broke a queue, and the verdict of the last time; None when that
        cannot be seen from here."""

    def settle(self) -> None:
        """Until everything the device was doing has been done."""

    def close(self) -> None: ...


class InProcess:
    """The device itself, with the shared I/O thread and no KVM."""

    def __init__(self, device: VirtioDevice, transport: str) -> None:
        """Owns ``device``."""
        device.packed = True
        self.memory = GuestMemory([(0, RAM), (HIGH, HIGH_RAM)])
        self.loop: Any = lib.vmm_loop_create()
        device.attach(self.memory, self.loop)
        self.rig = virtio_mock.Rig(transport, device, self.memory)
        self.device = device
        self.regs = self.rig.regs
        self.sizes = device.QUEUE_SIZES
        self._native = self.rig.core.native
        self._loops = [self.loop, *(thread.native for thread in device.io_threads())]

    def broken(self) -> bool:
        return bool(lib.vmm_virtio_status(self._native) & virtio_mock.NEEDS_RESET)

    def breaks(self, queue: int) -> tuple[int, str]:
        report = self.device._reports[queue]
        return report.breaks, NAMES[report.verdict]

    def settle(self) -> None:
        for loop in self._loops:
            lib.vmm_loop_barrier(loop)
        if isinstance(self.device, Twin):
            self.device.serve()

    def close(self) -> None:
        self.rig.close()
        lib.vmm_loop_destroy(self.loop)
        self.memory.close()
