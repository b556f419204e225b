"""virtio-vsock from the driver's side, and from the host's sockets: virtio-v1.3 §5.10."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.virtio_rig import TRANSPORTS
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
    SEND,
    SHUTDOWN,
    TX_BUFFER,
    Guest,
)
from vmm._native import lib
from vmm.board import Board
from vmm.config import MachineConfig
from vmm.devices.virtio.vsock import Vsock
from vmm.errors import ConfigError, HostError
from vmm.irq import IrqChip
from vmm.memory import GuestMemory

PORT = 5000  # where somebody listens in the guest
SERVICE = 99  # where somebody listens on the host
BUFFER: int = lib.VMM_VSOCK_BUFFER


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "v")


@pytest.fixture(params=TRANSPORTS)
def guest(request: pytest.FixtureRequest, path: str) -> Iterator[Guest]:
    guest = Guest(Vsock(3, path), request.param)
    guest.start()
    yield guest
    guest.close()
    assert not os.path.exists(path)


@pytest.fixture
def service(path: str) -> Iterator[socket.socket]:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{path}_{SERVICE}")
    listener.listen(64)
    listener.settimeout(5)
    yield listener
    listener.close()


@pytest.fixture
def one(path: str) -> Iterator[Guest]:
    """On one transport, where the other cannot make a difference."""
    guest = Guest(Vsock(3, path))
    guest.start()
    yield guest
    guest.close()


def client(guest: Guest, text: bytes = b"CONNECT %d\n" % PORT) -> socket.socket:
    sock = guest.own(socket.socket(socket.AF_UNIX))
    sock.connect(guest.vsock.path or "")
    sock.sendall(text)
    return sock


def line(sock: socket.socket) -> bytes:
    said = b""
    while not said.endswith(b"\n"):
        byte = sock.recv(1)
        if not byte:
            break
        said += byte
    return said


def from_host(guest: Guest, *, buf_alloc: int = 1 << 18) -> tuple[socket.socket, int]:
    """A connection the guest accepted: the client's socket and its port."""
    sock = client(guest)
    asked = guest.expect(REQUEST)
    assert asked.dst_port == PORT
    guest.send(RESPONSE, PORT, asked.src_port, buf_alloc=buf_alloc)
    assert line(sock) == b"OK %d\n" % asked.src_port
    return sock, asked.src_port


def from_guest(guest: Guest, service: socket.socket, port: int = 1024) -> socket.socket:
    guest.send(REQUEST, port, SERVICE)
    answer = guest.expect(RESPONSE)
    assert (answer.src_port, answer.dst_port) == (SERVICE, port)
    assert answer.buf_alloc == BUFFER
    return guest.own(service.accept()[0])


def gone(guest: Guest, *, conns: int = 0) -> None:
    guest.rig.until(lambda: guest.vsock.counts["conns"] == conns, f"{conns} connections")


def test_the_guest_reads_its_cid(guest: Guest) -> None:
    assert guest.rig.regs.config(0, 4) == 3
    assert guest.rig.regs.config(4, 4) == 0


def test_host_to_guest(guest: Guest) -> None:
    sock, port = from_host(guest)
    sock.sendall(b"hello")
    packet = guest.expect(RW)
    assert (packet.data, packet.src_port, packet.dst_port) == (b"hello", port, PORT)
    guest.send(RW, PORT, port, b"good morning")
    assert sock.recv(100) == b"good morning"
    sock.close()
    assert guest.expect(SHUTDOWN).flags == RCV | SEND
    guest.send(RST, PORT, port)
    gone(guest)


def test_guest_to_host(guest: Guest, service: socket.socket) -> None:
    sock = from_guest(guest, service)
    guest.send(RW, 1024, SERVICE, b"question")
    assert sock.recv(100) == b"question"
    sock.sendall(b"answer")
    assert guest.expect(RW).data == b"answer"
    guest.send(SHUTDOWN, 1024, SERVICE, flags=RCV | SEND)
    guest.expect(RST)
    assert sock.recv(1) == b""
    gone(guest)


def test_what_comes_before_the_answer_waits(one: Guest) -> None:
    """A client may write on, and close its half, right after CONNECT."""
    sock = client(one, b"CONNECT %d\nfirst words" % PORT)
    sock.shutdown(socket.SHUT_WR)
    asked = one.expect(REQUEST)
    one.quiet()
    one.send(RESPONSE, PORT, asked.src_port)
    assert one.expect(RW).data == b"first words"
    assert one.expect(SHUTDOWN).flags == SEND
    one.send(RW, PORT, asked.src_port, b"reply")
    assert line(sock) + sock.recv(10) == b"OK %d\nreply" % asked.src_port


