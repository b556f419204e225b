"""A disk whose size, limits and luck change while it runs, on both transports and with both
engines."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.blk_requests import (
    IN,
    IOERR,
    OK,
    OUT,
    SECTORS,
    Disk,
    Make,
    Request,
    header,
    pattern,
    read,
    write,
)
from vmm.devices.virtio.blk import Blk
from vmm.errors import HostError


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


# ---- new sizes ------------------------------------


def test_a_disk_grows_and_shrinks(make: Make, image: Path) -> None:
    rig = make()
    q = rig.driver.queues[0]
    rig.regs.interrupts()
    before, generation = rig.irq.count, rig.regs.generation()
    assert rig.blk.resize((SECTORS + 16) * 512) == (SECTORS + 16) * 512
    assert rig.irq.count > before
    assert rig.regs.interrupts() & 2  # the configuration changed
    assert rig.regs.generation() != generation
    assert rig.regs.config(0, 4) == SECTORS + 16
    assert image.stat().st_size == (SECTORS + 16) * 512
    assert read(q, SECTORS + 15) == bytes(512)
    assert write(q, SECTORS + 15, b"n" * 512) == OK
    assert rig.blk.resize(SECTORS // 2 * 512) == SECTORS // 2 * 512
    assert rig.regs.config(0, 4) == SECTORS // 2
    assert image.stat().st_size == SECTORS // 2 * 512
    assert Request(q, [header(IN, SECTORS // 2)], [512, 1]).status == IOERR
    assert write(q, SECTORS // 2, b"x" * 512) == IOERR
    assert read(q, SECTORS // 2 - 1) == pattern(SECTORS // 2 - 1)


def test_a_size_that_somebody_else_changed(make: Make, image: Path) -> None:
    rig = make()
    os.truncate(image, 512 * (SECTORS + 1))
    assert rig.regs.config(0, 4) == SECTORS
    assert rig.blk.resize() == 512 * (SECTORS + 1)
    assert rig.regs.config(0, 4) == SECTORS + 1
    assert read(rig.driver.queues[0], SECTORS) == bytes(512)


def test_a_new_size_before_the_driver_starts(make: Make) -> None:
    rig = make(start=False)
    rig.blk.resize(512 * 3000)
    rig.driver.start()
    assert rig.regs.interrupts() & 2
    assert rig.regs.config(0, 4) == 3000


def test_a_read_only_disk_keeps_its_size(make: Make) -> None:
    rig = make(read_only=True)
    with pytest.raises(HostError, match="read-only"):
        rig.blk.resize(4096)


def test_sizes_that_cannot_be(make: Make, image: Path) -> None:
    rig = make()
    for size in (0, -1):
        with pytest.raises(HostError, match="cannot have"):
            rig.blk.resize(size)
    assert image.stat().st_size == SECTORS * 512


# ---- limits ------------------------------------


def test_what_is_over_the_limit_waits_and_a_new_limit_frees_it(make: Make) -> None:
    """A byte a second: the first request puts the disk into debt for minutes, on every queue."""
    rig = make(bps=1, bps_burst=1, queues=2)
    first, second = rig.driver.queues[0], rig.driver.queues[1]
    assert read(first, 1) == pattern(1)
    heads = [(q, q.add([header(IN, 7)], [512, 1])) for q in (first, second)]
    for q, _ in heads:
        q.kick()
    rig.until(lambda: rig.blk.stats()["throttled"] == 2, "both queues wait")
    assert first.take() is None
    assert second.take() is None
    rig.blk.set_limits()
    for q, head in heads:
        assert q.wait()[0] == head
    assert read(second, 9) == pattern(9)


def test_time_brings_more(make: Make) -> None:
    rig = make(iops=20, iops_burst=1)
    q = rig.driver.queues[0]
    for sector in range(5):
        assert read(q, sector) == pattern(sector)
    assert rig.blk.stats()["throttled"] >= 1


def test_a_burst_passes_at_once(make: Make) -> None:
    rig = make(iops=1, iops_burst=80)
    q = rig.driver.queues[0]
    for sector in range(64):
        assert read(q, sector) == pattern(sector)
    assert rig.blk.stats()["throttled"] == 0


def test_a_reset_does_not_wait_for_the_limit(make: Make) -> None:
    rig = make()
    rig.blk.set_limits(bps=1, bps_burst=1)
    q = rig.driver.queues[0]
    assert read(q, 1) == pattern(1)
    q.add([header(IN, 7)], [512, 1])
    q.kick()
    rig.until(lambda: rig.blk.stats()["throttled"] == 1, "the queue waits")
    rig.driver.reset()
    rig.blk.set_limits(iops=1000)
    rig.driver.start()
    assert read(rig.driver.queues[0], 2) == pattern(2)


def test_limits_set_before_the_machine_is(image: Path) -> None:
    blk = Blk(str(image))
    blk.set_limits(iops=5)
    blk.close()
    blk.set_limits()


def test_limits_that_are_none(make: Make) -> None:
    rig = make()
    with pytest.raises(ValueError, match="limits"):
        rig.blk.set_limits(-1)
    with pytest.raises(ValueError, match="limits"):
        rig.blk.set_limits(iops=1 << 62)


# ---- errors of the host ------------------------------------


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """RLIMIT_FSIZE: writes past it are EFBIG, and a signal that is not for us."""
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)


class Hook:
    """What on_io_error was told."""

    def __init__(self, rig: Disk) -> None:
        self.told: list[int] = []
        self.event = threading.Event()
        rig.blk.on_io_error = self

    def __call__(self, disk: Blk, error: int) -> None:
        self.told.append(error)
        self.event.set()

    def wait(self) -> int:
        assert self.event.wait(10)
        self.event.clear()
        return self.told[-1]


@pytest.mark.parametrize("cache", ["writeback", "none", "directsync"])
def test_writes_wait_until_the_host_can(make: Make, image: Path, cache: str) -> None:
    rig = make(werror="pause", cache=cache)
    hook = Hook(rig)
    q = rig.driver.queues[0]
    data = os.urandom(8192)
    rig.driver.next = 0x10_0000 - 16
    with files_end_at(512 * 16):
        head = q.add([header(OUT, 8), data], [1])  # the first half is below the limit
        q.kick()
        assert hook.wait() == errno.EFBIG
        assert q.take() is None
        assert rig.blk.stats()["held"] == 1
        assert read(q, 100) == pattern(100)  # others go on
        rig.blk.retry()
        assert hook.wait() == errno.EFBIG
        assert q.take() is None
    rig.blk.retry()
    assert q.wait()[:2] == (head, 1)
    assert rig.blk.stats()["held"] == 0
    assert rig.blk.stats()["errors"] == 0
    assert image.read_bytes() == pattern(0, 8) + data + pattern(24, SECTORS - 24)


def test_reads_wait_until_the_file_is_whole(make: Make, image: Path) -> None:
    rig = make(rerror="pause", queues=2)
    hook = Hook(rig)
    os.truncate(image, 512 * 10)
    head = rig.driver.queues[1].add([header(IN, 8)], [512 * 4, 1])
    rig.driver.queues[1].kick()
    assert hook.wait() == errno.EIO
    image.write_bytes(pattern(0, SECTORS))
    rig.blk.retry()
    got, length, data = rig.driver.queues[1].wait()
    assert (got, length) == (head, 512 * 4 + 1)
    assert data == pattern(8, 4) + b"\0"


def test_a_reset_forgets_what_is_held(make: Make) -> None:
    rig = make(werror="pause")
    hook = Hook(rig)
    q = rig.driver.queues[0]
    with files_end_at(4096):
        q.add([header(OUT, 64), b"x" * 512], [1])
        q.kick()
        hook.wait()
        rig.driver.reset()
        assert rig.blk.stats()["held"] == 0
    rig.blk.retry()
    rig.driver.start()
    assert read(rig.driver.queues[0], 64) == pattern(64)


def test_errors_that_are_ignored(make: Make, image: Path) -> None:
    rig = make(werror="ignore", rerror="ignore")
    q = rig.driver.queues[0]
    with files_end_at(4096):
        assert write(q, 64, b"x" * 512) == OK
    assert read(q, 64) == pattern(64)
    os.truncate(image, 512 * 10)
    assert read(q, 8, 4) == pattern(8, 2) + bytes(1024)


def test_enospc_pauses_and_the_rest_is_reported(make: Make) -> None:
    rig = make(werror="enospc")
    hook = Hook(rig)
    with files_end_at(4096):
        assert write(rig.driver.queues[0], 64, b"x" * 512) == IOERR
    assert not hook.told


# ---- where io_uring is forbidden ------------------------------------


FORBIDDEN = """
import ctypes, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
steps = [(0x20, 0, 0, 0), (0x15, 0, 1, 425), (0x06, 0, 0, 0x50001), (0x06, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *step) for step in steps))
program = ctypes.create_string_buffer(struct.pack("<HxxxxxxQ", 4, ctypes.addressof(code)))
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, program, 0, 0) == 0, ctypes.get_errno()
from pathlib import Path
from tests.blk_requests import Disk, FLUSH, OK, Request, header, pattern, read, write
rig = Disk(Path(sys.argv[1]), "mmio", queues=2)
assert rig.blk.engine == "threads", rig.blk.engine
rig.driver.start()
q = rig.driver.queues[1]
assert read(q, 3, 9) == pattern(3, 9)
assert write(q, 5, b"n" * 512) == OK
assert Request(q, [header(FLUSH)], [1]).status == OK
rig.close()
"""


def test_seccomp_without_io_uring(image: Path) -> None:
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", FORBIDDEN, str(image)], cwd=root, check=True, timeout=60)
    assert image.read_bytes() == pattern(0, 5) + b"n" * 512 + pattern(6, SECTORS - 6)
