"""virtio-pmem from the driver's side, and its place in a machine: virtio-v1.3 §5.19."""

from __future__ import annotations

import os
import resource
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.virtio_rig import TRANSPORTS, Rig
from vmm import Machine, MachineConfig
from vmm.arch.x86_64 import layout, platform
from vmm.board import Board
from vmm.devices.virtio.pmem import ALIGN, Pmem
from vmm.errors import ConfigError, HostError
from vmm.irq import IrqChip
from vmm.memory import GuestMemory

FLUSH = struct.pack("<I", 0)
GOOD, BAD = bytes(4), b"\xff" * 4


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "pmem"
    path.write_bytes(b"first\n".ljust(ALIGN, b"\0") + b"second\n".ljust(ALIGN, b"\0"))
    return path


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    path = tmp_path / "flat"
    path.write_bytes(b"\xf4")
    return path


@pytest.fixture
def pmem(image: Path) -> Pmem:
    return Pmem(str(image))


@pytest.fixture(params=TRANSPORTS)
def rig(request: pytest.FixtureRequest, pmem: Pmem) -> Iterator[Rig]:
    rig = Rig(pmem, request.param)
    yield rig
    rig.close()


@pytest.fixture
def build(request: pytest.FixtureRequest) -> Iterator[Callable[..., Board]]:
    made: list[tuple[Board, GuestMemory]] = []

    def run(*devices: str, transport: str = "pci") -> Board:
        memory = GuestMemory(layout.ram_ranges(8 << 20))
        board = Board(
            MachineConfig(devices=list(devices), memory="8M", transport=transport),
            memory,
            IrqChip(),
        )
        made.append((board, memory))
        platform.build(board)
        return board

    yield run
    for board, memory in made:
        board.close()
        board.free()
        memory.close()


def pmems(board: Board) -> list[Any]:
    return [d for d in board.virtio if isinstance(d, Pmem)]


# ---- the queue ----------------------------------------------------------------------------------


def test_a_flush(rig: Rig, pmem: Pmem) -> None:
    rig.driver.start()
    assert rig.driver.queues[0].request([FLUSH], [4]) == (4, GOOD)
    assert pmem.stats() == {"flushes": 1, "syncs": 1, "failed": 0}


def test_requests_in_odd_pieces(rig: Rig) -> None:
    rig.driver.start()
    queue = rig.driver.queues[0]
    assert queue.request([FLUSH[:1], FLUSH[1:]], [1, 1, 1, 1]) == (4, GOOD)
    assert queue.request([FLUSH + b"more"], [1, 2, 100]) == (4, GOOD)


def test_what_it_does_not_know_fails(rig: Rig, pmem: Pmem) -> None:
    rig.driver.start()
    assert rig.driver.queues[0].request([struct.pack("<I", 1)], [4]) == (4, BAD)
    assert rig.driver.queues[0].request([FLUSH], [4]) == (4, GOOD)
    assert pmem.stats()["failed"] == 1


@pytest.mark.parametrize(
    ("sent", "room"), [([], [4]), ([FLUSH[:3]], [4]), ([FLUSH], [3]), ([FLUSH], [])]
)
def test_a_request_that_lacks_something(rig: Rig, sent: list[bytes], room: list[int]) -> None:
    rig.driver.start()
    rig.driver.queues[0].add(sent, room)
    rig.driver.queues[0].kick()
    rig.until_broken()
    rig.driver.reset()
    rig.driver.start()
    assert rig.driver.queues[0].request([FLUSH], [4]) == (4, GOOD)


def test_many_share_a_sync(rig: Rig, pmem: Pmem) -> None:
    rig.driver.start()
    queue = rig.driver.queues[0]
    heads = [queue.add([FLUSH], [4]) for _ in range(60)]
    queue.kick()
    assert sorted(queue.wait()[0] for _ in heads) == sorted(heads)
    stats = pmem.stats()
    assert stats["flushes"] == 60
    assert stats["syncs"] < 60


def test_what_was_lost_stays_lost(rig: Rig, pmem: Pmem) -> None:
    """After one failure no flush says that all is well."""
    rig.driver.start()
    pmem.spoil()
    assert rig.driver.queues[0].request([FLUSH], [4]) == (4, BAD)
    rig.driver.reset()
    rig.driver.start()
    assert rig.driver.queues[0].request([FLUSH], [4]) == (4, BAD)


