"""virtio-serial ports from the driver's side, and from the host's ends: virtio-v1.3 §5.3."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.virtio_mock import WRITE
from tests.virtio_rig import TRANSPORTS, Rig
from vmm._native import lib
from vmm.board import Board
from vmm.config import MachineConfig
from vmm.devices.virtio.device import Placement
from vmm.devices.virtio.port import Port, Ports
from vmm.errors import ConfigError, HostError
from vmm.irq import IrqChip
from vmm.memory import GuestMemory

C_RX, C_TX = 2, 3
READY, ADD, REMOVE, PORT_READY, CONSOLE, RESIZE, OPEN, NAME = range(8)
CONTROL = struct.Struct("<IHH")
BUFFERS, TEXT = 0x20_0000, 0x30_0000


def rx_of(port: int) -> int:
    return 2 * port + (2 if port else 0)


class PortRig(Rig):
    """A device with these ports, and a driver that has negotiated multiport."""

    def __init__(self, transport: str, *ports: Port) -> None:
        self.ports = Ports()
        self.ports.placement = Placement("shared")  # so that the rig knows when it is done
        for port in ports:
            self.ports.add(port)
            port._device = self.ports
        super().__init__(self.ports, transport)
        self.owned: list[socket.socket] = []

    def own(self, sock: socket.socket) -> socket.socket:
        sock.settimeout(5)
        self.owned.append(sock)
        return sock

    def start(self) -> None:
        self.driver.next = 0x1_0000
        self.memory.write(0x1_0000, bytes(BUFFERS - 0x1_0000))
        self.driver.start()
        for _ in range(8):
            self.driver.queues[C_RX].add([], [100])
        self.driver.queues[C_RX].kick()

    def say(self, port: int, event: int, value: int = 1) -> None:
        self.driver.queues[C_TX].request([CONTROL.pack(port, event, value)], [])

    def told(self) -> tuple[int, int, int, bytes]:
        """The next control message: (port, event, value, the rest)."""
        queue = self.driver.queues[C_RX]
        data = queue.wait()[2]
        queue.add([], [100])
        queue.kick()
        return (*CONTROL.unpack_from(data), data[CONTROL.size :])

    def quiet(self) -> None:
        self.settle()
        self.settle()
        assert self.driver.queues[C_RX].take() is None

    def bring_up(self, *, open_host: bool = True) -> None:
        """All ports made and opened by the guest."""
        self.start()
        self.say(0, READY)
        for port in self.ports.ports:
            assert self.told() == (port.id, ADD, 1, b"")
        for port in self.ports.ports:
            self.say(port.id, PORT_READY)
            assert self.told() == (port.id, NAME, 1, port.label.encode())
            if open_host:
                assert self.told() == (port.id, OPEN, 1, b"")
            self.say(port.id, OPEN)

    def write(self, port: int, data: bytes) -> None:
        """The guest writes; returns at once."""
        queue = self.driver.queues[rx_of(port) + 1]
        at = TEXT + 0x8000 * port
        self.memory.write(at, data)
        queue.write_desc(0, at, len(data), 0)
        queue.pending[0] = ([], [])
        queue.offer(0)
        queue.kick()

    def wrote(self, port: int) -> None:
        assert self.driver.queues[rx_of(port) + 1].wait()[1] == 0

    def room(self, port: int, nr: int = 1, size: int = 4096) -> None:
        queue = self.driver.queues[rx_of(port)]
        for _ in range(nr):
            slot = (queue.avail_idx + 1) % queue.size
            at = BUFFERS + 0x1000 * slot
            queue.write_desc(slot, at, size, WRITE)
            queue.pending[slot] = ([], [(at, size)])
            queue.offer(slot)
        queue.kick()

    def read(self, port: int) -> bytes:
        return self.driver.queues[rx_of(port)].wait()[2]

    def close(self) -> None:
        for sock in self.owned:
            sock.close()
        super().close()


@pytest.fixture(params=TRANSPORTS)
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[PortRig]:
    """Two ports on sockets."""
    rig = PortRig(
        request.param, Port("a", f"unix:{tmp_path}/a"), Port("org.agent-1", f"unix:{tmp_path}/b")
    )
    yield rig
    rig.close()
    assert not list(tmp_path.iterdir())


def client(rig: PortRig, port: int) -> socket.socket:
    sock = rig.own(socket.socket(socket.AF_UNIX))
    sock.connect(rig.ports.ports[port].path or "")
    return sock


def until_open(rig: PortRig, port: int, is_open: bool = True) -> None:
    made = rig.ports.ports[port]
    rig.until(lambda: made.state["host_open"] == is_open, "the client")


def test_both_ways(rig: PortRig) -> None:
    rig.bring_up(open_host=False)
    assert rig.regs.config(4, 4) == 2
    for port in (1, 0):
        sock = client(rig, port)
        assert rig.told() == (port, OPEN, 1, b"")
        sock.sendall(b"to the guest")
        rig.room(port)
        assert rig.read(port) == b"to the guest"
        rig.write(port, b"to the host")
        rig.wrote(port)
        assert sock.recv(100) == b"to the host"
        state = rig.ports.ports[port].state
        assert (state["sent"], state["received"], state["dropped"]) == (11, 12, 0)


def test_nothing_comes_before_the_guest_opens(rig: PortRig) -> None:
    """Linux would throw it away; and what a client leaves behind waits, too."""
    sock = client(rig, 0)
    sock.sendall(b"early")
    until_open(rig, 0)
    sock.close()
    rig.start()
    rig.room(0, 2)
    rig.say(0, READY)
    assert [rig.told()[:2] for _ in range(2)] == [(0, ADD), (1, ADD)]
    rig.say(0, PORT_READY)
    assert [rig.told()[1:3] for _ in range(2)] == [(NAME, 1), (OPEN, 1)]
    rig.quiet()
    assert rig.driver.queues[0].take() is None
    rig.say(0, OPEN)
    assert rig.read(0) == b"early"
    assert rig.told() == (0, OPEN, 0, b"")
    second = client(rig, 0)
    assert rig.told() == (0, OPEN, 1, b"")
    rig.say(0, OPEN, 0)
    second.sendall(b"later")
    rig.quiet()
    assert rig.driver.queues[0].take() is None
    rig.say(0, OPEN)
    assert rig.read(0) == b"later"


def test_clients_take_turns(rig: PortRig) -> None:
    rig.bring_up(open_host=False)
    rig.room(0, 8)
    clients = [client(rig, 0) for _ in range(3)]
    for nr, sock in enumerate(clients):
        sock.sendall(b"%d" % nr)
    for nr, sock in enumerate(clients):
        assert rig.told() == (0, OPEN, 1, b"")
        assert rig.read(0) == b"%d" % nr
        rig.write(0, b"hello %d" % nr)
        assert sock.recv(100) == b"hello %d" % nr
        rig.wrote(0)
        sock.close()
        assert rig.told() == (0, OPEN, 0, b"")


def test_what_nobody_hears_is_dropped(rig: PortRig) -> None:
    rig.bring_up(open_host=False)
    rig.write(0, b"anybody?")
    rig.wrote(0)
    sock = client(rig, 0)
    assert rig.told() == (0, OPEN, 1, b"")
    rig.write(0, b"now")
    rig.wrote(0)
    assert sock.recv(100) == b"now"
    assert rig.ports.ports[0].state["dropped"] == 8


def test_a_client_that_does_not_read(rig: PortRig) -> None:
    """Its port waits; the other one, and control, do not. When it dies, the port goes on."""
    rig.bring_up(open_host=False)
    slow, quick = client(rig, 0), client(rig, 1)
    assert {rig.told()[0] for _ in range(2)} == {0, 1}
    tx = rig.driver.queues[1]
    rig.memory.write(TEXT, b"s" * 0x8000)
    for slot in range(64):
        tx.write_desc(slot, TEXT, 0x8000, 0)
        tx.pending[slot] = ([], [])
        tx.offer(slot)
    tx.kick()
    rig.write(1, b"quick")
    rig.wrote(1)
    assert quick.recv(10) == b"quick"
    rig.settle()
    assert tx.used_idx < 64
    before = rig.ports.ports[0].state["sent"]
    left = 1 << 20
    while left:
        left -= len(slow.recv(left))
    rig.until(lambda: rig.ports.ports[0].state["sent"] > before, "more")
    slow.close()
    assert rig.told() == (0, OPEN, 0, b"")
    for _ in range(64):
        rig.wrote(0)
    state = rig.ports.ports[0].state
    assert state["sent"] + state["dropped"] == 64 * 0x8000


def test_bytes_are_exact(rig: PortRig) -> None:
    rig.bring_up(open_host=False)
    sock = client(rig, 1)
    rig.told()
    data = os.urandom(2_000_000)
    echo = bytearray()

    def listen() -> None:
        while len(echo) < len(data):
            echo.extend(sock.recv(65536))

    hosts = [threading.Thread(target=listen), threading.Thread(target=sock.sendall, args=(data,))]
    for host in hosts:
        host.start()
    rig.room(1, 8)
    got = bytearray()
    while len(got) < len(data):
        part = rig.read(1)
        got += part
        rig.write(1, part)
        rig.wrote(1)
        rig.room(1)
    for host in hosts:
        host.join()
    assert got == data
    assert echo == data


def test_a_chain_in_many_parts(rig: PortRig) -> None:
    rig.bring_up(open_host=False)
    sock = client(rig, 0)
    rig.told()
    queue = rig.driver.queues[1]
    assert queue.request([b"one,", b"two,", b"three"], [50]) == (0, b"")
    assert sock.recv(100) == b"one,two,three"
    sock.sendall(b"x" * 250)
    assert rig.driver.queues[0].request([b"ignored"], [100, 50, 50]) == (200, b"x" * 200)


def test_a_reset_and_what_the_guest_is_told_then(rig: PortRig) -> None:
    rig.bring_up(open_host=False)
    sock = client(rig, 0)
    rig.told()
    tx = rig.driver.queues[1]
    for slot in range(64):
        tx.write_desc(slot, TEXT, 0x8000, 0)
        tx.offer(slot)
    tx.kick()
    rig.until(lambda: tx.used_idx > 0, "a chain")
    rig.driver.reset()
    assert not rig.ports.ports[0].state["guest_open"]
    rig.start()
    rig.say(0, READY)
    rig.say(0, PORT_READY)
    said = [rig.told()[:3] for _ in range(4)]
    assert sorted(said) == [(0, ADD, 1), (0, OPEN, 1), (0, NAME, 1), (1, ADD, 1)]
    rig.say(0, OPEN)
    sock.sendall(b"still here")
    rig.room(0)
    assert rig.read(0) == b"still here"


def test_a_driver_without_multiport(tmp_path: Path) -> None:
    rig = PortRig("mmio", Port("only"), Port("other"))
    rig.driver.start(2, wanted=1 << 32)
    sock = rig.own(rig.ports.ports[0].connect())
    sock.sendall(b"in")
    rig.room(0)
    assert rig.read(0) == b"in"
    rig.write(0, b"out")
    rig.wrote(0)
    assert sock.recv(10) == b"out"
    rig.close()


def test_console_port() -> None:
    rig = PortRig("mmio", Port("tty", console=True))
    rig.ports.ports[0].resize(132, 50)
    rig.start()
    rig.say(0, READY)
    rig.say(0, PORT_READY)
    assert [rig.told() for _ in range(4)] == [
        (0, ADD, 1, b""),
        (0, CONSOLE, 1, b""),
        (0, NAME, 1, b"tty"),
        (0, RESIZE, 1, struct.pack("<HH", 132, 50)),
    ]
    rig.ports.ports[0].resize(80, 1 << 20)
    assert rig.told() == (0, RESIZE, 1, struct.pack("<HH", 80, 0xFFFF))
    rig.close()


def test_pty(tmp_path: Path) -> None:
    rig = PortRig("mmio", Port("p", "pty"))
    rig.bring_up()
    path = rig.ports.ports[0].path
    assert path
    assert rig.ports.notes() == [f"port p is on {path}"]
    fd = os.open(path, os.O_RDWR | os.O_NOCTTY)
    os.write(fd, b"typed")
    rig.room(0)
    assert rig.read(0) == b"typed"
    rig.write(0, b"shown\n")
    rig.wrote(0)
    assert os.read(fd, 100) == b"shown\n"
    os.close(fd)
    rig.quiet()
    rig.close()


def test_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("old" * 100)
    rig = PortRig("mmio", Port("log", str(path)))
    rig.bring_up()
    rig.room(0)
    for i in range(50):
        rig.write(0, b"line %d\n" % i)
        rig.wrote(0)
    assert path.read_text() == "".join(f"line {i}\n" for i in range(50))
    assert rig.driver.queues[0].take() is None
    with pytest.raises(HostError, match="Device or resource busy"):
        rig.ports.ports[0].connect()
    rig.close()


def test_a_file_with_a_limit(tmp_path: Path) -> None:
    rig = PortRig("mmio", Port("log", f"{tmp_path}/f", limit=25))
    rig.bring_up()
    for _ in range(3):
        rig.write(0, b"0123456789")
        rig.wrote(0)
    assert (tmp_path / "f").read_text() == "0123456789012345678901234"
    assert rig.told() == (0, OPEN, 0, b"")
    state = rig.ports.ports[0].state
    assert (state["sent"], state["dropped"]) == (25, 5)
    assert os.strerror(state["error"]) == "File too large"
    rig.close()


def test_a_file_that_fails() -> None:
    """The guest is told that nobody is there, and goes on."""
    rig = PortRig("mmio", Port("full", "/dev/full"))
    rig.bring_up()
    rig.write(0, b"x")
    rig.wrote(0)
    assert rig.told() == (0, OPEN, 0, b"")
    state = rig.ports.ports[0].state
    assert os.strerror(state["error"]) == "No space left on device"
    rig.close()


def test_control_messages_that_make_no_sense(rig: PortRig) -> None:
    rig.bring_up(open_host=False)
    for port in (0, 1, 2, 0xFFFF_FFFF):
        for event in (ADD, REMOVE, CONSOLE, RESIZE, NAME, 8, 0xFFFF):
            rig.say(port, event)
    for event in (READY, PORT_READY, OPEN):
        rig.say(0x8000_0000, event, 0)
        rig.say(7, event, 0xFFFF)
    rig.quiet()
    assert not rig.broken
    for _ in range(300):  # all of it is bounded
        rig.say(0, PORT_READY)
    rig.settle()
    rig.driver.queues[C_TX].add([b"short"], [])
    rig.driver.queues[C_TX].kick()
    rig.until_broken()


@pytest.mark.parametrize("size", [7, 8])
def test_control_buffers_without_room(size: int) -> None:
    rig = PortRig("mmio", Port("name"))
    rig.driver.start()
    for _ in range(3):
        rig.driver.queues[C_RX].add([], [size])
    rig.say(0, READY)
    if size == 8:
        rig.say(0, PORT_READY)
    rig.until_broken()
    rig.close()


def test_receive_buffers_must_be_writable(rig: PortRig) -> None:
    rig.bring_up(open_host=False)
    client(rig, 0).sendall(b"x")
    rig.driver.queues[0].add([b"for you"], [])
    rig.driver.queues[0].kick()
    rig.until_broken()


def test_clients_leave_nothing_behind(rig: PortRig) -> None:
    rig.bring_up(open_host=False)
    before = len(os.listdir("/proc/self/fd"))
    rig.room(0)  # the end is seen by who has room for more
    for _ in range(500):
        with rig.ports.ports[0].connect() as sock:
            sock.sendall(b"x")
            with pytest.raises(HostError, match="busy"):
                rig.ports.ports[0].connect()
            rig.room(0)
            assert rig.read(0) == b"x"
        until_open(rig, 0, False)
        while rig.driver.queues[C_RX].used_idx != rig.driver.queues[C_RX].seen:
            rig.told()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_connect_needs_a_machine() -> None:
    with pytest.raises(HostError, match="not part of a running machine"):
        Port("a").connect()
    assert Port("a").state == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "name=NAME is missing"),
        ("a", "target=TARGET is missing"),
        ("a b,target=pty", "letters, digits"),
        (f"{'x' * 65},target=pty", "up to 64"),
        ("a,target=", "an empty path"),
        ("a,target=unix:", "an empty path"),
    ],
)
def test_options_that_are_wrong(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        MachineConfig(port=text)


def test_a_limit_is_for_a_file() -> None:
    for target in (None, "pty", "unix:/x"):
        with pytest.raises(ConfigError, match="a limit is for a file"):
            Port("a", target, limit=1)


def test_options(tmp_path: Path) -> None:
    config = MachineConfig(
        port=[f"a,target=unix:{tmp_path}/s", f"b,target={tmp_path}/f,console,limit=2K"]
    )
    memory = GuestMemory([(0, 1 << 20)])
    board = Board(config, memory, IrqChip())
    board.plug_users()
    assert len(board.virtio) == 1
    ports = board.virtio[0]
    assert isinstance(ports, Ports)
    assert [(p.label, p.console, p.id) for p in ports.ports] == [("a", False, 0), ("b", True, 1)]
    assert [p.limit for p in ports.ports] == [0, 2048]
    assert len(ports.QUEUE_SIZES) == 6
    with pytest.raises(ConfigError, match="Two ports are called a"):
        board.plug_users()
    for i in range(lib.VMM_PORTS_MAX - 2):
        ports.add(Port(f"p{i}"))
    with pytest.raises(ConfigError, match="at most 31 ports"):
        ports.add(Port("more"))
    ports.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f"]
    board.close()
    memory.close()


def test_something_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("precious")
    ports = Ports()
    with pytest.raises(HostError, match=r"socket of port a.*something is there"):
        ports.add(Port("a", f"unix:{tmp_path}/s"))
    with pytest.raises(HostError, match="Port b cannot be written"):
        ports.add(Port("b", "/no/such/dir/f"))
    ports.close()
    assert (tmp_path / "s").read_text() == "precious"
