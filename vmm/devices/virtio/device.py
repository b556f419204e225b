"""What every virtio device is, whichever transport carries it.

The base class owns what a guest could abuse: which features can be negotiated, where its
configuration space ends, when it runs. A device says what it is (class attributes), what its
configuration space holds, and how its C half starts and stops.
"""

from __future__ import annotations

import os

from vmm._native import ffi, lib
from vmm.device import Device
from vmm.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from vmm.board import Board
    from vmm.devices.virtio.transport import QueueConfig, QueueIrqs
    from vmm.memory import GuestMemory

# Feature bit numbers, virtio-v1.3 §6.
F_INDIRECT_DESC = 28
F_EVENT_IDX = 29
F_RING_PACKED = 34
F_IN_ORDER = 35
F_RING_RESET = 40
#: What native/ring.h can do, offered by every device.
RING_FEATURES = 1 << F_INDIRECT_DESC | 1 << F_EVENT_IDX


class VirtioDevice(Device):
    """The device half of vmm/devices/virtio/transport.py's contract.

    ``attach`` first, then a transport. ``activate`` and ``deactivate`` run on a vCPU thread; the
    queues belong to an I/O thread in between.
    """

    #: virtio-v1.3 §5.
    DEVICE_ID = 0
    #: The maximum size of each queue, in descriptors.
    QUEUE_SIZES: tuple[int, ...] = ()
    #: Queues that the notifying vCPU's own thread serves: they get no ioeventfd.
    DIRECT_QUEUES: tuple[int, ...] = ()
    #: Every queue's chains come back in the order they came. virtio-v1.3 §2.7.10.
    IN_ORDER = False
    #: Whether its queues go through native/ring.h or vmm/devices/virtio/queue.py, which know
    #: packed queues. A device whose rings somebody else walks (vhost) says False.
    CAN_PACK = True
    #: What Linux must be built with to use the device.
    KERNEL_CONFIG = ""

    def __init__(self, name: str) -> None:
        self.name = name
        #: The configuration space as the driver reads it.
        self.config = bytearray()
        #: What the driver accepted; 0 while it is not running.
        self.features = 0
        self.activations = 0
        #: Set before ``attach``.
        self.placement = Placement()
        #: Offer packed queues; the machine sets it before a transport takes the device.
        self.packed = False
        self._memory: GuestMemory | None = None
        self._threads: list[IoThread] = []
        self._active = False
        self._irqs: QueueIrqs | None = None
        self._reports = [ffi.new("struct vmm_service_report *") for _ in self.QUEUE_SIZES]
        self._kicks = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in self.QUEUE_SIZES]

    def plug(self, board: Board) -> None:
        board.virtio.append(self)  # a transport takes it from there

    # ---- what a device fills in ----------------------------------------------------------------

    def device_features(self) -> int:
        """Feature bits of this device type, as a mask."""
        return 0

    def start_queue(self, index: int, config: Any) -> int:
        """Begin to serve a queue, in C: ``config`` is struct vmm_service_config *, valid during
        the call. 0 or -errno."""
        raise NotImplementedError

    def stop_queues(self) -> None:
        """Stop every queue; return when nothing is in flight. Harmless when none was started."""
        raise NotImplementedError

    def stop_queue(self, index: int) -> None:
        """Stop one queue; return when nothing of it is in flight. It may be started again. A
        device of several queues that has this offers RING_RESET."""
        if len(self.QUEUE_SIZES) != 1:
            raise NotImplementedError
        self.stop_queues()

    def io_threads(self) -> list[IoThread]:
        """I/O threads of the device's own, once it is attached."""
        return list(self._threads)

    def io_loops(self, shared: Any, queues: int = 1) -> list[Any]:
        """For ``attach``: loops (struct vmm_loop *) to serve so many queues on, where the
        placement has them: new ones, which the device owns, or ``shared``. Raises HostError."""
        self._threads = self.placement.threads(self.name, queues)
        return [thread.native for thread in self._threads] or [shared]

    def close_threads(self) -> None:
        """For ``close``, once the C half that worked on them is gone."""
        for thread in self._threads:
            thread.close()
        self._threads = []

    def pending(self) -> int:
        """How many requests wait for the host, as far as the device knows. Any thread."""
        return 0

    # ---- the contract ---------------------------------------------------------------------------

    def attach(self, memory: GuestMemory, loop: Any) -> None:
        """Before the guest starts: its RAM and the I/O thread (struct vmm_loop *) to work on;
        both outlive the device. Raises HostError."""
        self._memory = memory

    def ring_features(self) -> int:
        """What the walk of its queues can do."""
        bits = RING_FEATURES | int(self.IN_ORDER) << F_IN_ORDER
        return bits | int(self.packed and self.CAN_PACK) << F_RING_PACKED

    def host_features(self) -> int:
        by_queue = type(self).stop_queue is not VirtioDevice.stop_queue
        reset = int(by_queue or len(self.QUEUE_SIZES) == 1) << F_RING_RESET
        return self.ring_features() | reset | self.device_features()

    def kick_fd(self, queue: int) -> int:
        return self._kicks[queue]

    def activate(self, features: int, queues: list[QueueConfig | None], irqs: QueueIrqs) -> None:
        if self._memory is None:
            raise HostError(f"{self.name} was never attached to a machine")
        if self._active:
            self.deactivate()
        self.features = features
        self.activations += 1
        self._active = True
        self._irqs = irqs
        for index, queue in enumerate(queues):
            if queue is not None:
                self.enable_queue(index, queue)

    def enable_queue(self, index: int, queue: QueueConfig) -> None:
        """One of the queues that the driver had enabled, at activation."""
        self.restart_queue(index, queue)

    def restart_queue(self, index: int, queue: QueueConfig) -> None:
        """Begin to serve one queue: at activation, or after ``stop_queue``."""
        assert self._memory is not None
        assert self._irqs is not None
        config = ffi.new("struct vmm_service_config *")
        vq = config.vq
        vq.desc, vq.avail, vq.used = queue.desc, queue.driver, queue.device
        vq.size, vq.features = queue.size, self.features
        config.mem = self._memory.table
        config.virtio = self._irqs.native
        config.index = index
        config.kick_fd = self._kicks[index]
        config.report = self._reports[index]
        if self.start_queue(index, config):
            self._irqs.fail()

    def deactivate(self) -> None:
        if self._active:
            self.stop_queues()
        self._active = False
        self._irqs = None
        self.features = 0

    def write_config(self, offset: int, size: int, value: int) -> None:
        """Nothing in most configuration spaces can be written: virtio-v1.3 §2.5.1."""

    def reset(self) -> None:
        self.deactivate()

    def close(self) -> None:
        self.deactivate()
        for fd in self._kicks:
            os.close(fd)
        self._kicks = []

    def faults(self) -> list[str]:
        """What the driver did so far that a device cannot go on from: a sentence per queue."""
        said = []
        for index, report in enumerate(self._reports):
            if report.breaks:
                from vmm.devices.virtio.queue import VERDICTS

                what = list(VERDICTS.values())[report.verdict]
                times = f"{report.breaks} times"
                said.append(f"{self.name}: the driver broke queue {index} {times}, last: {what}")
        return said

    def unclaimed(self) -> str | None:
        if self.activations:
            return None
        return (
            f"the guest never used {self.name}; its kernel may lack {self.KERNEL_CONFIG} "
            "(or the module in its initrd)"
        )


