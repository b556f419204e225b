"""Linux on devices that the host's kernel serves: vhost-vsock and vhost-net."""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
import struct
import threading
import time

import pytest

from guests.initramfs import VIRTIO_MODULES, build, kernel_tree
from guests.tools import archive
from tests.boot.conftest import UP, Boot
from tests.conftest import count_boot
from tests.linux import BOOT_TIMEOUT
from vmm import Machine
from vmm.devices.virtio.net import Net
from vmm.devices.virtio.vhost_net import VhostNet

SIZE = 1 << 20

transports = pytest.mark.parametrize("transport", ["pci", "mmio"])


def need(path: str) -> None:
    if not os.access(path, os.R_OK | os.W_OK):
        pytest.skip(f"this host has no {path}")


SOCKETS = f"""\
echo "{UP}"
dd if=/dev/urandom of=/tmp/a bs=1M count=1 2>/dev/null
vsock connect 2 9099 < /tmp/a > /tmp/answer
echo "sent=$(sha256sum /tmp/a | cut -d' ' -f1)"
echo "answer=$(cat /tmp/answer)"
vsock listen 5000 < /tmp/answer > /tmp/b
echo "got=$(sha256sum /tmp/b | cut -d' ' -f1)"
poweroff -f
"""


class Host(threading.Thread):
    """Takes what the guest sends to port 9099 and answers with its sum; then sends to the guest's
    port 5000 what it has, and keeps what comes back."""

    def __init__(self, cid: int, data: bytes) -> None:
        super().__init__(daemon=True)
        self.cid, self.data = cid, data
        self.digest = ""
        self.reply = b""
        self.listener = socket.socket(socket.AF_VSOCK)
        self.listener.bind((socket.VMADDR_CID_ANY, 9099))
        self.listener.listen(1)
        self.listener.settimeout(150)

    def run(self) -> None:
        peer, (cid, _) = self.listener.accept()
        with self.listener, peer:
            digest = hashlib.sha256()
            while part := peer.recv(1 << 16):
                digest.update(part)
            self.digest = digest.hexdigest()
            assert cid == self.cid
            peer.sendall(self.digest.encode())
        with self.connect() as peer:
            peer.sendall(self.data)
            peer.shutdown(socket.SHUT_WR)
            while part := peer.recv(1000):
                self.reply += part

    def connect(self) -> socket.socket:
        end = time.monotonic() + 60
        while True:
            sock = socket.socket(socket.AF_VSOCK)
            sock.settimeout(60)
            try:
                sock.connect((self.cid, 5000))
            except OSError:
                sock.close()
                assert time.monotonic() < end, "the guest does not listen"
                continue
            return sock


@transports
def test_sockets(boot: Boot, transport: str) -> None:
    need("/dev/vhost-vsock")
    cid = 42 if transport == "pci" else 43
    host = Host(cid, os.urandom(SIZE))
    host.start()
    modules = (*VIRTIO_MODULES, "vmw_vsock_virtio_transport")
    initrd = build(SOCKETS, kernel_tree(), modules=modules)
    booted = boot(
        initrds=[str(initrd), str(archive("vsock"))],
        vsock=f"cid={cid},vhost",
        transport=transport,
    ).ok()
    host.join(10)
    assert booted.value("answer") == booted.value("sent") == host.digest, booted.report()
    assert booted.value("got") == hashlib.sha256(host.data).hexdigest()
    assert host.reply.decode() == host.digest


CARD = f"""\
echo "{UP}"
ip link set eth0 up
ip addr add 192.168.77.2/24 dev eth0
echo "pairs=$(ls /sys/class/net/eth0/queues | grep -c rx)"
for i in 1 2 3 4 5; do
  ping -c 1 -W 2 192.168.77.1 > /tmp/ping && echo "ping=ok" && break
done
nc 192.168.77.1 7777 < /dev/null > /tmp/data
echo "sum=$(sha256sum /tmp/data | cut -d' ' -f1)"
poweroff -f
"""


def give_address(name: str) -> None:
    """192.168.77.1/24 to an interface of this host: SIOCSIFADDR, SIOCSIFNETMASK."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        for request, address in ((0x8916, "192.168.77.1"), (0x891C, "255.255.255.0")):
            there = struct.pack("=HH4s8x", socket.AF_INET, 0, socket.inet_aton(address))
            fcntl.ioctl(s, request, struct.pack("16s24s", name.encode(), there))


class Server(threading.Thread):
    """Gives ``data`` to the first who connects to 192.168.77.1, port 7777."""

    def __init__(self, data: bytes) -> None:
        super().__init__(daemon=True)
        self.data = data
        self.socket = socket.create_server(("192.168.77.1", 7777))
        self.start()

    def run(self) -> None:
        try:
            peer, _ = self.socket.accept()
        except OSError:
            return
        with peer:
            peer.sendall(self.data)

    def close(self) -> None:
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        self.join(10)


@pytest.mark.parametrize(("transport", "pairs"), [("pci", 1), ("mmio", 1), ("pci", 2)])
def test_card(kernel: str, transport: str, pairs: int) -> None:
    need("/dev/vhost-net")
    need("/dev/net/tun")
    data = os.urandom(SIZE)
    modules = (*VIRTIO_MODULES, "virtio_net")
    machine = Machine(
        kernel=kernel,
        initrds=[str(build(CARD, kernel_tree(), modules=modules))],
        append="quiet",
        memory="256M",
        net=f"tap,ifname=vmmtest0,vhost=on,queues={pairs}",
        cpus=pairs,
        transport=transport,
        timeout=BOOT_TIMEOUT,
    )
    with machine as vm:
        (card,) = (d for d in vm.devices if isinstance(d, Net))
        assert isinstance(card, VhostNet)
        give_address("vmmtest0")  # long before a guest is up
        server = Server(data)
        try:
            result = vm.wait()
        finally:
            server.close()
        assert UP in result.console
        count_boot()
        assert result.reason == "poweroff", result.console
        assert f"pairs={pairs}" in result.console, result.console
        assert "ping=ok" in result.console
        assert f"sum={hashlib.sha256(data).hexdigest()}" in result.console, result.console
        assert card.stats()["rx_frames"] == 0  # nothing of it was seen here
        assert card.stats()["commands"] > 0
