"""virtio-mem from the driver's side: virtio-v1.3 §5.15."""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.memory_cost import resident
from tests.virtio_rig import TRANSPORTS, Rig
from vmm import Machine
from vmm._native import lib
from vmm.board import Board
from vmm.config import MachineConfig
from vmm.devices.virtio.device import F_RING_PACKED
from vmm.devices.virtio.virtio_mem import F_UNPLUGGED_INACCESSIBLE, VirtioMem
from vmm.errors import ConfigError, HostError, VmmError
from vmm.irq import IrqChip
from vmm.memory import GuestMemory

MIB = 1 << 20
BLOCK = 2 * MIB
BASE = 8 << 30
PLUG, UNPLUG, UNPLUG_ALL, STATE = range(4)
ACK, NACK, BUSY, ERROR = range(4)
PLUGGED, UNPLUGGED, MIXED = range(3)


class Placed(VirtioMem):
    """Its memory is made when it is attached, as a rig has no board."""

    def attach(self, memory: GuestMemory, loop: Any) -> None:
        self.region = memory.add(BASE, self.size)
        super().attach(memory, loop)


class MemRig(Rig):
    device: VirtioMem

    def ask(self, kind: int, block: int = 0, nr: int = 0, *, addr: int | None = None) -> int:
        return self.ask_state(kind, block, nr, addr=addr)[0]

    def ask_state(
        self, kind: int, block: int = 0, nr: int = 0, *, addr: int | None = None
    ) -> tuple[int, int]:
        gpa = BASE + block * BLOCK if addr is None else addr
        request = struct.pack("<H6xQH6x", kind, gpa, nr)
        length, data = self.driver.queues[0].request([request], [10])
        assert length == 10
        return struct.unpack("<H6xH", data)

    def field(self, at: int) -> int:
        return self.regs.config(at, 4) | self.regs.config(at + 4, 4) << 32

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Usable, plugged and requested, in blocks."""
        usable, plugged, requested = (self.field(at) // BLOCK for at in (32, 40, 48))
        return usable, plugged, requested


Make = Callable[..., MemRig]


@pytest.fixture
def make() -> Iterator[Make]:
    rigs: list[MemRig] = []

    def new(
        transport: str = "mmio", blocks: int = 8, requested: int = 4, backing: str = "anon"
    ) -> MemRig:
        device = Placed(blocks * BLOCK, requested=requested * BLOCK)
        rigs.append(MemRig(device, transport, backing=backing))
        return rigs[-1]

    yield new
    for rig in rigs:
        rig.close()


@pytest.fixture(params=TRANSPORTS)
def rig(request: pytest.FixtureRequest, make: Make) -> MemRig:
    rig = make(request.param)
    rig.driver.start()
    return rig


def test_what_the_driver_reads(rig: MemRig) -> None:
    assert rig.regs.features() >> F_UNPLUGGED_INACCESSIBLE & 1
    assert [rig.field(at) for at in (0, 16, 24)] == [BLOCK, BASE, 8 * BLOCK]
    assert rig.regs.config(8, 2) == 0
    assert rig.sizes == (8, 0, 4)
    rig.regs.set_config(48, 4, 0xFFFF0000)
    assert rig.sizes == (8, 0, 4)


def test_plug_and_unplug(rig: MemRig) -> None:
    assert rig.ask(PLUG, 1, 3) == ACK
    assert rig.sizes == (8, 3, 4)
    assert rig.device.plugged == 3 * BLOCK
    rig.memory.write(BASE + BLOCK, b"contents")
    assert rig.ask(PLUG, 1, 1) == ERROR, "a plugged block"
    assert rig.ask(PLUG, 3, 2) == ERROR, "one of them is plugged"
    assert rig.ask(PLUG, 4, 2) == NACK, "more than requested"
    assert rig.ask(PLUG, 0, 1) == ACK
    assert rig.ask(PLUG, 7, 1) == NACK
    assert rig.ask(UNPLUG, 4, 1) == ERROR, "not plugged"
    assert rig.ask(UNPLUG, 3, 2) == ERROR, "not all of them are plugged"
    assert rig.memory.read(BASE + BLOCK, 8) == b"contents"
    assert rig.ask(UNPLUG, 1, 2) == ACK
    assert rig.sizes == (8, 2, 4)
    assert rig.memory.read(BASE + BLOCK, 8) == bytes(8)
    assert rig.ask(PLUG, 1, 1) == ACK


def test_state(rig: MemRig) -> None:
    assert rig.ask(PLUG, 2, 2) == ACK
    assert rig.ask_state(STATE, 2, 2) == (ACK, PLUGGED)
    assert rig.ask_state(STATE, 0, 2) == (ACK, UNPLUGGED)
    assert rig.ask_state(STATE, 0, 8) == (ACK, MIXED)
    assert rig.ask_state(STATE, 0, 9) == (ERROR, 0)


@pytest.mark.parametrize("kind", [PLUG, UNPLUG, STATE])
@pytest.mark.parametrize(
    ("addr", "nr"),
    [
        (BASE, 0),
        (BASE, 9),
        (BASE, 0xFFFF),
        (BASE + 1, 1),
        (BASE + 4096, 1),
        (BASE - BLOCK, 1),
        (BASE + 8 * BLOCK, 1),
        (BASE + 7 * BLOCK, 2),
        (0, 1),
        ((1 << 64) - BLOCK, 1),
        ((1 << 64) - BLOCK, 0xFFFF),
    ],
)
def test_addresses_that_are_not_of_the_region(make: Make, kind: int, addr: int, nr: int) -> None:
    rig = make()
    rig.driver.start()
    assert rig.ask(PLUG, 0, 1) == ACK
    assert rig.ask(kind, nr=nr, addr=addr) == ERROR
    assert rig.sizes == (8, 1, 4)


@pytest.mark.parametrize("kind", [4, 0xFFFF])
def test_requests_nobody_knows(rig: MemRig, kind: int) -> None:
    assert rig.ask(kind, 0, 1) == ERROR
    assert rig.ask(PLUG, 0, 1) == ACK


@pytest.mark.parametrize(("readable", "writable"), [(23, 10), (24, 9), (24, 0), (0, 10)])
def test_chains_that_are_too_short(rig: MemRig, readable: int, writable: int) -> None:
    q = rig.driver.queues[0]
    q.add([bytes(readable)] if readable else [], [writable] if writable else [])
    q.kick()
    rig.until_broken()
    rig.driver.reset()
    rig.driver.start()
    assert rig.ask(PLUG, 0, 1) == ACK


def test_a_request_in_pieces(rig: MemRig) -> None:
    request = struct.pack("<H6xQH6x", PLUG, BASE, 2)
    length, data = rig.driver.queues[0].request([request[:1], request[1:9], request[9:]], [3, 100])
    assert (length, data) == (10, bytes(10))
    assert rig.device.plugged == 2 * BLOCK


def test_what_is_requested_changes(rig: MemRig) -> None:
    rig.regs.interrupts()
    before = rig.regs.generation()
    rig.device.set_requested(2 * BLOCK)
    assert rig.regs.interrupts() & 2
    assert rig.regs.generation() != before
    assert rig.sizes == (8, 0, 2)
    assert rig.device.requested == 2 * BLOCK
    assert rig.ask(PLUG, 0, 2) == ACK
    rig.device.set_requested(0)
    assert rig.sizes == (8, 2, 0), "only the driver unplugs"
    assert rig.ask(PLUG, 4, 1) == NACK
    assert rig.ask(UNPLUG, 0, 2) == ACK
    for wrong in (-BLOCK, 9 * BLOCK, BLOCK + 1):
        with pytest.raises(ConfigError, match="cannot be requested"):
            rig.device.set_requested(wrong)
    assert rig.sizes == (8, 0, 0)


def test_requested_before_the_driver_came(make: Make) -> None:
    rig = make(requested=0)
    assert rig.sizes == (0, 0, 0)
    rig.device.set_requested(BLOCK)
    rig.driver.start()
    assert rig.sizes == (8, 0, 1)
    assert rig.regs.interrupts() & 2
    assert rig.ask(PLUG, 7, 1) == ACK


def test_the_usable_part_grows_and_shrinks_with_unplug_all(make: Make) -> None:
    rig = make(blocks=512, requested=4)
    rig.driver.start()
    extra = 256 * MIB // BLOCK
    assert rig.sizes == (4 + extra, 0, 4)
    assert rig.ask(PLUG, 4 + extra, 1) == ERROR
    assert rig.ask(PLUG, 3 + extra, 1) == ACK
    rig.device.set_requested(100 * BLOCK)
    assert rig.sizes == (100 + extra, 1, 100)
    rig.device.set_requested(BLOCK)
    assert rig.sizes == (100 + extra, 1, 1)
    assert rig.ask(UNPLUG_ALL) == ACK
    assert rig.sizes == (1 + extra, 0, 1)
    assert rig.ask_state(STATE, 0, 1) == (ACK, UNPLUGGED)
    rig.device.set_requested(512 * BLOCK)
    assert rig.sizes == (512, 0, 512)


@pytest.mark.parametrize("backing", ["anon", "memfd"])
def test_unplugged_memory_goes_back_to_the_host(make: Make, backing: str) -> None:
    rig = make(backing=backing)
    rig.driver.start()
    assert resident(rig.memory.added) == 0
    assert rig.ask(PLUG, 0, 4) == ACK
    rig.memory.write(BASE, b"\xa5" * (4 * BLOCK))
    assert resident(rig.memory.added) == 4 * BLOCK
    assert rig.ask(UNPLUG, 1, 2) == ACK
    assert resident(rig.memory.added) == 2 * BLOCK
    assert rig.ask(UNPLUG_ALL) == ACK
    assert resident(rig.memory.added) == 0


def test_the_queue_is_reset(rig: MemRig) -> None:
    assert rig.ask(PLUG, 0, 2) == ACK
    assert rig.regs.reset_queue(0)
    rig.device.set_requested(3 * BLOCK)
    rig.driver.setup_queue(0)
    assert rig.sizes == (8, 2, 3)
    assert rig.ask(PLUG, 2, 1) == ACK


def test_on_a_packed_queue() -> None:
    rig = MemRig(Placed(8 * BLOCK, requested=4 * BLOCK), "pci", packed=True)
    assert rig.driver.start() >> F_RING_PACKED & 1
    for block in range(4):
        assert rig.ask(PLUG, block, 1) == ACK
    assert rig.ask(PLUG, 4, 1) == NACK
    assert rig.sizes == (8, 4, 4)
    rig.close()


def test_what_was_left_in_an_unplugged_block_is_gone(rig: MemRig) -> None:
    rig.memory.write(BASE + 5 * BLOCK, b"hidden")
    assert rig.ask(PLUG, 5, 1) == ACK
    assert rig.memory.read(BASE + 5 * BLOCK, 6) == bytes(6)


def test_a_driver_that_leaves_and_comes_back_finds_its_blocks(rig: MemRig) -> None:
    assert rig.ask(PLUG, 0, 2) == ACK
    rig.memory.write(BASE, b"kept")
    rig.driver.reset()
    rig.driver.start()
    assert rig.sizes == (8, 2, 4)
    assert rig.memory.read(BASE, 4) == b"kept"
    rig.reset()
    assert rig.device.plugged == 0
    assert rig.memory.read(BASE, 4) == bytes(4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"size": 3 * MIB}, "one or more blocks"),
        ({"size": 0}, "one or more blocks"),
        ({"size": 4 * MIB, "block": 3 * MIB}, "power of two"),
        ({"size": 4 * MIB, "block": 4096}, "power of two"),
        ({"size": 4 * MIB, "requested": 6 * MIB}, "cannot be requested"),
        ({"size": 4 * MIB, "requested": MIB}, "cannot be requested"),
    ],
)
def test_sizes_that_are_wrong(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        VirtioMem(**options)


def test_blocks_smaller_than_the_hosts_pages() -> None:
    memory = GuestMemory([(0, MIB)])
    memory.page = 4 * MIB
    device = Placed(8 * MIB)
    with pytest.raises(ConfigError, match="smaller than the host's pages"):
        device.attach(memory, None)
    device.close()
    memory.close()


def test_without_a_place() -> None:
    memory = GuestMemory([(0, MIB)])
    device = VirtioMem(8 * MIB)
    assert (device.plugged, device.requested) == (0, 0)
    with pytest.raises(VmmError, match="not part of a running machine"):
        device.set_requested(BLOCK)
    with pytest.raises(HostError):
        device.attach(memory, None)
    device.close()
    memory.close()


@pytest.fixture
def board() -> Iterator[Board]:
    memory = GuestMemory([(0, MIB)])
    board = Board(MachineConfig(memory="1M"), memory, IrqChip())
    board.spare_memory = lambda: (4 << 30, 5 << 30, 1 << 28)
    yield board
    board.close()
    memory.close()


def test_memory_of_devices_is_found_a_place(board: Board) -> None:
    places = [board.add_memory(size).gpa for size in (2 * MIB, 1 << 28, 2 * MIB)]
    assert places == [4 << 30, (4 << 30) + (1 << 28), (4 << 30) + (2 << 28)]
    assert board.memory.contains(places[2], 2 * MIB)
    assert not board.memory.contains(places[0] + 2 * MIB, 1)
    assert [r.gpa for r in board.memory.ranges] == [0], "in no memory map"
    with pytest.raises(ConfigError, match="do not fit"):
        board.add_memory(1 << 29)


def test_memory_that_is_not_lent_is_never_given_back() -> None:
    memory = GuestMemory([(0, MIB)])
    ptr = lib.vmm_ram_map(-1, 0, MIB)
    assert lib.vmm_mem_add(memory.table, BASE, MIB, ptr) == 0
    memory.write(BASE, b"somebody's own")
    assert lib.vmm_mem_discard(memory.table, BASE, MIB) == 0
    assert memory.read(BASE, 14) == b"somebody's own"
    assert lib.vmm_mem_lend(memory.table, BASE, 3, lib.MADV_DONTNEED) == -errno.EINVAL
    assert lib.vmm_mem_lend(memory.table, BASE + 1, 4096, lib.MADV_DONTNEED) == -errno.ENOENT
    assert lib.vmm_mem_lend(memory.table, BASE, 4096, lib.MADV_DONTNEED) == 0
    assert lib.vmm_mem_discard(memory.table, BASE + 1, MIB) == -errno.EFAULT
    assert lib.vmm_mem_discard(memory.table, BASE + 1, 4096) == 0
    assert lib.vmm_mem_discard(memory.table, BASE + 1, 8191) == 4096
    assert memory.read(BASE, 14) == b"somebody's own"
    memory.close()
    lib.vmm_ram_unmap(ptr, MIB)


def test_a_machine_has_it_above_ram_and_says_so(tmp_path: Path) -> None:
    kernel = tmp_path / "flat"
    kernel.write_bytes(b"\xf4")  # hlt
    words = "memory_hotplug.online_policy=auto-movable"
    plain, facts = (
        Machine(kernel=kernel, boot="flat", memory="64M", virtio_mem=wanted).describe()
        for wanted in (None, ["1G,requested=64M", "256M,block=4M"])
    )
    assert words not in plain["command_line"]
    assert facts["command_line"].count(words) == 1
    assert facts["memory"][:-2] == plain["memory"]
    assert facts["memory"][-2:] == [
        {"base": 4 << 30, "size": 1 << 30, "type": "device"},
        {"base": 6 << 30, "size": 1 << 28, "type": "device"},
    ]
