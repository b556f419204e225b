"""Sees one run of the nested machine through: streams, signals, deadlines, the command's end."""

from __future__ import annotations

import os
import select
import signal
import time
from contextlib import suppress

from vmm.errors import STATUS_TIMEOUT, HostError
from vmm.nested.streams import Input, Output

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmm.nested.plan import Plan
    from vmm.nested.qemu import Qemu
    from vmm.nested.terminal import Terminal

_GRACE_S = 5.0  # between a forwarded SIGTERM and the end of everything
_DRAIN_S = 1.0  # for the last words of a machine that has ended
_LOG_KEEP = 64 * 1024
_OUT_OF_MEMORY = b"Out of memory: Killed process"  # as the kernel says it
_TAIL, _TAIL_PANIC = 30, 100  # lines of it that are shown, and shown after a panic
_ESCAPE = b"\x1d"  # Ctrl-], three times within a second, ends the machine

_INTERRUPTS = (signal.SIGINT, signal.SIGQUIT)
_ENDINGS = (signal.SIGTERM, signal.SIGHUP)
_PASSED = (signal.SIGUSR1, signal.SIGUSR2)
_HANDLED = (*_INTERRUPTS, *_ENDINGS, *_PASSED, signal.SIGWINCH, signal.SIGCONT)


class Finished(Exception):
    """The run is over with this exit status."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class MachineLost(HostError):
    """The machine ended, or hangs, and not by the command's doing."""


class _Ready(Exception):
    """The machine waits for its plan."""


class _TooLate(Exception):
    """It takes longer than it may."""


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
        for signo in _HANDLED:
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


