"""A directory of the host, shared by another process: vhost-user-fs, which in Linux is virtiofs.
virtio-v1.3 §5.11. The tag is ours to give, the files are the back end's."""

from __future__ import annotations

import os

from vmm.devices.virtio.fs import CONFIG, parse_tag
from vmm.devices.virtio.vhost_options import RECONNECT, SOCKET, queue_size
from vmm.devices.virtio.vhost_process import TIMEOUT, VhostUserDevice
from vmm.errors import ConfigError
from vmm.options import Field
from vmm.values import parse_count

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

    from vmm.board import Board
    from vmm.devices.virtio.vhost_front import FrontEnd
    from vmm.options import Options

_QUEUE_SIZE = 1024


class VhostUserFs(VhostUserDevice):
    """The files that the back end at ``path`` shares, which the guest mounts by ``tag``. ``queues``
    of requests; there is one more, of high priority."""

    DEVICE_ID = 26
    KERNEL_CONFIG = "CONFIG_VIRTIO_FS"
    BACK_END_BITS = 0

    HELP = (
        "A directory that another process shares (vhost-user), such as virtiofsd, which listens "
        "at SOCKET; 'mount -t virtiofs TAG /mnt' in the guest."
    )
    OPTIONS = (
        SOCKET,
        Field("tag", "what the guest mounts", parse_tag, required=True),
        Field("queues", "of requests", parse_count, metavar="N", default=1),
        queue_size(_QUEUE_SIZE),
        RECONNECT,
    )

    @classmethod
    def from_options(cls, options: Options, board: Board) -> Self:
        return cls(
            options.socket,
            options.tag,
            queues=options.queues,
            size=getattr(options, "queue-size"),
            reconnect=options.reconnect,
        )

    def __init__(
        self,
        path: str,
        tag: str,
        *,
        queues: int = 1,
        size: int = _QUEUE_SIZE,
        reconnect: float = 0.0,
        timeout: float = TIMEOUT,
        name: str = "vhost-user-fs0",
    ) -> None:
        try:
            self.tag = parse_tag(tag)
        except ValueError as e:
            raise ConfigError(f"The tag of a shared directory {e}.") from None
        self._queues = queues
        self._size = size
        super().__init__(path, reconnect=reconnect, timeout=timeout, name=name)

    def layout(self, front: FrontEnd) -> tuple[int, ...]:
        if self._queues < 1:
            raise ConfigError(f"{front.wire.label}: queues={self._queues}: it needs one at least.")
        self.count_queues(front, 1 + self._queues, "one of them for high priority")
        return (self._size,) * (1 + self._queues)

    def describe(self, front: FrontEnd) -> bytes:
        return CONFIG.pack(os.fsencode(self.tag), self._queues)


DEVICE = VhostUserFs
