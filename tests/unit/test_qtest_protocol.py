"""The qtest protocol, QEMU's command line and QMP, without a process around them."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vmm.errors import ConfigError, VmmError
from vmm.qtest import irq
from vmm.qtest.backends import Backends
from vmm.qtest.devices import types
from vmm.qtest.machine import QtestMachine
from vmm.qtest.options import endpoint, pairs, parse
from vmm.qtest.protocol import MAX_DATA, Protocol, Refused, number
from vmm.qtest.qmp import MAX_MESSAGE, QmpError, Session, Splitter

GAP = 0x8000_0000  # neither RAM nor a device


@pytest.fixture
def machine() -> Iterator[QtestMachine]:
    machine = QtestMachine(parse(["-M", "x86", "-m", "16", "-device", "virtio-rng-pci,id=r0"]))
    yield machine
    machine.close()


@pytest.fixture
def talk(machine: QtestMachine) -> Protocol:
    return Protocol(machine)


def one(talk: Protocol, line: str) -> str:
    return talk.answer(line)[-1]


# ---- the protocol


def test_items(talk: Protocol) -> None:
    assert one(talk, "writeq 0x1000 0x1122334455667788") == "OK"
    assert one(talk, "readq 0x1000") == "OK 0x1122334455667788"
    assert one(talk, "readl 4100") == "OK 0x0000000011223344"
    assert one(talk, "readw 010000") == "OK 0x0000000000007788"
    assert one(talk, "readb 0x1007") == "OK 0x0000000000000011"
    assert one(talk, "writeb 0x1000 0x1ff") == "OK"
    assert one(talk, "read 0x1000 0x4") == "OK 0xff776655"
    assert one(talk, "writew 0x1000 -2") == "OK"
    assert one(talk, "read 0x1000 2") == "OK 0xfeff"
    assert one(talk, "endianness") == "OK little"


def test_bulk(talk: Protocol) -> None:
    assert one(talk, "write 0x2000 4 0x0102030405") == "OK"  # more than asked for
    assert one(talk, "write 0x2004 4 0xff") == "OK"  # less: zeros follow
    assert one(talk, "read 0x2000 8") == "OK 0x01020304ff000000"
    assert one(talk, "b64write 0x2000 3 AAEC") == "OK"
    assert one(talk, "b64read 0x2000 4") == "OK AAECBA=="
    assert one(talk, "memset 0x2000 4 0xab") == "OK"
    assert one(talk, "memset 0x2000 0 1") == "OK"
    assert one(talk, "read 0x2000 5") == "OK 0xababababff"


def test_ports_and_registers(talk: Protocol) -> None:
    assert one(talk, "outl 0xcf8 0x80000800") == "OK"
    assert one(talk, "inl 0xcfc") == "OK 0x10441af4"
    assert one(talk, "inw 0xcfe") == "OK 0x1044"
    assert one(talk, "inb 0xcfe") == "OK 0x0044"
    assert one(talk, "read 0xe0008000 8") == "OK 0xf41a441000001000"
    assert one(talk, "read 0xe0008003 3") == "OK 0x100000"
    assert one(talk, f"readl {GAP:#x}") == "OK 0x00000000ffffffff"
    assert one(talk, f"writel {GAP:#x} 1") == "OK"


def test_a_read_across_everything(talk: Protocol) -> None:
    """RAM, then nothing, then a device's registers, in one piece."""
    one(talk, "memset 0xfffffe 2 0x5a")
    assert one(talk, "read 0xfffffe 4") == "OK 0x5a5affff"
    assert one(talk, "write 0xfffffe 4 0x01020304") == "OK"
    assert one(talk, "read 0xfffffe 2") == "OK 0x0102"
    assert one(talk, "read 0xdffffffe 4") == "OK 0xffff361b"
    assert len(one(talk, f"read {GAP:#x} {MAX_DATA}")) == 5 + 2 * MAX_DATA
    assert one(talk, "read 0xfffffffffffffff8 8") == "OK 0xffffffffffffffff"


