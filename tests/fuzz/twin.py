"""A device whose queues the Python twin serves, on whichever thread waits for it: the sessions
judge the twin as they judge C."""

from __future__ import annotations

from typing import Any

from tests.virtio_ring import PACKED
from vmm.devices.virtio.device import VirtioDevice
from vmm.devices.virtio.packed import PackedQueue
from vmm.devices.virtio.queue import VERDICTS, Queue
from vmm.devices.virtio.split import SplitQueue


class Twin(VirtioDevice):
    """Sends back what it gets, as far as there is room."""

    DEVICE_ID = 42
    QUEUE_SIZES = (16, 16)
    IN_ORDER = True

    def __init__(self, name: str = "twin0") -> None:
        super().__init__(name)
        self.queues: dict[int, Queue] = {}

    def start_queue(self, index: int, config: Any) -> int:
        assert self._memory is not None
        vq = config.vq
        kind = PackedQueue if vq.features & PACKED else SplitQueue
        self.queues[index] = kind(self._memory, vq.size, vq.desc, vq.avail, vq.used, vq.features)
        return 0

    def stop_queue(self, index: int) -> None:
        self.queues.pop(index, None)

    def stop_queues(self) -> None:
        self.queues.clear()

    def serve(self) -> None:
        """Everything there is to do."""
        for index, queue in self.queues.items():
            while queue.verdict in ("empty", "chain"):
                chain = queue.pop()
                if chain is not None:
                    queue.push(chain, chain.write(chain.read(chain.write_len) or b"x"))
                elif queue.verdict != "empty":
                    self._reports[index].breaks += 1
                    self._reports[index].verdict = list(VERDICTS).index(queue.verdict)
                    if self._irqs is not None:
                        self._irqs.fail()
                elif not queue.enable_kicks():
                    break
            if queue.should_notify() and self._irqs is not None:
                self._irqs.notify(index)