def test_a_line_in_pieces(one: Guest) -> None:
    sock = client(one, b"")
    for byte in b"connect 4294967294\r\n":
        one.quiet()
        sock.send(bytes([byte]))
    assert one.expect(REQUEST).dst_port == 0xFFFF_FFFE


@pytest.mark.parametrize(
    "text",
    [
        b"CONNECT\n", b"CONNECT \n", b"CONNECT x\n", b"CONNECT -1\n", b"CONNECT 4294967295\n",
        b"CONNECT 99999999999\n", b"CONNECT 1 2\n", b"HELLO 52\n", b"\n", b"CONNECT 1" + b"0" * 40,
        b"\0" * 64,
    ],
)  # fmt: skip
def test_lines_that_are_none(one: Guest, text: bytes) -> None:
    sock = client(one, text)
    with contextlib.suppress(ConnectionResetError):  # closed with bytes unread
        assert sock.recv(1) == b""
    one.quiet()
    assert one.vsock.counts["asking"] == 0


def test_the_guest_refuses(one: Guest) -> None:
    sock = client(one)
    port = one.expect(REQUEST).src_port
    one.send(RST, PORT, port)
    assert sock.recv(1) == b""
    gone(one)


def test_nobody_listens_on_the_host(one: Guest) -> None:
    one.send(REQUEST, 1024, SERVICE)
    packet = one.expect(RST)
    assert (packet.src_port, packet.dst_port) == (SERVICE, 1024)
    gone(one)


