"""ACPI fixed hardware: power button, power-off, reset. ACPI-6.5 §4.8.

The registers are PM1a only: event status and enable, control. There is no SMI command, so the
machine is always in ACPI mode and SCI_EN reads as 1.
"""

from __future__ import annotations

from _thread import allocate_lock

from vmm.device import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.irq import IrqLine

#: PM1a_EVT_BLK (status, enable) is 4 bytes at the PM base, PM1a_CNT_BLK the 2 that follow.
PM1_EVT_LEN = 4
PM1_CNT_LEN = 2

#: PM1 status and enable bits. ACPI-6.5 §4.8.3.1.
GBL_STS = 1 << 5
PWRBTN_STS = 1 << 8

#: PM1 control. ACPI-6.5 §4.8.3.2.
SCI_EN = 1 << 0
BM_RLD = 1 << 1
SLP_TYP_SHIFT = 10
SLP_TYP = 7 << SLP_TYP_SHIFT
SLP_EN = 1 << 13

#: The sleep type that the DSDT's \_S5 names.
SLP_TYP_S5 = 5

#: RESET_REG, an I/O port, and the value that resets. ACPI-6.5 §4.8.3.6.
RESET_PORT = 0xCF9
RESET_VALUE = 0x06
_RST_CPU = 1 << 2

#: RTC_EN can be set though no RTC event ever comes: Linux's driver enables it before it asks
#: whether there is one, and complains when the bit does not stick.
RTC_EN = 1 << 10
_ENABLES = GBL_STS | PWRBTN_STS | RTC_EN


class AcpiPm(Device):
    """PM1a registers at offsets 0 (status), 2 (enable) and 4 (control), 16 bits each.

    ``sci`` is a level-triggered line and stays the caller's. ``on_power_off`` runs on the vCPU
    thread whose guest wrote SLP_EN with the S5 type. ``press_power_button`` may be called from
    any thread.
    """

    SIZE = PM1_EVT_LEN + PM1_CNT_LEN
    name = "acpi-pm"

    def __init__(self, sci: IrqLine, on_power_off: Callable[[], None]) -> None:
        self._sci = sci
        self._on_power_off = on_power_off
        self._lock = allocate_lock()
        self._status = 0
        self._enable = 0
        self._control = SCI_EN

    def press_power_button(self) -> None:
        """Set the power-button status; the guest gets an SCI if it enabled that event."""
        with self._lock:
            self._status |= PWRBTN_STS
            self._update_sci()

    @property
    def power_button_enabled(self) -> bool:
        """Whether the guest listens: pressing the button without a listener does nothing."""
        return bool(self._enable & PWRBTN_STS)

    def _update_sci(self) -> None:
        self._sci.set(bool(self._status & self._enable))

    def read(self, offset: int, size: int) -> int:
        with self._lock:
            regs = self._status | self._enable << 16 | self._control << 32
        return regs >> (8 * offset) & ((1 << (8 * size)) - 1)

    def write(self, offset: int, size: int, value: int) -> None:
        # Accesses may cover part of a register or several: work on lanes of the whole block.
        mask = ((1 << (8 * size)) - 1) << (8 * offset)
        lanes = (value << (8 * offset)) & mask
        with self._lock:
            self._status &= ~(lanes & 0xFFFF)
            self._enable = self._merge(self._enable, lanes >> 16, mask >> 16) & _ENABLES
            cnt = self._merge(self._control, lanes >> 32, mask >> 32)
            self._control = cnt & (BM_RLD | SLP_TYP) | SCI_EN
            self._update_sci()
        if cnt & SLP_EN and (cnt & SLP_TYP) >> SLP_TYP_SHIFT == SLP_TYP_S5:
            self._on_power_off()

    @staticmethod
    def _merge(old: int, lanes: int, mask: int) -> int:
        return (old & ~mask | lanes & mask) & 0xFFFF

    def reset(self) -> None:
        with self._lock:
            self._status, self._enable, self._control = 0, 0, SCI_EN
            self._update_sci()


class ResetPort(Device):
    """RESET_REG, one byte at RESET_PORT: setting bit 2 resets. ACPI-6.5 §4.8.3.6.

    It lies inside the PCI configuration address port; a host bridge hands byte accesses on.
    ``on_reset`` runs on the vCPU thread that wrote.
    """

    SIZE = 1
    name = "reset"

    def __init__(self, on_reset: Callable[[], None]) -> None:
        self._on_reset = on_reset
        self._value = 0

    def read(self, offset: int, size: int) -> int:
        return self._value

    def write(self, offset: int, size: int, value: int) -> None:
        self._value = value & RESET_VALUE & ~_RST_CPU
        if value & _RST_CPU:
            self._on_reset()

    def reset(self) -> None:
        self._value = 0
