"""The driver's side of a virtqueue, and both device sides behind one interface."""

from __future__ import annotations

import struct
from typing import Any, ClassVar

from vmm._native import ffi, lib
from vmm.devices.virtio.device import F_EVENT_IDX, F_INDIRECT_DESC, F_RING_PACKED
from vmm.devices.virtio.packed import (
    DESC_F_AVAIL,
    DESC_F_USED,
    EVENT_DESC,
    EVENT_WRAP,
    LAPPED,
)
from vmm.devices.virtio.queue import (
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    Chain,
    Queue,
)
from vmm.memory import GuestMemory

EVENT_IDX = 1 << F_EVENT_IDX
INDIRECT = 1 << F_INDIRECT_DESC
PACKED = 1 << F_RING_PACKED

_DESC = struct.Struct("<QIHH").pack
#: What a lap leaves of a packed descriptor.
_USED_DESC = struct.pack("<14xH", DESC_F_AVAIL | DESC_F_USED)

Buffers = list[tuple[int, int]]


class DriverRing:
    """What a driver does, right or (through the raw methods) wrong, with a split queue. Its areas
    lie from ``base`` on."""

    #: Feature bits this format needs.
    FEATURES: ClassVar[int] = 0
    #: Where in a descriptor its flags, and what they go with (next, or the buffer id), lie.
    FLAGS: ClassVar[int] = 12
    OTHER: ClassVar[int] = 14

    def __init__(self, memory: GuestMemory, size: int, base: int = 0x1000, *, at: int = 0) -> None:
        """``at``: how many chains went through it before."""
        self.memory = memory
        self.size = size
        self.desc = base
        self.free = list(range(size))
        self.chains: dict[int, list[int]] = {}
        self._lay_out(base, at)

    def _lay_out(self, base: int, at: int) -> None:
        self.avail = (base + 16 * self.size + 1) & ~1
        self.used = (self.avail + 6 + 2 * self.size + 3) & ~3
        self.end = self.used + 6 + 8 * self.size
        self.avail_idx = self.used_idx = at & 0xFFFF
        self.memory.write(base, bytes(self.end - base))
        self.memory.write_int(self.avail + 2, self.avail_idx, 2)
        self.memory.write_int(self.used + 2, self.used_idx, 2)

    @property
    def state(self) -> tuple[int, int]:
        """Where the device goes on."""
        return self.avail_idx, self.used_idx

    @property
    def device_writes(self) -> list[tuple[int, int]]:
        """Address and length of what the device may write of the queue itself."""
        return [(self.used, self.end - self.used)]

    # ---- raw -------------------------------------------------------------------------------

    def set_desc(
        self, index: int, addr: int, length: int, flags: int = 0, following: int = 0
    ) -> None:
        self.set_desc_at(self.desc, index, addr, length, flags, following)

    def set_desc_at(
        self, table: int, index: int, addr: int, length: int, flags: int, following: int
    ) -> None:
        self.memory.write(table + 16 * index, _DESC(addr, length, flags, following))

    def publish(self, head: int) -> None:
        """One avail entry and the index that shows it."""
        self.memory.write_int(self.avail + 4 + 2 * (self.avail_idx % self.size), head, 2)
        self.set_avail_idx(self.avail_idx + 1)

    def set_avail_idx(self, value: int) -> None:
        self.avail_idx = value & 0xFFFF
        self.memory.write_int(self.avail + 2, self.avail_idx, 2)

    def jump(self, n: int) -> None:
        """Show ``n`` entries more than were written."""
        self.set_avail_idx(self.avail_idx + n)

    def back(self, n: int) -> None:
        self.set_avail_idx(self.avail_idx - n)

    def want_interrupts(self, wanted: bool) -> None:
        self.memory.write_int(self.avail, 0 if wanted else 1, 2)

    def want_interrupt_after(self, n: int) -> None:
        """One, when the n-th descriptor from now on (counting from 0) is used. EVENT_IDX."""
        self.memory.write_int(self.avail + 4 + 2 * self.size, (self.used_idx + n) & 0xFFFF, 2)

    def wants_kick(self, event_idx: bool) -> bool:
        """Whether the device asked for a kick when the next chain is added."""
        if event_idx:
            return self.memory.read_int(self.used + 4 + 8 * self.size, 2) == self.avail_idx
        return self.memory.read_int(self.used, 2) == 0

    # ---- as a good driver ------------------------------------------------------------------

    def table(self, at: int, parts: list[tuple[int, int, int]]) -> tuple[int, int, int]:
        """Writes an indirect table; returns the descriptor that leads to it."""
        for i, (addr, length, flags) in enumerate(parts):
            more = DESC_F_NEXT if i + 1 < len(parts) else 0
            self.set_desc_at(at, i, addr, length, flags | more, i + 1)
        return at, 16 * len(parts), DESC_F_INDIRECT

    def place(self, readable: Buffers, writable: Buffers, *, indirect: int | None = None) -> int:
        """Write a chain's descriptors, in the indirect table at ``indirect`` if given; returns
        the head, which is not yet published."""
        parts = [(a, n, 0) for a, n in readable] + [(a, n, DESC_F_WRITE) for a, n in writable]
        if indirect is not None:
            parts = [self.table(indirect, parts)]
        return self.lay(parts)

    def lay(self, parts: list[tuple[int, int, int]]) -> int:
        slots = [self.free.pop(0) for _ in parts]
        for i, (addr, length, flags) in enumerate(parts):
            last = i + 1 == len(parts)
            following = 0 if last else slots[i + 1]
            self.set_desc(slots[i], addr, length, flags | (0 if last else DESC_F_NEXT), following)
        self.chains[slots[0]] = slots
        return slots[0]

    def add(self, readable: Buffers, writable: Buffers, *, indirect: int | None = None) -> int:
        head = self.place(readable, writable, indirect=indirect)
        self.publish(head)
        return head

    def used_entries(self) -> list[tuple[int, int]]:
        """(head, written) of all that was used since the last call."""
        done: list[tuple[int, int]] = []
        now = self.memory.read_int(self.used + 2, 2)
        while self.used_idx != now:
            at = self.used + 4 + 8 * (self.used_idx % self.size)
            head, written = struct.unpack("<II", self.memory.read(at, 8))
            self.used_idx = (self.used_idx + 1) & 0xFFFF
            done.append((head, written))
        return done

    def reap(self) -> list[tuple[int, int]]:
        """(head, written) of what completed since the last call; each must be a head of ours."""
        done = self.used_entries()
        for head, _ in done:
            self.free += self.release(head)
        return done

    def release(self, head: int) -> list[int]:
        """Forgets a chain; what of ``free`` it took."""
        return self.chains.pop(head)


