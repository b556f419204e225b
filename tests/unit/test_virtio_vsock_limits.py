"""virtio-vsock with guests that break the rules, and more of everything than there is room for."""

from __future__ import annotations

import os
import select
import socket
from pathlib import Path

import pytest

from tests import vsock_fixtures
from tests.virtio_rig import TRANSPORTS, Rig
from tests.vsock_fixtures import BUFFER, PORT, SERVICE, client, from_guest, from_host, gone, line
from tests.vsock_guest import (
    CREDIT_REQUEST,
    CREDIT_UPDATE,
    EVENT,
    HDR,
    RCV,
    REQUEST,
    RESPONSE,
    RST,
    RW,
    RX,
    SHUTDOWN,
    TX,
    TX_BUFFER,
    Guest,
)
from vmm._native import lib
from vmm.devices.virtio.device import Placement
from vmm.devices.virtio.vsock import Vsock

one = vsock_fixtures.one
path = vsock_fixtures.path
service = vsock_fixtures.service


@pytest.mark.parametrize("queue", ["rx", "event"])
def test_buffers_without_room(one: Guest, queue: str) -> None:
    if queue == "rx":
        one.start(nr=1, size=HDR.size - 1)
        client(one)
    else:
        event = one.rig.driver.queues[EVENT]
        event.add([], [3])
        event.kick()
        one.vsock.transport_reset(4)
    one.rig.until_broken()


def test_a_buffer_with_room_for_a_header_only(one: Guest) -> None:
    one.start(nr=1, size=HDR.size)
    sock = client(one)
    port = one.expect(REQUEST).src_port
    one.send(RESPONSE, PORT, port)
    assert line(sock)
    sock.sendall(b"x")
    one.rig.until_broken()


@pytest.mark.parametrize(
    ("data", "what"),
    [(b"short", "no header"), (HDR.pack(3, 2, 1, 2, 5, 1, RW, 0, 0, 0) + b"four", "len")],
)
def test_chains_that_are_no_packet(one: Guest, data: bytes, what: str) -> None:
    one.send_raw(data)
    one.rig.until_broken()
    one.rig.driver.reset()
    one.start()
    one.send(REQUEST, 1, SERVICE)
    one.expect(RST)


def test_headers_that_are_wrong(one: Guest, service: socket.socket) -> None:
    sock = from_guest(one, service)
    one.send(RW, 1024, SERVICE, b"spoof", src=4)  # not its address: nothing happens
    one.send(REQUEST, 1, SERVICE, src=1 << 32 | 3)
    one.quiet()
    assert one.vsock.counts["dropped"] == 2
    one.send(REQUEST, 1, SERVICE, dst=9)  # another guest's address
    packet = one.expect(RST)
    assert (packet.src_cid, packet.src_port) == (9, SERVICE)
    one.send(REQUEST, 1, SERVICE, type=2)
    assert one.expect(RST).type == 2
    one.send(RST, 1, SERVICE, type=7)
    for op in (RESPONSE, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST, 0, 8, 0xFFFF):
        one.send(op, 77, SERVICE)
        assert one.expect(RST).dst_port == 77
    one.send(RST, 77, SERVICE)
    one.quiet()
    sock.sendall(b"unharmed")
    assert one.expect(RW).data == b"unharmed"


@pytest.mark.parametrize("op", [0, REQUEST, RESPONSE, 8, 0xFFFF])
def test_operations_that_make_no_sense_in_a_connection(
    one: Guest, service: socket.socket, op: int
) -> None:
    sock = from_guest(one, service)
    one.send(op, 1024, SERVICE)
    one.expect(RST)
    assert sock.recv(1) == b""
    port = (client(one), one.expect(REQUEST).src_port)[1]
    one.send(op if op != RESPONSE else RW, PORT, port)
    one.expect(RST)
    gone(one)


