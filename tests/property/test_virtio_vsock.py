"""Packets valid by construction, then 0 to 3 named mutations, at each queue of a vsock device.
Whatever comes, the device answers or asks for a reset, writes only where it was given room, keeps
no connection the guest ended, and works afterwards."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.virtio_mutations import Layout
from tests.virtio_target import BUFFERS, NAMES, TABLES, Target
from tests.vsock_guest import EVENT, HDR, HOST, RX, STREAM, TX, Guest
from vmm.devices.virtio.vsock import Vsock

SERVICE = 99

WORD = st.one_of(st.sampled_from([0, 1, 64, 1 << 18, 0xFFFF_FFFF]), st.integers(0, 0xFFFF_FFFF))
PACKET = st.fixed_dictionaries(
    {
        "op": st.one_of(st.sampled_from([1, 1, 5, 5, 5, 4, 6, 7, 3]), st.integers(0, 0xFFFF)),
        "port": st.integers(1, 3),
        "host_port": st.sampled_from([SERVICE, SERVICE, SERVICE, 1 << 30, 98]),
        "src": st.sampled_from([3, 3, 3, 3, 3, 3, 2, 1 << 32]),
        "dst": st.sampled_from([HOST, HOST, HOST, HOST, HOST, 0, 3]),
        "type": st.sampled_from([STREAM, STREAM, STREAM, STREAM, 2, 0xFFFF]),
        "flags": st.sampled_from([0, 1, 2, 3, 0xFFFF_FFFF]),
        "buf_alloc": WORD,
        "fwd_cnt": WORD,
        "size": st.sampled_from([0, 0, 1, 100, 4000]),
        "lie": st.sampled_from([0, 0, 0, 0, 0, 1, -1, 1 << 31]),
        "split": st.integers(0, 60),
        "indirect": st.booleans(),
    }
)
MUTATION = st.tuples(st.sampled_from(NAMES), st.integers(0, 60), st.integers(0, 0xFFFF))
SETTINGS = settings(
    deadline=None,
    max_examples=80,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


class VsockTarget(Target):
    """One device that lives through all examples, and a host service that answers."""

    def __init__(self, home: Path) -> None:
        path = str(home / "v")
        self.guest = Guest(Vsock(3, path))
        super().__init__(self.guest.rig)
        self.vsock = self.guest.vsock
        self.service = socket.socket(socket.AF_UNIX)
        self.service.bind(f"{path}_{SERVICE}")
        self.service.listen(64)
        self.service.setblocking(False)

    def accept(self) -> list[socket.socket]:
        taken = []
        with contextlib.suppress(BlockingIOError):
            while True:
                taken.append(self.service.accept()[0])
        return taken

    def end(self) -> None:
        """After a reset nothing is left."""
        for sock in self.accept():
            sock.close()
        deadline = time.monotonic() + 5
        while self.vsock.counts["conns"]:
            assert time.monotonic() < deadline, "connections stay"
            time.sleep(0.0005)

    def check_alive(self) -> None:
        self.guest.start(nr=4)
        self.guest.send(1, 7, 98)
        assert self.guest.recv().op == 3
        self.rig.driver.reset()

    def close(self) -> None:
        self.guest.close()
        self.service.close()
        super().close()


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VsockTarget]:
    made = VsockTarget(tmp_path_factory.mktemp("vsock"))
    fds = len(os.listdir("/proc/self/fd"))
    yield made
    assert len(os.listdir("/proc/self/fd")) <= fds
    made.close()


def header(p: dict[str, Any]) -> bytes:
    return HDR.pack(
        p["src"], p["dst"], p["port"], p["host_port"], (p["size"] + p["lie"]) & 0xFFFF_FFFF,
        p["type"], p["op"], p["flags"], p["buf_alloc"], p["fwd_cnt"],
    )  # fmt: skip


@SETTINGS
@given(packets=st.lists(PACKET, min_size=1, max_size=6), mutations=st.lists(MUTATION, max_size=3))
def test_whatever_the_guest_sends(
    target: VsockTarget, packets: list[dict[str, Any]], mutations: list[tuple[str, int, int]]
) -> None:
    ring = target.ring()
    lay = Layout(ring)
    at, table = BUFFERS, TABLES
    for p in packets:
        data = header(p) + bytes(p["size"])
        ring.memory.write(at, data)
        cut = p["split"]
        parts = (
            [(at, cut), (at + cut, len(data) - cut)] if 0 < cut < len(data) else [(at, len(data))]
        )
        if len(ring.free) < len(parts):
            break
        lay.chain(parts, [], indirect=table if p["indirect"] else None)
        at += 0x1100
        table += 0x100
    for name, which, n in mutations:
        lay.mutate(name, which, n)
    room, writable, verdict = target.foresee(ring)
    target.start(ring, TX, {RX: 1000})
    target.settle(ring)
    if verdict not in ("empty", "chain"):
        assert target.broken, f"the queue is broken ({verdict}) and the device did not say so"
    # A service that talks, and hangs up on some.
    for nr, sock in enumerate(target.accept()):
        with contextlib.suppress(OSError):
            sock.send(b"talk" * 500)
        if nr % 2:
            sock.close()
        else:
            target.guest.own(sock)
    target.rig.settle()
    target.finish(ring, room, writable)
    target.end()
    for sock in target.guest.disown():
        sock.close()
    target.check_alive()


@SETTINGS
@given(
    sizes=st.lists(
        st.lists(st.sampled_from([1, 24, 44, 100, 4096]), min_size=1, max_size=3),
        min_size=1,
        max_size=6,
    ),
    mutations=st.lists(MUTATION, max_size=3),
    queue=st.sampled_from([RX, RX, RX, EVENT]),
    indirect=st.booleans(),
)
def test_whatever_room_the_guest_offers(
    target: VsockTarget,
    sizes: list[list[int]],
    mutations: list[tuple[str, int, int]],
    queue: int,
    indirect: bool,
) -> None:
    ring = target.ring()
    lay = Layout(ring)
    at, table = BUFFERS, TABLES
    for parts in sizes:
        if len(ring.free) < len(parts):
            break
        lay.chain(
            [], [(at + 0x1100 * i, n) for i, n in enumerate(parts)],
            indirect=table if indirect else None,
        )  # fmt: skip
        at += 0x1100 * len(parts)
        table += 0x100
    for name, which, n in mutations:
        lay.mutate(name, which, n)
    room, writable, _ = target.foresee(ring)
    target.start(ring, queue, {} if queue == RX else {RX: 1000})
    if queue == EVENT:
        target.vsock.transport_reset(3)
    else:
        # Something for each kind of packet: an RST, an answer, bytes of the host.
        tx = target.rig.driver.queues[TX]
        for host_port in (98, SERVICE, SERVICE):
            tx.request([HDR.pack(3, 2, tx.seen + 1, host_port, 0, 1, 1, 0, 1 << 18, 0)], [])
        for sock in target.accept():
            sock.sendall(os.urandom(5000))
            sock.close()
    target.rig.settle()
    target.rig.settle()
    target.finish(ring, room, writable)
    target.end()
    target.check_alive()
