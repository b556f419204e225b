"""A kernel or initrd file."""

from __future__ import annotations

import errno
import os
import stat
import time

from vmm.errors import BootError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

    from vmm.memory import GuestMemory

    Image = str | os.PathLike[str] | bytes | bytearray | memoryview

#: A file changed more recently than this may change again within one tick of its time stamps.
RACY_NS = 2_000_000_000


class Source:
    """Bytes to load from: a regular file, or a buffer. Owns its fd. Never trusts the file to
    keep its size: what is gone when it is read is a BootError."""

    __slots__ = ("_data", "fd", "key", "name", "size", "what")

    def __init__(
        self, name: str, size: int, *, fd: int = -1, data: memoryview | None = None, what: str = ""
    ) -> None:
        self.name = name
        self.size = size
        self.fd = fd
        self.what = what
        #: Names these very bytes, for the cache; empty when nothing cheap does.
        self.key = ""
        self._data = data

    @classmethod
    def open(cls, image: Image, what: str) -> Self:
        """``what`` is "kernel" or "initrd", for messages. Raises BootError."""
        if isinstance(image, (bytes, bytearray, memoryview)):
            data = memoryview(image).cast("B")
            if not data:
                raise BootError(f"the {what} given as bytes is empty")
            return cls(f"{what} given as bytes", len(data), data=data, what=what)
        path = os.fspath(image)
        try:
            # O_NONBLOCK: opening a FIFO must not wait for its writer.
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except (OSError, ValueError) as e:
            reason = e.strerror if isinstance(e, OSError) else str(e)
            raise BootError(f"cannot open {what} {path!r}: {reason}") from e
        try:
            st = os.fstat(fd)
            if stat.S_ISDIR(st.st_mode):
                raise BootError(f"{what} {path!r} is a directory, not a file")
            if not stat.S_ISREG(st.st_mode):
                raise BootError(f"{what} {path!r} is not a regular file")
            if not st.st_size:
                raise BootError(f"{what} {path!r} is empty")
        except BaseException:
            os.close(fd)
            raise
        self = cls(path, st.st_size, fd=fd, what=what)
        if time.time_ns() - max(st.st_mtime_ns, st.st_ctime_ns) > RACY_NS:
            fields = (st.st_dev, st.st_ino, st.st_size, st.st_mtime_ns, st.st_ctime_ns)
            self.key = "-".join(f"{field:x}" for field in fields)
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def error(self, text: str) -> BootError:
        """A BootError about this file: "kernel 'vmlinuz' " and then ``text``."""
        name = self.name if self._data is not None else f"{self.what} {self.name!r}"
        return BootError(f"{name} {text}")

    def read(self, offset: int, size: int) -> bytes:
        """Exactly ``size`` bytes at ``offset``. Raises BootError when they are not there."""
        if offset < 0 or size < 0 or offset + size > self.size:
            raise self.error(
                f"is truncated: {size} bytes at offset {offset:#x} are needed and it has "
                f"{self.size:#x}"
            )
        if self._data is not None:
            return bytes(self._data[offset : offset + size])
        try:
            data = os.pread(self.fd, size, offset)
        except OSError as e:
            raise self.error(f"cannot be read: {e.strerror}") from e
        if len(data) != size:
            raise self.error("shrank while it was read")
        return data

    @property
    def path(self) -> str:
        """The file's path; "" for a buffer."""
        return self.name if self._data is None else ""

    def head(self, size: int) -> bytes:
        """Up to ``size`` bytes from the start."""
        return self.read(0, min(size, self.size))

    def load(self, memory: GuestMemory, gpa: int, offset: int, size: int) -> None:
        """Copy file bytes straight to guest RAM, which is all zeros: holes of the file are
        skipped, so the guest's pages for them stay untouched."""
        if offset < 0 or size < 0 or offset + size > self.size:
            raise self.error(
                f"is truncated: {size} bytes at offset {offset:#x} are to be loaded and it has "
                f"{self.size:#x}"
            )
        view = memory.view(gpa, size)
        if self._data is not None:
            view[:] = self._data[offset : offset + size]
            return
        pos, end = offset, offset + size
        try:
            while pos < end:
                start, stop = self._next_data(pos, end)
                while start < stop:
                    got = os.preadv(self.fd, [view[start - offset : stop - offset]], start)
                    if not got:
                        raise self.error("shrank while it was read")
                    start += got
                pos = max(stop, start)
        except OSError as e:
            raise self.error(f"cannot be read: {e.strerror}") from e

    def _next_data(self, pos: int, end: int) -> tuple[int, int]:
        """The first run of data in [pos, end), or (end, end) when only a hole is left."""
        try:
            start = os.lseek(self.fd, pos, os.SEEK_DATA)
            stop = os.lseek(self.fd, start, os.SEEK_HOLE)
        except OSError as e:
            if e.errno == errno.ENXIO and os.fstat(self.fd).st_size >= end:
                return end, end
            return pos, end
        return min(start, end), min(stop, end)
