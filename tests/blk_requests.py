"""virtio-blk requests as a driver makes them: virtio-v1.3 §5.2.6."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.virtio_mock import Queue
from tests.virtio_rig import Rig
from vmm.devices.virtio.blk import Blk
from vmm.devices.virtio.device import Placement

IN, OUT, FLUSH, GET_ID, DISCARD, ZERO = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
F_RO, F_FLUSH = 1 << 5, 1 << 9
SECTORS = 2048
CANARY = 0xA5


def pattern(sector: int, count: int = 1) -> bytes:
    return b"".join(struct.pack("<Q", s) * 64 for s in range(sector, sector + count))


def header(kind: int, sector: int = 0) -> bytes:
    return struct.pack("<IIQ", kind, 0, sector)


class Request:
    """One request whose writable buffers were filled with the canary beforehand."""

    def __init__(self, q: Queue, readable: list[bytes], writable: list[int], **kw: bool) -> None:
        # Before it is offered: the device may come by without a kick.
        room = sum(map(len, readable)) + sum(writable) + 32 * (len(readable) + len(writable) + 1)
        q.memory.write(q.driver.next, bytes([CANARY]) * room)
        self.head = q.add(readable, writable, **kw)
        self.buffers = q.room(self.head)
        q.kick()
        head, self.length, self.data = q.wait()
        assert head == self.head
        whole = b"".join(q.memory.read(addr, size) for addr, size in self.buffers)
        self.status = whole[-1]
        # Nothing past used.len was written, but for the status byte.
        assert set(whole[self.length : -1]) <= {CANARY}


def read(q: Queue, sector: int, count: int = 1) -> bytes:
    r = Request(q, [header(IN, sector)], [512 * count, 1])
    assert (r.status, r.length) == (OK, 512 * count + 1)
    return r.data[:-1]


def write(q: Queue, sector: int, data: bytes) -> int:
    r = Request(q, [header(OUT, sector), data], [1])
    assert r.length == 1
    return r.status


def segment(sector: int, count: int, flags: int = 0) -> bytes:
    """One of DISCARD or ZERO; flag 1 is unmap."""
    return struct.pack("<QII", sector, count, flags)


class Disk(Rig):
    """A rig whose device is a disk."""

    def __init__(
        self,
        path: Path,
        transport: str,
        placement: str = "device",
        packed: bool = False,
        **options: Any,
    ) -> None:
        self.blk = Blk(str(path), **options)
        self.blk.placement = Placement(placement)
        super().__init__(self.blk, transport, packed=packed)


Make = Callable[..., Disk]
