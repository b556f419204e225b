"""Writes cpio archives as the kernel unpacks them into its first root file system.

The "newc" format, no checksums. kernel buffer-format.rst
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import BinaryIO

S_IFCHR = 0o020000
S_IFDIR = 0o040000
S_IFREG = 0o100000
S_IFLNK = 0o120000

_NAME_MAX = 4096


class CpioWriter:
    """Appends entries to ``out``, a binary file it does not own; ``close`` writes the trailer.

    Paths are relative to the root of the archive; directories above an entry are added by
    themselves. The archive depends on its contents alone: times are 0, owners are root.
    Several archives, each closed, may be written one after another to the same file.
    """

    __slots__ = ("_dirs", "_inode", "_out", "_written")

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._inode = 0
        self._written = 0
        self._dirs: set[str] = set()

    def add_file(self, path: str, data: bytes | memoryview, mode: int = 0o644) -> None:
        """Add a regular file with these contents."""
        self._parents(path)
        self._entry(path, S_IFREG | mode, data)

    def add_dir(self, path: str, mode: int = 0o755) -> None:
        """Add a directory; adding it again does nothing."""
        path = path.strip("/")
        if not path or path in self._dirs:
            return
        self._parents(path)
        self._dirs.add(path)
        self._entry(path, S_IFDIR | mode, b"")

    def add_symlink(self, path: str, target: str) -> None:
        """Add a symbolic link."""
        self._parents(path)
        self._entry(path, S_IFLNK | 0o777, target.encode("utf-8", "surrogateescape"))

    def add_node(self, path: str, mode: int, major: int, minor: int) -> None:
        """Add a device node; ``mode`` includes the type, such as ``S_IFCHR | 0o600``."""
        self._parents(path)
        self._entry(path, mode, b"", major, minor)

    def close(self) -> None:
        """Write the trailer and fill up to a multiple of 512 bytes; the file stays open."""
        self._entry("TRAILER!!!", 0, b"")
        self._put(bytes(-self._written % 512))

    def _parents(self, path: str) -> None:
        path = path.strip("/")
        if "/" in path:
            self.add_dir(path.rpartition("/")[0])

    def _entry(
        self, path: str, mode: int, data: bytes | memoryview, major: int = 0, minor: int = 0
    ) -> None:
        name = path.strip("/").encode("utf-8", "surrogateescape") + b"\0"
        if len(name) > _NAME_MAX or len(data) >= 1 << 32:
            raise ValueError(f"{path} does not fit into a cpio archive")
        self._inode += 1
        # ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
        fields = (self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, major, minor, len(name), 0)
        self._put(b"070701" + b"".join(b"%08X" % field for field in fields) + name)
        self._put(bytes(-self._written % 4))
        self._put(data)
        self._put(bytes(-self._written % 4))

    def _put(self, data: bytes | memoryview) -> None:
        self._out.write(data)
        self._written += len(data)
