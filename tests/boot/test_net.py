"""The stock driver on a network card: DHCP, DNS and bulk data through passt, and two machines on
one cable."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guests.initramfs import VIRTIO_MODULES, build, kernel_tree
from tests.boot.conftest import UP, Boot

transports = pytest.mark.parametrize("transport", ["pci", "mmio"])

MIB = 1 << 20

DHCP = """\
cat > /tmp/dhcp <<'END'
#!/bin/sh
[ "$1" = bound ] || exit 0
ip addr add $ip/$mask dev $interface
ip link set mtu ${mtu:-1500} dev $interface
ip route add default via $router
echo "ip=$ip"
echo "router=$router"
END
chmod +x /tmp/dhcp
ip link set eth0 up
udhcpc -i eth0 -s /tmp/dhcp -q -n -f > /tmp/log 2>&1 || cat /tmp/log
grep = /tmp/log
"""


@pytest.fixture(scope="session")
def initramfs() -> Callable[[str], Path]:
    """As everywhere, with the driver of the card."""

    def make(script: str) -> Path:
        modules = (*VIRTIO_MODULES, "virtio_net")
        return build(f'echo "{UP}"\n{script}\npoweroff -f', kernel_tree(), modules=modules)

    return make


class Listener:
    """A TCP server of the host for one connection: gives ``data``, then takes what comes."""

    def __init__(self, data: bytes) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.got = hashlib.sha256()
        self.size = 0
        self.thread = threading.Thread(target=self._serve, args=(data,), daemon=True)
        self.thread.start()

    def _serve(self, data: bytes) -> None:
        try:
            peer, _ = self.socket.accept()
        except OSError:
            return
        with peer:
            peer.sendall(data)
            peer.shutdown(socket.SHUT_WR)
            while piece := peer.recv(1 << 16):
                self.got.update(piece)
                self.size += len(piece)

    def close(self) -> None:
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        self.thread.join(10)


@pytest.fixture
def listener() -> Iterator[Listener]:
    if shutil.which("passt") is None:
        pytest.skip("passt is not installed (apt install passt)")
    made = Listener(os.urandom(20 * MIB))
    yield made
    made.close()


@transports
def test_dhcp_and_bulk_data_both_ways(boot: Boot, transport: str) -> None:
    if shutil.which("passt") is None:
        pytest.skip("passt is not installed (apt install passt)")
    data = os.urandom(20 * MIB)
    down, up = Listener(data), Listener(b"")
    script = f"""{DHCP}
echo "mtu=$(cat /sys/class/net/eth0/mtu)"
echo "down=$(nc 10.0.2.2 {down.port} < /dev/null | sha256sum | cut -d' ' -f1)"
dd if=/dev/urandom of=/tmp/up bs=1M count=20 2>/dev/null
nc 10.0.2.2 {up.port} < /tmp/up
echo "up=$(sha256sum /tmp/up | cut -d' ' -f1)"
echo "dropped=$(cat /sys/class/net/eth0/statistics/rx_dropped)"
"""
    booted = boot(script, net="user", transport=transport).ok()
    up.thread.join(60)
    assert booted.value("ip") == "10.0.2.15", booted.report()
    assert booted.value("router") == "10.0.2.2"
    assert booted.value("mtu") == "65520"
    assert booted.value("down") == hashlib.sha256(data).hexdigest()
    assert up.size == 20 * MIB
    assert up.got.hexdigest() == booted.value("up")
    for listener in (down, up):
        listener.close()
