"""The guest's half of virtio-vsock for tests: packets by hand, through the rig's driver."""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple

from tests.virtio_mock import WRITE, Queue
from tests.virtio_rig import Rig
from vmm.devices.virtio.device import Placement
from vmm.devices.virtio.vsock import Vsock

RX, TX, EVENT = 0, 1, 2
HOST, CID = 2, 3
REQUEST, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST = range(1, 8)
RCV, SEND = 1, 2
STREAM = 1
HDR = struct.Struct("<QQIIIHHIII")
#: Where buffers lie: beyond what the driver allocates for rings.
RINGS, RX_BUFFERS, TX_BUFFER = 0x1_0000, 0x10_0000, 0x30_0000


class Packet(NamedTuple):
    """virtio-v1.3 §5.10.6, and the payload."""

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    len: int
    type: int
    op: int
    flags: int
    buf_alloc: int
    fwd_cnt: int
    data: bytes


class Guest:
    """A driver with ``nr`` receive buffers of ``size`` bytes, which it gives back at once."""

    def __init__(self, vsock: Vsock, transport: str = "mmio") -> None:
        self.vsock = vsock
        vsock.placement = Placement("shared")  # so that the rig knows when it is done
        self.rig = Rig(vsock, transport)
        self._sockets: list[socket.socket] = []

    def own(self, sock: socket.socket) -> socket.socket:
        """Closed with the guest at the latest; nothing takes longer than 5 s on it."""
        sock.settimeout(5)
        self._sockets.append(sock)
        return sock

    def disown(self) -> list[socket.socket]:
        """All of those; they are the caller's again."""
        owned, self._sockets = self._sockets, []
        return owned

    def start(self, nr: int = 64, size: int = 4096 + HDR.size) -> None:
        self.rig.driver.next = RINGS
        self.rig.memory.write(RINGS, bytes(RX_BUFFERS - RINGS))
        self.rig.driver.start()
        self.rx: Queue = self.rig.driver.queues[RX]
        self.tx: Queue = self.rig.driver.queues[TX]
        self.size = size
        self.rx.free = []
        for slot in range(nr):
            self.post(slot)
        self.rx.kick()

    def post(self, slot: int) -> None:
        addr = RX_BUFFERS + slot * 0x2000
        self.rx.write_desc(slot, addr, self.size, WRITE)
        self.rx.pending[slot] = ([], [(addr, self.size)])
        self.rx.offer(slot)

    def send_raw(self, data: bytes) -> None:
        """One chain, without waiting until the device took it."""
        self.rig.memory.write(TX_BUFFER, data)
        self.tx.write_desc(0, TX_BUFFER, len(data), 0)
        self.tx.pending[0] = ([], [])
        self.tx.offer(0)
        self.tx.kick()

    def send(
        self,
        op: int,
        port: int,
        host_port: int,
        data: bytes = b"",
        *,
        flags: int = 0,
        buf_alloc: int = 1 << 18,
        fwd_cnt: int = 0,
        src: int = CID,
        dst: int = HOST,
        type: int = STREAM,
        length: int | None = None,
    ) -> None:
        n = len(data) if length is None else length
        header = HDR.pack(src, dst, port, host_port, n, type, op, flags, buf_alloc, fwd_cnt)
        self.send_raw(header + data)
        assert self.tx.wait()[1] == 0

    def take(self) -> Packet | None:
        """The next packet, if there is one."""
        got = self.rx.take()
        if got is None:
            return None
        slot, length, data = got
        assert length >= HDR.size
        self.post(slot)
        self.rx.kick()
        packet = Packet(*HDR.unpack_from(data), data[HDR.size :])
        assert (packet.src_cid, packet.dst_cid) == (HOST, self.vsock.cid) or packet.op == RST
        assert packet.len == len(packet.data)
        return packet

    def recv(self) -> Packet:
        """The next packet."""
        found: list[Packet] = []

        def came() -> bool:
            packet = self.take()
            if packet is not None:
                found.append(packet)
            return bool(found)

        self.rig.until(came, "a packet")
        return found[0]

    def expect(self, op: int) -> Packet:
        packet = self.recv()
        assert packet.op == op, packet
        return packet

    def quiet(self) -> None:
        """Nothing more was sent by now."""
        self.rig.settle()
        self.rig.settle()
        assert self.take() is None

    def close(self) -> None:
        for sock in self._sockets:
            sock.close()
        self.rig.close()
