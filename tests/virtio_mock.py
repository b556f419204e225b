"""The driver side of virtio, for tests: speaks to a device through Bus.read and Bus.write only,
and lays rings and buffers into a GuestMemory. What it does by default a correct driver does;
every step can be done wrongly through the same pieces (``regs``, ``Queue.write_desc``...)."""

from __future__ import annotations

import os
import struct
import time
from typing import TYPE_CHECKING

from vmm._native import ffi, lib
from vmm.bus import Bus
from vmm.devices.pci_host import PciHost
from vmm.devices.virtio.mmio import VirtioMmio
from vmm.devices.virtio.pci import VirtioPci
from vmm.devices.virtio.transport import QueueConfig, QueueIrqs
from vmm.irq import IrqChip, NullIrqChip
from vmm.memory import GuestMemory

if TYPE_CHECKING:
    from vmm.devices.virtio.device import VirtioDevice

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 1, 2, 4, 8, 64, 128
VERSION_1 = 1 << 32
INDIRECT_DESC = 1 << 28
EVENT_IDX = 1 << 29
RING_PACKED = 1 << 34
RING_RESET = 1 << 40
NEXT, WRITE, INDIRECT = 1, 2, 4
_DATA = ffi.typeof("uint8_t[8]")


class MmioRegs:
    """virtio-mmio's registers. virtio-v1.3 §4.2.2."""

    def __init__(self, bus: Bus, base: int) -> None:
        self.bus = bus
        self.base = base

    def r(self, reg: int) -> int:
        return self.bus.read(self.base + reg, 4)

    def w(self, reg: int, value: int) -> None:
        self.bus.write(self.base + reg, 4, value)

    def device_id(self) -> int:
        assert self.r(0) == 0x74726976
        assert self.r(4) == 2
        return self.r(8)

    @property
    def status(self) -> int:
        return self.r(0x70)

    @status.setter
    def status(self, value: int) -> None:
        self.w(0x70, value)

    def features(self) -> int:
        value = 0
        for sel in (0, 1):
            self.w(0x14, sel)
            value |= self.r(0x10) << (32 * sel)
        return value

    def accept(self, features: int) -> None:
        for sel in (0, 1):
            self.w(0x24, sel)
            self.w(0x20, features >> (32 * sel) & 0xFFFF_FFFF)

    def queue_max(self, queue: int) -> int:
        self.w(0x30, queue)
        return self.r(0x34)

    def set_queue(self, queue: int, size: int, desc: int, driver: int, device: int) -> None:
        self.w(0x30, queue)
        self.w(0x38, size)
        for reg, addr in ((0x80, desc), (0x90, driver), (0xA0, device)):
            self.w(reg, addr & 0xFFFF_FFFF)
            self.w(reg + 4, addr >> 32)

    def enable(self, queue: int) -> bool:
        self.w(0x30, queue)
        self.w(0x44, 1)
        return self.r(0x44) == 1

    def notify(self, queue: int) -> None:
        self.w(0x50, queue)

    def interrupts(self) -> int:
        """ISR bits, cleared."""
        bits = self.r(0x60)
        self.w(0x64, bits)
        return bits

    def config(self, offset: int, size: int) -> int:
        return self.bus.read(self.base + 0x100 + offset, size)

    def reset_queue(self, queue: int) -> bool:
        """Whether it is over at once. virtio-v1.3 §2.6.1."""
        self.w(0x30, queue)
        self.w(0xC0, 1)
        return self.r(0xC0) == 0 == self.r(0x44)

    def set_config(self, offset: int, size: int, value: int) -> None:
        self.bus.write(self.base + 0x100 + offset, size, value)

    def generation(self) -> int:
        return self.r(0xFC)


class PciConfig:
    """Configuration space of one slot through configuration mechanism #1. PCI-3.0 §3.2.2.3.2."""

    def __init__(self, pio: Bus, slot: int) -> None:
        self.pio = pio
        self.slot = slot

    def _select(self, reg: int) -> int:
        self.pio.write(0xCF8, 4, 0x8000_0000 | self.slot << 11 | reg & 0xFC)
        return 0xCFC + (reg & 3)

    def r(self, reg: int, size: int) -> int:
        return self.pio.read(self._select(reg), size)

    def w(self, reg: int, size: int, value: int) -> None:
        self.pio.write(self._select(reg), size, value)

    def capabilities(self) -> list[tuple[int, int]]:
        """(id, offset), in order."""
        found = []
        at = self.r(0x34, 1)
        while at:
            found.append((self.r(at, 1), at))
            at = self.r(at + 1, 1)
            assert len(found) < 64, "capability list does not end"
        return found

    def bar(self, index: int) -> int:
        low = self.r(0x10 + 4 * index, 4)
        high = self.r(0x14 + 4 * index, 4) if low & 4 else 0
        return (low & ~0xF) | high << 32


