"""Commands in a guest: streams, status, arguments, what they find, and how it can end."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guests.initramfs import build, kernel_tree
from tests.conftest import count_boot
from tests.linux import BOOT_TIMEOUT
from vmm import CommandFailed, GuestPanic, HostError, Machine

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20

ISSUE = ["sh", "-c", "echo out; echo err >&2; exit 7"]
#: Prints its arguments, a NUL byte after each.
ARGUMENTS = ["sh", "-c", 'for a in "$@"; do printf "%s\\0" "$a"; done', "sh"]


@pytest.fixture(scope="module")
def initrd() -> str:
    return str(build("", kernel_tree()))


def machine(kernel: str, initrd: str, **options: Any) -> Machine:
    settings: dict[str, Any] = {"kernel": kernel, "initrds": [initrd], "root": "initrd"}
    return Machine(**{**settings, "memory": "256M", "timeout": 2 * BOOT_TIMEOUT, **options})


@pytest.fixture(scope="module")
def vm(kernel: str, initrd: str) -> Iterator[Machine]:
    """One guest for many commands."""
    with machine(kernel, initrd) as made:
        made.run(["sh", "-c", "mkdir -p /etc /home/bob; echo bob:x:1234:99::/home/bob:/bin/ash "
                  "> /etc/passwd; echo staff:x:50:bob > /etc/group"], check=True)  # fmt: skip
        count_boot()
        yield made


def test_streams_and_status(vm: Machine) -> None:
    result = vm.run(ISSUE)
    assert (result.status, result.reason) == (7, "exited")
    assert (result.stdout, result.stderr) == (b"out\n", b"err\n")
    assert result.duration_s > 0


@pytest.mark.parametrize(
    ("argv", "status"),
    [
        (["no-such-command"], 127),
        (["/no/such/command"], 127),
        (["/modules"], 126),
        (["/bin"], 126),
        (["sh", "-c", "kill -TERM $$"], 143),
        (["sh", "-c", "kill -KILL $$"], 137),
        (["false"], 1),
        (["sh", "-c", "exit 124"], 124),
        (["sh", "-c", "exit 255"], 255),
    ],
)
def test_statuses(vm: Machine, argv: list[str], status: int) -> None:
    result = vm.run(argv)
    assert (result.status, result.reason) == (status, "exited")


def test_arguments_are_exact(vm: Machine) -> None:
    words = ["a b", "", "x\ny", "'", '"$HOME" `x` $(x) \\', "*", "-n", "\udcff\udc80", "é", ""]
    said = vm.run([*ARGUMENTS, *words]).stdout.split(b"\0")[:-1]
    assert said == [os.fsencode(word) for word in words]


def test_the_environment_is_small_and_exact(vm: Machine) -> None:
    said = vm.run(["env"], env={"A": "b c", "HOME": "/x"}).stdout.splitlines()
    path = b"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    assert sorted(said) == [
        b"A=b c", b"HOME=/x", b"LOGNAME=root", path, b"SHELL=/bin/sh", b"USER=root",
    ]  # fmt: skip


def test_directory(vm: Machine) -> None:
    assert vm.run(["pwd"], cwd="/proc/sys").stdout == b"/proc/sys\n"
    assert vm.run(["pwd"]).stdout == b"/\n"  # the guest has not where we are
    with pytest.raises(HostError, match="cannot enter the directory /nowhere"):
        vm.run(["pwd"], cwd="/nowhere")
    assert vm.run(["true"]).ok


def test_users(vm: Machine) -> None:
    script = ["sh", "-c", "id -u; id -g; id -G; echo $HOME $USER $SHELL"]
    said = vm.run(script, user="bob").stdout.split()
    assert said == b"1234 99 99 50 /home/bob bob /bin/ash".split()
    assert vm.run(script, user="4321").stdout.split()[:2] == [b"4321", b"4321"]
    with pytest.raises(HostError, match="there is no user mallory"):
        vm.run(["true"], user="mallory")
    assert vm.run(["id", "-u"]).stdout == b"0\n"


def test_much_of_everything(vm: Machine) -> None:
    result = vm.run(["dd", "if=/dev/zero", "bs=1M", "count=64"])
    assert len(result.stdout) == 64 * MIB
    assert not result.stdout.strip(b"\0")
    data = os.urandom(MIB) + bytes(range(256)) + b"\r\n\x03\x04\x1d\x1d\x1d"
    copied = vm.run(["sh", "-c", "tee /dev/stderr | cat"], input=data)
    assert hashlib.sha256(copied.stdout).digest() == hashlib.sha256(data).digest()
    assert hashlib.sha256(copied.stderr).digest() == hashlib.sha256(data).digest()


def test_input_that_is_not_read_is_not_for_the_next(vm: Machine) -> None:
    assert vm.run(["true"], input=b"x" * (2 * MIB)).ok
    assert vm.run(["sh", "-c", "read a; echo $a"], input=b"one\ntwo\n").stdout == b"one\n"
    assert vm.run(["cat"], input=b"mine").stdout == b"mine"
    assert vm.run(["cat"], input=None).stdout == b""


def test_a_command_that_closes_its_streams(vm: Machine) -> None:
    result = vm.run(["sh", "-c", "exec <&- >&- 2>&-; sleep 0.2; exit 9"], input=b"x" * MIB)
    assert (result.status, result.stdout) == (9, b"")


def test_deadline_of_one_command(vm: Machine) -> None:
    result = vm.run(["sh", "-c", "echo begun; sleep 1000 & sleep 1000"], timeout=2)
    assert (result.status, result.reason, result.stdout) == (124, "timeout", b"begun\n")
    alive = vm.run(["ps"]).stdout
    assert b"ps" in alive
    assert b"sleep 1000" not in alive


def test_what_it_starts_ends_with_it(vm: Machine) -> None:
    assert vm.run(["sh", "-c", "sleep 1000 & exit 3"]).status == 3
    assert b"sleep 1000" not in vm.run(["ps"]).stdout


def test_check(vm: Machine) -> None:
    with pytest.raises(CommandFailed, match=r"status 7\. It said: err") as caught:
        vm.run(ISSUE, check=True)
    assert caught.value.result.stdout == b"out\n"
    assert caught.value.status == 7


def test_many_commands_in_one_guest(vm: Machine) -> None:
    for i in range(30):
        assert vm.run(["sh", "-c", f"read a; echo $a-{i}"], input=b"x").stdout == b"x-%d\n" % i
    assert int(vm.run(["sh", "-c", "ls /proc/1/fd | wc -l"]).stdout) < 20


def test_what_the_guest_is_like(vm: Machine) -> None:
    script = "hostname; ip -o addr show lo; ls -d /dev/fd/1 /dev/pts/ptmx /dev/shm /sys/kernel"
    said = vm.run(["sh", "-c", script]).stdout
    assert said.startswith(b"vmm\n")
    assert b"127.0.0.1" in said
    now = time.time()
    assert abs(int(vm.run(["date", "+%s"]).stdout) - now) < 30


def test_panic(kernel: str, initrd: str) -> None:
    with machine(kernel, initrd) as vm:
        result = vm.run(["sh", "-c", "echo last; sleep 1; echo c > /proc/sysrq-trigger; sleep 99"])
        assert (result.status, result.reason, result.stdout) == (255, "panic", b"last\n")
        assert "sysrq triggered crash" in result.console
        with pytest.raises(GuestPanic):
            vm.run(["true"], check=True)
    count_boot()


# ---- the command line


def argv(kernel: str, initrd: str, *words: str) -> list[str]:
    vmm = [sys.executable, "-m", "vmm", "run", "--accel=kvm", f"--timeout={BOOT_TIMEOUT}"]
    return [*vmm, "-k", kernel, "-i", initrd, "--root=initrd", "-m256", *words]


def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
    settings: dict[str, Any] = {"capture_output": True, "timeout": BOOT_TIMEOUT, "check": False}
    if "input" not in options:
        settings["stdin"] = subprocess.DEVNULL
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, **{**settings, **options})
    count_boot()
    return done


@pytest.mark.parametrize("stdin", ["closed", "a pipe", "null"])
def test_the_issues_line(kernel: str, initrd: str, stdin: str) -> None:
    command = argv(kernel, initrd, "--", *ISSUE)
    if stdin == "closed":
        command = ["sh", "-c", 'exec "$@" <&-', "sh", *command]
    options = {"input": b"unread"} if stdin == "a pipe" else {}
    done = run(command, start_new_session=True, **options)
    assert (done.returncode, done.stdout, done.stderr) == (7, b"out\n", b"err\n")


def test_flags_of_a_command(kernel: str, initrd: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    flags = ["--pwd=/proc", "--user=77", "--hostname=box", "-e", "A=b c", f"--console={log}"]
    script = 'pwd; id -u; hostname; echo "$A"; cat; kill -9 $$'
    done = run(argv(kernel, initrd, *flags, "--", "sh", "-c", script), input=b"\xff\0in" * 300_000)
    assert done.returncode == 137, done.stderr
    assert done.stdout == b"/proc\n77\nbox\nb c\n" + b"\xff\0in" * 300_000
    assert b"Linux version" in log.read_bytes()


def test_panic_shows_the_kernels_tail(kernel: str, initrd: str) -> None:
    script = "echo last; sleep 1; echo c > /proc/sysrq-trigger; sleep 99"
    done = run(argv(kernel, initrd, "--", "sh", "-c", script))
    assert (done.returncode, done.stdout) == (255, b"last\n")
    assert b"vmm: The guest's kernel panicked." in done.stderr
    assert b"sysrq triggered crash" in done.stderr


def test_deadline(kernel: str, initrd: str) -> None:
    done = run(argv(kernel, initrd, "--timeout=25", "--", "sleep", "1000"))
    assert (done.returncode, done.stdout) == (124, b"")
    assert b"had not ended after 25 s" in done.stderr


def test_a_guest_that_leaves(kernel: str, initrd: str) -> None:
    done = run(argv(kernel, initrd, "--", "poweroff", "-f"))
    assert done.returncode == 255
    assert b"powered off before the command had ended" in done.stderr


def test_a_kernel_without_drivers_is_told(kernel: str, initrd: str, tmp_path: Path) -> None:
    alone = shutil.copy(kernel, tmp_path / "bzImage")
    done = run(argv(str(alone), initrd, "--", "true"))
    assert done.returncode == 125
    assert b"the kernel has no virtio_pci driver (CONFIG_VIRTIO_PCI)" in done.stderr


def test_signals(kernel: str, initrd: str) -> None:
    """Ctrl-C is the command's; SIGTERM too, and it may refuse; nothing stays behind."""
    script = (
        "trap 'echo int' INT; trap 'echo term; exit 5' TERM; echo up; while :; do sleep 1; done"
    )
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        argv(kernel, initrd, "--", "sh", "-c", script), stdin=pipe, stdout=pipe, stderr=pipe,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, bufsize=0, start_new_session=True,
    )  # fmt: skip
    with process:
        assert process.stdout
        assert process.stdout.readline() == b"up\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == b"int\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == b"term\n"
        assert process.wait(BOOT_TIMEOUT) == 5
    count_boot()


def test_a_reader_that_goes_away(kernel: str, initrd: str) -> None:
    """As on the host: the next write meets a broken pipe."""
    process = subprocess.Popen(
        argv(kernel, initrd, "--", "sh", "-c", "while :; do echo y; done"),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, bufsize=0,
    )  # fmt: skip
    with process:
        assert process.stdout
        assert process.stdout.read(2) == b"y\n"
        process.stdout.close()
        assert process.wait(BOOT_TIMEOUT) in (141, 1)  # a shell that ignores SIGPIPE says 1
    count_boot()
