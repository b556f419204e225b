"""Split virtqueues, device side: virtio-v1.3 §2.7. Twin of native/ring_split.c.

Layout, all little-endian: descriptor {addr u64, len u32, flags u16, next u16} × size;
avail {flags u16, idx u16, ring u16 × size, used_event u16};
used {flags u16, idx u16, {id u32, len u32} × size, avail_event u16}.
"""

from __future__ import annotations

import struct

from vmm.devices.virtio.queue import DESC_F_INDIRECT, DESC_F_NEXT, Broken, Chain, Queue

AVAIL_F_NO_INTERRUPT = 1
USED_F_NO_NOTIFY = 1

_DESC = struct.Struct("<QIHH")
_USED = struct.Struct("<II")


class SplitQueue(Queue):
    """A descriptor table, a ring of heads for each direction."""

    def _areas(self) -> list[tuple[int, int, int]]:
        if self.size & (self.size - 1):
            raise ValueError("the size of a split queue is a power of two")
        return [
            (self._desc, 16 * self.size, 16),
            (self._avail, 6 + 2 * self.size, 2),
            (self._used, 6 + 8 * self.size, 4),
        ]

    def _go_on(self, avail_at: int, used_at: int) -> None:
        self._last_avail = self._avail_idx = avail_at
        self._used_idx = self._told_used = used_at

    @property
    def state(self) -> tuple[int, int]:
        return self._last_avail, self._used_idx

    def _take(self) -> Chain | None:
        if self._last_avail == self._avail_idx:
            self._avail_idx = self._memory.read_int(self._avail + 2, 2)
            if self._last_avail == self._avail_idx:
                return None
            if (self._avail_idx - self._last_avail) & 0xFFFF > self.size:
                raise Broken("idx_jump")
        at = self._avail + 4 + 2 * (self._last_avail % self.size)
        head = self._memory.read_int(at, 2)
        if head >= self.size:
            raise Broken("head_range")
        if head in self._inflight:
            raise Broken("head_inflight")
        chain = Chain(self._memory, head)
        self._walk(chain)
        self._inflight[head] = chain.write_len
        self._last_avail = (self._last_avail + 1) & 0xFFFF
        return chain

    def _walk(self, chain: Chain) -> None:
        table, entries, index, in_indirect = self._desc, self.size, chain.head, False
        while True:
            # Each descriptor is read once: the guest may change it at any time.
            addr, length, flags, following = _DESC.unpack(self._memory.read(table + 16 * index, 16))
            if flags & DESC_F_INDIRECT:
                self._check_indirect(addr, length, flags, in_indirect)
                table, entries, index, in_indirect = addr, length // 16, 0, True
                continue
            self._add_buffer(chain, addr, length, flags)
            if not flags & DESC_F_NEXT:
                return
            if following >= entries:
                raise Broken("next_range")
            index = following

    def _check_indirect(self, addr: int, length: int, flags: int, in_indirect: bool) -> None:
        """virtio-v1.3 §2.7.5.3."""
        if not self._indirect:
            raise Broken("indirect_off")
        if in_indirect:
            raise Broken("indirect_nest")
        if flags & DESC_F_NEXT:
            raise Broken("indirect_next")
        self._check_table(addr, length)

    def _use(self, head: int, written: int) -> None:
        entry = self._used + 4 + 8 * (self._used_idx % self.size)
        self._memory.write(entry, _USED.pack(head, written))
        self._used_idx = (self._used_idx + 1) & 0xFFFF
        # Every access goes through a C call that drops and takes the GIL: a full barrier.
        self._memory.write_int(self._used + 2, self._used_idx, 2)

    def should_notify(self) -> bool:
        """virtio-v1.3 §2.7.7."""
        now, old = self._used_idx, self._told_used
        if now == old:
            return False
        self._told_used = now
        if not self._event_idx:
            return not self._memory.read_int(self._avail, 2) & AVAIL_F_NO_INTERRUPT
        event = self._memory.read_int(self._avail + 4 + 2 * self.size, 2)
        return (now - event - 1) & 0xFFFF < (now - old) & 0xFFFF

    def enable_kicks(self) -> bool:
        """virtio-v1.3 §2.7.10."""
        if self._event_idx:
            self._memory.write_int(self._used + 4 + 8 * self.size, self._last_avail, 2)
        else:
            self._memory.write_int(self._used, 0, 2)
        return not self.broken and self._memory.read_int(self._avail + 2, 2) != self._last_avail

    def disable_kicks(self) -> None:
        if not self._event_idx:
            self._memory.write_int(self._used, USED_F_NO_NOTIFY, 2)
