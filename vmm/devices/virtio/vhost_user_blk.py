"""A disk of another process: vhost-user-blk. virtio-v1.3 §5.2; the disk's file, its size and what
it can do are the back end's."""

from __future__ import annotations

import struct

from vmm.devices.virtio.blk import (
    F_BLK_SIZE,
    F_CONFIG_WCE,
    F_DISCARD,
    F_FLUSH,
    F_MQ,
    F_RO,
    F_SEG_MAX,
    F_SIZE_MAX,
    F_TOPOLOGY,
    F_WRITE_ZEROES,
    QUEUES_MAX,
    WRITEBACK,
)
from vmm.devices.virtio.vhost_options import RECONNECT, SOCKET, queue_size
from vmm.devices.virtio.vhost_process import TIMEOUT, VhostUserDevice
from vmm.options import Field
from vmm.values import parse_count

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

    from vmm.board import Board
    from vmm.devices.virtio.vhost_front import FrontEnd
    from vmm.options import Options

_QUEUE_SIZE = 128
_F_GEOMETRY = 4
# Offsets in the configuration space: virtio-v1.3 §5.2.4.
_SEG_MAX, _NUM_QUEUES = 12, 34


class VhostUserBlk(VhostUserDevice):
    """The disk that the back end at ``path`` serves. ``queues``: 0 for as many as ``cpus``, up to
    four, if the back end has them."""

    DEVICE_ID = 2
    KERNEL_CONFIG = "CONFIG_VIRTIO_BLK"
    CONFIG_SIZE = 60
    BACK_END_BITS = sum(
        1 << bit
        for bit in (
            F_SIZE_MAX, F_SEG_MAX, _F_GEOMETRY, F_RO, F_BLK_SIZE, F_FLUSH, F_TOPOLOGY, F_CONFIG_WCE,
            F_MQ, F_DISCARD, F_WRITE_ZEROES,
        )
    )  # fmt: skip

    HELP = (
        "A disk that another process serves (vhost-user), such as qemu-storage-daemon, which "
        "listens at SOCKET."
    )
    OPTIONS = (
        SOCKET,
        Field("queues", "default: one per vCPU, up to four", parse_count, metavar="N", default=0),
        queue_size(_QUEUE_SIZE),
        RECONNECT,
    )

    @classmethod
    def from_options(cls, options: Options, board: Board) -> Self:
        return cls(
            options.socket,
            queues=options.queues,
            size=getattr(options, "queue-size"),
            reconnect=options.reconnect,
            cpus=board.config.cpus,
        )

    def __init__(
        self,
        path: str,
        *,
        queues: int = 0,
        size: int = _QUEUE_SIZE,
        cpus: int = 1,
        reconnect: float = 0.0,
        timeout: float = TIMEOUT,
        name: str = "vhost-user-blk0",
    ) -> None:
        self._wanted = queues
        self._size = size
        self._cpus = cpus
        super().__init__(path, reconnect=reconnect, timeout=timeout, name=name)

    def layout(self, front: FrontEnd) -> tuple[int, ...]:
        has = front.queues if self._offered >> F_MQ & 1 else 1
        count = self._wanted or max(1, min(self._cpus, QUEUES_MAX, has))
        self.count_queues(front, count)
        return (self._size,) * count

    def describe(self, front: FrontEnd) -> bytes:
        config = bytearray(super().describe(front))
        struct.pack_into("<H", config, _NUM_QUEUES, len(self.QUEUE_SIZES))
        (segments,) = struct.unpack_from("<I", config, _SEG_MAX)
        struct.pack_into("<I", config, _SEG_MAX, max(1, min(segments, self._size - 2)))
        return bytes(config)

    def may_write(self, offset: int, size: int) -> bool:
        """The cache's mode: virtio-v1.3 §5.2.5.2."""
        return (offset, size) == (WRITEBACK, 1)


DEVICE = VhostUserBlk
