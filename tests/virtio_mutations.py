"""Named ways to break a queue that was valid by construction: reference for every fuzz target."""

from __future__ import annotations

import struct
from collections.abc import Callable

from tests.virtio_ring import DriverRing
from vmm.devices.virtio.queue import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE


class Layout:
    """What a mutation may touch: the ring, its indirect tables, and where descriptors were put."""

    def __init__(self, ring: DriverRing) -> None:
        self.ring = ring
        self.heads: list[int] = []
        self.descs: list[int] = []  # address of each descriptor in use, also of those in tables

    def chain(
        self,
        readable: list[tuple[int, int]],
        writable: list[tuple[int, int]],
        *,
        indirect: int | None = None,
    ) -> int:
        """Offer a valid chain, and remember its descriptors."""
        head = self.ring.place(readable, writable, indirect=indirect)
        self.heads.append(head)
        self.descs += [self.ring.desc + 16 * slot for slot in self.ring.chains[head]]
        if indirect is not None:
            self.descs += [indirect + 16 * i for i in range(len(readable) + len(writable))]
        self.ring.publish(head)
        return head

    def mutate(self, name: str, which: int, n: int) -> None:
        desc = self.descs[which % len(self.descs)] if self.descs else self.ring.desc
        MUTATIONS[name](self, desc, n)

    def field(self, desc: int, fmt: str, offset: int, value: int) -> None:
        self.ring.memory.write(desc + offset, struct.pack(fmt, value))

    def addr(self, desc: int, value: int) -> None:
        self.field(desc, "<Q", 0, value & (1 << 64) - 1)

    def length(self, desc: int, value: int) -> None:
        self.field(desc, "<I", 8, value & 0xFFFFFFFF)

    def flags(self, desc: int, change: int) -> None:
        old = self.ring.memory.read_int(desc + self.ring.FLAGS, 2)
        self.field(desc, "<H", self.ring.FLAGS, old ^ change)

    def following(self, desc: int, value: int) -> None:
        """The index of the next descriptor; in a packed queue, the buffer id."""
        self.field(desc, "<H", self.ring.OTHER, value & 0xFFFF)

    def edge(self, at: int) -> int:
        """The end of RAM range ``at``."""
        r = self.ring.memory.ranges[at]
        return r.gpa + r.size


def next_self(lay: Layout, desc: int, n: int) -> None:
    """A descriptor of the queue's table that leads to itself; in an indirect table, to any; in a
    packed queue, to the one after it."""
    flags = lay.ring.memory.read_int(desc + lay.ring.FLAGS, 2)
    lay.field(desc, "<H", lay.ring.FLAGS, flags | DESC_F_NEXT)
    index = (desc - lay.ring.desc) // 16
    lay.following(desc, index if 0 <= index < lay.ring.size else n % lay.ring.size)


def dup_head(lay: Layout, desc: int, n: int) -> None:
    if lay.heads:
        lay.ring.publish(lay.heads[n % len(lay.heads)])


MUTATIONS: dict[str, Callable[[Layout, int, int], None]] = {
    "next_self": next_self,
    "next_far": lambda lay, d, n: lay.following(d, n),
    "flip_next": lambda lay, d, n: lay.flags(d, DESC_F_NEXT),
    "flip_write": lambda lay, d, n: lay.flags(d, DESC_F_WRITE),
    "flip_indirect": lambda lay, d, n: lay.flags(d, DESC_F_INDIRECT),
    "len_zero": lambda lay, d, n: lay.length(d, 0),
    "len_small": lambda lay, d, n: lay.length(d, n % 32),
    "len_max": lambda lay, d, n: lay.length(d, 0xFFFFFFFF - n % 16),
    "len_half": lambda lay, d, n: lay.length(d, 1 << 31),
    "indirect_len_odd": lambda lay, d, n: lay.length(d, n),
    "indirect_len_long": lambda lay, d, n: lay.length(d, 16 * (n % 64)),
    "addr_wrap": lambda lay, d, n: lay.addr(d, -(n % 64)),
    "addr_hole": lambda lay, d, n: lay.addr(d, lay.edge(0) - n % 64),
    "addr_high": lambda lay, d, n: lay.addr(d, lay.ring.memory.ranges[1].gpa - n % 64),
    "addr_end": lambda lay, d, n: lay.addr(d, lay.edge(1) - n % 64),
    "addr_mmio": lambda lay, d, n: lay.addr(d, 0xFEE00000 + n),
    "addr_ring": lambda lay, d, n: lay.addr(d, lay.ring.desc + n % 512),
    "flip_offer": lambda lay, d, n: lay.flags(d, (0x80, 0x8000, 0x8080)[n % 3]),
    "dup_head": dup_head,
    "head_far": lambda lay, d, n: lay.ring.publish(n),
    "idx_jump": lambda lay, d, n: lay.ring.jump(n % 40),
    "idx_back": lambda lay, d, n: lay.ring.back(1 + n % 40),
}
