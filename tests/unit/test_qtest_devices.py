"""Devices driven through ``vmm qtest``, on both kinds of machine."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.qtest_client import RAM, MemoryBus, PortBus, Qtest, QtestError, QtestRig, RemoteMemory
from tests.virtio_mock import EVENT_IDX, Driver, PciConfig, PciRegs

Boot = Callable[..., QtestRig]


@pytest.fixture(params=["mmio", "pci"])
def boot(request: pytest.FixtureRequest) -> Iterator[Boot]:
    rigs: list[QtestRig] = []

    def start(*args: str, **kw: object) -> QtestRig:
        rigs.append(QtestRig(request.param, *args, **kw))  # type: ignore[arg-type]
        return rigs[-1]

    yield start
    for rig in rigs:
        assert rig.close() == 0
        assert "Traceback" not in rig.qtest.stderr


def test_rng(boot: Boot) -> None:
    rig = boot("-device", "virtio-rng-{bus}")
    assert rig.regs.device_id() == 4
    rig.driver.start()
    length, data = rig.driver.queues[0].request([], [64])
    assert length == 64
    assert data != bytes(64)


def test_blk(boot: Boot, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(range(256)) * 64)
    rig = boot(
        *("-drive", f"if=none,id=d0,file={image},format=raw,cache=writeback"),
        *("-device", "virtio-blk-{bus},drive=d0,serial=abc"),
    )
    assert rig.regs.device_id() == 2
    rig.driver.start()
    assert rig.regs.config(0, 4) == 32
    length, data = rig.driver.queues[0].request([struct.pack("<IIQ", 0, 0, 1)], [512, 1])
    assert length == 513
    q = rig.driver.queues[0]
    length, data = q.request([struct.pack("<IIQ", 0, 0, 1)], [512, 1])
    assert (length, data) == (513, bytes(range(256)) * 2 + b"\0")
    assert q.request([struct.pack("<IIQ", 1, 0, 3), b"x" * 512], [1]) == (1, b"\0")
    assert q.request([struct.pack("<IIQ", 8, 0, 0)], [20, 1])[1].startswith(b"abc\0")
    assert q.request([struct.pack("<IIQ", 4, 0, 0)], [1]) == (1, b"\0")
    assert image.read_bytes()[1536:2048] == b"x" * 512


def test_a_null_image_and_two_disks(boot: Boot) -> None:
    rig = boot(
        *("-blockdev", "driver=null-co,node-name=n0,size=65536"),
        *("-blockdev", '{"driver": "raw", "node-name": "r0", "file": "n0", "read-only": true}'),
        *("-drive", "if=none,id=d1,file=null-co://,file.read-zeroes=on,format=raw"),
        *("-device", "virtio-blk-{bus},drive=r0"),
        *("-device", '{"driver": "virtio-blk-{bus}", "drive": "d1", "id": "second"}'),
    )
    features = rig.driver.start()
    assert features & 1 << 5  # read-only
    assert rig.regs.config(0, 4) == 128
    q = rig.driver.queues[0]
    assert q.request([struct.pack("<IIQ", 0, 0, 0)], [512, 1])[1] == bytes(513)


def test_console(boot: Boot) -> None:
    rig = boot(
        *("-chardev", "ringbuf,id=c0", "-device", "virtio-serial-{bus},id=s0"),
        *("-device", "virtconsole,chardev=c0,bus=s0.0"),
        qmp=True,
    )
    assert rig.regs.device_id() == 3
    rig.driver.start(2)
    receive, send = rig.driver.queues[0], rig.driver.queues[1]
    receive.add([], [16])
    receive.kick()
    assert send.request([b"hello "], []) == (0, b"")
    assert send.request([b"host\n"], []) == (0, b"")
    assert rig.qtest.qmp("ringbuf-read", device="c0", size=100) == "hello host\n"
    assert rig.qtest.qmp("ringbuf-read", device="c0", size=100) == ""
    rig.qtest.qmp("ringbuf-write", device="c0", data="guest")
    assert receive.wait()[1:] == (5, b"guest")


def test_what_the_driver_breaks_needs_a_reset(boot: Boot) -> None:
    rig = boot("-device", "virtio-rng-{bus}")
    rig.driver.start()
    q = rig.driver.queues[0]
    q.write_desc(0, 0x1000, 16, 1, 0)  # a loop
    q.offer(0)
    q.kick()
    rig.settle()
    assert rig.regs.status & 0x40
    rig.driver.reset()
    rig.driver.start()
    assert rig.driver.queues[0].request([], [8])[0] == 8


def test_a_barrier_is_enough(boot: Boot) -> None:
    """After clock_step what was asked for is done: no polling."""
    rig = boot(
        *("-drive", "if=none,id=d0,file=null-co://,format=raw", "-device"),
        *("virtio-blk-{bus},drive=d0", "-device", "virtio-rng-{bus}"),
    )
    rig.driver.start()
    q = rig.driver.queues[0]
    for _ in range(50):
        q.add([struct.pack("<IIQ", 0, 0, 5)], [512, 1])
        q.kick()
        rig.settle()
        assert q.take() is not None


@pytest.mark.parametrize("machine", ["x86", "pc"])
def test_a_message_to_ram_is_seen_there(machine: str) -> None:
    """As QEMU's libqos waits for MSI-X."""
    rig = QtestRig("pci", "-device", "virtio-rng-pci", machine=machine)
    try:
        regs = rig.regs
        assert isinstance(regs, PciRegs)
        assert regs.pci.r(regs.msix + 4, 4) & 7 == int(machine == "pc")  # which BAR
        rig.driver.negotiate(~EVENT_IDX)
        regs.msix_entry(1, 0x2000, 0x1234_5678)
        regs.msix_control(0x8000)
        q = rig.driver.setup_queue(0)
        assert regs.vector(0, 1) == 1
        regs.status = 15
        q.add([], [8])
        q.kick()
        rig.settle()
        assert rig.memory.read_int(0x2000, 4) == 0x1234_5678
        regs.msix_mask(1, True)
        rig.memory.write_int(0x2000, 0, 4)
        q.add([], [8])
        q.kick()
        rig.settle()
        assert rig.memory.read_int(0x2000, 4) == 0
        assert regs.pending() == 2
        regs.msix_mask(1, False)
        assert rig.memory.read_int(0x2000, 4) == 0x1234_5678
    finally:
        rig.close()


