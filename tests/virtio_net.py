"""A network card on the driver's rig, and its peer: what the network sees."""

from __future__ import annotations

import os
import select
import socket
import struct
from typing import Any

from tests.virtio_mock import Queue
from tests.virtio_rig import Rig
from vmm.devices.virtio.net import Net
from vmm.devices.virtio.net_backend import Backend, Socket

RX, TX, CTRL = 0, 1, 2
HDR = 12
MAC = bytes.fromhex("525400abcdef")
#: Everything but indirect descriptors and event indices.
PLAIN = (1 << 64) - 1 & ~(1 << 28 | 1 << 29)
MRG_RXBUF = 1 << 15

KINDS = {"stream": socket.SOCK_STREAM, "dgram": socket.SOCK_DGRAM, "seq": socket.SOCK_SEQPACKET}


def frame(size: int, seed: int = 0) -> bytes:
    """An Ethernet frame of that many bytes that no other is like."""
    body = struct.pack("<I", seed) + os.urandom(max(0, size - 18))
    return (MAC + bytes.fromhex("525400000001") + b"\x88\xb5" + body)[:size]


class Card(Rig):
    """A card whose peer is a socket of ours."""

    def __init__(
        self,
        kind: str = "seq",
        transport: str = "mmio",
        backend: Backend | None = None,
        packed: bool = False,
        **kw: Any,
    ) -> None:
        self.kind = kind
        ours, theirs = socket.socketpair(socket.AF_UNIX, KINDS[kind])
        self.peer = ours
        self.peer.settimeout(30)
        # Several large frames wait here while the card is not running.
        self.peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.net = Net(backend or Socket(theirs.detach(), "test"), mac=MAC, **kw)
        if backend is not None:
            theirs.close()
        super().__init__(self.net, transport, packed=packed)

    # ---- the peer -------------------------------------------------------------------------------

    def send(self, data: bytes) -> None:
        """A frame to the guest."""
        self.peer.sendall((struct.pack(">I", len(data)) if self.kind == "stream" else b"") + data)

    def exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            got = self.peer.recv(size - len(data))
            assert got, "the card closed the connection"
            data += got
        return data

    def recv(self) -> bytes:
        """A frame from the guest."""
        if self.kind != "stream":
            return self.peer.recv(1 << 17)
        return self.exactly(struct.unpack(">I", self.exactly(4))[0])

    def quiet(self) -> bool:
        """Nothing came that was not read."""
        self.settle_all()
        return not select.select([self.peer], [], [], 0)[0]

    # ---- the guest ------------------------------------------------------------------------------

    @property
    def rx(self) -> Queue:
        return self.driver.queues[RX]

    @property
    def tx(self) -> Queue:
        return self.driver.queues[TX]

    def settle_all(self) -> None:
        """Until the card's own thread has finished what it was doing."""
        from vmm._native import lib

        for _ in range(2):
            lib.vmm_loop_barrier(self.net._threads[0].native)

    def offer(self, *sizes: int, count: int = 1) -> None:
        """Chains to receive into."""
        for _ in range(count):
            self.rx.add([], list(sizes))
        self.rx.kick()

    def received(self) -> tuple[bytes, bytes]:
        """The next frame as the driver gets it: (header, frame), of as many buffers as
        it says."""
        _, length, data = self.rx.wait()
        header, parts = data[:HDR], [data[HDR:]]
        assert length >= HDR
        count = struct.unpack("<H", header[10:12])[0]
        assert count >= 1
        parts += [self.rx.wait(0)[2] for _ in range(count - 1)]
        return header, b"".join(parts)

    def transmit(self, data: bytes, header: bytes = bytes(HDR)) -> None:
        self.tx.add([header + data], [])
        self.tx.kick()

    def command(self, group: int, command: int, data: bytes = b"", queue: int = CTRL) -> int:
        """What the control queue answers: 0 is OK."""
        length, ack = self.driver.queues[queue].request([bytes([group, command]), data], [1])
        assert length == 1
        return ack[0]

    def close(self) -> None:
        super().close()
        self.peer.close()
