"""The same sessions with ``vmm qtest`` and with QEMU: the client, and what both must answer."""

from __future__ import annotations

import shutil
import signal
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.qtest_client import (
    RAM,
    VMM,
    MemoryBus,
    PortBus,
    Qtest,
    QtestError,
    RemoteMemory,
)
from tests.virtio_mock import EVENT_IDX, Driver, PciConfig, PciRegs

QEMU = shutil.which("qemu-system-x86_64")
SERVERS = {"vmm": VMM, "qemu": (QEMU or "", "-accel", "qtest", "-nodefaults", "-display", "none")}
#: Where libqos puts base addresses.
FIRST_BAR = 0xE000_0000


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest) -> tuple[str, ...]:
    if request.param == "qemu" and QEMU is None:
        pytest.skip("qemu-system-x86_64 is not installed")
    return SERVERS[request.param]


class Boot:
    def __init__(self, server: tuple[str, ...], scratch: Path) -> None:
        self.server = server
        #: Whether the clock goes by clock_step.
        self.stepping = True
        self.halt = scratch / "halt"
        self.halt.write_bytes(bytes(0xFFF0) + b"\xfa\xf4\xeb\xfd" + bytes(12))  # cli; hlt
        self.started: list[Qtest] = []

    def __call__(self, *args: str, machine: str = "pc", qmp: bool = False) -> Qtest:
        argv = ("-M", machine, "-m", str(RAM >> 20), *args)
        env = {} if self.server == VMM else {"LD_PRELOAD": ""}  # of the sanitizers
        try:
            q = Qtest(*argv, server=self.server, qmp=qmp, log="/dev/null", env=env)
        except QtestError as e:
            if "invalid accelerator" not in str(e):
                raise
            # Built without the qtest accelerator, as Debian's is: an emulated CPU that halts.
            server = (*self.server[:1], "-accel", "tcg", "-bios", str(self.halt))
            argv = ("-nodefaults", "-display", "none", *argv)
            self.stepping = False
            q = Qtest(*argv, server=server, qmp=qmp, log="/dev/null", env=env)
        self.started.append(q)
        return self.started[-1]

    def driver(self, *args: str, slot: int = 4, machine: str = "pc") -> Driver:
        """For a virtio device in a slot; puts its base addresses somewhere, as firmware would."""
        q = self(*args, machine=machine)
        config = PciConfig(PortBus(q), slot)
        at = FIRST_BAR
        config.w(4, 2, 0)
        bar = 0
        while bar < 6:
            register = 0x10 + 4 * bar
            kind = config.r(register, 4)
            config.w(register, 4, 0xFFFF_FFFF)
            size = -(config.r(register, 4) & ~0xF) & 0xFFFF_FFFF
            wide = kind & 7 == 4
            if size and not kind & 1:
                at = (at + size - 1) & -size
                config.w(register, 4, at)
                at += size
            if wide:
                config.w(register + 4, 4, 0)
            bar += 1 + int(wide)
        config.w(4, 2, 7)
        assert config.r(4, 2) & 7 == 7
        regs = PciRegs(MemoryBus(q), config)
        return Driver(regs, RemoteMemory(q, RAM))


@pytest.fixture
def boot(server: tuple[str, ...], tmp_path: Path) -> Iterator[Boot]:
    boot = Boot(server, tmp_path)
    yield boot
    # QEMU may be told to end before it listens to that.
    good = (0,) if server == VMM else (0, -signal.SIGTERM)
    for q in boot.started:
        assert q.close() in good


def test_memory(boot: Boot) -> None:
    q = boot()
    assert q.command("endianness") == "little"
    q.store(0x10_0000, 8, 0x1122_3344_5566_7788)
    assert [q.load(0x10_0000, size) for size in (1, 2, 4)] == [0x88, 0x7788, 0x5566_7788]
    q.command("write 0x100000 4 0x0102")
    assert q.command("read 0x100000 6") == "0x010200004433"
    q.memset(0x10_0000, 3, 0xAB)
    q.memset(0x10_0000, 0, 1)
    assert q.read(0x10_0000, 4) == b"\xab\xab\xab\0"
    q.write(0x10_0000, bytes(range(256)))
    assert q.read(0x10_0000, 256) == bytes(range(256))
    assert q.command("readl 1048576") == "0x0000000003020100"
    q.send("bogus 1\n")
    assert q.answer() == "FAIL Unknown command 'bogus'"


def test_ports(boot: Boot) -> None:
    q = boot()
    q.port_out(0xCF8, 4, 0x8000_0000)
    assert q.port_in(0xCF8, 4) == 0x8000_0000
    assert q.command("inl 0xcf8") == "0x80000000"
    assert len(q.command("inb 0xcfc")) == len("0x0000")
    q.port_out(0x70, 1, 0x0F)
    q.port_out(0x71, 1, 0x5A)
    assert q.port_in(0x71, 1) == 0x5A


def test_the_clock(boot: Boot) -> None:
    q = boot()
    if not boot.stepping:
        pytest.skip("this QEMU's clock goes by itself")
    first = q.clock_step(1000)
    assert q.clock_step(500) == first + 500
    assert int(q.command(f"clock_set {first + 900}")) == first + 900


@pytest.mark.parametrize("machine", ["pc", "q35"])
def test_rng(boot: Boot, machine: str) -> None:
    driver = boot.driver("-device", "virtio-rng-pci,addr=04.0,disable-legacy=on", machine=machine)
    assert driver.regs.device_id() == 4
    driver.start(wanted=~EVENT_IDX)
    driver.queues[0].add([], [64])
    driver.queues[0].kick()
    length, data = driver.queues[0].wait()[1:]
    assert 0 < length <= 64
    assert data != bytes(length)
    driver.reset()


