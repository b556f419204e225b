"""A network card whose frames another process moves, such as a software switch: vhost-user-net.
virtio-v1.3 §5.1. The address, the MTU and the link's state are ours to say."""

from __future__ import annotations

import struct

from vmm.devices.virtio.net import F_MAC, F_MRG_RXBUF, F_MTU, F_STATUS, S_LINK_UP, default_mac
from vmm.devices.virtio.net_options import parse_mac, parse_mtu
from vmm.devices.virtio.vhost_options import RECONNECT, SOCKET, queue_size
from vmm.devices.virtio.vhost_process import TIMEOUT, VhostUserDevice
from vmm.options import Field

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

    from vmm.board import Board
    from vmm.devices.virtio.vhost_front import FrontEnd
    from vmm.options import Options

_QUEUE_SIZE = 256
#: Checksums, segmentation in both directions, buffers that are merged: virtio-v1.3 §5.1.3.
_OFFLOADS = (0, 1, 7, 8, 9, 10, 11, 12, 13, 14, F_MRG_RXBUF, 54, 55, 56)
#: mac, status, max_virtqueue_pairs, mtu: virtio-v1.3 §5.1.4.
_CONFIG = struct.Struct("<6sHHH")


class VhostUserNet(VhostUserDevice):
    """A card at the back end at ``path``; the link is down while there is none. ``mac``: 6 bytes,
    default derived from the path. ``mtu``: told to the driver, 0: nothing is."""

    DEVICE_ID = 1
    KERNEL_CONFIG = "CONFIG_VIRTIO_NET"
    BACK_END_BITS = sum(1 << bit for bit in _OFFLOADS)

    HELP = (
        "A network card whose frames another process moves (vhost-user), such as a software "
        "switch, which listens at SOCKET."
    )
    OPTIONS = (
        SOCKET,
        Field("mac", "of the card; default: derived from the path", parse_mac),
        Field("mtu", "largest packet, told to the guest", parse_mtu, default=0),
        queue_size(_QUEUE_SIZE),
        RECONNECT,
    )

    @classmethod
    def from_options(cls, options: Options, board: Board) -> Self:
        return cls(
            options.socket,
            mac=options.mac or b"",
            mtu=options.mtu,
            size=getattr(options, "queue-size"),
            reconnect=options.reconnect,
        )

    def __init__(
        self,
        path: str,
        *,
        mac: bytes = b"",
        mtu: int = 0,
        size: int = _QUEUE_SIZE,
        reconnect: float = 0.0,
        timeout: float = TIMEOUT,
        name: str = "vhost-user-net0",
    ) -> None:
        self.mac = mac or default_mac(path, 0)
        self.mtu = mtu
        self._size = size
        self.OWN_BITS = 1 << F_MAC | 1 << F_STATUS | (1 << F_MTU if mtu else 0)
        super().__init__(path, reconnect=reconnect, timeout=timeout, name=name)

    def layout(self, front: FrontEnd) -> tuple[int, ...]:
        return (self._size, self._size)

    def describe(self, front: FrontEnd) -> bytes:
        return _CONFIG.pack(self.mac, S_LINK_UP, 1, self.mtu)

    def orphaned(self) -> bytes:
        return _CONFIG.pack(self.mac, 0, 1, self.mtu)


DEVICE = VhostUserNet
