"""ACPI fixed registers: power button, power-off, reset."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.devices.acpi_pm import PWRBTN_STS, RTC_EN, SCI_EN, AcpiPm, ResetPort
from vmm.irq import NullIrqChip

STS, EN, CNT = 0, 2, 4


class Machine:
    def __init__(self) -> None:
        self.offs = 0
        self.sci = NullIrqChip().line(9)
        self.pm = AcpiPm(self.sci, self.off)

    def off(self) -> None:
        self.offs += 1


@pytest.fixture
def m() -> Machine:
    return Machine()


def test_the_button_raises_the_sci_only_when_enabled(m: Machine) -> None:
    m.pm.press_power_button()
    assert m.pm.read(STS, 2) == PWRBTN_STS
    assert not m.sci.level
    assert not m.pm.power_button_enabled
    m.pm.write(EN, 2, PWRBTN_STS)
    assert m.pm.power_button_enabled
    assert m.sci.level
    m.pm.write(STS, 2, PWRBTN_STS)
    assert m.pm.read(STS, 2) == 0
    assert not m.sci.level


def test_status_is_write_one_to_clear(m: Machine) -> None:
    m.pm.press_power_button()
    m.pm.write(STS, 2, 0xFFFF & ~PWRBTN_STS)
    assert m.pm.read(STS, 2) == PWRBTN_STS
    m.pm.write(STS + 1, 1, PWRBTN_STS >> 8)  # the byte lane alone
    assert m.pm.read(STS, 2) == 0


def test_a_32_bit_access_covers_status_and_enable(m: Machine) -> None:
    m.pm.press_power_button()
    m.pm.write(0, 4, PWRBTN_STS << 16 | PWRBTN_STS)
    assert m.pm.read(0, 4) == PWRBTN_STS << 16
    assert not m.sci.level
    m.pm.press_power_button()
    assert m.sci.level
    assert m.sci.count == 1


def test_unimplemented_enables_stay_clear(m: Machine) -> None:
    m.pm.write(EN, 2, 0xFFFF)
    assert m.pm.read(EN, 2) == PWRBTN_STS | 1 << 5 | RTC_EN


def test_the_machine_is_always_in_acpi_mode(m: Machine) -> None:
    assert m.pm.read(CNT, 2) == SCI_EN
    m.pm.write(CNT, 2, 0)
    assert m.pm.read(CNT, 2) == SCI_EN


@pytest.mark.parametrize("typ", range(8))
def test_sleep_enable_powers_off_for_s5_alone(m: Machine, typ: int) -> None:
    m.pm.write(CNT, 2, typ << 10)
    assert m.offs == 0
    m.pm.write(CNT, 2, 1 << 13 | typ << 10)
    assert m.offs == (1 if typ == 5 else 0)
    assert m.pm.read(CNT, 2) == typ << 10 | SCI_EN  # SLP_EN reads as 0


def test_sleep_enable_by_bytes(m: Machine) -> None:
    m.pm.write(CNT + 1, 1, 5 << 2)
    m.pm.write(CNT + 1, 1, 5 << 2 | 1 << 5)
    assert m.offs == 1


def test_reset_forgets_everything(m: Machine) -> None:
    m.pm.write(EN, 2, PWRBTN_STS)
    m.pm.press_power_button()
    m.pm.reset()
    assert m.pm.read(0, 4) == 0
    assert not m.sci.level


@given(
    st.lists(
        st.tuples(st.integers(0, 7), st.sampled_from((1, 2, 4, 8)), st.integers(0, (1 << 64) - 1))
    )
)
def test_nothing_the_guest_writes_breaks_an_invariant(
    accesses: list[tuple[int, int, int]],
) -> None:
    m = Machine()
    for offset, size, value in accesses:
        m.pm.write(offset, size, value & ((1 << 8 * size) - 1))
        assert 0 <= m.pm.read(offset, size) < 1 << 8 * size
        m.pm.press_power_button()
        assert m.sci.level == bool(m.pm.read(STS, 2) & m.pm.read(EN, 2))
        assert m.pm.read(CNT, 2) & (SCI_EN | 1 << 13) == SCI_EN


def test_reset_port() -> None:
    resets: list[int] = []
    port = ResetPort(lambda: resets.append(1))
    port.write(0, 1, 0x02)  # choose a hard reset, do not reset yet
    assert port.read(0, 1) == 0x02
    assert not resets
    port.write(0, 1, 0x06)
    assert len(resets) == 1
    assert port.read(0, 1) == 0x02
    port.reset()
    assert port.read(0, 1) == 0
