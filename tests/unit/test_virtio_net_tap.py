"""A network card on a tap, in a network namespace of the test's own."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest

from tests.virtio_net import CTRL, HDR, MAC, PLAIN, Card, frame
from vmm._native import lib
from vmm.devices.virtio import net_backend
from vmm.devices.virtio.net_backend import Tap, from_fd
from vmm.errors import ConfigError, HostError

T = TypeVar("T")

CLONE_NEWNET = 0x40000000
ETH_P_ALL = 3
SOL_PACKET, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING = 263, 15, 23
CSUM, TSO4 = 1 << 0, 1 << 11


def problem() -> str:
    """Why there can be no tap here, or nothing."""
    if os.geteuid():
        return "a network namespace needs root"
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR))
    except OSError as e:
        return f"/dev/net/tun: {e.strerror}"
    return ""


pytestmark = pytest.mark.skipif(bool(problem()), reason=problem())


class Namespace:
    """A thread in a network namespace of its own; what it opens stays there."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []
        self.wake = threading.Semaphore(0)
        self.thread = threading.Thread(target=self._main, daemon=True)
        self.thread.start()

        def begin() -> None:
            if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "unshare")
            with (
                contextlib.suppress(OSError),
                open("/proc/sys/net/ipv6/conf/default/disable_ipv6", "w") as f,
            ):
                f.write("1")  # nobody but us speaks

        self.run(begin)

    def _main(self) -> None:
        while True:
            self.wake.acquire()
            if not self.calls:
                return
            self.calls.pop(0)()

    def run(self, fn: Callable[[], T]) -> T:
        """``fn`` there, its result here."""
        got: list[T] = []
        wrong: list[BaseException] = []
        done = threading.Event()

        def call() -> None:
            try:
                got.append(fn())
            except BaseException as e:
                wrong.append(e)
            done.set()

        self.calls.append(call)
        self.wake.release()
        assert done.wait(20)
        if wrong:
            raise wrong[0]
        return got[0]

    def close(self) -> None:
        self.wake.release()
        self.thread.join(10)


@pytest.fixture
def there() -> Iterator[Namespace]:
    try:
        made = Namespace()
    except OSError as e:
        pytest.skip(f"no network namespace: {e}")
    yield made
    made.close()


class TapCard(Card):
    """A card on a tap; its peer is the host's side of the interface."""

    def __init__(self, there: Namespace, name: str = "vmtest0", queues: int = 1, **kw: Any) -> None:
        self.tap = there.run(lambda: Tap(name, queues=queues))
        super().__init__("dgram", backend=self.tap, **kw)
        self.peer.close()
        self.peer = there.run(lambda: wire(self.tap.name))


def wire(name: str) -> socket.socket:
    s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    s.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    s.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    s.bind((name, 0))
    s.settimeout(5)
    return s


NO_OFFLOAD = bytes(10)


@pytest.fixture
def card(there: Namespace) -> Iterator[TapCard]:
    card = TapCard(there)
    yield card
    card.close()


def ipv4_tcp(size: int) -> bytes:
    """A TCP segment of ``size`` bytes of data, its checksum left to others."""
    ip = struct.pack(
        "!BBHHHBBH4s4s", 0x45, 0, 40 + size, 1, 0, 64, 6, 0, b"\x0a\0\0\1", b"\x0a\0\0\2"
    )
    words = struct.unpack("!10H", ip)
    total = sum(words)
    total = (total & 0xFFFF) + (total >> 16)
    ip = ip[:10] + struct.pack("!H", ~total & 0xFFFF) + ip[12:]
    tcp = struct.pack("!HHIIBBHHH", 1000, 2000, 1, 1, 0x50, 0x10, 1000, 0, 0)
    return b"\xff" * 6 + MAC + b"\x08\x00" + ip + tcp + os.urandom(size)


def test_frames_both_ways(card: TapCard) -> None:
    card.driver.start(wanted=PLAIN)
    card.offer(2048, count=20)
    for size in (60, 64, 1000, 1514):
        sent = frame(size)
        card.transmit(sent)
        assert card.recv() == NO_OFFLOAD + sent
        card.peer.send(NO_OFFLOAD + sent)
        header, got = card.received()
        assert got == sent
        assert header[10:] == b"\1\0"
    assert card.regs.config(6, 2) == 1


