"""virtio-net: a network card. virtio-v1.3 §5.1; frames are moved by native/net*.c on an I/O thread
of the card's own. What is on the other end of the cable is a Backend: net_backend.py,
net_user.py."""

from __future__ import annotations

import os
import struct
from binascii import crc32

from vmm._native import ffi, lib
from vmm.devices.virtio.device import VirtioDevice
from vmm.devices.virtio.net_options import OPTIONS
from vmm.errors import ConfigError, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmm.board import Board
    from vmm.chario import Sink, Stream
    from vmm.devices.virtio.net_backend import Backend
    from vmm.memory import GuestMemory
    from vmm.options import Options

# Feature bit numbers, virtio-v1.3 §5.1.3.
F_CTRL_GUEST_OFFLOADS = 2
F_MTU = 3
F_MAC = 5
F_MRG_RXBUF = 15
F_STATUS = 16
F_CTRL_VQ = 17
F_CTRL_RX = 18
F_CTRL_VLAN = 19
F_CTRL_RX_EXTRA = 20
F_GUEST_ANNOUNCE = 21
F_MQ = 22
F_CTRL_MAC_ADDR = 23

_ALWAYS = (
    F_MAC, F_MRG_RXBUF, F_STATUS, F_CTRL_VQ, F_CTRL_RX, F_CTRL_VLAN, F_CTRL_RX_EXTRA,
    F_GUEST_ANNOUNCE, F_CTRL_MAC_ADDR,
)  # fmt: skip

S_LINK_UP = 1

#: mac, status, max_virtqueue_pairs, mtu: virtio-v1.3 §5.1.4.
_CONFIG = struct.Struct("<6sHHH")

#: magic, version, zone, accuracy, longest frame, Ethernet.
_PCAP = struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 262144, 1)
#: Frames wait here for a slow disk; what does not fit is missing in the dump.
_PCAP_BUFFER = 4 << 20

CTRL_QUEUE_SIZE = 64

#: What may be limited.
LIMITS = ("rx_bytes", "rx_frames", "tx_bytes", "tx_frames")


