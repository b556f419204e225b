"""A guest's shell on this terminal: `vmm run` without a command, keys, and the ways out."""

from __future__ import annotations

import os
import signal
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from guests.initramfs import build, kernel_tree
from tests.conftest import count_boot
from tests.linux import BOOT_TIMEOUT
from tests.support.typist import Typist

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def typist(kernel: str) -> Iterator[Typist]:
    argv = [sys.executable, "-m", "vmm", "run", "--accel=kvm", f"--timeout={2 * BOOT_TIMEOUT}"]
    argv += ["-k", kernel, "-i", str(build("", kernel_tree())), "--root=initrd", "-m256"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "vt100", "SHELL": "/bin/sh"}
    made = Typist(argv, environment, BOOT_TIMEOUT)
    made.expect(b"# ")
    count_boot()
    yield made
    made.close()


def test_a_shell(typist: Typist) -> None:
    """Size, Ctrl-C for its command only, the shell's status, and the terminal as it was."""
    typist.type(b"stty size; echo $TERM; readlink /proc/self/fd/0\r")
    typist.expect(b"33 77\r\n")
    typist.expect(b"vt100\r\n")
    typist.expect(b"/dev/pts/")
    typist.type(b"sh -c 'echo begun-$((1+1)); exec sleep 1000'\r")
    typist.expect(b"begun-2\r\n")
    typist.type(b"\x03")
    typist.expect(b"# ")
    typist.type(b"echo after=$?\r")
    typist.expect(b"after=130\r\n")
    termios.tcsetwinsize(typist.fd, (40, 90))
    os.kill(typist.pid, signal.SIGWINCH)
    time.sleep(1)
    typist.type(b"stty size; exit 6\r")
    typist.expect(b"40 90\r\n")
    assert typist.end() == 6


def test_the_way_out_of_a_shell_that_hangs(typist: Typist) -> None:
    typist.type(b"trap '' INT; stty raw -echo; echo dea\\f; while :; do sleep 1; done\r")
    typist.expect(b"deaf")
    typist.type(b"\x03\x1d\x1d\x1d")
    assert typist.end() == 137
