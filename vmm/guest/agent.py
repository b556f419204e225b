"""The host's side of a guest whose /init takes commands over its ports, one after another."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress

from vmm.errors import HostError, VmmError
from vmm.guest.log import init_said
from vmm.guest.pump import Finished, Job, Pump
from vmm.guest.streams import Input, Output
from vmm.guest.terminal import NoTerminal
from vmm.result import RunResult

TYPE_CHECKING = False
if TYPE_CHECKING:
    from socket import socket

    from vmm.devices.virtio.port import Port
    from vmm.guest.command import Command
    from vmm.guest.signals import Signals
    from vmm.guest.terminal import Terminal
    from vmm.machine import Machine

_KILL_S = 5.0  # for the guest to end a command that was given up

_ENDS = {
    "poweroff": "The guest powered off before the command had ended.",
    "reset": "The guest was reset before the command had ended.",
    "stopped": "The machine was stopped before the command had ended.",
}


class GuestEnded(VmmError):
    """The guest ended, and its command had not; ``result`` says how."""

    def __init__(self, result: RunResult) -> None:
        super().__init__(result.message)
        self.result = result


class Agent:
    """Carries commands to one machine; what ``Pump`` needs of it are ``ports`` and ``done``.

    One command at a time; who comes with another waits. Any thread.
    """

    noun = "guest"
    logs = ()

    def __init__(self, machine: Machine, ports: dict[str, Port]) -> None:
        """The machine has been built. Raises HostError."""
        self.ports: dict[str, socket] = {}
        self.done = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._machine = machine
        self._pump: Pump | None = None
        self._lock = threading.Lock()
        self._result: RunResult | None = None
        self._error: BaseException | None = None
        self._watcher = threading.Thread(target=self._watch, name="vmm-guest", daemon=True)
        for name, port in ports.items():
            self.ports[name] = port.connect()
            self.ports[name].setblocking(False)
        self._watcher.start()

    def close(self) -> None:
        """The machine's vCPUs have stopped, or will by themselves."""
        self._watcher.join()
        for port in self.ports.values():
            port.close()
        self.ports = {}
        if self.done >= 0:
            os.close(self.done)
            self.done = -1

    def lost(self, log: bytearray) -> VmmError:
        """See Pump: the machine has ended, and the command had not."""
        self._watcher.join()
        if self._error is not None:
            if isinstance(self._error, VmmError):
                return self._error
            raise self._error
        assert self._result is not None
        said = init_said(self._result.console)
        if said and self._result.reason in _ENDS:
            return HostError(f"The guest could not run the command: {said}")
        return GuestEnded(self._result)

    def carry(
        self,
        command: Command,
        terminal: Terminal,
        stdio: list[str],
        stdin: Input | None,
        outputs: dict[str, Output],
        *,
        signals: Signals | None = None,
        timeout: float | None = None,
    ) -> tuple[int, bool]:
        """Run a command on these streams; gives its status, and whether it ended by itself.

        Not by itself: ``timeout`` seconds passed (status 124) or signals ended it (128+n). Raises
        GuestEnded, and HostError when the guest cannot run it.
        """
        limit = None if timeout is None else time.monotonic() + timeout
        with self._lock:
            sent = self._pump.sent if self._pump is not None else 0
            job = Job(command.plan(terminal, stdio, sent), terminal, stdin, outputs, limit)
            if self._pump is None:
                self._pump = Pump(self, job, signals)
            else:
                self._pump.again(job)
            return self._see_through(self._pump, signals is None)

    def call(
        self,
        command: Command,
        input: bytes | None,
        timeout: float | None,
        limit: int | None = None,
    ) -> RunResult:
        """Run a command and collect what it writes, up to ``limit`` bytes a stream. With
        ``input`` None stdin is /dev/null."""
        started = time.monotonic()
        files = [os.memfd_create(f"vmm-{name}", os.MFD_CLOEXEC) for name in ("in", "out", "err")]
        try:
            _fill(files[0], input or b"")
            stdio = ["null" if input is None else "port", "port", "port"]
            outputs = {
                name: Output(name, fd, limit)
                for name, fd in zip(("out", "err"), files[1:], strict=True)
            }
            stdin = None if input is None else Input(files[0])
            try:
                status, by_itself = self.carry(
                    command, NoTerminal(), stdio, stdin, outputs, timeout=timeout
                )
            except GuestEnded as end:
                result = command_result(end.result)
            else:
                reason = "exited" if by_itself else "timeout"
                message = f"The command ended with status {status}."
                if not by_itself:
                    message = f"The command had not ended after {timeout:g} s."
                result = RunResult(status, reason, message=message)
            result.stdout, result.stderr = _contents(files[1]), _contents(files[2])
            result.duration_s = time.monotonic() - started
            return result
        finally:
            for fd in files:
                os.close(fd)

    def _see_through(self, pump: Pump, alone: bool) -> tuple[int, bool]:
        try:
            pump.boot()
            status = pump.run()
        except Finished as end:
            status = end.status
        except BaseException as error:
            # KeyboardInterrupt, as a rule: the next command shall find the guest free.
            if alone and not isinstance(error, VmmError):
                self._give_up(pump)
            raise
        by_itself = pump.exited
        if alone and not by_itself:
            self._give_up(pump)
        return status, by_itself

    def _give_up(self, pump: Pump) -> None:
        """End the command; or the guest, when it does not obey."""
        with suppress(VmmError):
            if not pump.kill(_KILL_S):
                self._machine.stop()

    def _watch(self) -> None:
        try:
            self._result = self._machine.wait()
        except BaseException as error:
            self._error = error
        os.eventfd_write(self.done, 1)


def command_result(end: RunResult) -> RunResult:
    """How a command fared whose guest ended first."""
    if end.reason in _ENDS:
        end = RunResult(
            255, "lost", console=end.console, message=_ENDS[end.reason], clocks=end.clocks
        )
    return end


def _fill(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    os.lseek(fd, 0, os.SEEK_SET)


def _contents(fd: int) -> bytes:
    os.lseek(fd, 0, os.SEEK_SET)
    with os.fdopen(os.dup(fd), "rb") as file:
        return file.read()
