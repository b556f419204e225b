"""However a run ends: the status, and no process left behind."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from tests.nested.conftest import (
    DEADLINE,
    Start,
    alive,
    command,
    environment,
    nested,
    qemu_children,
)
from tests.support.typist import Typist
from tests.support.waiting import wait_for

pytestmark = pytest.mark.timeout(DEADLINE + 20)

#: Says when it runs, then waits; says what reached it.
PATIENT = "trap 'echo int; exit 33' INT; trap 'echo term; exit 44' TERM; echo up; while :; do sleep 0.1; done"  # noqa: E501
DEAF = "trap '' INT TERM HUP; echo up; while :; do sleep 0.1; done"


def qemu_of(process: subprocess.Popen[bytes]) -> int:
    found: list[int] = []
    wait_for(lambda: found.extend(qemu_children(process.pid)) or found, DEADLINE)
    return found[0]


def wait_up(process: subprocess.Popen[bytes]) -> int:
    assert process.stdout
    assert process.stdout.readline() == b"up\n"
    return qemu_of(process)


def test_timeout_while_the_command_runs(start: Start) -> None:
    before = time.monotonic()
    process = start("--timeout", "40", "--", "sh", "-c", DEAF)
    qemu = wait_up(process)
    assert process.wait(DEADLINE) == 124
    assert time.monotonic() - before < 90
    assert not alive(qemu)


def test_timeout_during_the_boot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMM_NESTED_SNAPSHOT", "0")  # with one, a second may be enough
    done = nested("--timeout", "1", "--", "true")
    assert (done.status, done.out) == (124, b"")


@pytest.mark.parametrize("signo", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_during_the_boot(start: Start, signo: signal.Signals) -> None:
    process = start("--", "sleep", "1000")
    qemu = qemu_of(process)
    time.sleep(0.3)
    process.send_signal(signo)
    assert process.wait(20) == 128 + signo
    assert not alive(qemu)


def test_interrupt_reaches_the_command(start: Start) -> None:
    process = start("--", "sh", "-c", PATIENT)
    qemu = wait_up(process)
    process.send_signal(signal.SIGINT)
    assert process.wait(DEADLINE) == 33
    assert process.stdout
    assert process.stdout.read() == b"int\n"
    assert not alive(qemu)


def test_a_second_interrupt_ends_everything(start: Start) -> None:
    process = start("--", "sh", "-c", DEAF)
    qemu = wait_up(process)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert not alive(qemu)


def test_terminate_reaches_the_command(start: Start) -> None:
    process = start("--", "sh", "-c", PATIENT)
    qemu = wait_up(process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(DEADLINE) == 44
    assert not alive(qemu)


def test_terminate_is_enforced(start: Start) -> None:
    process = start("--", "sh", "-c", DEAF)
    qemu = wait_up(process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert not alive(qemu)


def test_kill_takes_the_machine_along(start: Start) -> None:
    process = start("--", "sh", "-c", DEAF)
    qemu = wait_up(process)
    process.kill()
    assert process.wait(20) == -signal.SIGKILL
    wait_for(lambda: not alive(qemu), 20)


def test_a_machine_that_dies_is_an_error(start: Start) -> None:
    process = start("--", "sh", "-c", DEAF)
    qemu = wait_up(process)
    os.kill(qemu, signal.SIGKILL)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 125
    assert b"ended early: QEMU was killed by signal 9" in err


def test_a_panic_of_the_machine_is_told_with_the_log(start: Start) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may write to /proc/sysrq-trigger")
    process = start("--", "sh", "-c", "echo c > /proc/sysrq-trigger")
    _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 125
    assert b"ended early: Kernel panic - not syncing: sysrq triggered crash" in err
    assert b"Call Trace" in err


#: Takes CPU 1 for itself, so that the kernel can run nothing else on it.
HOG = """
import os
open("/proc/sys/kernel/sched_rt_runtime_us", "w").write("-1")
os.sched_setaffinity(0, {1})
os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(99))
while True:
    pass
