"""i8042: the keyboard controller, for what is left of it: a reset line and the A20 gate.

Nothing is plugged into it. It answers every command at once, so that a driver which probes it
finds neither keyboard nor mouse and does not wait for either.
"""

from __future__ import annotations

from vmm.device import Device

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.bus import Bus
    from vmm.irq import IrqLine

_DATA, _COMMAND, _PORT_A = 0, 4, 0x32

_OUTPUT_FULL, _SYSTEM, _IS_COMMAND, _UNLOCKED, _TIMEOUT = 0x01, 0x04, 0x08, 0x10, 0x40
_CTR_INTERRUPT, _CTR_SYSTEM, _CTR_NO_KEYBOARD, _CTR_NO_MOUSE, _CTR_TRANSLATE = 1, 4, 16, 32, 64
_RESEND = 0xFE
_A20 = 0x02


class I8042(Device):
    """Ports 0x60 (data), 0x64 (status and command) and 0x92 (A20 and fast reset).

    ``on_reset`` runs on the vCPU thread that asked. ``irq`` is line 1, the caller's, or None.
    """

    #: (port, offset this device sees)
    PORTS = ((0x60, _DATA), (0x64, _COMMAND), (0x92, _PORT_A))
    name = "i8042"

    def __init__(self, on_reset: Callable[[], None], irq: IrqLine | None = None) -> None:
        self._on_reset = on_reset
        self._irq = irq
        self.reset()

    def place(self, bus: Bus) -> None:
        for port, offset in self.PORTS:
            bus.insert(port, 1, self, offset)

    def reset(self) -> None:
        self._ram = bytearray(32)
        self._ram[0] = _CTR_INTERRUPT | _CTR_SYSTEM | _CTR_NO_MOUSE | _CTR_TRANSLATE
        self._status = _UNLOCKED
        self._data = 0
        #: The command whose data byte comes next.
        self._pending = 0
        self._outputs = 0x01 | _A20
        if self._irq is not None:
            self._irq.set(False)

    def read(self, offset: int, size: int) -> int:
        if offset == _COMMAND:
            return self._status | (self._ram[0] & _SYSTEM)
        if offset == _PORT_A:
            return self._outputs & _A20
        self._status &= ~(_OUTPUT_FULL | _TIMEOUT)
        if self._irq is not None:
            self._irq.set(False)
        return self._data

    def write(self, offset: int, size: int, value: int) -> None:
        value &= 0xFF
        if offset == _PORT_A:
            self._set_outputs(self._outputs & ~_A20 | value & _A20 | 1, reset=bool(value & 1))
        elif offset == _COMMAND:
            self._status |= _IS_COMMAND
            self._command(value)
        else:
            self._status &= ~_IS_COMMAND
            command, self._pending = self._pending, 0
            self._take(command, value)

    def _command(self, c: int) -> None:
        self._pending = 0
        answers = {0xA9: 0x01, 0xAA: 0x55, 0xAB: 0x00, 0xC0: 0x80, 0xD0: self._outputs}
        if 0x20 <= c < 0x40:
            self._answer(self._ram[c - 0x20])
        elif 0x60 <= c < 0x80 or 0xD1 <= c <= 0xD4:
            self._pending = c
        elif c in answers:
            self._answer(answers[c])
        elif c in (0xA7, 0xA8):
            self._set_control(_CTR_NO_MOUSE, c == 0xA7)
        elif c in (0xAD, 0xAE):
            self._set_control(_CTR_NO_KEYBOARD, c == 0xAD)
        elif c in (0xDD, 0xDF):
            self._set_outputs(self._outputs & ~_A20 | (_A20 if c == 0xDF else 0))
        elif c >= 0xF0:
            # Pulses those output lines whose bit is 0; line 0 is the CPU's reset.
            self._set_outputs(self._outputs, reset=not c & 1)

    def _take(self, command: int, value: int) -> None:
        if 0x60 <= command < 0x80:
            self._ram[command - 0x60] = value
        elif command == 0xD1:
            self._set_outputs(value | 1, reset=not value & 1)
        elif command in (0xD2, 0xD3):
            # There is no mouse port: what is looped back arrives as the keyboard's.
            self._answer(value)
        else:
            self._answer(_RESEND, _TIMEOUT)  # nobody is plugged in

    def _answer(self, value: int, flags: int = 0) -> None:
        self._data = value
        self._status = self._status & ~_TIMEOUT | _OUTPUT_FULL | flags
        if self._irq is not None:
            self._irq.set(bool(self._ram[0] & _CTR_INTERRUPT))

    def _set_control(self, bit: int, on: bool) -> None:
        self._ram[0] = self._ram[0] & ~bit | (bit if on else 0)

    def _set_outputs(self, value: int, *, reset: bool = False) -> None:
        self._outputs = value & 0xFF
        if reset:
            self._on_reset()
