"""PL031: time, the alarm, and whatever a guest writes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.waiting import wait_for
from vmm.devices.pl031 import CR, DR, ICR, IMSC, LR, MIS, MR, RIS, Pl031
from vmm.irq import IrqChip

T = 1_790_000_000.25


class Clock:
    def __init__(self) -> None:
        self.t = T
        self.irq = IrqChip().line(2)
        self.dev = Pl031(self.irq, now=lambda: self.t)

    def __getitem__(self, reg: int) -> int:
        return self.dev.read(reg, 4)

    def __setitem__(self, reg: int, value: int) -> None:
        self.dev.write(reg, 4, value)

    def close(self) -> None:
        self.dev.close()
        self.irq.close()


@pytest.fixture
def clock() -> Iterator[Clock]:
    made = Clock()
    yield made
    made.close()


def test_time_is_the_hosts_until_it_is_set(clock: Clock) -> None:
    assert clock[DR] == int(T)
    clock.t += 1
    assert clock[DR] == int(T) + 1
    clock[LR] = 1000
    assert (clock[DR], clock[LR]) == (1000, 1000)
    clock.t += 5
    assert clock[DR] == 1005
    clock[LR] = 0xFFFF_FFFF
    clock.t += 2
    assert clock[DR] == 1


def test_it_says_what_it_is_and_always_runs(clock: Clock) -> None:
    assert bytes(clock[reg] for reg in range(0xFE0, 0x1000, 4)).hex() == "311004000df005b1"
    clock[CR] = 0
    assert clock[CR] == 1


def test_an_alarm_and_its_clearing(clock: Clock) -> None:
    clock[MR] = int(T) + 3
    clock[IMSC] = 1
    clock.t += 2
    assert (clock[RIS], clock[MIS], clock.irq.level) == (0, 0, False)
    clock.t += 1
    assert (clock[RIS], clock[MIS], clock.irq.level) == (1, 1, True)
    clock[IMSC] = 0
    assert (clock[RIS], clock[MIS], clock.irq.level) == (1, 0, False)
    clock[IMSC] = 1
    clock[ICR] = 1
    assert (clock[RIS], clock.irq.level) == (0, False)
    clock.t += 100
    assert clock[RIS] == 0


def test_an_alarm_that_nobody_looked_for_is_not_lost(clock: Clock) -> None:
    clock[MR] = int(T) + 3
    clock.t += 1000
    assert clock[RIS] == 1


def test_an_alarm_for_now_is_due_and_one_for_before_is_not(clock: Clock) -> None:
    clock[MR] = int(T) - 1
    assert clock[RIS] == 0
    clock[MR] = int(T)
    assert clock[RIS] == 1
    clock[ICR] = 1
    clock[LR] = int(T)
    assert clock[RIS] == 1


def test_setting_the_time_passes_no_alarm(clock: Clock) -> None:
    clock[MR] = 2000
    clock[LR] = 1000
    clock[LR] = 3000
    assert clock[RIS] == 0


def test_a_host_clock_that_is_set_back_raises_nothing(clock: Clock) -> None:
    clock[MR] = int(T) + 10
    clock.t -= 1000
    assert (clock[DR], clock[RIS]) == (int(T) - 1000, 0)
    clock.t += 1010
    assert clock[RIS] == 1


def test_reset_keeps_the_time(clock: Clock) -> None:
    clock[LR] = 1000
    clock[MR] = 1000
    clock[IMSC] = 1
    assert clock.irq.level
    clock.dev.reset()
    assert not clock.irq.level
    assert [clock[reg] for reg in (DR, MR, LR, IMSC, RIS)] == [1000, 0, 0, 0, 0]


def test_when_the_next_alarm_is_due(clock: Clock) -> None:
    assert clock.dev.fire() is None
    clock[MR] = int(T) + 3
    clock[IMSC] = 1
    assert clock.dev.fire() == 2.75
    clock.t += 3
    assert clock.dev.fire() is None
    assert clock.irq.level
    clock[ICR] = 1  # in the same second
    assert clock.dev.fire() == (1 << 32) - 0.25
    assert not clock.irq.level


def test_an_interrupt_arrives_by_itself() -> None:
    irq = IrqChip().line(2)
    dev = Pl031(irq)
    dev.write(MR, 4, dev.read(DR, 4) + 1)
    dev.write(IMSC, 4, 1)
    wait_for(lambda: irq.level)
    dev.close()
    irq.close()


@pytest.mark.parametrize(("offset", "size"), [(LR, 1), (LR, 2), (LR, 8), (LR + 2, 4), (0xFE1, 1)])
def test_other_widths_are_nothing(clock: Clock, offset: int, size: int) -> None:
    clock.dev.write(offset, size, 5)
    assert clock.dev.read(offset, size) == 0
    assert clock[DR] == int(T)


accesses = st.tuples(
    st.one_of(st.sampled_from([DR, MR, LR, CR, IMSC, RIS, MIS, ICR]), st.integers(0, 0xFF8)),
    st.sampled_from([1, 2, 4, 8]),
    st.one_of(st.none(), st.integers(0, (1 << 64) - 1)),
    st.integers(-10, 1 << 33),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(accesses, max_size=40))
def test_whatever_a_guest_writes(todo: list[tuple[int, int, int | None, int]]) -> None:
    clock = Clock()
    clock.dev = Pl031(clock.irq, now=lambda: clock.t)
    for offset, size, value, seconds in todo:
        clock.t = max(0.0, clock.t + seconds)
        if value is None:
            assert 0 <= clock.dev.read(offset, size) < 1 << 8 * size
        else:
            clock.dev.write(offset, size, value & (1 << 8 * size) - 1)
        masked = clock[MIS]
        assert clock.irq.level == bool(masked)
        delay = clock.dev.fire()
        assert delay is None or delay > 0
    clock.close()
