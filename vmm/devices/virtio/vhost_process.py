"""The base of the vhost-user devices: the back end is a process that listens at a Unix socket.

It has all of guest RAM mapped, walks the rings and does the work; this side negotiates, keeps the
configuration space, and looks after its death. A thread waits for that, without a look at the clock
unless a new back end is waited for. docs/vhost.md.
"""

from __future__ import annotations

import os
import select
import threading
import time

from vmm.devices.virtio.device import (
    F_EVENT_IDX,
    F_IN_ORDER,
    F_INDIRECT_DESC,
    F_RING_PACKED,
    F_RING_RESET,
)
from vmm.devices.virtio.vhost import VhostDevice, in_order
from vmm.devices.virtio.vhost_front import P_CONFIG, P_INFLIGHT, FrontEnd, Inflight, Ring
from vmm.devices.virtio.vhost_wire import VhostError
from vmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from vmm.devices.virtio.transport import QueueConfig, QueueIrqs
    from vmm.memory import GuestMemory

#: Seconds the back end has for what it is told, queues and all.
TIMEOUT = 5.0
_VERSION_1 = 32
#: Feature bits that belong to device types: virtio-v1.3 §2.2.
DEVICE_BITS = (1 << 24) - 1 | ((1 << 64) - 1) & ~((1 << 50) - 1)
#: Of the others, what a back end may be given to decide.
_RING_BITS = sum(1 << bit for bit in (F_INDIRECT_DESC, F_EVENT_IDX, F_IN_ORDER, F_RING_RESET))
_EVENTS = select.POLLRDHUP | select.POLLHUP | select.POLLERR