def test_a_backlog_that_is_full(one: Guest, path: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{path}_7")
        listener.listen(0)
        one.send(REQUEST, 1, 7)
        one.expect(RESPONSE)
        one.send(REQUEST, 2, 7)
        one.expect(RST)


def test_without_a_path(path: str) -> None:
    guest = Guest(Vsock(3))
    guest.start()
    guest.send(REQUEST, 1, SERVICE)
    guest.expect(RST)
    with pytest.raises(HostError, match="no path"):
        guest.vsock.listen(1)
    guest.close()


def pump_to_guest(guest: Guest, size: int, buf_alloc: int) -> None:
    sock, port = from_host(guest, buf_alloc=buf_alloc)
    data = os.urandom(size)
    sender = threading.Thread(target=sock.sendall, args=(data,))
    sender.start()
    got = bytearray()
    while len(got) < size:
        packet = guest.recv()
        if packet.op == CREDIT_REQUEST:
            guest.send(CREDIT_UPDATE, PORT, port, buf_alloc=buf_alloc, fwd_cnt=len(got))
            continue
        assert packet.op == RW
        got += packet.data
        guest.send(CREDIT_UPDATE, PORT, port, buf_alloc=buf_alloc, fwd_cnt=len(got))
    sender.join()
    assert got == data
    sock.close()


def test_bytes_to_the_guest_are_exact(one: Guest) -> None:
    pump_to_guest(one, 3_000_000, 1 << 18)


def test_bytes_to_a_guest_with_little_room_are_exact(one: Guest) -> None:
    pump_to_guest(one, 5000, 7)


def test_the_guests_credit_is_kept(one: Guest) -> None:
    sock, port = from_host(one, buf_alloc=1000)
    sock.sendall(b"x" * 5000)
    assert len(one.expect(RW).data) == 1000
    one.expect(CREDIT_REQUEST)
    one.quiet()
    # Nonsense is no credit.
    one.send(CREDIT_UPDATE, PORT, port, buf_alloc=1000, fwd_cnt=5000)
    one.send(CREDIT_UPDATE, PORT, port, buf_alloc=10, fwd_cnt=0)
    one.send(CREDIT_UPDATE, PORT, port, buf_alloc=0, fwd_cnt=1000)
    while (packet := one.take()) is not None:
        assert packet.op == CREDIT_REQUEST
    one.send(CREDIT_UPDATE, PORT, port, buf_alloc=4000, fwd_cnt=1000)
    assert len(one.expect(RW).data) == 4000
    one.expect(CREDIT_REQUEST)
    one.quiet()


def test_one_read_fills_many_buffers(one: Guest) -> None:
    sock, _ = from_host(one)
    data = os.urandom(65536)
    sock.sendall(data)
    got = b""
    while len(got) < len(data):
        packet = one.expect(RW)
        assert len(packet.data) <= 4096
        got += packet.data
    assert got == data


def test_buffers_in_parts(one: Guest) -> None:
    """A header in a descriptor of its own, in two, or with the first bytes."""
    one.start(nr=0)
    one.rx.free = list(range(256))
    for parts in ([44, 100], [20, 24, 100], [50, 94], [1] * 144):
        one.rx.add([], parts)
    one.rx.kick()
    c = client(one)
    _, length, data = one.rx.wait()
    assert length == HDR.size
    host_port = HDR.unpack(data)[2]
    one.send(RESPONSE, PORT, host_port)
    assert line(c)
    want = os.urandom(250)
    c.sendall(want)
    got = b"".join(one.rx.wait()[2][HDR.size :] for _ in range(3))
    assert got == want


def test_bytes_of_the_guest_are_exact(one: Guest, service: socket.socket) -> None:
    sock = from_guest(one, service)
    data = os.urandom(3_000_000)
    got = bytearray()

    def read() -> None:
        while len(got) < len(data):
            got.extend(sock.recv(50_000))

    reader = threading.Thread(target=read)
    reader.start()
    sent = fwd = 0
    while sent < len(data):
        n = min(60_000, len(data) - sent, BUFFER - (sent - fwd))
        if n:
            one.send(RW, 1024, SERVICE, data[sent : sent + n])
            sent += n
        while (packet := one.take()) is not None or not BUFFER - (sent - fwd):
            if packet is not None:
                assert packet.op == CREDIT_UPDATE
                fwd = packet.fwd_cnt
    reader.join()
    assert got == data


def test_a_host_that_does_not_read(one: Guest, service: socket.socket) -> None:
    """The guest is told nothing of room that is not there, and ends if it sends beyond."""
    sock = from_guest(one, service)
    other = from_guest(one, service, 1025)
    sent = fwd = 0
    while sent - fwd < BUFFER:
        n = min(65536, BUFFER - (sent - fwd))
        one.send(RW, 1024, SERVICE, b"z" * n)
        sent += n
        while (packet := one.take()) is not None:
            fwd = packet.fwd_cnt
    one.quiet()
    assert sent - fwd == BUFFER
    one.send(CREDIT_REQUEST, 1024, SERVICE)
    assert one.expect(CREDIT_UPDATE).fwd_cnt >= fwd
    # Others are not held up.
    one.send(RW, 1025, SERVICE, b"through")
    assert other.recv(10) == b"through"
    one.send(RW, 1024, SERVICE, b"!" * 65536 * 4)
    assert one.expect(RST).dst_port == 1024
    gone(one, conns=1)
    total = 0
    while data := sock.recv(1 << 20):
        assert not data.strip(b"z")
        total += len(data)
    assert total <= sent


def test_what_the_guest_sent_before_it_closed_arrives(one: Guest, service: socket.socket) -> None:
    """Also when the host reads it late, and the device is reset meanwhile."""
    sock = from_guest(one, service)
    data = os.urandom(BUFFER)
    for at in range(0, BUFFER, 32768):
        one.send(RW, 1024, SERVICE, data[at : at + 32768])
    one.send(SHUTDOWN, 1024, SERVICE, flags=RCV | SEND)
    while one.recv().op != RST:
        pass
    one.send(RW, 1024, SERVICE, b"late")
    one.expect(RST)
    other = from_guest(one, service)  # the same ports again
    one.rig.driver.reset()
    assert other.recv(1) == b""
    got = b""
    while part := sock.recv(1 << 20):
        got += part
    assert got == data
    gone(one)


def test_half_close_by_the_guest(guest: Guest, service: socket.socket) -> None:
    sock = from_guest(guest, service)
    guest.send(RW, 1024, SERVICE, b"the end")
    guest.send(SHUTDOWN, 1024, SERVICE, flags=SEND)
    assert sock.recv(10) == b"the end"
    assert sock.recv(10) == b""
    sock.sendall(b"noted")
    assert guest.expect(RW).data == b"noted"
    guest.send(RW, 1024, SERVICE, b"but")
    guest.expect(RST)
    gone(guest)


def test_the_guest_does_not_listen_any_more(one: Guest, service: socket.socket) -> None:
    sock = from_guest(one, service)
    one.send(SHUTDOWN, 1024, SERVICE, flags=RCV)
    assert one.expect(SHUTDOWN).flags == SEND
    with pytest.raises(BrokenPipeError):
        sock.sendall(b"too late")
    one.send(RW, 1024, SERVICE, b"I still speak")
    assert sock.recv(100) == b"I still speak"
    sock.close()
    assert one.expect(SHUTDOWN).flags == RCV | SEND
    one.send(RST, 1024, SERVICE)
    gone(one)


def test_half_close_by_the_host(one: Guest) -> None:
    sock, port = from_host(one)
    sock.sendall(b"request")
    sock.shutdown(socket.SHUT_WR)
    assert one.expect(RW).data == b"request"
    assert one.expect(SHUTDOWN).flags == SEND
    one.send(RW, PORT, port, b"response")
    one.send(SHUTDOWN, PORT, port, flags=SEND)
    assert sock.recv(100) == b"response"
    assert sock.recv(1) == b""
    # Both halves are over: nobody needs the host's socket any more.
    assert one.expect(SHUTDOWN).flags == RCV | SEND
    one.send(RST, PORT, port)
    gone(one)


def test_a_host_that_goes_while_the_guest_writes(one: Guest, service: socket.socket) -> None:
    sock = from_guest(one, service)
    one.send(RW, 1024, SERVICE, b"a" * 60000)
    sock.close()
    assert one.expect(SHUTDOWN).flags & RCV
    for _ in range(10):
        one.send(RW, 1024, SERVICE, b"b" * 60000)
    updates = []
    while (packet := one.take()) is not None:
        updates.append(packet)
    assert updates[-1].fwd_cnt >= 10 * 60000 - BUFFER // 2, "room, as for a socket that reads"
    one.send(SHUTDOWN, 1024, SERVICE, flags=RCV | SEND)
    while one.recv().op != RST:
        pass
    gone(one)


def test_bytes_left_by_a_host_that_went(one: Guest) -> None:
    """What it wrote is delivered before its end is told."""
    sock, port = from_host(one, buf_alloc=100)
    sock.sendall(b"c" * 250)
    sock.close()
    got = b""
    while True:
        packet = one.recv()
        if packet.op == RW:
            got += packet.data
            one.send(CREDIT_UPDATE, PORT, port, buf_alloc=100, fwd_cnt=len(got))
        elif packet.op == SHUTDOWN and packet.flags & SEND:
            break
    assert got == b"c" * 250


def test_a_client_that_dies_asking(one: Guest) -> None:
    sock = client(one, b"CONN")
    one.rig.until(lambda: one.vsock.counts["asking"] == 1, "a client")
    sock.close()
    one.rig.until(lambda: one.vsock.counts["asking"] == 0, "no client")
    one.quiet()


def test_a_client_that_dies_while_the_guest_thinks(one: Guest) -> None:
    sock = client(one)
    port = one.expect(REQUEST).src_port
    sock.close()
    assert one.expect(RST).src_port == port
    gone(one)
    one.send(RESPONSE, PORT, port)
    one.expect(RST)


def test_a_client_that_dies_before_the_guest_hears_of_it(path: str) -> None:
    guest = Guest(Vsock(3, path))
    guest.start(nr=0)
    sock = client(guest)
    gone(guest, conns=1)
    sock.close()
    gone(guest)
    guest.post(0)
    guest.rx.kick()
    guest.quiet()
    guest.close()


def test_clients_wait_for_the_driver(path: str) -> None:
    guest = Guest(Vsock(3, path))
    sock = client(guest)
    thread, got = in_thread(lambda: guest.own(guest.vsock.connect(7, 5)).recv(5))
    guest.rig.until(lambda: guest.vsock.counts["asking"] == 1, "the library's client")
    guest.start()
    asked = {(p := guest.expect(REQUEST)).dst_port: p.src_port for _ in range(2)}
    assert set(asked) == {PORT, 7}
    guest.send(RESPONSE, 7, asked[7])
    guest.send(RW, 7, asked[7], b"hello")
    thread.join()
    assert got == [b"hello"]
    guest.send(RESPONSE, PORT, asked[PORT])
    assert line(sock) == b"OK %d\n" % asked[PORT]
    guest.close()


def test_a_reset_ends_connections(guest: Guest, service: socket.socket) -> None:
    for _ in range(3):
        sock, _ = from_host(guest)
        asking = client(guest)
        guest.expect(REQUEST)
        other = from_guest(guest, service)
        other.sendall(b"unread")
        guest.rig.driver.reset()
        for end in (sock, asking, other):
            with contextlib.suppress(ConnectionResetError):
                assert end.recv(1) == b""
        assert guest.vsock.counts["conns"] == 0
        guest.start()
    from_host(guest)


def test_transport_reset(guest: Guest) -> None:
    sock, _ = from_host(guest)
    event = guest.rig.driver.queues[EVENT]
    event.add([], [4])
    event.kick()
    guest.rig.settle()
    assert event.take() is None
    guest.rig.regs.interrupts()
    guest.vsock.transport_reset(42)
    assert event.wait()[2] == bytes(4)
    assert sock.recv(1) == b""
    assert guest.rig.regs.interrupts() & 2
    assert guest.rig.regs.config(0, 4) == 42
    # One that finds no buffer waits for it.
    guest.vsock.transport_reset(43)
    event.add([], [8])
    event.kick()
    assert event.wait()[1] == 4
    # The old address is not the guest's any more.
    guest.send(REQUEST, 1, SERVICE, src=3)
    guest.send(REQUEST, 2, SERVICE, src=43)
    assert guest.expect(RST).dst_port == 2


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


# ---- the library's face, and the options ------------------------------------------------------


def in_thread(call: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    got: list[object] = []

    def run() -> None:
        try:
            got.append(call())
        except HostError as e:
            got.append(e)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, got


def test_connect(one: Guest) -> None:
    thread, got = in_thread(lambda: one.vsock.connect(PORT, 5))
    port = one.expect(REQUEST).src_port
    one.send(RESPONSE, PORT, port)
    thread.join()
    sock = got[0]
    assert isinstance(sock, socket.socket)
    sock.sendall(b"hi")
    assert one.expect(RW).data == b"hi"
    thread, got = in_thread(lambda: one.vsock.connect(PORT, 5))
    one.send(RST, PORT, one.expect(REQUEST).src_port)
    thread.join()
    assert "Nobody in the guest accepts" in str(got[0])
    with pytest.raises(HostError, match=r"did not answer.*timed out"):
        one.vsock.connect(PORT, 0.01)
    sock.close()


def test_connect_needs_a_machine() -> None:
    vsock = Vsock(3)
    with pytest.raises(HostError, match="not part of a running machine"):
        vsock.connect(1)
    vsock.close()


def test_listen(one: Guest, path: str) -> None:
    with one.vsock.listen(SERVICE) as listener:
        assert stat.S_IMODE(os.stat(f"{path}_{SERVICE}").st_mode) == 0o600
        listener.settimeout(5)
        sock = from_guest(one, listener)
        one.send(RW, 1024, SERVICE, b"hi")
        assert sock.recv(2) == b"hi"


def test_the_socket_is_the_users_alone(path: str) -> None:
    old = os.umask(0)
    try:
        vsock = Vsock(3, path)
    finally:
        os.umask(old)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    vsock.close()
    assert not os.path.exists(path)


def test_something_in_the_way(path: str) -> None:
    Path(path).write_text("precious")
    with pytest.raises(HostError, match="something is there"):
        Vsock(3, path)
    assert Path(path).read_text() == "precious"
    os.unlink(path)
    first = Vsock(3, path)
    with pytest.raises(HostError, match="something is there"):
        Vsock(4, path)
    os.unlink(path)
    Path(path).write_text("somebody else's")
    first.close()
    assert Path(path).read_text() == "somebody else's"


def test_paths_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="more than 96 bytes"):
        Vsock(3, str(tmp_path / ("x" * 100)))
    with pytest.raises(HostError, match="No such file or directory"):
        Vsock(3, "/no/such/dir/v")
    with pytest.raises(ConfigError, match="from 3 to"):
        Vsock(2)


@pytest.mark.parametrize("text", ["cid=2", "cid=4294967295", "cid=x", "cid=-3", "path="])
def test_options_that_are_wrong(text: str) -> None:
    with pytest.raises(ConfigError):
        MachineConfig(vsock=text)


def test_options(path: str) -> None:
    config = MachineConfig(vsock=f"cid=77,path={path}")
    memory = GuestMemory([(0, 1 << 20)])
    board = Board(config, memory, IrqChip())
    board.plug_users()
    vsock = board.virtio[0]
    assert isinstance(vsock, Vsock)
    assert (vsock.cid, vsock.path, vsock.name) == (77, path, "vsock0")
    with pytest.raises(ConfigError, match="given twice"):
        board.plug_users()
    vsock.close()
    board.close()
    memory.close()
