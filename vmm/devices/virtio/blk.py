"""virtio-blk: a raw file or block device as the guest's disk. virtio-v1.3 §5.2; requests are
served by native/blk.c on an I/O thread of the disk's own, so that a slow disk delays nothing
else. This side opens, checks and locks the file."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct

from vmm._native import ffi, lib
from vmm.devices.virtio.device import IoThread, VirtioDevice
from vmm.errors import ConfigError, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmm.memory import GuestMemory

SECTOR = 512
SERIAL_BYTES = 20
QUEUE_SIZE = 256

# Feature bit numbers, virtio-v1.3 §5.2.3.
F_SEG_MAX = 2
F_RO = 5
F_BLK_SIZE = 6
F_FLUSH = 9

#: capacity, size_max, seg_max, geometry, blk_size: virtio-v1.3 §5.2.4.
_CONFIG = struct.Struct("<QIIHBBI")
#: struct flock of fcntl(2), whose last field is padded.
_FLOCK = struct.Struct("@hhqqi0q")


class DiskSpec:
    """A disk as the user asked for it."""

    __slots__ = ("direct", "path", "readonly", "serial")

    def __init__(
        self, path: str, *, readonly: bool = False, serial: str = "", direct: bool = False
    ) -> None:
        """Raises ConfigError."""
        if not path:
            raise ConfigError("--disk needs a path")
        if len(serial.encode()) > SERIAL_BYTES or not (serial.isascii() and serial.isprintable()):
            raise ConfigError(
                f"serial={serial!r} of disk {path} is not up to {SERIAL_BYTES} printable "
                "ASCII characters"
            )
        self.path = path
        self.readonly = readonly
        self.serial = serial
        self.direct = direct

    def __str__(self) -> str:
        parts = [self.path.replace(",", ",,")]
        parts += ["ro"] * self.readonly + ["direct"] * self.direct
        parts += [f"serial={self.serial.replace(',', ',,')}"] if self.serial else []
        return ",".join(parts)


def parse_disk(text: str) -> DiskSpec:
    """``PATH[,ro][,serial=X][,direct]``; a comma inside a value is doubled. Raises ConfigError."""
    path, *options = (part.replace("\0", ",") for part in text.replace(",,", "\0").split(","))
    readonly = direct = False
    serial = ""
    for option in options:
        key, _, value = option.partition("=")
        if option == "ro":
            readonly = True
        elif option == "rw":
            readonly = False
        elif option == "direct":
            direct = True
        elif key == "serial" and value:
            serial = value
        else:
            raise ConfigError(
                f"--disk {text}: {option!r} is not one of ro, rw, direct, serial=TEXT "
                "(write a comma in a path twice)"
            )
    return DiskSpec(path, readonly=readonly, serial=serial, direct=direct)


class Blk(VirtioDevice):
    """One disk. Opens its file now, so that no path is looked up once a guest runs.

    The file stays locked against other users (shared when read-only) until ``close``. A size
    that is not a multiple of 512 is rounded up: the rest of the last sector reads as zeros.
    Raises HostError.
    """

    DEVICE_ID = 2
    QUEUE_SIZES = (QUEUE_SIZE,)
    KERNEL_CONFIG = "CONFIG_VIRTIO_BLK"

    def __init__(
        self,
        path: str,
        *,
        readonly: bool = False,
        serial: str = "",
        direct: bool = False,
        name: str = "disk0",
        uring: bool = True,
    ) -> None:
        """``uring=False`` does without io_uring, as a host that forbids it."""
        spec = DiskSpec(path, readonly=readonly, serial=serial, direct=direct)
        self.path = path
        self.readonly = readonly
        self.direct = direct
        self._uring = uring
        self.serial = spec.serial or name[:SERIAL_BYTES]
        self._native = ffi.NULL
        self._thread: IoThread | None = None
        self._file = _File(path, readonly, direct)
        super().__init__(name)
        self.size = self._file.size
        block = self._file.align if self.size % max(1, self._file.align) == 0 else 0
        self.config[:] = _CONFIG.pack(
            -(-self.size // SECTOR), 0, QUEUE_SIZE - 2, 0, 0, 0, block or SECTOR
        )

    def device_features(self) -> int:
        bits = 1 << F_SEG_MAX | 1 << F_BLK_SIZE | 1 << F_FLUSH
        return bits | (1 << F_RO if self.readonly else 0)

    def attach(self, memory: GuestMemory, loop: Any) -> None:
        super().attach(memory, loop)
        self._thread = IoThread(self.name)
        config = ffi.new("struct vmm_blk_config *")
        config.fd = self._file.fd
        config.buffered_fd = self._file.buffered_fd
        config.align = self._file.align
        config.read_only = self.readonly
        config.sync = not self._uring
        config.size = self.size
        config.queue_size = QUEUE_SIZE
        config.serial = self.serial.encode().ljust(SERIAL_BYTES, b"\0")
        self._native = lib.vmm_blk_create(self._thread.native, config)
        if self._native == ffi.NULL:
            raise HostError(f"{self.name} ({self.path}): {os.strerror(ffi.errno)}")

    def start_queue(self, index: int, config: Any) -> int:
        return int(lib.vmm_blk_start(self._native, config))

    def stop_queues(self) -> None:
        lib.vmm_blk_stop(self._native)

    @property
    def engine(self) -> str:
        """'uring', or 'sync' where the host has no io_uring."""
        return "uring" if self._native != ffi.NULL and lib.vmm_blk_async(self._native) else "sync"

    def stats(self) -> dict[str, int]:
        """Requests and bytes so far."""
        out = ffi.new("struct vmm_blk_stats *")
        if self._native != ffi.NULL:
            lib.vmm_blk_stats(self._native, out)
        return {name: int(getattr(out, name)) for name, _ in ffi.typeof(out).item.fields}

    def close(self) -> None:
        super().close()
        lib.vmm_blk_destroy(self._native)
        self._native = ffi.NULL
        if self._thread is not None:
            self._thread.close()
            self._thread = None
        self._file.close()


class _File:
    """An opened, checked and locked disk image. ``align``: 0, or what O_DIRECT wants."""

    __slots__ = ("_lock_fd", "align", "buffered_fd", "fd", "size")

    def __init__(self, path: str, readonly: bool, direct: bool) -> None:
        self.fd = self.buffered_fd = self._lock_fd = -1
        self.align = 0
        try:
            self.fd = self.buffered_fd = _open(path, readonly)
            self.size = os.lseek(self.fd, 0, os.SEEK_END)
            if self.size <= 0:
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
            if direct:
                self._go_direct(path, readonly)
        except BaseException:
            self.close()
            raise

    def _go_direct(self, path: str, readonly: bool) -> None:
        import mmap

        try:
            self.fd = _reopen(self.buffered_fd, readonly, os.O_DIRECT)
        except OSError as e:
            raise HostError(
                f"disk {path} cannot bypass the page cache: {e.strerror}; leave out ',direct'",
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
                f"disk {path} is already in use{_holder({fd, other})}; two guests must not share it "
                "unless both have it ',ro'",
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
