"""The device side of a split virtqueue in Python: virtio-v1.3 §2.7.

This is the readable twin of native/ring.c: the same interface, the same order of checks and the
same verdicts; one test suite runs both. Devices written in Python use it, C devices use the other.

Layout, all little-endian: descriptor {addr u64, len u32, flags u16, next u16} × size;
avail {flags u16, idx u16, ring u16 × size, used_event u16};
used {flags u16, idx u16, {id u32, len u32} × size, avail_event u16}.
"""

from __future__ import annotations

import struct

from vmm.devices.virtio.device import F_EVENT_IDX, F_INDIRECT_DESC

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.memory import GuestMemory

DESC_F_NEXT = 1
DESC_F_WRITE = 2
DESC_F_INDIRECT = 4
AVAIL_F_NO_INTERRUPT = 1
USED_F_NO_NOTIFY = 1

MAX_SIZE = 32768

#: What breaks a queue, and what the driver did; the order is that of the enum in native/ring.h.
VERDICTS = {
    "empty": "there is no new chain",
    "chain": "a chain was taken",
    "idx_jump": "avail.idx moved by more than the queue size",
    "head_range": "an avail entry names a descriptor outside the table",
    "head_inflight": "a head was made available again before it was used",
    "next_range": "a descriptor's next is outside its table",
    "chain_long": "a chain is longer than the queue, or loops",
    "chain_bytes": "a chain holds more than 2^32 bytes",
    "len_zero": "a buffer is empty",
    "order": "a readable buffer follows a writable one",
    "addr": "a buffer is not wholly in RAM",
    "indirect_off": "an indirect descriptor without VIRTIO_F_INDIRECT_DESC",
    "indirect_nest": "an indirect descriptor inside an indirect table",
    "indirect_next": "an indirect descriptor with a next",
    "indirect_len": "an indirect table that is empty, ragged or longer than the queue",
    "indirect_addr": "an indirect table that is not wholly in RAM",
    "request": "a chain that lacks what every request to this device has",
}

_DESC = struct.Struct("<QIHH")
_USED = struct.Struct("<II")


class Chain:
    """One descriptor chain: (guest-physical address, length) of what the device may read and of
    what it may write. It is the device's from ``pop`` until ``push``."""

    __slots__ = ("_memory", "head", "read_len", "readable", "writable", "write_len")

    def __init__(self, memory: GuestMemory, head: int) -> None:
        self._memory = memory
        self.head = head
        self.readable: list[tuple[int, int]] = []
        self.writable: list[tuple[int, int]] = []
        self.read_len = 0
        self.write_len = 0

    def read(self, limit: int) -> bytes:
        """The first ``limit`` bytes that the driver sent, copied."""
        parts = []
        for gpa, size in self.readable:
            if limit <= 0:
                break
            parts.append(self._memory.read(gpa, min(size, limit)))
            limit -= size
        return b"".join(parts)

    def write(self, data: bytes, offset: int = 0) -> int:
        """Fill the driver's buffers from byte ``offset`` on; returns how much had room."""
        done = 0
        for gpa, size in self.writable:
            if offset >= size:
                offset -= size
                continue
            part = data[done : done + size - offset]
            if not part:
                break
            self._memory.write(gpa + offset, part)
            done += len(part)
            offset = 0
        return done


class _Broken(Exception):
    """Carries a verdict from the walk to ``pop``."""