class PackedRing(DriverRing):
    """The same with a packed queue. A head is a buffer id; ``chains`` has the places in the ring
    of its descriptors."""

    FEATURES: ClassVar[int] = PACKED
    FLAGS: ClassVar[int] = 14
    OTHER: ClassVar[int] = 12

    def _lay_out(self, base: int, at: int) -> None:
        self.avail = base + 16 * self.size  # what the driver wants to hear of
        self.used = self.avail + 4  # what the device does
        self.end = self.used + 4
        self.pos, self.wrap = at % self.size, at // self.size % 2 == 0
        self.used_pos, self.used_wrap = self.pos, self.wrap
        self._waiting: dict[int, tuple[int, int]] = {}
        self._ids: dict[int, list[int]] = {}
        # As the last lap left it.
        new, old = (_USED_DESC, bytes(16)) if self.wrap else (bytes(16), _USED_DESC)
        self.memory.write(base, new * self.pos + old * (self.size - self.pos) + bytes(8))

    @property
    def state(self) -> tuple[int, int]:
        lap = 0 if self.wrap else LAPPED
        return self.pos | lap, self.used_pos | (0 if self.used_wrap else LAPPED)

    @property
    def device_writes(self) -> list[tuple[int, int]]:
        return [(self.desc + 16 * i + 8, 8) for i in range(self.size)] + [(self.used, 4)]

    def place_of(self, slot: int) -> int:
        return self.desc + 16 * slot

    def _offer_bits(self, wrap: bool) -> int:
        return DESC_F_AVAIL if wrap else DESC_F_USED

    def _step(self) -> int:
        """The next place, with what goes there still to be written."""
        at = self.pos
        self.pos += 1
        if self.pos == self.size:
            self.pos, self.wrap = 0, not self.wrap
        return at

    def set_desc_at(
        self, table: int, index: int, addr: int, length: int, flags: int, following: int
    ) -> None:
        self.memory.write(table + 16 * index, _DESC(addr, length, following & 0xFFFF, flags))

    def raw(self, addr: int, length: int, flags: int = 0, ident: int = 0) -> int:
        """One descriptor, offered; returns its place."""
        bits = self._offer_bits(self.wrap)
        at = self._step()
        self.set_desc(at, addr, length, flags | bits, ident)
        return at

    def table(self, at: int, parts: list[tuple[int, int, int]]) -> tuple[int, int, int]:
        for i, (addr, length, flags) in enumerate(parts):
            self.set_desc_at(at, i, addr, length, flags, 0)
        return at, 16 * len(parts), DESC_F_INDIRECT

    def lay(self, parts: list[tuple[int, int, int]]) -> int:
        ident = self.free.pop(0)
        # As many ids as places, so that what is free counts both.
        self._ids[ident] = [ident, *(self.free.pop() for _ in parts[1:])]
        slots: list[int] = []
        for i, (addr, length, flags) in enumerate(parts):
            flags |= self._offer_bits(self.wrap) | (DESC_F_NEXT if i + 1 < len(parts) else 0)
            slots.append(self._step())
            if i == 0:
                self._waiting[ident] = (slots[0], flags)
                old = self.memory.read_int(self.place_of(slots[0]) + 14, 2)
                self.set_desc(slots[0], addr, length, old, ident)
            else:
                self.set_desc(slots[i], addr, length, flags, ident)
        self.chains[ident] = slots
        return ident

    def publish(self, head: int) -> None:
        """The flags of the first descriptor; for what was published before, all of it once more;
        for an id that was never placed, a chain of its own."""
        if head in self._waiting:
            at, flags = self._waiting.pop(head)
            self.memory.write_int(self.place_of(at) + 14, flags, 2)
        elif head in self.chains:
            for slot in self.chains[head]:
                desc = struct.unpack("<QIHH", self.memory.read(self.place_of(slot), 16))
                self.raw(desc[0], desc[1], desc[3] & 7, head)
        else:
            self.raw(self.desc, 16, 0, head)

    def jump(self, n: int) -> None:
        for _ in range(n):
            bits = self._offer_bits(self.wrap)
            at = self.place_of(self._step()) + 14
            old = self.memory.read_int(at, 2) & ~(DESC_F_AVAIL | DESC_F_USED)
            self.memory.write_int(at, old | bits, 2)

    def back(self, n: int) -> None:
        """The next descriptors as if no lap had begun since: offered of the other lap."""
        for i in range(n % self.size + 1):
            at = self.place_of((self.pos + i) % self.size) + 14
            self.memory.write_int(at, self._offer_bits(not self.wrap), 2)

    def release(self, head: int) -> list[int]:
        del self.chains[head]
        return self._ids.pop(head)

    def want_interrupts(self, wanted: bool) -> None:
        self.memory.write_int(self.avail, 0 if wanted else 1 << 16, 4)

    def want_interrupt_after(self, n: int) -> None:
        at = self.used_pos + n
        wrap = self.used_wrap ^ (at >= self.size)
        event = at % self.size | (EVENT_WRAP if wrap else 0)
        self.memory.write_int(self.avail, event | EVENT_DESC << 16, 4)

    def wants_kick(self, event_idx: bool) -> bool:
        event = self.memory.read_int(self.used, 4)
        if event_idx:
            return event == self.pos | (EVENT_WRAP if self.wrap else 0) | EVENT_DESC << 16
        return event >> 16 == 0

    def used_entries(self) -> list[tuple[int, int]]:
        done: list[tuple[int, int]] = []
        while True:
            length, ident, flags = struct.unpack(
                "<IHH", self.memory.read(self.place_of(self.used_pos) + 8, 8)
            )
            both = DESC_F_AVAIL | DESC_F_USED if self.used_wrap else 0
            if flags & (DESC_F_AVAIL | DESC_F_USED) != both:
                return done
            assert bool(flags & DESC_F_WRITE) == bool(length)
            done.append((ident, length))
            self.used_pos += len(self.chains.get(ident, [0]))
            if self.used_pos >= self.size:
                self.used_pos -= self.size
                self.used_wrap = not self.used_wrap


