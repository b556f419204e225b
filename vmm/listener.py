"""A listening AF_UNIX socket that only this user may connect to."""

from __future__ import annotations

import os

from vmm.errors import ConfigError, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: sun_path of unix(7), less its NUL byte.
PATH_MAX = 107
BACKLOG = 128


def bind(path: str, what: str, backlog: int = BACKLOG) -> Any:
    """A nonblocking listening ``_socket.socket`` at ``path``, mode 0600; ``what`` it is, for
    messages. Raises HostError."""
    import _socket  # socket imports enum

    kind = _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC | _socket.SOCK_NONBLOCK
    sock = _socket.socket(_socket.AF_UNIX, kind)
    try:
        os.fchmod(sock.fileno(), 0o600)  # bind gives the file this mode
        sock.bind(path)
        sock.listen(backlog)
    except OSError as e:
        sock.close()
        why = e.strerror
        if os.path.lexists(path):
            why = "something is there; remove it if no other machine uses it"
        raise HostError(f"{what} cannot be made at {path}: {why}.", errno=e.errno) from e
    return sock


class Listener:
    """One at ``path``, whose file ``close`` removes unless it is somebody else's by then.

    ``spare``: how much longer than the path some other name must be. Raises ConfigError,
    HostError.
    """

    __slots__ = ("_inode", "_socket", "path")

    def __init__(self, path: str, what: str, *, spare: int = 0) -> None:
        if len(os.fsencode(path)) > PATH_MAX - spare:
            raise ConfigError(
                f"{what} cannot be made at {path}: the path has more than {PATH_MAX - spare} "
                "bytes; choose a shorter one."
            )
        self.path = path
        self._socket = bind(path, what)
        found = os.lstat(path)
        self._inode = (found.st_dev, found.st_ino)

    def fileno(self) -> int:
        """-1 after ``close``."""
        return int(self._socket.fileno())

    def close(self) -> None:
        if self.fileno() < 0:
            return
        self._socket.close()
        try:
            found = os.lstat(self.path)
            if (found.st_dev, found.st_ino) == self._inode:
                os.unlink(self.path)
        except OSError:
            pass
