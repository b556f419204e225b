"""Linux's vsock on vmm's, both directions, on both transports."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from guests.initramfs import VIRTIO_MODULES, build, kernel_tree
from guests.tools import archive
from tests.boot.conftest import UP, Boot

SIZE = 16 << 20
DEADLINE = 150.0

SCRIPT = """\
echo "vmm-guest: up"
dd if=/dev/urandom of=/tmp/a bs=1M count={mib} 2>/dev/null
t0=$(cut -d' ' -f1 /proc/uptime)
vsock connect 2 99 < /tmp/a > /tmp/answer
t1=$(cut -d' ' -f1 /proc/uptime)
echo "sent=$(sha256sum /tmp/a | cut -d' ' -f1)"
echo "answer=$(cat /tmp/answer)"
vsock listen 5000 < /tmp/answer > /tmp/b
t2=$(cut -d' ' -f1 /proc/uptime)
echo "got=$(sha256sum /tmp/b | cut -d' ' -f1)"
echo "times=$t0 $t1 $t2"
vsock connect 2 98 < /dev/null || echo "nobody=refused"
poweroff -f
"""


class HostSide(threading.Thread):
    """Takes what the guest sends to port 99 and answers with its sum; then sends to port 5000
    what it has, and keeps what comes back."""

    def __init__(self, path: str, data: bytes) -> None:
        super().__init__(daemon=True)
        self.path = path
        self.data = data
        self.reply = b""
        self.digest = ""
        self.seconds = [0.0, 0.0]
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(f"{path}_99")
        self.listener.listen(1)
        self.listener.settimeout(DEADLINE)

    def run(self) -> None:
        sock, _ = self.listener.accept()
        with self.listener, sock:
            begin = time.monotonic()
            digest = hashlib.sha256()
            while part := sock.recv(1 << 20):
                digest.update(part)
            self.seconds[0] = time.monotonic() - begin
            self.digest = digest.hexdigest()
            sock.sendall(self.digest.encode())
        with self.connect(5000) as sock:
            begin = time.monotonic()
            sock.sendall(self.data)
            sock.shutdown(socket.SHUT_WR)
            while part := sock.recv(1000):
                self.reply += part
            self.seconds[1] = time.monotonic() - begin

    def connect(self, port: int) -> socket.socket:
        """Until the guest listens."""
        end = time.monotonic() + DEADLINE
        while time.monotonic() < end:
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(DEADLINE)
            sock.connect(self.path)
            sock.sendall(b"CONNECT %d\n" % port)
            if sock.recv(3) == b"OK ":
                while sock.recv(1) != b"\n":
                    pass
                return sock
            sock.close()
        raise AssertionError("the guest does not listen")


@pytest.mark.parametrize("transport", ["pci", "mmio"])
def test_both_directions(boot: Boot, tmp_path: Path, transport: str) -> None:
    mib = int(os.environ.get("VMM_VSOCK_MIB", SIZE >> 20))
    path = str(tmp_path / "v")
    host = HostSide(path, os.urandom(mib << 20))
    host.start()
    modules = (*VIRTIO_MODULES, "vmw_vsock_virtio_transport")
    initrd = build(SCRIPT.format(mib=mib), kernel_tree(), modules=modules)
    booted = boot(
        initrds=[str(initrd), str(archive("vsock"))],
        vsock=f"cid=42,path={path}",
        transport=transport,
        memory="512M",
    )
    host.join(10)
    assert UP in booted.console
    booted.ok()
    print(f"{mib} MiB to the host, to the guest: {host.seconds} s; {booted.value('times')}")
    assert booted.value("answer") == booted.value("sent") == host.digest, booted.report()
    assert booted.value("got") == hashlib.sha256(host.data).hexdigest()
    assert host.reply.decode() == host.digest
    assert booted.value("nobody") == "refused"
    booted.machine.close()
    assert not os.path.exists(path)
