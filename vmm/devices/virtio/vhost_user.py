"""A virtio device of any kind that another process serves: vhost-user. All of its configuration
space and features are the back end's; this side knows nothing about its kind."""

from __future__ import annotations

from vmm.devices.virtio.vhost_options import RECONNECT, SOCKET, queue_size
from vmm.devices.virtio.vhost_process import TIMEOUT, VhostUserDevice
from vmm.options import Field
from vmm.values import parse_count

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    from vmm.board import Board
    from vmm.devices.virtio.vhost_front import FrontEnd
    from vmm.options import Options

_QUEUE_SIZE = 256
_ID_MAX = 63
_QUEUES_MAX = 256
#: As much as the protocol has room for.
_CONFIG_MAX = 256


def _within(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = parse_count(text)
        if not low <= value <= high:
            raise ValueError(f"must be from {low} to {high}")
        return value

    return parse


class VhostUser(VhostUserDevice):
    """The device with the virtio id ``kind`` (virtio-v1.3 §5) that the back end at ``path`` serves,
    with so many ``queues`` of ``size`` descriptors and ``config_size`` bytes of configuration
    space."""

    KERNEL_CONFIG = "a driver for this virtio device"

    HELP = (
        "A virtio device of any kind that another process serves (vhost-user), which listens at "
        "SOCKET."
    )
    OPTIONS = (
        SOCKET,
        Field("id", "the kind of device, virtio's number of it", _within(1, _ID_MAX), metavar="N",
              required=True),
        Field("queues", "how many", _within(1, _QUEUES_MAX), metavar="N", default=1),
        queue_size(_QUEUE_SIZE),
        Field("config-size", "bytes of configuration space", _within(0, _CONFIG_MAX),
              metavar="N", default=0),
        RECONNECT,
    )  # fmt: skip

    @classmethod
    def from_options(cls, options: Options, board: Board) -> Self:
        return cls(
            options.socket,
            options.id,
            queues=options.queues,
            size=getattr(options, "queue-size"),
            config_size=getattr(options, "config-size"),
            reconnect=options.reconnect,
        )

    def __init__(
        self,
        path: str,
        kind: int,
        *,
        queues: int = 1,
        size: int = _QUEUE_SIZE,
        config_size: int = 0,
        reconnect: float = 0.0,
        timeout: float = TIMEOUT,
        name: str = "vhost-user0",
    ) -> None:
        self.DEVICE_ID = kind
        self.CONFIG_SIZE = config_size
        self._shape = (size,) * queues
        super().__init__(path, reconnect=reconnect, timeout=timeout, name=name)

    def layout(self, front: FrontEnd) -> tuple[int, ...]:
        self.count_queues(front, len(self._shape))
        return self._shape

    def may_write(self, offset: int, size: int) -> bool:
        return True


DEVICE = VhostUser
