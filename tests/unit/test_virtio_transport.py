"""Both virtio transports against the driver mock: what a driver may do and what it may not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.virtio_mock import (
    ACKNOWLEDGE,
    DRIVER,
    DRIVER_OK,
    FAILED,
    FEATURES_OK,
    NEEDS_RESET,
    VERSION_1,
    FakeIoEventFd,
    MmioRegs,
    PciConfig,
    Queue,
    Rig,
    ToyDevice,
)
from vmm._native import ffi, lib
from vmm.memory import GuestMemory

RAM = 1 << 20
HIGH = 1 << 32


class ToyRig(Rig):
    def __init__(
        self, transport: str, *, io: FakeIoEventFd | None = None, config: bytes | None = None
    ) -> None:
        self.toy = ToyDevice()
        if config is not None:
            self.toy.config = bytearray(config)
        memory = GuestMemory([(0, RAM), (HIGH, RAM)])
        super().__init__(transport, self.toy, memory, io=io)  # type: ignore[arg-type]


@pytest.fixture(params=["mmio", "pci"])
def rig(request: pytest.FixtureRequest) -> Iterator[ToyRig]:
    rig = ToyRig(request.param)
    yield rig
    rig.close()
    rig.memory.close()


def test_a_correct_driver(rig: ToyRig) -> None:
    assert rig.regs.device_id() == 4
    assert rig.driver.start() == VERSION_1 | 1 << 5
    assert rig.toy.log == ["activate"]
    assert rig.toy.features == VERSION_1 | 1 << 5
    assert len(rig.toy.queues) == 2
    for given, made in zip(rig.toy.queues, rig.driver.queues.values(), strict=True):
        assert given is not None
        assert (given.size, given.desc, given.driver, given.device) == (
            made.size,
            made.desc,
            made.avail,
            made.used,
        )
    assert rig.core.refused == 0


def test_reset_stops_the_device_and_it_starts_again(rig: ToyRig) -> None:
    rig.driver.start()
    rig.driver.reset()
    assert rig.toy.log == ["activate", "deactivate"]
    assert not rig.regs.enable(0), "a queue cannot be enabled before features are agreed on"
    rig.driver.start()
    assert rig.toy.log == ["activate", "deactivate", "activate"]
    rig.reset()
    assert rig.toy.log[-2:] == ["deactivate", "reset"]


def test_reset_of_an_idle_device_tells_nobody(rig: ToyRig) -> None:
    rig.driver.negotiate()
    rig.regs.status = 0
    assert rig.regs.status == 0
    assert rig.toy.log == []


def test_notify_reaches_the_kick_of_its_queue_only(rig: ToyRig) -> None:
    rig.driver.start()
    rig.driver.queues[1].kick()
    rig.driver.queues[1].kick()
    assert (rig.toy.kicked(0), rig.toy.kicked(1)) == (0, 2)


def test_a_queue_left_out_is_none(rig: ToyRig) -> None:
    rig.driver.negotiate()
    rig.driver.setup_queue(1, 8)
    rig.regs.status = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
    assert rig.toy.queues[0] is None
    assert rig.toy.queues[1] is not None
    assert rig.toy.queues[1].size == 8


# -- status and features


def test_driver_ok_needs_features_ok(rig: ToyRig) -> None:
    rig.regs.status = ACKNOWLEDGE | DRIVER
    rig.regs.status = ACKNOWLEDGE | DRIVER | DRIVER_OK
    assert rig.regs.status == ACKNOWLEDGE | DRIVER | NEEDS_RESET
    rig.regs.status = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
    assert rig.toy.log == []
    rig.driver.start()
    assert rig.toy.log == ["activate"]


@pytest.mark.parametrize(
    "accepted", [1 << 5, VERSION_1 | 1 << 6, VERSION_1 | 1 << 63, 0, VERSION_1 | 1 << 33]
)
def test_features_ok_is_refused(rig: ToyRig, accepted: int) -> None:
    rig.regs.status = ACKNOWLEDGE | DRIVER
    rig.regs.accept(accepted)
    rig.regs.status = ACKNOWLEDGE | DRIVER | FEATURES_OK
    assert rig.regs.status == ACKNOWLEDGE | DRIVER
    rig.regs.accept(VERSION_1)
    rig.regs.status = ACKNOWLEDGE | DRIVER | FEATURES_OK
    assert rig.regs.status == ACKNOWLEDGE | DRIVER | FEATURES_OK


def test_features_ok_without_driver_is_refused(rig: ToyRig) -> None:
    rig.regs.accept(VERSION_1)
    rig.regs.status = ACKNOWLEDGE | FEATURES_OK
    assert rig.regs.status == ACKNOWLEDGE


def select_feature_words(rig: ToyRig, sel: int) -> tuple[int, int]:
    """Select word ``sel`` on both sides, accept all of it; returns (device word, driver word)."""
    if isinstance(rig.regs, MmioRegs):
        rig.regs.w(0x14, sel)
        rig.regs.w(0x24, sel)
        rig.regs.w(0x20, 0xFFFF_FFFF)
        return rig.regs.r(0x10), 0
    rig.regs.w(0x00, 4, sel)
    rig.regs.w(0x08, 4, sel)
    rig.regs.w(0x0C, 4, 0xFFFF_FFFF)
    return rig.regs.r(0x04, 4), rig.regs.r(0x0C, 4)


@pytest.mark.parametrize("sel", [2, 3, 0x8000_0000, 0xFFFF_FFFF])
def test_feature_words_beyond_the_second_are_empty(rig: ToyRig, sel: int) -> None:
    rig.regs.status = ACKNOWLEDGE | DRIVER
    rig.regs.accept(VERSION_1)
    assert select_feature_words(rig, sel) == (0, 0)
    rig.regs.status = ACKNOWLEDGE | DRIVER | FEATURES_OK
    assert rig.regs.status == ACKNOWLEDGE | DRIVER, "bits that were not offered were accepted"


def test_features_stand_after_features_ok(rig: ToyRig) -> None:
    rig.driver.negotiate(VERSION_1)
    rig.regs.accept(VERSION_1 | 1 << 5 | 1 << 40)
    rig.regs.status = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
    assert rig.toy.features == VERSION_1


def test_status_bits_are_not_cleared_one_by_one(rig: ToyRig) -> None:
    rig.driver.start()
    status = rig.regs.status
    rig.regs.status = ACKNOWLEDGE
    assert rig.regs.status == status
    assert rig.toy.log == ["activate"]
    rig.regs.status = status | FAILED
    assert rig.regs.status == status | FAILED


def test_the_driver_cannot_set_needs_reset(rig: ToyRig) -> None:
    rig.regs.status = ACKNOWLEDGE | NEEDS_RESET
    assert rig.regs.status == ACKNOWLEDGE


def test_a_device_that_fails(rig: ToyRig) -> None:
    rig.driver.start()
    assert rig.toy.irqs is not None
    rig.toy.irqs.fail()
    rig.toy.irqs.fail()
    assert rig.regs.status & NEEDS_RESET
    assert rig.irq.count == 1
    assert rig.regs.interrupts() == 2
    rig.regs.status = rig.regs.status
    assert rig.regs.status & NEEDS_RESET
    rig.driver.reset()
    rig.driver.start()
    assert not rig.regs.status & NEEDS_RESET


# -- queues


def bad_queue(rig: ToyRig, **change: int) -> None:
    """A queue that is right but for ``change`` must not come up, and the device says so."""
    rig.driver.negotiate()
    queue = Queue(rig.driver, 0, 64)
    good = {"size": 64, "desc": queue.desc, "driver": queue.avail, "device": queue.used}
    rig.regs.set_queue(0, **(good | change))
    assert not rig.regs.enable(0)
    assert rig.regs.status & NEEDS_RESET
    rig.regs.status = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
    assert rig.toy.log == []
    assert rig.core.refused
    rig.driver.start()
    assert rig.toy.log == ["activate"]


@pytest.mark.parametrize("size", [0, 3, 24, 63, 65, 128, 32768, 0xFFFF])
def test_bad_sizes(rig: ToyRig, size: int) -> None:
    bad_queue(rig, size=size)


@pytest.mark.parametrize("area", ["desc", "driver", "device"])
@pytest.mark.parametrize(
    "addr",
    [
        0x1001,  # not aligned for any
        RAM,
        RAM - 16,
        RAM - 128,
        HIGH - 64,
        HIGH - 16,
        HIGH + RAM - 64,
        HIGH + RAM,
        0xFEB0_0000,
        0xC000_0000,
        1 << 63,
        (1 << 64) - 16,
        (1 << 64) - 4096,
    ],
)
def test_bad_addresses(rig: ToyRig, area: str, addr: int) -> None:
    bad_queue(rig, **{area: addr})


@pytest.mark.parametrize(("area", "length"), [("desc", 1024), ("driver", 134), ("device", 518)])
def test_the_last_byte_of_ram_counts(rig: ToyRig, area: str, length: int) -> None:
    align = {"desc": 16, "driver": 2, "device": 4}[area]
    last = (RAM - length) & -align
    rig.driver.negotiate()
    queue = Queue(rig.driver, 0, 64)
    good = {"size": 64, "desc": queue.desc, "driver": queue.avail, "device": queue.used}
    rig.regs.set_queue(0, **(good | {area: last}))
    assert rig.regs.enable(0)
    bad_queue(rig, **{area: last + align})


def test_high_memory_is_memory(rig: ToyRig) -> None:
    rig.driver.negotiate()
    rig.regs.set_queue(0, 16, HIGH, HIGH + 0x1000, HIGH + 0x2000)
    assert rig.regs.enable(0)
    rig.regs.status = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
    assert rig.toy.queues[0] is not None
    assert rig.toy.queues[0].device == HIGH + 0x2000


def test_nothing_changes_after_enable(rig: ToyRig) -> None:
    rig.driver.negotiate()
    queue = rig.driver.setup_queue(0)
    rig.regs.set_queue(0, 8, 0x100, 0x200, 0x300)
    rig.regs.status = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
    given = rig.toy.queues[0]
    assert given is not None
    assert (given.size, given.desc) == (64, queue.desc)
    rig.regs.set_queue(0, 8, 0x100, 0x200, 0x300)
    rig.regs.set_queue(1, 8, 0x100, 0x200, 0x400)
    assert not rig.regs.enable(1), "not while the device runs"
    assert rig.core.refused >= 8


def test_no_queue_before_features_ok(rig: ToyRig) -> None:
    rig.regs.status = ACKNOWLEDGE | DRIVER
    queue = Queue(rig.driver, 0, 64)
    rig.regs.set_queue(0, 64, queue.desc, queue.avail, queue.used)
    assert not rig.regs.enable(0)


@pytest.mark.parametrize("queue", [2, 3, 64, 255, 0x7FFF, 0xFFFF, 0x8000_0000, 0xFFFF_FFFF])
def test_a_queue_that_is_not_there(rig: ToyRig, queue: int) -> None:
    if queue > 0xFFFF and not isinstance(rig.regs, MmioRegs):
        pytest.skip("virtio-pci selects queues with 16 bits")
    rig.driver.negotiate()
    assert rig.regs.queue_max(queue) == 0
    rig.regs.set_queue(queue, 8, 0x1000, 0x2000, 0x3000)
    assert rig.regs.queue_max(queue) == 0
    assert not rig.regs.enable(queue)
    if not isinstance(rig.regs, MmioRegs):
        assert rig.regs.vector(queue, 0) == 0xFFFF
    if isinstance(rig.regs, MmioRegs):
        rig.regs.notify(queue)
    assert (rig.toy.kicked(0), rig.toy.kicked(1)) == (0, 0)


# -- configuration space


def test_config_at_every_offset_and_size(rig: ToyRig) -> None:
    padded = bytes(rig.toy.config) + bytes(16)
    for size in (1, 2, 4, 8):
        for offset in range(12):
            expect = int.from_bytes(padded[offset : offset + size], "little")
            assert rig.regs.config(offset, size) == expect, (offset, size)


def test_config_writes(rig: ToyRig) -> None:
    rig.regs.set_config(1, 2, 0xBBAA)
    assert rig.toy.config == b"\x01\xaa\xbb\x04\x05"
    assert rig.regs.config(0, 4) == 0x04BBAA01
    rig.regs.set_config(4, 2, 0xFFFF)  # one byte beyond the end
    rig.regs.set_config(5, 1, 0xFF)
    rig.regs.set_config(200, 4, 0xFF)
    assert rig.toy.config == b"\x01\xaa\xbb\x04\x05"


def test_config_change(rig: ToyRig) -> None:
    rig.driver.start()
    before = rig.regs.generation()
    assert rig.toy.irqs is not None
    rig.toy.config[:] = b"\x11\x12\x13\x14\x15\x16"
    assert rig.regs.config(0, 1) == 1, "seen before the device said so"
    rig.toy.irqs.config_changed()
    assert rig.regs.generation() != before
    assert rig.regs.config(0, 4) == 0x14131211
    assert rig.regs.config(5, 1) == 0x16
    assert rig.irq.count == 1
    assert rig.regs.interrupts() == 2


def test_no_config_interrupt_before_driver_ok(rig: ToyRig) -> None:
    rig.driver.start()
    irqs = rig.toy.irqs
    assert irqs is not None
    rig.driver.reset()
    irqs.config_changed()
    assert rig.regs.interrupts() == 0
    assert rig.irq.count == 0


@pytest.mark.parametrize("length", [0, 1, 5, 256])
@pytest.mark.parametrize("transport", ["mmio", "pci"])
def test_config_far_beyond_its_end(transport: str, length: int) -> None:
    rig = ToyRig(transport, config=bytes(range(1, length + 1)) if length < 256 else b"\x7f" * 256)
    before = bytes(rig.toy.config)
    base, end = (0xFEB0_0100, 0xF00) if transport == "mmio" else (rig.pci.pci.bar(0) + 0x2000, 4096)
    for offset in [*range(length, length + 20), *range(end - 20, end)]:
        for size in (1, 2, 4, 8):
            if length <= offset <= end - size:
                assert rig.bus.read(base + offset, size) == 0, (offset, size)
                rig.bus.write(base + offset, size, (1 << (8 * size)) - 1)
    assert rig.toy.config == before
    rig.close()
    rig.memory.close()


# -- rows 6 and 9 of the classes of attack: registers while the device runs


@pytest.mark.parametrize("value", [0, 1, 3, 0xFFFF, 0xFFFF_FFFF])
def test_every_register_while_running(rig: ToyRig, value: int) -> None:
    rig.driver.start()
    before = [(q.size, q.desc, q.driver, q.device) for q in rig.toy.queues if q is not None]
    features = rig.toy.features
    if isinstance(rig.regs, MmioRegs):
        first, end, status = rig.MMIO, 0x100, 0x70
    else:
        first, end, status = rig.regs.places[1], 0x40, 0x14
    for queue in (0, 1, 2, 0xFFFF):
        rig.regs.queue_max(queue)  # selects it
        for size in (1, 2, 4, 8):
            for reg in range(0, end, size):
                if reg <= status < reg + size and value == 0:
                    continue  # that is a reset
                rig.bus.write(first + reg, size, value & ((1 << (8 * size)) - 1))
                assert 0 <= rig.bus.read(first + reg, size) < 1 << (8 * size)
    assert rig.toy.log == ["activate"]
    for queue, (size, desc, driver, device) in enumerate(before):
        q = ffi.new("struct vmm_virtio_queue *")
        assert lib.vmm_virtio_queue(rig.core.native, queue, q) == 0
        assert (q.size, q.desc, q.driver, q.device, q.enabled) == (size, desc, driver, device, 1)
    assert lib.vmm_virtio_driver_features(rig.core.native) == features
    rig.driver.reset()
    rig.driver.start()
    assert rig.toy.log == ["activate", "deactivate", "activate"]


@pytest.mark.parametrize("value", [2, 3, 0xFF, 0x100, 0x7FFF, 0xFFFF, 0x8000_0000, 0xFFFF_FFFF])
def test_notify_of_queues_that_are_not_there(rig: ToyRig, value: int) -> None:
    rig.driver.start()
    refused = rig.core.refused
    if isinstance(rig.regs, MmioRegs):
        rig.regs.notify(value)
        assert rig.core.refused == refused + 1
    else:
        # The address tells the queue; what is written there does not matter.
        rig.bus.write(rig.regs.notify_address(1), 2, value & 0xFFFF)
        assert rig.toy.kicked(1) == 1
        for at in range(rig.regs.notify_address(1) + 4, rig.regs.places[2] + 0x1000, 4):
            rig.bus.write(at, 2, 0)
        for odd in (1, 2, 3):
            rig.bus.write(rig.regs.places[2] + odd, 1, 0)
    assert (rig.toy.kicked(0), rig.toy.kicked(1)) == (0, 0)


# -- transport by transport


def test_mmio_interrupts_are_pulses() -> None:
    rig = ToyRig("mmio")
    rig.driver.start()
    assert rig.toy.irqs is not None
    rig.toy.irqs.notify(0)
    rig.toy.irqs.notify(1)
    rig.toy.irqs.notify(77)  # no such queue
    assert rig.irq.count == 2
    assert isinstance(rig.regs, MmioRegs)
    assert rig.regs.r(0x60) == 1
    assert rig.regs.r(0x60) == 1, "reading does not acknowledge"
    rig.regs.w(0x64, 2)
    assert rig.regs.r(0x60) == 1
    rig.regs.w(0x64, 0xFFFF_FFFF)
    assert rig.regs.r(0x60) == 0
    rig.close()
    rig.memory.close()


def test_mmio_registers_are_dwords() -> None:
    rig = ToyRig("mmio")
    base = rig.MMIO
    for size in (1, 2, 8):
        assert rig.bus.read(base, size) == 0
    assert rig.bus.read(base + 2, 4) == 0
    rig.bus.write(base + 0x70, 1, ACKNOWLEDGE)
    assert rig.regs.status == 0
    for reg in (0xB0, 0xB4, 0xB8, 0xBC):
        assert rig.bus.read(base + reg, 4) == 0xFFFF_FFFF, "no shared memory"
    rig.close()
    rig.memory.close()


def test_mmio_queue_ready_taken_back() -> None:
    rig = ToyRig("mmio")
    assert isinstance(rig.regs, MmioRegs)
    rig.driver.negotiate()
    rig.driver.setup_queue(0)
    rig.regs.w(0x30, 0)
    rig.regs.w(0x44, 0)
    assert rig.regs.r(0x44) == 0
    rig.driver.start()
    rig.regs.w(0x30, 0)
    rig.regs.w(0x44, 0)
    assert rig.regs.r(0x44) == 1, "a running queue ends with reset only"
    rig.close()
    rig.memory.close()


def test_mmio_binds_its_notifications() -> None:
    io = FakeIoEventFd()
    rig = ToyRig("mmio", io=io)
    assert io.bound == {(fd, rig.MMIO + 0x50, 4, q) for q, fd in enumerate(rig.toy.kicks)}
    rig.close()
    rig.memory.close()


def test_a_probe_costs_no_python() -> None:
    """Under nested virtualization one access Python answers costs 100 µs and more: of a whole
    probe only DRIVER_OK may be one, and on pci what changes decoding and interrupts."""
    rig = ToyRig("mmio")
    rig.driver.start()
    rig.regs.interrupts()
    rig.regs.config(0, 4)
    rig.driver.queues[0].kick()
    assert rig.bus.cold == [(rig.MMIO + 0x70, 4)]
    rig.close()
    rig.memory.close()

    rig = ToyRig("pci")
    for slot in range(32):
        config = PciConfig(rig.pio, slot)
        for reg in (*range(0, 64, 4), 0x10):
            config.r(reg, 4)
        if slot == rig.slot:
            # The mock turned decoding on at once; a kernel sizes the BAR before that.
            continue
        for reg in range(0x10, 0x28, 4):
            config.w(reg, 4, 0xFFFF_FFFF)
    assert rig.pio.cold == [(0xCFC, 2)], "memory decoding"
    rig.pio.cold.clear()
    rig.pci.msix_control(0xC000)
    for vector in range(3):
        rig.pci.msix_mask(vector, True)
    rig.pci.msix_control(0x8000)
    assert rig.pio.cold == [(0xCFE, 2), (0xCFE, 2)]
    for vector in range(3):
        rig.pci.msix_entry(vector, 0xFEE0_0000, vector, masked=True)
    rig.driver.negotiate()
    for queue in (0, 1):
        rig.pci.vector(queue, queue)
        rig.driver.setup_queue(queue)
    rig.regs.status = rig.regs.status | DRIVER_OK
    rig.driver.queues[0].kick()
    assert rig.bus.cold == [(rig.pci.places[1] + 0x14, 1)]
    for vector in range(3):
        rig.pci.msix_mask(vector, False)
    assert len(rig.bus.cold) == 4
    rig.close()
    rig.memory.close()
