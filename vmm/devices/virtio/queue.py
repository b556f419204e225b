"""The device side of a virtqueue in Python, of either format: virtio-v1.3 §2.7, §2.8.

This is the readable twin of native/ring.h: the same interface, the same order of checks and the
same verdicts; one test suite runs both. Devices written in Python use it, C devices use the other.
The formats themselves are in split.py and packed.py.
"""

from __future__ import annotations

from vmm.devices.virtio.device import F_EVENT_IDX, F_INDIRECT_DESC, F_RING_PACKED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Self

    from vmm.memory import GuestMemory

DESC_F_NEXT = 1
DESC_F_WRITE = 2
DESC_F_INDIRECT = 4

MAX_SIZE = 32768

#: What breaks a queue, and what the driver did; the order is that of the enum in native/ring.h.
VERDICTS = {
    "empty": "there is no new chain",
    "chain": "a chain was taken",
    "idx_jump": "more was made available than the queue holds",
    "head_range": "a head, or buffer id, that is not below the queue's size",
    "head_inflight": "a head, or buffer id, was made available again before it was used",
    "next_range": "a descriptor's next is outside its table",
    "chain_long": "a chain is longer than the queue, or loops",
    "chain_bytes": "a chain holds more than 2^32 bytes",
    "len_zero": "a buffer is empty",
    "order": "a readable buffer follows a writable one",
    "addr": "a buffer is not wholly in RAM",
    "indirect_off": "an indirect descriptor without VIRTIO_F_INDIRECT_DESC",
    "indirect_nest": "an indirect descriptor inside an indirect table",
    "indirect_next": "an indirect descriptor with a next, or (packed) after another",
    "indirect_len": "an indirect table that is empty, ragged or longer than the queue",
    "indirect_addr": "an indirect table that is not wholly in RAM",
    "request": "a chain that lacks what every request to this device has",
}


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


class Broken(Exception):
    """Carries a verdict from a walk to ``pop``."""


class Queue:
    """One queue, from addresses that the transport has frozen. Addresses are guest-physical:
    ``desc``, ``avail``, ``used`` are descriptor, driver and device area; ``features`` the
    negotiated ones as a bit mask, of which RING_PACKED decides the format (the object is then a
    PackedQueue, otherwise a SplitQueue). ``at``: (0, 0), or the ``state`` of a saved queue, to go
    on there. One thread at a time uses it.

    Raises ValueError when the size is not up to 32768 and, if split, a power of two; when an area
    is not aligned or not wholly in RAM.
    """

    def __new__(
        cls,
        memory: GuestMemory,
        size: int,
        desc: int,
        avail: int,
        used: int,
        features: int,
        at: tuple[int, int] = (0, 0),
    ) -> Self:
        if cls is not Queue:
            return super().__new__(cls)
        from vmm.devices.virtio.packed import PackedQueue
        from vmm.devices.virtio.split import SplitQueue

        kind: Any = PackedQueue if features >> F_RING_PACKED & 1 else SplitQueue
        made: Self = super().__new__(kind)
        return made

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
        self._memory = memory
        self.size = size
        self._desc, self._avail, self._used = desc, avail, used
        if not 0 < size <= MAX_SIZE:
            raise ValueError("a queue has 1 to 32768 entries")
        for gpa, length, align in self._areas():
            if gpa % align or not memory.contains(gpa, length):
                raise ValueError("an area of the queue is not aligned or not in RAM")
        self._event_idx = bool(features >> F_EVENT_IDX & 1)
        self._indirect = bool(features >> F_INDIRECT_DESC & 1)
        #: Room in each chain in flight, by head.
        self._inflight: dict[int, int] = {}
        #: The verdict of the last ``pop``; once it is neither 'empty' nor 'chain' it stays.
        self.verdict = "empty"
        self._go_on(*at)

    @property
    def broken(self) -> bool:
        return self.verdict not in ("empty", "chain")

    @property
    def inflight(self) -> int:
        """Chains that were popped and not yet pushed."""
        return len(self._inflight)

    @property
    def state(self) -> tuple[int, int]:
        """Where it stands, to go on there later; nothing may be in flight."""
        raise NotImplementedError

    def pop(self) -> Chain | None:
        """The next chain, or None: nothing there, or the queue is broken; see ``verdict``."""
        if self.broken:
            return None
        try:
            chain = self._take()
        except Broken as e:
            self.verdict = str(e)
            return None
        self.verdict = "empty" if chain is None else "chain"
        return chain

    def push(self, chain: Chain, written: int) -> None:
        """Give a chain back with ``written`` bytes of it filled. Each head completes once."""
        room = self._inflight.pop(chain.head, None)
        if room is not None:
            self._use(chain.head, min(written, room, 0xFFFFFFFF))

    def should_notify(self) -> bool:
        """Whether the driver wants an interrupt for what was pushed since this was last asked."""
        raise NotImplementedError

    def enable_kicks(self) -> bool:
        """Ask the driver for kicks again; True when a chain came meanwhile and no kick will
        tell."""
        raise NotImplementedError

    def disable_kicks(self) -> None:
        """Ask the driver not to kick; with EVENT_IDX, leaving the place behind does it."""
        raise NotImplementedError

    def refuse(self) -> None:
        """The device cannot make sense of a chain: the queue is broken."""
        if not self.broken:
            self.verdict = "request"

    # ---- what a format fills in ----------------------------------------------------------------

    def _areas(self) -> list[tuple[int, int, int]]:
        """Address, length and alignment of each area."""
        raise NotImplementedError

    def _go_on(self, avail_at: int, used_at: int) -> None:
        raise NotImplementedError

    def _take(self) -> Chain | None:
        """The next chain, which is in flight then. Raises Broken."""
        raise NotImplementedError

    def _use(self, head: int, written: int) -> None:
        """Tell the driver that a chain is done."""
        raise NotImplementedError

    # ---- what is checked about a buffer whichever way it was described ---------------------------

    def _check_table(self, addr: int, length: int) -> None:
        """virtio-v1.3 §2.7.5.3."""
        if not length or length % 16 or length // 16 > self.size:
            raise Broken("indirect_len")
        if not self._memory.contains(addr, length):
            raise Broken("indirect_addr")

    def _add_buffer(self, chain: Chain, addr: int, length: int, flags: int) -> None:
        if len(chain.readable) + len(chain.writable) == self.size:
            raise Broken("chain_long")  # which is also how a loop ends
        if not length:
            raise Broken("len_zero")
        if not flags & DESC_F_WRITE and chain.writable:
            raise Broken("order")
        if not self._memory.contains(addr, length):
            raise Broken("addr")
        if flags & DESC_F_WRITE:
            chain.writable.append((addr, length))
            chain.write_len += length
        else:
            chain.readable.append((addr, length))
            chain.read_len += length
        if chain.read_len + chain.write_len > 1 << 32:
            raise Broken("chain_bytes")
