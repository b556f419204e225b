"""A share mounted by this host's own kernel: what it asks of /dev/fuse is laid into the device's
queue, as its driver would in a guest, and answered from there. For root only."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests import virtio_rig
from tests.fuse_client import (
    BATCH_FORGET,
    FORGET,
    GETXATTR,
    IN,
    INTERRUPT,
    LISTXATTR,
    OUT,
    READ,
    READDIR,
    READDIRPLUS,
    Client,
)

#: Room for a request and its answer, and how many are in flight at most.
SLOT, SLOTS = 0x11_0000, 12
RAM = 16 << 20
BASE = 1 << 20
MS_NODEV, MNT_DETACH = 4, 2


def possible() -> bool:
    return os.geteuid() == 0 and os.access("/dev/fuse", os.R_OK | os.W_OK)


def room_for(request: bytes) -> int:
    """What Linux's driver would leave for the answer, or more."""
    op = struct.unpack_from("<I", request, 4)[0]
    if op in (READ, READDIR, READDIRPLUS):
        return OUT.size + int(struct.unpack_from("<I", request, IN.size + 16)[0])
    return OUT.size + (1 << 16 if op in (GETXATTR, LISTXATTR) else 4200)


class Bridge:
    """Two threads between /dev/fuse and the queue. Owns neither."""

    def __init__(self, client: Client, fd: int) -> None:
        self.client = client
        self.fd = fd
        self.queue = client.queue
        self.free = list(range(SLOTS))
        self.pending: dict[int, int] = {}
        self.changed = threading.Condition()
        self.ended = False
        self.threads = [threading.Thread(target=f) for f in (self.ask, self.answer)]
        for thread in self.threads:
            thread.start()

    def ask(self) -> None:
        """Until the file system is unmounted."""
        while True:
            try:
                request = os.read(self.fd, SLOT - 0x4000)
            except OSError as e:
                if e.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):
                    continue
                break
            silent = struct.unpack_from("<I", request, 4)[0] in (FORGET, BATCH_FORGET, INTERRUPT)
            with self.changed:
                self.changed.wait_for(lambda: self.free)
                slot = self.free.pop()
                self.client.rig.driver.next = BASE + slot * SLOT
                head = self.queue.add([request], [] if silent else [room_for(request)])
                self.pending[head] = slot
                self.queue.kick()
                self.changed.notify_all()
        with self.changed:
            self.ended = True
            self.changed.notify_all()

    def answer(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.pending or self.ended)
                if not self.pending:
                    return
                got = self.queue.take()
                if got is None:
                    self.changed.wait(0.0002)
                    continue
                self.free.append(self.pending.pop(got[0]))
                self.changed.notify_all()
            if got[2]:
                with contextlib.suppress(FileNotFoundError):  # it was interrupted
                    os.write(self.fd, got[2])


@contextlib.contextmanager
def mounted(share: Path, where: Path, **options: Any) -> Iterator[Client]:
    libc = ctypes.CDLL(None, use_errno=True)
    ram, virtio_rig.RAM = virtio_rig.RAM, RAM
    try:
        client = Client(share, init=False, **options)
    finally:
        virtio_rig.RAM = ram
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        data = f"fd={fd},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions"
        kind, at = b"fuse.share", os.fsencode(where)
        if libc.mount(b"share", at, kind, MS_NODEV, data.encode()):
            raise OSError(ctypes.get_errno(), "mount")
        bridge = Bridge(client, fd)
        try:
            yield client
        finally:
            libc.umount2(at, MNT_DETACH)
            for thread in bridge.threads:
                thread.join()
    finally:
        os.close(fd)
        client.close()
