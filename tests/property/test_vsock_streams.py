"""Any sequence of what a well-behaved guest and its hosts may do with some connections: every byte
arrives once and in order, no side is sent more than it has room for, and in the end all is over."""

from __future__ import annotations

import contextlib
import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.vsock_guest import (
    CREDIT_REQUEST,
    CREDIT_UPDATE,
    RCV,
    REQUEST,
    RESPONSE,
    RST,
    RW,
    SEND,
    SHUTDOWN,
    Guest,
    Packet,
)
from vmm.devices.virtio.vsock import Vsock

SERVICE = 99
#: What goes through each connection.
BLOB = random.Random(5).randbytes(1 << 20)


class Conn:
    """One connection as both its ends see it."""

    def __init__(self, port: int, host_port: int, sock: socket.socket, room: int) -> None:
        self.port = port
        self.host_port = host_port
        self.sock = sock
        self.room = room  # of the guest
        self.open = False
        self.over = False  # RST was seen
        self.aborted = False  # bytes may be missing
        self.sent = self.got = self.fwd = 0  # host to guest
        self.g_sent = self.g_got = self.g_fwd = self.g_room = 0  # guest to host
        self.host_sends = self.host_reads = self.guest_sends = self.guest_reads = True
        self.told = 0  # SHUTDOWN flags of the device
        self.line = b""