class VhostUserDevice(VhostDevice):
    """A device whose back end listens at ``path``. Connects now, and asks what it is.

    ``reconnect``: seconds between looks for a new back end once it died, 0 for none: then the
    driver is told that the device needs a reset. Raises ConfigError, VhostError (a HostError).
    """

    SHARES_MEMORY = True
    #: Bytes of the configuration space that are the back end's.
    CONFIG_SIZE = 0
    #: Feature bits the back end may offer to the driver, and those that this side provides.
    BACK_END_BITS = DEVICE_BITS
    OWN_BITS = 0

    def __init__(
        self, path: str, *, reconnect: float = 0.0, timeout: float = TIMEOUT, name: str
    ) -> None:
        self.path = path
        self.reconnect = reconnect
        self.timeout = timeout
        #: Told a sentence for the user when the back end dies or is back; any thread.
        self.on_news: Callable[[str], None] | None = None
        #: Connections so far.
        self.connections = 1
        self._lock = threading.RLock()  # all that follows; held while the back end is spoken to
        self._running = False
        self._stale = False
        #: A back end has had the queues since the driver enabled them.
        self._handed = False
        self._closing = False
        self._failed = ""
        self._next_try = 0.0
        self._inflight: Inflight | None = None
        self._watcher: threading.Thread | None = None
        self._front: FrontEnd | None = self._connect()
        self._offered = self._front.features
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            if not self._offered >> _VERSION_1 & 1:
                raise self._front.wire.fail("it knows legacy drivers only (no VERSION_1)")
            self.QUEUE_SIZES = self.layout(self._front)
            super().__init__(name)
            self.config[:] = self.describe(self._front)
        except BaseException:
            self._front.close()
            for fd in (self._wake, *getattr(self, "_kicks", ())):
                os.close(fd)
            raise

    def _connect(self) -> FrontEnd:
        return FrontEnd(self.path, f"vhost-user back end {self.path}", self.timeout)

    # ---- what a device fills in ----------------------------------------------------------------

    def layout(self, front: FrontEnd) -> tuple[int, ...]:
        """The maximum size of each queue. Raises ConfigError."""
        raise NotImplementedError

    def describe(self, front: FrontEnd) -> bytes:
        """The configuration space as the driver shall read it."""
        return front.read_config(self.CONFIG_SIZE) if self.CONFIG_SIZE else b""

    def orphaned(self) -> bytes:
        """The configuration space while there is no back end."""
        return bytes(self.config)

    def in_use(self, index: int) -> bool:
        """Whether the driver wants a queue to be enabled."""
        return True

    #: An eventfd that is signalled when ``in_use`` changes, or -1.
    use_fd = -1

    def may_write(self, offset: int, size: int) -> bool:
        """Whether a driver's write to the configuration space is for the back end."""
        return False

    def count_queues(self, front: FrontEnd, wanted: int, what: str = "queues") -> None:
        """Raises ConfigError when the back end has fewer."""
        if wanted < 1 or (front.queues and wanted > front.queues):
            has = f"has {front.queues} at most" if wanted else "needs one at least"
            raise ConfigError(f"{front.wire.label}: queues={wanted}: it {has} ({what}).")

    # ---- the contract of a virtio device -------------------------------------------------------

    def host_features(self) -> int:
        bits = self._offered & (self.BACK_END_BITS | _RING_BITS)
        if self.packed:
            bits |= self._offered & 1 << F_RING_PACKED
        return bits & ~self.OWN_BITS | self.OWN_BITS

    def attach(self, memory: GuestMemory, loop: Any) -> None:
        if any(r.fd < 0 for r in (*memory.ranges, *memory.added)):
            raise ConfigError(
                f"{self.name}: a vhost-user back end needs guest RAM that it can share; leave "
                "--memory-backing away, or make it memfd."
            )
        super().attach(memory, loop)
        self._watcher = threading.Thread(
            target=self._watch, name=f"{self.name}-back-end", daemon=True
        )
        self._watcher.start()

    def begin(self) -> None:
        with self._lock:
            try:
                self._handed = False
                if self._front is None and not self.reconnect:
                    self._install(*self._again())
                if self._front is not None:
                    self._go(dict.fromkeys(self.queues, self.first_base()))
            except VhostError as e:
                self._lost(str(e))
            self._poke()  # without a back end it is looked for
            if self._stale and self._irqs is not None:
                self._stale = False
                self._irqs.config_changed()

    def begin_queue(self, index: int) -> None:
        with self._lock:
            if self._running and self._front is not None:
                try:
                    self._front.start_one(index, self._ring(index, self.first_base()))
                except VhostError as e:
                    self._lost(str(e))

    def end_queue(self, index: int) -> None:
        with self._lock:
            if self._running and self._front is not None and index in self.queues:
                try:
                    self._front.stop([index])
                except VhostError as e:
                    self._lost(str(e))

    def end_queues(self) -> None:
        with self._lock:
            if self._running and self._front is not None:
                try:
                    self._front.stop(list(self.queues))
                    self._front.reset()
                except VhostError as e:
                    self._lost(str(e))
            self._running = False
            self._failed = ""
            self._drop_inflight()

    def activate(self, features: int, queues: list[QueueConfig | None], irqs: QueueIrqs) -> None:
        with self._lock:
            super().activate(features, queues, irqs)

    def deactivate(self) -> None:
        with self._lock:
            super().deactivate()

    def write_config(self, offset: int, size: int, value: int) -> None:
        if not self.may_write(offset, size):
            return
        with self._lock:
            if self._front is None:
                return
            try:
                self._front.write_config(offset, value.to_bytes(size, "little"))
                self.config[:] = self.describe(self._front)
            except VhostError as e:
                self._lost(str(e))

    # ---- with the lock held --------------------------------------------------------------------

    def _ring(self, index: int, base: int) -> Ring:
        on = self.in_use(index)
        return Ring(self.queues[index], base, self.kick_fd(index), self.call_fd(index), on)

    def _go(self, bases: dict[int, int]) -> None:
        """Have the back end walk the queues from there."""
        assert self._front is not None
        assert self._memory is not None
        if self._inflight is None:
            self._inflight = self._front.inflight(len(self.QUEUE_SIZES), max(self.QUEUE_SIZES))
        rings = {index: self._ring(index, base) for index, base in bases.items()}
        features = self.features & ~self.OWN_BITS
        self._handed = True
        self._front.start(features, self._memory, rings, self._inflight)
        self._running = True

    def _drop_inflight(self) -> None:
        if self._inflight is not None:
            self._inflight.close()
            self._inflight = None

    def _lost(self, why: str) -> None:
        """The back end is of no use any more."""
        if self._front is not None or not self.reconnect:
            self._say(why)
        if self._front is not None:
            self._front.close()
            self._front = None
            self._next_try = time.monotonic() + self.reconnect
        self._running = False
        self._set_config(self.orphaned())
        if not self.reconnect and self._irqs is not None:
            self._failed = why
            self._irqs.fail()
        self._poke()

    def _say(self, what: str) -> None:
        if self.on_news is not None:
            self.on_news(f"{self.name}: {what}")

    def _install(self, front: FrontEnd, config: bytes) -> None:
        self._front = front
        self.connections += 1
        self._set_config(config)

    def _again(self) -> tuple[FrontEnd, bytes]:
        """A new back end, which must be able to take the old one's place, and its configuration
        space. Needs no lock."""
        front = self._connect()
        try:
            missing = self.host_features() & ~self.OWN_BITS & ~front.features
            if missing:
                raise front.wire.fail(f"it lacks features that the last one had ({missing:#x})")
            if front.queues and self.layout(front) != self.QUEUE_SIZES:
                raise front.wire.fail("it has another number of queues than the last one")
            config = self.describe(front)
        except ConfigError as e:
            front.close()
            raise VhostError(str(e)) from e
        except BaseException:
            front.close()
            raise
        return front, config

    def _set_config(self, config: bytes) -> None:
        if config == self.config:
            return
        self.config[:] = config
        if self._irqs is not None:
            self._irqs.config_changed()
        else:
            self._stale = True

    # ---- the thread that waits -----------------------------------------------------------------

    def _poke(self) -> None:
        try:
            os.eventfd_write(self._wake, 1)
        except BlockingIOError:
            return  # it is awake

    def _ending(self) -> bool:
        return self._closing

    def _watch(self) -> None:
        while True:
            with self._lock:
                if self._ending():
                    return
                front = self._front
                poll = select.poll()
                poll.register(self._wake, select.POLLIN)
                if self.use_fd >= 0:
                    poll.register(self.use_fd, select.POLLIN)
                wait: float | None = None
                channel = -1
                if front is not None:
                    poll.register(front.wire.sock.fileno(), _EVENTS)
                    wait, channel = front.patience, front.channel
                    if channel >= 0:
                        poll.register(channel, select.POLLIN)
                elif self.reconnect and not self._failed:
                    wait = max(0.0, self._next_try - time.monotonic())
                sock = -1 if front is None else front.wire.sock.fileno()
            ready = dict(poll.poll(None if wait is None else int(wait * 1000) + 1))
            with self._lock:
                if self._wake in ready:
                    os.eventfd_read(self._wake)
                if self._ending():
                    return
                if self.use_fd in ready:
                    os.eventfd_read(self.use_fd)
                    self._use()
                # Another thread may have met its end first.
                if front is not None and front is self._front:
                    self._look_at(front, ready.get(sock, 0), channel in ready)
                look = self._front is None and self.reconnect and not self._failed
            if look:
                self._try()

    def _use(self) -> None:
        if self._running and self._front is not None:
            try:
                self._front.enable({index: self.in_use(index) for index in self.queues})
            except VhostError as e:
                self._lost(str(e))

    def _look_at(self, front: FrontEnd, events: int, said: bool) -> None:
        try:
            if said and front.hear() and front.has(P_CONFIG):
                self._set_config(self.describe(front))
        except VhostError as e:
            self._lost(str(e))
            return
        if events:
            self._lost(f"{front.wire.label} closed the connection")

    def _try(self) -> None:
        if time.monotonic() < self._next_try:
            return
        self._next_try = time.monotonic() + self.reconnect
        try:
            front, config = self._again()
        except VhostError:
            return
        with self._lock:
            if self._ending():
                front.close()
                return
            self._install(front, config)
            try:
                if self._active:
                    self._resume()
            except VhostError as e:
                self._lost(str(e))
                return
            if not self._failed:
                self._say(f"vhost-user back end {self.path} is back")

    def _resume(self) -> None:
        bases = {}
        for index, queue in self.queues.items():
            base = self._left_off(queue)
            if base is None:
                self._failed = (
                    f"queue {index} cannot be taken up where vhost-user back end {self.path} left "
                    "it; the driver must reset the device"
                )
                self._say(self._failed)
                if self._irqs is not None:
                    self._irqs.fail()
                return
            bases[index] = base
        self._go(bases)
        if self._irqs is not None:
            for index in bases:  # of what it finished, the old one may not have told the driver
                self._irqs.notify(index)

    def _left_off(self, queue: QueueConfig) -> int | None:
        """Where a back end died in the available ring, by what RAM tells; None if it does not."""
        assert self._memory is not None
        assert self._front is not None
        if not self._handed:
            return self.first_base()
        if self.features >> F_RING_PACKED & 1:
            return None
        tracked = self._inflight is not None and self._front.has(P_INFLIGHT)
        if tracked or in_order(self._memory, queue):
            return self._memory.read_int(queue.device + 2, 2)
        return None

    # ---- what the host sees --------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        return self._front is not None

    def faults(self) -> list[str]:
        return [*super().faults(), *([f"{self.name}: {self._failed}"] if self._failed else [])]

    def close(self) -> None:
        super().close()
        with self._lock:
            self._closing = True
            self._poke()
        if self._watcher is not None:
            self._watcher.join()
            self._watcher = None
        if self._front is not None:
            self._front.close()
            self._front = None
        self._drop_inflight()
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1
