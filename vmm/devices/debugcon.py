"""Debug console: port 0xE9, as Bochs has it. A byte written is a byte printed."""

from __future__ import annotations

from vmm.device import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.bus import Bus
    from vmm.chario import Stream


class DebugCon(Device):
    """One byte port that reads 0xE9, by which a guest knows it. The stream stays the caller's."""

    PORT = 0xE9
    SIZE = 1
    name = "debugcon"

    def __init__(self, out: Stream) -> None:
        self._out = out

    def place(self, bus: Bus) -> None:
        bus.insert(self.PORT, self.SIZE, self)

    def read(self, offset: int, size: int) -> int:
        return 0xE9

    def write(self, offset: int, size: int, value: int) -> None:
        self._out.write(bytes((value & 0xFF,)))
