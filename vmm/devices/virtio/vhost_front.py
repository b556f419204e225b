"""One vhost-user back end: connected, asked what it can do, and told what to do."""

from __future__ import annotations

import os
import select
import struct
import time

from vmm.devices.virtio import vhost_wire as wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from vmm.devices.virtio.transport import QueueConfig
    from vmm.memory import GuestMemory

#: Among the feature bits: there are protocol features. Never the driver's to see.
F_PROTOCOL = 30

# Protocol feature bit numbers.
P_MQ, P_REPLY_ACK, P_BACKEND_REQ, P_CONFIG = 0, 3, 5, 9
P_INFLIGHT, P_RESET_DEVICE, P_STATUS = 12, 13, 16
_WANTED = sum(
    1 << bit
    for bit in (P_MQ, P_REPLY_ACK, P_BACKEND_REQ, P_CONFIG, P_INFLIGHT, P_RESET_DEVICE, P_STATUS)
)

#: What guest-physical address 0 is called in "user addresses", which are names and no more: where
#: RAM is mapped here is nobody else's to know.
USER_BASE = 1 << 46
#: As many regions as SET_MEM_TABLE holds.
REGIONS_MAX = 8
#: No back end tracks its requests in more.
INFLIGHT_MAX = 64 << 20

_STATUS_FEATURES_OK = 1 | 2 | 8  # ACKNOWLEDGE, DRIVER: virtio-v1.3 §2.1
_STATUS_DRIVER_OK = _STATUS_FEATURES_OK | 4

_REGION = struct.Struct("=QQQQ")
_ADDR = struct.Struct("=IIQQQQ")
_CONFIG = struct.Struct("=III")
#: With the padding that compilers give it.
_INFLIGHT = struct.Struct("=QQHH4x")

#: Messages of the back end's own that are read a second.
CHANNEL_RATE = 50


class Ring:
    """A queue as the back end is to walk it: ``base`` is the next index in the available ring (of
    a packed queue, both positions), ``on`` whether it is enabled from the start."""

    __slots__ = ("base", "call", "kick", "on", "queue")

    def __init__(
        self, queue: QueueConfig, base: int, kick: int, call: int, on: bool = True
    ) -> None:
        self.queue = queue
        self.base = base
        self.kick = kick
        self.on = on
        self.call = call


class Inflight:
    """The memory in which a back end keeps track of its requests; ours to hand to the next one."""

    __slots__ = ("fd", "message", "shape")

    def __init__(self, fd: int, message: bytes, shape: tuple[int, int]) -> None:
        self.fd = fd
        self.message = message
        #: Queues and their size.
        self.shape = shape

    def close(self) -> None:
        os.close(self.fd)