@pytest.mark.parametrize(
    "line",
    [
        "",
        "  ",
        "bogus 1 2",
        "readl",
        "readl 1 2",
        "writel 0x1000",
        "readl zero",
        "readl 0x",
        "readl 09",
        "readl 1_000",
        "readl 0x10000000000000000",
        "readl 99999999999999999999999999999999999999",
        "outb 0x10000 1",
        "outb -1 1",
        "inq 0x10",
        "read 0x1000 0",
        "read 0x1000 -1",
        f"read 0 {MAX_DATA + 1}",
        "read 0xffffffffffffffff 2",
        "write 0x1000 4 1234",
        "write 0x1000 4 0x123",
        "write 0x1000 4 0xzz",
        "write 0x1000 0 0x",
        "b64write 0x1000 4 AAEC",
        "b64write 0x1000 3 A",
        "b64write 0x1000 3 AAE!",
        "memset 0x1000 0x100000000 0",
        "irq_intercept_in /machine/nowhere",
        "set_irq_in /machine/nowhere n 1 1",
        "clock_step x",
        "clock_set",
        "rtas x 0 0 0 0",
        "readl \udcff",
        "read 0x1000 4\0",
    ],
)
def test_nonsense_fails_and_the_next_line_works(talk: Protocol, line: str) -> None:
    assert one(talk, line).startswith("FAIL ")
    assert one(talk, "readb 0x1000") == "OK 0x0000000000000000"


def test_numbers() -> None:
    assert number("0x10") == number("16") == number("020") == 16
    assert number("-1") == (1 << 64) - 1
    assert number("0") == 0
    for word in ("", "-", "0x", "x", "1.5", "+1", "0b1", "\N{ARABIC-INDIC DIGIT ONE}"):
        with pytest.raises(Refused):
            number(word)


WORDS = st.sampled_from(
    shlex.split(
        "readb readl readq writeb writeq inb inl outb outw outl read write b64read b64write memset "
        "clock_step irq_intercept_in ioapic set_irq_in x 0 1 3 4 0x10 0xcf8 0xcfc 0xcf9 0x80000804 "
        "0xe0008004 0xc0000014 0xfff 0x1000 65536 0xffffffffffffffff 0x0102 AAEC -1 7"
    )
)


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(st.one_of(WORDS, st.text(max_size=8)), max_size=5))
def test_whatever_a_client_sends_is_answered(talk: Protocol, words: list[str]) -> None:
    answer = talk.answer(" ".join(words))
    assert answer[-1].split()[0] in ("OK", "FAIL")
    assert all(line.startswith("IRQ ") for line in answer[:-1])


def test_the_clock(talk: Protocol) -> None:
    assert one(talk, "clock_step 100") == "OK 100"
    assert one(talk, "clock_step") == "OK 100"
    assert one(talk, "clock_set 500") == "OK 500"
    assert one(talk, "clock_set 400") == "OK 500"


def test_the_real_time_clock_by_steps() -> None:
    machine = QtestMachine(parse(["-rtc", "clock=vm"]))
    try:
        talk = Protocol(machine)

        def cmos(index: int) -> int:
            one(talk, f"outb 0x70 {index}")
            return int(one(talk, "inb 0x71").split()[1], 16)

        one(talk, "irq_intercept_in ioapic")
        first = cmos(0)
        assert cmos(0) == first
        one(talk, "clock_step 2000000000")
        assert cmos(0) != first
        assert cmos(0xC) & 0x10
        one(talk, "outb 0x70 0xb")
        one(talk, "outb 0x71 0x12")  # 24h, update-ended interrupt
        assert talk.answer("clock_step") == ["IRQ raise 8", f"OK {machine.clock}"]
        one(talk, "outb 0x70 0xc")
        lines = talk.answer("inb 0x71")
        assert lines[0] == "IRQ lower 8"
        assert int(lines[1].split()[1], 16) & 0x90 == 0x90
    finally:
        machine.close()