class PciRegs:
    """virtio-pci's structures, found by way of the capabilities. virtio-v1.3 §4.1."""

    def __init__(self, bus: Bus, config: PciConfig) -> None:
        """Turns memory decoding on."""
        self.bus = bus
        self.pci = config
        self.places: dict[int, int] = {}
        self.bells: dict[int, int] = {}
        self.multiplier = 0
        self.msix = 0
        self.window = 0
        self.pci.w(4, 2, 0x6)
        for cap, at in self.pci.capabilities():
            if cap == 0x11:
                self.msix = at
            if cap != 0x09:
                continue
            kind = self.pci.r(at + 3, 1)
            if kind == 5:
                self.window = at
                continue
            self.places[kind] = self.pci.bar(self.pci.r(at + 4, 1)) + self.pci.r(at + 8, 4)
            if kind == 2:
                self.multiplier = self.pci.r(at + 16, 4)

    def r(self, reg: int, size: int) -> int:
        return self.bus.read(self.places[1] + reg, size)

    def w(self, reg: int, size: int, value: int) -> None:
        self.bus.write(self.places[1] + reg, size, value)

    def device_id(self) -> int:
        assert self.pci.r(0, 2) == 0x1AF4
        return self.pci.r(2, 2) - 0x1040

    @property
    def status(self) -> int:
        return self.r(0x14, 1)

    @status.setter
    def status(self, value: int) -> None:
        self.w(0x14, 1, value)

    def features(self) -> int:
        value = 0
        for sel in (0, 1):
            self.w(0x00, 4, sel)
            value |= self.r(0x04, 4) << (32 * sel)
        return value

    def accept(self, features: int) -> None:
        for sel in (0, 1):
            self.w(0x08, 4, sel)
            self.w(0x0C, 4, features >> (32 * sel) & 0xFFFF_FFFF)

    def queue_max(self, queue: int) -> int:
        self.w(0x16, 2, queue)
        return self.r(0x18, 2)

    def set_queue(self, queue: int, size: int, desc: int, driver: int, device: int) -> None:
        self.w(0x16, 2, queue)
        self.w(0x18, 2, size)
        for reg, addr in ((0x20, desc), (0x28, driver), (0x30, device)):
            self.w(reg, 4, addr & 0xFFFF_FFFF)
            self.w(reg + 4, 4, addr >> 32)

    def enable(self, queue: int) -> bool:
        self.w(0x16, 2, queue)
        self.w(0x1C, 2, 1)
        return self.r(0x1C, 2) == 1

    def notify_address(self, queue: int) -> int:
        self.w(0x16, 2, queue)
        return self.places[2] + self.r(0x1E, 2) * self.multiplier

    def notify(self, queue: int) -> None:
        if queue not in self.bells:
            self.bells[queue] = self.notify_address(queue)
        self.bus.write(self.bells[queue], 2, queue)

    def interrupts(self) -> int:
        """ISR bits, cleared."""
        return self.bus.read(self.places[3], 1)

    def config(self, offset: int, size: int) -> int:
        return self.bus.read(self.places[4] + offset, size)

    def reset_queue(self, queue: int) -> bool:
        """Whether it is over at once. virtio-v1.3 §2.6.1."""
        self.w(0x16, 2, queue)
        self.w(0x3A, 2, 1)
        return self.r(0x3A, 2) == 0 == self.r(0x1C, 2)

    def set_config(self, offset: int, size: int, value: int) -> None:
        self.bus.write(self.places[4] + offset, size, value)

    def generation(self) -> int:
        return self.r(0x15, 1)

    # -- MSI-X, PCI-3.0 §6.8.2

    def msix_control(self, value: int) -> None:
        """0x8000 enable, 0x4000 mask all."""
        self.pci.w(self.msix + 2, 2, value)

    def _table(self) -> int:
        where = self.pci.r(self.msix + 4, 4)
        return self.pci.bar(where & 7) + (where & ~7)

    def msix_entry(self, vector: int, addr: int, data: int, *, masked: bool = False) -> None:
        at = self._table() + 16 * vector
        self.bus.write(at, 4, addr & 0xFFFF_FFFF)
        self.bus.write(at + 4, 4, addr >> 32)
        self.bus.write(at + 8, 4, data)
        self.bus.write(at + 12, 4, int(masked))

    def msix_mask(self, vector: int, masked: bool) -> None:
        self.bus.write(self._table() + 16 * vector + 12, 4, int(masked))

    def pending(self) -> int:
        where = self.pci.r(self.msix + 8, 4)
        return self.bus.read(self.pci.bar(where & 7) + (where & ~7), 8)

    def vector(self, queue: int, vector: int) -> int:
        """Give a queue (-1: configuration changes) a vector; returns what reads back."""
        if queue < 0:
            self.w(0x10, 2, vector)
            return self.r(0x10, 2)
        self.w(0x16, 2, queue)
        self.w(0x1A, 2, vector)
        return self.r(0x1A, 2)