class Pump:
    """The host's half of a session with one machine; ``run`` gives the command's exit status.

    ``outputs`` maps port names to streams, ``stdin`` may be None. ``limit`` is on time.monotonic's
    clock. With ``verbose`` the machine's log is copied to stderr as it comes; else the last of it
    is kept in ``log``. Both ``boot`` and ``run`` raise Finished when signals or the limit end it,
    HostError when the machine cannot run the command, and MachineLost when it fails.
    """

    def __init__(
        self,
        qemu: Qemu,
        plan: Plan,
        signals: Signals,
        terminal: Terminal,
        stdin: Input | None,
        outputs: dict[str, Output],
        limit: float | None,
        verbose: bool,
    ) -> None:
        self.log = bytearray()
        self.started_at: float | None = None
        self._qemu = qemu
        self._plan = plan
        self._signals = signals
        self._terminal = terminal
        self._stdin = stdin
        self._outputs = outputs
        self._verbose = verbose
        self._limit = limit
        self._boot_limit = 0.0
        self._planned = False
        self._grace: tuple[float, int] | None = None
        self._interrupted = False
        self._commands = bytearray()  # lines on their way to the guest
        self._lines = b""  # from the guest, the last one perhaps not whole
        self._result: tuple[int, dict[str, int]] | None = None
        self._escapes: list[float] = []

    def boot(self, patience: float) -> bool:
        """Until the machine waits for its plan; False when it does not after so many seconds."""
        self._boot_limit = time.monotonic() + patience
        try:
            while True:
                self._wait()
        except _Ready:
            return True
        except _TooLate:
            return False

    def run(self, patience: float) -> int:
        """Send the plan; until the command has ended and its output is delivered. It must have
        started after ``patience`` seconds."""
        self._boot_limit = time.monotonic() + patience
        for output in self._outputs.values():
            output.begin()
        plan = self._plan.encode()
        self._tell(f"plan {len(plan)}")
        self._commands += plan
        self._planned = True
        try:
            while True:
                self._wait()
        except Finished as end:
            return end.status
        except _TooLate:
            raise MachineLost("The nested machine did not start the command in time") from None

    def _wait(self) -> None:
        poll = select.poll()
        for fd, events in self._interests():
            poll.register(fd, events)
        ready = dict(poll.poll(self._next_deadline()))
        self._check_signals(ready)
        self._check_deadlines()
        self._read_log(ready)
        self._control(ready)
        if self._stdin is not None and self._qemu.ports:
            self._move_input(self._stdin, ready)
        for output in self._outputs.values():
            fd, _ = output.wants(self._qemu.ports[output.name])
            if fd in ready:
                self._move_output(output)
        self._check_result()
        if self._qemu.pidfd in ready:
            self._machine_ended()

    def _interests(self) -> Iterator[tuple[int, int]]:
        qemu = self._qemu
        yield self._signals.fd, select.POLLIN
        yield qemu.pidfd, select.POLLIN
        yield qemu.serial.fileno(), select.POLLIN
        yield qemu.errors, select.POLLIN
        control = select.POLLIN | (select.POLLOUT if self._commands else 0)
        yield qemu.ports["ctl"].fileno(), control
        if self._stdin is not None and self.started_at is not None:
            want = self._stdin.wants(qemu.ports["in"])
            if want is not None:
                yield want
        for output in self._outputs.values() if self._planned else ():
            if not output.ended or output.pending:
                yield output.wants(qemu.ports[output.name])

    def _next_deadline(self) -> float | None:
        limits = [self._limit, self._grace[0] if self._grace else None]
        if self.started_at is None:
            limits.append(self._boot_limit)
        nearest = min((limit for limit in limits if limit is not None), default=None)
        if nearest is None:
            return None
        return max(0.0, nearest - time.monotonic()) * 1000 + 1

    def _check_deadlines(self) -> None:
        now = time.monotonic()
        if self._limit is not None and now >= self._limit:
            raise Finished(STATUS_TIMEOUT)
        if self._grace is not None and now >= self._grace[0]:
            raise Finished(128 + self._grace[1])
        if self.started_at is None and now >= self._boot_limit:
            raise _TooLate

    def _check_signals(self, ready: dict[int, int]) -> None:
        for signo in self._signals.take() if self._signals.fd in ready else []:
            if signo == signal.SIGWINCH:
                if self._terminal.fd >= 0:
                    self._tell("winch {} {}".format(*self._terminal.size()))
            elif signo == signal.SIGCONT:
                if self.started_at is not None:
                    self._terminal.make_raw()  # whoever stopped us may have reset it
            elif self.started_at is None and signo not in _PASSED:
                raise Finished(128 + signo)
            else:
                self._forward(signo)

    def _forward(self, signo: int) -> None:
        if signo in _INTERRUPTS:
            if self._interrupted:
                raise Finished(128 + signo)
            self._interrupted = True
        elif signo in _ENDINGS:
            if self._grace is not None:
                raise Finished(128 + signo)
            self._grace = (time.monotonic() + _GRACE_S, signo)
        self._tell(f"signal {signo}")

    def _tell(self, line: str) -> None:
        self._commands += line.encode() + b"\n"

    def _control(self, ready: dict[int, int]) -> None:
        port = self._qemu.ports["ctl"]
        if port.fileno() in ready:
            try:
                data = port.recv(4096)
            except OSError:
                data = b""
            *lines, self._lines = (self._lines + data).split(b"\n")
            for line in lines:
                self._answer(line.decode(errors="replace"))
        if self._commands:
            with suppress(OSError):  # full, or gone: its end is seen elsewhere
                del self._commands[: port.send(self._commands)]

    def _answer(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        if word == "started":
            self.started_at = time.monotonic()
            self._terminal.make_raw()
        elif word == "ready":
            raise _Ready
        elif word == "input-closed" and self._stdin is not None:
            self._stdin.ended = True
            self._stdin.pending = memoryview(b"")
        elif word == "exit":
            status, *counts = (int(text) for text in rest.split())
            self._result = status, dict(zip(("out", "err", "tty"), counts, strict=True))
        elif word == "fail":
            raise HostError(f"The nested machine could not run the command: {rest}")

    def _move_input(self, stdin: Input, ready: dict[int, int]) -> None:
        port = self._qemu.ports["in"]
        wanted = not stdin.pending and not stdin.ended
        if wanted and stdin.fd in ready:
            data = stdin.read()
            if self._terminal.raw_input:
                self._watch_escape(data)
            if stdin.ended:
                if self._terminal.raw_input:  # a terminal does not end: it goes away
                    self._forward(signal.SIGHUP)
                self._tell(f"eof {stdin.total}")
        if stdin.pending:
            stdin.send(port)

    def _watch_escape(self, data: bytes) -> None:
        now = time.monotonic()
        self._escapes = [when for when in self._escapes if now - when < 1.0]
        self._escapes += [now] * data.count(_ESCAPE)
        if len(self._escapes) >= 3:
            raise Finished(128 + signal.SIGKILL)

    def _move_output(self, output: Output) -> None:
        was_broken = output.broken
        output.step(self._qemu.ports[output.name])
        if output.broken and not was_broken:
            self._tell(f"close {output.name}")

    def _check_result(self) -> None:
        if self._result is None:
            return
        status, counts = self._result
        for output in self._outputs.values():
            short = output.taken < counts[output.name] and not output.ended
            if not output.broken and (short or output.pending):
                return
        for output in self._outputs.values():
            if output.error is not None:
                raise HostError(
                    f"Cannot write the command's std{output.name}: {output.error.strerror}"
                )
        if status == 128 + signal.SIGKILL and _OUT_OF_MEMORY in self.log:
            self._terminal.restore()
            say(["vmm: the nested machine ran out of memory; give it more with --memory"])
        raise Finished(status)

    def _read_log(self, ready: dict[int, int]) -> None:
        for fd in (self._qemu.serial.fileno(), self._qemu.errors):
            if fd not in ready:
                continue
            try:
                data = os.read(fd, 65536)
            except OSError:
                continue
            self.log += data
            del self.log[:-_LOG_KEEP]
            if self._verbose:
                text = data.replace(b"\r\n", b"\n")
                if self._terminal.raw_output and self.started_at is not None:
                    text = text.replace(b"\n", b"\r\n")
                with suppress(OSError):
                    os.write(2, text)

    def _machine_ended(self) -> None:
        # Its last words are still in the sockets; nobody writes to them any more.
        limit = time.monotonic() + _DRAIN_S
        while time.monotonic() < limit:
            poll = select.poll()
            wanted = [self._qemu.serial.fileno(), self._qemu.errors]
            wanted += [port.fileno() for port in self._qemu.ports.values()]
            for fd in wanted:
                poll.register(fd, select.POLLIN)
            ready = {fd: ev for fd, ev in poll.poll(0) if ev & select.POLLIN}
            before = len(self.log), sum(out.taken for out in self._outputs.values())
            self._read_log(ready)
            self._control(ready)
            for output in self._outputs.values():
                self._move_output(output)
            self._check_result()
            after = len(self.log), sum(out.taken for out in self._outputs.values())
            if before == after and self._result is None:
                break
        raise MachineLost(_why_ended(self._qemu.wait(), self.log))


def _why_ended(status: int, log: bytearray) -> str:
    """One sentence about a machine that ended before its command did."""
    lines = log.decode(errors="replace").splitlines()
    for line in reversed(lines):
        for mark in ("vmm-init: ", "Kernel panic - not syncing: ", "qemu-system-x86_64: "):
            if mark in line:
                return f"The nested machine ended early: {line[line.index(mark) :].strip()}"
    if status < 0:
        return f"The nested machine ended early: QEMU was killed by signal {-status}"
    return f"The nested machine ended early: QEMU ended with status {status}"


def print_tail(log: bytearray) -> None:
    """The end of the machine's log on stderr, to go with an error: more of it after a panic, as
    the reason stands before that."""
    lines = log.decode(errors="replace").replace("\r", "").splitlines()[-_TAIL_PANIC:]
    if not any("Kernel panic" in line for line in lines):
        lines = lines[-_TAIL:]
    if lines:
        say(["--- the end of the nested machine's log ---", *lines])


def say(lines: list[str]) -> None:
    """Lines on descriptor 2, as sys.stderr is None when the caller had closed it."""
    with suppress(OSError):
        os.write(2, "".join(f"{line}\n" for line in lines).encode(errors="replace"))
