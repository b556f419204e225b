"""A client of the qtest protocol, and a driver's view of the machine behind it.

``Qtest`` starts a server (``vmm qtest``, or QEMU itself) and speaks to it as QEMU's own test
programs do: it listens, the server connects. ``QtestRig`` has the faces of tests.virtio_mock.Rig
that drivers use, so that what drives a device in this process drives it there too.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.virtio_mock import Driver, MmioRegs, PciConfig, PciRegs
from vmm.bus import Bus
from vmm.memory import GuestMemory, RamRange

VMM = (sys.executable, "-m", "vmm", "qtest")
ROOT = Path(__file__).parents[1]
RAM = 16 << 20
TIMEOUT_S = 60.0
BULK = 8 << 20


class QtestError(Exception):
    """The server answered FAIL, or not at all."""


class Line:
    """A socket read by lines."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.came = bytearray()

    def get(self) -> str:
        """Raises QtestError when the peer is gone."""
        while (end := self.came.find(b"\n")) < 0:
            try:
                data = self.sock.recv(1 << 20)
            except ConnectionError:
                data = b""
            if not data:
                raise QtestError("the server hung up")
            self.came += data
        line = self.came[:end].decode()
        del self.came[: end + 1]
        return line.rstrip("\r")

    def put(self, text: str) -> None:
        try:
            self.sock.sendall(text.encode())
        except ConnectionError as e:
            raise QtestError("the server hung up") from e


