"""A vhost-user back end in Python, for tests: maps the front end's memory, walks its split rings
with the Python twin, and, where a test wants that, does everything wrong."""

from __future__ import annotations

import array
import mmap
import os
import queue
import select
import socket
import struct
import threading
from collections.abc import Callable

from vmm.devices.virtio import vhost_wire as wire
from vmm.devices.virtio.queue import Chain, Queue
from vmm.memory import GuestMemory

VERSION_1 = 1 << 32
PROTOCOL = 1 << 30
RINGS = 1 << 28 | 1 << 29
FEATURES = VERSION_1 | PROTOCOL | RINGS

MQ, REPLY_ACK, BACKEND_REQ, CONFIG, INFLIGHT, RESET, STATUS = (
    1 << bit for bit in (0, 3, 5, 9, 12, 13, 16)
)
EVERYTHING = MQ | REPLY_ACK | BACKEND_REQ | CONFIG | INFLIGHT | RESET | STATUS

#: Gets the queue's index and the chain, gives what is written into it; None: it stays in flight.
Handle = Callable[[int, Chain], bytes | None]
#: Instead of the answer: gets the request's payload, gives bytes to send; None: nothing at all.
Lie = Callable[[bytes], "bytes | None"]


class Regions(GuestMemory):
    """What the front end shares, as the twin needs it."""

    def __init__(self) -> None:
        self.maps: list[tuple[int, int, int, mmap.mmap]] = []

    def map(self, gpa: int, size: int, user: int, offset: int, fd: int) -> None:
        self.maps.append((gpa, size, user, mmap.mmap(fd, size, offset=offset)))

    def _find(self, gpa: int, size: int) -> tuple[mmap.mmap, int] | None:
        for base, length, _, mapped in self.maps:
            if base <= gpa and gpa + size <= base + length:
                return mapped, gpa - base
        return None

    def gpa(self, user: int) -> int:
        for base, length, first, _ in self.maps:
            if first <= user < first + length:
                return user - first + base
        raise ValueError(f"no region has the user address {user:#x}")

    def contains(self, gpa: int, size: int) -> bool:
        return self._find(gpa, size) is not None

    def read(self, gpa: int, size: int) -> bytes:
        found = self._find(gpa, size)
        assert found is not None
        return found[0][found[1] : found[1] + size]

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        found = self._find(gpa, len(data))
        assert found is not None
        found[0][found[1] : found[1] + len(data)] = bytes(data)

    def read_int(self, gpa: int, size: int) -> int:
        return int.from_bytes(self.read(gpa, size), "little")

    def write_int(self, gpa: int, value: int, size: int) -> None:
        self.write(gpa, value.to_bytes(size, "little"))

    def close(self) -> None:
        for *_, mapped in self.maps:
            mapped.close()
        self.maps = []


class Vring:
    """One queue as it was told so far."""

    def __init__(self) -> None:
        self.size = self.base = self.desc = self.used = self.avail = 0
        self.kick = self.call = -1
        self.enabled = False
        self.queue: Queue | None = None

    def close(self) -> None:
        for fd in (self.kick, self.call):
            if fd >= 0:
                os.close(fd)
        self.kick = self.call = -1
        self.queue = None


