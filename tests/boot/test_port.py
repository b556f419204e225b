"""Linux's virtio-serial on vmm's ports: named, on sockets and a file, byte-exact."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
from pathlib import Path

import pytest

from tests.boot.conftest import Boot
from tests.support.waiting import wait_for

#: What goes each way: PIECE bytes so many times over.
PIECE = 2 << 20
DEADLINE = 150.0
#: MiB each way; all of it when everything is run, as an emulated host works on it for a minute.
TOTAL = int(os.environ.get("VMM_PORT_MIB", "100" if os.environ.get("VMM_FULL") == "1" else "16"))

SCRIPT = """\
n=0
until [ "$(cat /sys/class/virtio-ports/*/name 2>/dev/null | wc -l)" = 3 ]; do
  sleep 0.1; n=$((n+1)); [ $n = 300 ] && break; done
port() {{ for p in /sys/class/virtio-ports/*; do
  [ "$(cat $p/name)" = "$1" ] && echo /dev/${{p##*/}}; done; }}
echo "names=$(cat /sys/class/virtio-ports/*/name | sort | tr '\\n' ' ')"
md5sum < $(port down) > /tmp/down &
dd if=/dev/urandom of=/tmp/a bs=1M count=2 2>/dev/null
all() {{ i=0; while [ $i -lt {times} ]; do cat /tmp/a; i=$((i+1)); done; }}
echo "to the log" > $(port log)
all > $(port up)
echo "up=$(all | md5sum | cut -d' ' -f1)"
wait
echo "down=$(cut -d' ' -f1 /tmp/down)"
"""


class Host(threading.Thread):
    """One end on the host, with a deadline."""

    def __init__(self, path: Path, data: bytes, times: int) -> None:
        super().__init__(daemon=True)
        self.path = path
        self.data = data
        self.times = times
        self.sum = hashlib.md5()
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(DEADLINE)

    def connect(self) -> None:
        wait_for(self.listens, DEADLINE)

    def listens(self) -> bool:
        """A socket has its name a moment before anybody listens."""
        return self.sock.connect_ex(str(self.path)) == 0


class Sender(Host):
    def run(self) -> None:
        self.connect()
        for _ in range(self.times):
            self.sock.sendall(self.data)
            self.sum.update(self.data)
        self.sock.close()


class Receiver(Host):
    def run(self) -> None:
        self.connect()
        left = self.times * PIECE
        while left and (part := self.sock.recv(min(left, 1 << 20))):
            self.sum.update(part)
            left -= len(part)
        self.sock.close()


@pytest.mark.parametrize("transport", ["pci", "mmio"])
def test_ports(boot: Boot, tmp_path: Path, transport: str) -> None:
    times = TOTAL * (1 << 20) // PIECE
    up, down = tmp_path / "up", tmp_path / "down"
    hosts = [Receiver(up, b"", times), Sender(down, os.urandom(PIECE), times)]
    for host in hosts:
        host.start()
    booted = boot(
        SCRIPT.format(times=times),
        port=[
            f"up,target=unix:{up}",
            f"down,target=unix:{down}",
            f"log,target={tmp_path}/log",
        ],
        transport=transport,
        memory="512M",
    )
    for host in hosts:
        host.join(10)
    booted.ok()
    assert booted.value("names") == "down log up"
    assert booted.value("up") == hosts[0].sum.hexdigest(), booted.report()
    assert booted.value("down") == hosts[1].sum.hexdigest(), booted.report()
    assert (tmp_path / "log").read_text() == "to the log\n"
