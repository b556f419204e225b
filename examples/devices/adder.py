"""An adding machine on two I/O ports: what is written to 0x520 is added up, 0x521 clears.

vmm run -k KERNEL --device examples/devices/adder.py:Adder,start=40
"""

from __future__ import annotations

import vmm


class Adder(vmm.PioDevice):
    """Reading 0x520 gives the sum so far, in 1, 2 or 4 bytes."""

    PORT, SIZE = 0x520, 4
    OPTIONS = (vmm.Field("start", "the sum to begin with", int, default=0),)

    def __init__(self, start: int = 0) -> None:
        self.start = self.sum = start

    @classmethod
    def from_options(cls, options: vmm.Options, board: object) -> Adder:
        return cls(options.start)

    def read(self, offset: int, size: int) -> int:
        return self.sum  # the machine cuts it to size

    def write(self, offset: int, size: int, value: int) -> None:
        self.sum = self.sum + value if offset == 0 else 0

    def reset(self) -> None:
        self.sum = self.start
