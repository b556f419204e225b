"""The driver's side of a split virtqueue, and both device sides behind one interface."""

from __future__ import annotations

import struct
from typing import Any

from vmm._native import ffi, lib
from vmm.devices.virtio.device import F_EVENT_IDX, F_INDIRECT_DESC
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

Buffers = list[tuple[int, int]]


class DriverRing:
    """What a driver does, right or (through the raw methods) wrong. Parts lie from ``base`` on."""

    def __init__(self, memory: GuestMemory, size: int, base: int = 0x1000, *, at: int = 0) -> None:
        self.memory = memory
        self.size = size
        self.desc = base
        self.avail = (base + 16 * size + 1) & ~1
        self.used = (self.avail + 6 + 2 * size + 3) & ~3
        self.end = self.used + 6 + 8 * size
        self.avail_idx = self.used_idx = at
        self.free = list(range(size))
        self.chains: dict[int, list[int]] = {}
        memory.write(base, bytes(self.end - base))
        memory.write_int(self.avail + 2, at, 2)
        memory.write_int(self.used + 2, at, 2)

    # ---- raw -------------------------------------------------------------------------------

    def set_desc(
        self, index: int, addr: int, length: int, flags: int = 0, following: int = 0
    ) -> None:
        self.set_desc_at(self.desc, index, addr, length, flags, following)

    def set_desc_at(
        self, table: int, index: int, addr: int, length: int, flags: int, following: int
    ) -> None:
        entry = struct.pack("<QIHH", addr, length, flags, following)
        self.memory.write(table + 16 * index, entry)

    def publish(self, head: int) -> None:
        """One avail entry and the index that shows it."""
        self.memory.write_int(self.avail + 4 + 2 * (self.avail_idx % self.size), head, 2)
        self.set_avail_idx(self.avail_idx + 1)

    def set_avail_idx(self, value: int) -> None:
        self.avail_idx = value & 0xFFFF
        self.memory.write_int(self.avail + 2, self.avail_idx, 2)

    def set_avail_flags(self, value: int) -> None:
        self.memory.write_int(self.avail, value, 2)

    def set_used_event(self, value: int) -> None:
        self.memory.write_int(self.avail + 4 + 2 * self.size, value & 0xFFFF, 2)

    @property
    def avail_event(self) -> int:
        return self.memory.read_int(self.used + 4 + 8 * self.size, 2)

    @property
    def used_flags(self) -> int:
        return self.memory.read_int(self.used, 2)

    # ---- as a good driver ------------------------------------------------------------------

    def place(self, readable: Buffers, writable: Buffers, *, indirect: int | None = None) -> int:
        """Write a chain's descriptors, in the indirect table at ``indirect`` if given; returns
        the head, which is not yet published."""
        parts = [(a, n, 0) for a, n in readable] + [(a, n, DESC_F_WRITE) for a, n in writable]
        if indirect is not None:
            for i, (addr, length, flags) in enumerate(parts):
                more = DESC_F_NEXT if i + 1 < len(parts) else 0
                self.set_desc_at(indirect, i, addr, length, flags | more, i + 1)
            parts = [(indirect, 16 * len(parts), DESC_F_INDIRECT)]
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

    def reap(self) -> list[tuple[int, int]]:
        """(head, written) of what completed since the last call; each must be a head of ours."""
        done = []
        now = self.memory.read_int(self.used + 2, 2)
        while self.used_idx != now:
            at = self.used + 4 + 8 * (self.used_idx % self.size)
            head, written = struct.unpack("<II", self.memory.read(at, 8))
            self.used_idx = (self.used_idx + 1) & 0xFFFF
            self.free += self.chains.pop(head)
            done.append((head, written))
        return done


class NativeQueue:
    """native/ring.c behind the interface of vmm.devices.virtio.queue.Queue."""

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

    def should_notify(self) -> bool:
        return bool(lib.vmm_vq_should_notify(self._vq))

    def enable_kicks(self) -> bool:
        return bool(lib.vmm_vq_enable_kicks(self._vq))

    def disable_kicks(self) -> None:
        lib.vmm_vq_disable_kicks(self._vq)

    def refuse(self) -> None:
        lib.vmm_vq_refuse(self._vq)

    @property
    def broken(self) -> bool:
        return bool(lib.vmm_vq_broken(self._vq))

    @property
    def inflight(self) -> int:
        return int(lib.vmm_vq_inflight(self._vq))


QUEUES: dict[str, type[Queue] | type[NativeQueue]] = {"python": Queue, "c": NativeQueue}


def device_side(kind: str, ring: DriverRing, features: int = 0) -> Queue | NativeQueue:
    at = (ring.avail_idx, ring.used_idx)
    return QUEUES[kind](ring.memory, ring.size, ring.desc, ring.avail, ring.used, features, at)
