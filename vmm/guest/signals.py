"""Signals of this process as something to poll for."""

from __future__ import annotations

import os
import signal

#: What a terminal's keys send; what ends a program in order; what is passed on as it is.
INTERRUPTS = (signal.SIGINT, signal.SIGQUIT)
ENDINGS = (signal.SIGTERM, signal.SIGHUP)
PASSED = (signal.SIGUSR1, signal.SIGUSR2)
HANDLED = (*INTERRUPTS, *ENDINGS, *PASSED, signal.SIGWINCH, signal.SIGCONT)


class Signals:
    """Turns signals into something to poll for: ``fd`` becomes readable, ``take`` lists them.

    A context manager; the handlers before it come back at its end. Outside the main thread,
    where Python cannot have handlers, it does nothing.
    """

    __slots__ = ("_before", "_read", "_wakeup", "_write")

    def __enter__(self) -> Signals:
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._before: dict[int, object] = {}
        try:
            self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        except ValueError:
            return self
        for signo in HANDLED:
            # What the caller ignores (nohup) stays ignored.
            if signal.getsignal(signo) != signal.SIG_IGN:
                self._before[signo] = signal.signal(signo, lambda *_: None)
        return self

    def __exit__(self, *_: object) -> None:
        for signo, handler in self._before.items():
            signal.signal(signo, handler)  # type: ignore[arg-type]
        if self._before:
            signal.set_wakeup_fd(self._wakeup)
        os.close(self._read)
        os.close(self._write)

    @property
    def fd(self) -> int:
        return self._read

    def take(self) -> list[int]:
        """The numbers of the signals that came since the last call."""
        try:
            return [signo for signo in os.read(self._read, 4096) if signo in self._before]
        except BlockingIOError:
            return []
