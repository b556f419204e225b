"""Unpacked kernels kept on disk, so that the next start only reads.

One sparse file per kernel in ``$XDG_CACHE_HOME/vmm/kernels``: the unpacked bytes, then a trailer
with their length and a checksum over the trailer and the first page. Nothing here raises: a
cache that cannot be used is one that is not there.
"""

from __future__ import annotations

import os
import stat
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

#: Part of every entry's name: raise it when the format or what is stored changes.
VERSION = 1
KEEP = 8
SUFFIX = ".kernel"
#: magic, length of the data, checksum of the first page and the fields before it.
TRAILER = struct.Struct("<8sQI4x")
MAGIC = b"vmmkern\0"
_CHECKED = 4096


def _directory() -> int:
    """An fd of the cache's directory, made when it is missing. Raises OSError."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        home = os.environ.get("HOME", "")
        if not os.path.isabs(home):
            raise FileNotFoundError(2, "no cache directory")
        base = os.path.join(home, ".cache")
    path = os.path.join(base, "vmm", "kernels")
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(path, flags)
    except FileNotFoundError:
        os.makedirs(path, 0o700, exist_ok=True)
        fd = os.open(path, flags)
    try:
        if not _ours(os.fstat(fd)):
            raise PermissionError(1, "the cache directory is not ours alone")
    except BaseException:
        os.close(fd)
        raise
    return fd


def _ours(st: os.stat_result) -> bool:
    """Only we can have written it."""
    return st.st_uid == os.geteuid() and not st.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _name(key: str) -> str:
    return f"{key}-v{VERSION}{SUFFIX}"


def _checksum(fd: int, length: int) -> int:
    from binascii import crc32

    head = os.pread(fd, min(_CHECKED, length), 0)
    return crc32(head, crc32(MAGIC + length.to_bytes(8, "little")))


def lookup(key: str) -> tuple[int, int] | None:
    """(fd, length) of the entry for ``key``, the fd then the caller's; None when there is none.
    A damaged entry is removed."""
    try:
        directory = _directory()
    except OSError:
        return None
    try:
        return _open_entry(directory, _name(key))
    except OSError:
        return None
    finally:
        os.close(directory)


def _open_entry(directory: int, name: str) -> tuple[int, int] | None:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    fd = os.open(name, flags, dir_fd=directory)
    try:
        st = os.fstat(fd)
        if stat.S_ISREG(st.st_mode) and _ours(st) and st.st_size > TRAILER.size:
            length = st.st_size - TRAILER.size
            magic, stored, crc = TRAILER.unpack(os.pread(fd, TRAILER.size, length))
            if magic == MAGIC and stored == length and crc == _checksum(fd, length):
                return fd, length
        os.unlink(name, dir_fd=directory)
    except (OSError, struct.error):
        pass  # what cannot be read, or removed, is simply not used
    os.close(fd)
    return None


def store(key: str, fill: Callable[[int], int]) -> tuple[int, int] | None:
    """Make the entry for ``key``: ``fill`` writes the data to the fd it gets and returns its
    length. Returns (fd, length) as ``lookup`` does, or None when the cache cannot take it.
    What ``fill`` raises, OSError apart, passes through."""
    try:
        directory = _directory()
    except OSError:
        return None
    temporary = f"{key[:64]}.{os.getpid()}-{int.from_bytes(os.urandom(4), 'little'):x}.tmp"
    try:
        return _write_entry(directory, temporary, key, fill)
    except OSError:
        return None
    finally:
        os.close(directory)


def _write_entry(
    directory: int, temporary: str, key: str, fill: Callable[[int], int]
) -> tuple[int, int]:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(temporary, flags, 0o600, dir_fd=directory)
    try:
        length = fill(fd)
        # No fsync: after a crash a file that lost its end fails the check, and costs one unpack.
        os.pwrite(fd, TRAILER.pack(MAGIC, length, _checksum(fd, length)), length)
        os.rename(temporary, _name(key), src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        os.close(fd)
        os.unlink(temporary, dir_fd=directory)
        raise
    _prune(directory)
    return fd, length


def _prune(directory: int) -> None:
    """Keep the KEEP newest entries, and no unfinished ones that are an hour old."""
    import time

    entries = []
    try:
        for name in os.listdir(directory):
            mtime = os.stat(name, dir_fd=directory, follow_symlinks=False).st_mtime
            if name.endswith(SUFFIX):
                entries.append((mtime, name))
            elif name.endswith(".tmp") and mtime < time.time() - 3600:
                os.unlink(name, dir_fd=directory)
        for _, name in sorted(entries)[:-KEEP]:
            os.unlink(name, dir_fd=directory)
    except OSError:
        pass  # another process prunes too
