"""The caller's terminal: raw while the guest's terminal is connected to it, then as it was."""

from __future__ import annotations

import os
import termios
from contextlib import suppress

_IFLAG, _OFLAG, _CFLAG, _LFLAG = 0, 1, 2, 3


class Terminal:
    """The terminal behind the standard streams, as far as the caller may use it.

    ``is_tty[i]`` says whether stream i is a terminal that the guest's command shall see as one.
    A job in the background gets none: touching the terminal would stop it. ``fd`` is the
    descriptor to write terminal output to, or -1.
    """

    __slots__ = ("_saved", "fd", "is_tty")

    def __init__(self) -> None:
        self.is_tty = [_usable(fd) for fd in range(3)]
        self.fd = next((fd for fd in (1, 2, 0) if self.is_tty[fd]), -1)
        self._saved: list[object] | None = None

    @property
    def raw_input(self) -> bool:
        """Will keys go to the guest one by one, with no meaning to the host?"""
        return self.is_tty[0]

    @property
    def raw_output(self) -> bool:
        """Will what is written appear as it is, a line feed not becoming a new line?"""
        return self.is_tty[0] and self.is_tty[1]

    def size(self) -> tuple[int, int]:
        """Rows and columns; 24 by 80 when the terminal does not say."""
        try:
            columns, rows = os.get_terminal_size(self.fd)
        except OSError:
            return 24, 80
        return (rows, columns) if rows and columns else (24, 80)

    def kind(self) -> str:
        """What $TERM says of it."""
        return os.environ.get("TERM") or "linux"

    def make_raw(self) -> None:
        """Hand the keyboard to the guest. What was typed before stays to be read."""
        if not self.raw_input:
            return
        try:
            mode = termios.tcgetattr(0)
        except termios.error:
            return
        if self._saved is None:
            self._saved = list(mode)
        mode[_IFLAG] &= ~(
            termios.IGNBRK
            | termios.BRKINT
            | termios.PARMRK
            | termios.ISTRIP
            | termios.INLCR
            | termios.IGNCR
            | termios.ICRNL
            | termios.IXON
        )
        # Where stdout goes elsewhere, a program outside may share this terminal and its ways.
        if self.raw_output:
            mode[_OFLAG] &= ~termios.OPOST
        mode[_CFLAG] = (mode[_CFLAG] & ~(termios.CSIZE | termios.PARENB)) | termios.CS8
        mode[_LFLAG] &= ~(
            termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN
        )
        mode[6][termios.VMIN], mode[6][termios.VTIME] = 1, 0
        _set(mode)

    def restore(self) -> None:
        """Put the terminal back; does nothing when it was not changed."""
        if self._saved is not None:
            _set(self._saved)
            self._saved = None


class NoTerminal(Terminal):
    """Where streams are pipes and files."""

    def __init__(self) -> None:
        self.is_tty = [False, False, False]
        self.fd = -1
        self._saved = None


def _usable(fd: int) -> bool:
    try:
        return os.isatty(fd) and os.tcgetpgrp(fd) == os.getpgrp()
    except OSError:
        return False


def _set(mode: list[object]) -> None:
    with suppress(termios.error):  # the terminal is gone: nothing is left to restore
        termios.tcsetattr(0, termios.TCSADRAIN, mode)  # type: ignore[arg-type]
