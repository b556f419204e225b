"""virtio over PCI, modern devices only. virtio-v1.3 §4.1.

One 32-bit memory BAR holds every structure, the MSI-X table and its pending bits; the offsets are
native/virtio.h's. Each queue has a notification address of its own.
"""

from __future__ import annotations

import struct

from vmm._native import ffi, lib
from vmm.device import NativeDevice
from vmm.devices import msix
from vmm.devices.pci import COMMAND, COMMAND_INTX_DISABLE, PciDevice
from vmm.devices.virtio.transport import VirtioTransport
from vmm.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmm.devices.pci import Bar
    from vmm.devices.virtio.device import VirtioDevice
    from vmm.devices.virtio.transport import IoEventFd
    from vmm.irq import IrqChip, IrqLine
    from vmm.memory import GuestMemory

VENDOR = 0x1AF4
DEVICE_BASE = 0x1040
_SUBSYSTEM = 0x1100
_BAR = 0
_MSIX_BAR = 1
_CAP_VENDOR = 0x09

# Structures a capability can point to. virtio-v1.3 §4.1.4.
CFG_COMMON, CFG_NOTIFY, CFG_ISR, CFG_DEVICE, CFG_PCI = 1, 2, 3, 4, 5
NOTIFY_OFF_MULTIPLIER = 4
_STATUS, _QUEUE_ENABLE, _QUEUE_RESET = 0x14, 0x1C, 0x3A

_COMMON = int(lib.VMM_VIRTIO_PCI_COMMON)
COMMON_SIZE = int(lib.VMM_VIRTIO_PCI_COMMON_SIZE)
_ISR = int(lib.VMM_VIRTIO_PCI_ISR)
_DEVICE = int(lib.VMM_VIRTIO_PCI_DEVICE)
_NOTIFY = int(lib.VMM_VIRTIO_PCI_NOTIFY)
_MSIX = int(lib.VMM_VIRTIO_PCI_MSIX)
_SIZE = int(lib.VMM_VIRTIO_PCI_SIZE)

#: PCI class by virtio device id (virtio-v1.3 §5); others are 'unclassified'.
_CLASSES = {
    1: 0x02_0000,  # network
    2: 0x01_0000,  # block
    3: 0x07_8000,  # console
    8: 0x01_0000,  # SCSI host
    9: 0x00_0200,  # 9P
    16: 0x03_8000,  # GPU
    18: 0x09_8000,  # input
    19: 0x07_8000,  # socket
    26: 0x01_8000,  # file system
}
_UNCLASSIFIED = 0x00_FF00


class _Registers(NativeDevice):
    """What the BAR contains."""

    def __init__(self, name: str, core: VirtioTransport, table: msix.MsixTable) -> None:
        self.name = name
        self._core = core
        self._table = table
        lib.vmm_virtio_pci_rest(core.native, table.native())

    def native(self) -> Any:
        return lib.vmm_virtio_pci(self._core.native)

    def cold_read(self, offset: int, size: int) -> int:
        return self._table.cold_read(offset - _MSIX, size)

    def cold_write(self, offset: int, size: int, value: int) -> None:
        if offset >= _MSIX:
            self._table.cold_write(offset - _MSIX, size, value)
        elif offset >= _DEVICE:
            self._core.write_config(offset - _DEVICE, size, value)
        elif offset == _COMMON + _STATUS:
            self._core.write_status(value & 0xFF)
        elif offset in (_COMMON + _QUEUE_ENABLE, _COMMON + _QUEUE_RESET):
            self._core.queues_changed()


