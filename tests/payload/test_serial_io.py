"""Consoles of guests that print without end, and of guests that do not read, on /dev/kvm."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vmm import Machine
from vmm._native import lib

pytestmark = pytest.mark.usefixtures("kvm")

#: 16-bit code, entered in real mode. Sends 'y' whenever LSR says that THR is empty.
FLOOD = bytes.fromhex(
    "bafd03"  # 0:  mov  dx, 0x3fd
    "ec"  #     3:  in   al, dx
    "a820"  #   4:  test al, 0x20
    "74fb"  #   6:  jz   3
    "baf803"  # 8:  mov  dx, 0x3f8
    "b079"  #   11: mov  al, 'y'
    "ee"  #     13: out  dx, al
    "ebf0"  #   14: jmp  0
)
#: Sends what it receives back, and ends after a Ctrl-D.
ECHO = bytes.fromhex(
    "bafd03"  # 0:  mov  dx, 0x3fd
    "ec"  #     3:  in   al, dx
    "a801"  #   4:  test al, 0x01
    "74fb"  #   6:  jz   3
    "baf803"  # 8:  mov  dx, 0x3f8
    "ec"  #     11: in   al, dx
    "ee"  #     12: out  dx, al
    "3c04"  #   13: cmp  al, 4
    "75ef"  #   15: jne  0
    "baf400"  # 17: mov  dx, 0xf4
    "30c0"  #   20: xor  al, al
    "ee"  #     22: out  dx, al
    "f4ebfd"  # 23: hlt; jmp 23
)
#: Opens its port (RTS) and never reads it.
DEAF = bytes.fromhex("bafc03b003eeebfe")

MIB = 1 << 20


def image(tmp_path: Path, code: bytes) -> Path:
    path = tmp_path / "guest"
    path.write_bytes(code.ljust(512, b"\xf4"))
    return path


def resident(pid: int | str = "self") -> int:
    """Bytes of a process that are no guest RAM."""
    text = Path(f"/proc/{pid}/status").read_text()
    kib = next(line.split()[1] for line in text.splitlines() if line.startswith("RssAnon"))
    return int(kib) * 1024


def test_flood_into_a_file_with_a_limit(tmp_path: Path) -> None:
    out = tmp_path / "console"
    vm = Machine(
        kernel=image(tmp_path, FLOOD),
        boot="flat",
        memory="4M",
        serial=str(out),
        console_limit=20_000,
        timeout=60,
    )
    with vm:
        end = time.monotonic() + 50
        while vm.console.total < 40_000 and time.monotonic() < end:
            time.sleep(0.05)
        before = resident()
        while vm.console.total < 100_000 and time.monotonic() < end:
            time.sleep(0.05)
        assert vm.console.total >= 40_000
        assert resident() - before < 8 * MIB
        vm.stop()
        vm.wait()
    assert out.read_bytes() == b"y" * 20_000 + b"\n[vmm: console limit reached]\n"


def test_flood_at_a_terminal_nobody_reads(tmp_path: Path) -> None:
    """The guest is held back as by a line that is busy, and ends at once when told."""
    vm = Machine(kernel=image(tmp_path, FLOOD), boot="flat", memory="4M", serial="pty", timeout=100)
    with vm:
        stream = vm.consoles[0].stream
        end = time.monotonic() + 60
        while lib.vmm_stream_offer(stream.native, b"-" * 8192, 8192) or stream.total < 1 * MIB:
            assert time.monotonic() < end  # what a guest would print in a minute, to save it
        last = -1
        while last != (last := vm.console.total):
            time.sleep(0.5)
        before = resident()
        time.sleep(1)
        assert vm.console.total == last
        assert resident() - before < MIB
        began = time.monotonic()
        vm.stop()
        assert vm.wait().reason == "stopped"
        assert time.monotonic() - began < 8


def test_echo(tmp_path: Path) -> None:
    """What is sent arrives whole and in order."""
    rng = random.Random(1)
    data = bytes(rng.choice([*range(4), *range(5, 256)]) for _ in range(3000))
    vm = Machine(
        kernel=image(tmp_path, ECHO),
        boot="flat",
        memory="4M",
        serial="buffer",
        testdev=True,
        timeout=100,
    )
    with vm:
        vm.console.send(data[:1000])
        assert vm.console.expect(data[:1000], 60) == data[:1000]
        vm.console.send(data[1000:] + b"\x04")
        result = vm.wait()
        assert (result.reason, result.status) == ("debug-exit", 1)
        assert vm.console.data == data + b"\x04"


def test_stdin_flood(tmp_path: Path) -> None:
    """100 MB into the standard input of a guest that does not read: they wait in the pipe."""
    vmm = subprocess.Popen(
        [
            *(sys.executable, "-m", "vmm", "run", "-k", image(tmp_path, DEAF), "--boot", "flat"),
            *("-m", "4M", "--serial", "stdio", "--timeout", "60", "--accel", "kvm"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert vmm.stdin is not None
    os.set_blocking(vmm.stdin.fileno(), False)
    sent, quiet, rss = 0, 0, 0
    while quiet < 20 and sent < 100 * MIB:
        try:
            sent += os.write(vmm.stdin.fileno(), b"x" * 65536)
            quiet = 0
        except BlockingIOError:
            quiet += sent > 65536  # the pipe alone takes this much before vmm reads at all
            time.sleep(0.05)
        if sent <= 65536 * 2:
            rss = resident(vmm.pid)
    assert 65536 < sent < MIB
    assert resident(vmm.pid) - rss < 8 * MIB
    vmm.terminate()
    _, err = vmm.communicate(timeout=30)
    assert vmm.returncode == 128 + 15, err.decode()
