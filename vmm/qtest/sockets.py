"""Sockets with one client each, and the log of what they said."""

from __future__ import annotations

import os
import select
import socket
import time

from vmm.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, TextIO
    from typing import Protocol as Interface

    from vmm.qtest.options import Endpoint

    class Talk(Interface):
        """A language, spoken with one client. ``take`` acts on the first thing in ``data``, which
        it takes off, and gives the answer; None: more has to come first."""

        def greet(self) -> bytes: ...
        def take(self, data: bytearray) -> bytes | None: ...


_CHUNK = 1 << 16
#: What a pipe that is ready takes without waiting: PIPE_BUF.
_ATOM = 4096
#: Answers that may wait for a client before its next command is looked at.
BACKLOG = 1 << 20


class Log:
    """-qtest-log: every line in and out, with seconds since the start."""

    def __init__(self, target: str | None) -> None:
        """``target``: a path, 'none', or None for stderr. Raises HostError."""
        self._file: TextIO | None = None
        self._start = time.monotonic()
        if target == "none":
            return
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        try:
            fd = os.dup(2) if target is None else os.open(target, flags, 0o666)
        except OSError as e:
            raise HostError(
                f"-qtest-log {target} cannot be written: {e.strerror}.", errno=e.errno
            ) from e
        self._file = os.fdopen(fd, "w", buffering=1, errors="backslashreplace")

    def say(self, kind: str, text: str) -> None:
        """``kind``: R for what came, S for what was sent, I for what happened."""
        if self._file is None:
            return
        try:
            self._file.write(f"[{kind} +{time.monotonic() - self._start:.6f}] {text}\n")
        except OSError:
            self._file = None  # full, or nobody reads it: the session goes on

    def close(self) -> None:
        if self._file is not None:
            try:
                self._file.close()
            except OSError:
                self._file = None


class Connection:
    """One client: what came from it, and what waits to be sent."""

    def __init__(self, talk: Talk, read: int, write: int, owner: socket.socket | None) -> None:
        self.talk = talk
        self.read_fd = read
        self.write_fd = write
        self.came = bytearray()
        self.out = bytearray(talk.greet())
        self.hungry = True
        self._owner = owner
        if owner is not None:
            owner.setblocking(False)

    def receive(self) -> bool:
        """False when the client is gone."""
        try:
            data = os.read(self.read_fd, _CHUNK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self.came += data
        return bool(data)

    def work(self) -> None:
        """Answer what came, as long as the answers go."""
        self.hungry = False
        while len(self.out) < BACKLOG:
            answer = self.talk.take(self.came)
            if answer is None:
                self.hungry = True
                return
            self.out += answer

    def send(self) -> bool:
        """A piece; False when the client is gone."""
        size = _CHUNK if self._owner is not None else _ATOM
        try:
            del self.out[: os.write(self.write_fd, self.out[:size])]
        except BlockingIOError:
            return True
        except OSError:
            return False
        return True

    def close(self) -> None:
        if self._owner is not None:
            self._owner.close()


class Place:
    """One -qtest or -qmp: where clients come, and who is there."""

    def __init__(self, flag: str, where: Endpoint, talk: Callable[[], Talk]) -> None:
        """Raises HostError."""
        self.connection: Connection | None = None
        self.listener: socket.socket | None = None
        self._talk = talk
        self._bound = ""
        try:
            self._open(where)
        except (OSError, ValueError, OverflowError) as e:
            verb = "listen at" if where.server else "connect to"
            what = getattr(e, "strerror", None) or e
            raise HostError(
                f"{flag}: could not {verb} {where.kind}:{where.address}: {what}."
            ) from e

    def _open(self, where: Endpoint) -> None:
        if where.kind == "stdio":
            self.connection = Connection(self._talk(), 0, 1, None)
            return
        address: Any = where.address
        if where.kind == "fd":
            sock = socket.socket(fileno=int(where.address))
        else:
            family = socket.AF_UNIX
            if where.kind == "tcp":
                host, _, port = where.address.rpartition(":")
                address, family = (host, int(port)), socket.AF_INET
            sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            if not where.server:
                if where.kind != "fd":
                    sock.connect(address)
                self._join(sock)
                return
            if where.kind == "unix":
                _forget(address)
            if where.kind != "fd":
                sock.bind(address)
            self._bound = address if where.kind == "unix" else ""
            sock.listen(1)
            sock.setblocking(False)
            self.listener = sock
        except BaseException:
            sock.close()
            raise

    def _join(self, sock: socket.socket) -> None:
        self.connection = Connection(self._talk(), sock.fileno(), sock.fileno(), sock)

    def accept(self) -> None:
        assert self.listener is not None
        try:
            client, _ = self.listener.accept()
        except OSError:
            return  # gone already
        self._join(client)

    def drop(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None

    def close(self) -> None:
        self.drop()
        if self.listener is not None:
            self.listener.close()
            self.listener = None
        if self._bound:
            _forget(self._bound)


def _forget(path: str) -> None:
    """A socket's name that is left from somebody who is gone, or ours."""
    import stat

    try:
        if stat.S_ISSOCK(os.stat(path).st_mode):
            os.unlink(path)
    except FileNotFoundError:
        return


def register(poll: select.poll, place: Place) -> None:
    """Have ``poll`` wait for what this place waits for."""
    there = place.connection
    if there is None:
        if place.listener is not None:
            poll.register(place.listener, select.POLLIN)
        return
    masks = {there.read_fd: select.POLLIN if there.hungry else 0}
    masks[there.write_fd] = masks.get(there.write_fd, 0) | (select.POLLOUT if there.out else 0)
    for fd, mask in masks.items():
        if mask:
            poll.register(fd, mask)
