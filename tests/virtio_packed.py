"""A packed queue of the driver mock: virtio-v1.3 §2.8."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests import virtio_mock
from tests.virtio_ring import PackedRing

if TYPE_CHECKING:
    from tests.virtio_mock import Driver


class PackedQueue(virtio_mock.Queue):
    """As virtio_mock.Queue; a head is a buffer id."""

    def __init__(self, driver: Driver, index: int, size: int) -> None:
        self.driver = driver
        self.memory = driver.memory
        self.index = index
        self.size = size
        self.ring = PackedRing(driver.memory, size, driver.alloc(16 * size + 8, 16))
        self.desc, self.avail, self.used = self.ring.desc, self.ring.avail, self.ring.used
        self.free = self.ring.free
        self.buffers: dict[int, list[tuple[int, int]]] = {}
        self.done: list[tuple[int, int]] = []
        self.taken = 0

    def add(self, readable: list[bytes], writable: list[int], *, indirect: bool = False) -> int:
        parts = []
        for data in readable:
            addr = self.driver.alloc(max(1, len(data)))
            self.memory.write(addr, data)
            parts.append((addr, len(data)))
        room = [(self.driver.alloc(max(1, length)), length) for length in writable]
        table = self.driver.alloc(16 * (len(parts) + len(room)), 16) if indirect else None
        head = self.ring.place(parts, room, indirect=table)
        self.buffers[head] = room
        self.offer(head)
        return head

    def offer(self, head: int) -> None:
        self.ring.publish(head)

    def room(self, head: int) -> list[tuple[int, int]]:
        return self.buffers[head]

    def write_desc(self, at: int, addr: int, length: int, flags: int, nxt: int = 0) -> None:
        self.ring.set_desc(at, addr, length, flags, nxt)

    def _look(self) -> None:
        for head, length in self.ring.used_entries():
            assert head in self.buffers, f"used buffer {head} was not available"
            self.free += self.ring.release(head)
            self.done.append((head, length))

    @property
    def used_idx(self) -> int:
        """How many were used so far, as in a split queue."""
        self._look()
        return (self.taken + len(self.done)) & 0xFFFF

    def take(self) -> tuple[int, int, bytes] | None:
        self._look()
        if not self.done:
            return None
        self.taken += 1
        head, length = self.done.pop(0)
        buffers = self.buffers.pop(head)
        assert length <= sum(n for _, n in buffers), f"{length} bytes used of {buffers}"
        data = b"".join(self.memory.read(addr, n) for addr, n in buffers)
        return head, length, data[:length]
