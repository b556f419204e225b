"""Packed virtqueues, device side: virtio-v1.3 §2.8. Twin of native/ring_packed.c.

Layout, all little-endian: descriptor {addr u64, len u32, id u16, flags u16} × size, in which the
driver's and the device's follow each other round; and for each side an event suppression structure
{desc u16 (offset, and in bit 15 the wrap counter), flags u16}, by which it says what it wants to
hear of.
"""

from __future__ import annotations

import struct

from vmm._native import lib
from vmm.devices.virtio.queue import (
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    Broken,
    Chain,
    Queue,
)

DESC_F_AVAIL = 1 << 7
DESC_F_USED = 1 << 15
EVENT_ENABLE, EVENT_DISABLE, EVENT_DESC = 0, 1, 2
#: In an event suppression structure, beside an offset.
EVENT_WRAP = 1 << 15
#: In ``state``, beside a position: its wrap counter is 0.
LAPPED = int(lib.VMM_VQ_LAPPED)

_DESC = struct.Struct("<QIHH")
#: The half that says whether a descriptor is the driver's or the device's.
_REST = struct.Struct("<IHH")


def available(flags: int, wrap: bool) -> bool:
    """Whether a descriptor with these flags is the driver's offer of this lap."""
    return flags & (DESC_F_AVAIL | DESC_F_USED) == (DESC_F_AVAIL if wrap else DESC_F_USED)


class PackedQueue(Queue):
    """One ring of descriptors, written by both sides."""

    def _areas(self) -> list[tuple[int, int, int]]:
        return [(self._desc, 16 * self.size, 16), (self._avail, 4, 4), (self._used, 4, 4)]

    def _go_on(self, avail_at: int, used_at: int) -> None:
        self._avail_at, self._used_at = avail_at & ~LAPPED, used_at & ~LAPPED
        self._avail_wrap, self._used_wrap = not avail_at & LAPPED, not used_at & LAPPED
        if max(self._avail_at, self._used_at) >= self.size:
            raise ValueError("a queue cannot go on past its end")
        #: Descriptors of each chain in flight, by buffer id, and of those used but not yet told.
        self._taken: dict[int, int] = {}
        self._untold = 0

    @property
    def state(self) -> tuple[int, int]:
        avail = self._avail_at | (0 if self._avail_wrap else LAPPED)
        return avail, self._used_at | (0 if self._used_wrap else LAPPED)

    def _read(self, at: int) -> tuple[int, int, int, int]:
        """A descriptor: each half read once, first the one that says what the other is worth."""
        gpa = self._desc + 16 * at
        length, ident, flags = _REST.unpack(self._memory.read(gpa + 8, 8))
        return self._memory.read_int(gpa, 8), length, ident, flags

    def _take(self) -> Chain | None:
        first = self._read(self._avail_at)
        if not available(first[3], self._avail_wrap):
            return None
        if sum(self._taken.values()) == self.size:
            raise Broken("idx_jump")
        chain = Chain(self._memory, 0)
        taken = self._walk(chain, first)
        if chain.head >= self.size:
            raise Broken("head_range")
        if chain.head in self._inflight:
            raise Broken("head_inflight")
        self._inflight[chain.head] = chain.write_len
        self._taken[chain.head] = taken
        self._avail_at += taken
        if self._avail_at >= self.size:
            self._avail_at -= self.size
            self._avail_wrap = not self._avail_wrap
        return chain

    def _walk(self, chain: Chain, desc: tuple[int, int, int, int]) -> int:
        """Gathers a chain and its buffer id, which is the last descriptor's; returns how many
        descriptors of the ring it takes."""
        room = self.size - sum(self._taken.values())
        taken = 1
        while True:
            addr, length, chain.head, flags = desc
            if flags & DESC_F_INDIRECT:
                if not self._indirect:
                    raise Broken("indirect_off")
                if taken > 1 or flags & DESC_F_NEXT:
                    raise Broken("indirect_next")
                self._walk_table(chain, addr, length)
                return taken
            self._add_buffer(chain, addr, length, flags)
            if not flags & DESC_F_NEXT:
                return taken
            if taken == room:
                raise Broken("chain_long")  # what comes next is the device's already
            desc = self._read((self._avail_at + taken) % self.size)
            taken += 1

    def _walk_table(self, chain: Chain, addr: int, length: int) -> None:
        """The descriptors of a table are in order, and no flag but WRITE means anything in them:
        virtio-v1.3 §2.8.7."""
        self._check_table(addr, length)
        for at in range(addr, addr + length, 16):
            buffer, size, _, flags = _DESC.unpack(self._memory.read(at, 16))
            self._add_buffer(chain, buffer, size, flags & DESC_F_WRITE)

    def _use(self, head: int, written: int) -> None:
        flags = DESC_F_AVAIL | DESC_F_USED if self._used_wrap else 0
        flags |= DESC_F_WRITE if written else 0
        taken = self._taken.pop(head)
        self._untold += taken
        # Every access goes through a C call that drops and takes the GIL: a full barrier.
        self._memory.write(self._desc + 16 * self._used_at + 8, _REST.pack(written, head, flags))
        self._used_at += taken
        if self._used_at >= self.size:
            self._used_at -= self.size
            self._used_wrap = not self._used_wrap

    def should_notify(self) -> bool:
        """virtio-v1.3 §2.8.9."""
        untold, self._untold = self._untold, 0
        if not untold:
            return False
        event = self._memory.read_int(self._avail, 4)
        want = event >> 16 & 3
        if want != EVENT_DESC or not self._event_idx:
            return want != EVENT_DISABLE
        if untold >= self.size:
            return True
        at = event & (EVENT_WRAP - 1)
        if bool(event & EVENT_WRAP) != self._used_wrap:
            at -= self.size  # of the lap before
        return self._used_at - untold <= at < self._used_at

    def enable_kicks(self) -> bool:
        if self._event_idx:
            place = self._avail_at | (EVENT_WRAP if self._avail_wrap else 0)
            self._memory.write_int(self._used, place | EVENT_DESC << 16, 4)
        else:
            self._memory.write_int(self._used, EVENT_ENABLE << 16, 4)
        flags = self._memory.read_int(self._desc + 16 * self._avail_at + 14, 2)
        return not self.broken and available(flags, self._avail_wrap)

    def disable_kicks(self) -> None:
        if not self._event_idx:
            self._memory.write_int(self._used, EVENT_DISABLE << 16, 4)
