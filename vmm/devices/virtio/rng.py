"""virtio-rng: the host's random bytes. virtio-v1.3 §5.4; the work is in native/rng.c."""

from __future__ import annotations

from vmm._native import ffi, lib
from vmm.devices.virtio.device import VirtioDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmm.memory import GuestMemory


class Rng(VirtioDevice):
    """An entropy source."""

    DEVICE_ID = 4
    QUEUE_SIZES = (16,)
    IN_ORDER = True
    KERNEL_CONFIG = "CONFIG_HW_RANDOM_VIRTIO"

    def __init__(self, name: str = "rng0") -> None:
        super().__init__(name)
        self._native = ffi.NULL

    def attach(self, memory: GuestMemory, loop: Any) -> None:
        super().attach(memory, loop)
        self._native = lib.vmm_rng_create(loop, self.QUEUE_SIZES[0])
        if self._native == ffi.NULL:
            raise MemoryError(self.name)

    def start_queue(self, index: int, config: Any) -> int:
        return int(lib.vmm_rng_start(self._native, config))

    def stop_queues(self) -> None:
        lib.vmm_rng_stop(self._native)

    @property
    def bytes_given(self) -> int:
        return int(lib.vmm_rng_bytes(self._native)) if self._native != ffi.NULL else 0

    def close(self) -> None:
        super().close()
        lib.vmm_rng_destroy(self._native)
        self._native = ffi.NULL
