"""virtio over memory-mapped registers. virtio-v1.3 §4.2."""

from __future__ import annotations

from vmm._native import lib
from vmm.device import NativeDevice
from vmm.devices.virtio.transport import VirtioTransport

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmm.bus import Bus
    from vmm.devices.virtio.device import VirtioDevice
    from vmm.devices.virtio.transport import IoEventFd
    from vmm.irq import IrqLine
    from vmm.memory import GuestMemory

QUEUE_READY = 0x044
QUEUE_NOTIFY = 0x050
STATUS = 0x070
QUEUE_RESET = 0x0C0
CONFIG = 0x100


class VirtioMmio(NativeDevice):
    """One device behind one 4 KiB page of registers and one edge-triggered interrupt."""

    SIZE = 0x1000

    def __init__(
        self,
        device: VirtioDevice,
        memory: GuestMemory,
        irq: IrqLine,
        ioeventfd: IoEventFd | None = None,
    ) -> None:
        """Takes over ``device`` and ``irq``. Without ``ioeventfd`` a notification is an exit."""
        self.name = device.name
        self.device = device
        self.core = VirtioTransport(device, memory)
        self.irq = irq
        self.base = -1
        self._ioeventfd = ioeventfd
        self._bus: Bus | None = None
        lib.vmm_virtio_line(self.core.native, irq.native, 0)

    def place(self, bus: Bus, base: int) -> None:
        """Put the registers at ``base`` and bind the queues' notifications there."""
        bus.insert(base, self.SIZE, self)
        self._bus, self.base = bus, base
        if self._ioeventfd is not None:
            for queue, fd in self.core.eventfd_queues:
                self._ioeventfd.bind(fd, base + QUEUE_NOTIFY, 4, datamatch=queue)

    def native(self) -> Any:
        return lib.vmm_virtio_mmio(self.core.native)

    def cold_write(self, offset: int, size: int, value: int) -> None:
        if offset == STATUS:
            self.core.write_status(value & 0xFF)
        elif offset in (QUEUE_READY, QUEUE_RESET):
            self.core.queues_changed()
        elif offset >= CONFIG:
            self.core.write_config(offset - CONFIG, size, value)

    def reset(self) -> None:
        self.core.reset()
        self.device.reset()

    def close(self) -> None:
        if self._bus is not None:
            if self._ioeventfd is not None:
                for queue, fd in self.core.eventfd_queues:
                    self._ioeventfd.unbind(fd, self.base + QUEUE_NOTIFY, 4, datamatch=queue)
            self._bus.remove(self.base)
            self._bus = None
        self.core.close()
        self.irq.close()

    def unclaimed(self) -> str | None:
        return self.device.unclaimed()