@pytest.mark.parametrize("machine", ["x86", "pc", "q35"])
def test_where_pci_is(machine: str) -> None:
    """A base address where QEMU's clients put them; ECAM where the type has it."""
    rig = QtestRig("pci", "-device", "virtio-rng-pci,addr=05.0", machine=machine, slot=5)
    try:
        regs = rig.regs
        assert isinstance(regs, PciRegs)
        ecam = {"x86": 0xE000_0000, "q35": 0xB000_0000}.get(machine)
        if ecam is not None:
            assert rig.qtest.load(ecam + (5 << 15), 4) == 0x1044_1AF4
        assert rig.qtest.load((ecam or 0xE000_0000) + (6 << 15), 4) == 0xFFFF_FFFF
        regs.pci.w(4, 2, 0)
        regs.pci.w(0x10, 4, 0xFFFF_FFFF)
        size = -(regs.pci.r(0x10, 4) & ~0xF) & 0xFFFF_FFFF
        at = 0xD000_0000 if machine == "x86" else 0xE000_0000
        regs.pci.w(0x10, 4, at)
        regs.pci.w(4, 2, 7)
        assert regs.pci.r(4, 2) == 7
        assert PciRegs(rig.bus, regs.pci).places[1] == at
        assert size >= 0x1000
        assert rig.qtest.load(at + 0x12, 2) == 1  # num_queues
    finally:
        rig.close()


@pytest.mark.parametrize("transport", ["mmio", "pci"])
def test_interrupts(transport: str) -> None:
    rig = QtestRig(transport, "-device", "virtio-rng-{bus}")
    try:
        rig.driver.start(wanted=~EVENT_IDX)
        q = rig.driver.queues[0]
        q.add([], [8])
        q.kick()
        rig.settle()
        assert not rig.qtest.irqs  # nobody asked
        rig.regs.interrupts()
        rig.qtest.command("irq_intercept_in ioapic")
        rig.qtest.command("irq_intercept_in ioapic")
        q.add([], [8])
        q.kick()
        rig.settle()
        pin = 5 if transport == "mmio" else 21
        if transport == "mmio":  # an edge
            assert rig.qtest.irqs == [(pin, 1), (pin, 0)]
        else:
            assert rig.qtest.irqs == [(pin, 1)]
            assert rig.regs.interrupts() == 1
            assert rig.qtest.irqs == [(pin, 1), (pin, 0)]
        assert rig.qtest.levels == {pin: 0}
    finally:
        rig.close()


