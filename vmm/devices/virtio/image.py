"""The file behind a disk: opened, checked, locked. virtio-blk's Blk uses it."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import sys

from vmm.errors import HostError

SECTOR = 512
#: linux/fs.h: the logical block size of a block device.
BLKSSZGET = 0x1268
#: struct flock of fcntl(2), whose last field is padded.
_FLOCK = struct.Struct("@hhqqi0q")


class Image:
    """An opened, checked and locked disk image; ``fd`` passes by the page cache if ``direct``,
    ``buffered_fd`` does not. ``align``: 0, or what O_DIRECT wants of offset, length and memory;
    ``block``: the smallest unit that fits the host, bytes. Raises HostError."""

    __slots__ = ("_lock_fd", "align", "block", "buffered_fd", "device", "fd", "path")

    def __init__(self, path: str, readonly: bool, direct: bool) -> None:
        self.path = path
        self.fd = self.buffered_fd = self._lock_fd = -1
        self.align = 0
        self.block = SECTOR
        try:
            self.fd = self.buffered_fd = _open(path, readonly)
            #: A block device, not a file.
            self.device = stat.S_ISBLK(os.fstat(self.fd).st_mode)
            if self.size() <= 0:
                raise HostError(f"disk {path} is empty; make it larger with truncate -s SIZE")
            # Not the description that io_uring is given: the kernel lets go of those some time
            # after the ring was closed, and the disk would still be locked for the next guest.
            try:
                self._lock_fd = _reopen(self.fd, readonly)
            except OSError as e:
                raise HostError(
                    f"disk {path} could not be opened again through /proc: {e.strerror}",
                    errno=e.errno,
                ) from e
            _lock(self._lock_fd, self.fd, path, readonly)
            if self.device:
                sector = fcntl.ioctl(self.fd, BLKSSZGET, bytes(4))
                self.block = max(SECTOR, int.from_bytes(sector, sys.byteorder))
            if direct:
                self._go_direct(path, readonly)
                if self.size() % self.align == 0:
                    self.block = max(self.block, self.align)
        except BaseException:
            self.close()
            raise

    def _go_direct(self, path: str, readonly: bool) -> None:
        import mmap

        try:
            self.fd = _reopen(self.buffered_fd, readonly, os.O_DIRECT)
        except OSError as e:
            raise HostError(
                f"disk {path} cannot bypass the page cache: {e.strerror}; choose cache=writeback "
                "or writethrough",
                errno=e.errno,
            ) from e
        self.align = SECTOR
        with mmap.mmap(-1, 4096) as page, memoryview(page) as view:
            while self.align < len(page):
                try:
                    os.preadv(self.fd, [view[: self.align]], 0)
                    break
                except OSError:
                    self.align *= 2

    def size(self) -> int:
        """Bytes, now."""
        return os.lseek(self.buffered_fd, 0, os.SEEK_END)

    def resize(self, size: int) -> None:
        """Make the file so many bytes long; a block device must have them. Raises HostError."""
        if self.device:
            if size > self.size():
                raise HostError(f"disk {self.path} is a block device of {self.size()} bytes")
            return
        try:
            os.ftruncate(self.buffered_fd, size)
        except OSError as e:
            raise HostError(
                f"disk {self.path} could not be made {size} bytes long: {e.strerror}",
                errno=e.errno,
            ) from e

    def close(self) -> None:
        for fd in {self.fd, self.buffered_fd, self._lock_fd} - {-1}:
            os.close(fd)
        self.fd = self.buffered_fd = self._lock_fd = -1


def _open(path: str, readonly: bool) -> int:
    try:
        # O_NONBLOCK: a FIFO must be refused, not waited for.
        mode = os.O_RDONLY if readonly else os.O_RDWR
        fd = os.open(path, mode | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as e:
        hint = ""
        if e.errno == errno.EISDIR:
            raise HostError(f"disk {path} is a directory", errno=e.errno) from e
        if not readonly and e.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            hint = "; append ',ro' to use it read-only"
        raise HostError(
            f"disk {path} could not be opened: {e.strerror}{hint}", errno=e.errno
        ) from e
    kind = os.fstat(fd).st_mode
    if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
        os.close(fd)
        what = "a directory" if stat.S_ISDIR(kind) else "not a file or block device"
        raise HostError(f"disk {path} is {what}")
    os.set_blocking(fd, True)
    return fd


def _reopen(fd: int, readonly: bool, flags: int = 0) -> int:
    """Another description of the same file, whatever happened to its name meanwhile."""
    mode = os.O_RDONLY if readonly else os.O_RDWR
    return os.open(f"/proc/self/fd/{fd}", mode | os.O_CLOEXEC | flags)


def _lock(fd: int, other: int, path: str, readonly: bool) -> None:
    """Nobody else may write what this guest uses, or use what it writes. Open-file-description
    locks: they also keep out a second disk of this process, and QEMU."""
    kind = fcntl.F_RDLCK if readonly else fcntl.F_WRLCK
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))
    except OSError as e:
        if e.errno in (errno.EAGAIN, errno.EACCES):
            raise HostError(
                f"disk {path} is already in use{_holder({fd, other})}; two guests must not share "
                "it unless both have it ',ro'",
                errno=e.errno,
            ) from e
        if e.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise HostError(f"disk {path} could not be locked: {e.strerror}", errno=e.errno) from e


def _holder(ours: set[int]) -> str:
    """Who has it, as far as /proc tells; ``ours``: the descriptors of this attempt."""
    mine = os.fstat(min(ours))
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            names = os.listdir(f"/proc/{pid}/fd")
        except OSError:
            continue
        for name in names:
            if pid == str(os.getpid()) and int(name) in ours:
                continue
            try:
                other = os.stat(f"/proc/{pid}/fd/{name}")
            except OSError:
                continue
            if (other.st_dev, other.st_ino) == (mine.st_dev, mine.st_ino):
                return " by this process" if pid == str(os.getpid()) else f" by process {pid}"
    return ""
