"""virtio-mmio against the driver mock: registers, and everything a guest could abuse."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.virtio_mock import (
    ACKNOWLEDGE,
    DRIVER,
    DRIVER_OK,
    FEATURES_OK,
    VERSION_1,
    Driver,
    FakeIoEventFd,
    MmioRegs,
)
from vmm.bus import Bus
from vmm.devices.virtio.mmio import VirtioMmio
from vmm.devices.virtio.transport import QueueConfig, QueueIrqs
from vmm.irq import NullIrqChip
from vmm.memory import GuestMemory

BASE = 0xFEB0_0000


class Toy:
    """The device side of the contract, without any behaviour."""

    DEVICE_ID = 4
    QUEUE_SIZES = (64, 16)

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
        self.config[offset : offset + size] = value.to_bytes(size, "little")

    def activate(self, features: int, queues: list[QueueConfig | None], irqs: QueueIrqs) -> None:
        self.log.append("activate")
        self.features, self.queues, self.irqs = features, queues, irqs

    def deactivate(self) -> None:
        self.log.append("deactivate")
        self.irqs = None

    def kick_fd(self, queue: int) -> int:
        return self.kicks[queue]

    def reset(self) -> None:
        self.log.append("reset")

    def close(self) -> None:
        for fd in self.kicks:
            os.close(fd)
        self.kicks = []

    def unclaimed(self) -> str | None:
        return None


class Rig:
    def __init__(self) -> None:
        self.memory = GuestMemory([(0, 1 << 20)])
        self.bus = Bus("mmio", 1 << 40)
        self.toy = Toy()
        self.io = FakeIoEventFd()
        self.irq = NullIrqChip().edge(5)
        self.mmio = VirtioMmio(self.toy, self.memory, self.irq, self.io)  # type: ignore[arg-type]
        self.mmio.place(self.bus, BASE)
        self.regs = MmioRegs(self.bus, BASE)
        self.driver = Driver(self.regs, self.memory)


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.mmio.close()
    rig.memory.close()
    assert not rig.io.bound


def test_a_correct_driver(rig: Rig) -> None:
    assert rig.regs.device_id() == 4
    assert rig.driver.start() == VERSION_1 | 1 << 5
    assert rig.toy.log == ["activate"]
    assert [q.size for q in rig.toy.queues if q] == [64, 16]
    assert rig.toy.features == VERSION_1 | 1 << 5
    queue = rig.driver.queues[1]
    assert rig.toy.queues[1] is not None
    assert rig.toy.queues[1].device == queue.used
    queue.kick()
    assert os.eventfd_read(rig.toy.kicks[1]) == 1
    assert rig.toy.irqs is not None
    rig.toy.irqs.notify(1)
    rig.toy.irqs.notify(1)
    assert rig.irq.count == 2
    assert rig.regs.interrupts() == 1
    assert rig.regs.interrupts() == 0
    rig.driver.reset()
    assert rig.toy.log == ["activate", "deactivate"]
    assert rig.regs.status == 0
    rig.driver.start()
    assert rig.toy.log[-1] == "activate"


def test_driver_ok_needs_features_ok(rig: Rig) -> None:
    rig.regs.status = ACKNOWLEDGE | DRIVER
    rig.regs.status = ACKNOWLEDGE | DRIVER | DRIVER_OK
    assert rig.regs.status == ACKNOWLEDGE | DRIVER | 64
    rig.regs.status = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
    assert rig.toy.log == []
