"""Guest-physical memory as a client sees it: RAM, registers and what is nobody's, in one."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmm.bus import Bus
    from vmm.memory import GuestMemory

#: Registers are read and written in pieces of so many bytes, where more is asked for.
_MMIO_STEP = 4


class Space:
    """Reads and writes of any size. What nobody answers for reads as all ones."""

    def __init__(self, memory: GuestMemory, mmio: Bus) -> None:
        self.memory = memory
        self.mmio = mmio

    def load(self, addr: int, size: int) -> int:
        """A little-endian integer of RAM or registers."""
        if self.memory.contains(addr, size):
            return self.memory.read_int(addr, size)
        return self.mmio.read(addr, size)

    def store(self, addr: int, size: int, value: int) -> None:
        if self.memory.contains(addr, size):
            self.memory.write_int(addr, value, size)
        else:
            self.mmio.write(addr, size, value)

    def read(self, addr: int, size: int) -> bytes:
        """What nobody answers for reads as all ones."""
        out = bytearray()
        for at, n, kind in self._pieces(addr, size):
            if kind == "ram":
                out += self.memory.view(at, n)
            elif kind == "gap":
                out += b"\xff" * n
            else:
                out += self.mmio.read(at, n).to_bytes(n, "little")
        return bytes(out)

    def write(self, addr: int, data: bytes) -> None:
        view, done = memoryview(data), 0
        for at, n, kind in self._pieces(addr, len(data)):
            part = view[done : done + n]
            done += n
            if kind == "ram":
                self.memory.write(at, part)
            elif kind == "mmio":
                self.mmio.write(at, n, int.from_bytes(part, "little"))

    def _pieces(self, addr: int, size: int) -> Iterator[tuple[int, int, str]]:
        """(address, size, 'ram' | 'mmio' | 'gap'); registers up to four bytes at a time."""
        end = addr + size
        while addr < end:
            ram = next((r for r in self.memory.ranges if r.gpa <= addr < r.gpa + r.size), None)
            if ram is not None:
                n, kind = min(end, ram.gpa + ram.size) - addr, "ram"
            else:
                n, kind = self._off_ram(addr, end)
            yield addr, n, kind
            addr += n

    def _off_ram(self, addr: int, end: int) -> tuple[int, str]:
        ranges = self.mmio.ranges()
        if any(base <= addr < base + size for base, size, _ in ranges):
            n = _MMIO_STEP
            while addr % n or addr + n > end:
                n //= 2
            return n, "mmio"
        starts = [base for base, _, _ in ranges] + [r.gpa for r in self.memory.ranges]
        return min([end, *(at for at in starts if at > addr)]) - addr, "gap"
