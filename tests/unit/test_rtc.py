"""The CMOS clock: what Linux reads, sets and is interrupted by, on a clock of the test's own."""

from __future__ import annotations

import calendar
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.devices.rtc import Rtc
from vmm.irq import NullIrqChip

#: Century, year, month, day, hours, minutes, seconds.
CLOCK = (0x32, 9, 8, 7, 4, 2, 0)
#: 2026-03-04 23:59:58 UTC, a Wednesday.
T = calendar.timegm((2026, 3, 4, 23, 59, 58))


class Cmos:
    def __init__(self, memory: int = 0, t: float = T) -> None:
        self.t = float(t)
        self.irq = NullIrqChip().line(8)
        self.rtc = Rtc(self.irq, memory, now=lambda: self.t)

    def __getitem__(self, index: int) -> int:
        self.rtc.write(0, 1, index)
        return self.rtc.read(1, 1)

    def __setitem__(self, index: int, value: int) -> None:
        self.rtc.write(0, 1, index)
        self.rtc.write(1, 1, value)

    def clock(self) -> list[int]:
        """CLOCK as it stands in the registers."""
        return [self[i] for i in CLOCK]


@pytest.fixture
def cmos() -> Iterator[Cmos]:
    c = Cmos()
    yield c
    c.rtc.close()
    c.irq.close()


def test_time_in_bcd_and_24_hours(cmos: Cmos) -> None:
    assert cmos[0x0B] == 0x02
    assert cmos[0x0D] == 0x80
    assert cmos[0x0A] == 0x26
    assert cmos.clock() == [0x20, 0x26, 0x03, 0x04, 0x23, 0x59, 0x58]
    assert cmos[6] == 4  # Sunday is 1
    cmos.t += 2
    assert cmos.clock() == [0x20, 0x26, 0x03, 0x05, 0x00, 0x00, 0x00]


def test_time_in_binary_and_12_hours(cmos: Cmos) -> None:
    cmos[0x0B] = 0x06
    assert cmos.clock() == [20, 26, 3, 4, 23, 59, 58]
    cmos[0x0B] = 0x00
    assert cmos[4] == 0x80 | 0x11
    cmos.t += 2
    assert cmos[4] == 0x12
    cmos.t += 12 * 3600
    assert cmos[4] == 0x80 | 0x12


def test_update_in_progress(cmos: Cmos) -> None:
    """UIP announces an update 244 µs or more before the registers change."""
    for fraction, uip in ((0.0, 0), (0.5, 0), (0.9970, 0), (0.9985, 0x80), (0.9999, 0x80)):
        cmos.t = T + fraction
        assert cmos[0x0A] & 0x80 == uip
        assert cmos[0] == 0x58
    cmos[0x0A] = 0xFF  # UIP is read-only; the divider is in reset
    assert cmos[0x0A] == 0x7F


def test_set_the_clock_as_linux_does(cmos: Cmos) -> None:
    """mc146818_set_time(): SET and divider reset, write, start again."""
    cmos[0x0B] = 0x82
    cmos[0x0A] = 0x76
    for index, value in zip(CLOCK, (0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59), strict=True):
        cmos[index] = value
    cmos.t += 3600  # it stands while it is set
    assert cmos.clock() == [0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59]
    cmos[0x0B] = 0x02
    assert cmos[0] == 0x59
    cmos[0x0A] = 0x26
    assert cmos.clock() == [0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59]
    cmos.t += 1
    assert cmos.clock() == [0x20, 0x00, 0x01, 0x01, 0x00, 0x00, 0x00]
    cmos.rtc.reset()  # a reboot does not lose it
    assert cmos.clock() == [0x20, 0x00, 0x01, 0x01, 0x00, 0x00, 0x00]


def test_set_without_stopping(cmos: Cmos) -> None:
    cmos[2] = 0x30
    assert cmos.clock() == [0x20, 0x26, 0x03, 0x04, 0x23, 0x30, 0x58]