def test_a_request_the_guest_cannot_know_of(path: str) -> None:
    """A host-initiated connection that still waits for a buffer."""
    guest = Guest(Vsock(3, path))
    guest.start(nr=0)
    sock = client(guest)
    gone(guest, conns=1)
    guest.send(RESPONSE, PORT, (1 << 30) + 1)
    guest.post(0)
    guest.post(1)
    guest.rx.kick()
    guest.expect(RST)
    port = guest.expect(REQUEST).src_port
    guest.send(RESPONSE, PORT, port)
    assert line(sock) == b"OK %d\n" % port
    guest.close()


def test_a_flood_of_refused_packets(one: Guest) -> None:
    """Without room for answers the guest's packets wait, and are answered then."""
    one.start(nr=0)
    limit: int = lib.VMM_VSOCK_CONNS
    for i in range(limit):
        one.send(REQUEST, i, SERVICE)
    header = HDR.pack(3, 2, 1, SERVICE, 0, 1, REQUEST, 0, 0, 0)
    one.rig.memory.write(TX_BUFFER, header)
    for slot in range(256):
        one.tx.write_desc(slot, TX_BUFFER, len(header), 0)
        one.tx.pending[slot] = ([], [])
        one.tx.offer(slot)
    one.tx.kick()
    one.rig.settle()
    one.rig.settle()
    assert one.tx.take() is None
    assert one.vsock.counts["resets"] == limit
    sent = limit + 256
    for slot in range(64):
        one.post(slot)
    one.rx.kick()
    for _ in range(sent):
        one.expect(RST)
    one.quiet()


def test_too_many_clients(one: Guest) -> None:
    """Those that ask nothing make room for those that come."""
    silent = [client(one, b"") for _ in range(lib.VMM_VSOCK_ASKING + 20)]
    one.rig.until(lambda: one.vsock.counts["asking"] == lib.VMM_VSOCK_ASKING, "all of them")
    assert silent[0].recv(1) == b""
    sock, _ = from_host(one)
    sock.sendall(b"x")
    assert one.expect(RW).data == b"x"


def test_too_many_connections(one: Guest, service: socket.socket) -> None:
    limit: int = lib.VMM_VSOCK_CONNS
    held = []
    for i in range(limit):
        one.send(REQUEST, 2000 + i, SERVICE)
        answer = one.expect(RESPONSE)
        big = i < lib.VMM_VSOCK_BIG_BUFFERS
        assert answer.buf_alloc == (BUFFER if big else lib.VMM_VSOCK_SMALL_BUFFER)
        held.append(one.own(service.accept()[0]))
    one.send(REQUEST, 1, SERVICE)
    one.expect(RST)
    assert client(one).recv(1) == b""
    # One that the host has left, and the guest never ends, makes room.
    held[7].close()
    assert one.expect(SHUTDOWN).dst_port == 2007
    one.send(REQUEST, 1, SERVICE)
    assert one.expect(RST).dst_port == 2007
    one.expect(RESPONSE)
    assert one.vsock.counts["conns"] == limit
    one.rig.driver.reset()
    gone(one)


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_ten_thousand_connections(one: Guest, service: socket.socket) -> None:
    from_guest(one, service).close()
    before = open_fds()
    for i in range(5000):
        one.send(REQUEST, 10_000 + i, SERVICE)
        sock, _ = service.accept()
        sock.close()
        one.send(RST, 10_000 + i, SERVICE)
        sock = client(one)
        while (packet := one.recv()).op != REQUEST:
            pass
        one.send(RST, PORT, packet.src_port)
        assert sock.recv(1) == b""
        sock.close()
    one.rig.settle()
    assert open_fds() <= before
    assert one.vsock.counts["conns"] <= 1


