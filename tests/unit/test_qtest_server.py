"""``vmm qtest`` as a process: sockets, clients that misbehave, the end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.qtest_client import ROOT, VMM, Qtest, QtestError
from tests.support.waiting import wait_for

RNG = ("-device", "virtio-rng-pci")


def run(*args: str, text: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*VMM, *args, "-qtest", "stdio"],
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
    )


def test_over_standard_streams(tmp_path: Path) -> None:
    log = tmp_path / "log"
    done = run(*RNG, "-qtest-log", str(log), text="endianness\nreadb 0x1000\nbogus\nreadb 1")
    assert done.stdout.splitlines() == [
        "OK little",
        "OK 0x0000000000000000",
        "FAIL Unknown command 'bogus'",
    ]
    assert done.returncode == 0, done.stderr
    lines = log.read_text().splitlines()
    assert lines[0].endswith(" -device virtio-rng-pci")
    assert [line[:4] for line in lines[1:]] == ["[I +", *["[R +", "[S +"] * 3, "[I +"]
    assert [line.partition("] ")[2] for line in lines[1:3]] == ["OPENED", "endianness"]


def test_a_session_from_a_file(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("endianness\n")
    with text.open() as stdin:
        argv = [*VMM, "-M", "none", "-qtest", "stdio"]
        done = subprocess.run(
            argv, stdin=stdin, capture_output=True, text=True, timeout=60, check=False, cwd=ROOT
        )
    assert (done.stdout, done.returncode) == ("OK little\n", 0)
    assert "OPENED" in done.stderr  # where the log goes unless told


def test_the_debug_exit_port_ends_it() -> None:
    done = run("-device", "isa-debug-exit", text="outb 0xf4 0x10\n")
    assert done.returncode == 33


def test_a_reset_comes_before_the_next_command() -> None:
    """And nothing after the end, though it was sent."""
    text = "writeb 0x1000 1\noutb 0x70 0xf\noutb 0x71 7\noutl 0xcf8 0x80001004\noutl 0xcfc 0x6\n"
    text += "outb 0xcf9 6\ninl 0xcf8\noutl 0xcf8 0x80001004\ninw 0xcfc\nreadb 0x1000\n"
    done = run(*RNG, "-device", "isa-debug-exit", text=text + "outb 0xf4 0\nendianness\n")
    assert done.returncode == 1
    assert done.stdout.splitlines()[6:] == [
        "OK 0x0000",
        "OK",
        "OK 0x0000",
        "OK 0x0000000000000001",
        "OK",
    ]


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it(how: signal.Signals) -> None:
    assert Qtest(*RNG).close(how) == 0


def test_the_client_leaves() -> None:
    q = Qtest(*RNG)
    q.send("outl 0xcf8 0x80")
    q._lines[0].sock.close()
    assert q.wait() == 0
    q.close()
    assert q.stderr == ""


def test_qmp_leaves_and_qtest_stays() -> None:
    with Qtest(*RNG, qmp=True) as q:
        q._lines[1].sock.close()
        assert q.command("endianness") == "little"


def test_the_command_line_of_qemus_own_programs(tmp_path: Path) -> None:
    """As libqtest starts a server: it listens at both, and the monitor is a -chardev."""
    listeners = [socket.socket(socket.AF_UNIX) for _ in range(2)]
    for listener, name in zip(listeners, ("qtest", "qmp"), strict=True):
        listener.settimeout(60)
        listener.bind(str(tmp_path / name))
        listener.listen(1)
    argv = [
        *(*VMM, "-qtest", f"unix:{tmp_path}/qtest", "-qtest-log", "/dev/null"),
        *("-chardev", f"socket,path={tmp_path}/qmp,id=char0"),
        *("-mon", "chardev=char0,mode=control", "-display", "none", "-audio", "none"),
        *("-run-with", "exit-with-parent=on", "-machine", "none", "-accel", "qtest"),
    ]
    with subprocess.Popen(argv, cwd=ROOT) as process:
        qtest, qmp = (listener.accept()[0] for listener in listeners)
        for sock in (qtest, qmp):
            sock.settimeout(60)
        assert qmp.recv(1000).startswith(b'{"QMP": ')
        qmp.sendall(b"{ 'execute': 'qmp_capabilities' }\n".replace(b"'", b'"'))
        assert qmp.recv(1000) == b'{"return": {}}\r\n'
        qtest.sendall(b"endianness\n")
        assert qtest.recv(1000) == b"OK little\n"
        process.terminate()
        assert process.wait(60) == 0
    for sock in (qtest, qmp, *listeners):
        sock.close()


def test_quit_ends_it() -> None:
    q = Qtest(*RNG, qmp=True)
    assert q.qmp("quit") == {}
    assert q.wait() == 0
    q.close()


def test_a_server_is_there_for_the_next_client(tmp_path: Path) -> None:
    path = str(tmp_path / "q")
    argv = [*VMM, *RNG, "-qtest-log", "none", "-qtest", f"unix:{path},server=on,wait=off"]
    with subprocess.Popen(argv, cwd=ROOT) as process:
        try:
            for _ in range(3):
                with socket.socket(socket.AF_UNIX) as sock:

                    def connected(sock: socket.socket = sock) -> bool:
                        try:
                            sock.connect(path)
                        except OSError:
                            return False
                        return True

                    wait_for(connected)
                    sock.sendall(b"endianness\n")
                    assert sock.recv(100) == b"OK little\n"
        finally:
            process.terminate()
        assert process.wait(30) == 0
    assert not os.path.exists(path)


@pytest.mark.parametrize(
    ("argv", "status", "sentence"),
    [
        (["-qtest", "unix:/nowhere/at/all"], 125, "could not connect to unix:/nowhere/at/all: No"),
        (["-qtest", "unix:/nowhere/at/all,server=on"], 125, "could not listen at"),
        (["-qtest", "unix:/" + "x" * 200], 125, "could not connect to"),
        (["-qtest", "fd:77"], 125, "Bad file descriptor"),
        (["-qtest", "tcp:localhost:bad"], 125, "could not connect to"),
        ([], 2, "-qtest is needed, once"),
        (["-qtest", "none"], 2, "nobody could reach the machine"),
        (["-qtest", "stdio", "-qtest-log", "/nowhere/log"], 125, "-qtest-log /nowhere/log"),
        (["-qtest", "stdio", "-device", "x"], 2, "no such device"),
        (
            ["-qtest", "stdio", "-drive", "file=/nowhere/disk,if=virtio"],
            125,
            "/nowhere/disk could not be opened",
        ),
    ],
)
def test_what_cannot_be_opened(argv: list[str], status: int, sentence: str) -> None:
    done = subprocess.run(
        [*VMM, *argv], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert (done.returncode, sentence in done.stderr) == (status, True), done.stderr
    assert "Traceback" not in done.stderr


# ---- clients that misbehave


def test_partial_and_joined_lines() -> None:
    with Qtest(*RNG) as q:
        for byte in "readb 0x10\r\n":
            q.send(byte)
        assert q.answer() == "OK 0x0000000000000000"
        q.send("endianness\nbogus\n\nendianness\n")
        assert [q.answer()[:6] for _ in range(4)] == ["OK lit", "FAIL U", "FAIL a", "OK lit"]


def test_binary_noise() -> None:
    with Qtest(*RNG) as q:
        q._lines[0].sock.sendall(bytes(range(256)) + b"\n\xff\xfe\n")
        assert [q.answer()[:4] for _ in range(3)] == ["FAIL"] * 3
        assert q.command("endianness") == "little"


def peak_mib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) >> 10


def test_a_line_without_end_takes_no_memory() -> None:
    q = Qtest(*RNG, "-m", "16")
    for _ in range(512):
        q.send("x" * (1 << 20))
    q.send("\nendianness\n")
    assert q.answer() == "FAIL a line is too long"
    assert q.answer() == "OK little"
    assert peak_mib(q.process.pid) < 400
    assert q.close() == 0


def test_a_client_that_does_not_read() -> None:
    """It is no longer listened to; QMP and signals still work, and nothing piles up."""
    q = Qtest(*RNG, "-m", "32", qmp=True)
    sock = q._lines[0].sock
    sock.setblocking(False)
    flood = b"b64read 0 0x100000\n" * 1000
    sent = 0
    try:
        for _ in range(2000):
            sent += sock.send(flood)
    except BlockingIOError:
        pass
    assert sent < 100 << 20
    assert q.qmp("query-status")["running"]
    assert peak_mib(q.process.pid) < 400
    assert q.close() == 0


def test_a_qmp_client_that_does_not_read() -> None:
    q = Qtest(*RNG, qmp=True)
    sock = q._lines[1].sock
    sock.setblocking(False)
    try:
        while True:
            sock.send(b'{"execute": "query-commands"}\n' * 1000)
    except BlockingIOError:
        pass
    assert q.command("endianness") == "little"
    assert q.close() == 0


def test_the_device_side_cannot_be_made_to_raise() -> None:
    """Every register of every device, in every width, with odd values."""
    with Qtest("-M", "x86", *RNG, "-drive", "file=null-co://,if=virtio") as q:
        for port in (*range(0x60, 0x80), *range(0x3F8, 0x400), *range(0x600, 0x608)):
            for size in (1, 2, 4):
                q.port_in(port, size)
                q.port_out(port, size, 0x5A5A_5A5A)
        for base in (0xE000_0000, 0xE000_8000, 0xC000_0000, 0xC000_8000):
            for offset in range(0, 0x60, 3):
                for size in (1, 2, 4, 8):
                    q.load(base + offset, size)
                    q.store(base + offset, size, (1 << 64) - 1)
        assert q.command("endianness") == "little"
        assert q.process.poll() is None


# ---- QMP with QEMU's own client


def test_qemus_own_qmp_client(tmp_path: Path) -> None:
    qmp = pytest.importorskip("qemu.qmp")
    path = str(tmp_path / "qmp")
    argv = [*VMM, *RNG, "-qtest", "none", "-qtest-log", "none", "-qmp", f"unix:{path},server=on"]

    async def talk() -> None:
        client = qmp.QMPClient("test")
        await client.connect(path)
        assert (await client.execute("query-status"))["status"] == "running"
        await client.execute("device_add", {"driver": "virtio-rng-pci", "id": "new"})
        with client.listener("DEVICE_DELETED") as listener:
            await client.execute("device_del", {"id": "new"})
            assert (await listener.get())["data"]["device"] == "new"
        with pytest.raises(qmp.ExecuteError, match="not found"):
            await client.execute("device_del", {"id": "new"})
        await client.execute("quit")
        with contextlib.suppress(EOFError):  # it is gone, as it was told
            await client.disconnect()

    with subprocess.Popen(argv, cwd=ROOT) as process:
        try:
            wait_for(lambda: os.path.exists(path))
            asyncio.run(talk())
        finally:
            if process.poll() is None and sys.exc_info()[0] is not None:
                process.kill()
        assert process.wait(30) == 0


def test_the_client_tells_of_a_server_that_does_not_start() -> None:
    with pytest.raises(QtestError, match="no such device"):
        Qtest("-device", "bogus")
