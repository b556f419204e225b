"""One standard stream on its way between a descriptor of ours and a guest's port.

Nothing here ever waits: the caller polls for what ``wants`` says and then calls ``step``.
"""

from __future__ import annotations

import errno
import os
import select
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from socket import socket

_CHUNK = 256 * 1024
_PIPE_ROOM = 4096  # what a pipe that polls writable takes without waiting (PIPE_BUF)

POLL_READ = select.POLLIN
POLL_WRITE = select.POLLOUT


class Output:
    """From the guest's port to one of our descriptors. ``name`` is the stream's on the wire.

    It takes ``room`` bytes (None: any number); more is an error, as on a full disk.
    ``taken`` counts what came out of the port. Once ``broken`` (nobody reads our descriptor any
    more, or a write failed for the reason ``error``) what comes is dropped.
    """

    __slots__ = (
        "_limit", "_owned", "broken", "ended", "error", "fd", "name", "pending", "room", "taken",
    )  # fmt: skip

    def __init__(self, name: str, fd: int, room: int | None = None) -> None:
        self.name = name
        self.room = room
        self.taken = 0
        self.pending = memoryview(b"")
        self.broken = False
        self.ended = False  # the port itself is gone
        self.error: OSError | None = None
        self.fd, self._limit = _unblocked(fd)
        self._owned = self.fd != fd

    def begin(self) -> None:
        """The port is a new one: an earlier machine did not get as far as the command."""
        self.taken = 0
        self.ended = False

    def wants(self, port: socket) -> tuple[int, int]:
        """The descriptor and the poll event to wait for."""
        if self.pending:
            return self.fd, POLL_WRITE
        return port.fileno(), POLL_READ

    def step(self, port: socket) -> None:
        """Move what can be moved without waiting."""
        if not self.pending and not self.ended:
            try:
                data = port.recv(_CHUNK)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            self.ended = not data
            self.taken += len(data)
            if not self.broken:
                self.pending = memoryview(data)
        if self.pending:
            self._write()

    def close(self) -> None:
        """Give back the descriptor made here, never the caller's own."""
        if self._owned:
            os.close(self.fd)
            self._owned = False

    def _write(self) -> None:
        try:
            if self.room is not None and len(self.pending) > self.room:
                raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
            count = os.write(self.fd, self.pending[: self._limit])
        except BlockingIOError:
            return
        except OSError as error:
            self.broken = True
            self.pending = memoryview(b"")
            if error.errno not in (errno.EPIPE, errno.ECONNRESET, errno.EIO):
                self.error = error
            return
        self.pending = self.pending[count:]
        if self.room is not None:
            self.room -= count


class Input:
    """From one of our descriptors to the guest's port; ``total`` counts what was read.

    ``ended`` is set when our side has no more; then the guest is told ``total``.
    """

    __slots__ = ("ended", "fd", "pending", "total")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.total = 0
        self.pending = memoryview(b"")
        self.ended = False

    def wants(self, port: socket) -> tuple[int, int] | None:
        """The descriptor and the poll event to wait for; None when there is nothing to do."""
        if self.pending:
            return port.fileno(), POLL_WRITE
        return None if self.ended else (self.fd, POLL_READ)

    def read(self) -> bytes:
        """Take what is there (call it after a poll said so); empty at the end."""
        try:
            data = os.read(self.fd, _CHUNK)
        except (BlockingIOError, InterruptedError):
            return b""
        except OSError:
            data = b""  # a directory, or a terminal that went away: there is nothing to read
        self.ended = not data
        self.total += len(data)
        self.pending = memoryview(data)
        return data

    def send(self, port: socket) -> int:
        """Pass on what the port takes now; how many bytes that was."""
        try:
            count = port.send(self.pending)
        except BlockingIOError:
            return 0
        except OSError:
            self.pending = memoryview(b"")  # the machine is gone; its end is seen elsewhere
            self.ended = True
            return 0
        self.pending = self.pending[count:]
        return count


def _unblocked(fd: int) -> tuple[int, int]:
    """A descriptor to write to without waiting, and how much at a time.

    O_NONBLOCK on the caller's own descriptor would reach everybody who shares it, so pipes and
    terminals are opened a second time; where that is forbidden, small writes do.
    """
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISFIFO(mode) or os.isatty(fd)):
        return fd, _PIPE_ROOM if stat.S_ISSOCK(mode) or stat.S_ISCHR(mode) else _CHUNK
    try:
        own = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return fd, _PIPE_ROOM
    return own, _CHUNK