class Queue:
    """One split queue as its driver keeps it. virtio-v1.3 §2.7."""

    def __init__(self, driver: Driver, index: int, size: int) -> None:
        self.driver = driver
        self.memory = driver.memory
        self.index = index
        self.size = size
        self.desc = driver.alloc(16 * size, 16)
        self.avail = driver.alloc(6 + 2 * size, 2)
        self.used = driver.alloc(6 + 8 * size, 4)
        self.free = list(range(size))
        self.avail_idx = 0
        self.seen = 0
        #: head -> (descriptors to free, [(address, length) the device may write])
        self.pending: dict[int, tuple[list[int], list[tuple[int, int]]]] = {}

    def write_desc(self, at: int, addr: int, length: int, flags: int, nxt: int = 0) -> None:
        self.memory.write(self.desc + 16 * at, struct.pack("<QIHH", addr, length, flags, nxt))

    def add(self, readable: list[bytes], writable: list[int], *, indirect: bool = False) -> int:
        """Make one chain available (without a kick); returns its head."""
        parts = []
        for data in readable:
            addr = self.driver.alloc(max(1, len(data)))
            self.memory.write(addr, data)
            parts.append((addr, len(data), 0))
        parts += [(self.driver.alloc(max(1, length)), length, WRITE) for length in writable]
        if indirect:
            table = self.driver.alloc(16 * len(parts), 16)
            for i, (addr, length, flags) in enumerate(parts):
                last = i == len(parts) - 1
                entry = (addr, length, flags | (0 if last else NEXT), 0 if last else i + 1)
                self.memory.write(table + 16 * i, struct.pack("<QIHH", *entry))
            slots = [self.free.pop(0)]
            self.write_desc(slots[0], table, 16 * len(parts), INDIRECT)
        else:
            slots = [self.free.pop(0) for _ in parts]
            for i, (addr, length, flags) in enumerate(parts):
                last = i == len(parts) - 1
                self.write_desc(
                    slots[i],
                    addr,
                    length,
                    flags | (0 if last else NEXT),
                    0 if last else slots[i + 1],
                )
        self.pending[slots[0]] = (slots, [(a, n) for a, n, f in parts if f & WRITE])
        self.offer(slots[0])
        return slots[0]

    def offer(self, head: int) -> None:
        """Put a head into the available ring."""
        self.memory.write_int(self.avail + 4 + 2 * (self.avail_idx % self.size), head, 2)
        self.avail_idx = (self.avail_idx + 1) & 0xFFFF
        self.memory.write_int(self.avail + 2, self.avail_idx, 2)

    def room(self, head: int) -> list[tuple[int, int]]:
        """The buffers of a chain in flight that the device may write."""
        return self.pending[head][1]

    def kick(self) -> None:
        self.driver.regs.notify(self.index)

    @property
    def used_idx(self) -> int:
        return self.memory.read_int(self.used + 2, 2)

    def take(self) -> tuple[int, int, bytes] | None:
        """The next used element: (head, length, what the device wrote). Checks what every device
        owes: the head was available, and no more was written than there was room."""
        if self.used_idx == self.seen:
            return None
        head, length = struct.unpack(
            "<II", self.memory.read(self.used + 4 + 8 * (self.seen % self.size), 8)
        )
        self.seen = (self.seen + 1) & 0xFFFF
        assert head in self.pending, f"used head {head} was not available"
        slots, buffers = self.pending.pop(head)
        self.free += slots
        assert length <= sum(n for _, n in buffers), f"{length} bytes used of {buffers}"
        data = b"".join(self.memory.read(addr, n) for addr, n in buffers)
        return head, length, data[:length]

    def wait(self, timeout: float = 5.0) -> tuple[int, int, bytes]:
        """``take``, waiting for it."""
        deadline = time.monotonic() + timeout
        while True:
            got = self.take()
            if got is not None:
                return got
            assert time.monotonic() < deadline, f"queue {self.index}: nothing used in {timeout} s"
            time.sleep(0.0005)

    def request(self, readable: list[bytes], writable: list[int]) -> tuple[int, bytes]:
        """One chain there and back: (length, data)."""
        head = self.add(readable, writable)
        self.kick()
        got, length, data = self.wait()
        assert got == head
        return length, data


