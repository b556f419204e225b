"""virtio-pci: capabilities, MSI-X, interrupt pins, notifications, the configuration window."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.virtio_mock import DRIVER_OK, FakeIoEventFd, Rig, ToyDevice
from vmm.errors import HostError
from vmm.irq import IrqChip, MsiVector
from vmm.memory import GuestMemory

ENABLE, MASK_ALL = 0x8000, 0x4000
ADDR = 0xFEE0_0000


class Chip(IrqChip):
    """Counts what would be told to KVM, and refuses messages to one address."""

    def __init__(self) -> None:
        self.routed: list[tuple[int, int]] = []
        self.bound: list[bool] = []

    def _route(self, vector: MsiVector) -> None:
        if vector.addr >> 32:
            raise HostError("KVM_SET_GSI_ROUTING failed")
        self.routed.append((vector.addr, vector.data))

    def _bind(self, vector: MsiVector, on: bool) -> None:
        self.bound.append(on)
        if not on:
            vector.discard()  # while it was bound KVM took every signal


class PciRig(Rig):
    def __init__(self, io: FakeIoEventFd | None = None) -> None:
        self.toy = ToyDevice()
        self.chip = Chip()
        memory = GuestMemory([(0, 1 << 20)])
        super().__init__("pci", self.toy, memory, io=io, chip=self.chip)  # type: ignore[arg-type]
        self.vectors = self.transport.table.vectors  # type: ignore[union-attr]

    def done(self) -> None:
        self.close()
        self.memory.close()

    def start(self) -> None:
        """Driver up, MSI-X on: vector 0 for changes, 1 and 2 for the queues."""
        for v in range(3):
            self.pci.msix_entry(v, ADDR, 0x40 + v)
        self.pci.msix_control(ENABLE)
        self.driver.negotiate()
        for queue in (-1, 0, 1):
            assert self.pci.vector(queue, queue + 1) == queue + 1
        for queue in (0, 1):
            self.driver.setup_queue(queue)
        self.regs.status = self.regs.status | DRIVER_OK
        assert self.toy.irqs is not None

    def counts(self) -> list[int]:
        return [v.irq.count for v in self.vectors]

    def notify(self, queue: int) -> None:
        assert self.toy.irqs is not None
        self.toy.irqs.notify(queue)


@pytest.fixture
def rig() -> Iterator[PciRig]:
    rig = PciRig()
    yield rig
    rig.done()


def test_identity_and_capabilities(rig: PciRig) -> None:
    c = rig.pci.pci
    assert (c.r(0, 2), c.r(2, 2), c.r(8, 1)) == (0x1AF4, 0x1044, 1)
    assert c.r(0x2E, 2) >= 0x40
    kinds = [c.r(at + 3, 1) for cap, at in c.capabilities() if cap == 9]
    assert kinds == [1, 2, 3, 4, 5]
    assert (rig.pci.multiplier, c.r(rig.pci.msix + 2, 2)) == (4, 2)
    for cap, at in c.capabilities():
        if cap == 9:
            kind, length, offset = c.r(at + 3, 1), c.r(at + 12, 4), c.r(at + 8, 4)
            assert c.r(at + 2, 1) == {2: 20, 5: 20}.get(kind, 16)
            assert offset + length <= 0x8000
            assert kind == 5 or length > 0
    assert rig.pci.r(0x12, 2) == 2


def test_no_device_structure_without_configuration_space() -> None:
    toy = ToyDevice()
    toy.config = bytearray()
    memory = GuestMemory([(0, 1 << 20)])
    rig = Rig("pci", toy, memory)  # type: ignore[arg-type]
    assert 4 not in rig.pci.places
    rig.close()
    memory.close()


def test_msix(rig: PciRig) -> None:
    rig.start()
    assert sorted(rig.chip.routed) == [(ADDR, 0x40), (ADDR, 0x41), (ADDR, 0x42)]
    rig.notify(0)
    rig.notify(1)
    rig.notify(1)
    rig.notify(9)
    assert rig.counts() == [0, 1, 2]
    assert rig.irq.count == 0, "the pin is silent"
    assert rig.regs.interrupts() == 0
    assert rig.toy.irqs is not None
    rig.toy.irqs.config_changed()
    assert rig.counts() == [1, 1, 2]
    rig.driver.reset()
    assert [rig.pci.vector(q, 0xFFFF) for q in (-1, 0, 1)] == [0xFFFF] * 3


@pytest.mark.parametrize("vector", [3, 4, 255, 256, 0x7FFF, 0xFFFE, 0xFFFF])
def test_vectors_out_of_range(rig: PciRig, vector: int) -> None:
    rig.start()
    assert rig.pci.vector(0, vector) == 0xFFFF
    assert rig.pci.vector(-1, vector) == 0xFFFF
    rig.notify(0)
    assert rig.toy.irqs is not None
    rig.toy.irqs.config_changed()
    assert rig.counts() == [0, 0, 0]


def test_no_vector_after_reset(rig: PciRig) -> None:
    rig.start()
    rig.driver.reset()
    rig.driver.start()
    rig.notify(0)
    assert rig.counts() == [0, 0, 0]


def test_mask_pending_unmask(rig: PciRig) -> None:
    rig.start()
    rig.pci.msix_mask(1, True)
    assert rig.pci.pending() == 0
    rig.notify(0)
    rig.notify(0)
    assert rig.pci.pending() == 0b010
    assert rig.pci.pending() == 0b010, "reading keeps it"
    before = rig.counts()[1]
    rig.pci.msix_mask(1, False)
    assert rig.counts()[1] == before + 1, "delivered once"
    assert rig.pci.pending() == 0
    rig.pci.msix_control(ENABLE | MASK_ALL)
    rig.notify(1)
    assert rig.pci.pending() == 0b100
    rig.pci.msix_control(ENABLE)
    assert rig.pci.pending() == 0


def test_a_message_changes_while_live(rig: PciRig) -> None:
    rig.start()
    rig.pci.msix_entry(2, ADDR | 0x1000, 0x77)
    assert rig.chip.routed[-1] == (ADDR | 0x1000, 0x77)
    at = rig.pci._table() + 32
    assert rig.bus.read(at, 8) == ADDR | 0x1000
    assert rig.bus.read(at + 8, 8) == 0x77


def test_setting_up_masked_entries_costs_no_routing(rig: PciRig) -> None:
    rig.pci.msix_control(ENABLE)
    for v in range(3):
        rig.pci.msix_mask(v, True)
        rig.pci.msix_entry(v, ADDR, v, masked=True)
    assert rig.chip.routed == []
    rig.pci.msix_mask(1, False)
    assert rig.chip.routed == [(ADDR, 1)]
    rig.pci.msix_mask(1, True)
    rig.pci.msix_mask(1, False)
    assert rig.chip.routed == [(ADDR, 1)], "the route did not change"
    assert rig.chip.bound == [True, False, True]


def test_a_message_kvm_refuses(rig: PciRig) -> None:
    rig.start()
    rig.pci.msix_entry(1, 0xDEAD_0000_0000, 1)
    assert rig.vectors[1].masked
    rig.notify(0)
    assert rig.transport.table.refused  # type: ignore[union-attr]
    rig.notify(1)
    assert rig.counts()[2] == 1, "the others go on"
    rig.pci.msix_entry(1, ADDR, 0x99)
    assert not rig.vectors[1].masked
    assert rig.counts()[1] == 2, "what came while it was refused arrives"


def test_the_table_takes_dwords_and_nothing_beyond_it(rig: PciRig) -> None:
    table = rig.pci._table()
    rig.bus.write(table, 1, 0xFF)
    rig.bus.write(table + 2, 2, 0xFFFF)
    rig.bus.write(table + 2, 4, 0xFFFF_FFFF)
    assert rig.bus.read(table, 4) == 0
    rig.bus.write(table + 12, 4, 0xFFFF_FFFE)
    assert rig.bus.read(table + 12, 4) == 0, "reserved bits"
    rig.bus.write(table + 48, 4, 0x1234)
    assert rig.bus.read(table + 48, 4) == 0, "there are 3 entries"
    rig.bus.write(table + 0x1000, 4, 0xFFFF_FFFF)
    assert rig.bus.read(table + 0x1000, 4) == 0, "pending bits are read-only"
    assert rig.bus.read(table + 0x1FF8, 8) == 0
    assert rig.bus.read(table + 0x2000, 4) == 0


def test_the_pin_without_msix(rig: PciRig) -> None:
    rig.driver.start()
    rig.notify(0)
    assert rig.irq.level
    rig.notify(1)
    assert rig.irq.count == 1
    assert rig.regs.interrupts() == 1
    assert not rig.irq.level
    assert rig.regs.interrupts() == 0
    assert rig.toy.irqs is not None
    rig.toy.irqs.config_changed()
    rig.notify(0)
    assert rig.regs.interrupts() == 3
    rig.notify(0)
    rig.driver.reset()
    assert not rig.irq.level, "reset lowers it"


def test_the_pin_is_disabled_by_command_and_by_msix(rig: PciRig) -> None:
    rig.driver.start()
    rig.pci.pci.w(4, 2, 0x406)
    rig.notify(0)
    assert not rig.irq.level
    rig.pci.pci.w(4, 2, 0x006)
    assert rig.irq.level, "it was waiting"
    rig.pci.msix_control(ENABLE)
    assert not rig.irq.level
    rig.notify(0)
    assert not rig.irq.level


def test_notifications_are_bound_where_the_bar_is() -> None:
    io = FakeIoEventFd()
    rig = PciRig(io)
    c = rig.pci.pci

    def expected() -> set[tuple[int, int, int, int | None]]:
        return {(fd, c.bar(0) + 0x3000 + 4 * q, 0, None) for q, fd in enumerate(rig.toy.kicks)}

    assert io.bound == expected()
    assert [rig.pci.notify_address(q) for q in (0, 1)] == sorted(b[1] for b in io.bound)
    c.w(0x10, 4, rig.WINDOW[0] + 0x80_0000)
    assert io.bound == expected()
    c.w(4, 2, 0)
    assert io.bound == set()
    c.w(4, 2, 2)
    assert io.bound == expected()
    c.w(0x10, 4, 0x1000)
    assert io.bound == set()
    rig.done()


def test_no_any_length_no_room() -> None:
    """KVM without zero-length matches, and out of ioeventfds after the first."""

    class Full(FakeIoEventFd):
        any_length = False

        def bind(self, fd: int, addr: int, size: int, datamatch: int | None = None) -> None:
            if self.bound:
                raise HostError("KVM_IOEVENTFD failed")
            super().bind(fd, addr, size, datamatch)

    io = Full()
    rig = PciRig(io)
    assert {b[2] for b in io.bound} == {2}
    rig.driver.start()
    rig.driver.queues[1].kick()
    assert rig.toy.kicked(1) == 1, "by an exit"
    rig.done()


def test_window(rig: PciRig) -> None:
    """Registers by way of configuration space. virtio-v1.3 §4.1.4.9."""
    c, at = rig.pci.pci, rig.pci.window

    def select(offset: int, length: int, bar: int = 0) -> None:
        c.w(at + 4, 1, bar)
        c.w(at + 8, 4, offset)
        c.w(at + 12, 4, length)

    select(0x12, 2)
    assert c.r(at + 16, 4) == 2, "number of queues"
    assert c.r(at + 16, 2) == 2
    select(0x14, 1)
    c.w(at + 16, 4, 0xFFFF_FF01)
    assert rig.regs.status == 1
    select(0x2000, 4)
    assert c.r(at + 16, 4) == 0x04030201
    select(0x2000, 1)
    c.w(at + 16, 1, 0x7E)
    assert rig.toy.config[0] == 0x7E
    for offset, length, bar in [
        (0x2001, 2, 0),
        (0x2000, 3, 0),
        (0x2000, 8, 0),
        (0x2000, 0, 0),
        (0x7FFE, 4, 0),
        (0x8000, 4, 0),
        (0xFFFF_FFFC, 4, 0),
        (0x2000, 4, 1),
        (0x2000, 4, 255),
    ]:
        select(offset, length, bar)
        assert c.r(at + 16, 4) == 0
        c.w(at + 16, 4, 0xFFFF_FFFF)
    select(0x2000, 4)
    assert c.r(at + 17, 1) == 0
    assert c.r(at + 16, 4) == 0x0403027E


def test_common_structure_at_every_width(rig: PciRig) -> None:
    rig.driver.negotiate()
    rig.driver.setup_queue(1)
    base = rig.pci.places[1]
    image = b"".join(rig.bus.read(base + i, 1).to_bytes(1, "little") for i in range(0x38))
    for size in (2, 4, 8):
        for offset in range(0x38 - size + 1):
            expect = int.from_bytes(image[offset : offset + size], "little")
            assert rig.bus.read(base + offset, size) == expect
    assert rig.bus.read(base + 0x36, 4) == 0
    assert rig.bus.read(base + 0x38, 4) == 0
    rig.driver.reset()
    rig.pci.w(0x16, 2, 1)
    rig.pci.w(0x20, 8, 0x1122_3344_5566_7788)
    assert rig.pci.r(0x20, 8) == 0x1122_3344_5566_7788
    rig.pci.w(0x14, 4, 0xFFFF_FFFF)  # not a register of 4 bytes
    assert rig.regs.status == 0


def test_machine_reset(rig: PciRig) -> None:
    rig.start()
    rig.pci.msix_mask(1, True)
    rig.notify(0)
    rig.reset()
    assert rig.toy.log[-2:] == ["deactivate", "reset"]
    rig.pci.pci.w(4, 2, 6)
    assert rig.pci.pending() == 0
    assert rig.pci.pci.r(rig.pci.msix + 2, 2) == 2
    assert rig.regs.status == 0
    rig.start()
    rig.notify(1)
    assert rig.counts()[2] == 1
