"""What a network card is plugged into: a tap, a socket, nothing. The sockets of user-mode
networking are in net_user.py."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct

from vmm._native import lib
from vmm.devices.virtio.net_options import OF_BACKEND, OPTIONS
from vmm.errors import ConfigError, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.options import Options

# linux/if_tun.h, linux/if.h, linux/sockios.h.
TUNSETIFF, TUNGETIFF = 0x400454CA, 0x800454D2
TUNSETOFFLOAD, TUNSETVNETHDRSZ = 0x400454D0, 0x400454D8
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, IFF_MULTI_QUEUE = 0x0002, 0x1000, 0x4000, 0x0100
SIOCGIFFLAGS, SIOCSIFFLAGS, SIOCGIFMTU, SIOCSIFMTU = 0x8913, 0x8914, 0x8921, 0x8922
IFF_UP = 1
_IFREQ = struct.Struct("16sH22x")
_IFREQ_INT = struct.Struct("16si20x")

#: struct virtio_net_hdr_v1.
VNET_HDR = 12

#: The driver's feature bits (virtio-v1.3 §5.1.3) and what they need of a tap (TUN_F_*); all of
#: HOST_ is what any tap takes.
_TAP_ALWAYS = (0, 11, 12, 13)
_TAP_OFFLOADS = (
    (0x01, (1,)),  # CSUM: GUEST_CSUM
    (0x07, (7, 8)),  # TSO4, TSO6: GUEST_TSO4, GUEST_TSO6
    (0x0F, (9,)),  # TSO_ECN: GUEST_ECN
    (0x11, (10, 14)),  # UFO: GUEST_UFO, HOST_UFO
    (0x67, (54, 55, 56)),  # USO4, USO6: GUEST_USO4, GUEST_USO6, HOST_USO
)


class Backend:
    """One end of a cable: descriptors that frames pass through, one for each pair of queues.

    ``kind``: VMM_NET_*. ``features``: feature bits it makes possible. ``mtu``: 0, or what it can
    carry. ``ident``: what the card's MAC address is derived from. ``listener``: where the other
    end connects, or -1.
    """

    kind: int = lib.VMM_NET_NONE
    features: int = 0
    mtu: int = 0
    ident: str = "none"
    listener: int = -1

    def __init__(self) -> None:
        self.fds: list[int] = []

    def ready(self, mac: bytes) -> None:
        """Before the guest starts: return when frames can pass. Raises HostError."""

    def obituary(self, error: int) -> str:
        """A sentence about how it died, for the user."""
        if error == errno.EPROTO:
            return f"the peer at {self.ident} sent no frame where one had to be; the link is down"
        if error == errno.EPIPE:
            return f"the peer at {self.ident} closed the connection; the link is down"
        return f"{self.ident} failed: {os.strerror(error)}; the link is down"

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds = []


def make(options: Options) -> Backend:
    """The backend that ``--net`` asks for. Raises ConfigError, HostError."""
    kind = options.backend or "user"
    every = set().union(*OF_BACKEND.values())
    for field in OPTIONS:
        value = getattr(options, field.name)
        foreign = field.name in every and field.name not in OF_BACKEND[kind]
        if foreign and value != field.default and value != []:
            owner = next(k for k, names in OF_BACKEND.items() if field.name in names)
            raise ConfigError(
                f"--net {options}: {field.name} belongs to --net {owner}, not {kind}."
            )
    if kind == "user":
        from vmm.devices.virtio.net_user import User

        return User(options.forward, mtu=options.mtu)
    if kind == "tap":
        return Tap(options.ifname or "", queues=options.queues, mtu=options.mtu)
    if kind == "socket":
        if not options.path:
            raise ConfigError("--net socket: path=PATH is missing.")
        return Server(options.path) if options.server else connect(options.path)
    if kind == "fd":
        if options.fd is None:
            raise ConfigError("--net fd: fd=N is missing, the number of an open tap or socket.")
        return from_fd(options.fd)
    return Backend()


class Socket(Backend):
    """A connected socket: a stream of frames with their lengths, or a frame a message. Takes over
    ``fd``."""

    def __init__(self, fd: int, ident: str = "") -> None:
        """Raises HostError; then ``fd`` is still the caller's."""
        import socket

        super().__init__()
        self.ident = ident or f"fd:{fd}"
        try:
            with socket.socket(fileno=os.dup(fd)) as probe:
                kind = probe.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
        except OSError as e:
            raise HostError(
                f"--net: file descriptor {fd} is not a socket or a tap: {e.strerror}; "
                "pass one that is.",
                errno=e.errno,
            ) from e
        packet = kind in (socket.SOCK_DGRAM, socket.SOCK_SEQPACKET)
        self.kind = lib.VMM_NET_PACKET if packet else lib.VMM_NET_STREAM
        self.fds = [fd]