class Driver:
    """A driver on either transport: ``regs`` is MmioRegs or PciRegs."""

    def __init__(
        self, regs: MmioRegs | PciRegs, memory: GuestMemory, *, first: int = 0x1_0000, end: int = 0
    ) -> None:
        """Allocates from ``memory`` between ``first`` and ``end`` (default: end of range 0)."""
        self.regs = regs
        self.memory = memory
        self.next = first
        self.end = end or memory.ranges[0].gpa + memory.ranges[0].size
        self.queues: dict[int, Queue] = {}
        self.features = 0

    def alloc(self, size: int, align: int = 16) -> int:
        at = (self.next + align - 1) // align * align
        assert at + size <= self.end, "the test's guest memory is used up"
        self.next = at + size
        return at

    def negotiate(self, wanted: int = (1 << 64) - 1) -> int:
        """Reset to FEATURES_OK; returns what was accepted. virtio-v1.3 §3.1.1."""
        self.regs.status = 0
        assert self.regs.status == 0
        self.regs.status = ACKNOWLEDGE
        self.regs.status = ACKNOWLEDGE | DRIVER
        features = self.regs.features() & wanted
        self.regs.accept(features)
        self.regs.status = ACKNOWLEDGE | DRIVER | FEATURES_OK
        assert self.regs.status == ACKNOWLEDGE | DRIVER | FEATURES_OK
        self.features = features
        return features

    def setup_queue(self, index: int, size: int = 0) -> Queue:
        """Lay out and enable one queue; ``size`` 0 is the device's maximum."""
        from tests.virtio_packed import PackedQueue

        kind = PackedQueue if self.features & RING_PACKED else Queue
        queue = kind(self, index, size or self.regs.queue_max(index))
        self.regs.set_queue(index, queue.size, queue.desc, queue.avail, queue.used)
        assert self.regs.enable(index)
        self.queues[index] = queue
        return queue

    def start(self, queues: int = 0, *, size: int = 0, wanted: int = (1 << 64) - 1) -> int:
        """All of it, with the first ``queues`` queues (0: all there are); returns features."""
        features = self.negotiate(wanted)
        index = 0
        while (not queues or index < queues) and self.regs.queue_max(index):
            self.setup_queue(index, size and min(size, self.regs.queue_max(index)))
            index += 1
        self.regs.status = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
        assert self.regs.status & DRIVER_OK
        return features

    def reset(self) -> None:
        self.regs.status = 0
        assert self.regs.status == 0
        self.queues.clear()


class FakeIoEventFd:
    """Remembers what is bound; ``hit`` does what the kernel would do with a write."""

    any_length = True

    def __init__(self) -> None:
        self.bound: set[tuple[int, int, int, int | None]] = set()

    def bind(self, fd: int, addr: int, size: int, datamatch: int | None = None) -> None:
        assert (fd, addr, size, datamatch) not in self.bound
        self.bound.add((fd, addr, size, datamatch))

    def unbind(self, fd: int, addr: int, size: int, datamatch: int | None = None) -> None:
        self.bound.remove((fd, addr, size, datamatch))


