"""What a user may say about a network card, and how it is written."""

from __future__ import annotations

from vmm.options import Field
from vmm.values import parse_count, parse_path, parse_size, parse_text

MTU_MIN, MTU_MAX = 68, 65535
IFNAME_MAX = 15


class Forward:
    """A port of the host that leads into the guest: ``[ADDR:]HOST:GUEST[/udp]``."""

    __slots__ = ("address", "guest", "host", "udp")

    def __init__(self, address: str, host: int, guest: int, udp: bool) -> None:
        self.address = address
        self.host = host
        self.guest = guest
        self.udp = udp

    def __str__(self) -> str:
        address = f"[{self.address}]" if ":" in self.address else self.address
        return f"{address}:{self.host}:{self.guest}{'/udp' if self.udp else ''}"


def parse_forward(text: str) -> Forward:
    """Raises ValueError."""
    ports, slash, protocol = text.partition("/")
    if ports.count(":") < 2:
        ports = f"127.0.0.1:{ports}" if ":" in ports else "::"
    address, host, guest = ports.rsplit(":", 2)
    if slash and protocol not in ("tcp", "udp"):
        raise ValueError(f"'{protocol}' is neither tcp nor udp")
    numbers = [_port(port) for port in (host, guest)]
    return Forward(_address(address), numbers[0], numbers[1], protocol == "udp")


def _address(text: str) -> str:
    import socket

    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    try:
        socket.inet_pton(socket.AF_INET6 if ":" in bare else socket.AF_INET, bare)
    except (OSError, ValueError):
        raise ValueError(
            f"'{text}' is not an IP address; write [ADDR:]HOST:GUEST[/udp], as in 2222:22"
        ) from None
    return bare


def _port(text: str) -> int:
    try:
        port = parse_count(text)
    except ValueError:
        port = 0
    if not 0 < port < 65536:
        raise ValueError(f"'{text}' is not a port; write [ADDR:]HOST:GUEST[/udp], as in 2222:22")
    return port


def parse_mac(text: str) -> bytes:
    """Six bytes in hex between colons or dashes; of one station. Raises ValueError."""
    parts = text.replace("-", ":").split(":")
    if len(parts) != 6 or not all(len(p) == 2 and set(p.lower()) <= set("0123456789abcdef")
                                  for p in parts):  # fmt: skip
        raise ValueError("not a MAC address; write 52:54:00:12:34:56")
    mac = bytes.fromhex("".join(parts))
    if mac[0] & 1 or not any(mac):
        raise ValueError("not the address of one station; the first byte must be even, as in 52")
    return mac


def parse_mtu(text: str) -> int:
    mtu = parse_count(text)
    if not MTU_MIN <= mtu <= MTU_MAX:
        raise ValueError(f"not from {MTU_MIN} to {MTU_MAX}")
    return mtu


def parse_ifname(text: str) -> str:
    if not text or len(text.encode()) > IFNAME_MAX or "/" in text or not text.isprintable():
        raise ValueError(f"not the name of an interface (1 to {IFNAME_MAX} bytes, no slash)")
    return text


def parse_bytes_limit(text: str) -> tuple[int, int]:
    """``RATE[/BURST]``, sizes: bytes a second, and at once."""
    rate, slash, burst = text.partition("/")
    return parse_size(rate), parse_size(burst) if slash else 0


def parse_frames_limit(text: str) -> tuple[int, int]:
    """``RATE[/BURST]``: frames a second, and at once."""
    rate, slash, burst = text.partition("/")
    return parse_count(rate), parse_count(burst) if slash else 0


OPTIONS = (
    Field(
        "backend",
        "user: through the host's own sockets, without root (passt); tap: an interface of the "
        "host; socket: another machine; fd: an open tap or socket; none: no cable",
        choices=("user", "tap", "socket", "fd", "none"),
        first=True,
    ),
    Field("mac", "of the card; default: derived from the backend", parse_mac),
    Field("mtu", "largest packet, told to the guest", parse_mtu, default=0),
    Field(
        "forward",
        "user: a port of the host that leads into the guest; ADDR is 127.0.0.1 unless given",
        parse_forward,
        metavar="[ADDR:]HOST:GUEST[/udp]",
        repeatable=True,
    ),
    Field(
        "ifname",
        "tap: made if it does not exist; default: a new one, named by the kernel",
        parse_ifname,
        metavar="NAME",
    ),
    Field("script", "tap: no script is ever run", parse_text, choices=("no",), metavar="no"),
    Field(
        "vhost",
        "tap: whether the host's kernel moves the frames (/dev/vhost-net); auto: if it can",
        choices=("on", "off", "auto"),
        default="off",
    ),
    Field("queues", "tap: pairs of queues, up to 16", parse_count, metavar="N", default=1),
    Field(
        "path", "socket: a Unix socket that frames pass through", parse_path, path=True
    ),
    Field("server", "socket: wait there for the other machine", None, default=False),
    Field("fd", "fd: its number", parse_count, metavar="N"),
    Field("pcap", "copy every frame to this file", parse_path, metavar="FILE", path=True),
    Field("queue-size", "descriptors of a queue", parse_count, metavar="N", default=256),
    Field("rx-bytes", "limit a second to the guest", parse_bytes_limit, metavar="SIZE[/BURST]"),
    Field("rx-frames", "limit a second to the guest", parse_frames_limit, metavar="N[/BURST]"),
    Field("tx-bytes", "limit a second from the guest", parse_bytes_limit, metavar="SIZE[/BURST]"),
    Field("tx-frames", "limit a second from the guest", parse_frames_limit, metavar="N[/BURST]"),
)  # fmt: skip

#: Which options a backend has beside those of every card.
OF_BACKEND = {
    "user": {"forward"},
    "tap": {"ifname", "script", "vhost", "queues"},
    "socket": {"path", "server"},
    "fd": {"fd"},
    "none": set[str](),
}