def test_a_disk_that_changes_its_size(boot: Boot, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(8192))
    rig = boot(
        *("-drive", f"if=none,id=d0,file={image},format=raw"),
        *("-device", "virtio-blk-{bus},drive=d0,id=disk"),
        qmp=True,
    )
    rig.driver.start()
    before = rig.regs.generation()
    assert rig.qtest.qmp("block_resize", node_name="d0", size=16384) == {}
    assert rig.regs.config(0, 8) == 32
    assert rig.regs.generation() != before
    assert image.stat().st_size == 16384
    assert rig.qtest.qmp("block_resize", device="disk", size=4096) == {}
    assert rig.regs.config(0, 8) == 8
    for name, size in (("nobody", 512), ("d0", -1), ("d0", 1 << 70)):
        with pytest.raises(QtestError):
            rig.qtest.qmp("block_resize", device=name, size=size)


def test_a_disk_that_fails_and_is_tried_again(tmp_path: Path) -> None:
    """The image shrinks under us; werror=stop holds the read until cont."""
    image = tmp_path / "image"
    image.write_bytes(b"y" * 8192)
    rig = QtestRig(
        "pci",
        *("-drive", f"if=none,id=d0,file={image},format=raw,rerror=stop"),
        *("-device", "virtio-blk-{bus},drive=d0"),
        qmp=True,
    )
    try:
        rig.driver.start()
        q = rig.driver.queues[0]
        os.truncate(image, 0)
        head = q.add([struct.pack("<IIQ", 0, 0, 4)], [512, 1])
        q.kick()
        assert rig.qtest.event("BLOCK_IO_ERROR")["data"]["action"] == "stop"
        assert rig.qtest.event("STOP")
        assert q.take() is None
        assert not rig.qtest.qmp("query-status")["running"]
        image.write_bytes(b"z" * 8192)
        rig.qtest.qmp("cont")
        assert q.wait() == (head, 513, b"z" * 512 + b"\0")
    finally:
        assert rig.close() == 0


def test_the_watchdog_goes_by_the_clock_that_is_stepped() -> None:
    with Qtest("-M", "x86", "-device", "i6300esb,addr=4", qmp=True) as q:
        config = PciConfig(PortBus(q), 4)
        assert config.r(0, 4) == 0x25AB_8086
        config.w(4, 2, 2)
        bar = config.bar(0)
        for register in (0, 4):  # both stages 1000 units, about a millisecond each
            for value in (0x80, 0x86):
                q.store(bar + 0xC, 2, value)
            q.store(bar + register, 4, 1000)
        config.w(0x68, 1, 2)
        q.clock_step(1_900_000_000)
        assert q.qmp("query-status")["running"]
        assert not q.events
        q.clock_step(100_000_000)
        assert q.event("WATCHDOG")["data"]["action"] == "reset"
        assert q.event("RESET")["data"]["guest"]
        assert config.r(0x68, 1) == 0


OWN = """
from vmm.devices.user import PioDevice

class Mine(PioDevice):
    PORT = 0x300
    SIZE = 4
    value = 0

    def read(self, offset, size):
        return self.value

    def write(self, offset, size, value):
        self.value = value + 1
"""


def test_a_device_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    with Qtest("-M", "x86", "-device", f"{tmp_path}/own.py:Mine") as q:
        q.port_out(0x300, 4, 41)
        assert q.port_in(0x300, 4) == 42


@pytest.mark.parametrize(
    ("args", "ident"),
    [
        (("-device", "virtio-balloon-pci,deflate-on-oom=off"), 5),
        (("-device", "vhost-vsock-pci,guest-cid=7"), 19),
    ],
)
def test_the_catalogue_by_qemus_names(args: tuple[str, ...], ident: int) -> None:
    rig = QtestRig("pci", *args)
    try:
        assert rig.regs.device_id() == ident
        rig.driver.start()
        if ident == 19:
            assert rig.regs.config(0, 4) == 7
    finally:
        assert rig.close() == 0


