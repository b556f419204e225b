"""One run on this host: the machine, the terminal, signals, and what is said at the end."""

from __future__ import annotations

import os
import sys
import threading

from vmm.chario import HELP, QUIT
from vmm.cli import complain
from vmm.cli.report import FAILURES
from vmm.machine import Machine
from vmm.terminal import Terminal

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable
    from types import FrameType
    from typing import Any

    from vmm.chardev import CharDev
    from vmm.config import MachineConfig
    from vmm.result import RunResult
else:
    # The C half is all that is needed; the other one imports enum.
    import _signal as signal

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
KEYS = "Ctrl-A x ends the machine, Ctrl-A h shows what else Ctrl-A does"
HELP_TEXT = (
    "Ctrl-A x  end the machine",
    "Ctrl-A b  send a break",
    "Ctrl-A h  this help",
    "Ctrl-A a  send a Ctrl-A",
)


class Session:
    """Runs one machine from this process's terminal or pipes."""

    def __init__(self, config: MachineConfig, *, verbose: bool = False, quiet: bool = False):
        self.config = config
        self.verbose = verbose
        self.quiet = quiet
        self.machine = Machine(config)
        self.terminal = Terminal()
        #: The signal that ended the run, or 0; whether Ctrl-A x did.
        self.signal = 0
        self.quit = False
        self._done = False
        #: A disk has paused the guest.
        self._held = False
        self._consoles: list[CharDev] = []
        self._old: list[tuple[int, object]] = []
        self._old_wakeup = -1
        self._wake_r, self._wake_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def run(self) -> int:
        """From start to end; gives the exit status."""
        self._take_signals()
        watcher = threading.Thread(target=self._watch, name="vmm-signals", daemon=True)
        watcher.start()
        try:
            self.machine.start()
            self._consoles = list(self.machine.consoles)
            self._watch_disks()
            self._connect_terminal()
            self._greet()  # from here on keys are the guest's
            self._poke()
            result = self.machine.wait()
            self.terminal.restore()
            return self._report(result)
        finally:
            self._done = True
            self._poke()
            watcher.join(5.0)
            self.terminal.restore()
            self.machine.close()
            self._give_signals_back()

    # ---- signals and the terminal ---------------------------------------------------------

    def _take_signals(self) -> None:
        """Python's handlers run in the main thread, which may hold the machine's locks: they do
        nothing. The watcher hears of signals through a pipe."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._old_wakeup = signal.set_wakeup_fd(self._wake_w, warn_on_full_buffer=False)
        for number in (*ENDING, signal.SIGCONT, signal.SIGWINCH):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup
            self._old.append((number, signal.signal(number, _nothing)))

    def _give_signals_back(self) -> None:
        for number, handler in self._old:
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self._old:
            signal.set_wakeup_fd(self._old_wakeup)
        os.close(self._wake_r)
        os.close(self._wake_w)

    def _poke(self) -> None:
        """Have the watcher look at the world."""
        try:  # noqa: SIM105 - contextlib is an import more
            os.write(self._wake_w, b"\0")
        except BlockingIOError:
            pass

    def _watch(self) -> None:
        """The watcher's thread: signals, and what the user typed after Ctrl-A."""
        import select

        poll = select.poll()
        poll.register(self._wake_r, select.POLLIN)
        while not self._done:
            ready = [fd for fd, _ in poll.poll()]
            if self._wake_r in ready:
                for number in os.read(self._wake_r, 64):
                    self._handle_signal(number)
            for console in [] if self._done else self._consoles:
                poll.register(console.wake, select.POLLIN)
                if console.wake in ready:
                    self._handle_keys(console)

    def _handle_signal(self, number: int) -> None:
        if number == signal.SIGCONT:
            self._connect_terminal()
            for console in self._consoles:
                console.input.kick()
            if self._held:
                self._held = False
                self.machine.resume()
        elif number == signal.SIGWINCH:
            self._tell_size()
        elif number in ENDING:
            if self.signal:
                # The user insists; building or ending a machine in order takes too long.
                self.terminal.restore()
                os._exit(128 + number)
            self.signal = number
            self.machine.stop()

    def _handle_keys(self, console: CharDev) -> None:
        try:
            os.eventfd_read(console.wake)
        except BlockingIOError:
            return
        events = console.input.events()
        if events & HELP:
            complain("\n".join(HELP_TEXT))
        if events & QUIT:
            self.quit = True
            self.machine.stop()

    def _on_screen(self) -> bool:
        return "stdio" in (self.config.serial, self.config.console)

    def _connect_terminal(self) -> None:
        if self._on_screen() and not self._done:
            self.terminal.make_raw()

        self._tell_size()

    def _tell_size(self) -> None:
        """The guest's console is as large as the terminal it is on."""
        if self.config.console == "stdio" and os.isatty(self.terminal.fd) and not self._done:
            from vmm.devices.virtio.console import Console

            for device in self.machine.devices:
                if isinstance(device, Console):
                    device.resize(*self.terminal.size())

    def _watch_disks(self) -> None:
        """With werror=pause and its like, say why the guest stands still and how it goes on; say
        what becomes of back ends."""
        for device in self.machine.devices:
            disk: Any = device
            if hasattr(disk, "on_io_error"):
                disk.on_io_error = self._teller(disk.on_io_error)
            if hasattr(disk, "on_news"):
                disk.on_news = complain

    def _teller(self, pause: Callable[[Any, int], None]) -> Callable[[Any, int], None]:
        def tell(disk: Any, error: int) -> None:
            pause(disk, error)
            self._held = True
            complain(
                f"{disk.name} ({disk.path}): {os.strerror(error)}; the guest is paused and goes on "
                f"after 'kill -CONT {os.getpid()}', which tries again."
            )

        return tell

    # ---- what is said ---------------------------------------------------------------------

    def _greet(self) -> None:
        if self.quiet:
            return
        for console in self._consoles:
            if console.target == "pty":
                complain(f"{console.name} is on {console.path}")
        for device in self.machine.devices:
            for note in device.notes():
                complain(note)
        if self._on_screen() and os.isatty(0) and os.isatty(2):
            complain(KEYS)

    def _ended_by_signal(self) -> int:
        name = {int(signal.SIGINT): "Ctrl-C", int(signal.SIGTERM): "SIGTERM"}.get(
            self.signal, "SIGHUP"
        )
        if not self.quiet:
            complain(f"ended by {name}")
        return 128 + self.signal

    def _report(self, result: RunResult) -> int:
        """The end in words on stderr; gives the exit status."""
        failed = result.reason in FAILURES
        if self.config.debug_exits:
            from vmm.cli.report import exits

            print(exits(self.machine.exit_counts()), file=sys.stderr)
        if self.verbose:
            times = ", ".join(f"{name} {value:.3f}" for name, value in result.clocks.items())
            complain(f"{result.message} It ran for {result.duration_s:.3f} s ({times}).")
        if result.reason == "stopped" and self.signal:
            return self._ended_by_signal()
        if result.reason == "stopped" and self.quit:
            if not self.quiet:
                complain("ended from the keyboard")
            return 128 + signal.SIGINT
        if not self.verbose and (failed or (result.reason == "reset" and not self.quiet)):
            complain(result.message)
        if failed or self.verbose:
            from vmm.cli.report import explain

            explain(self.machine, result, on_screen=self._main_on_screen())
        # A payload's own status may be wider than what a process can show.
        return result.status & 0xFF

    def _main_on_screen(self) -> bool:
        return bool(self._consoles) and self._consoles[-1].target == "stdio"


def _nothing(number: int, frame: FrameType | None) -> None:
    """A handler, so that the signal does not end the process."""
