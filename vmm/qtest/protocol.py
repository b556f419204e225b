"""The qtest protocol: a line is a command, a line is its answer.

``OK [VALUE]`` or ``FAIL REASON``; lines ``IRQ raise N`` and ``IRQ lower N`` may come before an
answer. Whatever a client sends is answered; nothing here raises for it.
"""

from __future__ import annotations

import base64
import binascii

from vmm.arch.base import native_qtest
from vmm.errors import MemoryFault

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from vmm.qtest.machine import QtestMachine

#: Bytes that one command moves at most.
MAX_DATA = 16 << 20
#: Bytes of a line: a write of so much, in hexadecimal, and the words before it.
MAX_LINE = 2 * MAX_DATA + 256
_MAX_WORD = 32
_WIDTHS = {"b": 1, "w": 2, "l": 4, "q": 8}
_TOP = 1 << 64
_PORTS = 1 << 16


class Refused(Exception):
    """The command is answered with FAIL and this text."""


def number(word: str) -> int:
    """As C reads numbers: 0x is hexadecimal, 0 octal; negative wraps. Raises Refused."""
    text = word.removeprefix("-")
    digits = text[2:] if text[:2] in ("0x", "0X") else text
    base = 16 if digits is not text else 8 if text[:1] == "0" else 10
    try:
        if not digits.isalnum() or not digits.isascii() or len(word) > _MAX_WORD:
            raise ValueError
        value = int(digits, base)
    except ValueError:
        raise Refused(f"'{word[:_MAX_WORD]}' is not a number") from None
    if value >= _TOP:
        raise Refused(f"{word} does not fit 64 bits")
    return -value % _TOP if text is not word else value


def _span(address: str, size: str, *, empty: bool = False) -> tuple[int, int]:
    """Raises Refused."""
    start, length = number(address), number(size)
    if length > MAX_DATA or not (length or empty):
        raise Refused(f"a size is from 1 to {MAX_DATA}, not {length}")
    if start + length > _TOP:
        raise Refused("the address space ends before that")
    return start, length


class Protocol:
    """The conversation. ``answer`` gives all lines that a command causes."""

    def __init__(self, machine: QtestMachine) -> None:
        self.machine = machine
        self._pins = native_qtest().CONTROLLERS[0]
        self._intercepted = ""
        self._commands: dict[str, tuple[int, int, Callable[..., str]]] = {
            "read": (2, 2, self._read),
            "write": (3, 3, self._write),
            "b64read": (2, 2, self._b64read),
            "b64write": (3, 3, self._b64write),
            "memset": (3, 3, self._memset),
            "clock_step": (0, 1, self._clock_step),
            "clock_set": (1, 1, self._clock_set),
            "irq_intercept_in": (1, 1, self._intercept),
            "irq_intercept_out": (1, 2, self._intercept),
            "set_irq_in": (4, 4, self._set_irq),
            "endianness": (0, 0, lambda: "little"),
        }
        for letter, size in _WIDTHS.items():
            self._commands[f"read{letter}"] = (1, 1, self._loader(size))
            self._commands[f"write{letter}"] = (2, 2, self._storer(size))
            if size < 8:
                self._commands[f"in{letter}"] = (1, 1, self._inner(size))
                self._commands[f"out{letter}"] = (2, 2, self._outer(size))

    def answer(self, line: str) -> list[str]:
        """Lines without their ends: interrupts that came meanwhile, then the answer."""
        words = line.split()
        reply = self._run(words[0], words[1:]) if words else "FAIL an empty line"
        return [*self.interrupts(), reply]

    def interrupts(self) -> list[str]:
        """What happened at the watched pins since the last look. MSIs are delivered."""
        self.machine.chip.poll()
        changes = self.machine.chip.collect()
        if not self._intercepted:
            return []
        return [f"IRQ {'raise' if level else 'lower'} {pin}" for pin, level in changes]

    def _run(self, command: str, words: list[str]) -> str:
        known = self._commands.get(command)
        if known is None:
            return f"FAIL Unknown command '{command[:_MAX_WORD]}'"
        least, most, run = known
        if not least <= len(words) <= most:
            return f"FAIL {command} takes {least} words, not {len(words)}"
        try:
            value = run(*words)
        except (Refused, MemoryFault) as e:
            return f"FAIL {e}"
        return f"OK {value}" if value else "OK"

    # ---- ports and memory, an item at a time

    def _port(self, word: str) -> int:
        port = number(word)
        if port >= _PORTS:
            raise Refused(f"there is no port {port:#x}")
        return port

    def _inner(self, size: int) -> Callable[[str], str]:
        return lambda port: f"0x{self.machine.board.pio.read(self._port(port), size):04x}"

    def _outer(self, size: int) -> Callable[[str, str], str]:
        def run(port: str, value: str) -> str:
            self.machine.board.pio.write(
                self._port(port), size, number(value) & ((1 << 8 * size) - 1)
            )
            return ""

        return run

    def _loader(self, size: int) -> Callable[[str], str]:
        return lambda address: f"0x{self.machine.space.load(number(address), size):016x}"

    def _storer(self, size: int) -> Callable[[str, str], str]:
        def run(address: str, value: str) -> str:
            self.machine.space.store(number(address), size, number(value) & ((1 << 8 * size) - 1))
            return ""

        return run

    # ---- memory in bulk

    def _read(self, address: str, size: str) -> str:
        return "0x" + self.machine.space.read(*_span(address, size)).hex()

    def _write(self, address: str, size: str, data: str) -> str:
        start, length = _span(address, size)
        text = data[2 : 2 + 2 * length]
        try:
            if data[:2] != "0x" or not data.isascii():
                raise ValueError
            given = bytes.fromhex(text)
        except ValueError:
            raise Refused("the data must be 0x and pairs of hexadecimal digits") from None
        self.machine.space.write(start, given.ljust(length, b"\0"))
        return ""

    def _b64read(self, address: str, size: str) -> str:
        return base64.b64encode(self.machine.space.read(*_span(address, size))).decode()

    def _b64write(self, address: str, size: str, data: str) -> str:
        start, length = _span(address, size)
        try:
            given = base64.b64decode(data, validate=True)
        except (binascii.Error, ValueError):
            raise Refused("the data is not base64") from None
        if len(given) != length:
            raise Refused(f"the data is {len(given)} bytes long, not {length}")
        self.machine.space.write(start, given)
        return ""

    def _memset(self, address: str, size: str, value: str) -> str:
        start, length = _span(address, size, empty=True)
        self.machine.space.write(start, bytes([number(value) & 0xFF]) * length)
        return ""

    # ---- time

    def _clock_step(self, ns: str = "") -> str:
        self.machine.settle()
        self.machine.step(number(ns) % (_TOP // 2) if ns else self.machine.next_event())
        return str(self.machine.clock)

    def _clock_set(self, ns: str) -> str:
        self.machine.settle()
        self.machine.step(max(0, number(ns) - self.machine.clock))
        return str(self.machine.clock)

    # ---- interrupts

    def _intercept(self, path: str, name: str = "") -> str:
        if not self.machine.pins(path):
            raise Refused(f"Unknown device: the pins that can be watched are {self._pins}'s")
        self.interrupts()  # what was is not told
        self._intercepted = path
        return ""

    def _set_irq(self, path: str, name: str, pin: str, level: str) -> str:
        if not self.machine.pins(path):
            raise Refused(f"Unknown device: the pins that can be driven are {self._pins}'s")
        self.machine.drive_pin(number(pin), bool(number(level)))
        return ""

    def forget(self) -> None:
        """Another client comes."""
        self._intercepted = ""
