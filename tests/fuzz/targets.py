"""What is fuzzed: each virtio device, and what a valid request to each of its queues looks like.

A test fails if a device of vmm/devices/virtio is not here.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

from tests.fuzz.twin import Twin
from vmm.chario import Input, Stream
from vmm.devices import virtio
from vmm.devices.virtio.balloon import Balloon
from vmm.devices.virtio.blk import Blk
from vmm.devices.virtio.console import Console
from vmm.devices.virtio.device import Placement, VirtioDevice
from vmm.devices.virtio.fs import Fs
from vmm.devices.virtio.net import Net
from vmm.devices.virtio.net_backend import Backend
from vmm.devices.virtio.pmem import ALIGN, Pmem
from vmm.devices.virtio.port import Port, Ports
from vmm.devices.virtio.rng import Rng
from vmm.devices.virtio.virtio_mem import VirtioMem
from vmm.devices.virtio.vsock import Vsock
from vmm.memory import GuestMemory

#: What the driver sends, and how many bytes of room it gives.
Request = tuple[bytes, int]

SECTORS = 64
RAM_PAGES = 64


def no_meaning(r: Random) -> Request:
    sent = r.randbytes(r.choice((0, 1, 4, 16, 44, 64, 300)))
    return sent, r.choice((1, 8, 64, 512)) if not sent or r.getrandbits(1) else 0


def room(r: Random) -> Request:
    return b"", r.choice((1, 16, 64, 500, 1526))


def text(r: Random) -> Request:
    return r.randbytes(r.choice((1, 16, 64, 1000))), 0


def blk(r: Random) -> Request:
    kind = r.choice((0, 0, 0, 1, 1, 1, 4, 8, 11, 13, r.getrandbits(8), r.getrandbits(32)))
    sector = r.choice((0, 3, SECTORS - 1, SECTORS, r.getrandbits(64), r.randrange(SECTORS)))
    size = r.choice((512, 512, 1024, 2048, 512 * r.randrange(8), r.randrange(1100)))
    header = struct.pack("<IIQ", kind, 0, sector)
    if kind == 1:
        return header + r.randbytes(size), 1
    if kind in (11, 13):
        ranges = [(r.randrange(SECTORS + 2), r.randrange(9), r.randrange(2)) for _ in range(2)]
        return header + b"".join(struct.pack("<QII", *part) for part in ranges), 1
    return header, 1 if kind == 4 else size + 1


def net_tx(r: Random) -> Request:
    header = struct.pack(
        "<BBHHHHH",
        r.choice((0, 0, 1, 2, 3, 255)),
        r.choice((0, 0, 1, 4, 3, 5, 0x81)),
        *(r.choice((0, 14, 54, 1400, 65535)) for _ in range(4)),
        0,
    )
    return header + r.randbytes(r.choice((14, 60, 200, 1514, 0))), 0


def net_ctrl(r: Random) -> Request:
    body = r.choice((b"", b"\1", r.randbytes(2), r.randbytes(6), r.randbytes(40)))
    return bytes((r.choice((0, 1, 2, 3, 4, 5, 9)), r.randrange(6))) + body, 1


def vsock_tx(r: Random) -> Request:
    size = r.choice((0, 0, 1, 64, 500))
    said = r.choice((size, size, size, 0, 0xFFFFFFFF))
    packet = struct.pack(
        "<QQIIIHHIII",
        r.choice((3, 3, 3, 2, r.getrandbits(64))),
        r.choice((2, 2, 2, 3, r.getrandbits(64))),
        r.randrange(1024, 1028),
        r.randrange(1024, 1028),
        said,
        r.choice((1, 1, 1, 2, 0)),
        r.choice((1, 1, 2, 3, 4, 5, 6, 7, 0, 9)),
        r.choice((0, 1, 2, 3)),
        r.choice((0, 4096, 0xFFFFFFFF)),
        r.choice((0, 4096, 0xFFFFFFFF)),
    )
    return packet + r.randbytes(size), 0


def ports_control(r: Random) -> Request:
    event = r.choice((0, 0, 3, 6, r.randrange(9), 0xFFFF))
    return struct.pack("<IHH", r.choice((0, 1, 2, 0xFFFFFFFF)), event, r.choice((0, 1, 1, 9))), 0


def balloon_pages(r: Random) -> Request:
    first = RAM_PAGES - 24
    pages = [r.choice((first + r.randrange(24), first, r.getrandbits(32))) for _ in range(9)]
    return struct.pack("<9I", *pages), 0


def balloon_stats(r: Random) -> Request:
    return b"".join(struct.pack("<HQ", r.randrange(12), r.getrandbits(64)) for _ in range(5)), 0


def balloon_hint(r: Random) -> Request:
    """A command id, or free pages."""
    if r.getrandbits(1):
        return struct.pack("<I", r.choice((0, 1, 0x8000_0000, r.getrandbits(32)))), 0
    return room(r)


def mem_request(r: Random) -> Request:
    addr = MEM_BASE + r.choice((0, 1, 2, 7, 8, 1 << 20)) * MEM_BLOCK
    kind = r.choice((0, 1, 2, 3, 4, 0xFFFF))
    return struct.pack("<H6xQH6x", kind, addr, r.choice((0, 1, 2, 8, 0xFFFF))), 10


def pmem_request(r: Random) -> Request:
    return struct.pack("<I", r.choice((0, 0, 0, 1, r.getrandbits(32)))), 4


def fuse(r: Random) -> Request:
    """Mostly a session that begins, or names in the root; numbers are right as often as not."""
    name = r.choice((b"file", b"dir", b"new", b"..", b"a/b", b"", bytes(256), b"x" * 300)) + b"\0"
    words = [r.choice((0, 1, 2, 3, 1 << 32 | 2, 4096, r.getrandbits(64))) for _ in range(10)]
    op, body = r.choice(
        (
            (26, struct.pack("<IIII48x", 7, 38, 1 << 17, r.getrandbits(32))),
            (1, name),
            (3, struct.pack("<QQ", 0, 0)),
            (9, struct.pack("<II", 0o755, 0) + name),
            (14, struct.pack("<II", r.choice((0, 2, 0xFFFF)), 0)),
            (27, bytes(8)),
            (35, struct.pack("<IIII", 2, 0o644, 0, 0) + name),
            (12, struct.pack("<Q", 1) + name + name),
            (r.randrange(54), struct.pack("<10Q", *words)[: r.randrange(81)] + name),
            (r.getrandbits(32), r.randbytes(r.randrange(100))),
        )
    )
    size = 40 + len(body)
    lied = r.choice((size, size, size, size, 0, 40, size + 1, 0xFFFFFFFF))
    node = r.choice((1, 1, 1, 2, 1 << 32 | 2, r.getrandbits(64)))
    header = struct.pack("<IIQQIIIHH", lied, op, r.getrandbits(64), node, 0, 0, 1, 0, 0)
    return header + body, r.choice((16, 100, 160, 300, 4096))


class Target:
    """One device: how to make it, and for each of its queues what is asked there.

    ``answers``: the queues whose chains all come back, without anything from outside;
    ``discards``: requests may give guest pages back, which then read as zeros; ``status``: its
    answers end with a byte that used.len need not count; ``here``: no other process can make it.
    """

    def __init__(
        self,
        make: Callable[[Path], VirtioDevice],
        requests: tuple[Callable[[Random], Request], ...] = (),
        *,
        answers: tuple[int, ...] = (),
        discards: bool = False,
        status: bool = False,
        here: bool = False,
        after: Callable[[VirtioDevice], None] | None = None,
    ) -> None:
        self._make = make
        self._requests = requests
        self.answers = answers
        self.discards = discards
        self.status = status
        self.here = here
        self.after = after

    def make(self, scratch: Path) -> VirtioDevice:
        """Its I/O is the shared thread's, so that who waits for that one has waited for all."""
        device = self._make(scratch)
        device.placement = Placement("shared")
        return device

    def request(self, queue: int, r: Random) -> Request:
        ask = self._requests[queue] if queue < len(self._requests) else no_meaning
        return ask(r)


