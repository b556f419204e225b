"""virtio-serial ports: named byte channels between guest and host. virtio-v1.3 §5.3.

In Linux a port is /dev/virtio-ports/NAME. All of a machine's ports are on one device, which has
room for 31, so that they take one place on the bus and one set of interrupts; each is held back,
fails and comes back by itself. The work is in native/ports*.c.
"""

from __future__ import annotations

import os
import struct

from vmm._native import ffi, lib
from vmm.device import Device
from vmm.devices.virtio.device import VirtioDevice
from vmm.errors import ConfigError, HostError
from vmm.listener import Listener
from vmm.options import Field
from vmm.values import parse_path, parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from typing import Any

    from vmm.board import Board
    from vmm.memory import GuestMemory
    from vmm.options import Options

# A feature bit number, virtio-v1.3 §5.3.3.
F_MULTIPORT = 1

#: cols, rows, max_nr_ports, emerg_wr: virtio-v1.3 §5.3.4.
_CONFIG = struct.Struct("<HHII")
_MAX: int = lib.VMM_PORTS_MAX
_NAME_MAX: int = lib.VMM_PORTS_NAME
_DEPTH = 64
_SOCKET = "unix:"


def _parse_name(text: str) -> str:
    good = text.isascii() and text.replace("-", "").replace("_", "").replace(".", "").isalnum()
    if not good or len(text) > _NAME_MAX:
        raise ValueError(f"must be up to {_NAME_MAX} letters, digits, dots, dashes and underscores")
    return text


def _parse_target(text: str) -> str:
    if text == "pty":
        return text
    if text.startswith(_SOCKET):
        return _SOCKET + os.path.abspath(parse_path(text.removeprefix(_SOCKET)))
    return os.path.abspath(parse_path(text.removeprefix("file:")))


class Port(Device):
    """One port, called ``name`` in the guest, and what the host has at its end.

    ``target``: ``unix:PATH`` (a socket that is made; its clients take turns), ``pty`` (``path``
    names it), the path of a file, which is replaced and takes what the guest writes, or None: only
    ``connect`` reaches it. ``limit``: how many bytes a file takes (0: any number); then the guest
    finds nobody there, as when the host's disk is full. ``console``: the guest makes it a terminal,
    hvcN in Linux. Host files are opened by ``plug``, which raises ConfigError, HostError.
    """

    HELP = (
        "Give the guest a port, /dev/virtio-ports/NAME, whose other end is the socket "
        "unix:PATH (made here), a pty, or a file for what the guest writes."
    )
    OPTIONS = (
        Field("name", "what the guest calls it", _parse_name, first=True, required=True),
        Field("target", "unix:PATH, pty or a file", _parse_target, required=True),
        Field(
            "limit",
            "how much the guest may write to a file, default any",
            parse_size,
            metavar="SIZE",
        ),
        Field("console", "make it a terminal in the guest (hvcN)", None, default=False),
    )

    @classmethod
    def from_options(cls, options: Options, board: Board) -> Port:
        return cls(options.name, options.target, console=options.console, limit=options.limit or 0)

    def __init__(
        self, label: str, target: str | None = None, *, console: bool = False, limit: int = 0
    ) -> None:
        try:
            self.label = _parse_name(label)
        except ValueError as e:
            raise ConfigError(f"The name of a port {e}, not {label!r}.") from None
        if limit and (target in (None, "pty") or str(target).startswith(_SOCKET)):
            raise ConfigError(f"Port {label}: a limit is for a file.")
        self.name = f"port-{label}"
        self.target = target
        self.console = console
        self.limit = limit
        #: What the user connects to: the pty's or the socket's path.
        self.path: str | None = None
        self.listener: Listener | None = None
        self.fd = -1
        self.id = -1
        self._device: Ports | None = None
        self._fds: list[int] = []

    def plug(self, board: Board) -> None:
        found = next((device for device in board.virtio if isinstance(device, Ports)), None)
        if found is None:
            found = Ports()
            board.virtio.append(found)
        found.add(self)
        self._device = found

    def open(self) -> None:
        """Open the host's end. Raises HostError."""
        if self.target == "pty":
            self._open_pty()
        elif self.target and self.target.startswith(_SOCKET):
            self.path = self.target.removeprefix(_SOCKET)
            self.listener = Listener(self.path, f"The socket of port {self.label}")
        elif self.target:
            self._open_file(self.target)

    def _open_pty(self) -> None:
        import tty

        try:
            # The slave stays open: without one, reads of the master fail until somebody connects.
            self._fds += os.openpty()
        except OSError as e:
            raise HostError(
                f"No pty is to be had for port {self.label}: {e.strerror}.", errno=e.errno
            ) from e
        self.fd, slave = self._fds
        os.set_blocking(self.fd, False)
        tty.setraw(slave)
        self.path = os.ttyname(slave)

    def _open_file(self, path: str) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            self.fd = os.open(path, flags, 0o644)
        except OSError as e:
            raise HostError(
                f"Port {self.label} cannot be written to {path}: {e.strerror}.", errno=e.errno
            ) from e
        self._fds.append(self.fd)

    def connect(self) -> socket.socket:
        """A socket whose other end is the port, which has nobody there. The guest sees the port
        close when the socket is closed. Raises HostError. Any thread."""
        import socket

        if self._device is None:
            raise HostError(f"Port {self.label} is not part of a running machine.")
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        try:
            self._device.adopt(self, theirs.detach())
        except BaseException:
            ours.close()
            raise
        return ours

    def resize(self, columns: int, rows: int) -> None:
        """A console port's terminal has another size now. Any thread."""
        if self._device is not None:
            self._device.resize(self, columns, rows)

    @property
    def state(self) -> dict[str, int]:
        """Whether host and guest have the port open; bytes sent by the guest, received by it, and
        dropped as nobody was there; the errno that ended the host's side, or 0."""
        return {} if self._device is None else self._device.state(self)

    def close(self) -> None:
        """After the device is closed."""
        self._device = None
        for fd in self._fds:
            os.close(fd)
        self._fds, self.fd = [], -1
        if self.listener is not None:
            self.listener.close()


