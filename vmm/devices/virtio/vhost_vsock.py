"""virtio-vsock carried by the host's kernel (/dev/vhost-vsock): the guest's sockets and the host's
are of the family AF_VSOCK, and the guest's address is the host's to keep unique. virtio-v1.3
§5.10."""

from __future__ import annotations

import errno
import os

from vmm._native import lib
from vmm.devices.virtio.device import RING_FEATURES, VirtioDevice
from vmm.devices.virtio.vhost import Relay
from vmm.devices.virtio.vhost_kernel import Vhost
from vmm.devices.virtio.vsock import Vsock
from vmm.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from typing import Any

    from vmm.devices.virtio.transport import QueueConfig, QueueIrqs
    from vmm.memory import GuestMemory

PATH = "/dev/vhost-vsock"
#: Queues to receive and to transmit are the kernel's; the one for events stays empty.
_RINGS = 2
_F_SEQPACKET = 1


class VhostVsock(Vsock):
    """Sockets of the guest, whose address is ``cid``, as AF_VSOCK on the host. Raises
    HostError."""

    CAN_PACK = False
    IN_ORDER = False

    def __init__(self, cid: int, *, name: str = "vsock0") -> None:
        super().__init__(cid, name=name)
        self._relay: Relay | None = None
        self._started: set[int] = set()
        try:
            self._vhost = Vhost(PATH, "--vsock vhost")
        except BaseException:
            VirtioDevice.close(self)
            raise
        rc = lib.vmm_vhost_vsock_cid(self._vhost.fd, cid)
        if rc:
            self.close()
            why = "another guest has it" if rc == -errno.EADDRINUSE else os.strerror(-rc)
            raise HostError(f"--vsock cid={cid},vhost: {why}; choose another cid.", errno=-rc)

    def ring_features(self) -> int:
        return RING_FEATURES & self._vhost.features

    def device_features(self) -> int:
        return self._vhost.features & 1 << _F_SEQPACKET

    def host_features(self) -> int:
        return self.ring_features() | self.device_features()

    def attach(self, memory: GuestMemory, loop: Any) -> None:
        VirtioDevice.attach(self, memory, loop)
        (loop,) = self.io_loops(loop)
        self._relay = Relay(loop, _RINGS, self.name)

    def activate(self, features: int, queues: list[QueueConfig | None], irqs: QueueIrqs) -> None:
        assert self._memory is not None
        rc = self._vhost.prepare(features, self._memory)
        super().activate(features, queues, irqs)
        if rc or len(self._started) != _RINGS or lib.vmm_vhost_vsock_run(self._vhost.fd, 1):
            irqs.fail()

    def start_queue(self, index: int, config: Any) -> int:
        if index >= _RINGS:
            return 0
        assert self._relay is not None
        rc = self._relay.start(index, config.virtio)
        rc = rc or self._vhost.start(index, self._relay.fd(index), config)
        if not rc:
            self._started.add(index)
        return rc

    def stop_queues(self) -> None:
        if self._started:
            lib.vmm_vhost_vsock_run(self._vhost.fd, 0)
        for index in self._started:
            if self._relay is not None:
                self._relay.stop(index)
        self._started = set()

    def connect(self, port: int, timeout: float | None = None) -> socket.socket:
        """An AF_VSOCK socket connected to ``port`` of the guest; see Vsock.connect. Raises
        HostError."""
        import socket

        sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        sock.settimeout(timeout)
        try:
            sock.connect((self.cid, port))
        except OSError as e:
            sock.close()
            raise HostError(
                f"The guest did not answer for vsock port {port}: {e}.", errno=e.errno
            ) from e
        return sock

    def listen(self, port: int, backlog: int = 16) -> socket.socket:
        """A listening AF_VSOCK socket that takes connections of every guest to ``port`` of CID 2.
        Raises HostError."""
        import socket

        listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        try:
            listener.bind((socket.VMADDR_CID_ANY, port))
            listener.listen(backlog)
        except OSError as e:
            listener.close()
            raise HostError(f"vsock port {port} cannot be listened at: {e}.", errno=e.errno) from e
        return listener

    def close(self) -> None:
        super().close()
        if self._relay is not None:
            self._relay.close()
            self._relay = None
        self._vhost.close()
