"""Sees a command in a machine through: streams, signals, deadlines, the command's end."""

from __future__ import annotations

import os
import select
import signal
import time
from contextlib import suppress

from vmm.errors import STATUS_TIMEOUT, HostError
from vmm.guest.log import say
from vmm.guest.signals import ENDINGS, INTERRUPTS, PASSED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from socket import socket
    from typing import Protocol

    from vmm.errors import VmmError
    from vmm.guest.plan import Plan
    from vmm.guest.signals import Signals
    from vmm.guest.streams import Input, Output
    from vmm.guest.terminal import Terminal

    class Carrier(Protocol):
        """The machine as a pump needs it: ``ports`` by name, non-blocking; ``done``, readable
        when the machine has ended; ``logs``, descriptors of what it says; ``noun`` for messages.
        """

        noun: str
        ports: dict[str, socket]

        @property
        def done(self) -> int: ...

        @property
        def logs(self) -> Sequence[int]: ...

        def lost(self, log: bytearray) -> VmmError:
            """Why it ended, though its command had not."""
            ...


_GRACE_S = 5.0  # between a forwarded SIGTERM and the end of everything
PING_S = 2.0
_DRAIN_S = 1.0  # for the last words of a machine that has ended
_LOG_KEEP = 64 * 1024
_OUT_OF_MEMORY = b"Out of memory: Killed process"  # as the kernel says it
_LINE_MAX = 4096  # of the control port; /init's are shorter, others' words are not believed
_ESCAPE = b"\x1d"  # Ctrl-], three times within a second, ends the machine


class Finished(Exception):
    """The run is over with this exit status."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class MachineLost(HostError):
    """The machine ended, or hangs, and not by the command's doing."""


class MachineHung(MachineLost):
    """The machine is there, and was not heard from for too long."""


class _TooLate(Exception):
    """It takes longer than it may."""


class Job:
    """One command: the plan that starts it, and where its streams go.

    ``outputs`` maps port names to streams, ``stdin`` may be None. ``limit`` is on
    time.monotonic's clock. With ``silence`` the guest is asked for a sign of life every
    ``PING_S``, and hangs when it has given none for so many seconds.
    """

    __slots__ = ("limit", "outputs", "plan", "silence", "stdin", "terminal")

    def __init__(
        self,
        plan: Plan,
        terminal: Terminal,
        stdin: Input | None,
        outputs: dict[str, Output],
        limit: float | None = None,
        silence: float | None = None,
    ) -> None:
        self.plan = plan
        self.terminal = terminal
        self.stdin = stdin
        self.outputs = outputs
        self.limit = limit
        self.silence = silence


class Pulse:
    """Counts the pings without an answer. Waiting that was itself held up (a stopped process, a
    frozen container) counts as one, however long."""

    __slots__ = ("_missed", "_most", "due")

    def __init__(self, silence: float) -> None:
        self._most = max(1, round(silence / PING_S))
        self._missed = 0
        self.due = time.monotonic()

    def heard(self) -> None:
        self._missed = 0

    def ping(self) -> bool:
        """Whether it is time for another."""
        now = time.monotonic()
        if now < self.due:
            return False
        self.due = now + PING_S
        self._missed += 1
        return True

    @property
    def lost(self) -> bool:
        return self._missed > self._most


