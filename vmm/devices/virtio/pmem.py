"""virtio-pmem: a file as the guest's memory. virtio-v1.3 §5.19; flushes are served by
native/pmem.c on an I/O thread of the device's own.

The guest's reads and writes are those of the mapped file: they share the host's page cache and
cause no exit. The file must keep its size, and its holes need room on the host's disk: a guest that
touches what is not there is lost. It alone: no device does DMA to this memory, or the file could
take vmm with it.
"""

from __future__ import annotations

import os
import struct

from vmm._native import ffi, lib
from vmm.device import Device
from vmm.devices.virtio.device import IoThread, VirtioDevice
from vmm.devices.virtio.image import Image
from vmm.errors import HostError
from vmm.memory import RamRange
from vmm.options import Field

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Self

    from vmm.board import Board
    from vmm.memory import GuestMemory
    from vmm.options import Options

QUEUE_SIZE = 128
#: What Linux maps memory of this kind by.
ALIGN = 2 << 20

#: start, size: virtio-v1.3 §5.19.4.
_CONFIG = struct.Struct("<QQ")


class Pmem(VirtioDevice):
    """Persistent memory. Opens, locks and maps its file now; ``base`` is where the guest has it,
    once it is on a board."""

    HELP = (
        "Persistent memory (virtio-pmem) on a file of whole 2 MiB: the guest's /dev/pmem0, which "
        "it can mount with -o dax and needs no page cache for."
    )
    OPTIONS = (
        Field("path", "the file", metavar="FILE", first=True, path=True, required=True),
        Field(
            "ro", "the guest may not write: what it writes is lost, and told", None, default=False
        ),
    )
    DEVICE_ID = 27
    QUEUE_SIZES = (QUEUE_SIZE,)
    KERNEL_CONFIG = "CONFIG_VIRTIO_PMEM"

    def __init__(self, path: str, *, readonly: bool = False, name: str = "pmem0") -> None:
        """Raises HostError."""
        self.path = path
        self.readonly = readonly
        self.base = -1
        self._native = ffi.NULL
        self._hva = ffi.NULL
        self._shadow: _Dropped | None = None
        self._image = Image(path, readonly, False)
        try:
            self.size = self._image.size()
            if self.size % ALIGN:
                raise HostError(
                    f"pmem {path} is {self.size} bytes long, not a multiple of 2 MiB; "
                    f"make it longer with truncate -s %2M"
                )
            self._hva = lib.vmm_file_map(self._image.buffered_fd, self.size, int(not readonly))
            if self._hva == ffi.NULL:
                err = ffi.errno
                raise HostError(f"pmem {path} could not be mapped: {os.strerror(err)}", errno=err)
            super().__init__(name)
        except BaseException:
            self._unmap()
            raise
        self.config[:] = _CONFIG.pack(0, self.size)

    @classmethod
    def from_options(cls, options: Options, board: Board) -> Self:
        return cls(options.path, readonly=options.ro)

    def plug(self, board: Board) -> None:
        """Raises ConfigError when there is no room, HostError when KVM does not take it."""
        super().plug(board)  # which closes it from here on
        self.base = board.memory_window(self.size)
        self.config[:] = _CONFIG.pack(self.base, self.size)
        if self.readonly:
            self._shadow = _Dropped(self)
            board.mmio.insert(self.base, self.size, self._shadow)
        if board.vm is not None:
            if self.readonly:
                board.vm.kvm.require("KVM_CAP_READONLY_MEM")
            hva = int(ffi.cast("uintptr_t", self._hva))
            region = RamRange(self.base, self.size, hva, self._image.buffered_fd, 0)
            board.vm.add_memory([region], readonly=self.readonly)

    def attach(self, memory: GuestMemory, loop: Any) -> None:
        super().attach(memory, loop)
        # Of its own wherever the others' are: a sync may take long.
        self._threads = [IoThread(self.name)]
        own = self._threads[0].native
        self.placement.pin(own)
        self._native = lib.vmm_pmem_create(own, self._image.buffered_fd, self.QUEUE_SIZES[0])
        if self._native == ffi.NULL:
            raise MemoryError(self.name)

    def start_queue(self, index: int, config: Any) -> int:
        return int(lib.vmm_pmem_start(self._native, config))

    def stop_queues(self) -> None:
        lib.vmm_pmem_stop(self._native)

    def spoil(self) -> None:
        """Something the guest wrote is lost: its flushes fail from now on."""
        if self._native != ffi.NULL:
            lib.vmm_pmem_spoil(self._native)

    def stats(self) -> dict[str, int]:
        """Flushes answered, syncs of the file they took, and flushes that failed."""
        out = ffi.new("struct vmm_pmem_stats *")
        if self._native != ffi.NULL:
            lib.vmm_pmem_stats(self._native, out)
        return {name: int(getattr(out, name)) for name, _ in ffi.typeof(out).item.fields}

    def view(self) -> memoryview:
        """The memory, as the guest sees it; only to be written to when it is not read-only."""
        view = memoryview(ffi.buffer(self._hva, self.size))
        return view.toreadonly() if self.readonly else view

    def faults(self) -> list[str]:
        said = super().faults()
        if self._shadow is not None and self._shadow.writes:
            said.append(
                f"{self.name}: the guest wrote {self._shadow.writes} times to {self.path}, which "
                "is read-only; that is lost"
            )
        return said

    def close(self) -> None:
        super().close()
        lib.vmm_pmem_destroy(self._native)
        self._native = ffi.NULL
        self.close_threads()
        self._unmap()

    def _unmap(self) -> None:
        lib.vmm_ram_unmap(self._hva, self.size if self._hva != ffi.NULL else 0)
        self._hva = ffi.NULL
        self._image.close()


class _Dropped(Device):
    """Where KVM sends what a guest writes to read-only memory. It is dropped, and the flushes that
    would promise otherwise fail."""

    def __init__(self, pmem: Pmem) -> None:
        self.name = f"{pmem.name}-read-only"
        self.writes = 0
        self._pmem = pmem

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(self._pmem.view()[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        self.writes += 1
        self._pmem.spoil()


DEVICE = Pmem
