"""Interrupts that nobody takes, watched: pins by level and count, messages by where they go."""

from __future__ import annotations

import os
import select

from vmm._native import ffi, lib
from vmm.irq import IrqChip, IrqLine, MsiVector

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

#: Changes of one pin that are told at once; a device that is faster has the rest left out.
MAX_CHANGES = 64


def changes(before: tuple[int, int], now: tuple[int, int]) -> list[int]:
    """The levels a pin went through between two looks at its (level, rising edges)."""
    level, rises = before[0], min(now[1] - before[1], MAX_CHANGES)
    found: list[int] = []
    for _ in range(rises):
        found += [0, 1] if level else [1]
        level = 1
    if level != now[0]:
        found.append(now[0])
    return found


class WatchedChip(IrqChip):
    """Sources that signal ``fd`` (an epoll descriptor, readable) when something happened.

    ``deliver(address, data)`` gets each message, on the thread that calls ``poll``.
    """

    def __init__(self, deliver: Callable[[int, int], None]) -> None:
        self._deliver = deliver
        self._epoll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll.register(self._wake, select.EPOLLIN)
        self._vectors: dict[int, MsiVector] = {}
        self._lines: dict[int, list[IrqLine]] = {}
        self._seen: dict[int, tuple[int, int]] = {}
        self._changed = False
        #: Messages delivered so far.
        self.messages = 0

    @property
    def fd(self) -> int:
        return self._epoll.fileno()

    def wake(self) -> None:
        """Have whoever waits for ``fd`` look. Any thread."""
        os.eventfd_write(self._wake, 1)

    def line(self, gsi: int) -> IrqLine:
        line = IrqLine(lib.VMM_IRQ_WATCHED, self._wake, gsi)
        self._lines.setdefault(gsi, []).append(line)
        return line

    def edge(self, gsi: int) -> IrqLine:
        return self.line(gsi)

    def _bind(self, vector: MsiVector, on: bool) -> None:
        if on:
            self._vectors[vector.fd] = vector
            self._epoll.register(vector.fd, select.EPOLLIN)
        elif self._vectors.pop(vector.fd, None) is not None:
            self._epoll.unregister(vector.fd)
            # What came before the mask was on its way already.
            self._send(vector)

    def _send(self, vector: MsiVector) -> None:
        try:
            os.eventfd_read(vector.fd)
        except BlockingIOError:
            return
        self.messages += 1
        self._deliver(vector.addr, vector.data)

    def poll(self) -> None:
        """Deliver the messages that wait."""
        for fd, _ in self._epoll.poll(0):
            if fd == self._wake:
                os.eventfd_read(fd)
                self._changed = True
            elif fd in self._vectors:
                self._send(self._vectors[fd])

    def state(self, gsi: int) -> tuple[int, int]:
        """A pin's level (0 or 1) and its rising edges so far."""
        lines = [line for line in self._lines.get(gsi, ()) if line.native != ffi.NULL]
        self._lines[gsi] = lines
        return int(any(line.level for line in lines)), sum(line.count for line in lines)

    def collect(self) -> list[tuple[int, int]]:
        """(pin, level) of every change since the last call that ``poll`` heard of, in the pins'
        order."""
        if not self._changed:
            return []
        self._changed = False
        found = []
        for gsi in sorted(self._lines):
            now = self.state(gsi)
            before = self._seen.get(gsi, (0, 0))
            if now != before:
                self._seen[gsi] = now
                found += [(gsi, level) for level in changes(before, now)]
        return found

    def close(self) -> None:
        if self._wake >= 0:
            self._epoll.close()
            os.close(self._wake)
            self._wake = -1