def _disk(scratch: Path) -> VirtioDevice:
    image = scratch / "disk"
    image.write_bytes(os.urandom(512 * SECTORS))
    return Blk(str(image), uring=False)


def _disk_uring(scratch: Path) -> VirtioDevice:
    image = scratch / "uring"
    image.write_bytes(os.urandom(512 * SECTORS))
    return Blk(str(image))


class _Console(Console):
    """Closes its streams too."""

    def __init__(self) -> None:
        self.streams = (Stream(65536), Input())
        super().__init__(*self.streams)

    def close(self) -> None:
        super().close()
        for stream in self.streams:
            stream.close()


MEM_BASE, MEM_BLOCK = 1 << 36, 2 << 20


class _Mem(VirtioMem):
    """Its memory is made when it is attached, as a rig has no board."""

    def attach(self, memory: GuestMemory, loop: Any) -> None:
        self.region = memory.add(MEM_BASE, self.size)
        super().attach(memory, loop)


def _pmem(scratch: Path) -> VirtioDevice:
    image = scratch / "pmem"
    image.write_bytes(bytes(ALIGN))
    return Pmem(str(image))


def _share(scratch: Path) -> VirtioDevice:
    share = scratch / "share"
    (share / "dir").mkdir(parents=True, exist_ok=True)
    (share / "file").write_bytes(bytes(5000))
    return Fs(str(share))