@given(st.integers(0, calendar.timegm((9999, 12, 31, 23, 59, 59))))
@settings(max_examples=300)
def test_every_time_survives_a_round_trip(t: int) -> None:
    cmos = Cmos()
    cmos[0x0B] = 0x86
    y, mon, d, h, m, s = time.gmtime(t)[:6]
    for index, value in zip(CLOCK, (y // 100, y % 100, mon, d, h, m, s), strict=True):
        cmos[index] = value
    cmos[0x0B] = 0x06
    assert cmos.clock() == [y // 100, y % 100, mon, d, h, m, s]
    cmos.irq.close()


def test_memory_size() -> None:
    def word(c: Cmos, low: int) -> int:
        return c[low] | c[low + 1] << 8

    small = Cmos(128 << 20)
    assert word(small, 0x15) == 640
    assert word(small, 0x17) == word(small, 0x30) == 0xFFFF
    assert word(small, 0x34) == (112 << 20) >> 16
    assert small[0x5B] | small[0x5C] << 8 | small[0x5D] << 16 == 0
    tiny = Cmos(32 << 20)
    assert word(tiny, 0x17) == 31 << 10
    big = Cmos(5 << 30)
    assert word(big, 0x34) == 0xC000 - 0x100
    assert big[0x5B] | big[0x5C] << 8 | big[0x5D] << 16 == (2 << 30) >> 16
    for c in (small, tiny, big):
        c.irq.close()


def test_ram_and_nmi_bit(cmos: Cmos) -> None:
    cmos[0x0F] = 0xA5
    cmos[0x7F] = 0x5A
    cmos.rtc.write(0, 1, 0x80 | 0x7F)
    assert cmos.rtc.nmi_off
    assert cmos.rtc.read(1, 1) == 0x5A
    assert cmos[0x0F] == 0xA5
    assert not cmos.rtc.nmi_off
    cmos[0x0D] = 0
    assert cmos[0x0D] == 0x80
    assert cmos.rtc.read(0, 1) == 0xFF
    cmos.rtc.write(0, 2, 0x770F)
    assert cmos[0x0F] == 0x77


def test_flags_without_interrupts(cmos: Cmos) -> None:
    assert cmos[0x0C] == 0
    cmos.t += 1
    assert cmos[0x0C] & 0x10
    assert cmos[0x0C] & 0x10 == 0
    assert cmos.irq.count == 0


@pytest.mark.parametrize(
    ("alarm", "seconds"),
    [
        ((0x00, 0x00, 0x01), 3),
        ((0xFF, 0xFF, 0x00), 2),
        ((0xC0, 0x30, 0xC0), 2 + 1800),
        ((0x23, 0x59, 0x58), 86400),
        ((0xFF, 0xFF, 0xFF), 1),
    ],
)
def test_alarm(cmos: Cmos, alarm: tuple[int, int, int], seconds: int) -> None:
    cmos[0x05], cmos[0x03], cmos[0x01] = alarm
    cmos[0x0C]
    if seconds > 1:
        cmos.t += seconds - 1
        assert cmos[0x0C] & 0x20 == 0
        cmos.t += 1
    else:
        cmos.t += seconds
    assert cmos[0x0C] & 0x20


@pytest.mark.parametrize("alarm", [(0x99, 0xFF, 0xFF), (0xFF, 0x60, 0xFF), (0xFF, 0xFF, 0x75)])
def test_alarm_at_no_time(cmos: Cmos, alarm: tuple[int, int, int]) -> None:
    cmos[0x05], cmos[0x03], cmos[0x01] = alarm
    cmos.t += 100_000
    assert cmos[0x0C] & 0x20 == 0


def test_interrupts_arrive_by_themselves() -> None:
    irq = NullIrqChip().line(8)
    rtc = Rtc(irq)

    def put(index: int, value: int) -> None:
        rtc.write(0, 1, index)
        rtc.write(1, 1, value)

    def wait(level: bool) -> None:
        end = time.monotonic() + 10
        while irq.level != level:
            assert time.monotonic() < end
            time.sleep(0.001)

    put(0x0A, 0x2A)  # 64 Hz
    put(0x0B, 0x42)
    for _ in range(3):
        wait(True)
        rtc.write(0, 1, 0x0C)
        assert rtc.read(1, 1) & 0xC0 == 0xC0
        assert not irq.level
    put(0x0B, 0x12)
    wait(True)
    rtc.write(0, 1, 0x0C)
    assert rtc.read(1, 1) & 0x90 == 0x90
    put(0x0B, 0x72)
    put(0x0A, 0x23)
    wait(True)
    count = irq.count
    time.sleep(0.1)
    assert irq.count == count  # unread: no storm
    rtc.reset()
    assert not irq.level
    rtc.close()
    rtc.close()
    irq.close()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from("rwt"),
            st.integers(0, 1),
            st.sampled_from([1, 2, 4]),
            st.integers(0, (1 << 32) - 1),
        ),
        max_size=40,
    )
)
def test_hostile_accesses(accesses: list[tuple[str, int, int, int]]) -> None:
    clock = Cmos()
    rtc = Rtc(None, 1 << 30, now=lambda: clock.t)
    for what, offset, size, value in accesses:
        if what == "r":
            assert 0 <= rtc.read(offset, size) < 1 << (8 * size)
        elif what == "w":
            rtc.write(offset, size, value)
        else:
            clock.t += value / 1000 - 1_000_000
        rtc.fire()
    rtc.reset()
    rtc.close()
    clock.irq.close()
