"""Somebody at a terminal."""

from __future__ import annotations

import os
import pty
import select
import signal
import termios
import time


class Typist:
    """A program on a terminal of its own, 33 lines of 77, which must be as it was in the end."""

    def __init__(self, argv: list[str], environment: dict[str, str], deadline: float) -> None:
        self.deadline = deadline
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execve(argv[0], argv, environment)
        termios.tcsetwinsize(self.fd, (33, 77))
        self.mode = termios.tcgetattr(self.fd)
        self.seen = b""

    def expect(self, text: bytes) -> None:
        limit = time.monotonic() + self.deadline
        while text not in self.seen:
            assert time.monotonic() < limit, self.seen
            if select.select([self.fd], [], [], 1)[0]:
                try:
                    self.seen += os.read(self.fd, 4096)
                except OSError:
                    raise AssertionError(self.seen) from None
        self.seen = self.seen[self.seen.index(text) + len(text) :]

    def type(self, text: bytes) -> None:
        os.write(self.fd, text)

    def end(self) -> int:
        """The exit status; the terminal must be as it was."""
        limit = time.monotonic() + self.deadline
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                break
            assert time.monotonic() < limit, self.seen
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.fd, 4096)
                except OSError:
                    time.sleep(0.05)
        self.pid = 0
        assert termios.tcgetattr(self.fd) == self.mode
        return os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.fd)
