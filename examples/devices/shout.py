"""A virtio console that answers everything in capitals; the guest's hvc0. virtio-v1.3 §5.3."""

from __future__ import annotations

from collections import deque

import vmm

TO_GUEST, FROM_GUEST = 0, 1


class Shout(vmm.PythonVirtioDevice):
    """Linux drives it with its stock virtio_console."""

    DEVICE_ID = 3
    QUEUE_SIZES = (64, 64)
    KERNEL_CONFIG = "CONFIG_VIRTIO_CONSOLE"

    def __init__(self) -> None:
        super().__init__()
        self.rooms: deque[vmm.VirtioRequest] = deque()

    def handle(self, request: vmm.VirtioRequest) -> None:
        if request.queue == TO_GUEST:
            request.keep()  # room for what we shall have to say
            self.rooms.append(request)
            return
        text = request.read().upper()
        while text and self.rooms:  # what there is no room for is lost
            room = self.rooms.popleft()
            text = text[room.write(text) :]
            room.done()

    def stopped(self) -> None:
        self.rooms.clear()