class IoThread:
    """An I/O thread of a device's own (struct vmm_loop *). ``close`` stops and joins it."""

    __slots__ = ("native",)

    def __init__(self, name: str) -> None:
        self.native = lib.vmm_loop_create()
        if self.native == ffi.NULL:
            raise HostError(
                f"an I/O thread for {name} could not be started: {os.strerror(ffi.errno)}",
                errno=ffi.errno,
            )

    def close(self) -> None:
        if self.native != ffi.NULL:
            lib.vmm_loop_destroy(self.native)
            self.native = ffi.NULL


class Placement:
    """Which I/O threads serve the queues of a machine's devices: ``mode`` is 'shared' (the
    machine's own), 'device' or 'queue'; ``cpus`` of the host take turns in having a thread pinned
    to them; ``poll_us``: how long a thread that is not shared looks for work before it sleeps."""

    __slots__ = ("cpus", "mode", "poll_us", "turn")

    def __init__(self, mode: str = "device", cpus: Sequence[int] = (), poll_us: int = 0) -> None:
        self.mode = mode
        self.cpus = cpus
        self.poll_us = poll_us
        self.turn = 0

    def threads(self, name: str, queues: int) -> list[IoThread]:
        """New threads for a device: queue i is for number i modulo how many there are; none:
        all queues are for the shared one. Raises HostError."""
        count = {"shared": 0, "device": 1}.get(self.mode, queues)
        made: list[IoThread] = []
        try:
            for _ in range(count):
                made.append(IoThread(name))
                lib.vmm_loop_poll(made[-1].native, self.poll_us)
                self.pin(made[-1].native)
        except BaseException:
            for thread in made:
                thread.close()
            raise
        return made

    def pin(self, loop: Any) -> None:
        """Pin a loop's thread (struct vmm_loop *) to the next CPU. Raises HostError."""
        if not self.cpus:
            return
        cpu = self.cpus[self.turn % len(self.cpus)]
        self.turn += 1
        rc = lib.vmm_loop_pin(loop, cpu)
        if rc:
            raise HostError(
                f"--io-cpus: an I/O thread could not be pinned to CPU {cpu}: {os.strerror(-rc)}",
                errno=-rc,
            )
