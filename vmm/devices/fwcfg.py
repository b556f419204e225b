"""fw_cfg: the few facts that payload guests written for QEMU ask for. QEMU, docs/specs/fw_cfg.

A 16-bit write to the selector port chooses an item and rewinds it; reads of the data port give
its bytes one after the other, and zeroes behind its end.
"""

from __future__ import annotations

from vmm.device import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.bus import Bus

_SELECTOR, _DATA = 0, 1
#: Bits of a key that do not choose the item: write access, and "of this architecture only".
_WRITE = 0x4000


class FwCfg(Device):
    """Ports 0x510 (selector) and 0x511 (data)."""

    PORT = 0x510
    SIZE = 2
    SIGNATURE, ID, RAM_SIZE, NB_CPUS, MAX_CPUS, FILE_DIR = 0x00, 0x01, 0x03, 0x05, 0x0F, 0x19
    name = "fw_cfg"

    def __init__(self, memory: int, cpus: int) -> None:
        """``memory`` in bytes."""
        self._items = {
            self.SIGNATURE: b"QEMU",
            self.ID: (1).to_bytes(4, "little"),  # the traditional interface, no DMA
            self.RAM_SIZE: memory.to_bytes(8, "little"),
            self.NB_CPUS: cpus.to_bytes(2, "little"),
            self.MAX_CPUS: cpus.to_bytes(2, "little"),
            self.FILE_DIR: (0).to_bytes(4, "big"),
        }
        self.reset()

    def place(self, bus: Bus) -> None:
        bus.insert(self.PORT, self.SIZE, self)

    def reset(self) -> None:
        self._item = b""
        self._at = 0

    def read(self, offset: int, size: int) -> int:
        data = self._item[self._at : self._at + size]
        self._at = min(self._at + size, len(self._item))
        return int.from_bytes(data, "little")

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == _SELECTOR and size == 2:
            self._item = self._items.get(value & ~_WRITE & 0xFFFF, b"")
            self._at = 0