class Queue:
    """One queue, from addresses that the transport has frozen. Addresses are guest-physical,
    ``features`` the negotiated ones as a bit mask, ``at`` the avail and used indices where a
    saved queue goes on. One thread at a time uses it.

    Raises ValueError when the size is not a power of two up to 32768, when a part is not aligned
    (16, 2 and 4 bytes) or not wholly in RAM.
    """

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        desc: int,
        avail: int,
        used: int,
        features: int,
        at: tuple[int, int] = (0, 0),
    ) -> None:
        if not 0 < size <= MAX_SIZE or size & (size - 1) or desc % 16 or avail % 2 or used % 4:
            raise ValueError("a queue needs a power of two as size and aligned parts")
        for gpa, length in ((desc, 16 * size), (avail, 6 + 2 * size), (used, 6 + 8 * size)):
            if not memory.contains(gpa, length):
                raise ValueError("a part of the queue is not in RAM")
        self._memory = memory
        self.size = size
        self._desc, self._avail, self._used = desc, avail, used
        self._event_idx = bool(features >> F_EVENT_IDX & 1)
        self._indirect = bool(features >> F_INDIRECT_DESC & 1)
        self._last_avail = self._avail_idx = at[0]
        self._used_idx = self._told_used = at[1]
        self._inflight: dict[int, int] = {}
        #: The verdict of the last ``pop``; once it is neither 'empty' nor 'chain' it stays.
        self.verdict = "empty"

    @property
    def broken(self) -> bool:
        return self.verdict not in ("empty", "chain")

    @property
    def inflight(self) -> int:
        """Chains that were popped and not yet pushed."""
        return len(self._inflight)

    def pop(self) -> Chain | None:
        """The next chain, or None: nothing there, or the queue is broken; see ``verdict``."""
        if self.broken:
            return None
        if self._last_avail == self._avail_idx:
            self._avail_idx = self._memory.read_int(self._avail + 2, 2)
            if self._last_avail == self._avail_idx:
                self.verdict = "empty"
                return None
            if (self._avail_idx - self._last_avail) & 0xFFFF > self.size:
                self.verdict = "idx_jump"
                return None
        try:
            chain = self._take()
        except _Broken as e:
            self.verdict = str(e)
            return None
        self._inflight[chain.head] = chain.write_len
        self._last_avail = (self._last_avail + 1) & 0xFFFF
        self.verdict = "chain"
        return chain

    def _take(self) -> Chain:
        at = self._avail + 4 + 2 * (self._last_avail % self.size)
        head = self._memory.read_int(at, 2)
        if head >= self.size:
            raise _Broken("head_range")
        if head in self._inflight:
            raise _Broken("head_inflight")
        chain = Chain(self._memory, head)
        table, entries, index, in_indirect = self._desc, self.size, head, False
        while True:
            # Each descriptor is read once: the guest may change it at any time.
            addr, length, flags, following = _DESC.unpack(self._memory.read(table + 16 * index, 16))
            if flags & DESC_F_INDIRECT:
                self._check_indirect(addr, length, flags, in_indirect)
                table, entries, index, in_indirect = addr, length // 16, 0, True
                continue
            self._add_buffer(chain, addr, length, flags)
            if not flags & DESC_F_NEXT:
                return chain
            if following >= entries:
                raise _Broken("next_range")
            index = following

    def _check_indirect(self, addr: int, length: int, flags: int, in_indirect: bool) -> None:
        """virtio-v1.3 §2.7.5.3."""
        if not self._indirect:
            raise _Broken("indirect_off")
        if in_indirect:
            raise _Broken("indirect_nest")
        if flags & DESC_F_NEXT:
            raise _Broken("indirect_next")
        if not length or length % 16 or length // 16 > self.size:
            raise _Broken("indirect_len")
        if not self._memory.contains(addr, length):
            raise _Broken("indirect_addr")

    def _add_buffer(self, chain: Chain, addr: int, length: int, flags: int) -> None:
        if len(chain.readable) + len(chain.writable) == self.size:
            raise _Broken("chain_long")  # which is also how a loop ends
        if not length:
            raise _Broken("len_zero")
        if not flags & DESC_F_WRITE and chain.writable:
            raise _Broken("order")
        if not self._memory.contains(addr, length):
            raise _Broken("addr")
        if flags & DESC_F_WRITE:
            chain.writable.append((addr, length))
            chain.write_len += length
        else:
            chain.readable.append((addr, length))
            chain.read_len += length
        if chain.read_len + chain.write_len > 1 << 32:
            raise _Broken("chain_bytes")

    def push(self, chain: Chain, written: int) -> None:
        """Give a chain back with ``written`` bytes of it filled. Each head completes once."""
        room = self._inflight.pop(chain.head, None)
        if room is None:
            return
        entry = self._used + 4 + 8 * (self._used_idx % self.size)
        self._memory.write(entry, _USED.pack(chain.head, min(written, room, 0xFFFFFFFF)))
        self._used_idx = (self._used_idx + 1) & 0xFFFF
        # Every access goes through a C call that drops and takes the GIL: a full barrier.
        self._memory.write_int(self._used + 2, self._used_idx, 2)

    def should_notify(self) -> bool:
        """Whether the driver wants an interrupt for what was pushed since this was last asked.
        virtio-v1.3 §2.7.7."""
        now, old = self._used_idx, self._told_used
        if now == old:
            return False
        self._told_used = now
        if not self._event_idx:
            return not self._memory.read_int(self._avail, 2) & AVAIL_F_NO_INTERRUPT
        event = self._memory.read_int(self._avail + 4 + 2 * self.size, 2)
        return (now - event - 1) & 0xFFFF < (now - old) & 0xFFFF

    def enable_kicks(self) -> bool:
        """Ask the driver for kicks again; True when a chain came meanwhile and no kick will tell.
        virtio-v1.3 §2.7.10."""
        if self._event_idx:
            self._memory.write_int(self._used + 4 + 8 * self.size, self._last_avail, 2)
        else:
            self._memory.write_int(self._used, 0, 2)
        return not self.broken and self._memory.read_int(self._avail + 2, 2) != self._last_avail

    def refuse(self) -> None:
        """The device cannot make sense of a chain: the queue is broken."""
        if not self.broken:
            self.verdict = "request"

    def disable_kicks(self) -> None:
        """Ask the driver not to kick; with EVENT_IDX, leaving avail_event behind does it."""
        if not self._event_idx:
            self._memory.write_int(self._used, USED_F_NO_NOTIFY, 2)
