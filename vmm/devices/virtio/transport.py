"""What a virtio transport is to a device and a device to a transport; the part both transports
share.

The registers themselves are served in C (native/virtio.h), so that a driver's probe costs no
Python: the status machine, feature paging, queue selection, validation and the one-time copy of
each queue's size and addresses, interrupt status, vectors, and reads of the configuration space.
Python acts on four events: DRIVER_OK, the reset of a running device or of one of its queues, a
write to the configuration space. virtio-v1.3 §2, §3.1.

The contract, device side (vmm/devices/virtio/device.py has the base class):

- ``DEVICE_ID``, ``QUEUE_SIZES`` (the maximum of each queue; its length is the number of queues)
  are constants of the class or set before the transport is made.
- ``host_features()``: what is offered, without the transport's own bits (VERSION_1 is one).
- ``config``: bytes of the configuration space as the driver shall read them. The transport takes
  a copy; after a change the device calls ``irqs.config_changed()``.
- ``write_config(offset, size, value)``: a driver's write, wholly inside ``config``.
- ``activate(features, queues, irqs)``: the driver said DRIVER_OK. One entry per queue, None where
  the driver did not enable it. Addresses are in RAM, aligned, and will not change until reset.
- ``stop_queue(queue)``, ``restart_queue(queue, config)``: one queue of a running device, where
  RING_RESET was negotiated (virtio-v1.3 §2.6.1). The first returns as ``deactivate`` does.
- ``deactivate()``: returns only when nothing is in flight and no thread touches the queues.
- ``kick_fd(queue)``: an eventfd of the device that lives as long as the device does. It may be
  signalled at any time, also before ``activate``; that must be harmless.
- ``DIRECT_QUEUES``: queues that shall get no ioeventfd, as the device serves them on the thread of
  the vCPU that notifies.
- ``reset()`` and ``close()`` as every Device.

``activate``, ``deactivate``, the two about one queue and ``write_config`` run on a vCPU thread, one
at a time per machine. I/O threads interrupt through ``irqs.native``:
vmm_virtio_notify(native, queue) and vmm_virtio_fail(native) may be called on any thread.
"""

from __future__ import annotations

import threading

from vmm._native import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    from vmm.devices.virtio.device import VirtioDevice
    from vmm.memory import GuestMemory

    class IoEventFd(Protocol):
        """Binds an eventfd to guest-physical writes. ``size`` 0 matches any width; ``datamatch``
        only writes of that value. Raises HostError."""

        any_length: bool

        def bind(self, fd: int, addr: int, size: int, datamatch: int | None = None) -> None: ...
        def unbind(self, fd: int, addr: int, size: int, datamatch: int | None = None) -> None: ...


#: The transport's own feature bits. virtio-v1.3 §6.
VERSION_1 = 1 << 32

# Device status bits. virtio-v1.3 §2.1.
ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, FAILED = 1, 2, 4, 8, 64, 128


class QueueConfig:
    """One enabled queue: its size in descriptors and the guest-physical addresses of descriptor
    area, driver area and device area. virtio-v1.3 §2.6."""

    __slots__ = ("desc", "device", "driver", "size")

    def __init__(self, size: int, desc: int, driver: int, device: int) -> None:
        self.size = size
        self.desc = desc
        self.driver = driver
        self.device = device


class QueueIrqs:
    """How an active device speaks to its driver. Any thread may use it, until ``deactivate``."""

    def __init__(self, transport: VirtioTransport) -> None:
        #: struct vmm_virtio *, for C: vmm_virtio_notify, vmm_virtio_fail.
        self.native: Any = transport.native
        self._transport = transport

    def notify(self, queue: int) -> None:
        """There are used buffers in this queue."""
        lib.vmm_virtio_notify(self.native, queue)

    def config_changed(self) -> None:
        """``config`` of the device is different now: the driver reads it again."""
        self._transport.config_changed()

    def fail(self) -> None:
        """The driver did what the device cannot continue from: DEVICE_NEEDS_RESET."""
        lib.vmm_virtio_fail(self.native)


