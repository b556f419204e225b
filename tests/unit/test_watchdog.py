"""The 6300ESB watchdog by its registers, on a clock of the test's own. Intel 300641-004 §16."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from tests.support.waiting import wait_for
from tests.virtio_mock import PciConfig
from vmm import MachineConfig
from vmm.board import Board
from vmm.bus import Bus
from vmm.catalog import parse
from vmm.devices.pci_host import PciHost
from vmm.devices.watchdog import STALL_S, STEP_S, Watchdog
from vmm.errors import ConfigError, GuestLost
from vmm.irq import IrqChip, NullIrqChip
from vmm.memory import GuestMemory
from vmm.result import REASONS, RunResult

TICK = (1 << 15) / 33e6
NO_IRQ, FAST, NO_OUTPUT = 3, 4, 0x20
LOCKED, ENABLE, FREE_RUN = 1, 2, 4


class Rig:
    """A watchdog alone on a bus, with the driver's moves."""

    def __init__(self, action: str = "reset", *, real: bool = False) -> None:
        self.now = 1000.0
        self.memory = GuestMemory([(0, 1 << 20)])
        self.board = Board(MachineConfig(), self.memory, IrqChip())
        self.ends: list[tuple[str, int]] = []
        self.pauses: list[bool] = []
        self.board.on_end = lambda reason, status: self.ends.append((reason, status))
        self.board.on_pause = lambda: self.pauses.append(True)
        self.dog = Watchdog(action, clock=None if real else lambda: self.now)
        self.dog.plug(self.board)
        assert self.board.pci == [self.dog]
        chip = NullIrqChip()
        self.line = chip.line(21)
        self.mmio = Bus("mmio", 1 << 64)
        lines = [chip.line(20), self.line, chip.line(22), chip.line(23)]
        self.host = PciHost(self.mmio, [(0xC000_0000, 0x1000_0000)], lines)
        slot = self.host.add(self.dog)
        self.host.place()
        pio = Bus("pio", 1 << 16)
        pio.insert(0xCF8, 8, self.host.ports)
        self.pci = PciConfig(pio, slot)
        self.pci.w(4, 2, 2)
        self.base = self.pci.bar(0)

    def w(self, register: int, value: int, size: int = 4, *, unlock: bool = True) -> None:
        if unlock:
            self.mmio.write(self.base + 0xC, 2, 0x80)
            self.mmio.write(self.base + 0xC, 2, 0x86)
        self.mmio.write(self.base + register, size, value)

    def r(self, register: int) -> int:
        return self.mmio.read(self.base + register, 4)

    def start(self, first: int = 1000, second: int = 2000, config: int = NO_IRQ) -> None:
        """As Linux's driver does it."""
        self.pci.w(0x60, 2, config)
        self.pci.w(0x68, 1, 0)
        self.w(0xC, 0x300, 2)
        self.w(0, first)
        self.w(4, second)
        self.w(0xC, 0x100, 2)
        self.pci.w(0x68, 1, ENABLE)

    def pass_ticks(self, ticks: float) -> None:
        self.now += ticks * TICK
        self.dog.advance()

    def close(self) -> None:
        self.host.close()
        self.board.close()
        self.memory.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


def test_identity(rig: Rig) -> None:
    assert rig.pci.r(0, 4) == 0x25AB_8086
    assert rig.pci.r(8, 4) >> 8 == 0x08_8000
    assert (rig.r(0), rig.r(4), rig.r(8), rig.r(0xC)) == (0xF_FFFF, 0xF_FFFF, 0, 0)
    assert "never started watchdog0" in str(rig.dog.unclaimed())


def test_both_stages_have_to_run_out(rig: Rig) -> None:
    rig.start(1000, 2000)
    rig.pass_ticks(999)
    rig.pass_ticks(2000)
    assert rig.ends == []
    rig.pass_ticks(2)
    assert rig.ends == [("watchdog", 255)]
    assert rig.dog.fired == 1
    assert "1 times" in rig.dog.faults()[0]
    assert rig.dog.unclaimed() is None
    assert rig.r(0xC) == 0x200, "that it ran out can be read"
    rig.w(0xC, 0x200, 2)
    assert rig.r(0xC) == 0
    rig.pass_ticks(10_000)
    assert rig.dog.fired == 1, "it asked for a reset and waits"