def test_pins_are_told_as_they_were() -> None:
    assert irq.changes((0, 0), (1, 1)) == [1]
    assert irq.changes((1, 1), (0, 1)) == [0]
    assert irq.changes((0, 0), (0, 2)) == [1, 0, 1, 0]
    assert irq.changes((1, 1), (1, 2)) == [0, 1]
    assert irq.changes((0, 5), (1, 5)) == [1]
    assert len(irq.changes((0, 0), (0, 1 << 40))) == 2 * irq.MAX_CHANGES


def test_a_pin_driven_from_outside(talk: Protocol) -> None:
    one(talk, "irq_intercept_in /machine/unattached/ioapic")
    assert talk.answer("set_irq_in ioapic unnamed-gpio-in 3 1") == ["IRQ raise 3", "OK"]
    assert talk.answer("set_irq_in ioapic unnamed-gpio-in 3 1") == ["OK"]
    assert talk.answer("set_irq_in ioapic unnamed-gpio-in 3 0") == ["IRQ lower 3", "OK"]
    assert talk.answer("set_irq_in ioapic unnamed-gpio-in 300 1") == ["OK"]


# ---- the command line


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["-machine", "spapr"], "the types are x86, pc"),
        (["-machine", "pc,kernel=x"], "vmm has no property 'kernel'"),
        (["-accel", "kvm"], "only qtest is possible"),
        (["-M", "pc,accel=tcg"], "only qtest is possible"),
        (["-m", "x"], "-m x: "),
        (["-bogus", "1"], "-bogus is not a flag"),
        (["-m"], "-m needs a value"),
        (["-net", "user"], "only 'none' is possible"),
        (["-monitor", "stdio"], "there is only QMP"),
        (["-netdev", "user"], "id=NAME is missing"),
        (["-device", "{nonsense"], "JSON form"),
        (["-device", '{"driver": [1]}'], "a value that no property takes"),
        (["-device", "e1000"], "vmm has no such device"),
        (["-device", "virtio-rng-device"], "no MMIO bus"),
        (["-M", "microvm", "-device", "virtio-rng-pci"], "no PCI bus"),
        (["-device", "virtio-rng-pci,bogus=1"], "has no property 'bogus'"),
        (["-device", "virtio-rng-pci,addr=40"], "must be a slot"),
        (["-device", "virtio-rng-pci,addr=3.1"], "must be a slot"),
        (["-device", "virtio-rng-pci,addr=3", "-device", "virtio-rng-pci,addr=3"], "is taken"),
        (["-device", "virtio-rng-pci,id=a", "-device", "virtio-rng-pci,id=a"], "two are called a"),
        (["-device", "virtio-rng-pci,rng=r"], "no -object of that name"),
        (["-device", "virtio-blk-pci,drive=d"], "no -drive or -blockdev of that name"),
        (["-device", "virtconsole"], "there is no virtio-serial"),
        (["-drive", "file=/x,format=qcow2"], "qcow2 is not a format"),
        (["-drive", "if=ide,file=/x"], "only none and virtio"),
        (["-blockdev", "driver=raw,file=x,node-name=x"], "no node called x"),
        (["-device", "virtio-net-pci,netdev=n"], "no -netdev of that name"),
        (["-netdev", "vde,id=n", "-device", "virtio-net-pci,netdev=n"], "must be user, tap"),
        (
            ["-netdev", "user,id=n,hostfwd=tcp:22", "-device", "virtio-net-pci,netdev=n"],
            "hostfwd=tcp:22 must be",
        ),
        (["-device", "virtio-pmem-pci,memdev=m"], "no -object memory-backend-file"),
        (["-device", "i6300esb,action=dance"], "is not an action"),
        (["-watchdog-action", "dance", "-device", "i6300esb"], "is not an action"),
        (["-M", "pc,x-ram=0:4097"], "must be BASE:SIZE"),
        (["-M", "pc,x-ram=0:0x10000/0x8000:0x10000"], "RAM range 0x8000+0x10000"),
        (["-device", "isa-debug-exit,iosize=0"], "cannot be"),
        (["-device", "isa-debug-exit,iobase=0x70"], "overlaps"),
        (["-M", "q35", "-m", "3G"], "2816M"),
        (["-serial", "vc"], "-serial vc: must be"),
        (["-m", "0"], "RAM must be"),
        (["-m", "1000000000000G"], "RAM must be"),
    ],
)
def test_what_cannot_be(argv: list[str], sentence: str) -> None:
    with pytest.raises(VmmError) as caught:
        QtestMachine(parse(argv)).close()
    assert sentence in str(caught.value)
    assert isinstance(caught.value, ConfigError)


