"""Linux on devices that the host's kernel serves: vhost-vsock."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
import time

import pytest

from guests.initramfs import VIRTIO_MODULES, build, kernel_tree
from guests.tools import archive
from tests.boot.conftest import UP, Boot

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