class VirtioTransport:
    """The half of a transport that does not depend on how registers are reached.

    Owns the C register file and, from here on, the device. ``features``: bits the transport
    offers of its own.
    """

    def __init__(self, device: VirtioDevice, memory: GuestMemory, *, features: int = 0) -> None:
        self.device = device
        self.queues = len(device.QUEUE_SIZES)
        self.active = False
        #: Whoever publishes last publishes the newest.
        self._publishing = threading.Lock()
        self.native = lib.vmm_virtio_create(
            memory.table,
            device.DEVICE_ID,
            device.host_features() | VERSION_1 | features,
            ffi.new("uint16_t[]", list(device.QUEUE_SIZES)),
            self.queues,
        )
        if self.native == ffi.NULL:
            raise MemoryError(f"{device.name}: no register file for {self.queues} queues")
        for queue in range(self.queues):
            lib.vmm_virtio_kick_to(self.native, queue, device.kick_fd(queue))
        self._publish(notify=False)

    @property
    def eventfd_queues(self) -> list[tuple[int, int]]:
        """(queue, kick eventfd) of each queue that is to be notified without an exit."""
        device = self.device
        return [(q, device.kick_fd(q)) for q in range(self.queues) if q not in device.DIRECT_QUEUES]

    @property
    def status(self) -> int:
        """Device status, virtio-v1.3 §2.1."""
        return int(lib.vmm_virtio_status(self.native))

    @property
    def refused(self) -> int:
        """Accesses so far that a driver must not do."""
        return int(lib.vmm_virtio_refused(self.native))

    def write_status(self, value: int) -> None:
        """A status write C left to Python: stop a running device, or start it."""
        if value == 0:
            self.reset()
        elif value & DRIVER_OK and lib.vmm_virtio_start(self.native):
            self.active = True
            self.device.activate(
                int(lib.vmm_virtio_driver_features(self.native)),
                [self._queue(i) for i in range(self.queues)],
                QueueIrqs(self),
            )

    def queues_changed(self) -> None:
        """A queue of a running device was reset or enabled again."""
        while (queue := lib.vmm_virtio_queue_due(self.native, 0)) >= 0:
            if self.active:
                self.device.stop_queue(queue)
            lib.vmm_virtio_queue_stopped(self.native, queue)
        while (queue := lib.vmm_virtio_queue_due(self.native, 1)) >= 0:
            config = self._queue(queue)
            if self.active and config is not None:
                self.device.restart_queue(queue, config)

    def write_config(self, offset: int, size: int, value: int) -> None:
        """A driver's write to the device configuration space."""
        if offset + size <= len(self.device.config):
            self.device.write_config(offset, size, value)
            self._publish(notify=False)

    def config_changed(self) -> None:
        """Any thread."""
        self._publish(notify=True)

    def reset(self) -> None:
        """Power-on state; returns when nothing of the device is in flight. virtio-v1.3 §2.4."""
        if self.active:
            self.device.deactivate()
            self.active = False
        lib.vmm_virtio_reset(self.native)
        self._publish(notify=False)  # what the driver wrote there is gone

    def close(self) -> None:
        """Stops and closes the device and frees the registers; no vCPU runs any more."""
        if self.native == ffi.NULL:
            return
        self.reset()
        self.device.close()
        lib.vmm_virtio_destroy(self.native)
        self.native = ffi.NULL

    def _queue(self, index: int) -> QueueConfig | None:
        q = ffi.new("struct vmm_virtio_queue *")
        lib.vmm_virtio_queue(self.native, index, q)
        return QueueConfig(q.size, q.desc, q.driver, q.device) if q.enabled else None

    def _publish(self, *, notify: bool) -> None:
        with self._publishing:
            config = bytes(self.device.config)
            rc = lib.vmm_virtio_config(self.native, config, len(config), int(notify))
        if rc:
            raise ValueError(f"{self.device.name}: {len(config)} bytes of configuration space")