class FrontEnd:
    """A connection and what was agreed on. Every method raises VhostError, after which only
    ``close`` makes sense; one thread at a time. ``timeout``: seconds for each method."""

    def __init__(self, path: str, label: str, timeout: float) -> None:
        self.timeout = timeout
        self.protocol = 0
        #: How many queues (of a network card: pairs) there may be; 0: it does not say.
        self.queues = 0
        self._channel: Any = None
        self._said = bytearray()
        self._next_read = 0.0
        self.wire = wire.connect(path, label)
        try:
            self._greet()
        except BaseException:
            self.close()
            raise

    def _greet(self) -> None:
        self.wire.limit(self.timeout)
        self.features = self.wire.ask_u64(wire.GET_FEATURES)
        if self.features >> F_PROTOCOL & 1:
            offered = self.wire.ask_u64(wire.GET_PROTOCOL_FEATURES) & _WANTED
            if not offered >> P_CONFIG & 1 or not offered >> P_REPLY_ACK & 1:
                offered &= ~(1 << P_BACKEND_REQ)  # to hear of changes that cannot be read
            self.protocol = offered
            self.wire.tell(wire.SET_PROTOCOL_FEATURES, wire.U64.pack(offered))
            self.wire.ack = self.has(P_REPLY_ACK)
        self.wire.tell(wire.SET_OWNER)
        if self.has(P_MQ):
            self.queues = self.wire.ask_u64(wire.GET_QUEUE_NUM)
        if self.has(P_BACKEND_REQ):
            self._open_channel()

    def has(self, bit: int) -> bool:
        """A protocol feature is agreed on."""
        return bool(self.protocol >> bit & 1)

    def _open_channel(self) -> None:
        import _socket

        ours, theirs = _socket.socketpair()
        self._channel = ours
        ours.setblocking(False)
        try:
            self.wire.tell(wire.SET_BACKEND_REQ_FD, fds=[theirs.fileno()])
        finally:
            theirs.close()

    # ---- configuration space -------------------------------------------------------------------

    def read_config(self, size: int) -> bytes:
        if not self.has(P_CONFIG):
            raise self.wire.fail("it has no configuration space to read (protocol feature CONFIG)")
        self.wire.limit(self.timeout)
        body = _CONFIG.pack(0, size, 0) + bytes(size)
        got, fds = self.wire.ask_fds(wire.GET_CONFIG, body)
        for fd in fds:
            os.close(fd)
        if fds or len(got) != len(body) or _CONFIG.unpack_from(got)[:2] != (0, size):
            raise self.wire.fail(f"it did not give the {size} bytes of its configuration space")
        return got[_CONFIG.size :]

    def write_config(self, offset: int, data: bytes) -> None:
        """A driver's write, which the back end may ignore."""
        if not self.has(P_CONFIG):
            return
        self.wire.limit(self.timeout)
        try:
            self.wire.tell(wire.SET_CONFIG, _CONFIG.pack(offset, len(data), 0) + data)
        except wire.Refused:
            return  # it is the driver's to know what can be written

    # ---- rings ---------------------------------------------------------------------------------

    def inflight(self, queues: int, size: int) -> Inflight | None:
        """Memory to track requests in, if it can do that."""
        if not self.has(P_INFLIGHT):
            return None
        self.wire.limit(self.timeout)
        got, fds = self.wire.ask_fds(wire.GET_INFLIGHT_FD, _INFLIGHT.pack(0, 0, queues, size))
        try:
            if len(fds) != 1 or len(got) not in (_INFLIGHT.size - 4, _INFLIGHT.size):
                raise self.wire.fail("it did not give its memory for requests in flight")
            length, offset, *_ = _INFLIGHT.unpack(got.ljust(_INFLIGHT.size, b"\0"))
            if not 0 < length <= INFLIGHT_MAX or offset + length > os.fstat(fds[0]).st_size:
                raise self.wire.fail(f"it gave {length} bytes for requests in flight at {offset}")
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        message = _INFLIGHT.pack(length, offset, queues, size)
        return Inflight(fds[0], message, (queues, size))

    def start(
        self,
        features: int,
        memory: GuestMemory,
        rings: dict[int, Ring],
        inflight: Inflight | None = None,
    ) -> None:
        """Let it walk the rings, from where each stands."""
        self.wire.limit(self.timeout)
        agreed = features | (self.features & 1 << F_PROTOCOL)
        self.wire.tell(wire.SET_FEATURES, wire.U64.pack(agreed))
        if self.has(P_STATUS):
            self.wire.tell(wire.SET_STATUS, wire.U64.pack(_STATUS_FEATURES_OK))
            if not self.wire.ask_u64(wire.GET_STATUS) & 8:
                raise self.wire.fail(f"it refused the features {features:#x}")
        self._tell_memory(memory)
        if inflight is not None and self.has(P_INFLIGHT):
            self.wire.tell(wire.SET_INFLIGHT_FD, inflight.message, [inflight.fd])
        for index, ring in rings.items():
            self._start_ring(index, ring)
        if self.has(P_STATUS):
            self.wire.tell(wire.SET_STATUS, wire.U64.pack(_STATUS_DRIVER_OK))

    def start_one(self, index: int, ring: Ring) -> None:
        """One more, while others run."""
        self.wire.limit(self.timeout)
        self._start_ring(index, ring)

    def _tell_memory(self, memory: GuestMemory) -> None:
        ranges = [*memory.ranges, *memory.added]
        if len(ranges) > REGIONS_MAX:
            raise self.wire.fail(f"this machine's RAM is in more than {REGIONS_MAX} parts")
        body = wire.STATE.pack(len(ranges), 0)
        for r in ranges:
            body += _REGION.pack(r.gpa, r.size, USER_BASE + r.gpa, r.offset)
        self.wire.tell(wire.SET_MEM_TABLE, body, [r.fd for r in ranges])

    def _start_ring(self, index: int, ring: Ring) -> None:
        tell, queue = self.wire.tell, ring.queue
        tell(wire.SET_VRING_NUM, wire.STATE.pack(index, queue.size))
        tell(wire.SET_VRING_BASE, wire.STATE.pack(index, ring.base))
        areas = (USER_BASE + at for at in (queue.desc, queue.device, queue.driver))
        tell(wire.SET_VRING_ADDR, _ADDR.pack(index, 0, *areas, 0))
        tell(wire.SET_VRING_CALL, wire.U64.pack(index), [ring.call])
        _kick(ring.kick)
        tell(wire.SET_VRING_KICK, wire.U64.pack(index), [ring.kick])
        if self.features >> F_PROTOCOL & 1:
            tell(wire.SET_VRING_ENABLE, wire.STATE.pack(index, int(ring.on)))

    def enable(self, rings: dict[int, bool]) -> None:
        """Which of the started rings are in use; of the others nothing comes."""
        self.wire.limit(self.timeout)
        if self.features >> F_PROTOCOL & 1:
            for index, on in rings.items():
                self.wire.tell(wire.SET_VRING_ENABLE, wire.STATE.pack(index, int(on)))

    def stop(self, rings: Sequence[int]) -> None:
        """Return when it does not touch these rings any more."""
        self.wire.limit(self.timeout)
        for index in rings:
            got = self.wire.ask(wire.GET_VRING_BASE, wire.STATE.pack(index, 0))
            if wire.STATE.unpack(got)[0] != index:
                raise self.wire.fail("it stopped another queue than it was told to")

    def reset(self) -> None:
        """Back to where no driver was there, its rings stopped."""
        self.wire.limit(self.timeout)
        if self.has(P_STATUS):
            self.wire.tell(wire.SET_STATUS, wire.U64.pack(0))
        elif self.has(P_RESET_DEVICE):
            self.wire.tell(wire.RESET_DEVICE)

    # ---- what it says of its own ---------------------------------------------------------------

    @property
    def channel(self) -> int:
        """Where it does; -1 for nowhere, or not now."""
        if self._channel is None or time.monotonic() < self._next_read:
            return -1
        return int(self._channel.fileno())

    @property
    def patience(self) -> float | None:
        """Seconds until ``channel`` may be looked at again."""
        if self._channel is None:
            return None
        left = self._next_read - time.monotonic()
        return left if left > 0 else None

    def hear(self) -> bool:
        """Read the channel; True when the configuration space has changed. It may say something
        CHANNEL_RATE times a second; what is more waits, and its sender with it."""
        self._next_read = time.monotonic() + 1 / CHANNEL_RATE
        try:
            data = self._channel.recv(wire.PAYLOAD_MAX)  # descriptors are closed by the kernel
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        self._said += data
        changed = False
        while len(self._said) >= wire.HEADER.size:
            request, flags, size = wire.HEADER.unpack_from(self._said)
            if size > wire.PAYLOAD_MAX:
                data = b""
                break
            if len(self._said) < wire.HEADER.size + size:
                break
            del self._said[: wire.HEADER.size + size]
            known = request == wire.BACKEND_CONFIG_CHANGE
            changed |= known
            if flags & wire.FLAG_NEED_REPLY:
                self._answer(request, int(not known))
        if not data:
            self._channel.close()
            self._channel = None
        return changed

    def _answer(self, request: int, value: int) -> None:
        head = wire.HEADER.pack(request, wire.VERSION | wire.FLAG_REPLY, 8)
        try:
            self._channel.send(head + wire.U64.pack(value))
        except OSError:
            return  # it does not read; so it waits

    def close(self) -> None:
        self.wire.close()
        if self._channel is not None:
            self._channel.close()
            self._channel = None


def _kick(fd: int) -> None:
    """There may be something in the ring already, and some start by a kick. Before a back end has
    the descriptor: it could have made it blocking, and full; so could the one before it."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    try:
        if poll.poll(0):
            os.eventfd_write(fd, 1)
    except BlockingIOError:
        return  # full: kicked enough
