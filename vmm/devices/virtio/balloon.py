"""virtio-balloon: memory the guest can do without goes back to the host. virtio-v1.3 §5.5; the
work is in native/balloon.c.

Two ways: the balloon takes pages until the guest has given as many as the target says, or gives
them back; and the guest reports what happens to be free (page reporting), which goes back to the
host and comes again, as zeros, when the guest touches it. Page numbers that are not RAM are
counted and ignored.

Hints (what is free now) only inform, for those who copy the guest's memory: their pages are not
given back, as Linux may reuse a hinted page before the device has seen the hint.
"""

from __future__ import annotations

import struct
import threading

from vmm._native import ffi, lib
from vmm.devices.virtio.device import VirtioDevice
from vmm.devices.virtio.lent import Lent
from vmm.errors import ConfigError, VmmError
from vmm.options import Field
from vmm.values import format_size, parse_duration, parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Self

    from vmm.board import Board
    from vmm.devices.virtio.transport import QueueConfig, QueueIrqs
    from vmm.memory import GuestMemory
    from vmm.options import Options

#: The unit of page numbers and of the configuration space, whatever the host's pages are.
PAGE = 4096

# Feature bit numbers, virtio-v1.3 §5.5.3.
F_MUST_TELL_HOST = 0
F_STATS_VQ = 1
F_DEFLATE_ON_OOM = 2
F_FREE_PAGE_HINT = 3
F_PAGE_POISON = 4
F_PAGE_REPORTING = 5

#: num_pages, actual, free_page_hint_cmd_id, poison_val: virtio-v1.3 §5.5.4.
_CONFIG = struct.Struct("<IIII")
_NUM_PAGES, _ACTUAL, _HINT_ID, _POISON = 0, 4, 8, 12
#: The fields that are the driver's to write.
_WRITABLE = frozenset((*range(_ACTUAL, _HINT_ID), *range(_POISON, _CONFIG.size)))

#: free_page_hint_cmd_id: virtio-v1.3 §5.5.6.5. Requests count up from _HINT_FIRST, as QEMU's do.
_HINT_STOP, _HINT_DONE, _HINT_FIRST = 0, 1, 0x8000_0000

#: Statistics by tag; memory in bytes, the rest are counts. virtio-v1.3 §5.5.6.4, and the tags
#: that Linux added since.
STATS = (
    "swap_in", "swap_out", "major_faults", "minor_faults", "free_memory", "total_memory",
    "available_memory", "disk_caches", "hugetlb_allocations", "hugetlb_failures", "oom_kills",
    "allocation_stalls", "async_scans", "direct_scans", "async_reclaims", "direct_reclaims",
)  # fmt: skip


