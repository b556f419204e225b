"""virtio-vsock: stream sockets between guest and host without a network. virtio-v1.3 §5.10.

The guest's sockets are AF_UNIX sockets of the host, by the convention that other monitors have
too: to reach port P of the guest a program of the host connects to PATH, writes ``CONNECT P`` and
a newline, and reads ``OK`` and a number once the guest has accepted; when the guest connects to
port P of CID 2, it reaches whoever listens at PATH_P. The work is in native/vsock*.c.
"""

from __future__ import annotations

import os
import struct

from vmm._native import ffi, lib
from vmm.devices.virtio.device import VirtioDevice
from vmm.errors import ConfigError, HostError
from vmm.listener import Listener, bind
from vmm.options import Field
from vmm.values import parse_path

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from typing import Any

    from vmm.board import Board
    from vmm.memory import GuestMemory
    from vmm.options import Options

#: The first CID a guest may have: 0 to 2 are reserved. virtio-v1.3 §5.10.4.
FIRST_CID = 3
_LAST_CID = 0xFFFF_FFFE
_WHAT = "A vsock socket"


def _parse_cid(text: str) -> int:
    if not (text.isascii() and text.isdigit() and FIRST_CID <= int(text[:12]) <= _LAST_CID):
        raise ValueError(f"must be a number from {FIRST_CID} to {_LAST_CID}")
    return int(text)


class Vsock(VirtioDevice):
    """Sockets of the guest, whose address is ``cid``, carried over AF_UNIX sockets at ``path``.

    The socket there is made now, with mode 0600, and removed by ``close``. Without a path only
    ``connect`` reaches the guest, and the guest reaches nobody. Raises ConfigError, HostError.
    """

    DEVICE_ID = 19
    QUEUE_SIZES = (256, 256, 16)
    IN_ORDER = True
    KERNEL_CONFIG = "CONFIG_VIRTIO_VSOCKETS"

    HELP = (
        "Give the guest stream sockets to the host (virtio-vsock): connect to the socket PATH and "
        'write "CONNECT PORT" to reach the guest, listen at PATH_PORT to be reached.'
    )
    OPTIONS = (
        Field("cid", "the guest's address, 3 or more", _parse_cid, required=True),
        Field("path", "the socket to make on the host", parse_path, path=True),
        Field(
            "vhost",
            "the host's kernel carries it (/dev/vhost-vsock): the host's ends are AF_VSOCK sockets",
            None,
            default=False,
        ),
    )

    @classmethod
    def from_options(cls, options: Options, board: Board) -> Vsock:
        if any(isinstance(device, Vsock) for device in board.virtio):
            raise ConfigError("--vsock is given twice; a guest's kernel drives one such device.")
        if options.vhost:
            from vmm.devices.virtio.vhost_vsock import VhostVsock

            if options.path:
                raise ConfigError("--vsock vhost: the kernel makes no socket at a path.")
            return VhostVsock(options.cid)
        return cls(options.cid, options.path)

    def __init__(
        self, cid: int = FIRST_CID, path: str | None = None, *, name: str = "vsock0"
    ) -> None:
        if not FIRST_CID <= cid <= _LAST_CID:
            raise ConfigError(
                f"A vsock address (cid) must be from {FIRST_CID} to {_LAST_CID}, not {cid}."
            )
        super().__init__(name)
        self.path = path
        self._native = ffi.NULL
        self._listener: Listener | None = None
        self._set_cid(cid)
        if path is not None:
            try:
                self._listener = Listener(path, _WHAT, spare=len("_4294967295"))
            except BaseException:
                self.close()
                raise

    def _set_cid(self, cid: int) -> None:
        self.cid = cid
        self.config[:] = struct.pack("<Q", cid)

    def attach(self, memory: GuestMemory, loop: Any) -> None:
        super().attach(memory, loop)
        # Its own if there may be one: to find a socket's path can take long on some file systems.
        (loop,) = self.io_loops(loop)
        fd = -1 if self._listener is None else self._listener.fileno()
        path = os.fsencode(self.path or "")
        self._native = lib.vmm_vsock_create(loop, self.cid, fd, path, max(self.QUEUE_SIZES))
        if self._native == ffi.NULL:
            raise HostError(
                f"{self.name} could not be set up: {os.strerror(ffi.errno)}.", errno=ffi.errno
            )

    def start_queue(self, index: int, config: Any) -> int:
        return int(lib.vmm_vsock_start(self._native, config))

    def stop_queues(self) -> None:
        lib.vmm_vsock_stop(self._native)

    def stop_queue(self, index: int) -> None:
        lib.vmm_vsock_stop_queue(self._native, index)

    def connect(self, port: int, timeout: float | None = None) -> socket.socket:
        """A stream socket connected to ``port`` of the guest; blocks until the guest accepts,
        also while it has not loaded its driver yet. ``timeout`` in seconds stays set on the
        socket. Raises HostError when the guest refuses or time runs out. Any thread."""
        import socket

        if self._native == ffi.NULL:
            raise HostError(f"{self.name} is not part of a running machine.")
        ours, theirs = socket.socketpair()
        ours.settimeout(timeout)
        try:
            ours.sendall(f"CONNECT {port}\n".encode())
            lib.vmm_vsock_adopt(self._native, theirs.detach())
            said = b""
            while not said.endswith(b"\n"):
                byte = ours.recv(1)
                if not byte:
                    raise HostError(
                        f"Nobody in the guest accepts connections to vsock port {port}."
                    )
                said += byte
        except BaseException as e:
            ours.close()
            if not isinstance(e, OSError):
                raise
            raise HostError(
                f"The guest did not answer for vsock port {port}: {e}.", errno=e.errno
            ) from e
        return ours

    def listen(self, port: int, backlog: int = 16) -> socket.socket:
        """A listening socket that takes the guest's connections to ``port`` of CID 2; its file,
        ``PATH_PORT``, is the caller's to remove. Raises HostError."""
        import socket

        if self.path is None:
            raise HostError(f"{self.name} has no path, so there is none to listen at.")
        listener = socket.socket(fileno=bind(f"{self.path}_{port}", _WHAT, backlog).detach())
        listener.setblocking(True)
        return listener

    def transport_reset(self, cid: int) -> None:
        """Every connection ends, and the guest reads its address, now ``cid``, again: after a
        restore it is another machine. virtio-v1.3 §5.10.6.7. Not while a vCPU runs."""
        self._set_cid(cid)
        irqs = self._irqs
        if irqs is not None:
            irqs.config_changed()
        if self._native != ffi.NULL:
            lib.vmm_vsock_transport_reset(self._native, cid)

    @property
    def counts(self) -> dict[str, int]:
        """How many connections and clients that ask for one there are; packets dropped, resets
        and bytes so far."""
        out = ffi.new("struct vmm_vsock_counts *")
        if self._native != ffi.NULL:
            lib.vmm_vsock_count(self._native, out)
        names = ("conns", "asking", "dropped", "resets", "from_guest", "to_guest")
        return {name: int(getattr(out, name)) for name in names}

    def close(self) -> None:
        super().close()
        lib.vmm_vsock_destroy(self._native)
        self._native = ffi.NULL
        self.close_threads()
        if self._listener is not None:
            self._listener.close()
            self._listener = None


DEVICE = Vsock
