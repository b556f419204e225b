"""What the command line makes of a disk that paused the guest."""

from __future__ import annotations

import errno
import os
import signal
from typing import Any

import pytest

from vmm.cli.session import Session
from vmm.config import MachineConfig


class Disk:
    name, path = "disk0", "/images/root.img"

    def __init__(self) -> None:
        self.paused = 0
        self.on_io_error: Any = self.pause

    def pause(self, disk: object, error: int) -> None:
        self.paused += 1


class Machine:
    def __init__(self, *devices: object) -> None:
        self.devices = devices
        self.resumed = 0

    def resume(self) -> None:
        self.resumed += 1


def test_the_user_is_told_and_sigcont_resumes(capsys: pytest.CaptureFixture[str]) -> None:
    session = Session(MachineConfig(kernel="k"))
    disk = Disk()
    machine = Machine(object(), disk)
    session.machine = machine  # type: ignore[assignment]
    session._watch_disks()
    session._handle_signal(signal.SIGCONT)
    assert machine.resumed == 0
    disk.on_io_error(disk, errno.ENOSPC)
    assert disk.paused == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("vmm: disk0 (/images/root.img): No space left on device; the guest is")
    assert f"kill -CONT {os.getpid()}" in said
    session._handle_signal(signal.SIGCONT)
    session._handle_signal(signal.SIGCONT)
    assert machine.resumed == 1
    session._give_signals_back()
