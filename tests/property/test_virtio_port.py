"""Chains valid by construction, then 0 to 3 named mutations, at each queue of a virtio-serial
device. Whatever comes, the device answers, waits or asks for a reset, writes only where it was
given room, and works afterwards."""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.virtio_mutations import Layout
from tests.virtio_rig import Rig
from tests.virtio_target import BUFFERS, END, NAMES, TABLES, Target
from vmm.devices.virtio.device import Placement
from vmm.devices.virtio.port import Port, Ports

#: Queues: port 0 is a file, port 1 a socket that talks.
RX0, TX0, CONTROL_RX, CONTROL_TX, RX1, TX1 = range(6)

MESSAGE = st.tuples(
    st.sampled_from([0, 0, 1, 1, 2, 0xFFFF_FFFF]),
    st.sampled_from([0, 3, 3, 6, 6, 1, 2, 4, 5, 7, 0xFFFF]),
    st.sampled_from([1, 1, 0, 0xFFFF]),
)
BUFFER = st.tuples(MESSAGE, st.sampled_from([8, 8, 8, 7, 1, 72, 4096]), st.booleans())


class PortTarget(Target):
    def __init__(self, home: Path) -> None:
        self.ports = Ports()
        self.ports.placement = Placement("shared")
        for port in (Port("file", str(home / "f")), Port("socket")):
            self.ports.add(port)
            port._device = self.ports
        super().__init__(Rig(self.ports, "mmio"))

    def say(self, port: int, event: int) -> None:
        control = self.rig.driver.queues.get(CONTROL_TX)
        if control is not None:  # it is not the one under test
            control.request([struct.pack("<IHH", port, event, 1)], [])

    def close(self) -> None:
        self.rig.close()
        super().close()


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PortTarget]:
    made = PortTarget(tmp_path_factory.mktemp("ports"))
    fds = len(os.listdir("/proc/self/fd"))
    yield made
    assert len(os.listdir("/proc/self/fd")) <= fds
    made.close()


@settings(
    deadline=None,
    max_examples=120,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(
    queue=st.sampled_from([TX0, CONTROL_RX, CONTROL_TX, CONTROL_TX, RX1, RX1, TX1]),
    buffers=st.lists(BUFFER, min_size=1, max_size=8),
    mutations=st.lists(
        st.tuples(st.sampled_from(NAMES), st.integers(0, 60), st.integers(0, 0xFFFF)), max_size=3
    ),
)
def test_whatever_the_driver_offers(
    target: PortTarget,
    queue: int,
    buffers: list[tuple[tuple[int, int, int], int, bool]],
    mutations: list[tuple[str, int, int]],
) -> None:
    ring = target.ring()
    lay = Layout(ring)
    at, table = BUFFERS, TABLES
    for message, size, indirect in buffers:
        parts = [(at, size), (at + 0x1100, 64)]
        ring.memory.write(at, struct.pack("<IHH", *message))
        given_ = (parts, []) if queue in (TX0, TX1, CONTROL_TX) else ([], parts)
        lay.chain(*given_, indirect=table if indirect else None)
        at += 0x1200
        table += 0x100
    for name, which, n in mutations:
        lay.mutate(name, which, n)
    room, writable, verdict = target.foresee(ring)
    target.start(ring, queue, {} if queue == CONTROL_RX else {CONTROL_RX: 100})
    with contextlib.closing(target.ports.ports[1].connect()) as sock:
        sock.setblocking(False)
        sock.sendall(b"talk" * 2000)
        for event in (0, 3, 6):
            target.say(1, event)
        # What is sent is taken, with one exception: a socket that nobody reads may be full.
        if queue in (TX0, CONTROL_TX):
            target.settle(ring)
            if verdict not in ("empty", "chain"):
                assert target.broken, f"the queue is broken ({verdict}); the device said nothing"
        target.rig.settle()
        target.rig.settle()
        target.finish(ring, room, writable)
    check_alive(target)


def check_alive(target: PortTarget) -> None:
    """The port that lost its client notices, and takes another one."""
    rig, port = target.rig, target.ports.ports[1]
    rig.memory.write(0, bytes(END))
    rig.driver.next = BUFFERS
    rig.driver.start()
    for _ in range(8):
        rig.driver.queues[CONTROL_RX].add([], [100])
        rig.driver.queues[RX1].add([], [4096])
    for event in (0, 3, 6):
        target.say(1, event)
    rig.until(lambda: not port.state["host_open"], "the end of the client")
    with contextlib.closing(port.connect()) as sock:
        rig.driver.queues[TX1].request([b"alive"], [])
        assert sock.recv(10) == b"alive"
        rig.driver.reset()
    rig.memory.write(0, bytes(END))
    rig.driver.next = BUFFERS
    rig.driver.start()
    rig.driver.queues[RX1].add([], [16])
    target.say(1, 6)
    rig.until(lambda: not port.state["host_open"], "the end of the client")
    rig.driver.reset()
