"""The terminal in raw mode while a guest has it, and restored whatever happens."""

from __future__ import annotations

import atexit
import os
import termios

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from types import FrameType, TracebackType
else:
    import _signal as signal  # what `signal` wraps, without importing enum


class Terminal:
    """A terminal in raw mode: every key goes to the guest, every byte of output arrives as is.

    Nothing happens on a descriptor that is no terminal, or whose foreground is another process
    group's. ``restore`` runs at exit at the latest, and on SIGTERM and SIGHUP where nobody else
    handles them.
    """

    def __init__(self, fd: int = 0) -> None:
        self.fd = fd
        self._saved: list[object] | None = None
        self._handlers: list[int] = []

    @property
    def raw(self) -> bool:
        return self._saved is not None

    def make_raw(self) -> bool:
        """Into raw mode, again if something else changed it; whether the terminal is raw now."""
        try:
            if os.tcgetpgrp(self.fd) != os.getpgrp():
                return False  # it would stop us with SIGTTOU
            now = termios.tcgetattr(self.fd)
        except (OSError, termios.error):
            return False
        if self._saved is None:
            self._saved = [*now[:6], list(now[6])]
            atexit.register(self.restore)
            self._take_signals()
        return self._set(_raw(now))

    def restore(self) -> None:
        """Back to what it was; more than once is fine."""
        saved, self._saved = self._saved, None
        if saved is None:
            return
        self._set(saved)
        atexit.unregister(self.restore)
        for number in self._handlers:
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, signal.SIG_DFL)
        self._handlers = []

    def size(self) -> tuple[int, int]:
        """(columns, rows); 80 by 24 where there is no terminal."""
        try:
            columns, rows = os.get_terminal_size(self.fd)
        except OSError:
            return 80, 24
        return columns or 80, rows or 24

    def __enter__(self) -> Terminal:
        self.make_raw()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.restore()

    def _set(self, attributes: list[object]) -> bool:
        # In the background tcsetattr stops the process, unless SIGTTOU is blocked.
        old = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTTOU,))
        try:
            termios.tcsetattr(self.fd, termios.TCSADRAIN, attributes)  # type: ignore[arg-type]
        except (OSError, termios.error):
            return False
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, old)
        return True

    def _take_signals(self) -> None:
        """Those whose default action would end the process without running atexit."""
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_DFL:
                continue
            try:
                signal.signal(number, self._on_signal)
            except ValueError:  # not the main thread: whoever has that one sees to it
                return
            self._handlers.append(number)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.restore()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _raw(attributes: list[object]) -> list[object]:
    """cfmakeraw(3), except that a newline stays carriage return and line feed on output: what
    vmm itself prints must stay readable, and a guest that sends both is not harmed."""
    iflag, oflag, cflag, lflag, ispeed, ospeed, cc = attributes
    assert isinstance(iflag, int)
    assert isinstance(oflag, int)
    assert isinstance(cflag, int)
    assert isinstance(lflag, int)
    assert isinstance(cc, list)
    t = termios
    iflag &= ~(t.IGNBRK | t.BRKINT | t.PARMRK | t.ISTRIP | t.INLCR | t.IGNCR | t.ICRNL | t.IXON)
    lflag &= ~(t.ECHO | t.ECHONL | t.ICANON | t.ISIG | t.IEXTEN)
    cflag = cflag & ~(t.CSIZE | t.PARENB) | t.CS8
    cc = list(cc)
    cc[t.VMIN], cc[t.VTIME] = 1, 0
    return [iflag, oflag, cflag, lflag, ispeed, ospeed, cc]
