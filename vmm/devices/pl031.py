"""PL031, a real-time clock that counts seconds. Arm DDI 0224C."""

from __future__ import annotations

import time
from _thread import allocate_lock

from vmm.device import Device
from vmm.devices.alarm import AlarmThread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.irq import IrqLine

# Data, match, load, control, interrupt mask, raw and masked status, clear. DDI 0224C §3.2.
DR, MR, LR, CR, IMSC, RIS, MIS, ICR = range(0, 0x20, 4)
#: PeriphID0-3 and PCellID0-3, one byte in each of the last eight registers. DDI 0224C §3.4.
IDENTITY, _IDENTITY_AT = bytes.fromhex("31 10 04 00 0d f0 05 b1"), 0xFE0
_MASK = 0xFFFF_FFFF


class Pl031(Device):
    """Seconds since 1970 by the host's UTC, plus what the guest set it off by; one alarm.

    ``irq`` is level-triggered and stays the caller's. The counter always runs. Registers are 32
    bits wide; an access of another width reads zeros and writes nothing.
    """

    SIZE = 0x1000
    name = "rtc"

    def __init__(self, irq: IrqLine | None = None, *, now: Callable[[], float] = time.time) -> None:
        self._irq = irq
        self._now = now
        self._lock = allocate_lock()
        self._offset = 0
        self._timer: AlarmThread | None = None
        self.reset()

    def reset(self) -> None:
        """Interrupts off; the time stays."""
        with self._lock:
            self._match = self._load = self._enabled = self._raised = 0
            #: Up to which second the match was looked for.
            self._seen = self._time()
            self._update_irq()

    def close(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.stop()

    def read(self, offset: int, size: int) -> int:
        if size != 4 or offset % 4:
            return 0
        if offset >= _IDENTITY_AT:
            return IDENTITY[(offset - _IDENTITY_AT) // 4]
        with self._lock:
            self._look()
            return {
                DR: self._time() & _MASK,
                MR: self._match,
                LR: self._load,
                CR: 1,
                IMSC: self._enabled,
                RIS: self._raised,
                MIS: self._raised & self._enabled,
            }.get(offset, 0)

    def write(self, offset: int, size: int, value: int) -> None:
        if size != 4 or offset % 4:
            return
        with self._lock:
            self._look()
            if offset == MR:
                self._match = value
            elif offset == LR:
                self._load = value
                self._offset += value - (self._time() & _MASK)
                self._seen = self._time()
            elif offset == IMSC:
                self._enabled = value & 1
            elif offset == ICR:
                self._raised &= ~value
            if offset in (MR, LR) and self._match == self._time() & _MASK:
                self._raised = 1
            self._update_irq()
            if self._enabled and self._irq is not None:
                if self._timer is None:
                    self._timer = AlarmThread("vmm-rtc", self.fire)
                self._timer.kick()

    def fire(self) -> float | None:
        """Raise what is due. How many seconds until the alarm, or None: the guest must first
        clear the last one, so no guest makes a thread run in circles."""
        with self._lock:
            self._look()
            if self._raised or not self._enabled:
                return None
            wait = (self._match - self._seen) & _MASK
            # What matches now was cleared by the guest; the next time is a whole round away.
            return (wait or _MASK + 1) - self._now() % 1

    def _time(self) -> int:
        return int(self._now()) + self._offset

    def _look(self) -> None:
        """Whether the alarm's second came since the last look. A host's clock may be set back."""
        now = self._time()
        if 0 < (self._match - self._seen) & _MASK <= now - self._seen:
            self._raised = 1
            self._update_irq()
        self._seen = now

    def _update_irq(self) -> None:
        if self._irq is not None:
            self._irq.set(bool(self._raised & self._enabled))
