"""User-mode networking: passt behind a card, and what the command line says about cards."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.virtio_net import MAC, Card
from vmm import options
from vmm._native import lib
from vmm.devices.virtio import net_backend, net_user
from vmm.devices.virtio.net import Net, default_mac
from vmm.devices.virtio.net_backend import Backend, Socket, from_fd, make
from vmm.devices.virtio.net_options import OPTIONS, parse_forward, parse_mac
from vmm.devices.virtio.net_user import User
from vmm.errors import ConfigError, HostError

GUEST, GATEWAY = socket.inet_aton(net_user.ADDRESS), socket.inet_aton(net_user.GATEWAY)
GATEWAY_MAC = bytes.fromhex(net_user.GATEWAY_MAC.replace(":", ""))

needs_passt = pytest.mark.skipif(
    shutil.which("passt") is None, reason="passt is not installed (apt install passt)"
)


def read(text: str) -> options.Options:
    return options.read("net", OPTIONS, text)


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


def udp(source: bytes, target: bytes, sport: int, dport: int, data: bytes) -> bytes:
    """A frame from the guest, its UDP without a checksum."""
    head = struct.pack("!BBHHHBBH", 0x45, 0, 28 + len(data), 1, 0, 64, 17, 0) + source + target
    head = head[:10] + struct.pack("!H", checksum(head)) + head[12:]
    to = b"\xff" * 6 if target == b"\xff" * 4 else GATEWAY_MAC
    body = struct.pack("!HHHH", sport, dport, 8 + len(data), 0) + data
    return to + MAC + b"\x08\x00" + head + body


def free_port(kind: int = socket.SOCK_STREAM) -> int:
    with socket.socket(socket.AF_INET, kind) as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class UserCard(Card):
    def __init__(self, *forwards: str) -> None:
        self.user = User([parse_forward(text) for text in forwards])
        self.pid = self.user._pid
        super().__init__(backend=self.user)
        self.driver.start()
        # As Linux has it: what is for it, for all, and for the groups it is in.
        groups = bytes.fromhex("333300000001 01005e000001")
        assert self.command(0, 0, b"\0") == 0
        assert self.command(1, 0, struct.pack("<II", 0, 2) + groups) == 0
        self.offer(70000, count=20)

    def until_frame(self, true: Any) -> bytes:
        """The next frame that is what is waited for."""
        while True:
            got = self.received()[1]
            if true(got):
                return got


@pytest.fixture
def cards() -> Iterator[list[UserCard]]:
    made: list[UserCard] = []
    yield made
    for card in made:
        card.close()
        with pytest.raises(ProcessLookupError):
            os.kill(card.pid, 0)


@needs_passt
def test_dhcp(cards: list[UserCard]) -> None:
    card = UserCard()
    cards.append(card)
    discover = struct.pack("!BBBBIHH16s16s192s4s", 1, 1, 6, 0, 7, 0, 0, b"", MAC, b"", b"c\x82Sc")
    card.transmit(udp(bytes(4), b"\xff" * 4, 68, 67, discover + b"\x35\x01\x01\xff" + bytes(60)))
    reply = card.until_frame(lambda f: f[23:24] == b"\x11" and f[34:36] == b"\0\x43")
    assert reply[42 + 16 : 42 + 20] == GUEST
    assert card.net.mtu == 65520


@needs_passt
def test_the_gateway_is_the_host(cards: list[UserCard]) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(5)
        card = UserCard()
        cards.append(card)
        card.transmit(udp(GUEST, GATEWAY, 5000, server.getsockname()[1], b"hello host"))
        data, peer = server.recvfrom(100)
        assert data == b"hello host"
        server.sendto(b"hello guest", peer)
        card.until_frame(lambda f: f.endswith(b"hello guest"))


@needs_passt
def test_forwards_lead_into_the_guest(cards: list[UserCard]) -> None:
    tcp, datagrams = free_port(), free_port(socket.SOCK_DGRAM)
    card = UserCard(f"{tcp}:22", f"127.0.0.1:{datagrams}:53/udp")
    cards.append(card)
    # So that it knows who we are.
    card.transmit(udp(GUEST, GATEWAY, 5000, free_port(socket.SOCK_DGRAM), b"x"))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.sendto(b"a question", ("127.0.0.1", datagrams))
        got = card.until_frame(lambda f: f.endswith(b"a question"))
        assert struct.unpack("!H", got[36:38]) == (53,)
    with socket.socket() as s:
        s.setblocking(False)
        s.connect_ex(("127.0.0.1", tcp))
        syn = card.until_frame(lambda f: f[23:24] == b"\x06")
        assert struct.unpack("!H", syn[36:38]) == (22,)


@needs_passt
def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(HostError, match=f"port {port} cannot be had.*in use.*another"):
            User([parse_forward(f"{port}:22")])


@needs_passt
def test_passt_that_dies(cards: list[UserCard]) -> None:
    card = UserCard()
    os.kill(card.pid, signal.SIGKILL)
    card.until(lambda: not card.net.link, "link down")
    assert any("passt" in fault for fault in card.net.faults())
    assert not card.broken
    cards.append(card)


@needs_passt
def test_passt_dies_with_us() -> None:
    """However we end, it sees our end of the socket close."""
    code = (
        "import os, signal; from vmm.devices.virtio.net_user import User; user = User();"
        "user.ready(bytes([2] * 6)); print(user._pid, flush=True);"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    try:
        pidfd = os.pidfd_open(int(done.stdout))
    except ProcessLookupError:
        return
    import select

    assert select.select([pidfd], [], [], 20)[0]
    os.close(pidfd)


def test_without_passt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match=r"needs passt.*apt install passt"):
        User()


@pytest.mark.parametrize(
    ("script", "said"),
    [("echo 'no such option' >&2; exit 1", "no such option"), ("exit 0", "it said nothing")],
)
def test_a_passt_that_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, said: str
) -> None:
    fake = tmp_path / "passt"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    before = os.listdir("/proc/self/fd")
    user = User()
    with pytest.raises(HostError, match=said):
        user.ready(MAC)
    user.close()
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_passt_that_is_mute_is_given_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "passt"
    fake.write_text("#!/bin/sh\nexec sleep 1000\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(net_user, "START_TIMEOUT", 0.05)
    monkeypatch.setattr(net_user, "STOP_TIMEOUT", 0.05)
    user = User()
    pid = user._pid
    with pytest.raises(HostError, match="no sign of life"):
        user.ready(MAC)
    user.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


# ---- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2222:22", "127.0.0.1:2222:22"),
        ("0.0.0.0:80:8080", "0.0.0.0:80:8080"),
        ("53:53/udp", "127.0.0.1:53:53/udp"),
        ("1:2/tcp", "127.0.0.1:1:2"),
        ("[::1]:2222:22", "[::1]:2222:22"),
        ("[fe80::1:2]:1:65535/udp", "[fe80::1:2]:1:65535/udp"),
    ],
)
def test_forwards_are_read(text: str, expected: str) -> None:
    assert str(parse_forward(text)) == expected


@pytest.mark.parametrize(
    "text",
    ["", "22", "22:", ":22", "0:22", "22:65536", "x:22", "1.2.3:1:2", "host:1:2", "1:2/sctp",
     "-1:2", "1:2:3:4", "1:2/"],
)  # fmt: skip
def test_forwards_that_are_wrong(text: str) -> None:
    with pytest.raises(ValueError, match=r"2222:22|tcp nor udp"):
        parse_forward(text)


@pytest.mark.parametrize("text", ["52:54:00:12:34:56", "52-54-00-12-34-56"])
def test_addresses_are_read(text: str) -> None:
    assert parse_mac(text) == bytes.fromhex("525400123456")


@pytest.mark.parametrize(
    "text", ["", "52:54:00:12:34", "53:54:00:12:34:56", "0:0:0:0:0:0", "00:00:00:00:00:00",
             "ff:ff:ff:ff:ff:ff", "52:54:00:12:34:5g", "525400123456", "52:54:00:12:34: 6"],
)  # fmt: skip
def test_addresses_that_are_wrong(text: str) -> None:
    with pytest.raises(ValueError, match="address"):
        parse_mac(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tap,forward=1:2", "forward belongs to --net user, not tap"),
        ("none,ifname=x", "ifname belongs to --net tap, not none"),
        ("user,path=/x", "path belongs to --net socket, not user"),
        ("fd", "fd=N is missing"),
        ("socket", "path=PATH is missing"),
    ],
)
def test_options_of_another_backend(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make(read(text))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("user,mtu=67", "68 to 65535"),
        ("tap,ifname=a/b", "name of an interface"),
        ("tap,ifname=" + "x" * 16, "name of an interface"),
        ("tap,script=/etc/qemu-ifup", "must be one of no"),
        ("none,rx-bytes=fast", "not a size"),
        ("none,tx-frames=10/", "whole number"),
    ],
)
def test_values_that_are_wrong(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read(text)


def test_queue_sizes() -> None:
    from vmm.board import Board
    from vmm.catalog import parse
    from vmm.config import MachineConfig
    from vmm.irq import IrqChip
    from vmm.memory import GuestMemory

    memory = GuestMemory([(0, 1 << 20)])
    board = Board(MachineConfig(), memory, IrqChip())
    net = parse("net,none,queue-size=32,rx-bytes=1M/64K,tx-frames=5").build("net0", board)
    assert isinstance(net, Net)
    assert net.QUEUE_SIZES == (32, 32, 32)
    assert net.limits == {"rx_bytes": (1 << 20, 65536), "tx_frames": (5, 0)}
    net.close()
    for bad in (0, 8, 48, 1024):
        with pytest.raises(ConfigError, match="power of two"):
            parse(f"net,none,queue-size={bad}").build("net0", board)
    board.close()
    memory.close()


def test_default_addresses_differ_and_stay() -> None:
    made = {default_mac(ident, i) for ident in ("user", "tap:a", "tap:b") for i in range(50)}
    assert len(made) == 150
    assert all(mac[:3] == b"\x52\x54\0" for mac in made)
    assert default_mac("user", 0) == default_mac("user", 0)


def test_descriptors_that_are_neither(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with (tmp_path / "file").open("wb") as f, pytest.raises(HostError, match="not a socket"):
        from_fd(f.fileno())
    with pytest.raises(HostError, match="Bad file descriptor"):
        from_fd(9999)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_socket_by_descriptor() -> None:
    for kind, expected in (
        (socket.SOCK_STREAM, lib.VMM_NET_STREAM),
        (socket.SOCK_DGRAM, lib.VMM_NET_PACKET),
        (socket.SOCK_SEQPACKET, lib.VMM_NET_PACKET),
    ):
        ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
        with ours, theirs:
            backend = from_fd(theirs.fileno())
            assert backend.kind == expected
            assert isinstance(backend, Socket)
            backend.close()


def test_a_dump_that_cannot_be_written(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(HostError, match="cannot be written"):
        Net(Backend(), pcap=str(tmp_path / "no" / "dump"))
    assert len(os.listdir("/proc/self/fd")) == before


def test_no_listener_at_the_path(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"cannot connect.*server"):
        net_backend.connect(str(tmp_path / "nobody"))