class VirtioPci(PciDevice):
    """One device as a PCI function, with a vector per queue and one for configuration changes."""

    def __init__(
        self,
        device: VirtioDevice,
        memory: GuestMemory,
        chip: IrqChip,
        ioeventfd: IoEventFd | None = None,
        *,
        msix_bar: bool = False,
    ) -> None:
        """Takes over ``device``. Without ``ioeventfd`` a notification is an exit. ``msix_bar``:
        the MSI-X table has BAR 1 to itself, for drivers that map each BAR by its use."""
        super().__init__(
            device.name,
            VENDOR,
            DEVICE_BASE + device.DEVICE_ID,
            _CLASSES.get(device.DEVICE_ID, _UNCLASSIFIED),
            revision=1,
            subsystem=(VENDOR, _SUBSYSTEM),
            intx=True,
        )
        self.device = device
        self.core = VirtioTransport(device, memory)
        self.table = msix.MsixTable(device.name, chip, min(self.core.queues + 1, lib.VMM_MSIX_MAX))
        self.registers = _Registers(device.name, self.core, self.table)
        self._ioeventfd = ioeventfd
        self._bound: list[tuple[int, int, int]] = []
        irqs = ffi.new("struct vmm_irq *[]", [v.irq.native for v in self.table.vectors])
        if lib.vmm_virtio_vectors(self.core.native, irqs, len(self.table.vectors)):
            raise MemoryError(f"{device.name}: interrupt vectors")
        self.add_bar(_BAR, _SIZE, self.registers)
        if msix_bar:
            self.add_bar(_MSIX_BAR, msix.SIZE, self.table)
        self._add_capabilities((_MSIX_BAR, 0) if msix_bar else (_BAR, _MSIX))

    def _add_capabilities(self, table: tuple[int, int]) -> None:
        """``table``: BAR and offset of the MSI-X table."""
        body, writable = self.table.capability(*table)
        self._msix_control = self.add_capability(msix.CAP_ID, body, writable) + msix.CONTROL
        self.watch(self._msix_control, msix.ENABLE | msix.FUNCTION_MASK, 2)
        self._add_structure(CFG_COMMON, _COMMON, COMMON_SIZE)
        multiplier = struct.pack("<I", NOTIFY_OFF_MULTIPLIER)
        length = NOTIFY_OFF_MULTIPLIER * self.core.queues
        self._add_structure(CFG_NOTIFY, _NOTIFY, length, multiplier)
        self._add_structure(CFG_ISR, _ISR, 1)
        if len(self.device.config):
            self._add_structure(CFG_DEVICE, _DEVICE, len(self.device.config))
        # An access to a BAR by way of configuration space: bar, offset and length are the
        # driver's to write, the data follows. virtio-v1.3 §4.1.4.9.
        writable = bytes([0, 0, 0xFF, 0, 0, 0]) + b"\xff" * 8
        self._window_cap = self._add_structure(CFG_PCI, 0, 0, bytes(4), writable)
        self.window = self._window_cap + 16

    def _add_structure(
        self, kind: int, offset: int, length: int, extra: bytes = b"", writable: bytes = b""
    ) -> int:
        """A struct virtio_pci_cap. virtio-v1.3 §4.1.4."""
        body = struct.pack("<BBBBHII", 16 + len(extra), kind, _BAR, 0, 0, offset, length)
        return self.add_capability(_CAP_VENDOR, body + extra, writable)

    # -- what the guest sets in motion

    def wire(self, intx: IrqLine) -> None:
        super().wire(intx)
        lib.vmm_virtio_line(self.core.native, intx.native, 1)

    def config_written(self, reg: int, size: int) -> None:
        control = self.config_get(self._msix_control, 2)
        command = self.config_get(COMMAND, 2)
        if reg <= COMMAND + 1:
            lib.vmm_virtio_line_enable(self.core.native, int(not command & COMMAND_INTX_DISABLE))
        if reg < self._msix_control + 2 and self._msix_control < reg + size:
            self.table.set_control(control)
            lib.vmm_virtio_vectors_enable(self.core.native, int(bool(control & msix.ENABLE)))

    def _window_target(self) -> tuple[int, int] | None:
        """Offset and length of the BAR access the window stands for, if it is a possible one."""
        bar = self.config_get(self._window_cap + 4, 1)
        offset = self.config_get(self._window_cap + 8, 4)
        length = self.config_get(self._window_cap + 12, 4)
        if bar != _BAR or length not in (1, 2, 4) or offset % length or offset + length > _SIZE:
            return None
        return offset, length

    def window_read(self, offset: int, size: int) -> int:
        target = self._window_target()
        if target is None or offset:
            return 0
        return self.registers.read(*target) & ((1 << (8 * size)) - 1)

    def window_write(self, offset: int, size: int, value: int) -> None:
        target = self._window_target()
        if target is not None and offset == 0:
            self.registers.write(*target, value & ((1 << (8 * min(size, target[1]))) - 1))

    def on_bar_moved(self, bar: Bar) -> None:
        if self._ioeventfd is None or bar.index != _BAR:
            return
        for bound in self._bound:
            self._ioeventfd.unbind(*bound)
        self._bound = []
        if bar.addr < 0:
            return
        # Drivers write the queue's index as 16 bits; a match of any width costs KVM least.
        size = 0 if self._ioeventfd.any_length else 2
        try:
            for queue, fd in self.core.eventfd_queues:
                at = bar.addr + _NOTIFY + NOTIFY_OFF_MULTIPLIER * queue
                bind = (fd, at, size)
                self._ioeventfd.bind(*bind)
                self._bound.append(bind)
        except HostError:
            pass  # out of ioeventfds: the rest of the queues notify by exits

    def reset(self) -> None:
        self.core.reset()
        self.table.reset()
        lib.vmm_virtio_vectors_enable(self.core.native, 0)
        lib.vmm_virtio_line_enable(self.core.native, 1)
        self.device.reset()

    def close(self) -> None:
        self.core.close()
        self.table.close()
        super().close()

    def unclaimed(self) -> str | None:
        return self.device.unclaimed()
