"""virtio-mem: memory that is plugged and unplugged, in blocks, while the guest runs. virtio-v1.3
§5.15; the work is in native/virtio_mem.c.

The device has a region of addresses above RAM, as large as the memory may ever become. It costs
nothing but addresses until blocks of it are plugged and touched, and what is unplugged goes back to
the host at once.

The whole region is memory to KVM and to other devices, plugged or not: no I/O thread can meet a
hole, and no check races with an unplug. A guest that touches unplugged blocks finds zeros, and at
worst makes the host provide the region's size, which its user allowed; what it leaves there is
dropped when the block is plugged. Drivers are told to keep off (F_UNPLUGGED_INACCESSIBLE).

No ACPI table speaks of the region: Linux goes by the device. (In an SRAT it would only prepare
bounce buffers for devices that cannot reach it; all of ours can.)
"""

from __future__ import annotations

import os

from vmm._native import ffi, lib
from vmm.devices.virtio.device import VirtioDevice
from vmm.devices.virtio.lent import Lent
from vmm.errors import ConfigError, HostError
from vmm.options import Field
from vmm.values import format_size, parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Self

    from vmm.board import Board
    from vmm.memory import GuestMemory, RamRange
    from vmm.options import Options

#: Large enough for a transparent huge page; Linux's driver takes no less.
BLOCK = 2 << 20
BLOCK_MIN = 1 << 20
QUEUE_SIZE = 128

#: Feature bit number, virtio-v1.3 §5.15.3.
F_UNPLUGGED_INACCESSIBLE = 1


class VirtioMem(VirtioDevice):
    """Memory of which the guest has as much as ``set_requested`` says. Sizes in bytes."""

    HELP = "Memory that is plugged and unplugged while the guest runs."
    OPTIONS = (
        Field("size", "the most there can be", parse_size, first=True, required=True),
        Field("requested", "how much of it the guest gets at once", parse_size, default=0),
        Field("block", "the unit it is plugged in", parse_size, metavar="SIZE"),
    )
    #: Linux takes new memory into use by itself, as much of it as possible for what can be moved
    #: away again when it is to be unplugged.
    COMMAND_LINE = "memhp_default_state=online memory_hotplug.online_policy=auto-movable"
    DEVICE_ID = 24
    QUEUE_SIZES = (QUEUE_SIZE,)
    IN_ORDER = True
    KERNEL_CONFIG = "CONFIG_VIRTIO_MEM"

    def __init__(
        self, size: int, *, requested: int = 0, block: int = BLOCK, name: str = "virtio-mem0"
    ) -> None:
        """Raises ConfigError."""
        self._lent = Lent(self)
        super().__init__(name)
        if block < BLOCK_MIN or block & (block - 1):
            raise ConfigError(
                f"virtio-mem: a block of {format_size(block)}; it must be a power of two from "
                f"{format_size(BLOCK_MIN)} on."
            )
        if not 0 < size < 1 << 52 or size % block:
            raise ConfigError(
                f"virtio-mem: a size of {format_size(size)} is not one or more blocks of "
                f"{format_size(block)}."
            )
        self.size = size
        self.block = block
        self._request_at_start = requested
        self._check(requested)
        self._populate = False
        #: Where it is; ``plug`` sets it, or whoever attaches the device.
        self.region: RamRange | None = None

    @classmethod
    def from_options(cls, options: Options, board: Board) -> Self:
        block = options.block or max(BLOCK, board.memory.page)
        return cls(options.size, requested=options.requested, block=block)

    def plug(self, board: Board) -> None:
        self.region = board.add_memory(self.size)
        self._populate = board.config.prefault
        super().plug(board)

    # ---- the device contract --------------------------------------------------------------------

    def device_features(self) -> int:
        return 1 << F_UNPLUGGED_INACCESSIBLE

    @property
    def config(self) -> bytearray:
        """C keeps it, so that the driver finds what its last request changed."""
        data = bytearray(lib.VMM_VIRTIO_MEM_CONFIG)
        if self._lent.native != ffi.NULL:
            with self._lent as native:
                lib.vmm_virtio_mem_config(native, ffi.from_buffer(data))
        return data

    @config.setter
    def config(self, value: bytearray) -> None:
        """Only as the base class begins."""

    def attach(self, memory: GuestMemory, loop: Any) -> None:
        super().attach(memory, loop)
        if self.region is None:
            raise HostError(f"{self.name} was given no memory to manage")
        if self.block < memory.page:
            raise ConfigError(
                f"virtio-mem: a block of {format_size(self.block)} is smaller than the host's "
                f"pages of {format_size(memory.page)}; make it as large."
            )
        config = ffi.new("struct vmm_virtio_mem_config *")
        config.mem = memory.table
        config.addr, config.size, config.block = self.region.gpa, self.size, self.block
        config.requested = self._request_at_start
        # A huge page that is not there when it is touched would end the guest.
        config.populate = self._populate or memory.backing == "hugetlb"
        config.queue_size = QUEUE_SIZE
        # Its own if there may be one: the kernel may take long over much memory.
        (loop,) = self.io_loops(loop)
        self._lent.native = lib.vmm_virtio_mem_create(loop, config)
        if self._lent.native == ffi.NULL:
            raise HostError(f"{self.name}: {os.strerror(ffi.errno)}", errno=ffi.errno)

    def start_queue(self, index: int, config: Any) -> int:
        return int(lib.vmm_virtio_mem_start(self._lent.native, config))

    def stop_queues(self) -> None:
        lib.vmm_virtio_mem_stop(self._lent.native)

    def reset(self) -> None:
        super().reset()
        if self._lent.native != ffi.NULL:
            lib.vmm_virtio_mem_reset(self._lent.native)

    def close(self) -> None:
        super().close()
        native = self._lent.take_back()
        self._lent.wait()
        lib.vmm_virtio_mem_destroy(native)
        self.close_threads()

    # ---- for whoever runs the machine; any thread ------------------------------------------------

    @property
    def requested(self) -> int:
        """How much the guest shall have."""
        return int.from_bytes(self.config[48:56], "little")

    @property
    def plugged(self) -> int:
        """How much it has."""
        return int.from_bytes(self.config[40:48], "little")

    def set_requested(self, size: int) -> None:
        """Ask the guest to have ``size`` bytes plugged; it follows when and as far as it can (see
        ``plugged``). Raises ConfigError when that is not whole blocks, or more than there are."""
        self._check(size)
        with self._lent as native:
            lib.vmm_virtio_mem_request(native, size)

    def _check(self, requested: int) -> None:
        if not 0 <= requested <= self.size or requested % self.block:
            raise ConfigError(
                f"virtio-mem: {format_size(requested)} cannot be requested: whole blocks of "
                f"{format_size(self.block)}, up to {format_size(self.size)}."
            )


DEVICE = VirtioMem
