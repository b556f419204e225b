"""CMOS: the MC146818A real-time clock and 128 bytes of battery-backed memory.

The clock shows the host's UTC plus what the guest set it off by. Between seconds it counts as the
chip does: UIP announces each update early enough to read all registers.
"""

from __future__ import annotations

import time
from _thread import allocate_lock

from vmm.device import Device
from vmm.devices.alarm import AlarmThread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.bus import Bus
    from vmm.irq import IrqLine

_SECONDS, _MINUTES, _HOURS, _WEEKDAY, _DAY, _MONTH, _YEAR = 0, 2, 4, 6, 7, 8, 9
_ALARM = (5, 3, 1)  # hours, minutes, seconds
_A, _B, _C, _D = 0x0A, 0x0B, 0x0C, 0x0D
#: Where the FADT says the century is. ACPI-6.5 §5.2.9 (CENTURY).
CENTURY = 0x32
_CLOCK = (_SECONDS, _MINUTES, _HOURS, _WEEKDAY, _DAY, _MONTH, _YEAR, CENTURY)

_A_UIP, _A_DIVIDER, _A_RESET, _A_RATE = 0x80, 0x70, 0x60, 0x0F
_B_SET, _B_BINARY, _B_24H = 0x80, 0x04, 0x02
#: Interrupt enables in B, and the flags in C: periodic, alarm, update ended.
_PERIODIC, _ALARMED, _UPDATED = 0x40, 0x20, 0x10
_SOURCES = _PERIODIC | _ALARMED | _UPDATED
_C_IRQF = 0x80
_D_VALID = 0x80

#: UIP rises 244 µs before an update, which takes 1984 µs. MC146818A, table 6.
_UIP_S = 0.002228
#: A guest that wants more interrupts per second than this gets this many.
_MIN_PERIOD_S = 1 / 1024
_BASE_KIB = 640
_HOLE = 0xC000_0000
_NEVER = 1 << 62


