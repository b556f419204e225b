"""A kernel or initrd file, and where in guest memory things may be put."""

from __future__ import annotations

import errno
import os
import stat
import time

from vmm.arch.x86_64 import layout
from vmm.errors import BootError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

    from vmm.memory import GuestMemory

    Image = str | os.PathLike[str] | bytes | bytearray | memoryview

MIB = layout.MIB

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


class Places:
    """Who has which part of guest memory. Claims are (start, end, name), disjoint."""

    __slots__ = ("_claims", "low_end", "memory", "source")

    def __init__(self, memory: GuestMemory, source: Source) -> None:
        self.memory = memory
        self.source = source
        self.low_end = layout.low_ram_end(memory)
        self._claims: list[tuple[int, int, str]] = [
            (0, layout.GDT, "the interrupt vectors"),
            (layout.EBDA, layout.HIMEM, "the BIOS area and ACPI tables"),
        ]

    def claim(self, start: int, size: int, name: str) -> None:
        """Take [start, start + size) for ``name``. Raises BootError when it is not all RAM or
        not free."""
        end = start + size
        if not size:
            return
        if end > layout.LOW_RAM_MAX or not self.memory.contains(start, size):
            raise self.source.error(self._no_room(start, end, name))
        for first, last, owner in self._claims:
            if start < last and first < end:
                raise self.source.error(
                    f"cannot be loaded: its {name} at {start:#x}-{end - 1:#x} overlaps {owner} at "
                    f"{first:#x}-{last - 1:#x}"
                )
        self._claims.append((start, end, name))

    def _no_room(self, start: int, end: int, name: str) -> str:
        have = f"the guest has {self.memory.size // MIB} MiB"
        if end > layout.LOW_RAM_MAX:
            return f"wants its {name} at {start:#x}-{end - 1:#x}, where there is no RAM ({have})"
        need = -(-end // MIB)
        return (
            f"needs RAM up to {end:#x} for its {name} and {have}; "
            f"give it more than {need} MiB with --memory"
        )

    def kernel_end(self) -> int:
        """The end of what is claimed so far."""
        return max(last for _, last, _ in self._claims)

    def top(self, size: int, limit: int) -> int | None:
        """The highest page-aligned start of ``size`` free bytes of low RAM that end at or below
        ``limit``; None when there is no such place. Does not claim it."""
        end = min(limit, self.low_end)
        for first, last, _ in sorted(self._claims, reverse=True):
            start = (end - size) & ~(layout.PAGE - 1)
            if start < layout.HIMEM:
                return None
            if start >= last:
                return start
            end = min(end, first)
        return None

    def bottom(self, size: int, start: int) -> int | None:
        """The lowest page-aligned start at or above ``start`` of ``size`` free bytes of low RAM;
        None when there is no such place. Does not claim it."""
        for first, last, _ in sorted(self._claims):
            start = (start + layout.PAGE - 1) & ~(layout.PAGE - 1)
            if start + size <= first:
                break
            start = max(start, last)
        start = (start + layout.PAGE - 1) & ~(layout.PAGE - 1)
        return start if start + size <= self.low_end else None


class Area:
    """A claimed run of low memory that is filled from its start. Raises BootError when full."""

    __slots__ = ("_end", "_places", "_pos")

    def __init__(self, places: Places, start: int, size: int) -> None:
        self._places = places
        self._pos = start
        self._end = start + size

    def skip(self, size: int) -> int:
        """Leave ``size`` bytes to be written later; returns their address."""
        gpa = self._pos
        if gpa + size > self._end:
            raise BootError("too many initrds: their list does not fit low memory; join some")
        self._pos = (gpa + size + 7) & ~7
        return gpa

    def put(self, data: bytes) -> int:
        gpa = self.skip(len(data))
        self._places.memory.write(gpa, data)
        return gpa

    def put_string(self, text: str) -> int:
        return self.put(text.encode("ascii", "replace") + b"\0")