def test_what_qemu_users_write() -> None:
    spec = parse(
        shlex.split(
            "-nodefaults -no-user-config -display none -audio none -vga none -net none "
            "-parallel none -machine pc-q35-7.2,accel=qtest,usb=off -accel qtest -m 0x20 -smp 4 "
            "-cpu max -name x "
            "-object rng-random,id=r,filename=/dev/urandom -device virtio-rng-pci-non-transitional,"
            "rng=r,addr=04.0,bus=pcie.0,disable-legacy=on -device pvpanic "
            "-device isa-debug-exit,iobase=0xf4,iosize=4 -no-reboot -S "
            "-global virtio-mmio.force-legacy=false"
        )
    )
    assert (spec.machine, spec.memory) == ("q35", 32 << 20)
    machine = QtestMachine(spec)
    try:
        talk = Protocol(machine)
        one(talk, "outl 0xcf8 0x80002000")
        assert one(talk, "inl 0xcfc") == "OK 0x10441af4"
        one(talk, "outb 0xf4 3")
        one(talk, "outb 0x505 1")
        assert machine.ends == [("debug-exit", 7), ("panic", 255)]
    finally:
        machine.close()


def test_globals() -> None:
    argv = ["-global", "virtio-rng-pci.packed=on", "-global", "virtio-blk-pci.nonsense=1"]
    machine = QtestMachine(parse([*argv, "-device", "virtio-rng-pci,id=r"]))
    try:
        assert machine.board.virtio[0].packed
    finally:
        machine.close()
    disk = shlex.split("-drive if=none,id=d,file=null-co:// -device virtio-blk-pci,drive=d")
    with pytest.raises(ConfigError, match="no property 'nonsense'"):
        QtestMachine(parse([*argv, *disk]))


def test_nets_in_our_words() -> None:
    backends = Backends(
        parse(
            shlex.split(
                "-netdev user,id=u,hostfwd=tcp::2222-:22 -netdev hubport,id=h,hubid=0 "
                "-netdev user,id=v,hostfwd=udp:127.0.0.2:53-10.0.2.15:5353 "
                "-netdev tap,id=t,ifname=tap0,script=no,downscript=no,vhost=off "
                "-netdev socket,id=s,fd=9 -netdev tap,id=f,fd=10"
            )
        )
    )
    assert {name: backends.net(name) for name in "uvhtsf"} == {
        "u": ["user", "forward=2222:22/tcp"],
        "v": ["user", "forward=127.0.0.2:53:5353/udp"],
        "h": ["none"],
        "t": ["tap", "ifname=tap0", "script=no"],
        "s": ["fd", "fd=9"],
        "f": ["fd", "fd=10"],
    }
    backends.close()


def test_where_protocols_are_spoken() -> None:
    spec = parse(
        shlex.split(
            "-chardev socket,id=c0,path=/a,server=on,wait=off -chardev null,id=c1 "
            "-mon chardev=c0,mode=control"
        )
    )
    for text, expected in {
        "unix:/x": ("unix", "/x", False),
        "unix:/x,,y,server=on,wait=off": ("unix", "/x,y", True),
        "unix:/x,server,nowait": ("unix", "/x", True),
        "tcp:localhost:44": ("tcp", "localhost:44", False),
        "fd:7": ("fd", "7", False),
        "stdio": ("stdio", "", False),
        spec.qmp[0]: ("unix", "/a", True),
    }.items():
        where = endpoint(spec, "-qmp", text)
        assert where is not None
        assert (where.kind, where.address, where.server) == expected
    assert endpoint(spec, "-qmp", "chardev:c1") is None
    assert endpoint(spec, "-qmp", "none") is None
    for text in ("udp:x", "unix:", "chardev:c9", "unix:/x,bogus=1"):
        with pytest.raises(ConfigError):
            endpoint(spec, "-qmp", text)