class Server(Backend):
    """A Unix socket where another machine connects, and the next when it has gone. The link is
    down while there is none. Raises ConfigError, HostError."""

    kind = lib.VMM_NET_STREAM

    def __init__(self, path: str) -> None:
        from vmm.listener import Listener

        super().__init__()
        # Not the other end's address: two machines on one cable must not have the same.
        self.ident = f"server:{path}"
        self._listener = Listener(path, "--net socket")
        self.listener = self._listener.fileno()

    def obituary(self, error: int) -> str:
        if error == errno.ENOTCONN:
            return f"nobody ever connected to {self._listener.path}"
        return super().obituary(error)

    def close(self) -> None:
        self._listener.close()
        super().close()


def connect(path: str) -> Socket:
    """The other machine, which listens at ``path``."""
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as s:
        try:
            s.connect(path)
        except (OSError, ValueError) as e:
            said = e.strerror if isinstance(e, OSError) else str(e)
            raise HostError(
                f"--net socket,path={path}: cannot connect: {said}; start the other machine "
                "first, with ',server'.",
            ) from e
        return Socket(s.detach(), f"socket:{path}")


def from_fd(fd: int) -> Backend:
    """An open tap or socket of the user's, who may close theirs. Raises HostError."""
    try:
        own = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    except OSError as e:
        raise HostError(
            f"--net fd={fd}: {e.strerror}; pass the number of an open tap or socket.",
            errno=e.errno,
        ) from e
    try:
        if stat.S_ISSOCK(os.fstat(own).st_mode):
            return Socket(own, f"fd:{fd}")
        return Tap(fds=[own])
    except BaseException:
        os.close(own)
        raise


class Tap(Backend):
    """An interface of the host. ``name``: attached to if it is there, made if not (then it goes
    with us); empty: made, with a name of the kernel's. ``fds``: one that is open already, taken
    over. Raises HostError."""

    kind = lib.VMM_NET_TAP

    def __init__(
        self, name: str = "", *, queues: int = 1, mtu: int = 0, fds: list[int] | None = None
    ) -> None:
        super().__init__()
        if not 0 < queues <= lib.VMM_NET_MAX_PAIRS:
            raise ConfigError(
                f"--net tap,queues={queues}: a card has 1 to {lib.VMM_NET_MAX_PAIRS} of them."
            )
        opened = []
        try:
            if fds is None:
                for _ in range(queues):
                    opened.append(_open_tap(name, queues > 1))
                    name = _interface(opened[-1])[0]
            self._prepare(fds or opened, mtu)
        except BaseException:
            for fd in opened:
                os.close(fd)
            raise
        self.fds = fds or opened

    def _prepare(self, fds: list[int], mtu: int) -> None:
        self.name, flags = _interface(fds[0])
        self.ident = f"tap:{self.name}"
        if not flags & IFF_TAP or not flags & IFF_VNET_HDR or not flags & IFF_NO_PI:
            raise HostError(
                f"--net: interface {self.name} is not a tap with IFF_VNET_HDR and IFF_NO_PI; "
                "open it with these flags."
            )
        for fd in fds:
            os.set_blocking(fd, False)
            _ioctl(fd, TUNSETVNETHDRSZ, struct.pack("i", VNET_HDR), self.name, "use")
        self.features = sum(1 << bit for bit in _TAP_ALWAYS) | _offloads(fds[0])
        self.mtu = _bring_up(self.name, mtu)

    def obituary(self, error: int) -> str:
        return f"tap {self.name} is gone ({os.strerror(error)}); the link is down"


