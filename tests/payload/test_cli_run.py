"""vmm run as a command: streams, signals, the terminal, exit statuses, what is said on stderr."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: Generous: a loaded host starts slowly.
DEADLINE = 60.0

# Flat 16-bit payloads, at 0x7c00.
EXIT = "b007 e6f4 f4"  # mov al, 7; out 0xf4, al; hlt: status 7 << 1 | 1
HANG = "ebfe"  # jmp $
# Into protected mode with an empty IDT, then ud2: a triple fault.
TRIPLE = (
    "fa 0f0116207c 0f011e267c 0f20c0 0c01 0f22c0 ea187c0800 0f0b 000000000000"
    "0f002c7c0000 000000000000 0000000000000000 ffff0000009acf00"
)
# mov si, 0x7c0d; mov dx, 0x3f8; l: lodsb; out dx, al; cmp al, 10; jne l; hlt; the text
HELLO = "be0d7c baf803 ac ee 3c0a 75fa f4" + b"Hello \x00\xff serial\n".hex()
# Send back each byte as it comes in on the serial port, until a q: then status 3 << 1 | 1.
ECHO = "bafd03 ec a801 74f8 baf803 ec ee 3c71 75ef b003 e6f4 f4"
READY = "baf803 b052 ee"  # R on the serial port


@pytest.fixture
def payload(tmp_path: Path, kvm: str) -> Callable[..., list[str]]:
    """The command line that runs a payload."""

    def command(code: str, *flags: str) -> list[str]:
        file = tmp_path / "payload"
        file.write_bytes(bytes.fromhex(code))
        return [
            sys.executable, "-m", "vmm", "run", "--accel=kvm", "--boot=flat", "--testdev",
            f"--kernel={file}", *flags,
        ]  # fmt: skip

    return command


Payload = Callable[..., list[str]]


def run(command: list[str], stdin: bytes | None = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        command, input=stdin, capture_output=True, cwd=ROOT, timeout=DEADLINE, check=False
    )


def test_the_guests_own_status(payload: Payload) -> None:
    done = run(payload(EXIT, "--timeout=30"))
    assert (done.returncode, done.stdout, done.stderr) == (15, b"", b"")


@pytest.mark.parametrize("transport", ["pci", "mmio"])
def test_each_device_that_was_not_used_is_named_once(payload: Payload, transport: str) -> None:
    flags = ["--timeout=30", "-v", f"--transport={transport}", "--vsock=cid=3"]
    said = run(payload(EXIT, *flags)).stderr.decode().splitlines()
    unused = [line for line in said if "never used" in line]
    assert any("vsock0" in line and "CONFIG_VIRTIO_VSOCKETS" in line for line in unused)
    assert len(unused) == len(set(unused))


def test_the_serial_port_is_stdout_byte_for_byte(payload: Payload) -> None:
    done = run(payload(HELLO, "--timeout=1"))
    assert done.stdout == b"Hello \x00\xff serial\n"
    assert done.returncode == 124


def test_stdin_reaches_the_guest(payload: Payload) -> None:
    done = run(payload(ECHO, "--timeout=30"), b"abc\x01x\x03q")
    assert (done.stdout, done.returncode) == (b"abc\x01x\x03q", 7)


def test_stdin_may_be_closed(payload: Payload) -> None:
    command = payload(EXIT, "--timeout=30")
    done = subprocess.run(
        ["/bin/sh", "-c", '"$@" <&-', "sh", *command],
        capture_output=True, cwd=ROOT, timeout=DEADLINE, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (15, b"")


def test_stdout_may_be_closed_early(payload: Payload) -> None:
    command = payload(HELLO, "--timeout=1")
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 124
    assert b"Traceback" not in said


def test_the_serial_port_in_a_file(payload: Payload, tmp_path: Path) -> None:
    log = tmp_path / "log"
    done = run(payload(HELLO, "--timeout=1", f"--serial={log}"))
    assert log.read_bytes() == b"Hello \x00\xff serial\n"
    assert done.stdout == b""
    # It was not on the screen, so its tail is told.
    assert b"the console's last 1 lines:\nHello " in done.stderr


def test_a_file_that_cannot_be_written(payload: Payload, tmp_path: Path) -> None:
    done = run(payload(HELLO, f"--serial={tmp_path}/no/log"))
    assert done.returncode == 125
    assert done.stderr.count(b"\n") == 1
    assert b"No such file" in done.stderr


def test_a_deadline(payload: Payload) -> None:
    done = run(payload(HANG, "--timeout=1", "--no-rng"))
    assert done.returncode == 124
    said = done.stderr.decode()
    assert "after 1 s" in said
    assert "jumps to itself" in said
    assert "eb fe  jmp 0x7c00" in said
    assert "Traceback" not in said


def test_a_triple_fault(payload: Payload) -> None:
    done = run(payload(TRIPLE, "--timeout=30"))
    assert done.returncode == 255
    said = done.stderr.decode()
    assert "KVM_EXIT_SHUTDOWN" in said or "KVM_EXIT_INTERNAL_ERROR" in said
    assert "guess: " in said
    assert "The IDT is empty" in said
    assert "protected mode" in said
    assert "0f 0b  ud2" in said


def test_where_the_exits_went(payload: Payload) -> None:
    done = run(payload(HELLO + "", "--timeout=1", "--debug-exits"))
    lines = done.stderr.decode().splitlines()
    assert any(line.split()[-3:] == ["KVM_EXIT_IO", "write", "0x3f8"] for line in lines)


def test_a_dry_run_needs_no_kvm(payload: Payload) -> None:
    command = payload(EXIT, "--dry-run=json", "-c", "2", "-m", "64M", "-a", "one two")
    done = run(["unshare", "-r", *command] if os.getuid() else command)
    facts = json.loads(done.stdout)
    assert (facts["accel"], facts["cpus"], facts["ram"]) == ("kvm", 2, 64 << 20)
    assert facts["command_line"].endswith("one two")
    assert any(device["name"] == "serial0" for device in facts["devices"])
    text = run(payload(EXIT, "--dry-run")).stdout.decode()
    assert "memory map" in text
    assert "serial0  GSI 4\n" in text
    assert "rng0  00:01.0  MSI-X or GSI" in text
    text = run(payload(EXIT, "--dry-run", "--transport=mmio")).stdout.decode()
    assert "rng0  GSI 5\n" in text


def test_a_dry_run_touches_nothing(payload: Payload, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("precious")
    done = run(payload(EXIT, "--dry-run", f"--serial={log}", "--console=pty"))
    assert done.returncode == 0
    assert log.read_text() == "precious"


def test_a_configuration_file(payload: Payload, tmp_path: Path) -> None:
    config = tmp_path / "vm.toml"
    config.write_text('kernel = "payload"\nboot = "flat"\ntestdev = true\ntimeout = 30\n')
    command = payload(EXIT)[:5]
    assert run([*command, f"--config={config}"]).returncode == 15


@pytest.mark.parametrize(
    ("flags", "status", "sentence"),
    [
        (["--memory=1K"], 2, "RAM must be"),
        (["--kernel=/nowhere"], 125, "/nowhere"),
        (["--disk=/nowhere"], 125, "/nowhere"),
        (["--initrd=/nowhere"], 2, "initrd"),
    ],
)
def test_bad_input_is_one_sentence(
    payload: Payload, flags: list[str], status: int, sentence: str
) -> None:
    done = run(payload(EXIT, *flags))
    said = done.stderr.decode()
    assert (done.returncode, said.count("\n")) == (status, 1), said
    assert said.startswith("vmm: ")
    assert sentence in said


# ---- signals and terminals ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_signals_end_a_run_in_order(payload: Payload, number: int, status: int) -> None:
    with subprocess.Popen(
        payload(READY + HANG), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL, cwd=ROOT,
        # The tests themselves may run under nohup, which vmm would respect.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1) == b"R"
        process.send_signal(number)
        said = process.stderr.read()
    assert process.returncode == status
    assert said.count(b"\n") == 1
    assert said.startswith(b"vmm: ended by ")


@pytest.mark.parametrize("delay", [0.02, 0.05, 0.1, 0.2, 0.3, 0.5])
def test_ctrl_c_at_any_time(payload: Payload, delay: float) -> None:
    """Whatever stage it meets, once Python itself is up: no traceback, the status of a SIGINT."""
    import threading

    code = "import sys; print(flush=True); sys.argv[0] = 'vmm'; import vmm.__main__ as m; "
    code += "sys.exit(m.main())"
    command = [sys.executable, "-c", code, *payload(HANG, "--memory=64M", "--timeout=60")[3:]]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        timer = threading.Timer(delay, process.send_signal, (signal.SIGINT,))
        timer.start()
        said = process.stderr.read().decode()
        timer.join()
    assert process.returncode in (130, -signal.SIGINT), said
    # Before vmm's first line it is the interpreter that is interrupted, and says so.
    assert "Traceback" not in said or ", in main" not in said, said


class AtTerminal:
    """A command with a terminal of its own."""

    def __init__(self, command: list[str]) -> None:
        self.master, slave = pty.openpty()
        self.before = termios.tcgetattr(slave)
        self.slave = slave
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, cwd=ROOT,
            preexec_fn=self._control, start_new_session=True,
        )  # fmt: skip
        self.said = b""

    @staticmethod
    def _control() -> None:
        import fcntl

        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def until(self, text: bytes) -> None:
        deadline = time.monotonic() + DEADLINE
        while text not in self.said:
            assert time.monotonic() < deadline, self.said
            if select.select([self.master], [], [], 0.1)[0]:
                self.said += os.read(self.master, 4096)

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    @property
    def restored(self) -> bool:
        return termios.tcgetattr(self.slave) == self.before

    def wait(self) -> int:
        return self.process.wait(DEADLINE)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def at_terminal(payload: Payload) -> Iterator[Callable[..., AtTerminal]]:
    opened: list[AtTerminal] = []

    def start(code: str, *flags: str) -> AtTerminal:
        opened.append(AtTerminal(payload(code, *flags)))
        return opened[-1]

    yield start
    for terminal in opened:
        terminal.close()


Start = Callable[..., AtTerminal]


def test_ctrl_a_x_ends_the_machine(at_terminal: Start) -> None:
    terminal = at_terminal(READY + HANG)
    terminal.until(b"R")
    terminal.until(b"Ctrl-A x ends")
    terminal.type(b"\x01h")
    terminal.until(b"send a break")
    assert not terminal.restored
    terminal.type(b"\x01x")
    terminal.until(b"ended from the keyboard")
    assert terminal.wait() == 130
    assert terminal.restored


def test_ctrl_c_and_friends_are_the_guests(at_terminal: Start) -> None:
    terminal = at_terminal(READY + ECHO)
    terminal.until(b"R")
    terminal.until(b"Ctrl-A x ends")
    terminal.type(b"\x03\x1a\x1c\x01aq")
    assert terminal.wait() == 7
    terminal.until(b"\x03\x1a\x1c\x01q")
    assert terminal.restored


def test_ctrl_c_ends_a_run_that_does_not_have_the_terminal(at_terminal: Start) -> None:
    terminal = at_terminal(HANG, "--serial=pty")
    terminal.until(b"is on /dev/pts/")
    terminal.type(b"\x03")
    terminal.until(b"ended by Ctrl-C")
    assert terminal.wait() == 130


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_terminal_is_restored_by_signals(at_terminal: Start, number: int) -> None:
    terminal = at_terminal(READY + HANG)
    terminal.until(b"R")
    terminal.until(b"Ctrl-A x ends")
    terminal.process.send_signal(number)
    assert terminal.wait() == 128 + number
    assert terminal.restored


def test_the_terminal_is_restored_by_a_deadline(at_terminal: Start) -> None:
    terminal = at_terminal(READY + HANG, "--timeout=2")
    terminal.until(b"had not ended")
    assert terminal.wait() == 124
    assert terminal.restored
