"""The guest's side of virtio-fs, for tests: FUSE requests laid into a queue, answers taken apart.
What Linux's driver would ask, and whatever else a guest could."""

from __future__ import annotations

import os
import stat
import struct
from typing import Any

import pytest

from tests.virtio_mock import VERSION_1, Queue
from tests.virtio_rig import Rig
from vmm.devices.virtio.fs import Fs

(LOOKUP, FORGET, GETATTR, SETATTR, READLINK, SYMLINK) = range(1, 7)
MKNOD, MKDIR, UNLINK, RMDIR, RENAME, LINK, OPEN, READ, WRITE, STATFS, RELEASE = range(8, 19)
FSYNC, SETXATTR, GETXATTR, LISTXATTR, REMOVEXATTR, FLUSH, INIT, OPENDIR, READDIR = range(20, 29)
RELEASEDIR, FSYNCDIR, GETLK, SETLK, SETLKW, ACCESS, CREATE, INTERRUPT, BMAP = range(29, 38)
DESTROY, IOCTL, POLL, NOTIFY_REPLY, BATCH_FORGET, FALLOCATE, READDIRPLUS, RENAME2 = range(38, 46)
LSEEK, COPY_FILE_RANGE, SETUPMAPPING, REMOVEMAPPING, SYNCFS, TMPFILE = range(46, 52)

ROOT = 1
KEEP_CACHE, DIRECT_IO = 2, 1
NOREPLACE, EXCHANGE = 1, 2

IN = struct.Struct("<IIQQIIIHH")
OUT = struct.Struct("<IiQ")
ATTR = struct.Struct("<6Q10I")
ENTRY = struct.Struct("<4QII")
SETATTR_IN = struct.Struct("<IIQQQQQQIIIIIIII")
LOCK = struct.Struct("<QQQQIIII")

MODE, UID, GID, SIZE, ATIME, MTIME, FH, ATIME_NOW, MTIME_NOW = (1 << bit for bit in range(9))


class Attr:
    """struct fuse_attr."""

    def __init__(self, data: bytes) -> None:
        (
            self.ino, self.size, self.blocks, self.atime, self.mtime, self.ctime,
            self.atimensec, self.mtimensec, self.ctimensec, self.mode, self.nlink,
            self.uid, self.gid, self.rdev, self.blksize, _,
        ) = ATTR.unpack(data)  # fmt: skip

    @property
    def kind(self) -> int:
        return stat.S_IFMT(self.mode)


class Entry:
    """struct fuse_entry_out."""

    def __init__(self, data: bytes) -> None:
        self.nodeid, _, self.entry_valid, self.attr_valid, _, _ = ENTRY.unpack_from(data)
        self.attr = Attr(data[ENTRY.size : ENTRY.size + ATTR.size])


ENTRY_SIZE = ENTRY.size + ATTR.size


def z(name: str | bytes) -> bytes:
    return os.fsencode(name) + b"\0"


