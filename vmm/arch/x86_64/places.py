"""Where in guest memory things may be put."""

from __future__ import annotations

from vmm.arch.x86_64 import layout
from vmm.errors import BootError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.arch.source import Source
    from vmm.memory import GuestMemory

MIB = layout.MIB


class Places:
    """Who has which part of guest memory. Claims are (start, end, name), disjoint."""

    __slots__ = ("_claims", "low_end", "memory", "source")

    def __init__(self, memory: GuestMemory, source: Source) -> None:
        self.memory = memory
        self.source = source
        self.low_end = layout.low_ram_end(memory)
        self._claims: list[tuple[int, int, str]] = [
            (0, layout.GDT, "the interrupt vectors"),
            (layout.EBDA, layout.HIMEM, "the BIOS area and ACPI tables"),
        ]

    def claim(self, start: int, size: int, name: str) -> None:
        """Take [start, start + size) for ``name``. Raises BootError when it is not all RAM or
        not free."""
        end = start + size
        if not size:
            return
        if end > layout.LOW_RAM_MAX or not self.memory.contains(start, size):
            raise self.source.error(self._no_room(start, end, name))
        for first, last, owner in self._claims:
            if start < last and first < end:
                raise self.source.error(
                    f"cannot be loaded: its {name} at {start:#x}-{end - 1:#x} overlaps {owner} at "
                    f"{first:#x}-{last - 1:#x}"
                )
        self._claims.append((start, end, name))

    def _no_room(self, start: int, end: int, name: str) -> str:
        have = f"the guest has {self.memory.size // MIB} MiB"
        if end > layout.LOW_RAM_MAX:
            return f"wants its {name} at {start:#x}-{end - 1:#x}, where there is no RAM ({have})"
        need = -(-end // MIB)
        return (
            f"needs RAM up to {end:#x} for its {name} and {have}; "
            f"give it more than {need} MiB with --memory"
        )

    def kernel_end(self) -> int:
        """The end of what is claimed so far."""
        return max(last for _, last, _ in self._claims)

    def top(self, size: int, limit: int) -> int | None:
        """The highest page-aligned start of ``size`` free bytes of low RAM that end at or below
        ``limit``; None when there is no such place. Does not claim it."""
        end = min(limit, self.low_end)
        for first, last, _ in sorted(self._claims, reverse=True):
            start = (end - size) & ~(layout.PAGE - 1)
            if start < layout.HIMEM:
                return None
            if start >= last:
                return start
            end = min(end, first)
        return None

    def bottom(self, size: int, start: int) -> int | None:
        """The lowest page-aligned start at or above ``start`` of ``size`` free bytes of low RAM;
        None when there is no such place. Does not claim it."""
        for first, last, _ in sorted(self._claims):
            start = (start + layout.PAGE - 1) & ~(layout.PAGE - 1)
            if start + size <= first:
                break
            start = max(start, last)
        start = (start + layout.PAGE - 1) & ~(layout.PAGE - 1)
        return start if start + size <= self.low_end else None


class Area:
    """A claimed run of low memory that is filled from its start. Raises BootError when full."""

    __slots__ = ("_end", "_places", "_pos")

    def __init__(self, places: Places, start: int, size: int) -> None:
        self._places = places
        self._pos = start
        self._end = start + size

    def skip(self, size: int) -> int:
        """Leave ``size`` bytes to be written later; returns their address."""
        gpa = self._pos
        if gpa + size > self._end:
            raise BootError("too many initrds: their list does not fit low memory; join some")
        self._pos = (gpa + size + 7) & ~7
        return gpa

    def put(self, data: bytes) -> int:
        gpa = self.skip(len(data))
        self._places.memory.write(gpa, data)
        return gpa

    def put_string(self, text: str) -> int:
        return self.put(text.encode("ascii", "replace") + b"\0")
