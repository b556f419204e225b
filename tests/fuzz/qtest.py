"""The executor behind a socket: ``vmm qtest`` in a process of its own, whose crash, hang or noise
is seen from here.

Guest memory is mirrored, as the generator and the twin read it a field at a time: what is written
goes out before the next access to a register, and after one it is read anew where it is needed.
"""

from __future__ import annotations

import base64
from pathlib import Path

from tests.fuzz.executor import HIGH, HIGH_RAM, RAM
from tests.qtest_client import MemoryBus, PortBus, Qtest
from tests.virtio_mock import NEEDS_RESET, MmioRegs, PciConfig, PciRegs
from vmm.memory import GuestMemory

SECTORS = 64
_MMIO = 0xFEB0_0000
#: How much of memory is read at once.
_CHUNK = 1 << 14
_LAYOUT = f"x-ram=0:{RAM:#x}/{HIGH:#x}:{HIGH_RAM:#x}"


class Mirror(GuestMemory):
    """The memory of the process, as it was when it was last heard of."""

    def __init__(self, qtest: Qtest) -> None:
        super().__init__([(0, RAM), (HIGH, HIGH_RAM)])
        self._qtest = qtest
        #: First bytes of the chunks that may be different there.
        self._stale: set[int] = set()
        self._waiting: list[str] = []

    def flush(self) -> None:
        """Send what was written; what is there may be different from here on."""
        lines, self._waiting = self._waiting, []
        self._qtest.send("".join(lines))
        for line in lines:
            answer = self._qtest.answer()
            assert answer == "OK", f"{line[:60]}: {answer}"
        self._stale = {at for r in self.ranges for at in range(r.gpa, r.gpa + r.size, _CHUNK)}

    def _fetch(self, gpa: int, size: int) -> None:
        """Nothing waits to be sent where something is stale."""
        for at in range(gpa & -_CHUNK, gpa + size, _CHUNK):
            if at in self._stale:
                self._stale.remove(at)
                super().write(at, self._qtest.read(at, _CHUNK))

    def read(self, gpa: int, size: int) -> bytes:
        if self.contains(gpa, size):
            self._fetch(gpa, size)
        return super().read(gpa, size)

    def view(self, gpa: int, size: int) -> memoryview:
        """To be read, and of no use after the next access to a register."""
        self._fetch(gpa, size)
        return super().view(gpa, size)

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        size = len(data)
        if not size:
            return
        if self.contains(gpa, size):
            self._fetch(gpa, size)
        super().write(gpa, data)
        text = base64.b64encode(data).decode()
        self._waiting.append(f"b64write {gpa:#x} {size:#x} {text}\n")


class _Registers(MemoryBus):
    """Each access sends first what was written to memory."""

    def __init__(self, qtest: Qtest, memory: Mirror) -> None:
        super().__init__(qtest)
        self._memory = memory

    def read(self, addr: int, size: int) -> int:
        self._memory.flush()
        return super().read(addr, size)

    def write(self, addr: int, size: int, value: int) -> None:
        self._memory.flush()
        super().write(addr, size, value)


def arguments(name: str, scratch: Path) -> list[str]:
    """The command line of a target (tests/fuzz/targets.py), less its machine."""
    image = scratch / name
    disk = f"if=none,id=d,format=raw,file={image}"
    if name in ("blk", "blk-uring"):
        image.write_bytes(bytes(512 * SECTORS))
        engine = "io_uring" if name == "blk-uring" else "threads"
        return ["-drive", f"{disk},aio={engine}", "-device", "virtio-blk-{bus},drive=d"]
    if name == "console":
        return [
            *("-chardev", "ringbuf,id=c", "-device", "virtio-serial-{bus}"),
            *("-device", "virtconsole,chardev=c"),
        ]
    if name == "ports":
        return ["-device", "virtio-serial-{bus}", "-device", "virtserialport,name=one"]
    if name == "net":
        return ["-netdev", "hubport,id=n,hubid=0", "-device", "virtio-net-{bus},netdev=n"]
    if name == "pmem":
        image.write_bytes(bytes(2 << 20))
        memory = f"memory-backend-file,id=m,mem-path={image}"
        return ["-object", memory, "-device", "virtio-pmem-{bus},memdev=m"]
    if name == "fs":
        share = scratch / "share"
        share.mkdir()
        return ["-device", f"virtio-fs-{{bus}},path={share},tag=fuzz"]
    if name == "virtio-mem":
        return ["-device", "virtio-mem-{bus},size=16M,requested=8M,block=2M"]
    return ["-device", f"virtio-{name}-{{bus}}" + ",cid=3" * (name == "vsock")]


class OverSocket:
    """An executor as tests/fuzz/executor.py wants it."""

    def __init__(self, name: str, transport: str, scratch: Path) -> None:
        bus = "device" if transport == "mmio" else "pci"
        machine = "microvm" if transport == "mmio" else "x86"
        argv = [arg.replace("{bus}", bus) for arg in arguments(name, scratch)]
        driver = next(arg.partition(",")[0] for arg in argv if arg.startswith("virtio-"))
        argv += ["-global", f"{driver}.packed=on"]
        self.qtest = Qtest("-M", f"{machine},{_LAYOUT}", *argv)
        self._mirror = Mirror(self.qtest)
        self.memory: GuestMemory = self._mirror
        bus_there = _Registers(self.qtest, self._mirror)
        self.regs: MmioRegs | PciRegs
        if transport == "mmio":
            self.regs = MmioRegs(bus_there, _MMIO)
        else:
            self.regs = PciRegs(bus_there, PciConfig(PortBus(self.qtest), 1))
        self.sizes = self._sizes()

    def _sizes(self) -> tuple[int, ...]:
        found: list[int] = []
        while size := self.regs.queue_max(len(found)):
            found.append(size)
        return tuple(found)

    def broken(self) -> bool:
        return bool(self.regs.status & NEEDS_RESET)

    def breaks(self, queue: int) -> tuple[int, str] | None:
        return None

    def on_thread(self, wanted: bool) -> None:
        pass

    def rest(self) -> None:
        self.settle()

    def settle(self) -> None:
        self._mirror.flush()
        self.qtest.clock_step()

    def close(self) -> None:
        """Raises AssertionError when the process did not end well."""
        self.memory.close()
        status = self.qtest.close()
        assert (status, self.qtest.stderr) == (0, "")
