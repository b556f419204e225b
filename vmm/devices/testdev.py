"""The test device that payload guests written for QEMU's ``pc-testdev`` expect.

0xE0-0xE3      a 32-bit latch, any width, each byte at its own port
0xE4           a guest-physical address whose mapping is to be dropped: accepted
0xE8-0xEB      the same latch again
0x2000-0x2017  a byte written is the level of the interrupt line of that number
0xFF000000     64 KiB of memory that is not RAM: every access is an exit
"""

from __future__ import annotations

from vmm.device import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.bus import Bus
    from vmm.irq import IrqChip, IrqLine

_FLUSH = 4


class TestDev(Device):
    """Latch and interrupt lines; places its memory window with it."""

    __test__ = False  # no test class, whatever its name says
    LATCH, LATCH_SIZE = 0xE0, 12
    IRQS, NR_IRQS = 0x2000, 24
    WINDOW, WINDOW_SIZE = 0xFF00_0000, 0x1_0000
    name = "testdev"

    def __init__(self, chip: IrqChip) -> None:
        self._chip = chip
        self._lines: dict[int, IrqLine] = {}
        self._latch = bytearray(4)
        #: The address last written to 0xE4.
        self.flushed: int | None = None
        self.window = Window()

    def place(self, pio: Bus, mmio: Bus) -> None:
        pio.insert(self.LATCH, self.LATCH_SIZE, self)
        pio.insert(self.IRQS, self.NR_IRQS, self, offset=self.IRQS)
        mmio.insert(self.WINDOW, self.WINDOW_SIZE, self.window)

    def reset(self) -> None:
        self._latch = bytearray(4)
        for line in self._lines.values():
            line.set(False)
        self.window.reset()

    def close(self) -> None:
        for line in self._lines.values():
            line.close()
        self._lines = {}

    def read(self, offset: int, size: int) -> int:
        if offset >= self.IRQS:
            return 0
        return int.from_bytes((self._byte(offset + i) for i in range(size)), "little")

    def _byte(self, offset: int) -> int:
        return 0 if offset // 4 == 1 else self._latch[offset % 4]

    def write(self, offset: int, size: int, value: int) -> None:
        if offset >= self.IRQS:
            for i in range(size):
                self._set_line(offset - self.IRQS + i, bool(value >> (8 * i) & 0xFF))
        elif offset == _FLUSH:
            self.flushed = value
        else:
            for i in range(size):
                if (offset + i) // 4 != 1:
                    self._latch[(offset + i) % 4] = value >> (8 * i) & 0xFF

    def _set_line(self, number: int, level: bool) -> None:
        if number not in self._lines:
            self._lines[number] = self._chip.line(number)
        self._lines[number].set(level)


class Window(Device):
    """Memory behind exits."""

    name = "testdev-window"

    def __init__(self) -> None:
        self._memory = bytearray(TestDev.WINDOW_SIZE)

    def reset(self) -> None:
        self._memory = bytearray(TestDev.WINDOW_SIZE)

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(self._memory[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        value &= (1 << (8 * size)) - 1
        self._memory[offset : offset + size] = value.to_bytes(size, "little")