class VcpuBus(Bus):
    """A bus used as a vCPU thread does: C first, Python for what C leaves, which is counted."""

    def __init__(self, name: str, size: int) -> None:
        self.table = lib.vmm_bus_create()
        super().__init__(name, size, self.table)
        self.cold: list[tuple[int, int]] = []

    def read(self, addr: int, size: int) -> int:
        data = ffi.new(_DATA)
        if lib.vmm_bus_access(self.table, addr, size, data, 0) == 0:
            return int.from_bytes(ffi.buffer(data, size), "little")
        self.cold.append((addr, size))
        return super().read(addr, size)

    def write(self, addr: int, size: int, value: int) -> None:
        if lib.vmm_bus_access(self.table, addr, size, value.to_bytes(8, "little"), 1) != 0:
            self.cold.append((addr, size))
            super().write(addr, size, value)

    def close(self) -> None:
        lib.vmm_bus_destroy(self.table)


class ToyDevice:
    """The device side of the contract, without any behaviour but a record of what was asked."""

    DEVICE_ID = 4
    QUEUE_SIZES = (64, 16)
    DIRECT_QUEUES = ()

    def __init__(self) -> None:
        self.name = "toy"
        self.config = bytearray(b"\x01\x02\x03\x04\x05")
        self.kicks = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in self.QUEUE_SIZES]
        self.log: list[str] = []
        self.features = 0
        self.queues: list[QueueConfig | None] = []
        self.irqs: QueueIrqs | None = None

    def host_features(self) -> int:
        return 1 << 5

    def write_config(self, offset: int, size: int, value: int) -> None:
        assert offset + size <= len(self.config)
        self.config[offset : offset + size] = value.to_bytes(size, "little")

    def activate(self, features: int, queues: list[QueueConfig | None], irqs: QueueIrqs) -> None:
        assert self.irqs is None, "activated twice"
        self.log.append("activate")
        self.features, self.queues, self.irqs = features, queues, irqs

    def deactivate(self) -> None:
        assert self.irqs is not None, "not active"
        self.log.append("deactivate")
        self.irqs = None

    def kick_fd(self, queue: int) -> int:
        return self.kicks[queue]

    def kicked(self, queue: int) -> int:
        try:
            return os.eventfd_read(self.kicks[queue])
        except BlockingIOError:
            return 0

    def reset(self) -> None:
        self.log.append("reset")

    def close(self) -> None:
        for fd in self.kicks:
            os.close(fd)
        self.kicks = []

    def unclaimed(self) -> str | None:
        return None


class Rig:
    """A device on one transport in a machine of nothing else, and a driver for it.

    ``device`` follows the contract of vmm/devices/virtio/transport.py; the rig owns it.
    """

    MMIO = 0xFEB0_0000
    WINDOW = (0xC000_0000, 0x1000_0000)

    def __init__(
        self,
        transport: str,
        device: VirtioDevice,
        memory: GuestMemory,
        *,
        io: FakeIoEventFd | None = None,
        chip: IrqChip | None = None,
    ) -> None:
        """``transport``: 'mmio' or 'pci'."""
        self.memory = memory
        self.device = device
        self.bus = VcpuBus("mmio", 1 << 64)
        self.pio = VcpuBus("pio", 1 << 16)
        self.io = io
        chip = chip or NullIrqChip()
        self.transport: VirtioMmio | VirtioPci
        self.host: PciHost | None = None
        regs: MmioRegs | PciRegs
        if transport == "mmio":
            self.irq = chip.edge(5)
            self.transport = VirtioMmio(device, memory, self.irq, io)
            self.transport.place(self.bus, self.MMIO)
            regs = MmioRegs(self.bus, self.MMIO)
        else:
            self.irq = chip.line(21)
            lines = [chip.line(20), self.irq, chip.line(22), chip.line(23)]
            self.host = PciHost(self.bus, [self.WINDOW], lines)
            self.transport = VirtioPci(device, memory, chip, io)
            self.slot = self.host.add(self.transport)
            self.host.place()
            self.pio.insert(0xCF8, 8, self.host.ports)
            regs = PciRegs(self.bus, PciConfig(self.pio, self.slot))
        self.regs = regs
        self.core = self.transport.core
        self.driver = Driver(regs, memory)

    @property
    def pci(self) -> PciRegs:
        assert isinstance(self.regs, PciRegs)
        return self.regs

    def reset(self) -> None:
        (self.host or self.transport).reset()

    def close(self) -> None:
        (self.host or self.transport).close()
        for bus in (self.bus, self.pio):
            for base, _, _ in bus.ranges():
                bus.remove(base)
            bus.close()
        assert self.io is None or not self.io.bound
