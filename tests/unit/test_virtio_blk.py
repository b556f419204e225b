"""virtio-blk from the driver's side: virtio-v1.3 §5.2."""

from __future__ import annotations

import ctypes
import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.blk_requests import (
    CANARY,
    DISCARD,
    F_FLUSH,
    F_RO,
    FLUSH,
    GET_ID,
    IN,
    IOERR,
    OK,
    OUT,
    SECTORS,
    UNSUPP,
    ZERO,
    Request,
    header,
    pattern,
    read,
    write,
)
from tests.virtio_mock import EVENT_IDX, INDIRECT_DESC, WRITE, Driver
from tests.virtio_rig import RAM, Rig
from vmm.devices.virtio.blk import QUEUE_SIZE, Blk

MakeRig = Callable[..., Rig]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(pattern(0, SECTORS))
    return path


@pytest.fixture(params=["mmio-threads", "pci-uring"])
def make(request: pytest.FixtureRequest, image: Path) -> Iterator[MakeRig]:
    rigs = []
    transport, engine = request.param.split("-")

    def build(**options: object) -> Rig:
        disk = Blk(str(image), uring=engine == "uring", **options)  # type: ignore[arg-type]
        rig = Rig(disk, transport)
        rigs.append(rig)
        if disk.engine != engine:
            pytest.skip("io_uring is not allowed here")
        return rig

    yield build
    for rig in rigs:
        rig.close()


@pytest.fixture
def rig(make: MakeRig) -> Rig:
    rig = make(serial="DISK-0001")
    rig.driver.start()
    return rig


