"""A kernel's TCP as the guest of a card, over passt to the host: its frames come from a tap in a
namespace, and a driver in Python puts them into the rings."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.unit.test_virtio_net_tap import Namespace, problem
from tests.virtio_net import HDR, Card
from vmm.devices.virtio import net_backend
from vmm.devices.virtio.net_user import ADDRESS, GATEWAY, User

why = problem() or ("" if shutil.which("passt") else "passt is not installed (apt install passt)")
pytestmark = pytest.mark.skipif(bool(why), reason=why)

SIZE = 4 << 20
SLOTS, SLOT = 16, 70016
RX_AT, TX_AT = 0x4_0000, 0x17_0000
SIOCSIFADDR, SIOCSIFNETMASK, SIOCSIFHWADDR = 0x8916, 0x891C, 0x8924
NAME = b"eth0"


def interface(mac: bytes) -> int:
    """A tap that stands for the guest's card, as DHCP would set it up."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    flags = net_backend.IFF_TAP | net_backend.IFF_NO_PI
    fcntl.ioctl(fd, net_backend.TUNSETIFF, struct.pack("16sH22x", NAME, flags))
    with socket.socket() as s:
        for request, value in (
            (SIOCSIFHWADDR, struct.pack("16sH6s16x", NAME, 1, mac)),
            (SIOCSIFADDR, struct.pack("16sHH4s16x", NAME, 2, 0, socket.inet_aton(ADDRESS))),
            (net_backend.SIOCSIFMTU, struct.pack("16si20x", NAME, 65520)),
            (net_backend.SIOCSIFFLAGS, struct.pack("16sH22x", NAME, net_backend.IFF_UP)),
            (SIOCSIFNETMASK, struct.pack("16sHH4s16x", NAME, 2, 0, b"\xff\xff\xff\0")),
        ):
            fcntl.ioctl(s, request, value)
    return fd


class Guest:
    """A card whose driver carries frames between the rings and the tap, on the caller's thread."""

    def __init__(self, **kw: Any) -> None:
        self.card = Card("stream", backend=User(), **kw)
        self.card.driver.start()
        self.there = Namespace()
        self.fd = self.there.run(lambda: interface(self.card.net.mac))
        self.posted = self.sent = self.waiting = 0
        for _ in range(SLOTS):
            self.post()

    def post(self) -> None:
        """Chains come back in order, so each slot is free again when its turn comes."""
        self.card.driver.next = RX_AT + self.posted % SLOTS * SLOT
        self.card.offer(70000)
        self.posted += 1

    def step(self) -> bool:
        """Carry what there is; whether there was anything."""
        card, work = self.card, False
        while (got := card.rx.take()) is not None:
            os.write(self.fd, got[2][HDR:])
            self.post()
            work = True
        while card.tx.take() is not None:
            self.waiting -= 1
        if self.waiting < SLOTS:
            try:
                data = os.read(self.fd, 70000)
            except BlockingIOError:
                return work
            card.driver.next = TX_AT + self.sent % SLOTS * SLOT
            card.transmit(data)
            self.sent += 1
            self.waiting += 1
            return True
        return work

    def run(self, thread: threading.Thread) -> None:
        """Until the thread has ended."""
        deadline = time.monotonic() + 60
        thread.start()
        while thread.is_alive():
            assert time.monotonic() < deadline, self.card.net.stats()
            if not self.step():
                time.sleep(0.0002)

    def close(self) -> None:
        os.close(self.fd)
        self.there.close()
        self.card.close()


def exchange(guest: socket.socket, server: socket.socket, up: bytes, down: bytes) -> list[bytes]:
    """The guest connects, gives ``up`` and takes ``down``; what the server and the guest got."""
    got = []
    guest.connect((GATEWAY, server.getsockname()[1]))
    host, _ = server.accept()
    with host, guest:
        for source, target, data in ((guest, host, up), (host, guest, down)):
            sender = threading.Thread(target=source.sendall, args=(data,), daemon=True)
            sender.start()
            read = bytearray()
            while len(read) < len(data) and (piece := target.recv(1 << 16)):
                read += piece
            sender.join()
            got.append(bytes(read))
    return got


@pytest.fixture(
    params=[{}, {"packed": True}, {"limits": {"tx_bytes": (40 << 20, 1 << 17)}}], ids=str
)
def guest(request: pytest.FixtureRequest) -> Iterator[Guest]:
    made = Guest(**request.param)
    yield made
    made.close()


def test_bulk_data_both_ways(guest: Guest) -> None:
    up, down = os.urandom(SIZE), os.urandom(SIZE)
    sock = guest.there.run(lambda: socket.socket())
    got: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        guest.run(
            threading.Thread(
                target=lambda: got.extend(exchange(sock, server, up, down)), daemon=True
            )
        )
    assert got == [up, down]
    stats = guest.card.net.stats()
    assert stats["rx_dropped"] == stats["tx_dropped"] == stats["tx_errors"] == 0