def _ports(scratch: Path) -> VirtioDevice:
    device = Ports()
    device.add(Port("one"))
    return device


TARGETS = {
    "balloon": Target(
        lambda _: Balloon(),
        (balloon_pages, balloon_pages, balloon_stats, balloon_hint, room),
        answers=(0, 1, 3, 4),
        discards=True,
    ),
    "blk": Target(_disk, (blk,), answers=(0,), status=True),
    "blk-uring": Target(_disk_uring, (blk,), answers=(0,), status=True),
    "console": Target(lambda _: _Console(), (room, text), answers=(1,)),
    "fs": Target(_share, (fuse, fuse), answers=(0, 1)),
    "net": Target(lambda _: Net(Backend()), (room, net_tx, net_ctrl), answers=(1, 2)),
    "pmem": Target(_pmem, (pmem_request,), answers=(0,)),
    "rng": Target(lambda _: Rng(), (room,), answers=(0,)),
    "ports": Target(_ports, (room, text, room, ports_control), answers=(1, 3)),
    "vsock": Target(lambda _: Vsock(), (room, vsock_tx, room), answers=(1,)),
    "twin": Target(lambda _: Twin(), answers=(0, 1), here=True),
    "virtio-mem": Target(
        lambda _: _Mem(8 * MEM_BLOCK, requested=4 * MEM_BLOCK),
        (mem_request,),
        answers=(0,),
    ),
}


def targets(*, here: bool = True) -> dict[str, Target]:
    """By name; ``here`` false: those that another process can make."""
    return {name: TARGETS[name] for name in sorted(TARGETS) if here or not TARGETS[name].here}


def classes() -> set[type[VirtioDevice]]:
    """Every virtio device whose rings vmm walks: not those that a process or the kernel serves."""
    found: set[type[VirtioDevice]] = set()
    for path in Path(virtio.__path__[0]).glob("*.py"):
        if path.stem.startswith("vhost"):
            continue
        module = import_module(f"vmm.devices.virtio.{path.stem}")
        found |= {
            cls
            for cls in vars(module).values()
            if isinstance(cls, type)
            and issubclass(cls, VirtioDevice)
            and cls.__module__ == module.__name__
            and cls.DEVICE_ID
        }
    return found
