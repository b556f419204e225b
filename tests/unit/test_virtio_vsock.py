"""virtio-vsock from the driver's side, and from the host's sockets: virtio-v1.3 §5.10."""

from __future__ import annotations

import contextlib
import os
import socket
import threading

import pytest

from tests import vsock_fixtures
from tests.vsock_fixtures import (
    BUFFER,
    PORT,
    SERVICE,
    client,
    from_guest,
    from_host,
    gone,
    in_thread,
    line,
)
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
    Guest,
)
from vmm.devices.virtio.vsock import Vsock
from vmm.errors import HostError

guest = vsock_fixtures.guest
one = vsock_fixtures.one
path = vsock_fixtures.path
service = vsock_fixtures.service


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


def test_the_last_words_of_a_machine(path: str, service: socket.socket) -> None:
    """What is left when it ends still goes to a host that reads; one that does not is left."""
    guest = Guest(Vsock(3, path))
    guest.start()
    ends = [from_guest(guest, service, 1024), from_guest(guest, service, 1025)]
    for sock in guest.disown():
        sock.settimeout(5)
    data = os.urandom(BUFFER)
    for port in (1024, 1025):
        for at in range(0, BUFFER, 32768):
            guest.send(RW, port, SERVICE, data[at : at + 32768])
    closer = threading.Thread(target=guest.close)
    closer.start()
    got = b""
    while part := ends[0].recv(1 << 20):
        got += part
    assert got == data
    closer.join()
    ends[0].close()
    rest = b""
    while part := ends[1].recv(1 << 20):
        rest += part
    assert rest
    assert data.startswith(rest)
    ends[1].close()


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
