"""An alarm clock with memory-mapped registers that interrupts.

0x0 write: wake me in so many milliseconds (16 bits); read: how many alarms there were, in 4 bytes
0x4 write anything: I have seen it (the interrupt goes down)
"""

from __future__ import annotations

import threading

import vmm


class Alarm(vmm.MmioDevice):
    """The guest's ACPI knows it as VMMX0001, with its memory and its interrupt."""

    SIZE, HID = 8, "VMMX0001"
    alarms = 0
    timer = threading.Timer(0, print)  # none is running

    def ring(self) -> None:
        self.alarms += 1
        self.irq.set(True)  # any thread may

    def read(self, offset: int, size: int) -> int:
        return self.alarms if offset == 0 else 0

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == 4:
            self.irq.set(False)
        elif offset == 0:
            self.timer.cancel()
            self.timer = threading.Timer((value & 0xFFFF) / 1000, self.ring)
            self.timer.start()

    def close(self) -> None:
        self.timer.cancel()
