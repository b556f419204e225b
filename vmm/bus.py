"""Address spaces: which device answers which port or guest-physical address.

A bus has two faces over the same ranges. The C face (native/bus.c) answers on the vCPU thread
without Python; what it leaves, Python answers here. An address nobody claims reads as all ones,
as on a real bus; it is counted and logged once.
"""

from __future__ import annotations

from bisect import bisect_right

from vmm._native import ffi, lib
from vmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from vmm.device import Device

#: How many unclaimed addresses are remembered by name.
MAX_UNCLAIMED = 64


class Overlap(ConfigError, ValueError):
    """Two devices claim the same address; a fault of the machine's layout, not of the guest."""


class Bus:
    """One address space of ``size`` bytes. ``name`` is 'pio' or 'mmio'."""

    def __init__(self, name: str, size: int, native: Any = None) -> None:
        """``native``: the struct vmm_bus * that vCPU threads consult first, or None."""
        self.name = name
        self.size = size
        self.unclaimed: dict[int, int] = {}
        self.on_unclaimed: Callable[[str, int, int, bool], None] | None = None
        self._native = native
        self._bases: list[int] = []
        self._ranges: list[tuple[int, int, Device, int, bool]] = []

    def insert(self, base: int, size: int, device: Device, offset: int = 0) -> None:
        """Give [base, base+size) to a device, which sees offsets from ``offset`` on.

        Raises Overlap naming both. May be called while the guest runs.
        """
        if size <= 0 or base < 0 or base + size > self.size:
            raise ValueError(f"{device.name}: {base:#x}+{size:#x} is not on the {self.name} bus")
        at = bisect_right(self._bases, base)
        for other in self._ranges[max(0, at - 1) : at + 1]:
            if other[0] < base + size and base < other[0] + other[1]:
                raise Overlap(
                    f"{device.name} at {base:#x}+{size:#x} overlaps "
                    f"{other[2].name} at {other[0]:#x}+{other[1]:#x} on the {self.name} bus."
                )
        face = device.native() if offset == 0 and self._native is not None else ffi.NULL
        if face != ffi.NULL:
            rc = lib.vmm_bus_add(self._native, base, size, face)
            if rc:
                raise Overlap(f"{device.name} at {base:#x}: the C bus refused it ({rc})")
        # New lists, swapped in: a vCPU thread may be looking at the old ones.
        bases, ranges = self._bases[:], self._ranges[:]
        bases.insert(at, base)
        ranges.insert(at, (base, size, device, offset, face != ffi.NULL))
        self._ranges, self._bases = ranges, bases

    def remove(self, base: int) -> None:
        """Take the range that begins at ``base`` away again; a missing one is a KeyError."""
        for at, r in enumerate(self._ranges):
            if r[0] == base:
                if r[4]:
                    lib.vmm_bus_remove(self._native, base)
                self._bases, self._ranges = (
                    self._bases[:at] + self._bases[at + 1 :],
                    self._ranges[:at] + self._ranges[at + 1 :],
                )
                return
        raise KeyError(base)

    def ranges(self) -> list[tuple[int, int, Device]]:
        """(base, size, device), in address order."""
        return [(r[0], r[1], r[2]) for r in self._ranges]

    def _find(self, addr: int, size: int) -> tuple[Device, int] | None:
        ranges = self._ranges
        at = bisect_right(self._bases, addr) - 1
        if 0 <= at < len(ranges):
            base, length, device, offset, _ = ranges[at]
            if base <= addr and addr + size <= base + length:
                return device, addr - base + offset
        return None

    def read(self, addr: int, size: int) -> int:
        """What the guest reads: ``size`` bytes, little-endian."""
        hit = self._find(addr, size)
        if hit is None:
            self._miss(addr, size, write=False)
            return (1 << (8 * size)) - 1
        return hit[0].read(hit[1], size) & ((1 << (8 * size)) - 1)

    def write(self, addr: int, size: int, value: int) -> None:
        hit = self._find(addr, size)
        if hit is None:
            self._miss(addr, size, write=True)
        else:
            hit[0].write(hit[1], size, value)

    def _miss(self, addr: int, size: int, *, write: bool) -> None:
        if addr in self.unclaimed:
            self.unclaimed[addr] += 1
        elif len(self.unclaimed) < MAX_UNCLAIMED:
            self.unclaimed[addr] = 1
            if self.on_unclaimed is not None:
                self.on_unclaimed(self.name, addr, size, write)
