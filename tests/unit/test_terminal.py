"""Raw mode comes and goes, whatever ends the process."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator

import pytest

from vmm.terminal import Terminal

# The child makes the pty its controlling terminal, as a shell's job has it.
CHILD = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from vmm.terminal import Terminal
term = Terminal()
assert term.make_raw() and term.raw
print("raw", flush=True)
{end}
"""

FOREVER = "import time\nwhile True: time.sleep(0.05)"


@pytest.fixture
def ends() -> Iterator[tuple[int, int]]:
    master, slave = pty.openpty()
    yield master, slave
    os.close(master)
    os.close(slave)


def is_raw(fd: int) -> bool:
    return not termios.tcgetattr(fd)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)


@pytest.mark.parametrize(
    ("end", "status"),
    [
        ("term.restore()", 0),
        ("", 0),
        ("raise RuntimeError", 1),
        ("sys.exit(3)", 3),
        ("with term: raise SystemExit(4)", 4),
        (FOREVER, -signal.SIGTERM),
        (FOREVER, -signal.SIGHUP),
    ],
)
def test_always_restored(ends: tuple[int, int], end: str, status: int) -> None:
    master, slave = ends
    before = termios.tcgetattr(slave)
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD.format(end=end)],
        stdin=slave,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"raw\n"
    if status < 0:
        assert is_raw(slave)
        child.send_signal(-status)
    assert child.wait(20) == status
    child.stdout.close()
    assert termios.tcgetattr(slave) == before
    del master


def test_raw_mode_is_raw(ends: tuple[int, int]) -> None:
    master, slave = ends
    code = CHILD.format(end="print(os.read(0, 100), flush=True)")
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=slave, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "raw\n"
    assert termios.tcgetattr(slave)[1] & termios.OPOST  # vmm's own lines stay lines
    os.write(master, b"\x03\x1a\x1c\x11\r")
    assert child.stdout.readline() == f"{bytes([3, 26, 28, 17, 13])!r}\n"
    assert child.wait(20) == 0
    child.stdout.close()


def test_no_terminal() -> None:
    r, w = os.pipe()
    term = Terminal(r)
    assert not term.make_raw()
    assert not term.raw
    term.restore()
    assert term.size() == (80, 24)
    with Terminal(9999):
        pass
    os.close(r)
    os.close(w)


def test_not_ours(ends: tuple[int, int]) -> None:
    """A terminal that is not our foreground is left alone: touching it would stop us."""
    before = termios.tcgetattr(ends[1])
    began = time.monotonic()
    assert not Terminal(ends[1]).make_raw()
    assert time.monotonic() - began < 1
    assert termios.tcgetattr(ends[1]) == before


def test_size(ends: tuple[int, int]) -> None:
    termios.tcsetwinsize(ends[1], (50, 132))
    assert Terminal(ends[1]).size() == (132, 50)