class Balloon(VirtioDevice):
    """The guest's balloon. Any thread may use what is not part of the device contract."""

    HELP = "A balloon: takes memory from the guest and gives it back to the host."
    OPTIONS = (
        Field(
            "target",
            "how much to take at once; more or less at run time",
            parse_size,
            metavar="SIZE",
            default=0,
            first=True,
        ),
        Field("stats", "ask for statistics this often", parse_duration, metavar="SECONDS"),
        Field("reporting", "take what is free, as it becomes so", None, default=True),
        Field("deflate_on_oom", "give back rather than let the guest kill", None, default=True),
    )
    DEVICE_ID = 5
    QUEUE_SIZES = (128,) * lib.VMM_BALLOON_NR_QUEUES
    IN_ORDER = True
    KERNEL_CONFIG = "CONFIG_VIRTIO_BALLOON"

    def __init__(
        self,
        target: int = 0,
        *,
        stats: float | None = None,
        reporting: bool = True,
        deflate_on_oom: bool = True,
        name: str = "balloon0",
    ) -> None:
        """``target`` in bytes, ``stats`` the seconds between statistics (None: when asked)."""
        super().__init__(name)
        self._lent = Lent(self)
        self._period = stats
        self._reporting = reporting
        self._deflate_on_oom = deflate_on_oom
        self._lock = threading.Lock()
        self._untold = False
        self._roles: list[int] = []
        self._next_hint = _HINT_FIRST
        self.config[:] = _CONFIG.pack(_pages(target), 0, 0, 0)

    @classmethod
    def from_options(cls, options: Options, board: Board) -> Self:
        _check(options.target, board.memory)
        return cls(
            options.target,
            stats=options.stats,
            reporting=options.reporting,
            deflate_on_oom=options.deflate_on_oom,
        )

    # ---- the device contract --------------------------------------------------------------------

    def device_features(self) -> int:
        # A driver numbers its queues without gaps, whatever the specification says (Linux does):
        # all queues but the last are always offered, so that both numberings agree.
        bits = 1 << F_STATS_VQ | 1 << F_FREE_PAGE_HINT | 1 << F_PAGE_POISON
        bits |= 1 << F_PAGE_REPORTING if self._reporting else 0
        bits |= 1 << F_DEFLATE_ON_OOM if self._deflate_on_oom else 0
        if self._memory is not None and self._memory.page > PAGE:
            # Host pages go only when all their parts are in the balloon, so that we must know
            # when a part leaves it.
            bits |= 1 << F_MUST_TELL_HOST
        return bits

    def attach(self, memory: GuestMemory, loop: Any) -> None:
        super().attach(memory, loop)
        # Its own if there may be one: the kernel may take long to take much memory.
        (loop,) = self.io_loops(loop)
        self._lent.native = lib.vmm_balloon_create(loop, memory.table, self.QUEUE_SIZES[0])
        if self._lent.native == ffi.NULL:
            raise MemoryError(self.name)
        if self._period:
            self.poll_stats(self._period)

    def activate(self, features: int, queues: list[QueueConfig | None], irqs: QueueIrqs) -> None:
        enabled = [index for index, queue in enumerate(queues) if queue is not None]
        self._roles = queue_roles(features, enabled)
        self._keep_poisoned(features)
        super().activate(features, queues, irqs)
        with self._lock:
            if self._untold:
                self._untold = False
                irqs.config_changed()

    def start_queue(self, index: int, config: Any) -> int:
        tells = self.features >> F_MUST_TELL_HOST & 1
        return int(lib.vmm_balloon_start(self._lent.native, config, self._roles[index], tells))

    def stop_queue(self, index: int) -> None:
        lib.vmm_balloon_stop_queue(self._lent.native, self._roles[index])

    def stop_queues(self) -> None:
        with self._lock:
            self._irqs = None
        lib.vmm_balloon_stop(self._lent.native)
        # The pages are the driver's again, whoever that will be.
        struct.pack_into("<I", self.config, _ACTUAL, 0)

    def write_config(self, offset: int, size: int, value: int) -> None:
        for at, byte in enumerate(value.to_bytes(size, "little"), offset):
            if at in _WRITABLE:
                self.config[at] = byte
        self._keep_poisoned(self.features)

    def _keep_poisoned(self, features: int) -> None:
        """Free pages of such a guest hold a pattern that it checks. virtio-v1.3 §5.5.6.6."""
        poison = struct.unpack_from("<I", self.config, _POISON)[0]
        keep = features >> F_PAGE_POISON & 1 and poison != 0
        lib.vmm_balloon_keep_reported(self._lent.native, int(keep))

    def close(self) -> None:
        super().close()
        native = self._lent.take_back()
        if native != ffi.NULL:
            lib.vmm_balloon_cancel(native)
            self._lent.wait()
            lib.vmm_balloon_destroy(native)
        self.close_threads()

    # ---- for whoever runs the machine -----------------------------------------------------------

    @property
    def target(self) -> int:
        """Bytes the guest shall do without."""
        return PAGE * int(struct.unpack_from("<I", self.config, _NUM_PAGES)[0])

    @property
    def actual(self) -> int:
        """Bytes in the balloon, as the guest says."""
        said = PAGE * int(struct.unpack_from("<I", self.config, _ACTUAL)[0])
        return min(said, self._memory.size) if self._memory is not None else said

    def set_target(self, target: int) -> None:
        """Ask the guest to do without ``target`` bytes, rounded down to 4 KiB; it follows when
        and as far as it can (see ``actual``). Raises ConfigError for more than its RAM."""
        if self._memory is not None:
            _check(target, self._memory)
        self._set(_NUM_PAGES, _pages(target))

    def poll_stats(self, seconds: float | None) -> None:
        """Ask for statistics this often from now on; None: only when asked."""
        ms = 0 if not seconds else max(1, min(int(seconds * 1000), (1 << 32) - 1))
        with self._lent as native:
            lib.vmm_balloon_every(native, ms)

    def stats(self, timeout: float = 5.0) -> dict[str, int]:
        """What the guest says of its memory now, by the names in STATS. Raises VmmError when no
        driver answers in ``timeout`` seconds."""
        with self._lent as native:
            before = lib.vmm_balloon_answers(native)
            lib.vmm_balloon_ask(native)
            if lib.vmm_balloon_wait(native, before, _ms(timeout)):
                raise VmmError(
                    f"{self.name}: the guest's driver sent no statistics within {timeout:g} s; "
                    f"is it loaded ({self.KERNEL_CONFIG})?"
                )
        return self.last_stats()

    def last_stats(self) -> dict[str, int]:
        """The newest statistics there are; empty before the first."""
        entries = ffi.new("struct vmm_balloon_stat[]", lib.VMM_BALLOON_MAX_STATS)
        with self._lent as native:
            count = lib.vmm_balloon_stats(native, entries)
        return {STATS[e.tag]: e.value for e in entries[0:count] if e.tag < len(STATS)}

    def counts(self) -> dict[str, int]:
        """Since the machine was made: bytes given back because they were ``inflated`` or
        ``reported``, bytes the host could not take (``failed``), and how many page numbers were
        ``ignored`` because they are not RAM."""
        c = ffi.new("struct vmm_balloon_counts *")
        with self._lent as native:
            lib.vmm_balloon_counts(native, c)
        return {name: getattr(c, name) for name in ("inflated", "reported", "failed", "ignored")}

    def start_hints(self) -> None:
        """Ask the guest what is free. It holds those pages back until ``end_hints``."""
        with self._lock:
            wanted = self._next_hint
            self._next_hint = max(_HINT_FIRST, wanted + 1 & 0xFFFF_FFFF)
        with self._lent as native:
            if lib.vmm_balloon_collect(native, wanted):
                raise MemoryError(self.name)
        self._set(_HINT_ID, wanted)

    def hints(self, timeout: float = 5.0) -> list[tuple[int, int]]:
        """(gpa, size) of what was free, once the guest has said all. A page that was written
        since has contents again. Raises VmmError when it does not in ``timeout`` seconds."""
        found, at = [], 0
        start, size = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        with self._lent as native:
            if lib.vmm_balloon_collected(native, _ms(timeout)):
                raise VmmError(f"{self.name}: the guest's driver did not say which pages are free.")
            while lib.vmm_balloon_hinted(native, at, start, size):
                found.append((start[0], size[0]))
                at = start[0] + size[0]
        return found

    def end_hints(self) -> None:
        """The guest may have its free pages back."""
        with self._lent as native:
            lib.vmm_balloon_collect(native, _HINT_STOP)
        self._set(_HINT_ID, _HINT_DONE)

    def _set(self, offset: int, value: int) -> None:
        with self._lock:
            struct.pack_into("<I", self.config, offset, value)
            if self._irqs is None:
                self._untold = True
            else:
                self._irqs.config_changed()


