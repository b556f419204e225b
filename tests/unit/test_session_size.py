"""The guest's console follows the size of the terminal it is on."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import struct
import termios
import threading
from collections.abc import Iterator

import pytest

from tests.virtio_rig import Rig
from vmm import MachineConfig
from vmm.cli.session import Session
from vmm.devices.virtio.console import Console
from vmm.machine import Machine


def set_size(fd: int, columns: int, rows: int) -> None:
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


@pytest.fixture
def ends() -> Iterator[tuple[int, int]]:
    master, slave = pty.openpty()
    yield master, slave
    os.close(master)
    os.close(slave)


@pytest.mark.parametrize("target", ["stdio", "buffer"])
def test_a_terminal_that_is_resized(
    ends: tuple[int, int], monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    """By a signal, while the driver runs; a console that is not on the terminal is left alone."""
    console = Console(None)
    rig = Rig(console, "mmio")
    rig.driver.start()
    rig.regs.interrupts()
    monkeypatch.setattr(Machine, "devices", property(lambda self: [console]))
    session = Session(MachineConfig(kernel="none", serial="none", console=target))
    session.terminal.fd = ends[1]
    set_size(ends[1], 132, 50)
    session._take_signals()
    watcher = threading.Thread(target=session._watch, daemon=True)
    watcher.start()
    try:
        session._connect_terminal()
        first = (132, 50) if target == "stdio" else (80, 25)
        assert (rig.regs.config(0, 2), rig.regs.config(2, 2)) == first
        set_size(ends[1], 77, 11)
        os.kill(os.getpid(), signal.SIGWINCH)
        if target == "stdio":
            rig.until(lambda: rig.regs.config(0, 2) == 77, "the new width")
            assert rig.regs.config(2, 2) == 11
            rig.until(lambda: bool(rig.regs.interrupts() & 2), "a change of configuration")
    finally:
        session._done = True
        session._poke()
        watcher.join(5)
        session._give_signals_back()
    assert target == "stdio" or rig.regs.config(0, 2) == 80
    rig.close()


def test_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/null has no size: nothing is told."""
    console = Console(None)
    monkeypatch.setattr(Machine, "devices", property(lambda self: [console]))
    session = Session(MachineConfig(kernel="none", serial="none", console="stdio"))
    session.terminal.fd = os.open("/dev/null", os.O_RDONLY)
    session._tell_size()
    assert struct.unpack_from("<HH", console.config) == (80, 25)
    os.close(session.terminal.fd)
    session._give_signals_back()
    console.close()
