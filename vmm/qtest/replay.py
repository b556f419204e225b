"""Feed a recorded session to a fresh machine: ``python -m vmm.qtest.replay FILE [QEMU FLAG]...``

FILE is what -qtest-log wrote, or bare commands, one per line; ``#`` begins a comment. The machine's
flags come from the command line, else from FILE: the ``[I +...] ARGS`` line of a log, or a comment
``# args: -M pc -device ...``. After each command the I/O threads are waited for, so that the same
file does the same every time, whatever the host is busy with.

With --check the answers must be those recorded (interrupts aside). The status is 0, 1 when an
answer differs, as ``vmm qtest`` for what it cannot read; a crash is a crash.
"""

from __future__ import annotations

import shlex
import sys

from vmm.errors import ConfigError, VmmError
from vmm.qtest.machine import QtestMachine
from vmm.qtest.options import parse
from vmm.qtest.protocol import MAX_LINE, Protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

STATUS_DIFFERS = 1
_USAGE = "Usage: python -m vmm.qtest.replay [--check] FILE [QEMU FLAG]..."


class Step:
    """A command, where it stands, and what was answered when it was recorded."""

    __slots__ = ("answer", "command", "line")

    def __init__(self, line: int, command: str) -> None:
        self.line = line
        self.command = command
        self.answer: str | None = None


class Trace:
    """A recorded session: ``args`` (None: not in it) and ``steps``."""

    def __init__(self, lines: Iterable[str]) -> None:
        """Raises ConfigError."""
        self.args: list[str] | None = None
        self.steps: list[Step] = []
        for nr, line in enumerate(lines, 1):
            text = line.strip()
            if len(line) > MAX_LINE:
                raise ConfigError(f"line {nr} is longer than any command")
            if text.startswith("#"):
                key, _, value = text[1:].strip().partition(":")
                if key == "args":
                    self._take_args(nr, value)
            elif text[:3] in ("[R ", "[S ", "[I "):
                self._take(nr, text[1], text.partition("]")[2].strip())
            elif text:
                self.steps.append(Step(nr, text))

    def _take(self, nr: int, kind: str, text: str) -> None:
        if kind == "R":
            self.steps.append(Step(nr, text))
        elif kind == "S":
            if self.steps and not text.startswith("IRQ "):
                self.steps[-1].answer = text
        elif text.startswith("ARGS "):
            self._take_args(nr, text[5:])

    def _take_args(self, nr: int, text: str) -> None:
        try:
            self.args = shlex.split(text)
        except ValueError as e:
            raise ConfigError(f"line {nr}: {e}") from None


def replay(trace: Trace, args: list[str], *, check: bool = False) -> str:
    """Run it; gives a sentence about the first answer that differs, or nothing. Raises
    ConfigError, HostError, and what a device raised."""
    machine = QtestMachine(parse(args))
    try:
        protocol = Protocol(machine)
        for step in trace.steps:
            answer = protocol.answer(step.command)[-1]
            machine.settle()
            if machine.error is not None:
                raise machine.error
            if check and step.answer not in (None, answer):
                return f"line {step.line}: {step.command[:80]}: {answer}, not {step.answer}"
            ends, machine.ends[:] = machine.ends[:], []
            if any(what in ("poweroff", "debug-exit") for what, _ in ends):
                break
            if any(what in ("reset", "watchdog") for what, _ in ends):
                machine.reset()
        return ""
    finally:
        machine.close()


def main(argv: list[str]) -> int:
    check = "--check" in argv[:1]
    rest = argv[int(check) :]
    if not rest or rest[0] in ("-h", "--help"):
        print(_USAGE, file=sys.stderr)
        return 2 if not rest else 0
    try:
        try:
            with open(rest[0], encoding="utf-8", errors="backslashreplace") as file:
                trace = Trace(file)
        except OSError as e:
            raise ConfigError(f"{rest[0]} could not be read: {e.strerror}.") from e
        args = rest[1:] or trace.args
        if args is None:
            raise ConfigError(f"{rest[0]} does not say what machine it is for; add its flags.")
        difference = replay(trace, args, check=check)
    except VmmError as e:
        print(f"replay: {e}", file=sys.stderr)
        return e.status
    if difference:
        print(f"replay: {rest[0]}: {difference}", file=sys.stderr)
        return STATUS_DIFFERS
    print(f"replay: {rest[0]}: {len(trace.steps)} commands", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