class Pump:
    """The host's half of a session with one machine; ``run`` gives the command's exit status.

    With ``verbose`` the machine's log is copied to stderr as it comes; else the last of it is kept
    in ``log``. Both ``boot`` and ``run`` raise Finished when signals or the limit end it,
    HostError when the machine cannot run the command, and what the carrier says when it is lost.
    A machine whose /init stays takes another command after ``again``.
    """

    def __init__(
        self, carrier: Carrier, job: Job, signals: Signals | None, *, verbose: bool = False
    ) -> None:
        self.log = bytearray()
        self.sent = 0  # bytes of input that the port has been given, for all commands
        self._carrier = carrier
        self._signals = signals
        self._verbose = verbose
        self._commands = bytearray()  # lines on their way to the guest
        self._lines = b""  # from the guest, the last one perhaps not whole
        self._ready = False
        self._failure: str | None = None  # why the guest cannot run the command
        self.again(job)

    def again(self, job: Job) -> None:
        """The next command is this one."""
        self.started_at: float | None = None
        self._plan = job.plan
        self._terminal = job.terminal
        self._stdin = job.stdin
        self._outputs = job.outputs
        self._limit = job.limit
        self._silence = job.silence
        self._pulse: Pulse | None = None
        self._boot_limit: float | None = None
        self._planned = False
        self._grace: tuple[float, int] | None = None
        self._interrupted = False
        self._result: tuple[int, dict[str, int]] | None = None
        self._escapes: list[float] = []

    @property
    def exited(self) -> bool:
        """The command ended by itself, or was killed in the guest."""
        return self._result is not None

    def boot(self, patience: float | None = None) -> bool:
        """Until the machine waits for its plan; False when it does not after so many seconds."""
        self._be_patient(patience)
        try:
            while not self._ready:
                self._wait()
        except _TooLate:
            return False
        return True

    def run(self, patience: float | None = None) -> int:
        """Send the plan; until the command has ended and its output is delivered. It must have
        started after ``patience`` seconds."""
        self._be_patient(patience)
        for output in self._outputs.values():
            output.begin()
        plan = self._plan.encode()
        self._tell(f"plan {len(plan)}")
        self._commands += plan
        self._planned = True
        self._ready = False
        try:
            while True:
                self._wait()
        except Finished as end:
            return end.status
        except _TooLate:
            noun = self._carrier.noun
            raise MachineLost(f"The {noun} did not start the command in time") from None

    def kill(self, grace: float) -> bool:
        """End a command that was given up, with all that it started; False when the guest has
        not done so after ``grace`` seconds."""
        self._limit = self._stdin = None
        if self._result is None:
            self._tell(f"signal {int(signal.SIGKILL)}")
        self._grace = time.monotonic() + grace, signal.SIGKILL
        try:
            while True:
                self._wait()
        except Finished:
            return self._result is not None

    def _be_patient(self, seconds: float | None) -> None:
        self._boot_limit = None if seconds is None else time.monotonic() + seconds

    def _wait(self) -> None:
        poll = select.poll()
        for fd, events in self._interests():
            poll.register(fd, events)
        ready = dict(poll.poll(self._next_deadline()))
        self._check_signals(ready)
        self._check_deadlines()
        self._read_log(ready)
        self._control(ready)
        if self._pulse is not None and self._pulse.ping():
            if self._pulse.lost:
                noun, silence = self._carrier.noun, self._silence
                raise MachineHung(f"The {noun} hangs, nothing was heard from it for {silence:g} s")
            self._tell("ping")
        if self._stdin is not None and self._carrier.ports:
            self._move_input(self._stdin, ready)
        for output in self._outputs.values():
            fd, _ = output.wants(self._carrier.ports[output.name])
            if fd in ready:
                self._move_output(output)
        self._check_result()
        if self._carrier.done in ready:
            self._machine_ended()

    def _interests(self) -> Iterator[tuple[int, int]]:
        carrier = self._carrier
        if self._signals is not None:
            yield self._signals.fd, select.POLLIN
        yield carrier.done, select.POLLIN
        for fd in carrier.logs:
            yield fd, select.POLLIN
        control = select.POLLIN | (select.POLLOUT if self._commands else 0)
        yield carrier.ports["ctl"].fileno(), control
        if self._stdin is not None and self.started_at is not None:
            want = self._stdin.wants(carrier.ports["in"])
            if want is not None:
                yield want
        for output in self._outputs.values() if self._planned else ():
            if not output.ended or output.pending:
                yield output.wants(carrier.ports[output.name])

    def _next_deadline(self) -> float | None:
        limits = [self._limit, self._grace[0] if self._grace else None]
        limits.append(self._pulse.due if self._pulse else None)
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
        late = self._boot_limit is not None and now >= self._boot_limit
        if self.started_at is None and late:
            raise _TooLate

    def _check_signals(self, ready: dict[int, int]) -> None:
        if self._signals is None or self._signals.fd not in ready:
            return
        for signo in self._signals.take():
            if signo == signal.SIGWINCH:
                if self._terminal.fd >= 0:
                    self._tell("winch {} {}".format(*self._terminal.size()))
            elif signo == signal.SIGCONT:
                if self.started_at is not None:
                    self._terminal.make_raw()  # whoever stopped us may have reset it
            elif self.started_at is None and signo not in PASSED:
                raise Finished(128 + signo)
            else:
                self._forward(signo)

    def _forward(self, signo: int) -> None:
        if signo in INTERRUPTS:
            if self._interrupted:
                raise Finished(128 + signo)
            self._interrupted = True
        elif signo in ENDINGS:
            if self._grace is not None:
                raise Finished(128 + signo)
            self._grace = (time.monotonic() + _GRACE_S, signo)
        self._tell(f"signal {signo}")

    def _tell(self, line: str) -> None:
        self._commands += line.encode() + b"\n"

    def _control(self, ready: dict[int, int]) -> None:
        port = self._carrier.ports["ctl"]
        if port.fileno() in ready:
            try:
                data = port.recv(4096)
            except OSError:
                data = b""
            *lines, self._lines = (self._lines + data).split(b"\n")
            self._lines = self._lines[-_LINE_MAX:]
            if self._pulse is not None and data:
                self._pulse.heard()
            for line in lines:
                self._answer(line.decode(errors="replace"))
            if self._failure is not None:
                failure, self._failure = self._failure, None
                raise HostError(f"The {self._carrier.noun} could not run the command: {failure}")
        if self._commands:
            with suppress(OSError):  # full, or gone: its end is seen elsewhere
                del self._commands[: port.send(self._commands)]

    def _answer(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        if word in ("started", "exit") and not self._planned:
            return  # there is no command that could have
        if word == "started":
            self.started_at = time.monotonic()
            self._pulse = Pulse(self._silence) if self._silence is not None else None
            self._terminal.make_raw()
        elif word == "ready":
            self._ready = True
        elif word == "input-closed" and self._stdin is not None:
            self._stdin.ended = True
            self._stdin.pending = memoryview(b"")
        elif word == "exit":
            self._result = _exit_line(rest)
        elif word == "fail":
            self._failure = rest

    def _move_input(self, stdin: Input, ready: dict[int, int]) -> None:
        port = self._carrier.ports["in"]
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
            self.sent += stdin.send(port)

    def _watch_escape(self, data: bytes) -> None:
        now = time.monotonic()
        self._escapes = [when for when in self._escapes if now - when < 1.0]
        self._escapes += [now] * data.count(_ESCAPE)
        if len(self._escapes) >= 3:
            raise Finished(128 + signal.SIGKILL)

    def _move_output(self, output: Output) -> None:
        was_broken = output.broken
        output.step(self._carrier.ports[output.name])
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
            say([f"vmm: the {self._carrier.noun} ran out of memory; give it more with --memory"])
        raise Finished(status)

    def _read_log(self, ready: dict[int, int]) -> None:
        for fd in self._carrier.logs:
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
            wanted = list(self._carrier.logs)
            wanted += [port.fileno() for port in self._carrier.ports.values()]
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
        raise self._carrier.lost(self.log)


def _exit_line(text: str) -> tuple[int, dict[str, int]]:
    """The command's status, and how much it wrote on each port. A guest can say anything."""
    try:
        status, *counts = (int(word) for word in text.split())
        return status & 0xFF, dict(zip(("out", "err", "tty"), counts, strict=True))
    except ValueError:
        raise MachineLost(f"The guest reported an exit status that is none: {text!r}") from None
