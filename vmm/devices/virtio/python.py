"""The base of a virtio device that a user writes in Python: its queues are served by one Python
thread of the device's own, so that no vCPU waits for it.

Subclasses say what they are (DEVICE_ID, QUEUE_SIZES, device_features, config; see
vmm/devices/virtio/device.py) and define ``handle``. The walk of the queues, and all that a driver
can do wrong with them, stays with vmm/devices/virtio/queue.py.
"""

from __future__ import annotations

import os
import select
import threading

from vmm.devices.virtio.device import VirtioDevice
from vmm.devices.virtio.queue import VERDICTS, Queue
from vmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.board import Board
    from vmm.devices.virtio.queue import Chain
    from vmm.devices.virtio.transport import QueueConfig, QueueIrqs

#: Requests of one queue before the others get a turn.
BUDGET = 256


class VirtioRequest:
    """What the driver put into a queue: bytes to read, room to write to, or both.

    It is given back to the driver when ``handle`` returns, unless ``keep`` was called; then
    ``done`` gives it back, from any thread. After a reset of the device all of it does nothing.
    """

    __slots__ = ("_chain", "_home", "_run", "given_back", "kept", "queue", "written")

    def __init__(self, run: _Run, queue: int, home: Queue, chain: Chain) -> None:
        self._run = run
        self._home = home
        self._chain = chain
        #: The index of the queue it came in.
        self.queue = queue
        #: How many bytes were written so far.
        self.written = 0
        self.kept = False
        self.given_back = False

    @property
    def size(self) -> int:
        """How many bytes ``read`` gives."""
        return min(self._chain.read_len, self._run.limit)

    @property
    def room(self) -> int:
        """How many more bytes ``write`` takes."""
        return min(self._chain.write_len, self._run.limit) - self.written

    def read(self, size: int | None = None) -> bytes:
        """The first ``size`` bytes that the driver sent; None: all, up to the device's LIMIT."""
        with self._run.lock:
            if not self._usable():
                return b""
            return self._chain.read(self.size if size is None else min(size, self.size))

    def write(self, data: bytes) -> int:
        """Append to what was written; returns how many bytes had room."""
        with self._run.lock:
            if not self._usable():
                return 0
            count = self._chain.write(data[: self.room], self.written)
            self.written += count
            return count

    def _usable(self) -> bool:
        """With the lock held: whether its memory is still lent to the device."""
        run = self._run
        return run.alive and run.queues.get(self.queue) is self._home and not self.given_back

    def keep(self) -> None:
        """Not to be given back when ``handle`` returns. A driver has no more than the size of the
        queue in flight."""
        self.kept = True

    def done(self) -> None:
        """Give it back, and interrupt the driver if it wants to know. Once; later calls do
        nothing."""
        self._run.push(self)

    def refuse(self) -> None:
        """It makes no sense to this device: the driver must reset the device to go on. Counted,
        and told after the run."""
        self.kept = True
        self._run.refuse(self)


class PythonVirtioDevice(VirtioDevice):
    """A virtio device whose requests Python answers. Define ``handle``."""

    #: At most so many bytes of a request are seen, each way, whatever the driver says: what a
    #: guest can make the host allocate.
    LIMIT = 1 << 20

    def __init__(self, name: str = "device") -> None:
        """``name``: unique in a machine; the default is made from the class's name."""
        super().__init__(name)
        self._board: Board | None = None
        self._run: _Run | None = None
        self._config_changed = False
        #: What ``handle`` raised, if it did.
        self.error: BaseException | None = None

    # ---- what a device fills in ----------------------------------------------------------------

    def handle(self, request: VirtioRequest) -> None:
        """Answer one request. Runs on the device's own thread, for one request at a time; it may
        take its time, but must not wait for the guest. What it raises ends the machine."""
        raise NotImplementedError

    def stopped(self) -> None:
        """The driver reset the device, or the machine ends: requests kept are void. No ``handle``
        is running. On a vCPU thread."""

    # ---- the rest is done ----------------------------------------------------------------------

    def config_changed(self) -> None:
        """Tell the driver that ``config`` is different now. Any thread."""
        run = self._run
        if run is None or not run.tell_config():
            self._config_changed = True

    def plug(self, board: Board) -> None:
        if self._board is not None:
            raise ConfigError(f"{self.name} was in another machine; make a new one.")
        self._board = board
        super().plug(board)

    def activate(self, features: int, queues: list[QueueConfig | None], irqs: QueueIrqs) -> None:
        self.deactivate()
        self._run = _Run(self, irqs)
        super().activate(features, queues, irqs)
        if self._config_changed:
            self._config_changed = False
            irqs.config_changed()
        self._run.start()

    def restart_queue(self, index: int, queue: QueueConfig) -> None:
        assert self._memory is not None
        assert self._run is not None
        q = queue
        made = Queue(self._memory, q.size, q.desc, q.driver, q.device, self.features)
        self._run.add(index, made)

    def stop_queue(self, index: int) -> None:
        if self._run is not None:
            self._run.remove(index)

    def stop_queues(self) -> None:
        if self._run is not None:
            self._run.stop()
            self._run = None
            self.stopped()

    def broken(self, queue: int, verdict: str) -> None:
        """The driver broke a queue: for ``faults``."""
        self._reports[queue].breaks += 1
        self._reports[queue].verdict = list(VERDICTS).index(verdict)

    def failed(self, error: BaseException) -> None:
        """``handle`` raised."""
        self.error = error
        if self._board is not None:
            self._board.on_error(error)

    def unclaimed(self) -> str | None:
        if self.activations or self.KERNEL_CONFIG:
            return super().unclaimed()
        return f"the guest never used {self.name}; its kernel may have no driver for it"


