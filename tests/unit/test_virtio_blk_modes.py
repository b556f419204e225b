"""Queues, discards, caches and block sizes of a disk, on both transports and with both engines.
virtio-v1.3 §5.2."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.blk_requests import (
    CANARY,
    DISCARD,
    F_FLUSH,
    FLUSH,
    IN,
    IOERR,
    OK,
    OUT,
    SECTORS,
    UNSUPP,
    ZERO,
    Disk,
    Make,
    Request,
    header,
    pattern,
    read,
    segment,
    write,
)
from tests.virtio_rig import RAM
from vmm.devices.virtio.blk import Blk

F_BITS = {"config-wce": 11, "mq": 12, "discard": 13, "write-zeroes": 14}
WRITEBACK, NUM_QUEUES, MAX_SEGMENTS, SECTOR_ALIGNMENT, MAX_ZEROES = 32, 34, 40, 44, 48


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(pattern(0, SECTORS))
    return path


@pytest.fixture(
    params=["mmio-threads-split", "pci-uring-split", "mmio-uring-packed", "pci-threads-packed"]
)
def make(request: pytest.FixtureRequest, image: Path) -> Iterator[Make]:
    transport, engine, ring = request.param.split("-")
    made = []

    def build(*, start: bool = True, **options: Any) -> Disk:
        disk = Disk(image, transport, packed=ring == "packed", uring=engine == "uring", **options)
        made.append(disk)
        if disk.blk.engine != engine:
            pytest.skip("io_uring is not allowed here")
        if start:
            disk.driver.start()
        return disk

    yield build
    for disk in made:
        disk.close()


def has(rig: Disk, feature: str) -> bool:
    return bool(rig.regs.features() >> F_BITS[feature] & 1)


# ---- queues ------------------------------------


@pytest.mark.parametrize("placement", ["shared", "device", "queue"])
def test_every_queue_serves(make: Make, placement: str) -> None:
    before = len(list(Path("/proc/self/task").iterdir()))
    rig = make(queues=4, placement=placement)
    threads = {"shared": 0, "device": 1, "queue": 4}[placement]
    if rig.blk.engine == "threads":
        assert len(list(Path("/proc/self/task").iterdir())) == before + 1 + threads
    assert has(rig, "mq")
    assert rig.regs.config(NUM_QUEUES, 2) == 4
    assert len(rig.driver.queues) == 4
    for turn in range(10):
        heads = []
        for q in rig.driver.queues.values():
            for i in range(8):
                sector = turn * 100 + q.index * 20 + i
                heads.append((q, q.add([header(IN, sector)], [512, 1]), sector))
        for q in rig.driver.queues.values():
            q.kick()
        want = {(q.index, head): sector for q, head, sector in heads}
        for q in rig.driver.queues.values():
            for _ in range(8):
                head, _, data = q.wait()
                assert data == pattern(want.pop((q.index, head))) + b"\0"
        assert not want
        rig.driver.next = 0x8_0000
    assert rig.blk.stats()["reads"] == 320


def test_one_queue_is_not_called_many(make: Make) -> None:
    rig = make()
    assert not has(rig, "mq")
    assert rig.regs.config(NUM_QUEUES, 2) == 1


def test_a_queue_for_each_vcpu_up_to_four(image: Path) -> None:
    for cpus, queues in ((1, 1), (3, 3), (64, 4)):
        disk = Blk(str(image), cpus=cpus)
        assert len(disk.QUEUE_SIZES) == queues
        disk.close()
    disk = Blk(str(image), cpus=1, queues=7)
    assert len(disk.QUEUE_SIZES) == 7
    disk.close()


def test_queues_the_driver_leaves_alone(make: Make) -> None:
    rig = make(queues=4, start=False)
    rig.driver.start(2)
    assert read(rig.driver.queues[1], 7) == pattern(7)
    rig.driver.reset()
    rig.driver.start()
    assert read(rig.driver.queues[3], 9) == pattern(9)


def test_one_queue_is_reset_and_the_others_go_on(make: Make) -> None:
    """With a request held on it; the cache stays as the driver set it. virtio-v1.3 §2.6.1."""
    rig = make(queues=2)
    rig.regs.set_config(WRITEBACK, 1, 0)
    rig.blk.set_limits(bps=1, bps_burst=1)
    first, second = rig.driver.queues[0], rig.driver.queues[1]
    assert read(first, 1) == pattern(1)
    second.add([header(IN, 5)], [512, 1])
    second.kick()
    rig.until(lambda: rig.blk.stats()["throttled"] >= 1, "the queue waits")
    assert rig.regs.reset_queue(1)
    rig.blk.set_limits()
    assert read(first, 2) == pattern(2)
    assert rig.regs.config(WRITEBACK, 1) == 0
    again = rig.driver.setup_queue(1)
    assert read(again, 3) == pattern(3)
    assert read(first, 4) == pattern(4)


def test_reset_with_requests_in_flight_on_every_queue(make: Make, image: Path) -> None:
    """Afterwards nothing is written to guest memory."""
    rig = make(queues=3, placement="queue", cache="none", start=False)
    driver = rig.driver
    rings, buffers = 0x1_0000, 0x4_0000
    for turn in range(20):
        driver.next = rings
        driver.start()
        driver.next = buffers
        for q in driver.queues.values():
            for i in range(12):
                driver.next = (driver.next + 0x1FFF) // 0x1000 * 0x1000 - 16  # data on a page
                if turn & 1:
                    q.add([header(OUT, 50 + i), b"w" * 512], [1])
                elif i == 5:
                    q.add([header(ZERO), segment(100, 8)], [1])
                else:
                    q.add([header(IN, i)], [4096, 1])
            q.kick()
        driver.reset()
        rig.memory.write(rings, bytes(buffers - rings))
        rig.memory.write(buffers, bytes([CANARY]) * (RAM - buffers))
        time.sleep(0.001)
        rest = rig.memory.read(buffers, RAM - buffers)
        assert rest == bytes([CANARY]) * len(rest)
    driver.next = rings
    driver.start()
    assert read(driver.queues[2], 0) == pattern(0)
    assert image.stat().st_size == 512 * SECTORS


# ---- DISCARD and WRITE_ZEROES ------------------------------------


def blocks(path: Path) -> int:
    """512-byte blocks the host has given the file."""
    with path.open("rb") as f:
        os.fsync(f.fileno())
    return path.stat().st_blocks


@pytest.mark.parametrize("cache", ["writeback", "none", "writethrough", "directsync"])
def test_discard_frees_blocks(make: Make, image: Path, cache: str) -> None:
    rig = make(cache=cache)
    q = rig.driver.queues[0]
    assert has(rig, "discard")
    before = blocks(image)
    segments = segment(64, 256) + segment(1024, 512)
    r = Request(q, [header(DISCARD), segments], [1])
    assert (r.status, r.length) == (OK, 1)
    assert blocks(image) <= before - 768 + 32
    assert read(q, 63, 2) == pattern(63) + bytes(512)
    assert read(q, 319, 2) == bytes(512) + pattern(320)
    assert image.stat().st_size == 512 * SECTORS
    assert rig.blk.stats()["discards"] == 1


@pytest.mark.parametrize("unmap", [0, 1])
def test_write_zeroes(make: Make, image: Path, unmap: int) -> None:
    rig = make()
    q = rig.driver.queues[0]
    before = blocks(image)
    r = Request(q, [header(ZERO)[:7], header(ZERO)[7:] + segment(8, 1024, unmap)], [1])
    assert (r.status, r.length) == (OK, 1)
    assert read(q, 7, 2) == pattern(7) + bytes(512)
    assert read(q, 1031, 2) == bytes(512) + pattern(1032)
    whole = pattern(0, 8) + bytes(512 * 1024) + pattern(1032, SECTORS - 1032)
    assert image.read_bytes() == whole
    if unmap:
        assert blocks(image) <= before - 1024 + 32
    else:
        assert blocks(image) >= before
    assert rig.blk.stats()["zeroes"] == 1


def test_zeros_where_the_file_system_has_no_way(make: Make, image: Path) -> None:
    """tmpfs has holes and no FALLOC_FL_ZERO_RANGE: zeros are written."""
    shm = Path(f"/dev/shm/vmm-test-{os.getpid()}")
    shm.write_bytes(pattern(0, SECTORS))
    image.unlink()
    image.symlink_to(shm)
    try:
        rig = make()
        q = rig.driver.queues[0]
        assert Request(q, [header(ZERO), segment(1, SECTORS - 2)], [1]).status == OK
        assert shm.read_bytes() == pattern(0) + bytes(512 * (SECTORS - 2)) + pattern(SECTORS - 1)
    finally:
        shm.unlink()


@pytest.mark.parametrize("kind", [DISCARD, ZERO])
@pytest.mark.parametrize(
    ("segments", "status"),
    [
        (b"", IOERR),
        (segment(0, 8)[:15], IOERR),
        (segment(0, 8) + b"x", IOERR),
        (segment(0, 1) * 33, IOERR),
        (b"\xff" * 4096, IOERR),
        (segment(SECTORS, 1), IOERR),
        (segment(SECTORS - 1, 2), IOERR),
        (segment(SECTORS + 1, 0), IOERR),
        (segment((1 << 64) - 1, 2), IOERR),
        (segment(1 << 55, 1), IOERR),
        (segment(0, (1 << 32) - 1), IOERR),
        (segment(0, (1 << 21) + 1), IOERR),
        (segment(0, 1, 2), UNSUPP),
        (segment(0, 1, 1 << 31), UNSUPP),
        (segment(0, 8) + segment(SECTORS, 1), IOERR),
        (segment(0, 8) + segment(0, 1, 4), UNSUPP),
    ],
)
def test_segments_that_are_refused(
    make: Make, image: Path, kind: int, segments: bytes, status: int
) -> None:
    """None is acted upon when one is wrong."""
    rig = make()
    r = Request(rig.driver.queues[0], [header(kind) + segments], [1])
    assert (r.status, r.length) == (status, 1)
    assert image.read_bytes() == pattern(0, SECTORS)


def test_segments_that_are_allowed(make: Make, image: Path) -> None:
    rig = make()
    q = rig.driver.queues[0]
    assert rig.regs.config(MAX_SEGMENTS, 4) == 32
    assert rig.regs.config(SECTOR_ALIGNMENT, 4) == 8
    assert rig.regs.config(MAX_ZEROES, 4) == 1 << 21
    many = b"".join(segment(2 * i, 1) for i in range(32))
    assert Request(q, [header(ZERO), many], [1]).status == OK
    assert image.read_bytes()[: 512 * 64] == b"".join(
        bytes(512) + pattern(2 * i + 1) for i in range(32)
    )
    assert Request(q, [header(ZERO), segment(SECTORS, 0)], [1]).status == OK
    assert Request(q, [header(DISCARD), segment(5, 1, 1)], [1]).status == UNSUPP


def test_a_read_only_disk_discards_nothing(make: Make, image: Path) -> None:
    rig = make(read_only=True)
    assert not has(rig, "discard")
    assert not has(rig, "write-zeroes")
    for kind in (DISCARD, ZERO):
        assert Request(rig.driver.queues[0], [header(kind), segment(0, 8)], [1]).status == IOERR
    assert image.read_bytes() == pattern(0, SECTORS)


def test_discard_can_be_left_out(make: Make, image: Path) -> None:
    rig = make(discard=False)
    assert not has(rig, "discard")
    for kind in (DISCARD, ZERO):
        assert Request(rig.driver.queues[0], [header(kind), segment(0, 8)], [1]).status == UNSUPP
    assert image.read_bytes() == pattern(0, SECTORS)


# ---- caches ------------------------------------


def dirty(path: Path) -> bool:
    """Whether anything of the file is in the page cache and not on the disk: cachestat(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as f:
        span, out = (ctypes.c_uint64 * 2)(0, 0), (ctypes.c_uint64 * 5)()
        if libc.syscall(451, f.fileno(), span, out, 0):
            pytest.skip(f"cachestat: {os.strerror(ctypes.get_errno())}")
    return bool(out[1] + out[2])


@pytest.mark.parametrize("cache", ["writeback", "none", "writethrough", "directsync"])
def test_what_is_on_the_disk_when_a_write_ends(make: Make, image: Path, cache: str) -> None:
    rig = make(cache=cache)
    q = rig.driver.queues[0]
    with image.open("rb") as f:
        os.fsync(f.fileno())
    assert not dirty(image)
    data = os.urandom(4096)
    for sector in (64, 640):
        rig.driver.next = 0x10_0000 - 16
        assert write(q, sector, data) == OK
    assert read(q, 64, 8) == data
    assert dirty(image) == (cache == "writeback")
    assert Request(q, [header(FLUSH)], [1]).status == OK
    assert not dirty(image)
    assert image.read_bytes()[64 * 512 : 72 * 512] == data


@pytest.mark.parametrize("cache", ["writeback", "writethrough"])
def test_the_driver_switches_the_cache(make: Make, image: Path, cache: str) -> None:
    """virtio-v1.3 §5.2.5.2; a reset puts back what the user chose."""
    rig = make(cache=cache)
    q = rig.driver.queues[0]
    chosen = int(cache == "writeback")
    assert has(rig, "config-wce")
    assert rig.regs.config(WRITEBACK, 1) == chosen
    with image.open("rb") as f:
        os.fsync(f.fileno())
    rig.regs.set_config(WRITEBACK, 1, 1 - chosen)
    assert rig.regs.config(WRITEBACK, 1) == 1 - chosen
    assert write(q, 64, b"x" * 512) == OK
    assert dirty(image) == (not chosen)
    for offset, size in ((0, 8), (20, 4), (31, 2), (33, 1), (34, 2), (56, 1)):
        rig.regs.set_config(offset, size, (1 << 8 * size) - 1)
    assert rig.regs.config(0, 4) == SECTORS
    assert rig.regs.config(WRITEBACK, 1) == 1 - chosen
    rig.driver.reset()
    assert rig.regs.config(WRITEBACK, 1) == chosen
    rig.driver.start()
    assert rig.regs.config(WRITEBACK, 1) == chosen
    with image.open("rb") as f:
        os.fsync(f.fileno())
    assert write(rig.driver.queues[0], 640, b"x" * 512) == OK
    assert dirty(image) == bool(chosen)


def test_a_driver_that_cannot_flush_writes_through(make: Make, image: Path) -> None:
    rig = make(start=False)
    rig.driver.start(wanted=~F_FLUSH)
    with image.open("rb") as f:
        os.fsync(f.fileno())
    assert write(rig.driver.queues[0], 64, b"x" * 512) == OK
    assert Request(rig.driver.queues[0], [header(ZERO), segment(128, 8)], [1]).status == OK
    assert not dirty(image)


# ---- block size ------------------------------------


def test_blocks_of_4096_bytes(make: Make, image: Path) -> None:
    os.truncate(image, 512 * (SECTORS - 3))
    rig = make(block_size=4096)
    q = rig.driver.queues[0]
    assert rig.regs.config(20, 4) == 4096
    assert rig.regs.config(24, 1) == 0
    assert rig.regs.config(0, 4) == SECTORS  # the last block is part of one
    assert read(q, SECTORS - 8, 8) == pattern(SECTORS - 8, 5) + bytes(3 * 512)
    assert read(q, 8, 16) == pattern(8, 16)
    for sector, count in ((1, 8), (8, 1), (4, 4), (7, 9)):
        assert Request(q, [header(IN, sector)], [512 * count, 1]).status == IOERR
        assert write(q, sector, b"x" * 512 * count) == IOERR
        for kind in (DISCARD, ZERO):
            assert Request(q, [header(kind), segment(sector, count)], [1]).status == IOERR
    assert image.read_bytes() == pattern(0, SECTORS - 3)


def test_the_physical_block_is_a_page(make: Make) -> None:
    rig = make()
    assert rig.regs.config(20, 4) == 512
    assert rig.regs.config(24, 1) == 3
    assert rig.regs.config(26, 2) == 8