class World:
    def __init__(self, home: Path) -> None:
        self.path = str(home / "v")
        self.guest = Guest(Vsock(3, self.path))
        self.service = socket.socket(socket.AF_UNIX)
        self.service.bind(f"{self.path}_{SERVICE}")
        self.service.listen(64)
        self.conns: list[Conn] = []
        self.next_port = 0

    def begin(self) -> None:
        self.guest.rig.driver.reset()
        self.guest.start()
        self.conns = []

    # ---- what the guest does --------------------------------------------------------------

    def say(self, c: Conn, op: int, data: bytes = b"", flags: int = 0) -> None:
        self.guest.send(op, c.port, c.host_port, data, flags=flags, buf_alloc=c.room, fwd_cnt=c.fwd)

    def listen(self) -> None:
        """Take in what the device has sent."""
        self.guest.rig.settle()
        while (packet := self.guest.take()) is not None:
            c = next(c for c in self.conns if (c.port, c.host_port or packet.src_port) == (
                packet.dst_port, packet.src_port))  # fmt: skip
            self.handle(c, packet)

    def handle(self, c: Conn, p: Packet) -> None:
        assert not c.over, "a packet after RST"
        c.host_port = p.src_port
        if p.op != RST:
            c.g_fwd, c.g_room = p.fwd_cnt, p.buf_alloc
            assert c.g_fwd <= c.g_sent
        if p.op == RW:
            assert c.guest_reads
            assert not c.told & SEND
            assert p.data == BLOB[c.got : c.got + p.len]
            c.got += p.len
            assert c.got - c.fwd <= c.room, "more than the guest has room for"
        elif p.op == RESPONSE:
            c.open = True
        elif p.op == SHUTDOWN:
            assert p.flags | c.told == p.flags
            c.told = p.flags
        elif p.op == RST:
            c.over, c.open = True, False
        else:
            assert p.op in (REQUEST, CREDIT_UPDATE, CREDIT_REQUEST)

    def answer(self, c: Conn, n: int) -> None:
        if c.host_port and not c.open and not c.over:
            c.open = n % 5 != 0
            c.over = c.aborted = not c.open
            self.say(c, RESPONSE if c.open else RST)

    def guest_writes(self, c: Conn, n: int) -> None:
        n = min(n, c.g_room - (c.g_sent - c.g_fwd), 60_000)
        if c.open and c.guest_sends and n > 0:
            self.say(c, RW, BLOB[c.g_sent : c.g_sent + n])
            c.g_sent += n

    def guest_takes(self, c: Conn, n: int) -> None:
        if c.open and c.fwd < c.got:
            c.fwd = min(c.got, c.fwd + n)
            self.say(c, CREDIT_UPDATE)

    def guest_shuts(self, c: Conn, n: int) -> None:
        if c.open:
            flags = (SEND, RCV, SEND | RCV)[n % 3]
            c.guest_sends &= not flags & SEND
            c.guest_reads &= not flags & RCV
            self.say(c, SHUTDOWN, flags=flags)

    # ---- what the host does ---------------------------------------------------------------

    def host_writes(self, c: Conn, n: int) -> None:
        if c.host_sends:
            with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
                c.sent += c.sock.send(BLOB[c.sent : c.sent + n])

    def host_takes(self, c: Conn, n: int) -> int:
        if not c.host_reads:
            return 0
        try:
            data = c.sock.recv(n)
        except (BlockingIOError, ConnectionResetError):
            return 0
        whole = len(data)
        while c.line and data:  # what CONNECT is answered with
            expect = c.line[:1]
            if expect == b"*":
                c.line = b"" if data[:1] == b"\n" else c.line
            else:
                assert data[:1] == expect
                c.line = c.line[1:]
            data = data[1:]
        assert data == BLOB[c.g_got : c.g_got + len(data)]
        c.g_got += len(data)
        assert c.g_got <= c.g_sent
        return whole

    def host_shuts(self, c: Conn, n: int) -> None:
        if n % 3:
            c.host_sends = False
            with contextlib.suppress(OSError):
                c.sock.shutdown(socket.SHUT_WR)
        else:
            c.host_sends = c.host_reads = False
            c.aborted = True
            c.sock.close()

    # ---- together -------------------------------------------------------------------------

    def connect(self, n: int) -> None:
        self.next_port = self.next_port % 1_000_000 + 1
        if n % 2:
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(self.path)
            sock.sendall(b"CONNECT %d\n" % self.next_port)
            c = Conn(self.next_port, 0, sock, 500 + n)
            c.line = b"OK *"
            self.conns.append(c)
        else:
            c = Conn(self.next_port, SERVICE, socket.socket(), 500 + n)
            c.sock.close()
            self.conns.append(c)
            self.say(c, REQUEST)
            c.sock = self.service.accept()[0]
        c.sock.setblocking(False)

    def wind_up(self) -> None:
        """Everybody reads all there is."""
        for _ in range(5000):
            before = [(c.got, c.fwd, c.g_got, c.told, c.over, c.open) for c in self.conns]
            moved = 0
            for c in self.conns:
                self.answer(c, 1)
                self.guest_takes(c, 1 << 20)
                moved += self.host_takes(c, 1 << 20)
                self.listen()
            after = [(c.got, c.fwd, c.g_got, c.told, c.over, c.open) for c in self.conns]
            if before == after and not moved:
                break
        for c in self.conns:
            if c.aborted:
                continue
            if c.host_reads:
                assert c.g_got == c.g_sent, "bytes of the guest are missing"
            if c.guest_reads:
                assert c.got == c.sent, "bytes of the host are missing"
                assert c.over or bool(c.told & SEND) == (not c.host_sends)

    def end(self) -> None:
        for c in self.conns:
            if c.open and not c.over:
                self.say(c, RST)
            c.sock.close()
        self.guest.rig.until(lambda: not self.guest.vsock.counts["conns"], "no connection left")

    def close(self) -> None:
        self.guest.close()
        self.service.close()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("streams"))
    fds = len(os.listdir("/proc/self/fd"))
    yield made
    assert len(os.listdir("/proc/self/fd")) <= fds
    made.close()


ACTIONS = {
    "answer": World.answer,
    "guest_writes": World.guest_writes,
    "guest_takes": World.guest_takes,
    "guest_shuts": World.guest_shuts,
    "host_writes": World.host_writes,
    "host_takes": World.host_takes,
    "host_shuts": World.host_shuts,
}
STEP = st.tuples(
    st.sampled_from(["connect", *ACTIONS, "answer", *["guest_writes", "host_writes"] * 2]),
    st.integers(0, 3),
    st.one_of(st.integers(0, 100), st.integers(0, 40_000)),
)


@settings(
    deadline=None,
    max_examples=250,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(steps=st.lists(STEP, max_size=40))
def test_streams(world: World, steps: list[tuple[str, int, int]]) -> None:
    world.begin()
    world.connect(3)
    try:
        for what, which, n in steps:
            if what == "connect":
                if len(world.conns) < 4:
                    world.connect(n)
            else:
                ACTIONS[what](world, world.conns[which % len(world.conns)], n)
            world.listen()
        world.wind_up()
        world.end()
    finally:
        for c in world.conns:
            c.sock.close()