def _open_tap(name: str, multi: bool) -> int:
    try:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as e:
        raise HostError(
            f"--net tap: /dev/net/tun could not be opened: {e.strerror}; load the module tun "
            "(modprobe tun), or use --net user.",
            errno=e.errno,
        ) from e
    flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | (IFF_MULTI_QUEUE if multi else 0)
    try:
        _ioctl(fd, TUNSETIFF, _IFREQ.pack(name.encode(), flags), name, "attach to")
    except BaseException:
        os.close(fd)
        raise
    return fd


def _ioctl(fd: int, request: int, argument: bytes, name: str, what: str) -> None:
    try:
        fcntl.ioctl(fd, request, argument)
    except OSError as e:
        label = name or "a new tap"
        hint = {
            errno.EPERM: f"; once as root, 'ip tuntap add {name or 'tap0'} mode tap user $USER' "
            f"and 'ip link set {name or 'tap0'} up' let you use it as ifname={name or 'tap0'}, and "
            "--net user needs no such thing",
            errno.EBUSY: "; another process uses it",
            errno.EINVAL: "; it is no tap, or its 'multi_queue' is not what queues= asks for",
        }.get(e.errno or 0, "")
        raise HostError(
            f"--net tap: cannot {what} {label}: {e.strerror}{hint}.", errno=e.errno
        ) from e


def _interface(fd: int) -> tuple[str, int]:
    """Name and IFF_* flags of an open tap."""
    try:
        name, flags = _IFREQ.unpack(fcntl.ioctl(fd, TUNGETIFF, bytes(_IFREQ.size)))
    except OSError as e:
        raise HostError(
            f"--net: file descriptor {fd} is not a socket or a tap: {e.strerror}; "
            "pass one that is.",
            errno=e.errno,
        ) from e
    return name.rstrip(b"\0").decode(errors="replace"), flags


def _offloads(fd: int) -> int:
    """The feature bits whose offloads this kernel's taps have."""
    bits = 0
    for flags, features in _TAP_OFFLOADS:
        try:
            fcntl.ioctl(fd, TUNSETOFFLOAD, flags)
        except OSError:
            continue
        bits |= sum(1 << bit for bit in features)
    fcntl.ioctl(fd, TUNSETOFFLOAD, 0)
    return bits


def _bring_up(name: str, mtu: int) -> int:
    """Set the MTU if asked to, and the interface up, as far as we may; returns the MTU to tell
    the guest: 0 if it is the usual one, or the interface is in another network namespace."""
    import socket

    raw = name.encode()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try:
            if mtu:
                fcntl.ioctl(s, SIOCSIFMTU, _IFREQ_INT.pack(raw, mtu))
            flags = _IFREQ.unpack(fcntl.ioctl(s, SIOCGIFFLAGS, _IFREQ.pack(raw, 0)))[1]
            if not flags & IFF_UP:
                fcntl.ioctl(s, SIOCSIFFLAGS, _IFREQ.pack(raw, flags | IFF_UP))
        except OSError as e:
            if e.errno == errno.ENODEV:
                return 0
            if e.errno != errno.EPERM:
                raise HostError(
                    f"--net tap: interface {name} could not be set up: {e.strerror}.",
                    errno=e.errno,
                ) from e
        now = int(_IFREQ_INT.unpack(fcntl.ioctl(s, SIOCGIFMTU, _IFREQ_INT.pack(raw, 0)))[1])
    return 0 if now == 1500 else now
