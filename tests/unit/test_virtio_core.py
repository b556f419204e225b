"""What the transports do for every device: ring formats, the reset of one queue."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.virtio_mock import DRIVER_OK, INDIRECT_DESC, NEEDS_RESET, RING_PACKED, RING_RESET
from tests.virtio_rig import TRANSPORTS, Rig
from vmm._native import lib
from vmm.devices.virtio.device import F_IN_ORDER, VirtioDevice
from vmm.devices.virtio.rng import Rng

ANY = (1 << 64) - 1


class Recorder(VirtioDevice):
    """Two queues that are never served; what was asked of it."""

    DEVICE_ID = 4
    QUEUE_SIZES = (16, 8)

    def __init__(self) -> None:
        super().__init__("recorder")
        self.log: list[Any] = []
        self.look: Any = None

    def start_queue(self, index: int, config: Any) -> int:
        self.log.append(("start", index, config.vq.size, config.vq.desc))
        return 0

    def stop_queue(self, index: int) -> None:
        self.log.append(("stop", index))
        if self.look is not None:
            self.look()

    def stop_queues(self) -> None:
        self.log.append("stop all")


class Whole(Recorder):
    """The same, unable to stop one queue."""

    stop_queue = VirtioDevice.stop_queue


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def recorder(transport: str) -> Iterator[tuple[Rig, Recorder]]:
    device = Recorder()
    rig = Rig(device, transport)
    yield rig, device
    rig.close()


# ---- packed --------------------------------------------------------------------------------


def test_packed_queues_are_offered_when_asked_for(transport: str) -> None:
    for packed in (False, True):
        rig = Rig(Rng(), transport, packed=packed)
        assert bool(rig.driver.negotiate() & RING_PACKED) is packed
        rig.close()


def test_a_device_may_be_unable(transport: str) -> None:
    class Vhost(Rng):
        CAN_PACK = False

    rig = Rig(Vhost(), transport, packed=True)
    assert not rig.driver.negotiate() & RING_PACKED
    rig.close()


@pytest.mark.parametrize("size", [16, 5, 1])
@pytest.mark.parametrize("wanted", [ANY, ANY ^ RING_PACKED, ANY ^ INDIRECT_DESC, ANY ^ 1 << 29])
def test_many_laps(transport: str, size: int, wanted: int) -> None:
    rig = Rig(Rng(), transport, packed=True)
    if not wanted & RING_PACKED:
        size = 1 << size.bit_length() - 1
    features = rig.driver.start(size=size, wanted=wanted)
    assert features >> F_IN_ORDER & 1
    queue = rig.driver.queues[0]
    assert queue.size == size
    for i in range(50):
        lengths = [64] * (1 + i % min(size, 4))
        length, data = queue.request([], lengths)
        assert length == sum(lengths) == len(data)
        assert any(data)
    rig.close()


def test_a_packed_queue_is_judged_when_enabled(transport: str) -> None:
    for desc, driver, device in ((8, 0, 0), (0, 2, 0), (0, 0, 2), (1 << 40, 0, 0)):
        rig = Rig(Rng(), transport, packed=True)
        rig.driver.negotiate()
        rig.regs.set_queue(0, 5, 0x1000 + desc, 0x2000 + driver, 0x3000 + device)
        assert not rig.regs.enable(0)
        assert rig.regs.status & NEEDS_RESET
        rig.close()


@pytest.mark.parametrize("packed", [False, True])
def test_the_longest_queue(transport: str, packed: bool) -> None:
    class Long(Recorder):
        QUEUE_SIZES = (32768,)

    device = Long()
    rig = Rig(device, transport, packed=packed)
    rig.driver.negotiate()
    assert rig.regs.queue_max(0) == 32768
    rig.regs.set_queue(0, 32768, 0x10_0000, 0x20_0000, 0x30_0000)
    assert rig.regs.enable(0)
    rig.regs.status = rig.regs.status | DRIVER_OK
    assert device.log == [("start", 0, 32768, 0x10_0000)]
    rig.close()


def test_a_broken_packed_queue_needs_a_reset(transport: str) -> None:
    rig = Rig(Rng(), transport, packed=True)
    rig.driver.start()
    queue = rig.driver.queues[0]
    queue.write_desc(0, 0x1000, 0, 1 << 7)
    queue.kick()
    rig.until_broken()
    rig.driver.start()
    assert rig.driver.queues[0].request([], [16])[0] == 16
    rig.close()


# ---- the reset of one queue ----------------------------------------------------------------


def test_ring_reset_is_offered_by_what_can(transport: str) -> None:
    for device, can in ((Recorder(), True), (Whole(), False), (Rng(), True)):
        rig = Rig(device, transport)
        assert bool(rig.driver.negotiate() & RING_RESET) is can
        rig.close()


def test_a_queue_is_reset_and_started_again(transport: str) -> None:
    rig = Rig(Rng(), transport)
    rig.driver.start()
    assert rig.driver.queues[0].request([], [16])[0] == 16
    assert rig.regs.reset_queue(0)
    assert rig.regs.status & DRIVER_OK
    rig.regs.notify(0)  # harmless
    rig.settle()
    assert rig.regs.queue_max(0) == 16
    queue = rig.driver.setup_queue(0, 4)
    for _ in range(10):
        assert queue.request([], [16])[0] == 16
    assert not rig.broken
    rig.close()


def test_only_that_queue_stops_and_comes_back_elsewhere(
    recorder: tuple[Rig, Recorder],
) -> None:
    rig, device = recorder
    rig.driver.start()
    device.log.clear()
    assert rig.regs.reset_queue(1)
    assert device.log == [("stop", 1)]
    queue = rig.driver.setup_queue(1, 4)
    assert device.log == [("stop", 1), ("start", 1, 4, queue.desc)]
    rig.driver.reset()
    assert device.log[2:] == ["stop all"]


def test_the_driver_can_watch_a_queue_stop(recorder: tuple[Rig, Recorder]) -> None:
    """Until the device is done the reset is under way and the queue enabled, and nobody else can
    enable it."""
    rig, device = recorder
    rig.driver.start()
    seen = []

    def look() -> None:
        regs = rig.regs
        if rig.host is None:
            seen.append((regs.bus.read(rig.MMIO + 0xC0, 4), regs.bus.read(rig.MMIO + 0x44, 4)))
        else:
            seen.append((rig.pci.r(0x3A, 2), rig.pci.r(0x1C, 2)))
        regs.enable(1)

    device.look = look
    device.log.clear()
    assert rig.regs.reset_queue(1)
    assert seen == [(1, 1)]
    assert device.log == [("stop", 1)]


def test_a_queue_is_not_enabled_late_but_after_its_reset(recorder: tuple[Rig, Recorder]) -> None:
    rig, device = recorder
    rig.driver.start(1)
    device.log.clear()
    refused = rig.core.refused
    rig.regs.set_queue(1, 8, 0x1000, 0x2000, 0x3000)
    assert not rig.regs.enable(1)
    assert not device.log
    rig.regs.reset_queue(1)  # was never enabled
    assert not device.log
    assert rig.core.refused > refused + 1


def test_ring_reset_needs_the_feature(recorder: tuple[Rig, Recorder]) -> None:
    rig, device = recorder
    rig.driver.start(wanted=ANY ^ RING_RESET)
    device.log.clear()
    assert not rig.regs.reset_queue(1)
    assert not device.log


def test_a_queue_reset_before_the_device_runs(recorder: tuple[Rig, Recorder]) -> None:
    rig, device = recorder
    rig.driver.negotiate()
    rig.driver.setup_queue(0)
    assert rig.regs.reset_queue(0)
    assert not device.log
    rig.driver.setup_queue(0, 2)
    rig.regs.status = rig.regs.status | DRIVER_OK
    assert [entry[:3] for entry in device.log] == [("start", 0, 2)]


def test_a_bad_queue_after_a_reset_fails_the_device(recorder: tuple[Rig, Recorder]) -> None:
    rig, device = recorder
    rig.driver.start()
    assert rig.regs.reset_queue(0)
    device.log.clear()
    rig.regs.interrupts()
    rig.regs.set_queue(0, 3, 0x1000, 0x2000, 0x3000)
    assert not rig.regs.enable(0)
    assert rig.broken
    assert rig.regs.interrupts() == 2, "a running driver is told"
    assert not device.log


def test_no_interrupt_outlives_a_reset(transport: str) -> None:
    """A configuration change that another thread announces while the driver resets."""
    rig = Rig(Rng(), transport)
    rig.driver.start()
    rig.driver.reset()
    rig.core.config_changed()
    lib.vmm_virtio_notify(rig.core.native, 0)
    lib.vmm_virtio_fail(rig.core.native)
    assert rig.regs.interrupts() == 0
    assert rig.regs.status == 0
    rig.close()
