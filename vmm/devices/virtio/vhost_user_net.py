"""A network card whose frames another process moves, such as a software switch: vhost-user-net.
virtio-v1.3 §5.1. The address, the MTU and the link's state are ours to say; of a card with more
than one pair of queues also the control queue, by which the driver says how many it uses."""

from __future__ import annotations

import errno
import os
import struct

from vmm._native import ffi, lib
from vmm.devices.virtio.net import (
    CTRL_QUEUE_SIZE,
    F_CTRL_VQ,
    F_MAC,
    F_MQ,
    F_MRG_RXBUF,
    F_MTU,
    F_STATUS,
    S_LINK_UP,
    default_mac,
)
from vmm.devices.virtio.net_options import parse_mac, parse_mtu
from vmm.devices.virtio.vhost_options import RECONNECT, SOCKET, queue_size
from vmm.devices.virtio.vhost_process import TIMEOUT, VhostUserDevice
from vmm.errors import ConfigError, HostError
from vmm.options import Field
from vmm.values import parse_count

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Self

    from vmm.board import Board
    from vmm.devices.virtio.vhost_front import FrontEnd
    from vmm.memory import GuestMemory
    from vmm.options import Options

_QUEUE_SIZE = 256
_PAIRS_MAX = int(lib.VMM_NET_MAX_PAIRS)
#: Checksums, segmentation in both directions, buffers that are merged: virtio-v1.3 §5.1.3.
_OFFLOADS = (0, 1, 7, 8, 9, 10, 11, 12, 13, 14, F_MRG_RXBUF, 54, 55, 56)
#: mac, status, max_virtqueue_pairs, mtu: virtio-v1.3 §5.1.4.
_CONFIG = struct.Struct("<6sHHH")


class VhostUserNet(VhostUserDevice):
    """A card at the back end at ``path``; the link is down while there is none. ``mac``: 6 bytes,
    default derived from the path. ``mtu``: told to the driver, 0: nothing is. ``queues``: pairs."""

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
        Field("queues", "pairs of queues, up to 16", parse_count, metavar="N", default=1),
        queue_size(_QUEUE_SIZE),
        RECONNECT,
    )

    @classmethod
    def from_options(cls, options: Options, board: Board) -> Self:
        return cls(
            options.socket,
            mac=options.mac or b"",
            mtu=options.mtu,
            queues=options.queues,
            size=getattr(options, "queue-size"),
            reconnect=options.reconnect,
        )

    def __init__(
        self,
        path: str,
        *,
        mac: bytes = b"",
        mtu: int = 0,
        queues: int = 1,
        size: int = _QUEUE_SIZE,
        reconnect: float = 0.0,
        timeout: float = TIMEOUT,
        name: str = "vhost-user-net0",
    ) -> None:
        if not 0 < queues <= _PAIRS_MAX:
            raise ConfigError(
                f"A network card has 1 to {_PAIRS_MAX} pairs of queues, not {queues}."
            )
        self.mac = mac or default_mac(path, 0)
        self.mtu = mtu
        self.pairs = queues
        self._size = size
        self._control = ffi.NULL
        self.OWN_BITS = 1 << F_MAC | 1 << F_STATUS | (1 << F_MTU if mtu else 0)
        if queues > 1:
            self.OWN_BITS |= 1 << F_CTRL_VQ | 1 << F_MQ
            self.use_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            super().__init__(path, reconnect=reconnect, timeout=timeout, name=name)
        except BaseException:
            self._close_use()
            raise

    def layout(self, front: FrontEnd) -> tuple[int, ...]:
        control = (CTRL_QUEUE_SIZE,) if self.pairs > 1 else ()
        self.count_queues(front, self.pairs, "pairs")
        return (self._size,) * (2 * self.pairs) + control

    def describe(self, front: FrontEnd) -> bytes:
        return _CONFIG.pack(self.mac, S_LINK_UP, self.pairs, self.mtu)

    def orphaned(self) -> bytes:
        return _CONFIG.pack(self.mac, 0, self.pairs, self.mtu)

    # ---- the control queue ---------------------------------------------------------------------

    def _control_index(self) -> int:
        """virtio-v1.3 §5.1.2."""
        return 2 * (self.pairs if self.features >> F_MQ & 1 else 1)

    def walked(self, index: int) -> bool:
        return index < self._control_index()

    def in_use(self, index: int) -> bool:
        return self._control == ffi.NULL or index < 2 * int(lib.vmm_net_pairs(self._control))

    def attach(self, memory: GuestMemory, loop: Any) -> None:
        if self.pairs > 1:
            config = ffi.new("struct vmm_net_config *")
            config.kind = lib.VMM_NET_NONE
            config.pairs = self.pairs
            config.queue_size = CTRL_QUEUE_SIZE
            config.fds[0 : self.pairs] = [-1] * self.pairs
            config.listener = -1
            config.pairs_fd = self.use_fd
            config.space = bytes(self.config)
            # Commands are few: the machine's own I/O thread has time for them.
            self._control = lib.vmm_net_create(loop, config)
            if self._control == ffi.NULL:
                raise HostError(f"{self.name}: {os.strerror(ffi.errno)}", errno=ffi.errno)
        super().attach(memory, loop)

    def start_queue(self, index: int, config: Any) -> int:
        if index != self._control_index() or self._control == ffi.NULL:
            return -errno.EINVAL
        return int(lib.vmm_net_start(self._control, config))

    def stop_queue(self, index: int) -> None:
        if self.walked(index):
            super().stop_queue(index)
        elif self._control != ffi.NULL:
            lib.vmm_net_stop_queue(self._control, index)

    def stop_queues(self) -> None:
        if self._control != ffi.NULL:
            lib.vmm_net_stop(self._control)
        super().stop_queues()

    def _close_use(self) -> None:
        if self.use_fd >= 0:
            os.close(self.use_fd)
            self.use_fd = -1

    def close(self) -> None:
        super().close()
        lib.vmm_net_destroy(self._control)
        self._control = ffi.NULL
        self._close_use()


DEVICE = VhostUserNet
