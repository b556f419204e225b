"""virtio-blk: a raw file or block device as the guest's disk. virtio-v1.3 §5.2.

Requests are served by native/blk*.c on an I/O thread of the disk's own, so that a slow disk delays
nothing else, or where --io-threads says. This side says what the disk is, and changes it live.
"""

from __future__ import annotations

import errno
import os
import struct
import threading

from vmm._native import ffi, lib
from vmm.devices.virtio.device import VirtioDevice
from vmm.devices.virtio.image import SECTOR, Image
from vmm.disk import DiskSpec
from vmm.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from vmm.devices.virtio.transport import QueueConfig, QueueIrqs
    from vmm.memory import GuestMemory

QUEUE_SIZE = 256
#: What a disk has when its user left the choice: more has not been measured to be of use.
QUEUES_MAX = 4
SERIAL_BYTES = 20
#: Bytes: what file systems give out, and what guests should align to.
CLUSTER = 4096

# Feature bit numbers, virtio-v1.3 §5.2.3.
F_SIZE_MAX = 1
F_SEG_MAX = 2
F_RO = 5
F_BLK_SIZE = 6
F_FLUSH = 9
F_TOPOLOGY = 10
F_CONFIG_WCE = 11
F_MQ = 12
F_DISCARD = 13
F_WRITE_ZEROES = 14

#: capacity, size_max, seg_max, geometry, blk_size, topology (exponent, alignment, min, opt),
#: writeback, num_queues, three of discard, three of write zeroes: virtio-v1.3 §5.2.4.
_CONFIG = struct.Struct("<QIIHBBIBBHIBxHIIIIIB3x")
WRITEBACK = 32
#: No buffer of a driver's is refused for its size; this is what one system call moves.
SIZE_MAX = 0x7FFF_F000

POLICIES = {
    "report": lib.VMM_BLK_REPORT,
    "ignore": lib.VMM_BLK_IGNORE,
    "pause": lib.VMM_BLK_PAUSE,
    "enospc": lib.VMM_BLK_ENOSPC,
}