def queue_roles(features: int, enabled: list[int]) -> list[int]:
    """What each queue is for: as numbered in virtio-v1.3 §5.5.2, or, if the driver enabled one
    whose feature it did not accept, counted without gaps."""
    numbered = list(range(lib.VMM_BALLOON_NR_QUEUES))
    needs = {
        lib.VMM_BALLOON_STATS: F_STATS_VQ,
        lib.VMM_BALLOON_HINT: F_FREE_PAGE_HINT,
        lib.VMM_BALLOON_REPORT: F_PAGE_REPORTING,
    }
    there = [role for role in numbered if role not in needs or features >> needs[role] & 1]
    if all(index in there for index in enabled):
        return numbered
    return there + [len(numbered)] * (len(numbered) - len(there))


def _pages(size: int) -> int:
    if not 0 <= size < PAGE << 32:
        raise ConfigError(f"a balloon of {size} bytes: it takes 0 to 16 TiB.")
    return size // PAGE


def _check(target: int, memory: GuestMemory) -> None:
    if target > memory.size:
        raise ConfigError(
            f"a balloon of {format_size(target)} is larger than the guest's memory of "
            f"{format_size(memory.size)}; ask for less."
        )


def _ms(seconds: float) -> int:
    return max(0, min(int(seconds * 1000), 0x7FFF_FFFF))


DEVICE = Balloon
