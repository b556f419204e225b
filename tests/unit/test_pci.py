"""The PCI host bridge through its ports and ECAM, BARs that move, and interrupt pins."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest

from tests.virtio_mock import PciConfig
from vmm.bus import Bus
from vmm.device import Device
from vmm.devices.pci import Bar, PciDevice
from vmm.devices.pci_host import PciHost
from vmm.irq import NullIrqChip

LOW = (0xC000_0000, 0x1000_0000)
HIGH = (0x40_0000_0000, 1 << 32)
ECAM = 0xE000_0000
MEM = 2


class Region(Device):
    """Answers with its own mark and remembers writes."""

    def __init__(self, name: str, mark: int) -> None:
        self.name = name
        self.mark = mark
        self.writes: list[tuple[int, int, int]] = []

    def read(self, offset: int, size: int) -> int:
        return (self.mark << 8 | offset & 0xFF) & ((1 << (8 * size)) - 1)

    def write(self, offset: int, size: int, value: int) -> None:
        self.writes.append((offset, size, value))


class Card(PciDevice):
    """A 4 KiB 32-bit BAR 0 and a 64 KiB 64-bit BAR 2."""

    def __init__(self, name: str, mark: int) -> None:
        super().__init__(name, 0x1234, 0x5678, 0xFF_0000, subsystem=(0xAAAA, 0xBBBB), intx=True)
        self.moves: list[tuple[int, int]] = []
        self.writes: list[tuple[int, int]] = []
        self.add_bar(0, 0x1000, Region(f"{name}-0", mark))
        self.add_bar(2, 0x1_0000, Region(f"{name}-2", mark + 1), wide=True)

    def on_bar_moved(self, bar: Bar) -> None:
        self.moves.append((bar.index, bar.addr))

    def config_written(self, reg: int, size: int) -> None:
        self.writes.append((reg, size))


class ResetPort(Device):
    name = "reset"

    def __init__(self) -> None:
        self.value = 0

    def read(self, offset: int, size: int) -> int:
        return self.value

    def write(self, offset: int, size: int, value: int) -> None:
        self.value = value


class Rig:
    def __init__(self) -> None:
        self.mmio = Bus("mmio", 1 << 64)
        self.pio = Bus("pio", 1 << 16)
        self.chip = NullIrqChip()
        self.lines = [self.chip.line(gsi) for gsi in (20, 21, 22, 23)]
        self.port = ResetPort()
        self.host = PciHost(self.mmio, [LOW, HIGH], self.lines, self.port)
        self.cards = [Card("a", 0x11), Card("b", 0x21)]
        self.slots = [self.host.add(card) for card in self.cards]
        self.host.place()
        self.pio.insert(0xCF8, 8, self.host.ports)
        self.mmio.insert(ECAM, 1 << 28, self.host.ecam)
        self.config = [PciConfig(self.pio, slot) for slot in self.slots]

    def ecam(self, slot: int, reg: int) -> int:
        return ECAM + (slot << 15) + reg


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.host.close()
    assert [r for r in rig.mmio.ranges() if r[2] is not rig.host.ecam] == []


def test_identity(rig: Rig) -> None:
    assert rig.slots == [1, 2]
    c = rig.config[0]
    assert (c.r(0, 2), c.r(2, 2)) == (0x1234, 0x5678)
    assert c.r(8, 4) == 0xFF_0000_00
    assert c.r(0x2C, 4) == 0xBBBB_AAAA
    assert c.r(0x0E, 1) == 0, "one function"
    assert (c.r(0x3C, 1), c.r(0x3D, 1)) == (21, 1)
    bridge = PciConfig(rig.pio, 0)
    assert bridge.r(0x0A, 2) == 0x0600


def test_both_mechanisms_see_the_same(rig: Rig) -> None:
    for slot in range(32):
        for reg in range(0, 256, 4):
            by_port = PciConfig(rig.pio, slot).r(reg, 4)
            assert by_port == rig.mmio.read(rig.ecam(slot, reg), 4)
            if slot > 2:
                assert by_port == 0xFFFF_FFFF
    assert rig.mmio.read(rig.ecam(1, 2), 2) == 0x5678
    assert rig.mmio.read(rig.ecam(1, 3), 1) == 0x56


def test_what_is_not_there_reads_all_ones(rig: Rig) -> None:
    assert rig.mmio.read(rig.ecam(1, 0x100), 4) == 0xFFFF_FFFF, "conventional: 256 bytes"
    assert rig.mmio.read(rig.ecam(1, 0xFF), 2) == 0xFFFF
    assert rig.mmio.read(rig.ecam(1, 0), 8) == (1 << 64) - 1
    assert rig.mmio.read(ECAM + (1 << 20) + (1 << 15), 4) == 0xFFFF_FFFF, "bus 1"
    assert rig.mmio.read(ECAM + (1 << 15) + (1 << 12), 4) == 0xFFFF_FFFF, "function 1"
    rig.pio.write(0xCF8, 4, 1 << 11)
    assert rig.pio.read(0xCFC, 4) == 0xFFFF_FFFF, "enable bit clear"
    rig.pio.write(0xCF8, 4, 0x8000_0000 | 1 << 16 | 1 << 11)
    assert rig.pio.read(0xCFC, 4) == 0xFFFF_FFFF, "bus 1"
    rig.mmio.write(rig.ecam(7, 4), 4, 0xFFFF_FFFF)
    rig.mmio.write(rig.ecam(1, 0x100), 4, 0)


def test_the_address_register(rig: Rig) -> None:
    rig.pio.write(0xCF8, 4, 0xFFFF_FFFF)
    assert rig.pio.read(0xCF8, 4) == 0x80FF_FFFC
    rig.pio.write(0xCF8, 2, 0)
    rig.pio.write(0xCFB, 1, 0)
    assert rig.pio.read(0xCF8, 4) == 0x80FF_FFFC, "dword access only"
    assert rig.pio.read(0xCFA, 2) == 0xFFFF


def test_the_reset_port_lies_inside(rig: Rig) -> None:
    rig.pio.write(0xCF8, 4, 0x8000_0800)
    rig.pio.write(0xCF9, 1, 6)
    assert rig.port.value == 6
    assert rig.pio.read(0xCF9, 1) == 6
    assert rig.pio.read(0xCF8, 4) == 0x8000_0800


def test_read_only_bits(rig: Rig) -> None:
    c = rig.config[0]
    before = [c.r(reg, 1) for reg in range(256)]
    for reg in [*range(0x04), *range(0x06, 0x0C), *range(0x28, 0x3C), *range(0x3D, 0x100)]:
        c.w(reg, 1, before[reg] ^ 0xFF)
    assert [c.r(reg, 1) for reg in range(256)] == before
    c.w(4, 2, 0xFFFF)
    assert c.r(4, 2) == 0x0407
    c.w(0x3C, 1, 0x5A)
    assert c.r(0x3C, 1) == 0x5A


# -- BARs


def test_sizing(rig: Rig) -> None:
    c = rig.config[0]
    placed = [c.r(0x10 + 4 * i, 4) for i in range(6)]
    for i in range(6):
        c.w(0x10 + 4 * i, 4, 0xFFFF_FFFF)
    sized = [c.r(0x10 + 4 * i, 4) for i in range(6)]
    assert sized == [0xFFFF_F000, 0, 0xFFFF_0004, 0xFFFF_FFFF, 0, 0]
    for i in range(6):
        c.w(0x10 + 4 * i, 4, placed[i])
    assert [c.r(0x10 + 4 * i, 4) for i in range(6)] == placed
    assert rig.cards[0].moves == [], "decoding is off"
    assert rig.cards[0].writes == [], "sizing is C's alone"


def test_placement(rig: Rig) -> None:
    taken = []
    for card, config in zip(rig.cards, rig.config, strict=True):
        for bar in card.bars:
            addr = config.bar(bar.index)
            base, size = HIGH if bar.wide else LOW
            assert base <= addr
            assert addr + bar.size <= base + size
            assert addr % bar.size == 0
            taken.append((addr, addr + bar.size))
    taken.sort()
    assert all(a[1] <= b[0] for a, b in pairwise(taken))


def test_decoding_follows_the_command_register(rig: Rig) -> None:
    c, card = rig.config[0], rig.cards[0]
    low, high = c.bar(0), c.bar(2)
    assert rig.mmio.read(low, 4) == 0xFFFF_FFFF
    c.w(4, 2, MEM)
    assert rig.mmio.read(low + 4, 4) == 0x1104
    assert rig.mmio.read(high + 0x10, 2) == 0x1210
    assert card.moves == [(0, low), (2, high)]
    c.w(4, 2, MEM | 4)  # bus mastering: no business of anyone
    assert len(card.moves) == 2
    assert len(card.writes) == 1
    c.w(4, 2, 0)
    assert rig.mmio.read(low, 4) == 0xFFFF_FFFF
    assert card.moves[2:] == [(0, -1), (2, -1)]


def test_moving_while_decoding(rig: Rig) -> None:
    c, card = rig.config[0], rig.cards[0]
    old = c.bar(0)
    new = LOW[0] + 0x80_0000
    c.w(4, 2, MEM)
    c.w(0x10, 4, new)
    assert rig.mmio.read(new, 4) == 0x1100
    assert rig.mmio.read(old, 4) == 0xFFFF_FFFF
    assert card.moves[-2:] == [(0, -1), (0, new)]
    far = HIGH[0] + (1 << 31)
    c.w(0x18, 4, far & 0xFFFF_FFFF)
    c.w(0x1C, 4, far >> 32)
    assert rig.mmio.read(far, 2) == 0x1200
    # By bytes, through ECAM: each write is a move of its own.
    for i in range(4):
        rig.mmio.write(rig.ecam(1, 0x10 + i), 1, old >> (8 * i) & 0xFF)
    assert rig.mmio.read(old, 4) == 0x1100


@pytest.mark.parametrize(
    "addr",
    [0, 0x1000, 0x10_0000, 0xBFFF_F000, 0xD000_0000, ECAM, 0xFEC0_0000, 0xFEE0_0000, 0xFFFF_F000],
)
def test_foreign_addresses_are_not_mapped(rig: Rig, addr: int) -> None:
    c, card = rig.config[0], rig.cards[0]
    ram = Region("ram", 0x7F)
    rig.mmio.insert(0x10_0000, 0x1000, ram)
    c.w(4, 2, MEM)
    before = rig.mmio.ranges()
    c.w(0x10, 4, addr)
    assert card.bars[0].addr == -1
    assert len(rig.mmio.ranges()) == len(before) - 1
    assert rig.host.refused == 1
    c.w(0x10, 4, addr)
    assert rig.host.refused == 1, "counted once"
    c.w(0x10, 4, LOW[0])
    assert card.bars[0].addr == LOW[0]
    rig.mmio.remove(0x10_0000)


@pytest.mark.parametrize("addr", [0, ECAM, 0x1_0000_0000, HIGH[0] + HIGH[1], 0xFFFF_FFFF_FFFF_0000])
def test_foreign_64_bit_addresses_are_not_mapped(rig: Rig, addr: int) -> None:
    c, card = rig.config[0], rig.cards[0]
    c.w(0x18, 4, addr & 0xFFFF_FFFF)
    c.w(0x1C, 4, addr >> 32)
    c.w(4, 2, MEM)
    assert card.bars[1].addr == -1
    assert card.bars[0].addr >= 0


def test_overlapping_functions_take_turns(rig: Rig) -> None:
    a, b = rig.config
    a.w(4, 2, MEM)
    b.w(4, 2, MEM)
    here, there = a.bar(0), b.bar(0)
    b.w(0x10, 4, here)
    assert rig.mmio.read(here, 4) == 0x1100, "the first one keeps it"
    assert rig.host.refused == 1
    a.w(0x10, 4, there)
    assert rig.mmio.read(there, 4) == 0x1100
    assert rig.mmio.read(here, 4) == 0x2100, "free now: the second one gets it"


def test_a_function_over_itself(rig: Rig) -> None:
    c, card = rig.config[0], rig.cards[0]
    c.w(4, 2, MEM)
    c.w(0x18, 4, LOW[0] + 0x100_0000)
    c.w(0x1C, 4, 0)
    assert card.bars[1].addr == LOW[0] + 0x100_0000
    c.w(0x10, 4, LOW[0] + 0x100_2000)
    assert card.bars[0].addr == -1
    assert rig.mmio.read(LOW[0] + 0x100_2000, 2) == 0x1200


def test_reset(rig: Rig) -> None:
    c, card = rig.config[0], rig.cards[0]
    placed = [c.bar(0), c.bar(2)]
    c.w(4, 2, MEM | 0x400)
    c.w(0x10, 4, LOW[0] + 0x80_0000)
    c.w(0x3C, 1, 9)
    rig.host.reset()
    assert [c.bar(0), c.bar(2)] == placed
    assert (c.r(4, 2), c.r(0x3C, 1)) == (0, 21)
    assert [bar.addr for bar in card.bars] == [-1, -1]


def test_32_slots_and_no_more() -> None:
    mmio = Bus("mmio", 1 << 64)
    host = PciHost(mmio, [LOW], [])
    for i in range(31):
        assert host.add(PciDevice(f"d{i}", 1, 2, 0)) == i + 1
    with pytest.raises(ValueError, match="slot 32 is not free"):
        host.add(PciDevice("one-more", 1, 2, 0))
    with pytest.raises(ValueError, match="slot 5 is not free"):
        host.add(PciDevice("again", 1, 2, 0), 5)
    host.close()


def test_a_window_that_is_full() -> None:
    mmio = Bus("mmio", 1 << 64)
    host = PciHost(mmio, [(0xC000_0000, 0x2000)], [])
    for name in ("x", "y", "z"):
        card = PciDevice(name, 1, 2, 0)
        card.add_bar(0, 0x1000, Region(name, 1))
        host.add(card)
    with pytest.raises(ValueError, match="z: no room"):
        host.place()
    host.close()


def test_capabilities() -> None:
    card = PciDevice("caps", 1, 2, 0)
    first = card.add_capability(0x09, b"\x05abc")
    second = card.add_capability(0x11, bytes(6), b"\xff\x0f")
    assert (first, second) == (0x40, 0x48)
    with pytest.raises(ValueError, match="no room"):
        card.add_capability(0x09, bytes(200))
    host = PciHost(Bus("mmio", 1 << 64), [LOW], [])
    pio = Bus("pio", 1 << 16)
    pio.insert(0xCF8, 8, host.ports)
    config = PciConfig(pio, host.add(card))
    assert config.capabilities() == [(0x09, 0x40), (0x11, 0x48)]
    assert config.r(6, 2) == 0x10
    config.w(0x4A, 2, 0xFFFF)
    assert config.r(0x48, 4) == 0x0FFF_0011
    host.close()


@pytest.mark.parametrize(("index", "size"), [(0, 24), (0, 8), (6, 16), (-1, 16)])
def test_impossible_bars(index: int, size: int) -> None:
    with pytest.raises(ValueError, match="BAR"):
        PciDevice("d", 1, 2, 0).add_bar(index, size, Region("r", 0))


def test_a_64_bit_bar_needs_two() -> None:
    with pytest.raises(ValueError, match="BAR 5"):
        PciDevice("d", 1, 2, 0).add_bar(5, 16, Region("r", 0), wide=True)


def test_shared_lines(rig: Rig) -> None:
    """Slots 1 and 5 share a line: it is up while either wants it."""
    third = Card("c", 0x31)
    rig.host.add(third, 5)
    a, c = rig.cards[0].intx, third.intx
    assert a is not None
    assert c is not None
    line = rig.lines[1]
    a.set(True)
    c.set(True)
    c.set(True)
    assert (line.level, line.count) == (True, 1)
    a.set(False)
    assert line.level
    a.set(False)
    c.set(False)
    assert not line.level
    c.pulse()
    assert (line.level, line.count) == (True, 2)
    third.close()
    assert not line.level, "a pin that goes away lets the line go"
