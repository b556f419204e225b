"""pvpanic: a guest's kernel says that it panicked. The port is QEMU's, docs/specs/pvpanic."""

from __future__ import annotations

from vmm.device import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.bus import Bus


class PvPanic(Device):
    """One byte port. Reads say which events exist; a write says which happened.

    The callbacks run on the vCPU thread. Linux drives it through ACPI (QEMU0001) with
    CONFIG_PVPANIC_MMIO.
    """

    PORT = 0x505
    SIZE = 1
    PANICKED = 1 << 0
    #: A panic that the guest handles itself, with a crash kernel.
    CRASH_LOADED = 1 << 1
    name = "pvpanic"

    def __init__(
        self, on_panic: Callable[[], None], on_crash_loaded: Callable[[], None] | None = None
    ) -> None:
        self._on_panic = on_panic
        self._on_crash_loaded = on_crash_loaded
        #: Events seen so far, as written.
        self.events = 0

    def place(self, bus: Bus) -> None:
        bus.insert(self.PORT, self.SIZE, self)

    def reset(self) -> None:
        self.events = 0

    def read(self, offset: int, size: int) -> int:
        return self.PANICKED | self.CRASH_LOADED

    def write(self, offset: int, size: int, value: int) -> None:
        self.events |= value & (self.PANICKED | self.CRASH_LOADED)
        if value & self.PANICKED:
            self._on_panic()
        elif value & self.CRASH_LOADED and self._on_crash_loaded is not None:
            self._on_crash_loaded()
