"""Back ends that lie, fall silent or die in the middle: each is one sentence and one device that
needs a reset; nothing hangs, and no descriptor stays open."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests import vhost_backend
from tests.support.waiting import wait_for
from tests.vhost_backend import BackEnd, reply
from tests.virtio_rig import Rig
from vmm.devices.virtio import vhost_wire as wire
from vmm.devices.virtio.vhost_user import VhostUser
from vmm.devices.virtio.vhost_wire import VhostError

U64 = 8
#: What an honest one would answer, by request: only its length counts.
LENGTHS = {
    wire.GET_FEATURES: U64,
    wire.GET_PROTOCOL_FEATURES: U64,
    wire.SET_OWNER: U64,
    wire.GET_QUEUE_NUM: U64,
    wire.SET_BACKEND_REQ_FD: U64,
    wire.GET_CONFIG: 12 + 16,
    wire.GET_INFLIGHT_FD: 24,
    wire.SET_FEATURES: U64,
    wire.GET_STATUS: U64,
    wire.SET_MEM_TABLE: U64,
    wire.SET_INFLIGHT_FD: U64,
    wire.SET_VRING_ADDR: U64,
    wire.SET_VRING_CALL: U64,
    wire.SET_VRING_ENABLE: U64,
    wire.GET_VRING_BASE: U64,
}
#: With these every lie is tried, with the others some.
THOROUGHLY = (
    wire.GET_FEATURES, wire.GET_CONFIG, wire.GET_INFLIGHT_FD, wire.SET_MEM_TABLE,
    wire.GET_VRING_BASE,
)  # fmt: skip
FIRST = list(LENGTHS)[:6]

Lie = Callable[[BackEnd, int, bytes], "bytes | None"]


def _beside(back: BackEnd, request: int, payload: bytes, count: int) -> None:
    assert back._front is not None
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(count)]
    socket.send_fds(back._front, [reply(request, payload)], fds)
    for fd in fds:
        os.close(fd)


def _die_in_the_middle(back: BackEnd, request: int, payload: bytes) -> None:
    assert back._front is not None
    back._front.sendall(reply(request, payload)[:-1])
    back._hang_up()


LIES: dict[str, Lie] = {
    "another request": lambda back, request, payload: reply(request + 1, payload),
    "no reply": lambda back, request, payload: reply(request, payload, wire.VERSION),
    "version": lambda back, request, payload: reply(request, payload, 2 | wire.FLAG_REPLY),
    "huge": lambda back, request, payload: wire.HEADER.pack(request, 5, 0xFFFF_FFFF),
    "long": lambda back, request, payload: reply(request, payload + b"x"),
    "short": lambda back, request, payload: reply(request, payload[:-1]),
    "empty": lambda back, request, payload: reply(request, b""),
    "silence": lambda back, request, payload: None,
    "half": lambda back, request, payload: reply(request, payload)[:-1],
    "a third": lambda back, request, payload: reply(request, payload)[:5],
    "descriptors": lambda back, request, payload: _beside(back, request, payload, 2),
    "many descriptors": lambda back, request, payload: _beside(back, request, payload, 30),
    "death": lambda back, request, payload: back._hang_up(),
    "death in the middle": _die_in_the_middle,
}


CASES = [
    (request, name)
    for request in LENGTHS
    for name in LIES
    if request in THOROUGHLY or name in ("another request", "short", "descriptors", "death")
]


def cases(first: bool) -> pytest.MarkDecorator:
    chosen = [case for case in CASES if (case[0] in FIRST) == first]
    ids = [f"{wire.NAMES[request]}-{name}" for request, name in chosen]
    return pytest.mark.parametrize(("request_", "name"), chosen, ids=ids)


@pytest.fixture
def back(tmp_path: Path) -> Iterator[BackEnd]:
    before = len(os.listdir("/proc/self/fd"))
    back = BackEnd(str(tmp_path / "back"))
    yield back
    back.close()
    assert len(os.listdir("/proc/self/fd")) == before


def lie(back: BackEnd, request: int, name: str) -> None:
    payload = bytes(LENGTHS[request])
    back.lies[request] = lambda body: LIES[name](back, request, payload)


#: Lies that only time ends: what comes before them must be quick, so nothing honest follows in it.
SLOW = ("silence", "half", "a third")
SOON = 0.3


def device(back: BackEnd, timeout: float = 10.0) -> VhostUser:
    return VhostUser(back.path, 4, queues=2, size=16, config_size=16, timeout=timeout)


@cases(first=True)
def test_when_it_is_met(back: BackEnd, request_: int, name: str) -> None:
    lie(back, request_, name)
    with pytest.raises(VhostError, match=f"^vhost-user back end {back.path}: "):
        device(back, SOON if name in SLOW else 10.0)
    back.lies = {}
    device(back).close()


@cases(first=False)
def test_when_it_has_work(back: BackEnd, request_: int, name: str) -> None:
    with ExitStack() as stack:
        rig = Rig(device(back), "pci", backing="memfd")
        stack.callback(rig.close)
        lie(back, request_, name)
        front = rig.device._front  # type: ignore[attr-defined]
        if name in SLOW and request_ != wire.GET_VRING_BASE:
            front.timeout = SOON
        rig.driver.negotiate()
        rig.driver.setup_queue(0)
        rig.driver.setup_queue(1)
        rig.regs.status = 15
        if name in SLOW:
            front.timeout = SOON
        if request_ == wire.GET_VRING_BASE:
            assert not rig.broken
        else:
            assert rig.broken
            assert rig.device.faults()
        rig.regs.status = 0
        assert not rig.regs.status
        back.lies = {}
        rig.driver.start()
        assert rig.driver.queues[0].request([b"12"], [2]) == (2, b"21")


def test_it_refuses(back: BackEnd) -> None:
    with ExitStack() as stack:
        rig = Rig(device(back), "pci", backing="memfd")
        stack.callback(rig.close)
        back.lies[wire.SET_MEM_TABLE] = lambda body: reply(wire.SET_MEM_TABLE, bytes([1] * 8))
        rig.driver.negotiate()
        rig.driver.setup_queue(0)
        rig.regs.status = 15
        assert rig.broken
        (said,) = rig.device.faults()
        assert "refused SET_MEM_TABLE" in said


def test_it_refuses_what_a_driver_writes(back: BackEnd) -> None:
    with ExitStack() as stack:
        rig = Rig(device(back), "pci", backing="memfd")
        stack.callback(rig.close)
        rig.driver.start()
        back.lies[wire.SET_CONFIG] = lambda body: reply(wire.SET_CONFIG, bytes([1] * 8))
        rig.regs.set_config(4, 1, 99)
        assert rig.regs.config(4, 1) == 4
        assert rig.driver.queues[0].request([b"12"], [2]) == (2, b"21")


def test_answers_come_a_byte_at_a_time(back: BackEnd) -> None:
    """Whoever dribbles is late, however often something comes."""

    def dribble(body: bytes) -> None:
        data = reply(wire.GET_FEATURES, bytes(8))
        assert back._front is not None
        for byte in data:
            try:
                back._front.send(bytes([byte]))
            except OSError:
                return
            time.sleep(0.1)

    back.lies[wire.GET_FEATURES] = dribble
    with pytest.raises(VhostError, match="GET_FEATURES in time; does it serve another"):
        device(back, SOON)


@pytest.mark.parametrize(
    ("size", "offset"), [(0, 0), (1 << 40, 0), (4096, 8192), (4096, (1 << 64) - 1)]
)
def test_memory_for_requests_that_is_not_there(back: BackEnd, size: int, offset: int) -> None:
    def give(body: bytes) -> None:
        assert back._front is not None
        fd = os.memfd_create("inflight")
        os.ftruncate(fd, 8192)
        answer = struct.pack("=QQHH4x", size, offset, 2, 16)
        socket.send_fds(back._front, [reply(wire.GET_INFLIGHT_FD, answer)], [fd])
        os.close(fd)

    with ExitStack() as stack:
        rig = Rig(device(back), "pci", backing="memfd")
        stack.callback(rig.close)
        back.lies[wire.GET_INFLIGHT_FD] = give
        rig.driver.negotiate()
        rig.driver.setup_queue(0)
        rig.regs.status = 15
        assert rig.broken


def channel_message(request: int, payload: bytes = b"", flags: int = wire.VERSION) -> bytes:
    return wire.HEADER.pack(request, flags, len(payload)) + payload


@pytest.mark.parametrize(
    "said",
    [
        wire.HEADER.pack(2, wire.VERSION, 0xFFFF_FFFF),
        channel_message(1, bytes(40)),
        channel_message(99, bytes(4096)),
        channel_message(2)[:7],
        b"\xff" * 5000,
        channel_message(2, flags=wire.VERSION | wire.FLAG_NEED_REPLY) * 400,
    ],
    ids=["huge", "iotlb", "unknown", "ragged", "noise", "many"],
)
def test_its_own_channel(back: BackEnd, said: bytes) -> None:
    with ExitStack() as stack:
        rig = Rig(device(back), "mmio", backing="memfd")
        stack.callback(rig.close)
        rig.driver.start()
        back.say(said)
        for _ in range(20):
            assert rig.driver.queues[0].request([b"12"], [2]) == (2, b"21")
        back.call(lambda: back._channel.close() if back._channel else None)
        assert rig.driver.queues[0].request([b"12"], [2]) == (2, b"21")
        assert not rig.broken


def test_unknown_requests_are_refused_and_known_ones_are_not(back: BackEnd) -> None:
    heard = bytearray()
    with ExitStack() as stack:
        rig = Rig(device(back), "mmio", backing="memfd")
        stack.callback(rig.close)
        need = wire.VERSION | wire.FLAG_NEED_REPLY
        back.say(channel_message(3, bytes(8), need) + channel_message(2, b"", need))

        def hear() -> None:
            assert back._channel is not None
            back._channel.setblocking(False)
            try:
                heard.extend(back._channel.recv(100))
            except BlockingIOError:
                return

        def told() -> bool:
            back.call(hear)
            return len(heard) == 40

        wait_for(told)
    answers = [wire.HEADER.unpack_from(heard, at) for at in (0, 20)]
    assert answers == [(3, 5, 8), (2, 5, 8)]
    assert [wire.U64.unpack_from(heard, at)[0] for at in (12, 32)] == [1, 0]


def test_who_shouts_is_heard_now_and_then(back: BackEnd) -> None:
    """A flood of changes costs a bounded number of exchanges."""
    with ExitStack() as stack:
        rig = Rig(device(back), "mmio", backing="memfd")
        stack.callback(rig.close)
        rig.driver.start()
        begin = time.monotonic()
        before = back.requests().count(wire.GET_CONFIG)

        def shout() -> None:
            assert back._channel is not None
            back._channel.setblocking(False)
            try:
                for _ in range(2000):
                    back._channel.send(channel_message(2))
            except BlockingIOError:
                return

        def heard() -> bool:
            back.call(shout)
            return back.requests().count(wire.GET_CONFIG) > before + 2

        wait_for(heard)
        reads = back.requests().count(wire.GET_CONFIG) - before
        assert reads <= 2 + 51 * (time.monotonic() - begin)


def test_interrupts_without_end_harm_nobody(back: BackEnd) -> None:
    """It makes the descriptor it may signal blocking, empties it, and fills it."""
    with ExitStack() as stack:
        rig = Rig(device(back), "mmio", backing="memfd")
        stack.callback(rig.close)
        rig.driver.start()
        assert rig.driver.queues[0].request([b"12"], [2]) == (2, b"21")

        def abuse() -> None:
            fd = back.rings[0].call
            os.set_blocking(fd, True)
            for _ in range(100):
                os.eventfd_write(fd, 1)
                os.eventfd_read(fd)
            os.eventfd_write(fd, 2**64 - 2)

        back.call(abuse)
        rig.settle()
        assert rig.driver.queues[1].request([b"12"], [2]) == (2, b"21")
        back.lies[wire.GET_FEATURES] = lambda body: reply(wire.GET_FEATURES, b"")
        back.die()
        rig.until_broken()


def test_protocol_features_that_nobody_offered_are_not_taken(back: BackEnd) -> None:
    back.protocol = (1 << 64) - 1
    back.lies[wire.SET_PROTOCOL_FEATURES] = lambda body: None
    device(back).close()
    body = next(body for request, body in back.told if request == wire.SET_PROTOCOL_FEATURES)
    assert wire.U64.unpack(body)[0] == vhost_backend.EVERYTHING
