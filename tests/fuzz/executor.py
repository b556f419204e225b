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


class Ram(GuestMemory):
    """The two ranges, without a call to C for each access: that would cost more than the rest."""

    def __init__(self) -> None:
        super().__init__([(0, RAM), (HIGH, HIGH_RAM)])
        self.low, self.high = super().view(0, RAM), super().view(HIGH, HIGH_RAM)

    def view(self, gpa: int, size: int) -> memoryview:
        end = gpa + size
        if 0 <= gpa < end <= RAM:
            return self.low[gpa:end]
        return super().view(gpa, size)

    def contains(self, gpa: int, size: int) -> bool:
        if 0 <= gpa < gpa + size <= RAM:
            return True
        return super().contains(gpa, size)

    def read(self, gpa: int, size: int) -> bytes:
        end = gpa + size
        if 0 <= gpa < end <= RAM:
            return self.low[gpa:end].tobytes()
        if HIGH <= gpa < end <= HIGH + HIGH_RAM:
            return self.high[gpa - HIGH : end - HIGH].tobytes()
        return super().read(gpa, size)

    def read_int(self, gpa: int, size: int) -> int:
        end = gpa + size
        if 0 <= gpa < end <= RAM:
            return int.from_bytes(self.low[gpa:end], "little")
        return super().read_int(gpa, size)

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        end = gpa + len(data)
        if 0 <= gpa < end <= RAM:
            self.low[gpa:end] = data
        elif HIGH <= gpa < end <= HIGH + HIGH_RAM:
            self.high[gpa - HIGH : end - HIGH] = data
        else:
            super().write(gpa, data)

    def write_int(self, gpa: int, value: int, size: int) -> None:
        end = gpa + size
        if 0 <= gpa < end <= RAM:
            self.low[gpa:end] = value.to_bytes(size, "little")
        else:
            super().write_int(gpa, value, size)


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

    def on_thread(self, wanted: bool) -> None:
        """Whether the device works at the same time as the driver, or in ``settle`` alone; where
        there is a choice, which is made while the device is reset."""

    def settle(self) -> None:
        """Until everything the device was doing has been done."""

    def rest(self) -> None:
        """``settle``, for one that may be waiting for the host."""

    def close(self) -> None: ...


class InProcess:
    """The device itself, with the shared I/O thread and no KVM."""

    def __init__(self, device: VirtioDevice, transport: str) -> None:
        """Owns ``device``."""
        device.packed = True
        self.memory = Ram()
        self.loop: Any = lib.vmm_loop_create()
        device.attach(self.memory, self.loop)
        self.rig = virtio_mock.Rig(transport, device, self.memory)
        self.device = device
        self.regs = self.rig.regs
        self.sizes = device.QUEUE_SIZES
        self._native = self.rig.core.native
        self._loops = [self.loop, *(thread.native for thread in device.io_threads())]
        self._borrowed = False

    def broken(self) -> bool:
        return bool(lib.vmm_virtio_status(self._native) & virtio_mock.NEEDS_RESET)

    def breaks(self, queue: int) -> tuple[int, str]:
        report = self.device._reports[queue]
        return report.breaks, NAMES[report.verdict]

    def on_thread(self, wanted: bool) -> None:
        self.rig.bus.cold.clear()  # a record that nobody reads here
        if wanted == self._borrowed:
            for loop in self._loops:
                (lib.vmm_loop_return if wanted else lib.vmm_loop_borrow)(loop)
            self._borrowed = not wanted

    def settle(self) -> None:
        self._go_on(0)

    def rest(self) -> None:
        self._go_on(1)  # a worker may answer without the loop

    def _go_on(self, ms: int) -> None:
        for loop in self._loops:
            if self._borrowed:
                lib.vmm_loop_step(loop, ms)
            else:
                lib.vmm_loop_barrier(loop)
        if isinstance(self.device, Twin):
            self.device.serve()

    def close(self) -> None:
        self.on_thread(True)
        self.rig.close()
        lib.vmm_loop_destroy(self.loop)
        self.memory.close()