class Net(VirtioDevice):
    """A network card at ``backend``, which it owns.

    ``mac``: 6 bytes, default derived from the backend and ``index``, so that it stays the same.
    ``mtu``: told to the driver, default the backend's. ``pcap``: a file that gets a copy of each
    frame. ``limits``: any of LIMITS, each (units per second, burst). Raises HostError.
    """

    DEVICE_ID = 1
    IN_ORDER = True
    KERNEL_CONFIG = "CONFIG_VIRTIO_NET"
    HELP = "A network card."
    OPTIONS = OPTIONS

    def __init__(
        self,
        backend: Backend,
        *,
        mac: bytes = b"",
        mtu: int = 0,
        queue_size: int = 256,
        pcap: str = "",
        limits: dict[str, tuple[int, int]] | None = None,
        index: int = 0,
        name: str = "net0",
    ) -> None:
        self.backend = backend
        self._native = ffi.NULL
        self._dump: _Dump | None = None
        self._queue_size = queue_size
        self.limits = dict(limits or {})
        pairs = len(backend.fds) or 1
        self.QUEUE_SIZES = (queue_size,) * (2 * pairs) + (min(queue_size, CTRL_QUEUE_SIZE),)
        try:
            self._dump = _Dump(pcap) if pcap else None
        except BaseException:
            backend.close()
            raise
        super().__init__(name)
        self.mac = mac or default_mac(backend.ident, index)
        self.mtu = mtu or backend.mtu
        self.config[:] = _CONFIG.pack(self.mac, S_LINK_UP if backend.fds else 0, pairs, self.mtu)

    @classmethod
    def from_options(cls, options: Options, board: Board) -> Net:
        from vmm.devices.virtio import net_backend

        index = sum(isinstance(device, Net) for device in board.virtio)
        size = getattr(options, "queue-size")
        if size & (size - 1) or not 16 <= size <= lib.VMM_NET_MAX_QUEUE:
            raise ConfigError(
                f"--net {options}: queue-size must be a power of two from 16 to "
                f"{lib.VMM_NET_MAX_QUEUE}."
            )
        limits = {
            name: limit for name in LIMITS if (limit := getattr(options, name.replace("_", "-")))
        }
        return cls._kind(options, bool(limits or options.pcap))(
            net_backend.make(options),
            mac=options.mac or b"",
            mtu=options.mtu,
            queue_size=size,
            pcap=options.pcap or "",
            limits=limits,
            index=index,
        )

    @classmethod
    def _kind(cls, options: Options, looks: bool) -> type[Net]:
        """The class for ``vhost=``; ``looks``: at the frames."""
        if options.vhost == "on" and looks:
            raise ConfigError(
                f"--net {options}: with vhost=on the kernel moves the frames; no dump, no limits."
            )
        wanted = options.vhost == "on" or (
            options.vhost == "auto" and not looks and os.access("/dev/vhost-net", os.R_OK | os.W_OK)
        )
        if options.backend != "tap" or not wanted:
            return cls
        from vmm.devices.virtio.vhost_net import VhostNet

        return VhostNet

    @property
    def pairs(self) -> int:
        return len(self.QUEUE_SIZES) // 2

    def device_features(self) -> int:
        bits = sum(1 << bit for bit in _ALWAYS) | self.backend.features
        if self.backend.features:
            bits |= 1 << F_CTRL_GUEST_OFFLOADS
        if self.mtu:
            bits |= 1 << F_MTU
        return bits | (1 << F_MQ if self.pairs > 1 else 0)

    def attach(self, memory: GuestMemory, loop: Any) -> None:
        super().attach(memory, loop)
        self.backend.ready(self.mac)
        # All its queues share what is limited, and are served by one.
        (loop,) = self.io_loops(loop)
        self._native = lib.vmm_net_create(loop, self._native_config())
        if self._native == ffi.NULL:
            raise HostError(f"{self.name}: {os.strerror(ffi.errno)}", errno=ffi.errno)

    def _native_config(self) -> Any:
        config = ffi.new("struct vmm_net_config *")
        config.kind = self.backend.kind
        config.pairs = self.pairs
        config.queue_size = self._queue_size
        fds = self.backend.fds or [-1]
        config.fds[0 : len(fds)] = fds
        config.listener = self.backend.listener
        config.pairs_fd = -1
        config.space = bytes(self.config)
        config.dump = ffi.NULL if self._dump is None else self._dump.stream.native
        for name, (rate, burst) in self.limits.items():
            lib.vmm_bucket_set(ffi.addressof(config, name), rate, burst)
        return config

    def start_queue(self, index: int, config: Any) -> int:
        return int(lib.vmm_net_start(self._native, config))

    def stop_queues(self) -> None:
        lib.vmm_net_stop(self._native)
        self._refresh()

    def stop_queue(self, index: int) -> None:
        lib.vmm_net_stop_queue(self._native, index)

    def write_config(self, offset: int, size: int, value: int) -> None:
        """Nothing of it can be written: virtio-v1.3 §5.1.4.1. What C made of it stays."""
        self._refresh()

    def _refresh(self) -> None:
        if self._native != ffi.NULL:
            out = ffi.new("uint8_t[]", lib.VMM_NET_SPACE)
            lib.vmm_net_space(self._native, out)
            self.config[:] = bytes(out)

    def set_link(self, up: bool) -> None:
        """Pull the cable, or plug it in; the driver is told. Any thread."""
        if self._native == ffi.NULL:
            raise HostError(f"{self.name} was never attached to a machine")
        lib.vmm_net_set_link(self._native, int(up))
        self._refresh()

    def announce(self) -> None:
        """Ask the guest to tell the network where it is now. virtio-v1.3 §5.1.6.5.4."""
        if self._native != ffi.NULL:
            lib.vmm_net_announce(self._native)

    def limit(self, **limits: tuple[int, int]) -> None:
        """Change any of LIMITS, each (units per second, burst); (0, 0) for none. Any thread."""
        self.limits.update(limits)
        if self._native != ffi.NULL:
            lib.vmm_net_limit(self._native, self._native_config())

    @property
    def link(self) -> bool:
        """Whether frames can pass: the cable is in and the backend lives."""
        self._refresh()
        return bool(_CONFIG.unpack(self.config)[1] & S_LINK_UP)

    @property
    def dead(self) -> int:
        """0, or the errno the backend died of."""
        return int(lib.vmm_net_dead(self._native)) if self._native != ffi.NULL else 0

    def stats(self) -> dict[str, int]:
        """Frames and bytes so far, and what was dropped: struct vmm_net_stats."""
        out = ffi.new("struct vmm_net_stats *")
        if self._native != ffi.NULL:
            lib.vmm_net_stats(self._native, out)
        return {name: int(getattr(out, name)) for name, _ in ffi.typeof(out).item.fields}

    def faults(self) -> list[str]:
        said = super().faults()
        if self.dead and self.activations:
            said.append(f"{self.name}: {self.backend.obituary(self.dead)}")
        return said

    def close(self) -> None:
        super().close()
        lib.vmm_net_destroy(self._native)
        self._native = ffi.NULL
        self.close_threads()
        if self._dump is not None:
            self._dump.close()
            self._dump = None
        self.backend.close()


def default_mac(ident: str, index: int) -> bytes:
    """Locally unique, and the same in each run: 52:54:00 and three bytes."""
    return bytes([0x52, 0x54, 0]) + crc32(f"{ident}/{index}".encode()).to_bytes(4, "big")[1:]


class _Dump:
    """A pcap file, written by a thread of its own: the card never waits for the disk."""

    __slots__ = ("_fd", "_sink", "stream")

    def __init__(self, path: str) -> None:
        from vmm.chario import Sink, Stream

        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            self._fd = os.open(path, flags, 0o644)
        except OSError as e:
            raise HostError(
                f"--net pcap={path}: cannot be written: {e.strerror}; name another file.",
                errno=e.errno,
            ) from e
        self.stream: Stream = Stream(_PCAP_BUFFER)
        self.stream.write(_PCAP)
        self._sink: Sink = Sink(self.stream, self._fd, name=path)

    def close(self) -> None:
        self._sink.flush()
        self._sink.close()
        self.stream.close()
        os.close(self._fd)


DEVICE = Net
