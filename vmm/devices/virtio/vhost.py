"""The base of a virtio device whose rings somebody else walks: a process of its own (vhost-user) or
the host's kernel. The driver's kicks go straight there, by the ioeventfds of the transport; the
interrupts come back by way of an I/O thread (native/relay.c)."""

from __future__ import annotations

import os

from vmm._native import ffi, lib
from vmm.devices.virtio.device import F_RING_PACKED, VirtioDevice
from vmm.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmm.devices.virtio.transport import QueueConfig, QueueIrqs
    from vmm.memory import GuestMemory

#: Where a queue begins that no driver has used: index 0; if packed, twice index 0 with the wrap
#: counter set (virtio-v1.3 §2.8.1), available in the lower half and used in the upper one.
FIRST, FIRST_PACKED = 0, 0x8000_8000


class Relay:
    """Eventfds that the kernel signals, which become interrupts of a device's queues on an I/O
    thread (struct vmm_loop *). Raises HostError."""

    __slots__ = ("native",)

    def __init__(self, loop: Any, queues: int, name: str) -> None:
        self.native = lib.vmm_relay_create(loop, queues)
        if self.native == ffi.NULL:
            raise HostError(f"{name}: {os.strerror(ffi.errno)}.", errno=ffi.errno)

    def fd(self, queue: int) -> int:
        return int(lib.vmm_relay_fd(self.native, queue))

    def start(self, queue: int, virtio: Any) -> int:
        """``virtio``: struct vmm_virtio *. 0 or -errno."""
        return int(lib.vmm_relay_start(self.native, queue, virtio))

    def stop(self, queue: int) -> None:
        """Harmless when it was not started."""
        if self.native != ffi.NULL:
            lib.vmm_relay_stop(self.native, queue)

    @property
    def count(self) -> int:
        """Interrupts so far."""
        return int(lib.vmm_relay_count(self.native)) if self.native != ffi.NULL else 0

    def close(self) -> None:
        lib.vmm_relay_destroy(self.native)
        self.native = ffi.NULL


class VhostDevice(VirtioDevice):
    """Keeps which queues the driver has enabled, and their interrupts. Subclasses define
    ``begin``, ``begin_queue``, ``end_queues`` and ``end_queue``."""

    CAN_PACK = False

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._relay: Relay | None = None
        #: The queues that the driver enabled, while it runs.
        self.queues: dict[int, QueueConfig] = {}

    # ---- what a subclass fills in --------------------------------------------------------------

    def begin(self) -> None:
        """Have all of ``queues`` walked."""
        raise NotImplementedError

    def begin_queue(self, index: int) -> None:
        """Have one more walked, which the driver had reset."""
        raise NotImplementedError

    def end_queues(self) -> None:
        """Return when none of ``queues`` is touched any more."""
        raise NotImplementedError

    def end_queue(self, index: int) -> None:
        raise NotImplementedError

    def walked(self, index: int) -> bool:
        """Whether a queue is one of those; what is not is served by ``start_queue``, in C."""
        return True

    # ---- the contract of a virtio device -------------------------------------------------------

    def attach(self, memory: GuestMemory, loop: Any) -> None:
        super().attach(memory, loop)
        (loop,) = self.io_loops(loop)
        self._relay = Relay(loop, len(self.QUEUE_SIZES), self.name)

    def call_fd(self, index: int) -> int:
        """The eventfd that becomes the interrupt of a queue."""
        assert self._relay is not None
        return self._relay.fd(index)

    def first_base(self) -> int:
        return FIRST_PACKED if self.features >> F_RING_PACKED & 1 else FIRST

    def activate(self, features: int, queues: list[QueueConfig | None], irqs: QueueIrqs) -> None:
        super().activate(features, queues, irqs)
        self.begin()

    def enable_queue(self, index: int, queue: QueueConfig) -> None:
        if not self.walked(index):
            super().enable_queue(index, queue)
            return
        assert self._irqs is not None
        assert self._relay is not None
        self.queues[index] = queue
        if self._relay.start(index, self._irqs.native):
            self._irqs.fail()

    def restart_queue(self, index: int, queue: QueueConfig) -> None:
        if not self.walked(index):
            super().restart_queue(index, queue)
            return
        self.enable_queue(index, queue)
        self.begin_queue(index)

    def stop_queue(self, index: int) -> None:
        assert self._relay is not None
        self.end_queue(index)
        self._relay.stop(index)
        self.queues.pop(index, None)

    def stop_queues(self) -> None:
        self.end_queues()
        if self._relay is not None:
            for index in range(len(self.QUEUE_SIZES)):
                self._relay.stop(index)
        self.queues = {}

    @property
    def interrupts(self) -> int:
        """How many were relayed so far."""
        return 0 if self._relay is None else self._relay.count

    def close(self) -> None:
        super().close()
        if self._relay is not None:
            self._relay.close()
            self._relay = None
        self.close_threads()


def in_order(memory: GuestMemory, queue: QueueConfig) -> bool:
    """Whether the heads in the used ring of a split queue are those that came first in the
    available ring: then what is left of that is what was not finished. As much of both as is there
    is compared; what a driver wrote there can do no more than make the answer wrong for itself."""
    from collections import Counter

    size = queue.size
    used = memory.read_int(queue.device + 2, 2)
    left = (memory.read_int(queue.driver + 2, 2) - used) & 0xFFFF
    if left > size:
        return False
    avail: Counter[int] = Counter()
    done: Counter[int] = Counter()
    for back in range(1, size - left + 1):
        slot = (used - back) % size
        avail[memory.read_int(queue.driver + 4 + 2 * slot, 2)] += 1
        done[memory.read_int(queue.device + 4 + 8 * slot, 4)] += 1
    return left == 0 or avail == done
