"""Debug exit: a write ends the machine. What payload guests know as QEMU's isa-debug-exit."""

from __future__ import annotations

from vmm.device import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.bus import Bus


class DebugExit(Device):
    """Ports 0xF4 to 0xF7. Writing v of any width exits with (v << 1) | 1, never 0.

    ``on_exit`` gets that whole number, on the vCPU thread; a process can show 8 bits of it.
    """

    PORT = 0xF4
    SIZE = 4
    name = "debug-exit"

    def __init__(self, on_exit: Callable[[int], None]) -> None:
        self._on_exit = on_exit

    def place(self, bus: Bus) -> None:
        bus.insert(self.PORT, self.SIZE, self)

    def read(self, offset: int, size: int) -> int:
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        self._on_exit(value << 1 | 1)
