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

from tests.virtio_mock import DRIVER_OK, FEATURES_OK, NEEDS_RESET
from tests.virtio_mutations import MUTATIONS, Layout
from tests.virtio_ring import INDIRECT, DriverRing, device_side
from tests.vsock_guest import EVENT, HDR, HOST, RX, STREAM, TX, Guest
from vmm.devices.virtio.vsock import Vsock
from vmm.memory import GuestMemory

SIZE = 16
SERVICE = 99
#: Rings of the queue under test at 0; plain receive buffers for the others' answers after it.
TABLES, BUFFERS, ANSWERS, END = 0x4000, 0x8000, 0x4_0000, 0x8_0000
NAMES = sorted(set(MUTATIONS) - {"addr_ring"})

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


class Target:
    """One device that lives through all examples, a host service that answers, and a second
    memory for the oracle."""

    def __init__(self, home: Path) -> None:
        path = str(home / "v")
        self.guest = Guest(Vsock(3, path))
        self.rig = self.guest.rig
        self.vsock = self.guest.vsock
        self.service = socket.socket(socket.AF_UNIX)
        self.service.bind(f"{path}_{SERVICE}")
        self.service.listen(64)
        self.service.setblocking(False)
        self.shadow = GuestMemory([(r.gpa, r.size) for r in self.rig.memory.ranges])

    def ring(self) -> DriverRing:
        self.rig.driver.reset()
        self.rig.driver.negotiate()
        self.rig.memory.write(0, bytes(END))
        return DriverRing(self.rig.memory, SIZE)

    def start(self, ring: DriverRing, queue: int) -> None:
        """``ring`` is the queue under test; the transport lays out the others by itself."""
        driver = self.rig.driver
        driver.next = ANSWERS
        for index in (RX, TX, EVENT):
            if index != queue:
                driver.setup_queue(index, 64 if index == RX else SIZE)
        if queue != RX:
            for _ in range(64):
                driver.queues[RX].add([], [1000])
        self.rig.regs.set_queue(queue, SIZE, ring.desc, ring.avail, ring.used)
        assert self.rig.regs.enable(queue)
        self.rig.regs.status = 3 | FEATURES_OK | DRIVER_OK
        self.rig.regs.notify(queue)

    def accept(self) -> list[socket.socket]:
        taken = []
        with contextlib.suppress(BlockingIOError):
            while True:
                taken.append(self.service.accept()[0])
        return taken

    @property
    def broken(self) -> bool:
        return bool(self.rig.regs.status & NEEDS_RESET)

    def foresee(self, ring: DriverRing) -> tuple[dict[int, int], list[tuple[int, int]], str]:
        """What the Python twin takes from a copy of the memory: room by head, what is writable,
        and the verdict."""
        for r in ring.memory.ranges:
            self.shadow.write(r.gpa, ring.memory.view(r.gpa, r.size))
        mirror = DriverRing.__new__(DriverRing)
        mirror.__dict__.update(ring.__dict__)
        mirror.memory = self.shadow
        mirror.avail_idx = mirror.used_idx = 0
        q = device_side("python", mirror, INDIRECT)
        room: dict[int, int] = {}
        writable: list[tuple[int, int]] = []
        while (chain := q.pop()) is not None:
            room[chain.head] = max(room.get(chain.head, 0), chain.write_len)
            writable += chain.writable
            q.push(chain, 0)
        return room, writable, q.verdict

    def finish(
        self, ring: DriverRing, room: dict[int, int], allowed: list[tuple[int, int]]
    ) -> None:
        """After a reset: used lengths fit, nothing else was written, nothing is left."""
        self.rig.regs.status = 0
        count = ring.memory.read_int(ring.used + 2, 2)
        for i in range(min(count, SIZE)):
            head = ring.memory.read_int(ring.used + 4 + 8 * i, 4)
            assert ring.memory.read_int(ring.used + 8 + 8 * i, 4) <= room[head]
        allowed = [*allowed, (ring.used, ring.end - ring.used), (ANSWERS, END - ANSWERS)]
        for r in ring.memory.ranges:
            now, old = bytearray(ring.memory.read(r.gpa, r.size)), self.shadow.read(r.gpa, r.size)
            for gpa, size in allowed:
                if r.gpa <= gpa < r.gpa + r.size:
                    now[gpa - r.gpa : gpa - r.gpa + size] = old[gpa - r.gpa : gpa - r.gpa + size]
            assert now == old, "the device wrote where it was given nothing to write"
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
        self.shadow.close()


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    made = Target(tmp_path_factory.mktemp("vsock"))
    fds = len(os.listdir("/proc/self/fd"))
    yield made
    assert len(os.listdir("/proc/self/fd")) <= fds
    made.close()


def header(p: dict[str, Any]) -> bytes:
    return HDR.pack(
        p["src"], p["dst"], p["port"], p["host_port"], (p["size"] + p["lie"]) & 0xFFFF_FFFF,
        p["type"], p["op"], p["flags"], p["buf_alloc"], p["fwd_cnt"],
    )  # fmt: skip


def settle(target: Target, ring: DriverRing) -> None:
    """Until all is taken or a reset is asked for."""
    deadline = time.monotonic() + 5
    while not target.broken and ring.memory.read_int(ring.used + 2, 2) != ring.avail_idx:
        assert time.monotonic() < deadline, "neither an answer nor DEVICE_NEEDS_RESET"
        time.sleep(0.0002)


@SETTINGS
@given(packets=st.lists(PACKET, min_size=1, max_size=6), mutations=st.lists(MUTATION, max_size=3))
def test_whatever_the_guest_sends(
    target: Target, packets: list[dict[str, Any]], mutations: list[tuple[str, int, int]]
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
    target.start(ring, TX)
    settle(target, ring)
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
    target: Target,
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
    target.start(ring, queue)
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
    target.check_alive()
