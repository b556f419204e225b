"""What a test that failed is told about its guest."""

from __future__ import annotations

from vmm import oops
from vmm.errors import VmmError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.machine import Machine
    from vmm.testing.symbols import Symbols

#: Of the console.
TAIL_LINES = 60


def console_tail(machine: Machine, lines: int = TAIL_LINES) -> str:
    """The last lines of the guest's main console; empty without one."""
    if machine.result is not None:
        text = machine.result.console
    else:
        try:
            text = machine.console.text
        except VmmError:
            return ""
    return "\n".join(text.splitlines()[-lines:])


def describe(machine: Machine, symbols: Symbols | None = None) -> list[tuple[str, str]]:
    """(title, text) for each thing worth knowing about a guest whose test failed: how it ended,
    the worst that its kernel reported, with names for addresses where ``symbols`` has them, the
    vCPUs' registers and last exits, the console's end."""
    found: list[tuple[str, str]] = []
    result = machine.result
    if result is not None:
        found.append(("how the guest ended", f"{result.message} ({result.reason})"))
    tail = console_tail(machine, 400)
    worst = oops.worst(oops.scan(tail))
    if worst is not None:
        text = symbols.annotate(worst.text) if symbols else worst.text
        found.append((f"the guest's kernel: {worst.title}", text))
    try:
        where = result.diagnosis if result is not None else machine.diagnosis()
    except VmmError as error:
        where = f"(no registers: {error})"
    if where:
        found.append(("the guest's vCPUs", symbols.annotate(where) if symbols else where))
    end = console_tail(machine)
    if end:
        found.append((f"the guest's console, its last {len(end.splitlines())} lines", end))
    return found