def test_a_network_card_on_a_socket(boot: Boot) -> None:
    """Frames with their lengths in front, as QEMU's tests pass them."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(30)
        rig = boot(
            *("-netdev", f"socket,id=n0,fd={theirs.fileno()}"),
            *("-device", "virtio-net-{bus},netdev=n0,mac=52:54:00:00:00:07"),
            pass_fds=(theirs.fileno(),),
        )
        assert rig.regs.device_id() == 1
        rig.driver.start(2)
        assert rig.regs.config(0, 4).to_bytes(4, "little") == bytes.fromhex("52540000")
        receive, send = rig.driver.queues[0], rig.driver.queues[1]
        frame = bytes(range(60))
        send.request([bytes(12) + frame], [])
        assert ours.recv(100) == struct.pack(">I", 60) + frame
        receive.add([], [2048])
        receive.kick()
        ours.sendall(struct.pack(">I", 60) + frame)
        length, data = receive.wait()[1:]
        assert (length, data[12:]) == (72, frame)


def test_ports(boot: Boot, tmp_path: Path) -> None:
    rig = boot(
        *("-chardev", f"file,id=c0,path={tmp_path}/out", "-chardev", "null,id=c1"),
        *("-device", "virtio-serial-{bus}", "-device", "virtserialport,chardev=c0,name=org.a"),
        *("-device", "virtserialport,chardev=c1,name=org.b"),
    )
    rig.driver.start()
    assert rig.regs.config(4, 4) == 2
    control, answers = rig.driver.queues[3], rig.driver.queues[2]
    for _ in range(8):
        answers.add([], [64])
    answers.kick()
    control.request([struct.pack("<IHH", 0, 0, 1)], [])  # DEVICE_READY
    for port in (0, 1):
        control.request([struct.pack("<IHH", port, 3, 1)], [])  # PORT_READY
    rig.settle()
    said = [answers.wait()[2] for _ in range(answers.used_idx)]
    names = [message for message in said if message[4:6] == b"\x07\x00"]
    assert names == [struct.pack("<IHH", nr, 7, 1) + b"org." + b"ab"[nr:][:1] for nr in (0, 1)]
    control.request([struct.pack("<IHH", 0, 6, 1)], [])  # PORT_OPEN
    rig.driver.queues[1].request([b"to the file"], [])
    rig.settle()
    assert (tmp_path / "out").read_bytes() == b"to the file"


def test_packed_queues_are_offered_when_asked_for(boot: Boot) -> None:
    rig = boot("-device", "virtio-rng-{bus},packed=on")
    assert rig.regs.features() >> 34 & 1
    rig = boot("-device", "virtio-rng-{bus}")
    assert not rig.regs.features() >> 34 & 1


def test_persistent_memory(boot: Boot, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(2 << 20))
    rig = boot(
        *("-object", f"memory-backend-file,id=m0,mem-path={image},share=on,size=2M"),
        *("-device", "virtio-pmem-{bus},memdev=m0"),
    )
    rig.driver.start()
    assert rig.regs.device_id() == 27
    assert rig.regs.config(8, 8) == 2 << 20
    assert rig.driver.queues[0].request([struct.pack("<I", 0)], [4]) == (4, bytes(4))


def test_a_disk_that_comes_and_goes(tmp_path: Path) -> None:
    """Its lock goes with it."""
    image = tmp_path / "image"
    image.write_bytes(b"q" * 8192)
    with Qtest("-M", "pc", "-drive", f"if=none,id=d,format=raw,file={image}", qmp=True) as q:
        for _ in range(3):
            assert q.qmp("device_add", driver="virtio-blk-pci", drive="d", id="x", addr="6") == {}
            config = PciConfig(PortBus(q), 6)
            config.w(0x10, 4, 0xE000_0000)
            driver = Driver(PciRegs(MemoryBus(q), config), RemoteMemory(q, RAM))
            driver.start()
            request = [struct.pack("<IIQ", 0, 0, 1)]
            assert driver.queues[0].request(request, [512, 1]) == (513, b"q" * 512 + b"\0")
            with pytest.raises(QtestError, match="already in use"):
                q.qmp("device_add", driver="virtio-blk-pci", drive="d", id="y")
            driver.queues[0].add(request, [512, 1])
            driver.queues[0].kick()
            assert q.qmp("device_del", id="x") == {}
            assert config.r(0, 4) == 0xFFFF_FFFF


def test_com1() -> None:
    args = ("-M", "x86", "-chardev", "ringbuf,id=c0", "-serial", "chardev:c0")
    with Qtest(*args, qmp=True) as q:
        q.command("irq_intercept_in ioapic")
        for byte in b"hello":
            q.port_out(0x3F8, 1, byte)
        assert q.qmp("ringbuf-read", device="c0", size=9) == "hello"
        q.port_out(0x3F9, 1, 2)  # transmitter empty
        q.port_out(0x3FC, 1, 8)
        assert q.levels == {4: 1}
        assert q.port_in(0x3FA, 1) & 0xF == 2
        assert q.levels == {4: 0}