class Ports(VirtioDevice):
    """The device that ports are on. ``add`` before it is attached."""

    DEVICE_ID = 3
    IN_ORDER = True
    KERNEL_CONFIG = "CONFIG_VIRTIO_CONSOLE"

    def __init__(self, name: str = "ports0") -> None:
        self.ports: list[Port] = []
        super().__init__(name)
        self._native = ffi.NULL
        self._grow()  # the control queues

    def _grow(self) -> None:
        """Two queues more."""
        self.QUEUE_SIZES = (*self.QUEUE_SIZES, _DEPTH, _DEPTH)
        self._kicks += [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in range(2)]
        self._reports += [ffi.new("struct vmm_service_report *") for _ in range(2)]

    def add(self, port: Port) -> None:
        """Takes it, and opens its end on the host."""
        if any(other.label == port.label for other in self.ports):
            raise ConfigError(f"Two ports are called {port.label}.")
        if len(self.ports) == _MAX:
            raise ConfigError(f"A machine has at most {_MAX} ports; {port.label} is one too many.")
        port.id = len(self.ports)
        self.ports.append(port)
        self._grow()
        self.config[:] = _CONFIG.pack(80, 25, len(self.ports), 0)
        port.open()

    def device_features(self) -> int:
        return 1 << F_MULTIPORT

    def attach(self, memory: GuestMemory, loop: Any) -> None:
        super().attach(memory, loop)
        # Its own if there may be one: to write to a file can take long.
        (loop,) = self.io_loops(loop)
        self._native = lib.vmm_ports_create(loop, len(self.ports), _DEPTH)
        if self._native == ffi.NULL:
            raise HostError(
                f"{self.name} could not be set up: {os.strerror(ffi.errno)}.", errno=ffi.errno
            )
        for port in self.ports:
            listen_fd = -1 if port.listener is None else port.listener.fileno()
            out_only = port.target != "pty"
            rc = lib.vmm_ports_set(
                self._native, port.id, port.label.encode(), port.console, port.fd,
                out_only and port.fd >= 0, listen_fd, port.limit,
            )  # fmt: skip
            if rc:
                raise HostError(
                    f"Port {port.label} cannot use {port.target}: {os.strerror(-rc)}.", errno=-rc
                )

    def start_queue(self, index: int, config: Any) -> int:
        return int(lib.vmm_ports_start(self._native, config))

    def stop_queues(self) -> None:
        lib.vmm_ports_stop(self._native)

    def stop_queue(self, index: int) -> None:
        lib.vmm_ports_stop_queue(self._native, index)

    def adopt(self, port: Port, fd: int) -> None:
        """``fd`` is taken. Raises HostError."""
        if self._native == ffi.NULL:
            os.close(fd)
            raise HostError(f"Port {port.label} is not part of a running machine.")
        rc = lib.vmm_ports_adopt(self._native, port.id, fd)
        if rc:
            raise HostError(
                f"Nobody can connect to port {port.label}: {os.strerror(-rc)}.", errno=-rc
            )

    def resize(self, port: Port, columns: int, rows: int) -> None:
        if self._native != ffi.NULL:
            lib.vmm_ports_resize(self._native, port.id, min(columns, 0xFFFF), min(rows, 0xFFFF))

    def state(self, port: Port) -> dict[str, int]:
        out = ffi.new("struct vmm_port_state *")
        if self._native != ffi.NULL:
            lib.vmm_ports_state(self._native, port.id, out)
        names = ("host_open", "guest_open", "sent", "received", "dropped", "error")
        return {name: abs(int(getattr(out, name))) for name in names}

    def notes(self) -> list[str]:
        return [f"port {p.label} is on {p.path}" for p in self.ports if p.target == "pty"]

    def close(self) -> None:
        super().close()
        lib.vmm_ports_destroy(self._native)
        self._native = ffi.NULL
        self.close_threads()
        for port in self.ports:
            port.close()


DEVICE = Port
