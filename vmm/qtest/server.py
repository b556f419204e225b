"""The sockets of ``vmm qtest``: one thread, one client at each place.

A client that does not read is not read from either, so that memory stays bounded. The server ends
when QMP says quit, at SIGTERM or SIGINT, when the machine ends itself, or when a qtest client that
cannot come back (we connected to it, or it is stdio) hangs up.
"""

from __future__ import annotations

import os
import select
import shlex
import time

from vmm.errors import ConfigError
from vmm.qtest.machine import QtestMachine
from vmm.qtest.options import Spec, endpoint, portable
from vmm.qtest.protocol import MAX_LINE, Protocol
from vmm.qtest.qmp import Session, encode, event
from vmm.qtest.sockets import BACKLOG, Connection, Log, Place, register

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_FAREWELL_MS = 1000


class QtestTalk:
    """The qtest protocol with one client: lines. ``after`` is called when one was carried out, and
    says whether the next may be."""

    def __init__(self, protocol: Protocol, log: Log, after: Callable[[], bool]) -> None:
        self._protocol = protocol
        self._log = log
        self._after = after
        self._over = False
        self._seen = 0
        self._skipping = False
        protocol.forget()
        log.say("I", "OPENED")

    def greet(self) -> bytes:
        return b""

    def take(self, data: bytearray) -> bytes | None:
        if self._over:
            return None
        end = data.find(b"\n", self._seen)
        if end < 0 and len(data) <= MAX_LINE:
            self._seen = len(data)
            return None
        self._seen = 0
        too_long = self._skipping or not 0 <= end <= MAX_LINE
        if end < 0:
            # Too much: the rest of the line is thrown away as it comes.
            data.clear()
            self._skipping = True
            return b""
        line = bytes(data[:end]).decode("utf-8", "backslashreplace").rstrip("\r")
        del data[: end + 1]
        self._skipping = False
        if too_long:
            return self.tell(["FAIL a line is too long"])
        self._log.say("R", line)
        told = self.tell(self._protocol.answer(line))
        self._over = not self._after()
        return told

    def tell(self, lines: list[str]) -> bytes:
        for line in lines:
            self._log.say("S", line)
        return "".join(f"{line}\n" for line in lines).encode()


