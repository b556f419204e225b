"""Messages of the vhost-user protocol, as the front end sends and receives them.

A message is a header of three 32-bit numbers (request, flags, size of the payload), a payload, and
descriptors beside the header; all in the host's byte order. The specification is QEMU's
docs/interop/vhost-user. The other side is believed nothing: what it sends is measured before it is
kept, descriptors nobody asked for are closed, and an exchange ends by its deadline.
"""

from __future__ import annotations

import array
import os
import select
import struct
import time

from vmm.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

HEADER = struct.Struct("=III")
U64 = struct.Struct("=Q")
#: index, number.
STATE = struct.Struct("=II")

VERSION = 1
FLAG_REPLY = 4
FLAG_NEED_REPLY = 8
_VERSION_MASK = 3

# Requests of the front end.
GET_FEATURES, SET_FEATURES, SET_OWNER = 1, 2, 3
SET_MEM_TABLE = 5
SET_VRING_NUM, SET_VRING_ADDR, SET_VRING_BASE, GET_VRING_BASE = 8, 9, 10, 11
SET_VRING_KICK, SET_VRING_CALL = 12, 13
GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES = 15, 16
GET_QUEUE_NUM, SET_VRING_ENABLE = 17, 18
SET_BACKEND_REQ_FD = 21
GET_CONFIG, SET_CONFIG = 24, 25
GET_INFLIGHT_FD, SET_INFLIGHT_FD = 31, 32
RESET_DEVICE = 34
ADD_MEM_REG = 37
SET_STATUS, GET_STATUS = 39, 40

# Requests of the back end.
BACKEND_CONFIG_CHANGE = 2

#: Longer than any message that is exchanged here.
PAYLOAD_MAX = 4096 + 12
#: Descriptors beside one message.
FDS_MAX = 8
_CMSG_SPACE = 16 + 4 * FDS_MAX

NAMES = {
    value: name
    for name, value in list(globals().items())
    if name.isupper() and name[:4] in ("GET_", "SET_", "RESE", "ADD_")
}


class VhostError(HostError):
    """The back end is gone, late, or said what it must not. The connection is of no more use."""


class Refused(VhostError):
    """It answered as it should, and said no."""


