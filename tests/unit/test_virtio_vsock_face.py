"""virtio-vsock as the library and the user see it: connect, listen, the socket's file, options."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from tests import vsock_fixtures
from tests.vsock_fixtures import PORT, SERVICE, from_guest, in_thread
from tests.vsock_guest import REQUEST, RESPONSE, RST, RW, Guest
from vmm.board import Board
from vmm.config import MachineConfig
from vmm.devices.virtio.vsock import Vsock
from vmm.errors import ConfigError, HostError
from vmm.irq import IrqChip
from vmm.memory import GuestMemory

one = vsock_fixtures.one
path = vsock_fixtures.path


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