class Server:
    """Serves a machine until its end; ``run`` gives the exit status."""

    def __init__(self, spec: Spec, machine: QtestMachine) -> None:
        """Connects and listens. Raises ConfigError, HostError."""
        self.machine = machine
        self.status: int | None = None
        self._protocol = Protocol(machine)
        self._action = spec.action
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._qmp: list[Place] = []
        self._qtest: Place | None = None
        self._log = Log(spec.log)
        self._log.say("I", f"ARGS {shlex.join(portable(spec.argv))}")
        try:
            self._open(spec)
        except BaseException:
            self.close()
            raise

    def _open(self, spec: Spec) -> None:
        if len(spec.qtest) != 1:
            raise ConfigError("-qtest is needed, once: -qtest unix:PATH[,server=on], or stdio.")
        where = endpoint(spec, "-qtest", spec.qtest[0])
        if where is not None:
            self._qtest = Place("-qtest", where, self._talk)
        for text in spec.qmp:
            at = endpoint(spec, "-qmp", text)
            if at is not None:
                self._qmp.append(Place("-qmp", at, self._session))
        if self._qtest is None and not self._qmp:
            raise ConfigError("-qtest none needs a -qmp: nobody could reach the machine.")

    def _talk(self) -> QtestTalk:
        return QtestTalk(self._protocol, self._log, self._go_on)

    def _go_on(self) -> bool:
        """What a command led to, before the next one."""
        self._look_at_ends()
        return self.status is None

    def _session(self) -> Session:
        return Session(self.machine, self._tell, self.end)

    def _tell(self, message: dict[str, Any]) -> None:
        for place in self._qmp:
            there = place.connection
            if there is None or not isinstance(there.talk, Session) or not there.talk.ready:
                continue
            if len(there.out) < BACKLOG:  # else nobody reads them
                there.out += encode(message)

    def end(self, status: int) -> None:
        """Stop serving; from a signal handler too."""
        if self.status is None:
            self.status = status
        os.eventfd_write(self._wake, 1)

    def run(self) -> int:
        """Until the end."""
        while self.status is None:
            self._turn()
        self._say_goodbye()
        return self.status

    def _turn(self) -> None:
        """Wait for something to happen, once, and act."""
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        places = [*([self._qtest] if self._qtest else []), *self._qmp]
        if self._qtest is not None and self._has_room(self._qtest.connection):
            poll.register(self.machine.chip.fd, select.POLLIN)
        for place in places:
            register(poll, place)
        ready = dict(poll.poll())
        for place in places:
            self._serve(place, ready)
        self._look_at_pins()
        self._look_at_ends()

    @staticmethod
    def _has_room(connection: Connection | None) -> bool:
        return connection is None or len(connection.out) < BACKLOG

    def _serve(self, place: Place, ready: dict[int, int]) -> None:
        there = place.connection
        if there is None:
            if place.listener is not None and ready.get(place.listener.fileno()):
                place.accept()
            return
        alive = True
        if there.hungry and ready.get(there.read_fd, 0) & ~select.POLLOUT:
            alive = there.receive()
        there.work()
        if alive and there.out:
            alive = there.send()
        if not alive:
            self._lose(place)

    def _lose(self, place: Place) -> None:
        place.drop()
        if place is self._qtest:
            self._log.say("I", "CLOSED")
            if place.listener is None:
                self.end(0)

    def _look_at_pins(self) -> None:
        there = self._qtest.connection if self._qtest is not None else None
        if not self._has_room(there):
            return
        lines = self._protocol.interrupts()
        if there is not None and isinstance(there.talk, QtestTalk):
            there.out += there.talk.tell(lines)

    def _look_at_ends(self) -> None:
        """What devices said happened. Raises what a device's thread raised."""
        if self.machine.error is not None:
            raise self.machine.error
        ends, self.machine.ends[:] = self.machine.ends[:], []
        for reason, status in ends:
            if reason == "debug-exit":
                self.end(status & 0xFF)
            elif reason == "poweroff":
                self._tell(event("SHUTDOWN", guest=True, reason="guest-shutdown"))
                self.end(0)
            elif reason == "crashloaded":
                self._tell(event("GUEST_CRASHLOADED", action="run"))
            elif reason == "panic":
                self._panicked()
            elif reason == "io-error":
                self._tell(event("BLOCK_IO_ERROR", action="stop", reason=os.strerror(status)))
                self._pause()
            elif reason == "pause":
                self._tell(event("WATCHDOG", action="pause"))
                self._pause()
            elif reason == "watchdog":
                self._tell(event("WATCHDOG", action="reset"))
                self.machine.reset()
                self._tell(event("RESET", guest=True, reason="guest-reset"))
            elif self._action.get("reboot") == "shutdown":
                self._tell(event("SHUTDOWN", guest=True, reason="guest-reset"))
                self.end(0)
            else:
                self.machine.reset()
                self._tell(event("RESET", guest=True, reason="guest-reset"))

    def _pause(self) -> None:
        if self.machine.running:
            self.machine.running = False
            self._tell(event("STOP"))

    def _panicked(self) -> None:
        action = self._action.get("panic", "pause")
        self._tell(event("GUEST_PANICKED", action="run" if action == "none" else "pause"))
        if action == "pause":
            self._pause()
        elif action in ("shutdown", "exit-failure"):
            self._tell(event("SHUTDOWN", guest=True, reason="guest-panic"))
            self.end(int(action == "exit-failure"))

    def _say_goodbye(self) -> None:
        """Let clients have what was said to them, within reason."""
        deadline = time.monotonic() + _FAREWELL_MS / 1000
        places = [*([self._qtest] if self._qtest else []), *self._qmp]
        for place in places:
            there = place.connection
            while there is not None and there.out and time.monotonic() < deadline:
                poll = select.poll()
                poll.register(there.write_fd, select.POLLOUT)
                if not poll.poll(_FAREWELL_MS) or not there.send():
                    break

    def close(self) -> None:
        for place in [*([self._qtest] if self._qtest else []), *self._qmp]:
            place.close()
        self._log.close()
        if self._wake >= 0:
            os.close(self._wake)
            self._wake = -1