class Connection:
    """A connected stream socket to a back end; takes it over. One thread at a time.

    Each operation raises VhostError when the time set by ``limit`` is over.
    """

    __slots__ = ("_end", "_poll", "ack", "label", "sock")

    def __init__(self, sock: Any, label: str) -> None:
        """``sock``: a ``_socket.socket``. ``label`` begins messages."""
        self.sock = sock
        self.label = label
        #: REPLY_ACK was agreed on: every request is answered.
        self.ack = False
        self._end = 0.0
        self._poll = select.poll()
        sock.setblocking(False)
        self._poll.register(sock.fileno(), 0)

    def limit(self, seconds: float) -> None:
        """Everything until the next call must be over by then."""
        self._end = time.monotonic() + seconds

    def fail(self, what: str) -> VhostError:
        return VhostError(f"{self.label}: {what}")

    def close(self) -> None:
        self.sock.close()

    # ---- exchanges -----------------------------------------------------------------------------

    def ask(self, request: int, payload: bytes = b"", *, size: int = 8) -> bytes:
        """Send, and take the answer: ``size`` bytes and no descriptors."""
        got, fds = self.ask_fds(request, payload)
        _close(fds)
        if fds:
            raise self.fail(f"it sent descriptors with its answer to {NAMES[request]}")
        if len(got) != size:
            raise self.fail(f"its answer to {NAMES[request]} has {len(got)} bytes, not {size}")
        return got

    def ask_fds(self, request: int, payload: bytes = b"") -> tuple[bytes, list[int]]:
        """Send, and take the answer with its descriptors, which are the caller's then."""
        self.send(request, payload)
        return self._receive(request)

    def ask_u64(self, request: int) -> int:
        return int(U64.unpack(self.ask(request))[0])

    def tell(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """Send; where that was agreed on, wait until it is done."""
        self.send(request, payload, fds, FLAG_NEED_REPLY if self.ack else 0)
        if not self.ack:
            return
        got, more = self._receive(request)
        _close(more)
        if len(got) != 8 or more:
            raise self.fail(f"it did not acknowledge {NAMES[request]} as it must")
        if any(got):
            raise Refused(f"{self.label}: it refused {NAMES[request]} ({U64.unpack(got)[0]})")

    # ---- bytes ---------------------------------------------------------------------------------

    def send(
        self, request: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = 0
    ) -> None:
        import _socket  # socket imports enum

        data = HEADER.pack(request, VERSION | flags, len(payload)) + payload
        rights: list[Any] = []
        if fds:
            rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, array.array("i", fds))]
        while data:
            try:
                done = self.sock.sendmsg([data], rights, _socket.MSG_NOSIGNAL)
            except BlockingIOError:
                self._wait(select.POLLOUT, NAMES.get(request, "an answer"))
                continue
            except OSError as e:
                raise self.fail(f"it is gone ({e.strerror})") from e
            data, rights = data[done:], []

    def _receive(self, request: int) -> tuple[bytes, list[int]]:
        fds: list[int] = []
        try:
            head = b""
            while len(head) < HEADER.size:
                head += self._head(HEADER.size - len(head), request, fds)
            got, flags, size = HEADER.unpack(head)
            if flags & _VERSION_MASK != VERSION or not flags & FLAG_REPLY or got != request:
                raise self.fail(
                    f"it answered {NAMES[request]} with request {got}, flags {flags:#x}"
                )
            if size > PAYLOAD_MAX:
                raise self.fail(f"its answer to {NAMES[request]} claims {size} bytes")
            payload = b""
            while len(payload) < size:
                payload += self._some(size - len(payload), request)
        except BaseException:
            _close(fds)
            raise
        return payload, fds

    def _head(self, size: int, request: int, fds: list[int]) -> bytes:
        """Part of a header; its descriptors are appended."""
        import _socket

        while True:
            try:
                data, beside, flags, _ = self.sock.recvmsg(
                    size, _CMSG_SPACE, _socket.MSG_CMSG_CLOEXEC
                )
                break
            except BlockingIOError:
                self._wait(select.POLLIN, NAMES[request])
            except OSError as e:
                raise self.fail(f"it is gone ({e.strerror})") from e
        for level, kind, body in beside:
            if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
                found = array.array("i")
                found.frombytes(body[: len(body) // 4 * 4])
                fds += found
        if flags & _socket.MSG_CTRUNC or len(fds) > FDS_MAX:
            raise self.fail("it sent too many descriptors")
        if not data:
            raise self.fail(f"it closed the connection on {NAMES[request]}")
        return bytes(data)

    def _some(self, size: int, request: int) -> bytes:
        """Part of a payload; descriptors that come with it the kernel closes."""
        while True:
            try:
                data = self.sock.recv(size)
                break
            except BlockingIOError:
                self._wait(select.POLLIN, NAMES[request])
            except OSError as e:
                raise self.fail(f"it is gone ({e.strerror})") from e
        if not data:
            raise self.fail(f"it closed the connection in its answer to {NAMES[request]}")
        return bytes(data)

    def _wait(self, events: int, what: str) -> None:
        left = self._end - time.monotonic()
        self._poll.modify(self.sock.fileno(), events)
        if left <= 0 or not self._poll.poll(left * 1000):
            hint = "; does it serve another machine?" if what == NAMES[GET_FEATURES] else ""
            raise self.fail(f"it did not answer {what} in time{hint}")


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def connect(path: str, label: str) -> Connection:
    """To whoever listens at ``path``. Raises VhostError."""
    import _socket

    kind = _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC | _socket.SOCK_NONBLOCK
    sock = _socket.socket(_socket.AF_UNIX, kind)
    try:
        sock.connect(path)
    except (OSError, ValueError) as e:
        sock.close()
        said = e.strerror if isinstance(e, OSError) else str(e)
        raise VhostError(
            f"{label}: cannot connect to {path}: {said}; start the back end first.",
            errno=e.errno if isinstance(e, OSError) else None,
        ) from e
    return Connection(sock, label)
