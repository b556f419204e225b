"""The host's half of a session, on a guest that is the test: one that lies, one that hangs."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from vmm.arch.x86_64.nesting import places
from vmm.errors import VmmError
from vmm.guest import pump as pump_module
from vmm.guest.command import Command
from vmm.guest.pump import Job, MachineHung, MachineLost, Pulse, Pump
from vmm.guest.streams import Input, Output
from vmm.guest.terminal import NoTerminal
from vmm.nested.monitor import Monitor


class Guest:
    """A carrier whose guest is the test."""

    noun = "guest"
    logs = ()

    def __init__(self) -> None:
        self.ports: dict[str, socket.socket] = {}
        self.far: dict[str, socket.socket] = {}
        for name in ("ctl", "in", "out", "err"):
            self.ports[name], self.far[name] = socket.socketpair()
            self.ports[name].setblocking(False)
        self.done = os.eventfd(0)

    def plays(self, lines: bytes, out: bytes = b"") -> threading.Thread:
        """Gets ready; ``lines`` once it has the plan."""
        self.far["ctl"].send(b"ready\n")

        def play() -> None:
            got = b""
            while not got.endswith(b"run\x000\0"):
                got += self.far["ctl"].recv(65536)
            assert got.startswith(b"plan ")
            self.far["out"].send(out)
            self.far["ctl"].send(lines)

        thread = threading.Thread(target=play)
        thread.start()
        return thread

    def lost(self, log: bytearray) -> VmmError:
        return MachineLost("gone")

    def close(self) -> None:
        for end in (*self.ports.values(), *self.far.values()):
            end.close()
        os.close(self.done)


@pytest.fixture
def guest() -> Iterator[Guest]:
    made = Guest()
    yield made
    made.close()


def pump_of(guest: Guest, **streams: Any) -> Pump:
    plan = Command(["true"]).plan(NoTerminal(), ["port", "port", "port"], 0)
    job = Job(plan, NoTerminal(), streams.get("stdin"), streams.get("outputs", {}), None)
    job.silence = streams.get("silence")
    return Pump(guest, job, None)


def test_a_session_and_another(guest: Guest) -> None:
    """ready, plan, started, exit, ready: however the lines come in pieces."""
    sink = os.memfd_create("out")
    outputs = {"out": Output("out", sink)}
    pump = pump_of(guest, outputs=outputs)
    player = guest.plays(b"started\nexit 7 3 0 0\nrea", b"abc")
    assert pump.boot()
    assert pump.run() == 7
    assert pump.exited
    assert os.pread(sink, 10, 0) == b"abc"
    player.join()
    plan = Command(["true"]).plan(NoTerminal(), ["null", "port", "port"], 0)
    pump.again(Job(plan, NoTerminal(), None, {}))
    assert not pump.exited
    guest.far["ctl"].send(b"dy\n")
    assert pump.boot()
    player = guest.plays(b"started\nexit 0 0 0 0\n")
    assert pump.run() == 0
    player.join()
    os.close(sink)


def test_input_is_counted_over_commands(guest: Guest) -> None:
    read, write = os.pipe()
    os.write(write, b"12345")
    os.close(write)
    pump = pump_of(guest, stdin=Input(read))
    player = guest.plays(b"started\n")
    reader = threading.Thread(target=lambda: guest.far["ctl"].send(b"exit 0 0 0 0\n"))
    far = guest.far["in"]
    finish = threading.Thread(target=lambda: (far.recv(5, socket.MSG_WAITALL), reader.start()))
    finish.start()
    assert pump.boot()
    assert pump.run() == 0
    assert pump.sent == 5
    player.join()
    finish.join()
    reader.join()
    os.close(read)


@pytest.mark.parametrize(
    "line", [b"exit", b"exit x", b"exit 1 2", b"exit 1 2 3 4 5", b"exit \xff 0 0 0", b"exit 9" * 3]
)
def test_an_exit_that_is_none(guest: Guest, line: bytes) -> None:
    pump = pump_of(guest)
    player = guest.plays(b"started\n" + line + b"\n")
    assert pump.boot()
    with pytest.raises(MachineLost, match="an exit status that is none"):
        pump.run()
    player.join()


def test_a_status_is_a_byte(guest: Guest) -> None:
    pump = pump_of(guest)
    guest.far["ctl"].send(b"exit 9 0 0 0\n")  # of what?
    player = guest.plays(b"started\nexit 1000003 0 0 0\n")
    assert pump.boot()
    assert pump.run() == 1000003 & 0xFF
    player.join()


def test_a_line_without_end_is_not_kept(guest: Guest) -> None:
    pump = pump_of(guest)

    def flood() -> None:
        for _ in range(200):
            guest.far["ctl"].sendall(b"x" * 4000)
        guest.far["ctl"].sendall(b"\nready\n")

    writer = threading.Thread(target=flood)
    writer.start()
    assert pump.boot()
    writer.join()
    assert len(pump._lines) <= 4096


def test_a_machine_that_is_gone(guest: Guest) -> None:
    pump = pump_of(guest)
    os.eventfd_write(guest.done, 1)
    with pytest.raises(MachineLost, match="gone"):
        pump.boot()


def test_giving_up_a_command(guest: Guest) -> None:
    pump = pump_of(guest)
    player = guest.plays(b"started\n")
    assert pump.boot()
    pump._limit = time.monotonic() + 0.2
    assert pump.run() == 124
    assert not pump.exited
    player.join()
    guest.far["ctl"].send(b"exit 137 0 0 0\nready\n")
    assert pump.kill(60)
    assert b"signal 9\n" in guest.far["ctl"].recv(65536)
    deaf = pump_of(guest)
    assert not deaf.kill(0.01)


# ---- a guest that hangs


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pump_module, "PING_S", 0.05)


@pytest.mark.usefixtures("often")
def test_a_silent_machine_hangs(guest: Guest) -> None:
    pump = pump_of(guest, silence=0.3)
    player = guest.plays(b"started\n")
    assert pump.boot()
    with pytest.raises(MachineHung, match=r"The guest hangs, .* for 0\.3 s"):
        pump.run()
    player.join()
    assert guest.far["ctl"].recv(65536).count(b"ping\n") == 6


@pytest.mark.usefixtures("often")
def test_a_machine_that_answers_does_not(guest: Guest) -> None:
    pump = pump_of(guest, silence=5.0)
    player = guest.plays(b"started\n")

    def answers() -> None:
        for _ in range(10):
            assert guest.far["ctl"].recv(5, socket.MSG_WAITALL) == b"ping\n"
            guest.far["ctl"].send(b"alive\n")
        guest.far["ctl"].send(b"exit 0 0 0 0\n")

    player.join(0)
    assert pump.boot()
    answerer = threading.Thread(target=lambda: (player.join(), answers()))
    answerer.start()
    assert pump.run() == 0
    answerer.join()


def test_the_time_in_which_nobody_listened_is_one_ping(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(pump_module.time, "monotonic", lambda: now)
    pulse = Pulse(120.0)
    assert pulse.ping()
    assert not pulse.ping()
    now += 3600.0  # this process was stopped, or its host was
    for _ in range(59):
        assert pulse.ping()
        assert not pulse.lost
        now += pump_module.PING_S
    assert pulse.ping()
    assert pulse.lost
    pulse.heard()
    assert not pulse.lost


# ---- what QEMU says of one


REGISTERS = """\r
CPU#0\r
RAX=0000000000000000 RBX=0000000000000000\r
RIP=ffffffff81a3b4c5 RFL=00000246 [---Z-P-] CPL=0 II=0 A20=1 SMM=0 HLT=1\r
\r
CPU#1\r
RIP=0000000000401000 RFL=00000202 [-------] CPL=3 II=0 A20=1 SMM=0 HLT=0\r
"""


def test_registers_in_one_line() -> None:
    assert places(REGISTERS) == (
        "CPU 0 halted at ffffffff81a3b4c5 in ring 0, CPU 1 at 0000000000401000 in ring 3"
    )
    assert places("CPU#0\r\nEIP=00001000 CPL=0") == "CPU 0 at ? in ring 0"
    assert places("") == ""


def test_a_monitor_that_is_gone() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    monitor = Monitor(ours)
    assert monitor.where() == "QEMU's monitor does not answer"
    monitor.close()
