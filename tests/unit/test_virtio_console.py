"""virtio-console from the driver's side, with its stream and its input: virtio-v1.3 §5.3."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.virtio_rig import HIGH, TRANSPORTS, Rig
from vmm.chario import Input, Sink, Stream
from vmm.devices.virtio.console import Console

RX, TX = 0, 1
CAPACITY = 4096


class ConsoleRig(Rig):
    def __init__(self, transport: str) -> None:
        self.out = Stream(CAPACITY)
        self.inp = Input(CAPACITY)
        self.console = Console(self.out, self.inp)
        super().__init__(self.console, transport)

    def printed(self) -> bytes:
        return self.out.read(0)[1]

    def close(self) -> None:
        super().close()
        self.out.close()
        self.inp.close()


@pytest.fixture(params=TRANSPORTS)
def rig(request: pytest.FixtureRequest) -> Iterator[ConsoleRig]:
    rig = ConsoleRig(request.param)
    yield rig
    rig.close()


def test_order_is_kept(rig: ConsoleRig) -> None:
    rig.driver.start()
    q = rig.driver.queues[TX]
    want = b""
    for i in range(64 // 3):
        parts = [b"<%d" % i, b"," * (i + 1), b">"]
        want += b"".join(parts)
        q.add(parts, [])
    q.kick()
    for _ in range(64 // 3):
        assert q.wait()[1] == 0
    assert rig.printed() == want
    assert rig.console.sent == len(want)


def test_what_the_guest_reads(rig: ConsoleRig) -> None:
    rig.driver.start()
    q = rig.driver.queues[RX]
    for _ in range(8):
        q.add([], [16, 16])
    q.kick()
    assert rig.inp.push(b"hello") == 5
    assert q.wait()[1:] == (5, b"hello")
    data = bytes(range(100))
    rig.inp.push(data)
    got = b"".join(q.wait()[2] for _ in range(4))
    assert got == data
    assert rig.console.received == 105


def test_input_that_was_there_first(rig: ConsoleRig) -> None:
    rig.inp.push(b"typed ahead")
    rig.driver.start()
    assert rig.driver.queues[RX].request([], [64]) == (11, b"typed ahead")


def test_no_buffer_no_loss(rig: ConsoleRig) -> None:
    """What is typed faster than the guest reads waits, and nobody else does."""
    rig.driver.start()
    q = rig.driver.queues[RX]
    data = os.urandom(3 * CAPACITY)
    sent = 0
    got = b""
    while len(got) < len(data):
        sent += rig.inp.push(data[sent:])
        assert rig.inp.level <= CAPACITY
        got += q.request([], [1000])[1]
        rig.driver.next = 0x8_0000
    assert got == data


def test_writing_needs_no_other_thread(rig: ConsoleRig) -> None:
    """Linux spins until its few bytes are taken: they are, when the notification returns."""
    rig.driver.start()
    q = rig.driver.queues[TX]
    for i in range(200):
        head = q.add([b"%16d" % i], [])
        q.kick()
        assert q.take() == (head, 0, b"")
    assert rig.console.sent == 3200
    assert [queue for queue, _ in rig.core.eventfd_queues] == [RX]


def test_a_reader_that_stops_holds_the_guest_back(rig: ConsoleRig) -> None:
    """A full pipe: the guest's buffers stay in its ring; when the pipe moves, all arrives."""
    r, w = os.pipe()
    os.set_blocking(w, False)
    while True:  # no room in the pipe from the start
        try:
            os.write(w, b"\xff" * 4096)
        except BlockingIOError:
            break
    os.set_blocking(w, True)
    sink = Sink(rig.out, w)
    rig.driver.start()
    q = rig.driver.queues[TX]
    want = b""
    for i in range(60):
        part = bytes([i]) * 1000
        want += part
        q.add([part], [])
    q.kick()
    rig.until(lambda: q.used_idx >= 2, "the first chains")
    rig.settle()
    assert rig.out.total <= CAPACITY + 64 * 1024  # the ring, and what the sink holds
    assert q.used_idx < 60
    got = b""
    while len(got.lstrip(b"\xff")) < len(want):
        got += os.read(r, 65536)
    assert got.lstrip(b"\xff") == want
    for _ in range(60):
        q.wait()
    sink.close()
    os.close(r)
    os.close(w)


def test_a_reset_while_held_back(rig: ConsoleRig) -> None:
    r, w = os.pipe()
    sink = Sink(rig.out, w)
    for _ in range(20):
        rig.driver.start()
        q = rig.driver.queues[TX]
        for _ in range(40):
            q.add([b"z" * 3000], [])
        q.kick()
        rig.until(lambda q=q: q.used_idx > 0, "a chain")  # type: ignore[misc]
        rig.driver.reset()
        rig.driver.next = 0x1_0000
        rig.memory.write(0x1_0000, bytes(0x2_0000))
        while rig.out.total and not sink.flush(0):
            os.read(r, 65536)
    rig.driver.start()
    q = rig.driver.queues[TX]
    assert q.request([b"end"], [])[0] == 0
    sink.close()
    os.close(r)
    os.close(w)


def test_a_chain_of_many_gigabytes(rig: ConsoleRig) -> None:
    """The same buffers a thousand times over: served in turns, so that input still arrives."""
    rig.driver.start()
    q = rig.driver.queues[TX]
    for i in range(64):
        q.write_desc(i, HIGH, 1 << 20, 1 if i < 63 else 0, i + 1)
    q.pending[0] = ([], [])
    q.offer(0)
    q.kick()
    rx = rig.driver.queues[RX]
    rx.add([], [16])
    rx.kick()
    rig.inp.push(b"quick")
    assert rx.wait()[2] == b"quick"
    assert q.wait(timeout=30)[1] == 0
    assert rig.console.sent == 64 << 20


def test_receive_buffers_must_be_writable(rig: ConsoleRig) -> None:
    rig.driver.start()
    rig.inp.push(b"x")
    q = rig.driver.queues[RX]
    q.add([b"for you"], [])
    q.kick()
    rig.until_broken()
    rig.driver.reset()
    rig.driver.start()
    assert rig.driver.queues[RX].request([], [4]) == (1, b"x")


def test_transmit_buffers_are_not_written(rig: ConsoleRig) -> None:
    rig.driver.start()
    q = rig.driver.queues[TX]
    assert q.request([b"a"], [16]) == (0, b"")
    assert q.request([], [16]) == (0, b"")
    assert rig.printed() == b"a"


def test_emergency_write(rig: ConsoleRig) -> None:
    regs = rig.driver.regs
    for c in b"help!":
        regs.set_config(8, 4, c)
    assert rig.printed() == b"help!"


def test_size(rig: ConsoleRig) -> None:
    regs = rig.driver.regs
    assert (regs.config(0, 2), regs.config(2, 2)) == (80, 25)
    rig.driver.start()
    rig.console.resize(132, 50)
    assert regs.interrupts() & 2
    assert (regs.config(0, 2), regs.config(2, 2)) == (132, 50)
    rig.driver.reset()
    rig.console.resize(100, 40)
    rig.driver.start()
    assert (regs.config(0, 2), regs.config(2, 2)) == (100, 40)


def test_nothing_attached() -> None:
    console = Console(None)
    rig = Rig(console, "mmio")
    rig.driver.start()
    assert rig.driver.queues[TX].request([b"into the void"], []) == (0, b"")
    rig.driver.queues[RX].add([], [8])
    rig.driver.queues[RX].kick()
    rig.settle()
    assert rig.driver.queues[RX].take() is None
    rig.close()