def test_out_of_descriptors(one: Guest, service: socket.socket) -> None:
    """Clients wait until one is free; the guest is refused; nothing spins."""
    import resource

    waiting = from_guest(one, service)
    clients = [one.own(socket.socket(socket.AF_UNIX)) for _ in range(3)]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(c.fileno() for c in clients) + 1, limits[1]))
    fillers: list[int] = []
    try:
        while True:
            try:
                fillers.append(os.open("/dev/null", os.O_RDONLY))
            except OSError:
                break
        for c in clients:
            c.connect(one.vsock.path or "")
            c.sendall(b"CONNECT 5000\n")
        one.quiet()
        one.send(REQUEST, 1, SERVICE)
        one.expect(RST)
        waiting.close()
        one.expect(SHUTDOWN)
        one.send(RST, 1024, SERVICE)
        one.expect(REQUEST)
    finally:
        for fd in fillers:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_stalled_connection_costs_nothing(one: Guest) -> None:
    """Bytes nobody has room for, and a peer that is gone, do not wake the thread over and over."""
    sock, _ = from_host(one, buf_alloc=0)
    sock.sendall(b"x")
    one.expect(CREDIT_REQUEST)
    sock.close()
    assert one.expect(SHUTDOWN).flags == RCV
    one.quiet()
    # The I/O thread sleeps: it uses no CPU while we wait for something that never comes.
    task = io_thread()
    used = cpu(task)
    assert not select.select([one.rig.device.kick_fd(EVENT)], [], [], 0.2)[0]
    assert cpu(task) - used <= 1


def io_thread() -> str:
    for task in sorted(os.listdir("/proc/self/task"), key=int, reverse=True):
        if Path(f"/proc/self/task/{task}/comm").read_text().strip() == "vmm-io":
            return task
    raise AssertionError("no I/O thread")


def cpu(task: str) -> int:
    fields = Path(f"/proc/self/task/{task}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


# ---- queues that are reset one by one, and packed ones ----------------------------------------


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_queues_are_reset_and_come_back(path: str, transport: str) -> None:
    """Connections live on; what waited is sent."""
    guest = Guest(Vsock(3, path), transport)
    guest.start()
    sock, port = from_host(guest)
    regs, driver = guest.rig.regs, guest.rig.driver
    for _ in range(3):
        assert regs.reset_queue(RX)
        sock.sendall(b"meanwhile")
        guest.rig.settle()
        guest.rx = driver.setup_queue(RX)
        guest.rx.free = []
        guest.post(5)
        guest.rx.kick()
        assert guest.expect(RW).data == b"meanwhile"
        assert regs.reset_queue(TX)
        guest.tx = driver.setup_queue(TX)
        guest.send(RW, PORT, port, b"here")
        assert sock.recv(10) == b"here"
        assert regs.reset_queue(EVENT)
        driver.setup_queue(EVENT)
    assert not guest.rig.broken
    guest.close()


def test_packed_queues(path: str) -> None:
    vsock = Vsock(3, path)
    vsock.placement = Placement("shared")
    rig = Rig(vsock, "mmio", packed=True)
    rig.driver.start()
    rx, tx = rig.driver.queues[RX], rig.driver.queues[TX]
    for _ in range(6):
        rx.add([], [HDR.size, 100])
    rx.kick()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(5)
        sock.connect(path)
        sock.sendall(b"CONNECT %d\n" % PORT)
        port = HDR.unpack(rx.wait()[2])[2]
        tx.request([HDR.pack(3, 2, PORT, port, 0, 1, RESPONSE, 0, 1 << 18, 0)], [])
        assert line(sock) == b"OK %d\n" % port
        sock.sendall(b"0123456789" * 25)
        got = b"".join(rx.wait()[2][HDR.size :] for _ in range(3))
        assert got == b"0123456789" * 25
        tx.request([HDR.pack(3, 2, PORT, port, 5, 1, RW, 0, 1 << 18, 250), b"reply"], [])
        assert sock.recv(10) == b"reply"
    assert HDR.unpack(rx.wait()[2])[6] == SHUTDOWN
    rig.close()