RINGS: dict[str, type[DriverRing]] = {"split": DriverRing, "packed": PackedRing}


class NativeQueue:
    """native/ring.h behind the interface of vmm.devices.virtio.queue.Queue."""

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
        config = ffi.new("struct vmm_vq_config *")
        config.desc, config.avail, config.used = desc, avail, used
        config.features, config.size = features, size
        config.avail_at, config.used_at = at
        vq = lib.vmm_vq_create(memory.table, config)
        if vq == ffi.NULL:
            raise ValueError("the queue was refused")
        self._vq = ffi.gc(vq, lib.vmm_vq_destroy)
        self._memory = memory
        self._iov = ffi.new("struct iovec[]", size)
        self._chain = ffi.new("struct vmm_chain *")
        self._chain.iov = self._iov
        self.size = size
        self.verdict = "empty"

    def _gpa(self, iov: Any) -> tuple[int, int]:
        hva = int(ffi.cast("uintptr_t", iov.iov_base))
        for r in self._memory.ranges:
            if r.hva <= hva < r.hva + r.size:
                return r.gpa + hva - r.hva, int(iov.iov_len)
        raise AssertionError("the ring gave out memory that is not RAM")

    def pop(self) -> Chain | None:
        rc = lib.vmm_vq_pop(self._vq, self._chain)
        self.verdict = ffi.string(lib.vmm_vq_verdict_name(rc)).decode()
        if rc != lib.VMM_VQ_CHAIN:
            return None
        c = self._chain
        chain = Chain(self._memory, c.head)
        chain.readable = [self._gpa(self._iov[i]) for i in range(c.nr_read)]
        chain.writable = [self._gpa(self._iov[c.nr_read + i]) for i in range(c.nr_write)]
        chain.read_len, chain.write_len = c.read_len, c.write_len
        return chain

    def push(self, chain: Chain, written: int) -> None:
        self._chain.head, self._chain.write_len = chain.head, chain.write_len
        lib.vmm_vq_push(self._vq, self._chain, written)

    def push_span(self, chains: list[Chain], written: int) -> None:
        """Only C has this; what it does at once the twin does in steps."""
        native = ffi.new("struct vmm_chain[]", len(chains))
        for c, chain in zip(native, chains, strict=True):
            c.head, c.write_len = chain.head, chain.write_len
        lib.vmm_vq_push_span(self._vq, native, len(chains), written)

    def should_notify(self) -> bool:
        return bool(lib.vmm_vq_should_notify(self._vq))

    def enable_kicks(self) -> bool:
        return bool(lib.vmm_vq_enable_kicks(self._vq))

    def disable_kicks(self) -> None:
        lib.vmm_vq_disable_kicks(self._vq)

    def refuse(self) -> None:
        lib.vmm_vq_refuse(self._vq)

    @property
    def state(self) -> tuple[int, int]:
        at = ffi.new("uint16_t[2]")
        lib.vmm_vq_state(self._vq, at, at + 1)
        return at[0], at[1]

    @property
    def broken(self) -> bool:
        return bool(lib.vmm_vq_broken(self._vq))

    @property
    def inflight(self) -> int:
        return int(lib.vmm_vq_inflight(self._vq))


QUEUES: dict[str, type[Queue] | type[NativeQueue]] = {"python": Queue, "c": NativeQueue}


def device_side(kind: str, ring: DriverRing, features: int = 0) -> Queue | NativeQueue:
    features |= ring.FEATURES
    return QUEUES[kind](
        ring.memory, ring.size, ring.desc, ring.avail, ring.used, features, ring.state
    )