def test_io_uring_is_used_where_it_is_allowed(image: Path) -> None:
    """io_uring_setup(2) of no entries: EINVAL where it is allowed, ENOSYS or EPERM elsewhere."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.syscall(425, 0, ctypes.create_string_buffer(256)) == -1
    rig = Rig(Blk(str(image)), "mmio")
    assert isinstance(rig.device, Blk)
    assert rig.device.engine == ("uring" if ctypes.get_errno() == errno.EINVAL else "threads")
    rig.close()


def test_what_the_driver_sees(rig: Rig) -> None:
    regs = rig.driver.regs
    assert regs.device_id() == 2
    assert regs.config(0, 4) | regs.config(4, 4) << 32 == SECTORS
    assert regs.config(12, 4) == QUEUE_SIZE - 2
    assert regs.config(20, 4) == 512
    assert regs.features() & (F_FLUSH | INDIRECT_DESC | EVENT_IDX | F_RO) == (
        F_FLUSH | INDIRECT_DESC | EVENT_IDX
    )
    assert regs.queue_max(0) == QUEUE_SIZE
    assert rig.device.unclaimed() is None


def test_reads(rig: Rig) -> None:
    q = rig.driver.queues[0]
    assert read(q, 0) == pattern(0)
    assert read(q, SECTORS - 1) == pattern(SECTORS - 1)
    assert read(q, 8, 128) == pattern(8, 128)


def test_writes_reach_the_file(rig: Rig, image: Path) -> None:
    q = rig.driver.queues[0]
    data = os.urandom(512 * 5)
    assert write(q, 100, data) == OK
    assert read(q, 100, 5) == data
    assert Request(q, [header(FLUSH)], [1]).status == OK
    whole = image.read_bytes()
    assert whole == pattern(0, 100) + data + pattern(105, SECTORS - 105)
    assert rig.device.stats()["flushes"] == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("indirect", [False, True])
def test_framing_is_the_drivers_choice(rig: Rig, indirect: bool) -> None:
    """virtio-v1.3 §2.7.4.2: no assumption on how a request is cut into buffers."""
    q = rig.driver.queues[0]
    h = header(IN, 3)
    r = Request(q, [h[:1], h[1:9], h[9:]], [1, 511, 1000, 25], indirect=indirect)
    assert (r.status, r.length) == (OK, 1537)
    assert r.data[:-1] == pattern(3, 3)
    data = os.urandom(1024)
    r = Request(q, [header(OUT, 7) + data[:3], data[3:700], data[700:]], [1], indirect=indirect)
    assert (r.status, r.length) == (OK, 1)
    assert read(q, 7, 2) == data


def test_the_longest_request(rig: Rig) -> None:
    q = rig.driver.queues[0]
    r = Request(q, [header(IN, 0)], [1024] * (QUEUE_SIZE - 2) + [1], indirect=True)
    assert r.status == OK
    assert r.data[:-1] == pattern(0, 2 * (QUEUE_SIZE - 2))


def test_id(rig: Rig) -> None:
    q = rig.driver.queues[0]
    r = Request(q, [header(GET_ID)], [20, 1])
    assert (r.status, r.length, r.data) == (OK, 21, b"DISK-0001".ljust(20, b"\0") + b"\0")
    r = Request(q, [header(GET_ID)], [5, 1])
    assert (r.status, r.length, r.data) == (OK, 6, b"DISK-\0")
    r = Request(q, [header(GET_ID)], [64, 1])
    assert (r.status, r.length) == (OK, 20)


@pytest.mark.parametrize(
    ("sector", "count"),
    [
        (SECTORS, 1),
        (SECTORS - 1, 2),
        (SECTORS + 1, 0),
        ((1 << 64) - 1, 1),
        ((1 << 64) - 1, 2),
        (1 << 55, 1),
        ((1 << 55) - 1, 2),
        (1 << 63, 8),
    ],
)
@pytest.mark.parametrize("kind", [IN, OUT])
def test_sectors_that_are_not_there(
    rig: Rig, image: Path, kind: int, sector: int, count: int
) -> None:
    q = rig.driver.queues[0]
    if kind == IN:
        r = Request(q, [header(IN, sector)], [512 * count, 1] if count else [1])
        assert r.length == (0 if count else 1)
    else:
        r = Request(
            q, [header(OUT, sector), b"x" * 512 * count] if count else [header(1, sector)], [1]
        )
        assert r.length == 1
    assert r.status == IOERR
    assert image.read_bytes() == pattern(0, SECTORS)
    assert read(q, 0) == pattern(0)


@pytest.mark.parametrize("size", [1, 511, 513, 1023])
def test_lengths_that_are_not_sectors(rig: Rig, image: Path, size: int) -> None:
    q = rig.driver.queues[0]
    assert Request(q, [header(IN)], [size, 1]).status == IOERR
    assert Request(q, [header(OUT), b"x" * size], [1]).status == IOERR
    assert image.read_bytes() == pattern(0, SECTORS)


def test_nothing_to_move(rig: Rig) -> None:
    q = rig.driver.queues[0]
    assert Request(q, [header(IN, SECTORS)], [1]).status == OK
    assert Request(q, [header(OUT, 0)], [1]).status == OK


@pytest.mark.parametrize(
    "kind",
    [k for k in range(32) if k not in (IN, OUT, FLUSH, GET_ID, DISCARD, ZERO)]
    + [1 << 31, 0xFFFFFFFF],
)
def test_types_that_are_not_ours(rig: Rig, kind: int) -> None:
    q = rig.driver.queues[0]
    for r in (
        Request(q, [header(kind), b"\xff" * 4096], [1]),
        Request(q, [header(kind)], [512, 1]),
        Request(q, [header(kind)], [1]),
    ):
        assert r.status == UNSUPP
    assert read(q, 0) == pattern(0)


@pytest.mark.parametrize(
    ("readable", "writable"),
    [
        ([header(IN)[:15]], [512, 1]),
        ([b"x"], [1]),
        ([], [512, 1]),
        ([header(IN)], []),
        ([header(OUT), b"x" * 512], []),
        ([header(FLUSH)], []),
    ],
)
def test_no_header_or_no_status_needs_a_reset(
    rig: Rig, readable: list[bytes], writable: list[int]
) -> None:
    q = rig.driver.queues[0]
    q.add(readable, writable)
    q.kick()
    rig.until_broken()
    assert q.take() is None
    (said,) = rig.device.faults()
    assert said.startswith("disk0: the driver broke queue 0 1 times, last: a chain that lacks")
    # After the reset everything works again.
    rig.driver.reset()
    assert not rig.broken
    rig.driver.start()
    assert read(rig.driver.queues[0], 5) == pattern(5)


def test_read_only(make: MakeRig, image: Path) -> None:
    image.chmod(0o444)
    rig = make(read_only=True)
    assert rig.driver.start() & F_RO
    q = rig.driver.queues[0]
    assert write(q, 0, b"x" * 512) == IOERR
    assert Request(q, [header(FLUSH)], [1]).status == OK
    assert read(q, 0) == pattern(0)
    assert image.read_bytes() == pattern(0, SECTORS)


def test_a_size_that_is_not_sectors_is_rounded_up(make: MakeRig, image: Path) -> None:
    with image.open("ab") as f:
        f.write(b"tail")
    rig = make()
    rig.driver.start()
    q = rig.driver.queues[0]
    assert rig.driver.regs.config(0, 4) == SECTORS + 1
    assert read(q, SECTORS - 1, 2) == pattern(SECTORS - 1) + b"tail".ljust(512, b"\0")
    assert write(q, SECTORS, b"y" * 512) == OK
    assert image.read_bytes() == pattern(0, SECTORS) + b"y" * 512


def test_a_file_that_shrank(rig: Rig, image: Path) -> None:
    os.truncate(image, 512 * 10)
    q = rig.driver.queues[0]
    r = Request(q, [header(IN, 8)], [512 * 4, 1])
    assert (r.status, r.length) == (IOERR, 1024)
    assert r.data == pattern(8, 2)
    assert write(q, 9, b"x" * 1024) == IOERR
    assert write(q, 1000, b"x" * 512) == IOERR
    assert write(q, 9, b"x" * 512) == OK
    assert image.read_bytes() == pattern(0, 9) + b"x" * 512
    assert rig.device.stats()["errors"] == 3  # type: ignore[attr-defined]
    os.truncate(image, 512 * SECTORS)
    assert write(q, 1000, b"x" * 512) == OK


def test_no_space_left(make: MakeRig, image: Path) -> None:
    """RLIMIT_FSIZE stands in for a full file system; the signal it brings is not for us."""
    import resource
    import signal

    os.truncate(image, 1 << 20)
    rig = make()
    rig.driver.start()
    q = rig.driver.queues[0]
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        assert write(q, 8, b"z" * 512) == IOERR
        assert write(q, 7, b"z" * 1024) == IOERR
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    assert write(q, 8, b"z" * 512) == OK


def test_without_flush_writes_are_synchronous(make: MakeRig) -> None:
    rig = make()
    rig.driver.start(wanted=~F_FLUSH)
    assert write(rig.driver.queues[0], 1, b"s" * 512) == OK
    assert read(rig.driver.queues[0], 1) == b"s" * 512


def test_around_the_page_cache(make: MakeRig, image: Path) -> None:
    """O_DIRECT with guest buffers of any alignment: what the disk cannot take goes the slow way."""
    rig = make(cache="none")
    rig.driver.start()
    q = rig.driver.queues[0]
    expect = bytearray(image.read_bytes())
    for turn, shift in enumerate([0, 16, 512, 4096, 48, 256] * 3):
        data = os.urandom(4096)
        sector = turn * 8 + turn % 3
        rig.driver.next = 0x2_0000 - 16 + shift  # the header's place; the data follow
        assert write(q, sector, data) == OK
        expect[sector * 512 : sector * 512 + 4096] = data
        rig.driver.next = 0x3_0000 - 16 + shift
        assert read(q, sector, 8) == data
        assert read(q, sector + 1, 3) == data[512:2048]
    assert Request(q, [header(FLUSH)], [1]).status == OK
    assert image.read_bytes() == bytes(expect)


def test_what_is_not_in_the_page_cache(rig: Rig, image: Path) -> None:
    """Reads that end later than they were submitted, beside flushes and in any order."""
    q = rig.driver.queues[0]
    for _ in range(10):
        with image.open("rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        heads: dict[int, bytes] = {}
        for i in range(30):
            sector = i * 67 % (SECTORS - 8)
            head = q.add([header(IN, sector)], [4096, 1], indirect=True)
            heads[head] = pattern(sector, 8) + b"\0"
        heads[q.add([header(FLUSH)], [1], indirect=True)] = b"\0"
        q.kick()
        while heads:
            head, length, data = q.wait()
            assert data == heads.pop(head)
            assert length == len(data)
        rig.driver.next = 0x8_0000


@pytest.mark.parametrize("wanted", [~0, ~EVENT_IDX, ~INDIRECT_DESC, ~(EVENT_IDX | INDIRECT_DESC)])
def test_many_requests_at_once(make: MakeRig, wanted: int) -> None:
    rig = make()
    rig.driver.start(wanted=wanted)
    q = rig.driver.queues[0]
    for turn in range(20):
        heads = {}
        for i in range(QUEUE_SIZE // 3):
            sector = (turn * 37 + i * 11) % SECTORS
            indirect = bool(i % 3 == 0 and wanted & INDIRECT_DESC)
            heads[q.add([header(IN, sector)], [512, 1], indirect=indirect)] = sector
        q.kick()
        while heads:
            head, length, data = q.wait()
            assert data == pattern(heads.pop(head)) + b"\0"
            assert length == 513
        rig.driver.next = 0x8_0000
    assert not rig.broken


def test_one_interrupt_for_a_batch(rig: Rig) -> None:
    q = rig.driver.queues[0]
    read(q, 0)
    assert rig.device.faults() == []
    rig.regs.interrupts()  # a level stays until then
    before = rig.irq.count
    for i in range(64):
        q.add([header(IN, i)], [512, 1])
    # The driver wants to hear when the last of them is done.
    q.memory.write_int(q.avail + 4 + 2 * q.size, (q.seen + 63) & 0xFFFF, 2)
    q.kick()
    for _ in range(64):
        q.wait()
    rig.until(lambda: rig.irq.count > before, "an interrupt")
    assert rig.irq.count == before + 1


@pytest.mark.parametrize("wanted", [~0, ~EVENT_IDX])
def test_an_idle_device_wants_to_be_kicked(make: MakeRig, wanted: int) -> None:
    rig = make()
    rig.driver.start(wanted=wanted)
    q = rig.driver.queues[0]
    for i in range(5):
        assert read(q, i) == pattern(i)
        if wanted & EVENT_IDX:
            event = q.used + 4 + 8 * q.size
            rig.until(
                lambda event=event: q.memory.read_int(event, 2) == q.avail_idx,  # type: ignore[misc]
                "avail_event",
            )
        else:
            rig.until(lambda: q.memory.read_int(q.used, 2) == 0, "kicks to be on")


def test_a_flood_of_kicks(rig: Rig) -> None:
    q = rig.driver.queues[0]
    for _ in range(100_000):
        q.kick()
    assert read(q, 9) == pattern(9)
    assert not rig.broken


def test_never_more_than_once_per_head(rig: Rig) -> None:
    """The same head twice, then everything after it is refused."""
    q = rig.driver.queues[0]
    head = q.add([header(IN, 1)], [512, 1])
    q.offer(q.size)  # not a descriptor
    q.kick()
    rig.until_broken()
    got = q.take()
    assert got is not None
    assert got[0] == head
    assert q.take() is None


@pytest.mark.parametrize("direct", [False, True])
def test_reset_in_flight(make: MakeRig, image: Path, direct: bool) -> None:
    """After a reset nothing is written to guest memory, and sector 0 keeps its contents. Around
    the page cache, requests take long enough to be in flight when the reset comes."""
    rig = make(cache="none" if direct else "writeback")
    driver = rig.driver
    driver.start()
    rings, buffers = 0x1_0000, 0x2_0000
    for turn in range(60):
        driver.next = buffers
        q = driver.queues[0]
        for i in range(40):
            driver.next = (driver.next + 0x1FFF) // 0x1000 * 0x1000 - 16  # data on a page
            if turn & 1:
                q.add([header(OUT, 50 + i), b"w" * 512], [1])
            else:
                q.add([header(IN, i)], [4096, 1])
        q.kick()
        time.sleep(0.0003 * (turn % 3))
        driver.reset()
        rig.memory.write(rings, bytes(buffers - rings))
        rig.memory.write(buffers, bytes([CANARY]) * (RAM - buffers))
        driver.next = rings
        driver.start()
        time.sleep(0.001)
        rest = rig.memory.read(buffers, RAM - buffers)
        assert rest == bytes([CANARY]) * len(rest)
    assert read(driver.queues[0], 0) == pattern(0)
    assert image.stat().st_size == 512 * SECTORS


def test_a_head_that_is_rewritten_while_it_runs(rig: Rig) -> None:
    """A second thread rewrites descriptors and headers: never more than an error."""
    import threading

    driver: Driver = rig.driver
    q = driver.queues[0]
    stop = threading.Event()

    def flip() -> None:
        i = 0
        while not stop.is_set():
            i += 1
            q.write_desc(1, RAM - 512 if i & 1 else RAM - 256, 512, WRITE | 1, 2)

    thread = threading.Thread(target=flip)
    thread.start()
    try:
        for _ in range(200):
            q.free = [0, 1, 2, *range(3, q.size)]
            q.add([header(IN, 1)], [512, 1])
            q.kick()
            rig.until(lambda q=q: rig.broken or q.used_idx != q.seen, "an answer")  # type: ignore[misc]
            if rig.broken:
                driver.reset()
                driver.next = 0x1_0000
                driver.start()
                q = driver.queues[0]
            else:
                assert q.take() is not None
                driver.next = 0x2_0000
    finally:
        stop.set()
        thread.join()
    driver.reset()
    driver.start()
    assert read(driver.queues[0], 4) == pattern(4)