def test_pairs() -> None:
    assert pairs("-x", "a,b=c,,d,e,nof", "first").pairs == {
        "first": "a",
        "b": "c,d",
        "e": "on",
        "nof": "on",
    }
    assert pairs("-x", "server,nowait").pairs == {"server": "on", "wait": "off"}
    assert pairs("-x", '{"a": {"b": 1, "c": true}}').pairs == {"a.b": "1", "a.c": "on"}


# ---- QMP


class Client:
    """A session without a socket."""

    def __init__(self, machine: QtestMachine) -> None:
        self.events: list[dict[str, Any]] = []
        self.status: int | None = None
        self.session = Session(machine, self.events.append, self.end)
        self.data = bytearray()

    def end(self, status: int) -> None:
        self.status = status

    def say(self, text: bytes) -> list[dict[str, Any]]:
        self.data += text
        found = []
        while (answer := self.session.take(self.data)) is not None:
            if answer:
                found.append(json.loads(answer))
        return found

    def run(self, execute: str, **arguments: Any) -> Any:
        text = json.dumps({"execute": execute, "arguments": arguments})
        (answer,) = self.say(text.encode())
        return answer.get("return", answer.get("error"))


@pytest.fixture
def client(machine: QtestMachine) -> Client:
    client = Client(machine)
    assert json.loads(client.session.greet())["QMP"]["capabilities"] == []
    assert client.run("query-version")["class"] == "CommandNotFound"
    assert client.run("qmp_capabilities") == {}
    assert client.run("qmp_capabilities")["class"] == "CommandNotFound"
    return client


def test_qmp_asks(client: Client) -> None:
    assert set(client.run("query-version")) == {"qemu", "package"}
    names = {m["name"] for m in client.run("query-machines")}
    assert names == {"x86", "pc", "q35", "microvm", "virt", "none"}
    assert {"name": "device_add"} in client.run("query-commands")
    assert client.run("query-name") == {"name": "vmm"}
    assert client.run("query-status") == {"status": "running", "running": True}
    assert client.run("stop") == client.run("stop") == {}
    assert client.run("query-status") == {"status": "paused", "running": False}
    assert client.run("cont") == {}
    assert [e["event"] for e in client.events] == ["STOP", "RESUME"]


def test_qmp_types(client: Client) -> None:
    every = {t["name"] for t in client.run("qom-list-types")}
    assert {"virtio-blk-pci", "virtio-blk-device", "isa-debug-exit", "virtconsole"} <= every
    assert every == {name for name, _ in types()}
    pci = {t["name"] for t in client.run("qom-list-types", implements="virtio-pci")}
    assert "virtio-rng-pci" in pci
    assert "virtio-rng-device" not in pci
    abstract = client.run("qom-list-types", implements="device", abstract=True)
    assert {"name": "device", "parent": "object"} in abstract
    assert every <= {t["name"] for t in abstract}
    assert client.run("qom-list-types", implements="nothing") == []
    assert client.run("qom-list", path="/machine/peripheral") == [
        {"name": "r0", "type": "child<virtio-rng-pci>"}
    ]
    assert client.run("qom-list", path="/machine/x")["class"] == "DeviceNotFound"


