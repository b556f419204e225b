"""A guest with a vsock device, a service of the host, and connections between them: the fixtures
``path``, ``guest`` (on each transport), ``one`` (where that makes no difference), ``service``."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.virtio_rig import TRANSPORTS
from tests.vsock_guest import REQUEST, RESPONSE, Guest
from vmm._native import lib
from vmm.devices.virtio.vsock import Vsock
from vmm.errors import HostError

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