def test_a_sync_that_fails(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file the host cannot sync: here, a descriptor that was replaced by a pipe's."""
    pmem = Pmem(str(image))
    rig = Rig(pmem, "mmio")
    rig.driver.start()
    reader, writer = os.pipe()
    os.dup2(writer, pmem._image.buffered_fd)
    assert rig.driver.queues[0].request([FLUSH], [4]) == (4, BAD)
    rig.close()
    os.close(reader)
    os.close(writer)


def test_a_driver_that_never_came(rig: Rig) -> None:
    assert "CONFIG_VIRTIO_PMEM" in str(rig.device.unclaimed())


# ---- the file -----------------------------------------------------------------------------------


def test_the_memory_is_the_file(image: Path, pmem: Pmem) -> None:
    view = pmem.view()
    assert bytes(view[:5]) == b"first"
    view[ALIGN : ALIGN + 6] = b"SECOND"
    assert image.read_bytes()[ALIGN : ALIGN + 6] == b"SECOND"
    view.release()
    pmem.close()


def test_it_is_locked(image: Path, pmem: Pmem) -> None:
    for readonly in (False, True):
        with pytest.raises(HostError, match="already in use by this process"):
            Pmem(str(image), readonly=readonly)
    pmem.close()
    first = Pmem(str(image), readonly=True)
    second = Pmem(str(image), readonly=True)
    first.close()
    second.close()


@pytest.mark.parametrize("size", [ALIGN - 1, ALIGN + 4096])
def test_whole_2_mib(tmp_path: Path, size: int) -> None:
    path = tmp_path / "odd"
    with path.open("wb") as f:
        f.truncate(size)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(HostError, match=f"is {size} bytes long, not a multiple of 2 MiB"):
        Pmem(str(path))
    assert len(os.listdir("/proc/self/fd")) == before


def test_files_that_are_none(tmp_path: Path) -> None:
    for path, said in [
        (tmp_path / "none", "could not be opened"),
        (tmp_path, "is a directory"),
        (Path("/dev/zero"), "not a file or block device"),
    ]:
        with pytest.raises(HostError, match=said):
            Pmem(str(path))


def test_more_than_the_host_maps(tmp_path: Path) -> None:
    path = tmp_path / "large"
    with path.open("wb") as f:
        f.truncate(1 << 40)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1 << 39, hard))
    try:
        with pytest.raises(HostError, match="could not be mapped: Cannot allocate memory"):
            Pmem(str(path))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# ---- its place ----------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_above_ram(
    build: Callable[..., Board], image: Path, tmp_path: Path, transport: str
) -> None:
    other = tmp_path / "other"
    other.write_bytes(bytes(ALIGN))
    board = build(f"pmem,{image}", f"pmem,path={other}", transport=transport)
    first, second = pmems(board)
    assert (first.base, second.base) == (4 << 30, 6 << 30)
    assert bytes(first.config) == struct.pack("<QQ", 4 << 30, 2 * ALIGN)
    assert not board.memory.contains(first.base, 1), "devices do no DMA to it"
    with pytest.raises(ConfigError, match="do not fit below the CPU's limit"):
        board.memory_window(1 << 39)


def test_dry_run_shows_it(image: Path, flat: Path) -> None:
    facts = Machine(kernel=flat, boot="flat", memory="8M", pmem=str(image)).describe()
    assert {"base": 4 << 30, "size": 2 * ALIGN, "type": "device"} in facts["memory"]


def test_what_is_written_to_a_read_only_one_is_told(
    build: Callable[..., Board], image: Path
) -> None:
    """KVM sends a guest's writes to the memory bus."""
    before = image.read_bytes()
    board = build(f"pmem,{image},ro")
    (pmem,) = pmems(board)
    assert board.mmio.read(pmem.base, 5) == int.from_bytes(b"first", "little")
    assert not pmem.faults()
    board.mmio.write(pmem.base, 4, 0x1234)
    board.mmio.write(pmem.base + 2 * ALIGN - 8, 8, 0x1234)
    assert "wrote 2 times" in pmem.faults()[0]
    assert image.read_bytes() == before
    with pytest.raises(TypeError):
        pmem.view()[0] = 1
