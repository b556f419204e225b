"""Disks on what only root can make: a block device, and a file system without room."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.blk_requests import (
    DISCARD,
    FLUSH,
    IN,
    IOERR,
    OK,
    SECTORS,
    ZERO,
    Disk,
    Request,
    header,
    pattern,
    read,
    segment,
    write,
)
from vmm.errors import HostError

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("losetup") is None, reason="needs root and losetup"
)

engines = pytest.mark.parametrize("uring", [True, False], ids=["uring", "threads"])


@pytest.fixture
def backing(tmp_path: Path) -> Path:
    path = tmp_path / "backing"
    path.write_bytes(pattern(0, SECTORS))
    return path


@pytest.fixture
def loop(backing: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A loop device with blocks of 512 bytes, or as parametrised."""
    block = getattr(request, "param", 512)
    argv = ["losetup", "-f", "--show", "-b", str(block), str(backing)]
    made = subprocess.run(argv, capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"losetup: {made.stderr.strip()}")
    device = Path(made.stdout.strip())
    yield device
    subprocess.run(["losetup", "-d", device], check=True)


@engines
@pytest.mark.parametrize("cache", ["writeback", "none", "writethrough", "directsync"])
def test_a_block_device(loop: Path, backing: Path, cache: str, uring: bool) -> None:
    rig = Disk(loop, "mmio", cache=cache, uring=uring)
    rig.driver.start()
    q = rig.driver.queues[0]
    assert rig.regs.config(0, 4) == SECTORS
    rig.driver.next = 0x10_0000 - 16
    data = os.urandom(4096)
    assert write(q, 8, data) == OK
    assert read(q, 7, 9) == pattern(7) + data
    assert Request(q, [header(IN, SECTORS)], [512, 1]).status == IOERR
    assert Request(q, [header(ZERO), segment(64, 64)], [1]).status == OK
    assert Request(q, [header(ZERO), segment(128, 64, 1)], [1]).status == OK
    assert Request(q, [header(FLUSH)], [1]).status == OK
    assert read(q, 63, 130) == pattern(63) + bytes(512 * 128) + pattern(192)
    before = backing.stat().st_blocks
    assert Request(q, [header(DISCARD), segment(1024, 1024)], [1]).status == OK
    assert backing.stat().st_blocks <= before - 1024 + 16
    assert read(q, 1023) == pattern(1023)
    rig.close()
    whole = pattern(0, 8) + data + pattern(16, 48) + bytes(512 * 128) + pattern(192, 832)
    assert backing.read_bytes()[: 512 * 1024] == whole


@pytest.mark.parametrize("loop", [4096], indirect=True)
def test_the_blocks_of_a_device_are_the_disks(loop: Path) -> None:
    rig = Disk(loop, "pci")
    rig.driver.start()
    assert rig.regs.config(20, 4) == 4096
    assert read(rig.driver.queues[0], 8, 8) == pattern(8, 8)
    rig.close()


@engines
def test_a_device_that_grew(loop: Path, backing: Path, uring: bool) -> None:
    rig = Disk(loop, "pci", uring=uring)
    rig.driver.start()
    with pytest.raises(HostError, match="is a block device of 1048576 bytes"):
        rig.blk.resize(2 << 20)
    os.truncate(backing, 2 << 20)
    subprocess.run(["losetup", "-c", loop], check=True)
    assert rig.blk.resize() == 2 << 20
    assert rig.regs.config(0, 4) == 4096
    assert read(rig.driver.queues[0], 4095) == bytes(512)
    rig.close()


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    argv = ["mount", "-t", "tmpfs", "-o", "size=1M", "tmpfs", str(place)]
    if subprocess.run(argv, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a tmpfs")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@engines
@pytest.mark.parametrize("kind", ["write", "zero"])
def test_no_space_is_left_until_there_is(small: Path, uring: bool, kind: str) -> None:
    """werror=enospc: nothing is lost, and everything is answered once there is room."""
    disk, ballast = small / "disk", small / "ballast"
    disk.touch()
    os.truncate(disk, 8 << 20)
    ballast.write_bytes(bytes(960 << 10))
    rig = Disk(disk, "mmio", werror="enospc", uring=uring)
    rig.driver.start()
    q = rig.driver.queues[0]
    told: list[int] = []
    event = threading.Event()
    rig.blk.on_io_error = lambda blk, error: (told.append(error), event.set())[1]
    data = os.urandom(65536)
    if kind == "write":
        heads = {q.add([header(1, 128 * i), data], [1]) for i in range(4)}
    else:
        heads = {q.add([header(ZERO), segment(1024 * i, 256)], [1]) for i in range(4)}
    q.kick()
    assert event.wait(10)
    assert set(told) == {errno.ENOSPC}
    rig.until(lambda: rig.blk.stats()["held"] + (q.used_idx - q.seen) == 4, "all to end or be held")
    ballast.unlink()
    rig.blk.retry()
    assert {q.wait()[0] for _ in heads} == heads
    assert rig.blk.stats()["errors"] == rig.blk.stats()["held"] == 0
    if kind == "write":
        assert read(q, 384, 128) == data
    assert set(told) == {errno.ENOSPC}
    rig.close()


@engines
def test_no_space_is_reported(small: Path, uring: bool) -> None:
    disk = small / "disk"
    disk.touch()
    os.truncate(disk, 8 << 20)
    (small / "ballast").write_bytes(bytes(1016 << 10))
    rig = Disk(disk, "mmio", uring=uring)
    rig.driver.start()
    q = rig.driver.queues[0]
    assert write(q, 0, bytes(65536)) == IOERR
    assert read(q, 1000) == bytes(512)
    rig.close()
