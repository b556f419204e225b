"""vhost-user-blk in front of Debian's qemu-storage-daemon."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.back_ends import Process, storage_daemon
from tests.virtio_rig import TRANSPORTS, Rig
from vmm.devices.virtio.blk import F_FLUSH, F_MQ, F_RO
from vmm.devices.virtio.vhost_user_blk import VhostUserBlk

SECTORS = 4096
IN, OUT, FLUSH = 0, 1, 4


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(512 * SECTORS))
    return path


@pytest.fixture
def daemon(image: Path) -> Iterator[Process]:
    with storage_daemon(image, queues=2) as process:
        yield process


def read(rig: Rig, sector: int, count: int, queue: int = 0) -> bytes:
    head = struct.pack("<IIQ", IN, 0, sector)
    got, data = rig.driver.queues[queue].request([head], [512 * count, 1])
    assert got == 512 * count + 1
    assert data[-1] == 0
    return data[:-1]


def write(rig: Rig, sector: int, data: bytes, queue: int = 0) -> int:
    head = struct.pack("<IIQ", OUT, 0, sector)
    return rig.driver.queues[queue].request([head, data], [1])[1][0]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_disk(image: Path, daemon: Process, transport: str) -> None:
    rig = Rig(VhostUserBlk(str(daemon.path), cpus=2), transport, backing="memfd")
    try:
        features = rig.driver.start()
        assert features >> F_FLUSH & features >> F_MQ & 1
        assert not features >> F_RO & 1
        assert rig.regs.device_id() == 2
        assert rig.regs.config(0, 4) == SECTORS
        assert rig.regs.config(34, 2) == len(rig.driver.queues) == 2
        before = image.read_bytes()
        for nr in (0, 1):
            assert read(rig, 100, 8, nr) == before[51200 : 51200 + 4096]
            data = os.urandom(8192)
            assert write(rig, 64 * nr, data, nr) == 0
            assert read(rig, 64 * nr, 16, 1 - nr) == data
            head = struct.pack("<IIQ", FLUSH, 0, 0)
            assert rig.driver.queues[nr].request([head], [1]) == (1, b"\0")
            assert image.read_bytes()[32768 * nr : 32768 * nr + 8192] == data
        rig.driver.reset()
        rig.driver.start(1)
        assert read(rig, 100, 8) == before[51200 : 51200 + 4096]
    finally:
        rig.close()


def test_read_only(image: Path) -> None:
    with storage_daemon(image, writable=False) as daemon:
        rig = Rig(VhostUserBlk(str(daemon.path)), "pci", backing="memfd")
        try:
            assert rig.driver.start() >> F_RO & 1
            assert write(rig, 0, bytes(512)) != 0
        finally:
            rig.close()


def test_the_cache_is_the_drivers_to_change(daemon: Process) -> None:
    rig = Rig(VhostUserBlk(str(daemon.path)), "mmio", backing="memfd")
    try:
        rig.driver.start()
        for mode in (0, 1, 0):
            rig.regs.set_config(32, 1, mode)
            assert rig.regs.config(32, 1) == mode
    finally:
        rig.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_killed_and_started_again(image: Path, daemon: Process, transport: str) -> None:
    """A hundred writes, the daemon killed among them: the driver gets each answered once."""
    device = VhostUserBlk(str(daemon.path), queues=1, reconnect=0.1)
    rig = Rig(device, transport, backing="memfd")
    try:
        rig.driver.start()
        queue = rig.driver.queues[0]
        wanted = bytearray(image.read_bytes())
        for nr in range(100):
            data = os.urandom(512)
            wanted[512 * nr : 512 * nr + 512] = data
            head = queue.add([struct.pack("<IIQ", OUT, 0, nr), data], [1])
            if nr == 50:
                daemon.kill()
            queue.kick()
            if nr == 50:
                rig.until(lambda: not device.connected, "its end")
                daemon.start()
            assert queue.wait(20) == (head, 1, b"\0")
        assert device.connections == 2
        assert image.read_bytes() == wanted
    finally:
        rig.close()