def test_a_segment_for_the_host_to_cut(card: TapCard) -> None:
    """64 KiB that the driver leaves to the device: header and data pass as they are."""
    features = card.driver.start()
    assert features & CSUM
    assert features & TSO4
    sent = ipv4_tcp(60000)
    header = struct.pack("<BBHHHH", 1, 1, 54, 1448, 34, 16)
    card.transmit(sent, header + b"\0\0")
    assert card.recv() == header + sent


def test_a_segment_for_the_guest_to_join(card: TapCard) -> None:
    """What the guest takes is given in one piece, over many buffers."""
    card.driver.start()
    card.offer(1526, count=60)
    sent = ipv4_tcp(60000)
    header = struct.pack("<BBHHHH", 1, 1, 54, 1448, 34, 16)
    card.peer.send(header + sent)
    got_header, got = card.received()
    assert got == sent
    assert got_header[:10] == header
    assert struct.unpack("<H", got_header[10:])[0] == -(-(len(sent) + HDR) // 1526)


def test_offloads_that_the_driver_did_not_take(card: TapCard) -> None:
    """The kernel cuts the segment for a guest that cannot."""
    card.driver.start(wanted=PLAIN & ~(1 << 1 | 1 << 7 | 1 << 8 | 1 << 9 | 1 << 10 | 3 << 54))
    card.offer(2000, count=20)
    card.peer.send(struct.pack("<BBHHHH", 1, 1, 54, 1448, 34, 16) + ipv4_tcp(4000))
    sizes = [len(card.received()[1]) - 54 for _ in range(3)]
    assert sizes == [1448, 1448, 4000 - 2 * 1448]


def test_offloads_at_run_time(card: TapCard) -> None:
    features = card.driver.start()
    assert features & 1 << 2
    assert card.command(5, 0, struct.pack("<Q", 0)) == 0
    card.offer(2000, count=20)
    card.peer.send(struct.pack("<BBHHHH", 1, 1, 54, 1448, 34, 16) + ipv4_tcp(2000))
    assert [len(card.received()[1]) - 54 for _ in range(2)] == [1448, 552]
    assert card.command(5, 0, struct.pack("<Q", 1 << 1 | 1 << 7)) == 0
    card.peer.send(struct.pack("<BBHHHH", 1, 1, 54, 1448, 34, 16) + ipv4_tcp(2000))
    assert len(card.received()[1]) == 2054
    assert card.command(5, 0, struct.pack("<Q", 1 << 3)) == 1
    assert card.command(5, 0, struct.pack("<Q", 1 << 63)) == 1


def test_a_header_the_kernel_refuses_costs_one_frame(card: TapCard) -> None:
    card.driver.start()
    card.transmit(frame(100), struct.pack("<BBHHHHH", 1, 0, 0, 0, 60000, 60000, 0))
    card.tx.wait()
    assert card.net.stats()["tx_errors"] == 1
    sent = frame(100)
    card.transmit(sent)
    assert card.recv() == NO_OFFLOAD + sent


@pytest.mark.parametrize("pairs", [2, 4])
def test_several_queues(there: Namespace, pairs: int) -> None:
    card = TapCard(there, queues=pairs)
    try:
        card.driver.start()
        assert card.regs.config(8, 2) == pairs
        assert card.command(4, 0, struct.pack("<H", pairs), queue=2 * pairs) == 0
        for bad in (0, pairs + 1, 0xFFFF):
            assert card.command(4, 0, struct.pack("<H", bad), queue=2 * pairs) == 1
        for pair in range(pairs):
            sent = frame(100, pair)
            queue = card.driver.queues[2 * pair + 1]
            queue.add([bytes(HDR) + sent], [])
            queue.kick()
            assert card.recv() == NO_OFFLOAD + sent
            queue.wait()
            for _ in range(40):
                card.driver.queues[2 * pair].add([], [2000])
            card.driver.queues[2 * pair].kick()
        # The kernel chooses a queue by what is in the frame.
        for i in range(40):
            flow = bytearray(ipv4_tcp(100))
            flow[34:36] = struct.pack("!H", i + 1)
            card.peer.send(NO_OFFLOAD + flow)
        card.until(lambda: card.net.stats()["rx_frames"] == 40, "forty frames")
        used = [card.driver.queues[2 * pair].used_idx for pair in range(pairs)]
        assert sum(used) == 40
        assert min(used) > 0, used
        assert card.command(4, 0, struct.pack("<H", 1), queue=2 * pairs) == 0
        for i in range(10):
            flow[34:36] = struct.pack("!H", i + 1)
            card.peer.send(NO_OFFLOAD + flow)
        card.until(lambda: card.net.stats()["rx_frames"] == 50, "fifty frames")
        assert card.driver.queues[0].used_idx == used[0] + 10
    finally:
        card.close()


def test_several_queues_with_a_driver_that_knows_one(there: Namespace) -> None:
    """Then the third queue controls, and the kernel gives the others nothing."""
    card = TapCard(there, queues=4)
    try:
        card.driver.start(3, wanted=PLAIN & ~(1 << 22))
        assert card.command(0, 0, b"\1", queue=CTRL) == 0
        card.offer(2000, count=40)
        for i in range(40):
            flow = bytearray(ipv4_tcp(100))
            flow[34:36] = struct.pack("!H", i + 1)
            card.peer.send(NO_OFFLOAD + flow)
        for _ in range(40):
            card.received()
    finally:
        card.close()


def test_a_tap_that_goes_away(there: Namespace, card: TapCard) -> None:
    card.driver.start()
    card.offer(2000)

    def delete() -> None:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as s:
            index = socket.if_nametoindex(card.tap.name)
            s.send(struct.pack("=IHHIIBBHiII", 32, 17, 5, 1, 0, 0, 0, 0, index, 0, 0))
            assert struct.unpack("=i", s.recv(4096)[16:20]) == (0,)

    there.run(delete)
    card.until(lambda: not card.net.link, "link down")
    assert card.regs.config(6, 2) == 0
    card.transmit(frame(100))
    card.tx.wait()
    assert not card.broken
    assert any("is gone" in fault for fault in card.net.faults())


def test_a_tap_that_is_down_loses_frames(there: Namespace, card: TapCard) -> None:
    card.driver.start()

    def switch(up: bool) -> None:
        with socket.socket() as s:
            raw = card.tap.name.encode()
            fcntl.ioctl(s, net_backend.SIOCSIFFLAGS, struct.pack("16sH22x", raw, int(up)))

    there.run(lambda: switch(False))
    card.transmit(frame(100))
    card.tx.wait()
    assert card.net.stats()["tx_errors"] == 1
    there.run(lambda: switch(True))
    there.run(lambda: card.peer.close())
    card.peer = there.run(lambda: wire(card.tap.name))
    sent = frame(100)
    card.transmit(sent)
    assert card.recv() == NO_OFFLOAD + sent


def test_names_mtu_and_use_by_another(there: Namespace) -> None:
    named = there.run(lambda: Tap("mine0", mtu=1400))
    assert (named.name, named.mtu, named.ident) == ("mine0", 1400, "tap:mine0")
    with pytest.raises(HostError, match="another process uses it"):
        there.run(lambda: Tap("mine0"))
    with pytest.raises(HostError, match="'multi_queue' is not what"):
        there.run(lambda: Tap("mine0", queues=2))
    with pytest.raises(HostError, match="cannot attach to lo"):
        there.run(lambda: Tap("lo"))
    other = there.run(lambda: Tap(""))
    assert other.name.startswith("tap")
    assert other.mtu == 0
    again = from_fd(other.fds[0])
    assert again.kind == lib.VMM_NET_TAP
    assert again.features == other.features
    for tap in (named, other, again):
        tap.close()
    there.run(lambda: Tap("mine0")).close()


def test_without_the_right_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> int:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(fcntl, "ioctl", refuse)
    fds = len(os.listdir("/proc/self/fd"))
    with pytest.raises(HostError, match=r"ip tuntap add tap7 mode tap user .*--net user"):
        Tap("tap7")
    assert len(os.listdir("/proc/self/fd")) == fds


def test_too_many_queues() -> None:
    with pytest.raises(ConfigError, match="1 to 16"):
        Tap("x", queues=17)