def test_blk(boot: Boot, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(range(256)) * 256)
    driver = boot.driver(
        *("-drive", f"if=none,id=d0,file={image},format=raw"),
        *("-device", "virtio-blk-pci,drive=d0,serial=abc,addr=4,disable-legacy=on,num-queues=1"),
    )
    assert driver.regs.device_id() == 2
    driver.start(wanted=~EVENT_IDX)
    assert driver.regs.config(0, 4) == 128
    q = driver.queues[0]
    assert q.request([struct.pack("<IIQ", 0, 0, 1)], [512, 1]) == (
        513,
        bytes(range(256)) * 2 + b"\0",
    )
    assert q.request([struct.pack("<IIQ", 1, 0, 2), b"x" * 512], [1]) == (1, b"\0")
    assert q.request([struct.pack("<IIQ", 4, 0, 0)], [1]) == (1, b"\0")
    assert image.read_bytes()[1024:1536] == b"x" * 512
    assert q.request([struct.pack("<IIQ", 8, 0, 0)], [20, 1])[1].startswith(b"abc\0")
    assert q.request([struct.pack("<IIQ", 0, 0, 128)], [512, 1])[1][-1:] in (b"", b"\1")
    assert q.request([struct.pack("<IIQ", 99, 0, 0)], [1])[1] == b"\2"


def test_a_message_to_ram(boot: Boot) -> None:
    driver = boot.driver("-device", "virtio-rng-pci,addr=04.0,disable-legacy=on")
    regs = driver.regs
    assert isinstance(regs, PciRegs)
    driver.negotiate(~EVENT_IDX)
    regs.msix_entry(1, 0x2000, 0x1234_5678)
    regs.msix_control(0x8000)
    q = driver.setup_queue(0)
    assert regs.vector(0, 1) == 1
    regs.status = 15
    q.add([], [8])
    q.kick()
    q.wait()
    for _ in range(1000):
        if driver.memory.read_int(0x2000, 4):
            break
        regs.pci.r(0, 4)
    assert driver.memory.read_int(0x2000, 4) == 0x1234_5678


def test_a_broken_queue_asks_for_a_reset(boot: Boot) -> None:
    driver = boot.driver("-device", "virtio-rng-pci,addr=04.0,disable-legacy=on")
    driver.start(wanted=~EVENT_IDX)
    q = driver.queues[0]
    q.write_desc(0, 0x1000, 16, 3, 0)
    q.offer(0)
    q.kick()
    for _ in range(1000):
        if driver.regs.status & 0x40:
            break
    assert driver.regs.status & 0x40
    driver.reset()
    driver.start(wanted=~EVENT_IDX)


def test_qmp(boot: Boot) -> None:
    q = boot("-device", "virtio-rng-pci,id=r0,addr=5", qmp=True)
    assert set(q.greeting) == {"version", "capabilities"}
    assert q.qmp("query-status")["running"] in (True, False)
    machines = q.qmp("query-machines")
    assert {"name", "cpu-max", "hotpluggable-cpus"} <= set(machines[0])
    assert {"pc", "q35", "microvm"} <= {m["name"] for m in machines} | {
        m.get("alias") for m in machines
    }
    types = {t["name"] for t in q.qmp("qom-list-types", implements="device")}
    assert {"virtio-rng-pci", "virtio-blk-device", "isa-debug-exit", "virtconsole"} <= types
    assert {"name": "r0", "type": "child<virtio-rng-pci>"} in q.qmp(
        "qom-list", path="/machine/peripheral"
    )
    assert q.qmp("device_add", driver="virtio-rng-pci", id="r1", addr="6") == {}
    config = PciConfig(PortBus(q), 6)
    assert config.r(0, 2) == 0x1AF4
    for execute, arguments, kind in (
        ("device_add", {"driver": "virtio-rng-pci", "id": "r1"}, "GenericError"),
        ("device_add", {"driver": "no-such-device"}, "GenericError"),
        ("device_del", {"id": "nobody"}, "DeviceNotFound"),
        ("bogus", {}, "CommandNotFound"),
    ):
        reply = q.qmp_raw({"execute": execute, "arguments": arguments, "id": execute})
        assert reply["error"]["class"] == kind
        assert reply["id"] == execute
    assert q.qmp("system_reset") == {}
    q.event("RESET")
    assert q.qmp("quit") == {}
    assert q.wait() == 0


def test_the_debug_exit_port(boot: Boot) -> None:
    q = boot("-device", "isa-debug-exit,iobase=0xf4,iosize=4")
    q.send("outb 0xf4 0x10\n")
    assert q.wait() == 33
    boot.started.clear()
    q.close()


def test_pvpanic(boot: Boot) -> None:
    q = boot("-device", "pvpanic", "-action", "panic=pause", qmp=True)
    assert q.port_in(0x505, 1) & 1
    q.port_out(0x505, 1, 1)
    assert q.event("GUEST_PANICKED")["data"]["action"] == "pause"
    assert not q.qmp("query-status")["running"]


def test_a_device_that_is_not_there(boot: Boot) -> None:
    try:
        q = boot("-device", "no-such-device")
    except QtestError:
        return  # it ended before it connected
    boot.started.clear()
    assert q.wait() == 1
    q.close()
