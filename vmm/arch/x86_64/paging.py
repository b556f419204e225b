"""A guest's page tables, walked by the host. Intel SDM vol 3 §4.

Only for looking at a guest that stands still: accessed and dirty bits, rights and protection
keys are not applied, only where an address leads.
"""

from __future__ import annotations

from vmm.errors import MemoryFault

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Protocol

    class Readable(Protocol):
        """As much of GuestMemory as a walk needs."""

        def read_int(self, gpa: int, size: int) -> int: ...


# Intel SDM vol 3 §2.5, §2.2.1.
CR0_PE = 1 << 0
CR0_PG = 1 << 31
CR4_PSE = 1 << 4
CR4_PAE = 1 << 5
CR4_LA57 = 1 << 12
EFER_LMA = 1 << 10

# Of a paging-structure entry. Intel SDM vol 3 §4.5.
PRESENT = 1 << 0
PAGE_SIZE = 1 << 7
ADDRESS = 0x000F_FFFF_FFFF_F000


def levels(sregs: Mapping[str, int]) -> int:
    """How many levels of tables are in force: 0 (no paging), 2 (32-bit), 3 (PAE), 4 or 5."""
    if not sregs["cr0"] & CR0_PG:
        return 0
    if sregs["efer"] & EFER_LMA:
        return 5 if sregs["cr4"] & CR4_LA57 else 4
    return 3 if sregs["cr4"] & CR4_PAE else 2


def translate(memory: Readable, sregs: Mapping[str, int], linear: int) -> int | None:
    """The guest-physical address behind a linear one, or None when nothing is mapped there.

    ``sregs`` has cr0, cr3, cr4 and efer. Tables outside RAM map nothing.
    """
    depth = levels(sregs)
    try:
        if depth == 0:
            return linear & 0xFFFF_FFFF
        if depth == 2:
            return _walk_32bit(memory, sregs, linear & 0xFFFF_FFFF)
        if depth == 3:
            return _walk_pae(memory, sregs["cr3"], linear & 0xFFFF_FFFF)
        return _walk_long(memory, sregs["cr3"] & ADDRESS, linear, depth)
    except MemoryFault:
        return None


def _walk_long(memory: Readable, table: int, linear: int, depth: int) -> int | None:
    """4-level and 5-level paging. Intel SDM vol 3 §4.5."""
    width = 12 + 9 * depth
    if linear >> (width - 1) not in (0, (1 << (65 - width)) - 1):
        return None  # not canonical
    for level in range(depth, 0, -1):
        shift = 12 + 9 * (level - 1)
        entry = memory.read_int(table + 8 * (linear >> shift & 0x1FF), 8)
        if not entry & PRESENT:
            return None
        # Only 1 GiB and 2 MiB pages exist above the last level.
        if level == 1 or (level in (2, 3) and entry & PAGE_SIZE):
            low = (1 << shift) - 1
            return (entry & ADDRESS & ~low) | (linear & low)
        table = entry & ADDRESS
    return None


def _walk_pae(memory: Readable, cr3: int, linear: int) -> int | None:
    """PAE paging. Intel SDM vol 3 §4.4."""
    entry = memory.read_int((cr3 & 0xFFFF_FFE0) + 8 * (linear >> 30), 8)
    if not entry & PRESENT:
        return None
    entry = memory.read_int((entry & ADDRESS) + 8 * (linear >> 21 & 0x1FF), 8)
    if not entry & PRESENT:
        return None
    if entry & PAGE_SIZE:
        return (entry & ADDRESS & ~0x1F_FFFF) | (linear & 0x1F_FFFF)
    entry = memory.read_int((entry & ADDRESS) + 8 * (linear >> 12 & 0x1FF), 8)
    return (entry & ADDRESS) | (linear & 0xFFF) if entry & PRESENT else None


def _walk_32bit(memory: Readable, sregs: Mapping[str, int], linear: int) -> int | None:
    """32-bit paging, with 4 MiB pages as PSE-36 has them. Intel SDM vol 3 §4.3."""
    entry = memory.read_int((sregs["cr3"] & 0xFFFF_F000) + 4 * (linear >> 22), 4)
    if not entry & PRESENT:
        return None
    if entry & PAGE_SIZE and sregs["cr4"] & CR4_PSE:
        return (entry & 0xFFC0_0000) | (entry >> 13 & 0xFF) << 32 | (linear & 0x3F_FFFF)
    entry = memory.read_int((entry & 0xFFFF_F000) + 4 * (linear >> 12 & 0x3FF), 4)
    return (entry & 0xFFFF_F000) | (linear & 0xFFF) if entry & PRESENT else None