class Rtc(Device):
    """Index port 0x70 (bit 7: NMI off), data port 0x71.

    ``irq`` is line 8 and stays the caller's. ``memory`` bytes of RAM are told in the places where
    firmware leaves them: KiB at 0x15, 0x17, 0x30, and units of 64 KiB at 0x34 (above 16 MiB) and
    0x5B (above 4 GiB), for RAM that ends at ``hole`` below 4 GiB.
    """

    PORT = 0x70
    SIZE = 2
    name = "rtc"

    def __init__(
        self,
        irq: IrqLine | None = None,
        memory: int = 0,
        *,
        hole: int = _HOLE,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._irq = irq
        self._now = now
        self._lock = allocate_lock()
        self._offset = 0.0
        self._manual = False
        self._frozen = False
        self._ram = bytearray(128)
        self._ram[_A], self._ram[_B], self._ram[_D] = 0x26, _B_24H, _D_VALID
        self._tell_memory(memory, hole)
        self._timer: AlarmThread | None = None
        self.reset()

    def place(self, bus: Bus) -> None:
        bus.insert(self.PORT, self.SIZE, self)

    def use_clock(self, now: Callable[[], float]) -> None:
        """Another clock than at first, one that stands still by itself: no thread waits for it,
        and whoever moves it calls ``fire``. Before the guest runs."""
        self._now, self._manual = now, True
        self.reset()

    def reset(self) -> None:
        """The RESET pin: interrupts off; time and memory stay."""
        with self._lock:
            self._index = _D
            self.nmi_off = False
            self._ram[_B] &= ~_SOURCES & 0xFF
            self._ram[_C] = 0
            self._second, self._tick = self._marks()
            self._update_irq()

    def close(self) -> None:
        timer, self._timer = self._timer, None
        if timer is not None:
            timer.stop()

    # ---- the guest's accesses ---------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        value = 0
        for i in range(size):
            byte = self._read_data() if offset + i == 1 else 0xFF
            value |= byte << (8 * i)
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        for i in range(size):
            byte = value >> (8 * i) & 0xFF
            if offset + i == 0:
                self._index, self.nmi_off = byte & 0x7F, bool(byte & 0x80)
            elif offset + i == 1:
                self._write_data(byte)

    def _read_data(self) -> int:
        index = self._index
        with self._lock:
            if index in _CLOCK:
                return self._ram[index] if self._frozen else self._show()[index]
            if index == _A:
                return self._ram[_A] | (_A_UIP if self._updating() else 0)
            if index == _C:
                self._collect()
                value = self._ram[_C]
                self._ram[_C] = 0
                self._update_irq()
                self._kick()
                return value
            return self._ram[index]

    def _write_data(self, value: int) -> None:
        index = self._index
        with self._lock:
            if index in _CLOCK:
                self._set_clock(index, value)
            elif index in (_A, _B):
                self._control(index, value)
            elif index not in (_C, _D):
                self._ram[index] = value
            self._kick()

    def _control(self, index: int, value: int) -> None:
        self._collect()
        ram = self._ram
        ram[index] = value & ~_A_UIP if index == _A else value
        frozen = bool(ram[_B] & _B_SET) or ram[_A] & _A_DIVIDER >= _A_RESET
        if frozen and not self._frozen:
            for register, byte in self._show().items():
                ram[register] = byte
            ram[_B] &= ~_UPDATED  # SET clears UIE
        elif self._frozen and not frozen:
            self._offset = self._entered() - self._now()
        self._frozen = frozen
        self._second, self._tick = self._marks()
        self._update_irq()

    def _set_clock(self, index: int, value: int) -> None:
        if self._frozen:
            self._ram[index] = value
            return
        fraction = self._time() % 1
        for register, byte in self._show().items():
            self._ram[register] = byte
        self._ram[index] = value
        self._offset = self._entered() + fraction - self._now()
        self._second, self._tick = self._marks()

    # ---- time -------------------------------------------------------------------------------

    def _time(self) -> float:
        return self._now() + self._offset

    def _updating(self) -> bool:
        return not self._frozen and self._time() % 1 > 1 - _UIP_S

    def _encode(self, value: int) -> int:
        return value if self._ram[_B] & _B_BINARY else value // 10 << 4 | value % 10

    def _decode(self, byte: int) -> int:
        return byte if self._ram[_B] & _B_BINARY else (byte >> 4) * 10 + (byte & 15)

    def _show(self) -> dict[int, int]:
        """The clock's registers now, in the mode that B says."""
        t = time.gmtime(max(0, min(self._time(), _MAX_TIME)))
        hour = self._encode(t.tm_hour)
        if not self._ram[_B] & _B_24H:
            hour = self._encode((t.tm_hour + 11) % 12 + 1) | (0x80 if t.tm_hour >= 12 else 0)
        return {
            _SECONDS: self._encode(t.tm_sec),
            _MINUTES: self._encode(t.tm_min),
            _HOURS: hour,
            _WEEKDAY: (t.tm_wday + 1) % 7 + 1,
            _DAY: self._encode(t.tm_mday),
            _MONTH: self._encode(t.tm_mon),
            _YEAR: self._encode(t.tm_year % 100),
            CENTURY: self._encode(t.tm_year // 100),
        }

    def _hour(self, byte: int) -> int:
        if self._ram[_B] & _B_24H:
            return self._decode(byte)
        return self._decode(byte & 0x7F) % 12 + (12 if byte & 0x80 else 0)

    def _entered(self) -> int:
        """Seconds since the epoch that the registers say; nonsense carries over into the next
        minute, hour or day, as it would in counters."""
        ram = self._ram
        year = self._decode(ram[CENTURY]) * 100 + self._decode(ram[_YEAR])
        month = max(1, min(12, self._decode(ram[_MONTH])))
        days = _days(year, month) + self._decode(ram[_DAY]) - 1
        seconds = self._hour(ram[_HOURS]) * 3600 + self._decode(ram[_MINUTES]) * 60
        return max(0, days * 86400 + seconds + self._decode(ram[_SECONDS]))

    # ---- interrupts -------------------------------------------------------------------------

    def _period(self) -> float:
        """Seconds between periodic events, or 0. MC146818A, table 5 (32.768 kHz)."""
        rate = self._ram[_A] & _A_RATE
        if not rate:
            return 0.0
        return float(max(_MIN_PERIOD_S, (1 << (rate + 7 if rate < 3 else rate) - 1) / 32768))

    def _marks(self) -> tuple[int, int]:
        period = self._period()
        t = self._time()
        return int(t), int(t / period) if period else 0

    def _collect(self) -> None:
        """Set the flags of what happened since the last look."""
        second, tick = self._marks()
        if self._frozen:
            second = self._second
        if second > self._second:
            self._ram[_C] |= _UPDATED
            if self._next_alarm(self._second) <= second:
                self._ram[_C] |= _ALARMED
        if tick != self._tick:
            self._ram[_C] |= _PERIODIC
        self._second, self._tick = second, tick
        self._update_irq()

    def _update_irq(self) -> None:
        active = bool(self._ram[_C] & self._ram[_B] & _SOURCES)
        self._ram[_C] = self._ram[_C] & _SOURCES | (_C_IRQF if active else 0)
        if self._irq is not None:
            self._irq.set(active)

    def _next_alarm(self, after: int) -> int:
        """The first second behind ``after`` that matches; 0xC0 and above match everything."""
        h, m, s = (self._ram[i] for i in _ALARM)
        hours = range(24) if h >= 0xC0 else (self._hour(h),)
        minutes = range(60) if m >= 0xC0 else (self._decode(m),)
        seconds = range(60) if s >= 0xC0 else (self._decode(s),)
        if hours[0] > 23 or minutes[0] > 59 or seconds[0] > 59:
            return _NEVER
        midnight = after - after % 86400
        for day in (midnight, midnight + 86400):
            for hour in hours:
                if day + hour * 3600 + 3599 <= after:
                    continue
                for minute in minutes:
                    if day + hour * 3600 + minute * 60 + 59 <= after:
                        continue
                    for sec in seconds:
                        at = day + hour * 3600 + minute * 60 + sec
                        if at > after:
                            return at
        return _NEVER

    def _kick(self) -> None:
        """Under the lock: see that a thread waits for the next interrupt, if one is wanted."""
        if not self._ram[_B] & _SOURCES or self._irq is None or self._manual:
            return
        if self._timer is None:
            self._timer = AlarmThread("vmm-rtc", self.fire)
        self._timer.kick()

    def fire(self) -> float | None:
        """Raise what is due. How many seconds until the next event, or None: the guest must
        first read C or enable one, so no guest makes this thread run in circles."""
        with self._lock:
            self._collect()
            waiting = self._ram[_B] & ~self._ram[_C] & _SOURCES
            t = self._time()
            due = []
            if waiting & _UPDATED and not self._frozen:
                due.append(self._second + 1 - t)
            if waiting & _ALARMED and not self._frozen:
                due.append(self._next_alarm(self._second) - t)
            period = self._period()
            if waiting & _PERIODIC and period:
                due.append((self._tick + 1) * period - t)
            return max(0.0, min(due)) if due else None

    def _tell_memory(self, memory: int, hole: int) -> None:
        low, high = min(memory, hole), max(0, memory - hole)
        above_1m = min(max(0, low - (1 << 20)) >> 10, 0xFFFF)
        above_16m = min(max(0, low - (16 << 20)) >> 16, 0xFFFF)
        self._ram[0x15:0x17] = _BASE_KIB.to_bytes(2, "little")
        self._ram[0x17:0x19] = above_1m.to_bytes(2, "little")
        self._ram[0x30:0x32] = above_1m.to_bytes(2, "little")
        self._ram[0x34:0x36] = above_16m.to_bytes(2, "little")
        self._ram[0x5B:0x5E] = min(high >> 16, 0xFFFFFF).to_bytes(3, "little")
        self._ram[0x14] = 0x02  # equipment: a floating-point unit


def _days(year: int, month: int) -> int:
    """Days from 1970-01-01 to the first of a month, in the Gregorian calendar."""
    if month <= 2:
        year, month = year - 1, month + 12
    return 365 * year + year // 4 - year // 100 + year // 400 + (153 * month - 457) // 5 - 719468


#: The last second of 9999: `time.gmtime` goes further, four digits of a year do not.
_MAX_TIME = (_days(10000, 1)) * 86400 - 1