class Blk(VirtioDevice):
    """One disk. Opens its file now, so that no path is looked up once a guest runs.

    The file stays locked against other users (shared when read-only) until ``close``. A size
    that is not a multiple of the block size is rounded up: the rest of the last block reads as
    zeros. Raises ConfigError, HostError.
    """

    DEVICE_ID = 2
    KERNEL_CONFIG = "CONFIG_VIRTIO_BLK"

    def __init__(
        self,
        disk: DiskSpec | str,
        *,
        name: str = "disk0",
        cpus: int = 1,
        uring: bool = True,
        **options: Any,
    ) -> None:
        """``disk`` as --disk has it, or a path with DiskSpec's keywords; ``cpus`` are the guest's.
        ``uring=False`` does without io_uring, as a host that forbids it."""
        spec = disk if isinstance(disk, DiskSpec) else DiskSpec(disk, **options)
        self.spec = spec
        self.path = spec.path
        self.serial = spec.serial or name[:SERIAL_BYTES]
        self.QUEUE_SIZES = (QUEUE_SIZE,) * (spec.queues or min(cpus, QUEUES_MAX))
        #: Called with the disk and an errno on a thread of its own when requests are held because
        #: of werror=pause or rerror=pause, once until ``retry`` tries them again. A machine pauses,
        #: and its ``resume`` retries.
        self.on_io_error: Callable[[Blk, int], None] | None = None
        self._uring = uring
        self._limits = (spec.bps, spec.bps_burst, spec.iops, spec.iops_burst)
        self._native = ffi.NULL
        self._irqs: QueueIrqs | None = None
        self._lock = threading.Lock()  # _irqs and what the guest is told about the disk
        self._unsaid = False  # the driver may have read a size that is no longer true
        self._watcher: threading.Thread | None = None
        self._held_fd = -1
        self._told = False
        self._image = Image(spec.path, spec.read_only, spec.direct)
        super().__init__(name)
        self.block = spec.block_size or self._image.block
        self.size = self._image.size()
        self._describe()

    def _describe(self) -> None:
        block = self.block
        unit = max(block, CLUSTER) // SECTOR
        blocks = -(-self.size // block)
        most = int(lib.VMM_BLK_MAX_DISCARD)
        segments = int(lib.VMM_BLK_MAX_SEGMENTS)
        self.config[:] = _CONFIG.pack(
            *(blocks * (block // SECTOR), SIZE_MAX, QUEUE_SIZE - 2, 0, 0, 0, block),
            *((max(block, CLUSTER) // block).bit_length() - 1, 0, max(1, CLUSTER // block), 0),
            *(self.spec.write_back, len(self.QUEUE_SIZES)),
            *(most, segments, unit, most, segments, 1),
        )

    def device_features(self) -> int:
        bits = [F_SIZE_MAX, F_SEG_MAX, F_BLK_SIZE, F_FLUSH, F_TOPOLOGY, F_CONFIG_WCE]
        if len(self.QUEUE_SIZES) > 1:
            bits.append(F_MQ)
        if self.spec.read_only:
            bits.append(F_RO)
        elif self.spec.discard:
            bits += [F_DISCARD, F_WRITE_ZEROES]
        return sum(1 << bit for bit in bits)

    # ---- the contract of a virtio device -------------------------------------------------------

    def attach(self, memory: GuestMemory, loop: Any) -> None:
        super().attach(memory, loop)
        spec = self.spec
        queues = len(self.QUEUE_SIZES)
        loops = self.io_loops(loop, queues)
        config = ffi.new("struct vmm_blk_config *")
        config.fd = self._image.fd
        config.buffered_fd = self._image.buffered_fd
        config.held_fd = self._watch_errors()
        config.align = self._image.align
        config.block = self.block
        config.read_only = spec.read_only
        config.no_uring = not self._uring
        config.device = self._image.device
        config.discard = spec.discard
        config.write_back = spec.write_back
        config.read_error = POLICIES[spec.rerror]
        config.write_error = POLICIES[spec.werror]
        config.queues = queues
        config.queue_size = QUEUE_SIZE
        config.size = self.size
        config.serial = self.serial.encode().ljust(SERIAL_BYTES, b"\0")
        each = ffi.new("struct vmm_loop *[]", [loops[i % len(loops)] for i in range(queues)])
        self._native = lib.vmm_blk_create(each, config)
        if self._native == ffi.NULL:
            raise HostError(f"{self.name} ({self.path}): {os.strerror(ffi.errno)}")
        if any(self._limits):
            lib.vmm_blk_limit(self._native, *self._limits)

    def activate(self, features: int, queues: list[QueueConfig | None], irqs: QueueIrqs) -> None:
        super().activate(features, queues, irqs)
        with self._lock:
            self._irqs = irqs
            if self._unsaid:
                irqs.config_changed()
            self._unsaid = False

    def deactivate(self) -> None:
        with self._lock:
            self._irqs = None
            self._describe()  # the cache is again as the user said
        super().deactivate()

    def start_queue(self, index: int, config: Any) -> int:
        return int(lib.vmm_blk_start(self._native, config))

    def stop_queues(self) -> None:
        lib.vmm_blk_stop(self._native)

    def stop_queue(self, index: int) -> None:
        lib.vmm_blk_stop_queue(self._native, index)

    def write_config(self, offset: int, size: int, value: int) -> None:
        """The cache's mode is the driver's to change: virtio-v1.3 §5.2.5.2."""
        if offset != WRITEBACK or size != 1 or self._native == ffi.NULL:
            return
        with self._lock:
            self.config[WRITEBACK] = value & 1
        lib.vmm_blk_write_back(self._native, value & 1)

    def close(self) -> None:
        super().close()
        if self._watcher is not None:
            watcher, self._watcher = self._watcher, None
            os.eventfd_write(self._held_fd, 1)
            watcher.join()
        if self._held_fd >= 0:
            os.close(self._held_fd)
            self._held_fd = -1
        lib.vmm_blk_destroy(self._native)
        self._native = ffi.NULL
        self.close_threads()
        self._image.close()

    # ---- what the host sees and changes ----------------------------------------------------------

    @property
    def engine(self) -> str:
        """'uring', or 'threads' where the host has no io_uring."""
        uring = self._native != ffi.NULL and lib.vmm_blk_async(self._native)
        return "uring" if uring else "threads"

    def stats(self) -> dict[str, int]:
        """Requests and bytes so far; ``held``: requests that wait for ``retry``, ``pending``: for
        the host."""
        out = ffi.new("struct vmm_blk_stats *")
        if self._native != ffi.NULL:
            lib.vmm_blk_stats(self._native, out)
        return {name: int(getattr(out, name)) for name, _ in ffi.typeof(out).item.fields}

    def pending(self) -> int:
        return self.stats()["pending"]

    def resize(self, size: int | None = None) -> int:
        """Tell the guest how large the disk is: ``size`` bytes, which a file is made to have, or
        what the host's file or device has by now. Any thread. Returns bytes; raises HostError."""
        if size is not None:
            if self.spec.read_only:
                raise HostError(f"{self.name} ({self.path}) is read-only", errno=errno.EROFS)
            if size <= 0:
                raise HostError(f"{self.name} ({self.path}) cannot have {size} bytes")
            if size > self.size:
                self._image.resize(size)
        got = self._image.size() if size is None else size
        with self._lock:
            self.size = got
            self.config[:8] = struct.pack("<Q", -(-got // self.block) * (self.block // SECTOR))
            if self._native != ffi.NULL:
                lib.vmm_blk_resize(self._native, got)
            self._unsaid = self._irqs is None
            if self._irqs is not None:
                self._irqs.config_changed()
        if size is not None and size < self._image.size():
            self._image.resize(size)  # after requests past the end are refused
        return got

    def set_limits(
        self, bps: int = 0, iops: int = 0, *, bps_burst: int = 0, iops_burst: int = 0
    ) -> None:
        """From now on at most so many bytes and requests a second on average, of all queues
        together; 0: no limit. The bursts may pass at once (0: one second's). Any thread but an I/O
        thread."""
        if not all(0 <= n < 1 << 62 for n in (bps, iops, bps_burst, iops_burst)):
            raise ValueError("a disk's limits are 0 to 2**62 a second")
        self._limits = (bps, bps_burst, iops, iops_burst)
        if self._native != ffi.NULL:
            lib.vmm_blk_limit(self._native, *self._limits)

    # ---- werror=pause, rerror=pause --------------------------------------------------------------

    def retry(self) -> None:
        """Try again what is held because the host failed. Any thread but an I/O thread."""
        self._told = False
        if self._native != ffi.NULL:
            lib.vmm_blk_retry(self._native)

    def resumed(self) -> None:
        self.retry()

    def _watch_errors(self) -> int:
        """The eventfd that C signals when a request is held; -1 where that cannot be."""
        if not {self.spec.werror, self.spec.rerror} & {"pause", "enospc"}:
            return -1
        self._held_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._watcher = threading.Thread(target=self._watch, name=f"{self.name}-errors")
        self._watcher.daemon = True
        self._watcher.start()
        return self._held_fd

    def _watch(self) -> None:
        while True:
            os.eventfd_read(self._held_fd)
            if self._watcher is None:
                return
            # Once until the next retry, however many requests are held by then.
            if self.on_io_error is not None and not self._told and self.stats()["held"]:
                self._told = True
                self.on_io_error(self, int(lib.vmm_blk_error(self._native)))
