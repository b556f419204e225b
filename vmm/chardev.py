"""Where a guest's console goes on the host: the terminal, a file, a pty, or memory only."""

from __future__ import annotations

import os

from vmm.chario import Input, Sink, Stream, Watch
from vmm.console import Console
from vmm.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

FLUSH_S = 5.0


class CharDev:
    """One console's host side: what the guest prints is kept in ``stream`` and passed on to the
    target; what the target says goes to ``input``. ``console`` is the library's face of both.

    Targets: ``stdio`` (this process's), ``pty`` (``path`` names it), ``buffer`` (memory only), or
    the path of a file, which is replaced and takes at most ``limit`` bytes.
    """

    def __init__(self, name: str, target: str, loop: Any, *, limit: int = 0) -> None:
        """``loop``: the struct vmm_loop * that reads the input; it outlives this object. Raises
        HostError."""
        self.name = name
        self.target = target
        self.path: str | None = None
        self.stream = Stream()
        self.input = Input()
        self.console = Console(self.stream, self.input)
        self.watch: Watch | None = None
        #: Readable when the terminal's user asked for something (``input.events``).
        self.wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._sink: Sink | None = None
        self._fds: list[int] = []
        try:
            self._open(loop, limit)
        except BaseException:
            self.close()
            raise

    def _open(self, loop: Any, limit: int) -> None:
        if self.target == "buffer":
            return
        if self.target == "stdio":
            self._sink = Sink(self.stream, 1, name="standard output")
            if _is_open(0):
                self.input.attach(loop, 0, escapes=os.isatty(0), eventfd=self.wake)
            return
        if self.target == "pty":
            fd = self._open_pty()
            self.input.attach(loop, fd, eventfd=self.wake)
            self._sink = Sink(self.stream, fd, name=self.path or "")
            return
        self.path = self.target
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            fd = os.open(self.target, flags, 0o644)
        except OSError as e:
            raise HostError(
                f"{self.name} cannot be written to {self.target}: {e.strerror}.", errno=e.errno
            ) from e
        self._fds.append(fd)
        self._sink = Sink(self.stream, fd, limit=limit, name=self.target)

    def _open_pty(self) -> int:
        import tty

        try:
            master, slave = os.openpty()
        except OSError as e:
            raise HostError(f"{self.name}: no pty is to be had: {e.strerror}.") from e
        # The slave stays open: without one, reads of the master fail until somebody connects.
        self._fds += [master, slave]
        tty.setraw(slave)
        self.path = os.ttyname(slave)
        return master

    def watch_for(self, patterns: tuple[bytes, ...], eventfd: int) -> None:
        """Have ``eventfd`` written when one of the patterns is printed."""
        self.watch = Watch(self.stream, patterns, eventfd)

    @property
    def matched(self) -> bool:
        return self.watch is not None and bool(self.watch.matched())

    def flush(self) -> None:
        """Let the target have what was printed so far, within reason."""
        if self._sink is not None:
            self._sink.flush(FLUSH_S)

    def finish(self) -> None:
        """The guest has ended: nothing more will be printed. The text can still be read."""
        self.flush()
        self.stream.finish()
        self.input.finish()

    def close(self) -> None:
        """After the devices that use it are closed, before the I/O thread goes."""
        self.input.detach()
        if self._sink is not None:
            self._sink.close()
            self._sink = None
        if self.watch is not None:
            self.watch.close()
            self.watch = None
        for fd in [*self._fds, self.wake]:
            if fd >= 0:
                os.close(fd)
        self._fds, self.wake = [], -1

    def free(self) -> None:
        """Give the memory back; the console's text is gone after this."""
        self.stream.close()
        self.input.close()


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
