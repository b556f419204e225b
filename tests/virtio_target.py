"""One device under generated queues: a driver whose rings are right but for one, and an oracle for
what the device may do with that one. For devices of several queues; the mutations are in
tests/virtio_mutations.py."""

from __future__ import annotations

import time

from tests.virtio_mock import DRIVER_OK, FEATURES_OK, NEEDS_RESET
from tests.virtio_mutations import MUTATIONS
from tests.virtio_rig import Rig
from tests.virtio_ring import INDIRECT, DriverRing, device_side
from vmm.memory import GuestMemory

#: The ring under test has SIZE descriptors and lies at 0, its tables and buffers behind it; what
#: the other queues use is from ANSWERS to END.
SIZE = 16
TABLES, BUFFERS, ANSWERS, END = 0x4000, 0x8000, 0x4_0000, 0x8_0000
#: A buffer that is the ring itself is allowed, but nothing can be said about what comes next.
NAMES = sorted(set(MUTATIONS) - {"addr_ring"})


class Target:
    """Owns the shadow memory, not the rig."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.shadow = GuestMemory([(r.gpa, r.size) for r in rig.memory.ranges])

    def ring(self) -> DriverRing:
        """A queue of SIZE, which no device looks at yet."""
        self.rig.driver.reset()
        self.rig.driver.negotiate()
        self.rig.memory.write(0, bytes(END))
        return DriverRing(self.rig.memory, SIZE)

    def start(self, ring: DriverRing, queue: int, rooms: dict[int, int]) -> None:
        """``ring`` is the queue under test, the others are as they should be, with buffers of so
        many bytes in those that ``rooms`` names."""
        driver = self.rig.driver
        driver.next = ANSWERS
        for index in range(len(self.rig.device.QUEUE_SIZES)):
            if index != queue:
                size = min(32, driver.regs.queue_max(index))
                driver.setup_queue(index, size)
                for _ in range(size if index in rooms else 0):
                    driver.queues[index].add([], [rooms[index]])
        self.rig.regs.set_queue(queue, SIZE, ring.desc, ring.avail, ring.used)
        assert self.rig.regs.enable(queue)
        self.rig.regs.status = 3 | FEATURES_OK | DRIVER_OK
        self.rig.regs.notify(queue)

    @property
    def broken(self) -> bool:
        return bool(self.rig.regs.status & NEEDS_RESET)

    def foresee(self, ring: DriverRing) -> tuple[dict[int, int], list[tuple[int, int]], str]:
        """What the Python twin takes from a copy of the memory: room by head, what is writable,
        and the verdict."""
        for r in ring.memory.ranges:
            self.shadow.write(r.gpa, ring.memory.view(r.gpa, r.size))
        mirror = DriverRing.__new__(DriverRing)
        mirror.__dict__.update(ring.__dict__)
        mirror.memory = self.shadow
        mirror.avail_idx = mirror.used_idx = 0
        q = device_side("python", mirror, INDIRECT)
        room: dict[int, int] = {}
        writable: list[tuple[int, int]] = []
        while (chain := q.pop()) is not None:
            room[chain.head] = max(room.get(chain.head, 0), chain.write_len)
            writable += chain.writable
            q.push(chain, 0)
        return room, writable, q.verdict

    def finish(
        self, ring: DriverRing, room: dict[int, int], allowed: list[tuple[int, int]]
    ) -> None:
        """After a reset: used lengths fit, nothing else was written, nothing is left."""
        self.rig.regs.status = 0
        count = ring.memory.read_int(ring.used + 2, 2)
        for i in range(min(count, SIZE)):
            head = ring.memory.read_int(ring.used + 4 + 8 * i, 4)
            assert ring.memory.read_int(ring.used + 8 + 8 * i, 4) <= room[head]
        allowed = [*allowed, (ring.used, ring.end - ring.used), (ANSWERS, END - ANSWERS)]
        for r in ring.memory.ranges:
            now, old = bytearray(ring.memory.read(r.gpa, r.size)), self.shadow.read(r.gpa, r.size)
            for gpa, size in allowed:
                if r.gpa <= gpa < r.gpa + r.size:
                    now[gpa - r.gpa : gpa - r.gpa + size] = old[gpa - r.gpa : gpa - r.gpa + size]
            assert now == old, "the device wrote where it was given nothing to write"

    def settle(self, ring: DriverRing) -> None:
        """Until all is taken or a reset is asked for."""
        deadline = time.monotonic() + 5
        while not self.broken and ring.memory.read_int(ring.used + 2, 2) != ring.avail_idx:
            assert time.monotonic() < deadline, "neither an answer nor DEVICE_NEEDS_RESET"
            time.sleep(0.0002)

    def close(self) -> None:
        self.shadow.close()