def test_qmp_plugs(client: Client, talk: Protocol) -> None:
    assert client.run("device_add", driver="virtio-rng-pci", id="n", addr="7") == {}
    one(talk, "outl 0xcf8 0x80003800")
    assert one(talk, "inl 0xcfc") == "OK 0x10441af4"
    for arguments, what in (
        ({"driver": "virtio-rng-pci", "id": "n"}, "Duplicate"),
        ({"driver": "virtio-rng-pci", "addr": "7"}, "is taken"),
        ({"driver": "e1000"}, "no such device"),
        ({"id": "x"}, "'driver' is missing"),
        ({"driver": "virtio-rng-pci", "addr": [1]}, "no property takes"),
    ):
        assert what in client.run("device_add", **arguments)["desc"]
    assert client.run("device_del", id="n") == {}
    assert client.events[-1]["data"] == {"device": "n", "path": "/machine/peripheral/n"}
    assert one(talk, "inl 0xcfc") == "OK 0xffffffff"
    assert client.run("device_del", id="n")["class"] == "DeviceNotFound"
    files = len(os.listdir("/proc/self/fd"))
    for _ in range(100):
        assert client.run("device_add", driver="virtio-rng-pci", id="n") == {}
        assert client.run("device_del", id="n") == {}
    assert len(os.listdir("/proc/self/fd")) == files


def test_qmp_resets(client: Client, talk: Protocol) -> None:
    one(talk, "outl 0xcf8 0x80000804")
    one(talk, "outl 0xcfc 0x6")
    one(talk, "writeb 0xc0000014 3")
    assert one(talk, "readb 0xc0000014") == "OK 0x0000000000000003"
    assert client.run("system_reset") == {}
    assert client.events[-1]["event"] == "RESET"
    one(talk, "outl 0xcf8 0x80000804")
    assert one(talk, "inw 0xcfc") == "OK 0x0000"
    one(talk, "outl 0xcfc 0x6")
    assert one(talk, "readb 0xc0000014") == "OK 0x0000000000000000"
    one(talk, "outw 0x602 0x100")
    one(talk, "irq_intercept_in ioapic")
    assert client.run("system_powerdown") == {}
    assert talk.answer("inb 0x600") == ["IRQ raise 9", "OK 0x0000"]


def test_qmp_ends(client: Client) -> None:
    (answer,) = client.say(b'{"execute": "quit", "id": [1, "a"]}')
    assert answer == {"return": {}, "id": [1, "a"]}
    assert client.status == 0
    assert client.events[-1]["event"] == "SHUTDOWN"


@pytest.mark.parametrize(
    "text",
    [
        b"nonsense\n",
        b"{]",
        b"}",
        b"[1]",
        b'{"execute": 1}',
        b'{"arguments": {}}',
        b'{"execute": "stop", "bogus": 1}',
        b'{"execute": "stop", "arguments": 3}',
        b'{"execute": "bogus"}',
        b'{"execute": "device_del"}',
        b'{"execute": "block_resize", "arguments": {"device": "x", "size": 1}}',
        b'{"execute": "block_resize", "arguments": {"device": "x", "size": true}}',
        b'{"execute": "ringbuf-read", "arguments": {"device": "x"}}',
        b"{" * 1000 + b"}" * 1000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"\xff": 1}',
        b'{"execute": "query-status", "id": ' + b"9" * 10_000 + b"}",
    ],
)
def test_qmp_nonsense(client: Client, text: bytes) -> None:
    (answer,) = client.say(text)
    assert set(answer) - {"id"} == {"error"}
    assert client.run("query-name") == {"name": "vmm"}


def test_json_in_pieces_and_in_heaps() -> None:
    split = Splitter()
    data = bytearray()
    for byte in b'  {"a": "}\\"{"}':
        assert split.take(data) is None
        data.append(byte)
    assert json.loads(split.take(data) or b"") == {"a": '}"{'}
    data += b'{"a": 1}{"b": [{}]}\n{"c"'
    assert split.take(data) == b'{"a": 1}'
    assert split.take(data) == b'{"b": [{}]}'
    assert split.take(data) == b"\n"
    assert split.take(data) is None
    data += b": 3}"
    assert split.take(data) == b'{"c": 3}'


def test_a_command_without_end() -> None:
    split = Splitter()
    data = bytearray(b'{"' + b"x" * MAX_MESSAGE)
    with pytest.raises(QmpError, match="longer than"):
        split.take(data)
    assert not data
    data += b"{}"
    assert split.take(data) == b"{}"