class _Run:
    """From DRIVER_OK to reset: the queues, and the thread that serves them."""

    def __init__(self, device: PythonVirtioDevice, irqs: QueueIrqs) -> None:
        self.device = device
        self.irqs = irqs
        self.limit = device.LIMIT
        #: Around every use of a queue, and of guest memory.
        self.lock = threading.Lock()
        self.alive = True
        self.queues: dict[int, Queue] = {}
        self._kicks = {device.kick_fd(index): index for index in range(len(device.QUEUE_SIZES))}
        self._thread = threading.Thread(target=self._main, name=f"vmm-{device.name}", daemon=True)

    def start(self) -> None:
        if not self._kicks:
            return
        try:
            self._thread.start()
        except RuntimeError:  # the host has no more threads
            self.irqs.fail()

    def stop(self) -> None:
        """When this returns, nothing of the device touches the guest."""
        with self.lock:
            self.alive = False
        for fd in self._kicks:
            _kick(fd)
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def add(self, index: int, queue: Queue) -> None:
        with self.lock:
            self.queues[index] = queue
        _kick(self.device.kick_fd(index))  # chains that are there already are served without one

    def remove(self, index: int) -> None:
        """What is kept of it is void."""
        with self.lock:
            self.queues.pop(index, None)

    def push(self, request: VirtioRequest) -> None:
        with self.lock:
            if not request._usable():
                return
            request.given_back = True
            request._home.push(request._chain, request.written)
            if request._home.should_notify():
                self.irqs.notify(request.queue)

    def tell_config(self) -> bool:
        with self.lock:
            if self.alive:
                self.irqs.config_changed()
            return self.alive

    def refuse(self, request: VirtioRequest) -> None:
        with self.lock:
            if request._usable() and not request._home.broken:
                request._home.refuse()
                self._tell_broken(request.queue, request._home)

    def _tell_broken(self, index: int, queue: Queue) -> None:
        self.device.broken(index, queue.verdict)
        self.irqs.fail()

    def _main(self) -> None:
        try:
            self._serve()
        except BaseException as e:
            self.irqs.fail()
            self.device.failed(e)

    def _serve(self) -> None:
        poll = select.poll()
        for fd in self._kicks:
            poll.register(fd, select.POLLIN)
        while self.alive:
            for fd, _ in poll.poll():
                os.eventfd_read(fd)
                self._drain(self._kicks[fd], fd)

    def _drain(self, index: int, fd: int) -> None:
        for _ in range(BUDGET):
            request = self._take(index)
            if request is None:
                return
            self.device.handle(request)
            if not request.kept:
                self.push(request)
        _kick(fd)

    def _take(self, index: int) -> VirtioRequest | None:
        with self.lock:
            queue = self.queues.get(index)
            while self.alive and queue is not None and not queue.broken:
                # Kicks stay on meanwhile: they are cheap beside a handler, and each answer is
                # told at once, as the next may take long.
                chain = queue.pop()
                if chain is not None:
                    return VirtioRequest(self, index, queue, chain)
                if queue.verdict != "empty":
                    self._tell_broken(index, queue)
                elif not queue.enable_kicks():
                    break
        return None


def _kick(fd: int) -> None:
    try:
        os.eventfd_write(fd, 1)
    except BlockingIOError:
        return  # full: it is awake