class Client:
    """A share, and the guest that has mounted it. Owns both."""

    def __init__(
        self,
        path: Any,
        transport: str = "mmio",
        *,
        packed: bool = False,
        init: bool = True,
        **options: Any,
    ) -> None:
        self.fs = Fs(str(path), **options)
        self.rig = Rig(self.fs, transport, packed=packed)
        self.flags = 0
        self.unique = 0
        self.uid = self.gid = 0
        self.start(init=init)

    def start(self, *, init: bool = True) -> None:
        """Also again, after a reset."""
        self.rig.driver.next = 0x1_0000
        self.rig.memory.write(0x1_0000, bytes(1 << 16))  # the rings
        self.rig.driver.start(size=64)
        assert self.rig.driver.features & VERSION_1
        self.mark = self.rig.driver.next
        assert self.mark < 0x2_0000
        if init:
            self.init()

    def close(self) -> None:
        self.rig.close()

    @property
    def queue(self) -> Queue:
        return self.rig.driver.queues[1]

    # ---- requests --------------------------------------------------------------------------------

    def message(self, op: int, node: int, body: bytes = b"", *, length: int = -1) -> bytes:
        self.unique += 2
        size = IN.size + len(body) if length < 0 else length
        return IN.pack(size, op, self.unique, node, self.uid, self.gid, 99, 0, 0) + body

    def send(self, op: int, node: int, body: bytes = b"", room: int = 0, **how: Any) -> int:
        """Without waiting; gives the request's number."""
        self.queue.add([self.message(op, node, body, **how)], [OUT.size + room])
        self.queue.kick()
        return self.unique

    def receive(self) -> tuple[int, int, bytes]:
        """(number, error, answer) of the next that is done."""
        _, length, data = self.queue.wait()
        size, error, unique = OUT.unpack_from(data)
        assert size == length == len(data)
        assert -512 < error <= 0
        assert not error or size == OUT.size
        return unique, -error, data[OUT.size :]

    def ask(
        self, op: int, node: int, body: bytes = b"", room: int = 0, **how: Any
    ) -> tuple[int, bytes]:
        """One request there and back: (errno, answer)."""
        self.rig.driver.next = self.mark
        sent = self.send(op, node, body, room, **how)
        unique, error, data = self.receive()
        assert unique == sent
        return error, data

    def call(self, op: int, node: int, body: bytes = b"", room: int = 0) -> bytes:
        """One that is to succeed; raises OSError otherwise."""
        error, data = self.ask(op, node, body, room)
        if error:
            raise OSError(error, os.strerror(error))
        return data

    def silent(self, op: int, node: int, body: bytes, *, queue: int = 0) -> None:
        """One without an answer."""
        self.rig.driver.next = self.mark
        q = self.rig.driver.queues[queue]
        length, _ = q.request([self.message(op, node, body)], [])
        assert length == 0

    # ---- one method for each ---------------------------------------------------------------------

    def init(self, minor: int = 38, flags: int = 0xFFFF_FFFF) -> tuple[int, ...]:
        out = struct.unpack(
            "<IIIIHHIIHHI28x",
            self.call(INIT, 0, struct.pack("<IIII48x", 7, minor, 1 << 17, flags), 64),
        )
        self.flags = out[3]
        return out

    def lookup(self, name: str | bytes, node: int = ROOT) -> Entry:
        return Entry(self.call(LOOKUP, node, z(name), ENTRY_SIZE))

    def walk(self, path: str, node: int = ROOT) -> int:
        for name in path.split("/"):
            node = self.lookup(name, node).nodeid
        return node

    def forget(self, node: int, count: int = 1) -> None:
        self.silent(FORGET, node, struct.pack("<Q", count))

    def getattr(self, node: int, fh: int | None = None) -> Attr:
        body = struct.pack("<IIQ", fh is not None, 0, fh or 0)
        return Attr(self.call(GETATTR, node, body, 16 + ATTR.size)[16:])

    def setattr(self, node: int, valid: int, **values: int) -> Attr:
        get = values.get
        body = SETATTR_IN.pack(
            valid, 0, get("fh", 0), get("size", 0), 0, get("atime", 0), get("mtime", 0), 0,
            get("atimensec", 0), get("mtimensec", 0), 0, get("mode", 0), 0, get("uid", 0),
            get("gid", 0), 0,
        )  # fmt: skip
        return Attr(self.call(SETATTR, node, body, 16 + ATTR.size)[16:])

    def readlink(self, node: int) -> bytes:
        return self.call(READLINK, node, b"", 4096)

    def symlink(self, name: str, target: str | bytes, node: int = ROOT) -> Entry:
        return Entry(self.call(SYMLINK, node, z(name) + z(target), ENTRY_SIZE))

    def mknod(self, name: str, mode: int, node: int = ROOT, rdev: int = 0) -> Entry:
        body = struct.pack("<IIII", mode, rdev, 0, 0) + z(name)
        return Entry(self.call(MKNOD, node, body, ENTRY_SIZE))

    def mkdir(self, name: str, mode: int = 0o755, node: int = ROOT) -> Entry:
        return Entry(self.call(MKDIR, node, struct.pack("<II", mode, 0) + z(name), ENTRY_SIZE))

    def unlink(self, name: str, node: int = ROOT) -> None:
        self.call(UNLINK, node, z(name))

    def rmdir(self, name: str, node: int = ROOT) -> None:
        self.call(RMDIR, node, z(name))

    def rename(
        self, old: str, new: str, node: int = ROOT, to: int = ROOT, flags: int | None = None
    ) -> None:
        if flags is None:
            self.call(RENAME, node, struct.pack("<Q", to) + z(old) + z(new))
        else:
            self.call(RENAME2, node, struct.pack("<QII", to, flags, 0) + z(old) + z(new))

    def link(self, target: int, name: str, node: int = ROOT) -> Entry:
        return Entry(self.call(LINK, node, struct.pack("<Q", target) + z(name), ENTRY_SIZE))

    def open(self, node: int, flags: int = os.O_RDONLY) -> int:
        return self.open_flags(node, flags)[0]

    def open_flags(self, node: int, flags: int = os.O_RDONLY) -> tuple[int, int]:
        fh, how, _ = struct.unpack("<QII", self.call(OPEN, node, struct.pack("<II", flags, 0), 16))
        return fh, how

    def create(
        self, name: str, mode: int = 0o644, node: int = ROOT, flags: int = os.O_RDWR | os.O_EXCL
    ) -> tuple[Entry, int]:
        body = struct.pack("<IIII", flags, mode, 0, 0) + z(name)
        out = self.call(CREATE, node, body, ENTRY_SIZE + 16)
        return Entry(out), struct.unpack_from("<Q", out, ENTRY_SIZE)[0]

    def tmpfile(self, mode: int = 0o600, node: int = ROOT) -> tuple[Entry, int]:
        body = struct.pack("<IIII", os.O_RDWR, mode, 0, 0) + z("#1")
        out = self.call(TMPFILE, node, body, ENTRY_SIZE + 16)
        return Entry(out), struct.unpack_from("<Q", out, ENTRY_SIZE)[0]

    def read(self, fh: int, offset: int = 0, size: int = 4096, node: int = ROOT) -> bytes:
        return self.call(READ, node, struct.pack("<QQIIQII", fh, offset, size, 0, 0, 0, 0), size)

    def write(self, fh: int, data: bytes, offset: int = 0, flags: int = 0, node: int = ROOT) -> int:
        body = struct.pack("<QQIIQII", fh, offset, len(data), flags, 0, 0, 0) + data
        return int(struct.unpack("<II", self.call(WRITE, node, body, 8))[0])

    def release(self, fh: int, node: int = ROOT) -> None:
        self.call(RELEASE, node, struct.pack("<QIIQ", fh, 0, 0, 0))

    def opendir(self, node: int = ROOT) -> int:
        return int(struct.unpack_from("<Q", self.call(OPENDIR, node, bytes(8), 16))[0])

    def readdir_at(
        self, fh: int, offset: int, node: int = ROOT, room: int = 4096
    ) -> list[tuple[bytes, int, int, int]]:
        """(name, ino, offset, type) of what one answer holds."""
        body = struct.pack("<QQIIQII", fh, offset, room, 0, 0, 0, 0)
        return dirents(self.call(READDIR, node, body, room))

    def readdirplus_at(
        self, fh: int, offset: int, node: int = ROOT, room: int = 4096
    ) -> list[tuple[bytes, Entry, int]]:
        """(name, entry, offset)."""
        body = struct.pack("<QQIIQII", fh, offset, room, 0, 0, 0, 0)
        data = self.call(READDIRPLUS, node, body, room)
        found = []
        while data:
            [(name, _, at, _)] = dirents(data[ENTRY_SIZE:], one=True)
            found.append((name, Entry(data), at))
            data = data[(ENTRY_SIZE + 24 + len(name) + 7) & ~7 :]
        return found

    def listdir(self, node: int = ROOT, room: int = 4096) -> list[bytes]:
        """All names but the dots."""
        fh, offset, names = self.opendir(node), 0, []
        while part := self.readdir_at(fh, offset, node, room):
            names += [name for name, _, _, _ in part]
            offset = part[-1][2]
        self.call(RELEASEDIR, node, struct.pack("<QIIQ", fh, 0, 0, 0))
        return [name for name in names if name not in (b".", b"..")]

    def lock(
        self,
        op: int,
        fh: int,
        kind: int,
        owner: int = 1,
        span: tuple[int, int] = (0, (1 << 63) - 1),
        *,
        flock: bool = False,
        node: int = ROOT,
    ) -> tuple[int, bytes]:
        body = LOCK.pack(fh, owner, *span, kind, 0, flock, 0)
        return self.ask(op, node, body, 24)


def fails(number: int) -> Any:
    return pytest.raises(OSError, match=os.strerror(number))


def dirents(data: bytes, *, one: bool = False) -> list[tuple[bytes, int, int, int]]:
    found = []
    while data:
        ino, off, length, kind = struct.unpack_from("<QQII", data)
        found.append((data[24 : 24 + length], ino, off, kind))
        if one:
            break
        data = data[(24 + length + 7) & ~7 :]
    return found
