"""What hostile guests have done to other monitors (rows of a table of CVE classes), against every
virtio device, on both transports and in both ring formats. Whole sessions are in tests/fuzz."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.fuzz.__main__ import fds, resident_mib
from tests.fuzz.executor import RAM, InProcess
from tests.fuzz.session import Session
from tests.fuzz.targets import Target, targets
from tests.unit.test_virtio_ring import BROKEN, BROKEN_PACKED
from tests.virtio_mock import (
    ACKNOWLEDGE,
    DRIVER,
    DRIVER_OK,
    FEATURES_OK,
    NEEDS_RESET,
    VERSION_1,
    PciRegs,
)
from tests.virtio_ring import EVENT_IDX, INDIRECT, PACKED, RINGS, DriverRing, PackedRing

TARGETS = targets()
CASES = [(name, transport) for name in TARGETS for transport in ("mmio", "pci")]
BUF = 0x1_0000
ALL = (1 << 64) - 1
GOOD = ACKNOWLEDGE | DRIVER | FEATURES_OK


class Bench:
    """One device, and a driver that does as it is told."""

    def __init__(self, name: str, transport: str, scratch: Path) -> None:
        self.target: Target = TARGETS[name]
        self.executor = InProcess(self.target.make(scratch), transport)
        self.memory, self.regs = self.executor.memory, self.executor.regs
        self.queues = range(len(self.executor.sizes))

    def start(self, queue: int, form: str, *, wanted: int = ALL, size: int = 8) -> DriverRing:
        """The device with one queue, which is still empty."""
        regs = self.regs
        regs.status = 0
        assert regs.status == 0
        regs.status = ACKNOWLEDGE | DRIVER
        features = regs.features() & wanted & ~PACKED | RINGS[form].FEATURES | VERSION_1
        regs.accept(features)
        regs.status = GOOD
        assert regs.status == GOOD
        ring = RINGS[form](self.memory, size)
        regs.set_queue(queue, ring.size, ring.desc, ring.avail, ring.used)
        assert regs.enable(queue)
        regs.status = GOOD | DRIVER_OK
        self.executor.settle()
        return ring

    def go(self, queue: int) -> None:
        self.regs.notify(queue)
        for _ in range(3):
            self.executor.settle()

    def sane(self) -> None:
        assert self.regs.status & ~NEEDS_RESET in (0, GOOD | DRIVER_OK)

    def works(self) -> None:
        """Good sessions go through; a session looks at its answers itself."""
        for nr in range(12):
            session = Session(self.executor, self.target, Random(nr))
            if not session.void:
                session.good_case()
            session.end()

    def until_broken(self, queue: int) -> tuple[int, str]:
        deadline = time.monotonic() + 10
        while not self.executor.broken() and time.monotonic() < deadline:
            self.executor.settle()
        assert self.executor.broken()
        return self.executor.breaks(queue)


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case))
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    name, transport = request.param
    bench = Bench(name, transport, tmp_path)
    yield bench
    bench.executor.close()


@pytest.fixture(params=sorted(RINGS))
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def chains_that_break(form: str) -> list[tuple[str, int, Callable[[Any], None]]]:
    if form == "packed":
        return [case for case in BROKEN_PACKED if not case[1]]
    return [(verdict, 0, spoil) for verdict, spoil in BROKEN if verdict != "head_inflight"]


def test_rows_1_to_5_chains_that_make_no_sense(bench: Bench, form: str) -> None:
    """Loops, empty buffers, lengths and addresses past the end, tables in tables (rows 1 to 5, 15):
    each of them, on each queue; then the device is reset and works."""
    for queue in bench.queues:
        for verdict, _, spoil in chains_that_break(form):
            ring = bench.start(queue, form, wanted=INDIRECT | EVENT_IDX)
            if bench.executor.broken():
                continue  # a queue of a feature that was not accepted
            before, _ = bench.executor.breaks(queue)
            spoil(ring)
            image = bench.memory.read(0, RAM)
            bench.go(queue)
            if queue in bench.target.answers:
                assert bench.until_broken(queue) == (before + 1, verdict)
            bench.sane()
            bench.regs.status = 0
            now = bytearray(bench.memory.read(0, RAM))
            for gpa, size in ring.device_writes:
                now[gpa : gpa + size] = image[gpa : gpa + size]
            assert now == image
    bench.works()


def test_row_6_queues_and_notifications_that_are_not_there(bench: Bench, form: str) -> None:
    bench.start(0, form)
    count = len(bench.queues)
    for value in (count, count + 1, 255, 256, 1023, 0x7FFF, 0xFFFF):
        if isinstance(bench.regs, PciRegs):
            bench.regs.bus.write(bench.regs.places[2] + 4 * value % 0x1000, 2, value)
        else:
            bench.regs.notify(value)
        assert bench.regs.queue_max(value) == 0
        bench.regs.set_queue(value, 8, 0x1000, 0x2000, 0x3000)
        assert not bench.regs.enable(value)
        assert not bench.regs.reset_queue(value) or value >= count
    bench.executor.settle()
    bench.sane()
    bench.works()


def test_row_7_and_16_rewritten_while_it_is_read(bench: Bench, form: str) -> None:
    """Indices and descriptors that another thread changes all the time."""
    for queue in bench.queues:
        ring = bench.start(queue, form, size=8)
        stop = threading.Event()

        def flip(ring: DriverRing = ring, stop: threading.Event = stop) -> None:
            r = Random(1)
            while not stop.is_set():
                flags = r.getrandbits(3) | r.choice((0, 1 << 7, 1 << 15))
                addr = r.choice((BUF, RAM - 8, 0x1000, 1 << 40))
                ring.set_desc(r.randrange(8), addr, r.choice((0, 8, 512)), flags, r.randrange(9))
                bench.memory.write_int(ring.avail, r.getrandbits(32), 4)

        thread = threading.Thread(target=flip)
        thread.start()
        try:
            for _ in range(60):
                bench.regs.notify(queue)
                bench.executor.settle()
                if bench.executor.broken():
                    bench.regs.status = 0
                    ring = bench.start(queue, form, size=8)
        finally:
            stop.set()
            thread.join()
        bench.sane()
    bench.works()


def test_row_8_a_head_offered_twice(bench: Bench, form: str) -> None:
    """Whether the device still holds it or not: it comes back at most as often as it was offered,
    or the queue is broken."""
    for queue in bench.queues:
        ring = bench.start(queue, form, size=16)
        if bench.executor.broken():
            continue
        sent, room = bench.target.request(queue, Random(2))
        head = ring.place([(BUF, len(sent))] if sent else [], [(BUF + 4096, room)] if room else [])
        bench.memory.write(BUF, sent)
        ring.publish(head)
        ring.publish(head)
        ring.publish(head)
        bench.go(queue)
        bench.sane()
        if bench.executor.broken():
            assert bench.executor.breaks(queue)[1] in ("head_inflight", "request", "len_zero")
        if isinstance(ring, PackedRing):
            done = len(ring.used_entries())
        else:
            done = bench.memory.read_int(ring.used + 2, 2)
        assert done <= 3
    bench.works()


def test_row_9_a_queue_that_was_enabled_stays(bench: Bench, form: str) -> None:
    for queue in bench.queues:
        ring = bench.start(queue, form)
        broken = bench.executor.broken()
        regs, refused = bench.regs, bench.executor.rig.core.refused
        for value in (0, 1, 3, 0xFFFF):
            regs.set_queue(queue, value, value, value, value)
            regs.enable(queue)
        assert bench.executor.rig.core.refused > refused
        assert bench.executor.broken() is broken
        if queue in bench.target.answers:
            sent, room = bench.target.request(queue, Random(5))
            bench.memory.write(BUF, sent)
            ring.add([(BUF, len(sent))] if sent else [], [(BUF + 4096, room)] if room else [])
            bench.go(queue)
            bench.sane()
    bench.works()


def test_row_10_the_configuration_space_ends(bench: Bench) -> None:
    bench.start(0, "split")
    length = len(bench.executor.device.config)
    regs = bench.regs
    end = 0xE00 if not isinstance(regs, PciRegs) else 0x1000
    offsets = [*range(length + 9), end - 8, end - 4]
    if isinstance(regs, PciRegs) and 4 not in regs.places:
        assert not length
        return
    for size in (1, 2, 4, 8):
        for offset in offsets:
            value = regs.config(offset, size)
            if offset >= length:
                assert value == 0
            regs.set_config(offset, size, (1 << (8 * size)) - 1)
    assert len(bench.executor.device.config) == length
    bench.executor.settle()
    bench.sane()
    bench.works()


def test_row_12_any_features_and_any_length(bench: Bench) -> None:
    """Each feature by itself, all and none, with requests of every length that is near one of a
    header, in one buffer and in bytes."""
    regs = bench.regs
    regs.status = 0
    offered = regs.features()
    some = [1 << bit for bit in range(64) if offered >> bit & 1]
    some = [bit for bit in some if bit not in (VERSION_1, PACKED)]
    for wanted in (0, ALL, *some, *(ALL ^ bit for bit in some)):
        for queue in bench.queues:
            ring = bench.start(queue, "split", wanted=wanted, size=16)
            if bench.executor.broken():
                continue
            for length in (1, 2, 9, 10, 11, 12, 13, 15, 16, 17, 43, 44, 45, 64):
                sent, room = bench.target.request(queue, Random(length))
                bench.memory.write(BUF, sent.ljust(64, b"\0"))
                writable = [(BUF + 4096, room)] if room else []
                ring.add([(BUF, length)], writable)
                bench.regs.notify(queue)
                bench.executor.settle()
                if bench.executor.broken():
                    assert bench.executor.breaks(queue)[1] == "request"
                ring = bench.start(queue, "split", wanted=wanted, size=16)
    bench.sane()
    bench.works()


def values_that_lie(sent: bytes) -> Iterator[bytes]:
    """A request with its first byte, then each byte of its header, as it should not be."""
    for value in range(256):
        yield bytes((value,)) + sent[1:]
    for at in range(min(len(sent), 44)):
        for value in (0, 1, 0x7F, 0x80, 0xFF):
            yield sent[:at] + bytes((value,)) + sent[at + 1 :]


def test_rows_11_and_13_requests_that_lie(bench: Bench) -> None:
    """Every type, and counts, lengths and addresses in commands that are not true: each is answered
    as the device answers errors, or breaks the queue for that."""
    for queue in bench.target.answers:
        ring = bench.start(queue, "split", size=16)
        if bench.executor.broken():
            continue
        sent, room = bench.target.request(queue, Random(7))
        for request in values_that_lie(sent) if sent else ():
            bench.memory.write(BUF, request)
            ring.add([(BUF, len(request))], [(BUF + 4096, room)] if room else [])
            bench.regs.notify(queue)
            if bench.target.discards:  # the ring itself, it may be
                bench.executor.settle()
                ring = bench.start(queue, "split", size=16)
                continue
            while not bench.executor.broken() and ring.chains:
                bench.executor.settle()
                ring.reap()
            if bench.executor.broken():
                assert bench.executor.breaks(queue)[1] == "request"
                ring = bench.start(queue, "split", size=16)
    bench.works()


def test_row_14_nothing_but_the_answer_is_written(bench: Bench, form: str) -> None:
    """What used.len does not count is as the driver left it, but for a status at the end."""
    r = Random(8)
    for queue in bench.target.answers:
        for _ in range(25):
            ring = bench.start(queue, form, size=16)
            sent, room = bench.target.request(queue, r)
            if bench.executor.broken() or not room:
                continue
            bench.memory.write(BUF, sent)
            bench.memory.write(BUF + 8192, b"\xa5" * 8192)
            ring.add([(BUF, len(sent))] if sent else [], [(BUF + 8192, room)])
            bench.regs.notify(queue)
            done: list[tuple[int, int]] = []
            while not bench.executor.broken() and not done:
                bench.executor.settle()
                done = ring.reap()
            written = done[0][1] if done else 0
            end = room - int(bench.target.status)
            rest = bench.memory.read(BUF + 8192, 8192)
            assert rest[written:end].strip(b"\xa5") == b""
            assert rest[room:].strip(b"\xa5") == b""
    bench.works()


def test_row_17_a_device_does_no_dma_to_devices(bench: Bench, form: str) -> None:
    """Its own registers, and whatever else is not RAM, as buffer, table and queue."""
    regs = bench.regs
    places = [0xFEE0_0000, 0xFEC0_0000, 0xE000_0000, RAM, 1 << 33]
    places += regs.places.values() if isinstance(regs, PciRegs) else [regs.base, regs.base + 0x50]
    for queue in bench.target.answers:
        for place in places:
            ring = bench.start(queue, form, wanted=INDIRECT)
            if bench.executor.broken():
                continue
            for kind in ("readable", "writable", "indirect"):
                if kind == "indirect":
                    ring.lay([(place, 16, 4)])
                else:
                    ring.place(*(([(place, 8)], []) if kind == "readable" else ([], [(place, 8)])))
                ring.publish(next(reversed(ring.chains)))
                bench.go(queue)
                want = "indirect_addr" if kind == "indirect" else "addr"
                assert bench.until_broken(queue)[1] == want
                ring = bench.start(queue, form, wanted=INDIRECT)
    bench.start(0, form)
    regs.status = 0
    regs.status = ACKNOWLEDGE | DRIVER
    regs.accept(VERSION_1 | RINGS[form].FEATURES)
    regs.status = GOOD
    for place in places:
        regs.set_queue(0, 8, place & ~15, 0x1000, 0x2000)
        assert not regs.enable(0)
    bench.works()


def test_row_18_kicks_without_reaping(bench: Bench, form: str) -> None:
    """A driver that kicks and never looks: no more is taken than the queue holds, and neither
    memory nor descriptors grow."""
    used, files = resident_mib(), fds()
    for queue in bench.queues:
        ring = bench.start(queue, form, size=8)
        if bench.executor.broken():
            continue
        sent, room = bench.target.request(queue, Random(3))
        bench.memory.write(BUF, sent)
        parts = ([(BUF, len(sent))] if sent else [], [(BUF + 4096, room)] if room else [])
        for _ in range(8 // (bool(sent) + bool(room))):
            ring.add(*parts)
        for _ in range(1000):
            bench.regs.notify(queue)
        bench.executor.settle()
        bench.sane()
    assert fds() <= files + 2
    if "asan" not in os.environ.get("LD_PRELOAD", ""):
        assert resident_mib() - used < 8
    bench.works()


@pytest.mark.parametrize(
    "bench", [case for case in CASES if case[1] == "pci"], ids="-".join, indirect=True
)
def test_row_23_vectors_while_it_runs(bench: Bench, form: str) -> None:
    """Messages that move, are masked, do not exist, while there are requests."""
    regs = bench.regs
    assert isinstance(regs, PciRegs)
    r = Random(4)
    queue = (*bench.target.answers, 0)[0]
    for nr in range(120):
        if nr % 8 == 0:
            ring = bench.start(queue, form, wanted=INDIRECT | EVENT_IDX, size=16)
            ring.want_interrupts(True)
        regs.msix_control(r.choice((0, 0x8000, 0x8000, 0xC000)))
        regs.msix_entry(r.randrange(3), r.getrandbits(32), r.getrandbits(32), masked=nr & 1 == 0)
        asked = r.choice((0, 1, 2, 0x7FF, 0xFFFE, 0xFFFF))
        got = regs.vector(queue, asked)
        assert got in (asked, 0xFFFF)
        sent, room = bench.target.request(queue, r)
        bench.memory.write(BUF, sent)
        if sent or room:
            ring.add([(BUF, len(sent))] if sent else [], [(BUF + 4096, room)] if room else [])
        regs.notify(queue)
        if nr % 5 == 0:
            bench.executor.settle()
            ring.reap()
    bench.sane()
    regs.msix_control(0)
    bench.works()