"""
IMPATIENT = "import sys; from vmm.nested import appliance; appliance._SILENCE_S = 8.0; from vmm.__main__ import main; sys.exit(main())"  # noqa: E501


def test_a_cpu_that_is_stuck_is_a_machine_that_hangs() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may take a CPU for itself")
    hog = [sys.executable, "-c", HOG]
    done = subprocess.run(
        [sys.executable, "-c", IMPATIENT, "nested", "--cpus", "2", "--", *hog],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=environment(),
        timeout=DEADLINE,
        check=False,
    )
    assert done.returncode == 125
    said = done.stderr.decode()
    assert "The nested machine hangs, nothing was heard from it for 8 s: CPU 0" in said
    assert re.search(r"CPU 1 at [0-9a-f]{16} in ring [03]", said)


def test_a_command_that_says_nothing_is_none(start: Start) -> None:
    argv = [sys.executable, "-c", IMPATIENT, "nested", "--", "sleep", "12"]
    started = time.monotonic()
    assert subprocess.run(argv, env=environment(), timeout=DEADLINE, check=False).returncode == 0
    assert time.monotonic() - started > 12


def typist_of(*args: str) -> Typist:
    return Typist(command(*args), environment(), DEADLINE)


def test_on_a_terminal(tmp_path: Path) -> None:
    script = "stty size; tty; test -t 0 && test -t 1 && test -t 2 && echo all; exec sh -i"
    typist = typist_of("--env", "PS1=prompt> ", "--", "sh", "-c", script)
    try:
        typist.expect(b"33 77\r\n/dev/pts/0\r\nall\r\n")
        typist.expect(b"prompt> ")
        typist.type(b"sleep 1000\r")
        typist.expect(b"sleep 1000\r\n")
        time.sleep(0.5)
        typist.type(b"\x03")  # to the sleep, neither to the shell nor to us
        typist.expect(b"prompt> ")
        termios.tcsetwinsize(typist.fd, (40, 90))
        os.kill(typist.pid, signal.SIGWINCH)
        time.sleep(1)
        typist.type(b"stty size; echo a$((1+1))c\r")
        typist.expect(b"40 90\r\na2c\r\n")
        typist.type(b"exit 5\r")
        assert typist.end() == 5
    finally:
        typist.close()


def test_interrupt_typed_during_the_boot() -> None:
    typist = typist_of("--", "sleep", "1000")
    try:
        wait_for(lambda: qemu_children(typist.pid), DEADLINE)
        time.sleep(0.3)
        typist.type(b"\x03")
        assert typist.end() == 130
    finally:
        typist.close()


def test_the_way_out_of_a_command_that_hangs() -> None:
    typist = typist_of("--", "sh", "-c", f"stty raw -echo; {DEAF}")
    try:
        typist.expect(b"up")
        typist.type(b"\x03\x1d\x1d\x1d")
        assert typist.end() == 137
    finally:
        typist.close()


def test_stdout_elsewhere_while_the_terminal_is_stdin(tmp_path: Path) -> None:
    target = tmp_path / "out"
    line = " ".join(command("--", "sh", "-c", "'echo plain; echo seen >&2; read x; echo $x'"))
    typist = typist_of("--", "true")
    typist.close()
    pid, fd = pty.fork()
    if pid == 0:
        os.execve("/bin/sh", ["sh", "-c", f"{line} > {target}"], environment())
    typist.pid, typist.fd, typist.seen = pid, fd, b""
    typist.mode = termios.tcgetattr(fd)
    try:
        typist.expect(b"seen\r\n")
        typist.type(b"typed\r")
        assert typist.end() == 0
        assert target.read_bytes() == b"plain\ntyped\n"
        assert re.search(rb"typed", typist.seen)  # echoed on the terminal
    finally:
        typist.close()