def test_one_second_is_one_second(rig: Rig) -> None:
    """The driver writes 512 per second into each preload."""
    rig.start(512 * 10, 512 * 10)
    rig.now += 10.1
    rig.dog.advance()
    assert not rig.ends
    rig.now += 0.1
    rig.dog.advance()
    assert rig.ends


def test_the_fast_clock(rig: Rig) -> None:
    rig.start(0xF_FFFF, 1, NO_IRQ | FAST)
    rig.now += (0xF_FFFF << 5) / 33e6
    rig.dog.advance()
    assert not rig.ends
    rig.now += (1 << 5) / 33e6
    rig.dog.advance()
    assert rig.ends


@pytest.mark.parametrize("stage", [500, 1500])
def test_a_ping_starts_it_from_the_beginning(rig: Rig, stage: int) -> None:
    rig.start(1000, 1000)
    for _ in range(5):
        rig.pass_ticks(stage)
        rig.w(0xC, 0x100, 2)
    assert not rig.ends
    rig.pass_ticks(2001)
    assert rig.ends


def test_nothing_happens_without_the_key(rig: Rig) -> None:
    rig.start(1000, 1000)
    rig.w(0, 5, unlock=False)
    rig.w(0xC, 0x86, 2, unlock=False)
    rig.w(0xC, 0x80, 2, unlock=False)
    rig.w(0xC, 0x100, 2, unlock=False)
    rig.w(4, 5, unlock=False)
    assert (rig.r(0), rig.r(4)) == (1000, 1000)
    rig.pass_ticks(1500)
    rig.w(0xC, 0x80, 2, unlock=False)
    rig.w(0xC, 0x100, 2, unlock=False)
    rig.pass_ticks(501)
    assert rig.ends, "a ping in the wrong order is none"


def test_the_key_opens_for_one_write(rig: Rig) -> None:
    rig.w(0, 7)
    rig.w(0, 8, unlock=False)
    assert rig.r(0) == 7
    rig.w(0, 0xFFF0_0009)
    assert rig.r(0) == 9, "20 bits"


def test_a_preload_counts_from_its_next_stage_on(rig: Rig) -> None:
    rig.start(1000, 1000)
    rig.w(0, 1)
    rig.w(4, 10)
    rig.pass_ticks(999)
    assert not rig.ends
    rig.pass_ticks(12)
    assert rig.ends


def test_switched_off_and_on(rig: Rig) -> None:
    rig.start(1000, 1000)
    rig.pass_ticks(1500)
    rig.pci.w(0x68, 1, 0)
    rig.pass_ticks(5000)
    rig.pci.w(0x68, 1, ENABLE)
    rig.pass_ticks(1500)
    assert not rig.ends
    assert rig.dog.starts == 2
    rig.pass_ticks(501)
    assert rig.ends


def test_a_locked_one_stays_on(rig: Rig) -> None:
    rig.start(1000, 1000)
    rig.pci.w(0x68, 1, ENABLE | LOCKED)
    rig.pci.w(0x68, 1, 0)
    assert rig.pci.r(0x68, 1) == ENABLE | LOCKED
    rig.pci.w(0x68, 1, FREE_RUN | LOCKED)
    assert rig.pci.r(0x68, 1) == ENABLE | LOCKED
    rig.pass_ticks(2001)
    assert rig.ends
    rig.host.reset()
    assert rig.pci.r(0x68, 1) == 0


def test_the_first_stage_interrupts(rig: Rig) -> None:
    rig.start(1000, 1000, config=0)
    rig.pass_ticks(1001)
    assert rig.line.level
    assert rig.r(8) == 1
    rig.pci.w(4, 2, 0x402)
    assert not rig.line.level, "INTx disabled"
    rig.pci.w(4, 2, 2)
    assert rig.line.level
    rig.w(8, 1, unlock=False)
    assert not rig.line.level
    assert rig.r(8) == 0
    assert not rig.ends