class BackEnd:
    """Listens at ``path`` and serves one front end after the other, on a thread of its own.

    What is set after ``call`` or before the first connection counts. ``lies``: by request.
    ``told``: each request and its payload, in order. ``handle``: the device.
    """

    def __init__(
        self,
        path: str,
        handle: Handle = lambda index, chain: chain.read(1 << 16)[::-1],
        *,
        features: int = FEATURES,
        protocol: int = EVERYTHING,
        queues: int = 2,
        config: bytes = bytes(range(16)),
    ) -> None:
        self.path = path
        self.handle = handle
        self.features = features
        self.protocol = protocol
        self.queues = queues
        self.config = bytearray(config)
        self.lies: dict[int, Lie] = {}
        self.told: list[tuple[int, bytes]] = []
        self.connections = 0
        self.kept: list[tuple[int, Queue, Chain]] = []
        self.regions = Regions()
        self.rings: dict[int, Vring] = {}
        self.accepted = 0
        self.inflight_inodes: list[int] = []
        self.error: BaseException | None = None
        self._agreed = 0
        self._channel: socket.socket | None = None
        self._front: socket.socket | None = None
        self._jobs: queue.Queue[Callable[[], None]] = queue.Queue()
        self._wake = os.eventfd(0)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen(4)
        self._stop = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    # ---- what a test does with it --------------------------------------------------------------

    def call(self, job: Callable[[], None]) -> None:
        """Have it done on the back end's thread, and wait for it."""
        done = threading.Event()

        def run() -> None:
            try:
                job()
            finally:
                done.set()

        self._jobs.put(run)
        os.eventfd_write(self._wake, 1)
        assert done.wait(10)

    def die(self) -> None:
        """Hang up, as a process that ends; the next front end may connect at once."""
        self.call(self._hang_up)

    def say(self, data: bytes) -> None:
        """Send on the back end's own channel."""

        def send() -> None:
            assert self._channel is not None
            self._channel.sendall(data)

        self.call(send)

    def requests(self) -> list[int]:
        return [request for request, _ in self.told]

    def finish(self, which: int, data: bytes) -> None:
        """Give back a chain that was kept."""

        def push() -> None:
            index, ring, chain = self.kept.pop(which)
            ring.push(chain, chain.write(data))
            self._interrupt(index)

        self.call(push)

    def close(self) -> None:
        self.call(lambda: setattr(self, "_stop", True))
        self._thread.join(10)
        self._hang_up()
        self._listener.close()
        os.close(self._wake)
        if os.path.exists(self.path):
            os.unlink(self.path)
        assert self.error is None, self.error

    # ---- its thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stop:
                self._turn()
        except BaseException as e:
            self.error = e
            self._hang_up()
            while not self._stop:
                self._jobs.get()()

    def _turn(self) -> None:
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        front = self._front
        poll.register(self._listener if front is None else front, select.POLLIN)
        kicks = {ring.kick: index for index, ring in self.rings.items() if ring.enabled}
        for fd in kicks:
            poll.register(fd, select.POLLIN)
        ready = {fd for fd, _ in poll.poll()}
        if self._wake in ready:
            os.eventfd_read(self._wake)
            while not self._jobs.empty():
                self._jobs.get()()
            return
        if front is None:
            if self._listener.fileno() in ready:
                self._front, _ = self._listener.accept()
                self.connections += 1
            return
        for fd in ready & set(kicks):
            os.eventfd_read(fd)
            self._serve(kicks[fd])
        if front.fileno() in ready:
            self._obey(front)

    def _hang_up(self) -> None:
        for ring in self.rings.values():
            ring.close()
        self.rings = {}
        self.regions.close()
        self.kept = []
        for sock in (self._front, self._channel):
            if sock is not None:
                sock.close()
        self._front = self._channel = None

    def _obey(self, front: socket.socket) -> None:
        fds: list[int] = []
        try:
            head, beside, _, _ = front.recvmsg(wire.HEADER.size, 256)
            for level, kind, body in beside:
                assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
                fds += array.array("i", body)
            if not head:
                self._hang_up()
                return
            request, flags, size = wire.HEADER.unpack(head)
            body = front.recv(size, socket.MSG_WAITALL) if size else b""
        except ConnectionError:
            self._hang_up()
            return
        self.told.append((request, body))
        lie = self.lies.get(request)
        if lie is not None:
            for fd in fds:
                os.close(fd)
            lied = lie(body)
            if lied is not None:
                self._send(front, lied)
            return
        answer = self._do(request, body, fds)
        if answer is None and flags & wire.FLAG_NEED_REPLY:
            answer = wire.U64.pack(0)
        if answer is not None:
            self._send(front, reply(request, answer), self._answer_fds)
        for fd in self._answer_fds:
            os.close(fd)

    def _send(self, front: socket.socket, data: bytes, fds: list[int] | None = None) -> None:
        try:
            socket.send_fds(front, [data], fds or [])
        except ConnectionError:
            self._hang_up()

    def _do(self, request: int, body: bytes, fds: list[int]) -> bytes | None:
        self._answer_fds: list[int] = []
        simple = {
            wire.GET_FEATURES: self.features,
            wire.GET_PROTOCOL_FEATURES: self.protocol,
            wire.GET_QUEUE_NUM: self.queues,
            wire.GET_STATUS: 0xF,
        }
        if request in simple:
            return wire.U64.pack(simple[request])
        if request == wire.SET_FEATURES:
            self.accepted = wire.U64.unpack(body)[0]
        elif request == wire.SET_PROTOCOL_FEATURES:
            self._agreed = wire.U64.unpack(body)[0]
            assert not self._agreed & ~self.protocol
        elif request == wire.SET_BACKEND_REQ_FD:
            self._channel = socket.socket(fileno=fds[0])
        elif request == wire.GET_CONFIG:
            offset, size, _ = struct.unpack_from("=III", body)
            return body[:12] + bytes(self.config[offset : offset + size])
        elif request == wire.SET_CONFIG:
            offset, size, _ = struct.unpack_from("=III", body)
            self.config[offset : offset + size] = body[12:]
        elif request == wire.SET_MEM_TABLE:
            self._map(body, fds)
        elif request == wire.GET_INFLIGHT_FD:
            fd = os.memfd_create("inflight")
            os.ftruncate(fd, 8192)
            self.inflight_inodes.append(os.fstat(fd).st_ino)
            self._answer_fds = [fd]
            return struct.pack("=QQ", 4096, 4096) + body[16:]
        elif request == wire.SET_INFLIGHT_FD:
            self.inflight_inodes.append(os.fstat(fds[0]).st_ino)
            os.close(fds[0])
        else:
            return self._do_ring(request, body, fds)
        return None

    def _map(self, body: bytes, fds: list[int]) -> None:
        count, _ = wire.STATE.unpack_from(body)
        assert count == len(fds)
        self.regions.close()
        for nr, fd in enumerate(fds):
            gpa, size, user, offset = struct.unpack_from("=QQQQ", body, 8 + 32 * nr)
            self.regions.map(gpa, size, user, offset, fd)
            os.close(fd)

    def _do_ring(self, request: int, body: bytes, fds: list[int]) -> bytes | None:
        index, number = wire.STATE.unpack_from(body) if len(body) >= 8 else (0, 0)
        if "VRING" not in wire.NAMES[request]:
            return None
        ring = self.rings.setdefault(index, Vring())
        if request == wire.SET_VRING_NUM:
            ring.size = number
        elif request == wire.SET_VRING_BASE:
            ring.base = number
        elif request == wire.SET_VRING_ADDR:
            areas = struct.unpack_from("=QQQ", body, 8)
            ring.desc, ring.used, ring.avail = (self.regions.gpa(at) for at in areas)
        elif request == wire.SET_VRING_CALL:
            ring.call = fds[0]
        elif request == wire.SET_VRING_KICK:
            ring.kick = fds[0]
        elif request == wire.SET_VRING_ENABLE:
            ring.enabled = bool(number)
            if ring.queue is None:
                self._begin(index)
        elif request == wire.GET_VRING_BASE:
            base = ring.queue.state[0] if ring.queue is not None else ring.base
            ring.close()
            del self.rings[index]
            return wire.STATE.pack(index, base)
        return None

    def _begin(self, index: int) -> None:
        ring = self.rings[index]
        at = (ring.base, self.regions.read_int(ring.used + 2, 2))
        features = self.accepted
        ring.queue = Queue(
            self.regions, ring.size, ring.desc, ring.avail, ring.used, features, at
        )  # fmt: skip

    def _serve(self, index: int) -> None:
        ring = self.rings[index].queue
        assert ring is not None
        ring.disable_kicks()
        while True:
            while (chain := ring.pop()) is not None:
                answer = self.handle(index, chain)
                if answer is None:
                    self.kept.append((index, ring, chain))
                    continue
                ring.push(chain, chain.write(answer))
            if not ring.enable_kicks():
                break
        self._interrupt(index)

    def _interrupt(self, index: int) -> None:
        ring = self.rings[index]
        if ring.queue is not None and ring.queue.should_notify():
            os.eventfd_write(ring.call, 1)


def reply(request: int, payload: bytes, flags: int = wire.VERSION | wire.FLAG_REPLY) -> bytes:
    return wire.HEADER.pack(request, flags, len(payload)) + payload
