"""virtio-console: one port, hvc0 in Linux. virtio-v1.3 §5.3; the work is in native/console.c."""

from __future__ import annotations

import struct

from vmm._native import ffi, lib
from vmm.devices.virtio.device import VirtioDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmm.chario import Input, Stream
    from vmm.devices.virtio.transport import QueueConfig, QueueIrqs
    from vmm.memory import GuestMemory

# Feature bit numbers, virtio-v1.3 §5.3.3.
F_SIZE = 0
F_EMERG_WRITE = 2

#: cols, rows, max_nr_ports, emerg_wr: virtio-v1.3 §5.3.4.
_CONFIG = struct.Struct("<HHII")
_EMERG_WR = 8


class Console(VirtioDevice):
    """A terminal line: output to a stream, input from an input; neither is owned.

    While the stream has no room the guest is held back: its buffers stay in the ring.
    """

    DEVICE_ID = 3
    QUEUE_SIZES = (64, 64)
    DIRECT_QUEUES = (1,)
    IN_ORDER = True
    KERNEL_CONFIG = "CONFIG_VIRTIO_CONSOLE"

    def __init__(
        self,
        out: Stream | None,
        inp: Input | None = None,
        *,
        columns: int = 80,
        rows: int = 25,
        name: str = "console0",
    ) -> None:
        super().__init__(name)
        self._out = out
        self._inp = inp
        self._native = ffi.NULL
        self._irqs: QueueIrqs | None = None
        self._resized = False
        self.config[:] = _CONFIG.pack(columns, rows, 1, 0)

    def device_features(self) -> int:
        return 1 << F_SIZE | 1 << F_EMERG_WRITE

    def attach(self, memory: GuestMemory, loop: Any) -> None:
        super().attach(memory, loop)
        self._native = lib.vmm_console_create(
            loop,
            self._out.native if self._out else ffi.NULL,
            self._inp.native if self._inp else ffi.NULL,
            self.QUEUE_SIZES[0],
        )
        if self._native == ffi.NULL:
            raise MemoryError(self.name)

    def activate(self, features: int, queues: list[QueueConfig | None], irqs: QueueIrqs) -> None:
        self._irqs = irqs
        super().activate(features, queues, irqs)
        if self._resized:
            self._tell_size()

    def start_queue(self, index: int, config: Any) -> int:
        return int(lib.vmm_console_start(self._native, config))

    def stop_queues(self) -> None:
        self._irqs = None
        lib.vmm_console_stop(self._native)

    def write_config(self, offset: int, size: int, value: int) -> None:
        """A character for emergencies, before any queue works: virtio-v1.3 §5.3.4."""
        if offset == _EMERG_WR and self._out is not None:
            lib.vmm_stream_offer(self._out.native, bytes([value & 0xFF]), 1)

    def resize(self, columns: int, rows: int) -> None:
        """The terminal has another size now; any thread."""
        struct.pack_into("<HH", self.config, 0, min(columns, 0xFFFF), min(rows, 0xFFFF))
        self._resized = True
        self._tell_size()

    def _tell_size(self) -> None:
        irqs = self._irqs
        if irqs is not None:
            self._resized = False
            irqs.config_changed()

    @property
    def sent(self) -> int:
        """Bytes the guest wrote."""
        return int(lib.vmm_console_sent(self._native)) if self._native != ffi.NULL else 0

    @property
    def received(self) -> int:
        """Bytes the guest was given."""
        return int(lib.vmm_console_received(self._native)) if self._native != ffi.NULL else 0

    def close(self) -> None:
        super().close()
        lib.vmm_console_destroy(self._native)
        self._native = ffi.NULL