def test_without_an_output_it_only_remembers(rig: Rig) -> None:
    rig.start(10, 10, NO_IRQ | NO_OUTPUT)
    rig.pass_ticks(21)
    assert not rig.ends
    assert not rig.dog.fired
    assert rig.r(0xC) == 0x200


def test_free_running_has_the_second_stage_only(rig: Rig) -> None:
    rig.pci.w(0x60, 2, NO_IRQ)
    rig.w(0, 1_000_000)
    rig.w(4, 100)
    rig.pci.w(0x68, 1, ENABLE | FREE_RUN)
    rig.pass_ticks(101)
    rig.pass_ticks(101)
    assert rig.dog.fired == 2


def test_free_running_at_any_rate_is_bounded(rig: Rig) -> None:
    rig.pci.w(0x60, 2, NO_IRQ | FAST)
    rig.w(4, 0)
    rig.pci.w(0x68, 1, ENABLE | FREE_RUN)
    for _ in range(1000):
        rig.now += 1e-5
        rig.dog.advance()
    assert rig.dog.fired <= 2


@pytest.mark.parametrize(
    ("action", "ends", "pauses"),
    [("poweroff", [("poweroff", 0)], []), ("pause", [], [True]), ("none", [], [])],
)
def test_actions(action: str, ends: list[tuple[str, int]], pauses: list[bool]) -> None:
    rig = Rig(action)
    rig.start(10, 10)
    rig.pass_ticks(21)
    assert (rig.ends, rig.pauses, rig.dog.fired) == (ends, pauses, 1)
    rig.w(0xC, 0x100, 2)
    rig.pass_ticks(21)
    assert rig.dog.fired == 2, "a ping starts it again"
    rig.close()


def test_time_that_nobody_had_does_not_count(rig: Rig) -> None:
    """A process that was stopped, or a machine that is paused."""
    rig.start(10, 10)
    rig.now += STEP_S + STALL_S + 300
    rig.dog._forgive(STEP_S + STALL_S + 300, STEP_S)
    rig.dog.advance()
    assert not rig.ends
    rig.board.paused = lambda: True
    rig.now += 0.9
    rig.dog._forgive(0.9, STEP_S)
    rig.dog.advance()
    assert not rig.ends
    rig.board.paused = lambda: False
    rig.now += STEP_S
    rig.dog._forgive(STEP_S, STEP_S)
    rig.dog.advance()
    assert rig.ends


def test_reads_and_writes_of_any_width(rig: Rig) -> None:
    rig.w(1, 0xAB, 1)
    assert rig.r(0) == 0xAB00
    for offset in range(16):
        for size in (1, 2, 4, 8):
            if offset + size <= 16:
                rig.mmio.read(rig.base + offset, size)
                rig.w(offset, (1 << (8 * size)) - 1, size)
                rig.w(offset, 0, size, unlock=False)


def test_on_the_hosts_clock() -> None:
    """The thread: there from the first start on, gone with the device."""
    rig = Rig(real=True)
    assert "vmm-watchdog0" not in {t.name for t in threading.enumerate()}
    rig.start(1, 1)
    wait_for(lambda: rig.ends)
    assert rig.ends == [("watchdog", 255)]
    rig.start(0xF_FFFF, 1)
    rig.close()
    assert "vmm-watchdog0" not in {t.name for t in threading.enumerate()}


def test_options() -> None:
    spec = parse("watchdog,pause")
    assert spec.options.action == "pause"
    assert parse("watchdog").options.action == "reset"
    with pytest.raises(ConfigError, match="must be one of reset, poweroff, pause, none"):
        parse("watchdog,action=bark")


def test_a_result() -> None:
    assert "watchdog" in REASONS
    with pytest.raises(GuestLost):
        RunResult(255, "watchdog").check()
