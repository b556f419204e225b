"""virtio-net whose frames the host's kernel moves between the rings and a tap (/dev/vhost-net). The
control queue and the configuration space stay with native/net*.c."""

from __future__ import annotations

import errno
import threading

from vmm._native import lib
from vmm.devices.virtio.device import RING_FEATURES
from vmm.devices.virtio.net import F_MQ, F_MRG_RXBUF, Net
from vmm.devices.virtio.vhost import Relay
from vmm.devices.virtio.vhost_kernel import Vhost

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmm.devices.virtio.net_backend import Backend
    from vmm.devices.virtio.transport import QueueConfig, QueueIrqs
    from vmm.memory import GuestMemory

PATH = "/dev/vhost-net"


class VhostNet(Net):
    """A card at a tap, which it owns; ``options`` are Net's, without a dump and limits: nothing of
    the frames is seen here. Raises HostError."""

    CAN_PACK = False
    IN_ORDER = False

    def __init__(self, backend: Backend, **options: Any) -> None:
        self._relay: Relay | None = None
        #: Rings that the kernel walks, by queue.
        self._started: set[int] = set()
        self._lock = threading.Lock()  # _started, and whether they have their tap
        self._vhosts: list[Vhost] = []
        try:
            for _ in backend.fds:
                self._vhosts.append(Vhost(PATH, "--net tap,vhost=on"))
        except BaseException:
            self._close_vhosts()
            backend.close()
            raise
        try:
            super().__init__(backend, **options)
        except BaseException:
            self._close_vhosts()
            raise

    def _close_vhosts(self) -> None:
        for vhost in self._vhosts:
            vhost.close()

    def ring_features(self) -> int:
        return RING_FEATURES & self._vhosts[0].features

    def device_features(self) -> int:
        lacks = ~self._vhosts[0].features & 1 << F_MRG_RXBUF
        return super().device_features() & ~lacks

    def attach(self, memory: GuestMemory, loop: Any) -> None:
        super().attach(memory, loop)
        own = self._threads[0].native if self._threads else loop
        self._relay = Relay(own, len(self.QUEUE_SIZES), self.name)

    def activate(self, features: int, queues: list[QueueConfig | None], irqs: QueueIrqs) -> None:
        assert self._memory is not None
        rc = lib.vmm_net_begin(self._native, irqs.native, features)
        for vhost in self._vhosts:
            rc = rc or vhost.prepare(features, self._memory)
        super().activate(features, queues, irqs)
        if rc:
            irqs.fail()

    def _frames(self, index: int) -> bool:
        """Whether a queue is one that frames pass: virtio-v1.3 §5.1.2."""
        return index < 2 * (self.pairs if self.features >> F_MQ & 1 else 1)

    def start_queue(self, index: int, config: Any) -> int:
        if not self._frames(index):
            return super().start_queue(index, config)
        assert self._relay is not None
        rc = self._relay.start(index, config.virtio)
        rc = rc or self._vhosts[index // 2].start(index % 2, self._relay.fd(index), config)
        if rc:
            return rc
        with self._lock:
            self._started.add(index)
            return self._plug(index) if lib.vmm_net_dead(self._native) == 0 else -errno.EIO

    def _plug(self, index: int, *, up: bool = True) -> int:
        """Have a ring send to its tap, or receive from it; or stop it, and return when it has."""
        tap = self.backend.fds[index // 2] if up else -1
        return int(lib.vmm_vhost_net_backend(self._vhosts[index // 2].fd, index % 2, tap))

    def stop_queue(self, index: int) -> None:
        if not self._frames(index):
            super().stop_queue(index)
            return
        with self._lock:
            self._end(index)

    def _end(self, index: int) -> None:
        if index in self._started and self._relay is not None:
            self._plug(index, up=False)
            self._relay.stop(index)
            self._started.discard(index)

    def stop_queues(self) -> None:
        with self._lock:
            for index in list(self._started):
                self._end(index)
        super().stop_queues()

    def set_link(self, up: bool) -> None:
        super().set_link(up)
        with self._lock:
            for index in self._started:
                self._plug(index, up=up)

    def close(self) -> None:
        super().close()
        if self._relay is not None:
            self._relay.close()
            self._relay = None
        self._close_vhosts()
