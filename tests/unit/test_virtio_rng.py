"""virtio-rng from the driver's side: virtio-v1.3 §5.4."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.virtio_rig import TRANSPORTS, Rig
from vmm.devices.virtio.rng import Rng


@pytest.fixture(params=TRANSPORTS)
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    rig = Rig(Rng(), request.param)
    yield rig
    rig.close()


def test_gives_random_bytes(rig: Rig) -> None:
    rig.driver.start()
    q = rig.driver.queues[0]
    seen = set()
    for _ in range(10):
        length, data = q.request([], [64])
        assert length == 64
        seen.add(data)
    assert len(seen) == 10
    assert rig.device.bytes_given == 640  # type: ignore[attr-defined]


def test_fills_every_buffer_of_a_chain(rig: Rig) -> None:
    rig.driver.start()
    q = rig.driver.queues[0]
    length, data = q.request([], [100, 1, 1000])
    assert length == 1101
    assert len(set(data[101:])) > 100


def test_one_chain_is_bounded(rig: Rig) -> None:
    rig.driver.start()
    q = rig.driver.queues[0]
    head = q.add([], [65000, 1000, 200_000])
    rig.memory.write(q.pending[head][1][2][0], b"\xa5" * 200_000)
    last = q.pending[head][1][2][0]
    q.kick()
    _, length, _ = q.wait()
    assert length == 65536
    assert rig.memory.read(last, 200_000) == b"\xa5" * 200_000


def test_a_chain_to_read_needs_a_reset(rig: Rig) -> None:
    rig.driver.start()
    q = rig.driver.queues[0]
    q.add([b"give me"], [])
    q.kick()
    rig.until_broken()
    rig.driver.reset()
    rig.driver.start()
    assert rig.driver.queues[0].request([], [8])[0] == 8


def test_a_driver_that_never_came(rig: Rig) -> None:
    said = rig.device.unclaimed()
    assert said is not None
    assert "CONFIG_HW_RANDOM_VIRTIO" in said
    rig.driver.start()
    rig.driver.reset()
    assert rig.device.unclaimed() is None