class Qtest:
    """A server process and the conversation with it."""

    def __init__(
        self,
        *args: str,
        server: tuple[str, ...] = VMM,
        qmp: bool = False,
        log: str = "none",
        env: dict[str, str] | None = None,
        pass_fds: tuple[int, ...] = (),
    ) -> None:
        self._home = tempfile.TemporaryDirectory(prefix="qtest")
        self.levels: dict[int, int] = {}
        #: (pin, level) in the order they came.
        self.irqs: list[tuple[int, int]] = []
        self.events: list[dict[str, Any]] = []
        argv = [*server, *args, "-qtest-log", log]
        argv += ["-qtest", f"unix:{self._home.name}/qtest"]
        argv += ["-qmp", f"unix:{self._home.name}/qmp"] if qmp else []
        names = ["qtest", "qmp"] if qmp else ["qtest"]
        listeners = [socket.socket(socket.AF_UNIX) for _ in names]
        for listener, name in zip(listeners, names, strict=True):
            listener.settimeout(TIMEOUT_S)
            listener.bind(f"{self._home.name}/{name}")
            listener.listen(1)
        self.process = subprocess.Popen(
            argv,
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            stderr=subprocess.PIPE,
            pass_fds=pass_fds,
        )
        try:
            self._lines = [self._accept(listener) for listener in listeners]
            if qmp:
                self.greeting: dict[str, Any] = json.loads(self._lines[1].get())["QMP"]
                assert self.qmp("qmp_capabilities") == {}
        except BaseException:
            self.close(signal.SIGKILL)
            raise
        finally:
            for listener in listeners:
                listener.close()

    def _accept(self, listener: socket.socket) -> Line:
        listener.settimeout(0.2)
        for _ in range(int(TIMEOUT_S / 0.2)):
            try:
                sock = listener.accept()[0]
            except TimeoutError:
                if self.process.poll() is not None:
                    assert self.process.stderr is not None
                    raise QtestError(self.process.stderr.read().decode()) from None
                continue
            sock.settimeout(TIMEOUT_S)
            return Line(sock)
        raise QtestError("the server did not connect")

    # ---- the protocol

    def answer(self) -> str:
        """The next answer; interrupts before it are noted."""
        while True:
            line = self._lines[0].get()
            if not line.startswith("IRQ "):
                return line
            words = line.split()
            pin, level = int(words[2]), int(words[1] == "raise")
            self.levels[pin] = level
            self.irqs.append((pin, level))

    def send(self, text: str) -> None:
        """As it is, a line's end included."""
        self._lines[0].put(text)

    def command(self, text: str) -> str:
        """What follows OK. Raises QtestError."""
        self.send(text + "\n")
        answer = self.answer()
        if not answer.startswith("OK"):
            raise QtestError(f"{text[:80]}: {answer}")
        return answer[3:]

    def port_in(self, port: int, size: int) -> int:
        return int(self.command(f"in{'.bw.l'[size]} {port:#x}"), 16)

    def port_out(self, port: int, size: int, value: int) -> None:
        self.command(f"out{'.bw.l'[size]} {port:#x} {value:#x}")

    def load(self, addr: int, size: int) -> int:
        return int(self.command(f"read{'.bw.l...q'[size]} {addr:#x}"), 16)

    def store(self, addr: int, size: int, value: int) -> None:
        self.command(f"write{'.bw.l...q'[size]} {addr:#x} {value:#x}")

    def read(self, addr: int, size: int) -> bytes:
        out = b""
        while len(out) < size:
            n = min(BULK, size - len(out))
            out += base64.b64decode(self.command(f"b64read {addr + len(out):#x} {n:#x}"))
        return out

    def write(self, addr: int, data: bytes) -> None:
        for at in range(0, len(data), BULK):
            part = data[at : at + BULK]
            text = base64.b64encode(part).decode()
            self.command(f"b64write {addr + at:#x} {len(part):#x} {text}")

    def memset(self, addr: int, size: int, value: int) -> None:
        self.command(f"memset {addr:#x} {size:#x} {value:#x}")

    def clock_step(self, ns: int | None = None) -> int:
        return int(self.command("clock_step" if ns is None else f"clock_step {ns}"))

    def qmp_raw(self, message: dict[str, Any]) -> dict[str, Any]:
        """One message there and its answer; events are noted."""
        self._lines[1].put(json.dumps(message) + "\n")
        while True:
            reply: dict[str, Any] = json.loads(self._lines[1].get())
            if "event" not in reply:
                return reply
            self.events.append(reply)

    def qmp(self, execute: str, **arguments: Any) -> Any:
        """What is returned. Raises QtestError."""
        named = {key.replace("_", "-"): value for key, value in arguments.items()}
        reply = self.qmp_raw({"execute": execute, "arguments": named})
        if "return" not in reply:
            raise QtestError(reply["error"]["desc"])
        return reply["return"]

    def event(self, name: str) -> dict[str, Any]:
        """The first event of that name, waiting for it."""
        for message in self.events:
            if message["event"] == name:
                return message
        while True:
            message = json.loads(self._lines[1].get())
            self.events.append(message)
            if message.get("event") == name:
                return message

    # ---- the end

    def wait(self) -> int:
        return self.process.wait(TIMEOUT_S)

    def close(self, how: int = signal.SIGTERM) -> int:
        """End the server; its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        status = self.wait()
        for line in getattr(self, "_lines", []):
            line.sock.close()
        if self.process.stderr is not None:
            self.stderr = self.process.stderr.read().decode()
            self.process.stderr.close()
        self._home.cleanup()
        return status

    def __enter__(self) -> Qtest:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class PortBus(Bus):
    """I/O ports behind a socket."""

    def __init__(self, qtest: Qtest) -> None:
        super().__init__("pio", 1 << 16)
        self.qtest = qtest

    def read(self, addr: int, size: int) -> int:
        return self.qtest.port_in(addr, size)

    def write(self, addr: int, size: int, value: int) -> None:
        self.qtest.port_out(addr, size, value)


class MemoryBus(Bus):
    """Registers behind a socket."""

    def __init__(self, qtest: Qtest) -> None:
        super().__init__("mmio", 1 << 64)
        self.qtest = qtest

    def read(self, addr: int, size: int) -> int:
        return self.qtest.load(addr, size)

    def write(self, addr: int, size: int, value: int) -> None:
        self.qtest.store(addr, size, value)


class RemoteMemory(GuestMemory):
    """RAM behind a socket: one range from 0. Nothing is mapped here."""

    def __init__(self, qtest: Qtest, size: int) -> None:
        super().__init__([])
        self.qtest = qtest
        self.size = size
        self.ranges = [RamRange(0, size, 0, -1, 0)]

    def close(self) -> None:
        self.ranges = []
        super().close()

    def contains(self, gpa: int, size: int) -> bool:
        return 0 <= gpa <= self.size - size

    def read(self, gpa: int, size: int) -> bytes:
        return self.qtest.read(gpa, size) if size else b""

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        if len(data):
            self.qtest.write(gpa, bytes(data))


class QtestRig:
    """The first device of a server's command line and a driver for it.

    ``args`` name the device with ``{bus}`` where QEMU's names say 'pci' or 'device'.
    """

    MMIO = 0xFEB0_0000

    def __init__(
        self, transport: str, *args: str, machine: str = "", slot: int = 0, **kw: Any
    ) -> None:
        machine = machine or ("microvm" if transport == "mmio" else "x86")
        bus = "device" if transport == "mmio" else "pci"
        filled = [arg.replace("{bus}", bus) for arg in args]
        self.qtest = Qtest("-M", machine, "-m", str(RAM >> 20), *filled, **kw)
        self.bus = MemoryBus(self.qtest)
        self.pio = PortBus(self.qtest)
        self.memory = RemoteMemory(self.qtest, RAM)
        self.regs: MmioRegs | PciRegs
        if transport == "mmio":
            self.regs = MmioRegs(self.bus, self.MMIO + 0x1000 * slot)
        else:
            config = PciConfig(self.pio, slot or (2 if machine == "pc" else 1))
            self.regs = PciRegs(self.bus, config)
        self.driver = Driver(self.regs, self.memory)

    def settle(self) -> None:
        self.qtest.clock_step()

    def __enter__(self) -> QtestRig:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> int:
        self.memory.close()
        return self.qtest.close()
