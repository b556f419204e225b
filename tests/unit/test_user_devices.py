"""Devices that users write: their bases, their place on the board, the examples."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import vmm
from tests.support.waiting import wait_for
from tests.virtio_mock import RING_RESET
from tests.virtio_rig import TRANSPORTS, Rig
from vmm import MachineConfig, catalog
from vmm.arch.x86_64 import acpi, layout, platform
from vmm.board import Board
from vmm.devices.virtio.python import BUDGET
from vmm.errors import ConfigError
from vmm.irq import IrqChip
from vmm.memory import GuestMemory

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "devices"
EXAMPLE = {"adder": "Adder", "alarm": "Alarm", "shout": "Shout"}


def example(name: str, cls: str) -> Any:
    return catalog.parse(f"{EXAMPLES}/{name}.py:{cls}").cls


@pytest.fixture
def build() -> Iterator[Callable[..., Board]]:
    """A whole board without KVM, around some devices."""
    made: list[tuple[Board, GuestMemory]] = []

    def run(*devices: Any, **options: Any) -> Board:
        memory = GuestMemory(layout.ram_ranges(8 << 20))
        config = MachineConfig(devices=list(devices), **options)
        board = Board(config, memory, IrqChip())
        made.append((board, memory))
        platform.build(board)
        return board

    yield run
    for board, memory in made:
        board.close()
        board.free()
        memory.close()


class Lamp(vmm.PioDevice):
    PORT, SIZE = 0x600, 2
    colour = 3

    def read(self, offset: int, size: int) -> int:
        return self.colour

    def write(self, offset: int, size: int, value: int) -> None:
        self.colour = value


class Bell(vmm.MmioDevice):
    SIZE, HID = 0x30, "VMMX0009"

    def write(self, offset: int, size: int, value: int) -> None:
        self.irq.set(bool(value))


# ---- ports and memory ---------------------------------------------------------------------------


def test_ports_reach_the_device_and_are_cut_to_size(build: Callable[..., Board]) -> None:
    lamp = type("Lamp", (Lamp,), {"PORT": 0x520})()
    board = build(lamp)
    assert lamp.name == "lamp0"
    board.pio.write(0x520, 2, 0x1234)
    assert board.pio.read(0x521, 1) == 0x34
    assert board.pio.read(0x520, 2) == 0x1234
    assert board.pio.read(0x521, 2) == 0xFFFF, "an access that reaches past it is nobody's"


@pytest.mark.parametrize(
    ("port", "transport", "said"),
    [
        (0x60, "pci", r"lamp0 at 0x60\+0x2 overlaps i8042"),
        (0xCFC, "pci", "lamp0 at 0xcfc"),
        (0xCF9, "mmio", "lamp0 at 0xcf9"),
        (0x600, "mmio", "acpi-pm"),
        (-1, "mmio", "are not on the pio bus"),
        (0xFFFF, "mmio", "are not on the pio bus"),
    ],
)
def test_a_port_that_is_not_free(
    build: Callable[..., Board], port: int, transport: str, said: str
) -> None:
    lamp = type("Lamp", (Lamp,), {"PORT": port})()
    with pytest.raises(ConfigError, match=said) as e:
        build(lamp, transport=transport)
    assert "\n" not in str(e.value)


def test_one_port_for_two(build: Callable[..., Board]) -> None:
    lamp = type("Lamp", (Lamp,), {"PORT": 0x520})
    with pytest.raises(ConfigError, match=r"lamp1 at 0x520\+0x2 overlaps lamp0"):
        build(lamp(), lamp())


@pytest.mark.parametrize(("transport", "gsi"), [("pci", 5), ("mmio", 20)])
def test_registers_have_a_place_and_a_line(
    build: Callable[..., Board], transport: str, gsi: int
) -> None:
    first, second = Bell(), Bell()
    board = build(first, second, transport=transport)
    assert (first.base, second.base) == (layout.USER_MMIO, layout.USER_MMIO + 0x1000)
    assert board.wired["bell0"] == gsi != board.wired["bell1"]
    board.mmio.write(first.base, 4, 1)
    assert (first.irq.level, second.irq.level) == (True, False)
    first.reset()
    assert not first.irq.level
    assert first.irq.count == 1


def test_more_devices_than_lines(build: Callable[..., Board]) -> None:
    """The first and the last share one, which is up while either is."""
    bells = [Bell() for _ in range(5)]
    board = build(*bells, transport="mmio")
    assert board.wired["bell4"] == board.wired["bell0"]
    line = board._lines[board.wired["bell0"]]
    bells[0].irq.set(True)
    bells[4].irq.set(True)
    bells[0].irq.set(False)
    assert line.level
    bells[4].irq.set(False)
    assert not line.level


def test_the_guest_is_told(build: Callable[..., Board]) -> None:
    lamp = type("Lamp", (Lamp,), {"PORT": 0x520, "HID": "VMM0010", "SIZE": 200})()
    board = build(Bell(), lamp)
    aml = acpi.dsdt(platform.hardware(board, [0]))
    assert b"VMMX0009\0" in aml
    assert b"VMM0010\0" in aml
    assert layout.USER_MMIO.to_bytes(4, "little") + (0x30).to_bytes(4, "little") in aml
    # Extended Interrupt: consumer, level, active-high, exclusive, GSI 5.
    assert bytes([0x89, 6, 0, 1, 1, 5, 0, 0, 0]) in aml
    # The ports in two descriptors.
    assert bytes([0x47, 1, 0x20, 5, 0x20, 5, 1, 128]) in aml
    assert bytes([0x47, 1, 0xA0, 5, 0xA0, 5, 1, 72]) in aml
    assert platform.interrupts(board)["bell0"] == "GSI 5"


@pytest.mark.parametrize("hid", ["x", "vmm00001", "VMM-0001", "VMM000001"])
def test_a_name_that_acpi_does_not_know(build: Callable[..., Board], hid: str) -> None:
    with pytest.raises(ConfigError, match="capitals and digits"):
        build(type("Bell", (Bell,), {"HID": hid})())


def test_a_place_of_ones_own_choice(build: Callable[..., Board]) -> None:
    fixed = type("Bell", (Bell,), {"BASE": 0xFD00_0000})()
    build(fixed).mmio.write(0xFD00_002C, 4, 1)
    assert fixed.irq.level
    with pytest.raises(ConfigError, match="there is RAM at 0x1000"):
        build(type("Bell", (Bell,), {"BASE": 0x1000})())
    with pytest.raises(ConfigError, match="overlaps"):
        build(type("Bell", (Bell,), {"BASE": layout.ECAM})())


def test_no_room_is_left(build: Callable[..., Board]) -> None:
    large = type("Bell", (Bell,), {"SIZE": layout.USER_MMIO_SIZE // 2 + 1})
    build(large())
    with pytest.raises(ConfigError, match="no room for a device"):
        build(large(), large())


def test_an_interrupt_outlives_the_machine(build: Callable[..., Board]) -> None:
    """A thread of the device's own may come late."""
    bell = Bell()
    board = build(bell)
    board.close()
    bell.irq.set(True)
    assert (bell.irq.level, bell.irq.count) == (False, 0)


def test_names(build: Callable[..., Board]) -> None:
    own = Bell()
    own.name = "bell"
    again = Bell()
    again.name = "bell"
    with pytest.raises(ConfigError, match="Two devices are called bell"):
        build(own, again)


def test_an_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that offers a device is named like vmm's own."""
    info = tmp_path / "lamps-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lamps\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[vmm.devices]\nlamp = lamps_pkg:Lamp\n")
    (tmp_path / "lamps_pkg.py").write_text(
        "import vmm\nclass Lamp(vmm.PioDevice):\n PORT = 0x520\n"
        " OPTIONS = (vmm.Field('colour', 'of it'),)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    spec = catalog.parse("lamp,colour=red")
    assert (spec.cls.__name__, spec.options.colour) == ("Lamp", "red")
    sys.modules.pop("lamps_pkg")


# ---- the examples -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXAMPLE)
def test_examples_are_short(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 40


def test_adder(build: Callable[..., Board]) -> None:
    board = build(f"{EXAMPLES}/adder.py:Adder,start=40")
    board.pio.write(0x520, 1, 2)
    assert board.pio.read(0x520, 4) == 42
    board.pio.write(0x521, 1, 0)
    assert board.pio.read(0x520, 1) == 0


def test_alarm(build: Callable[..., Board]) -> None:
    board = build(f"{EXAMPLES}/alarm.py:Alarm")
    alarm: Any = board.find("alarm0")
    board.mmio.write(alarm.base, 8, 0xFFFF_FFFF_FFFF_0001)
    wait_for(lambda: alarm.irq.level)
    assert board.mmio.read(alarm.base, 4) == 1
    board.mmio.write(alarm.base + 4, 4, 1)
    assert not alarm.irq.level


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_shout(transport: str) -> None:
    rig = Rig(example("shout", "Shout")(), transport)
    rig.driver.start()
    to_guest, from_guest = rig.driver.queues[0], rig.driver.queues[1]
    for _ in range(3):
        to_guest.add([], [4])
    to_guest.kick()
    rig.until(lambda: len(vars(rig.device)["rooms"]) == 3, "room for three answers")
    assert from_guest.request([b"hello"], []) == (0, b"")
    assert to_guest.wait()[1:] == (4, b"HELL")
    assert to_guest.wait()[1:] == (1, b"O")
    rig.driver.reset()
    assert not vars(rig.device)["rooms"]
    rig.close()


def test_the_template(build: Callable[..., Board]) -> None:
    kinds = [f"{EXAMPLES}/template.py:{cls}" for cls in ("Ports,level=3", "Registers", "Queues")]
    board = build(*kinds)
    assert board.pio.read(0x530, 1) == 3
    registers: Any = board.find("registers0")
    board.mmio.write(registers.base, 4, 1)
    assert board.mmio.read(registers.base, 4) == 1
    assert [d.name for d in board.virtio if d.name.startswith("queues")] == ["queues0"]


def test_the_templates_virtio_device() -> None:
    rig = Rig(example("template", "Queues")(), "mmio")
    rig.driver.start()
    assert rig.driver.queues[0].request([], [300]) == (300, bytes(range(256)) + bytes(44))
    rig.driver.queues[0].add([b"for you"], [])
    rig.driver.queues[0].kick()
    rig.until_broken()
    assert "lacks what every request" in rig.device.faults()[0]
    rig.close()


# ---- virtio -------------------------------------------------------------------------------------


class Echo(vmm.PythonVirtioDevice):
    """Answers with what it got; 'keep' is kept, 'fail' fails, 'bad' is refused."""

    DEVICE_ID = 4
    QUEUE_SIZES = (16, 64)
    LIMIT = 4096

    def __init__(self) -> None:
        super().__init__()
        self.config[:] = bytes(8)
        self.kept: list[vmm.VirtioRequest] = []
        self.threads: set[str] = set()
        self.voids = 0

    def device_features(self) -> int:
        return 1 << 3

    def handle(self, request: vmm.VirtioRequest) -> None:
        self.threads.add(threading.current_thread().name)
        text = request.read()
        if text == b"keep":
            request.keep()
            self.kept.append(request)
        elif text == b"fail":
            raise ZeroDivisionError("the device's own fault")
        elif text == b"bad":
            request.refuse()
        else:
            request.write(text[:2])
            request.write(text[2:])

    def stopped(self) -> None:
        self.voids += len(self.kept)


@pytest.fixture(params=[(t, packed) for t in TRANSPORTS for packed in (False, True)])
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    transport, packed = request.param
    rig = Rig(Echo(), transport, packed=packed)
    yield rig
    rig.close()


def echo(rig: Rig) -> Echo:
    assert isinstance(rig.device, Echo)
    return rig.device


def test_requests_are_answered_on_a_thread_of_its_own(rig: Rig) -> None:
    assert rig.driver.start() >> 3 & 1
    assert echo(rig).features >> 3 & 1
    for queue in rig.driver.queues.values():
        assert queue.request([b"he", b"llo"], [3, 100]) == (5, b"hello")
    assert echo(rig).threads == {"vmm-device"}
    rig.driver.reset()
    assert "vmm-device" not in {t.name for t in threading.enumerate()}


def test_a_queue_that_is_not_there(rig: Rig) -> None:
    rig.driver.start(1)
    assert rig.driver.queues[0].request([b"alone"], [9]) == (5, b"alone")


def test_an_answer_is_no_longer_than_its_room(rig: Rig) -> None:
    rig.driver.start()
    assert rig.driver.queues[0].request([b"hello"], [3]) == (3, b"hel")
    assert rig.driver.queues[0].request([b"hello"], []) == (0, b"")


def test_no_more_is_read_than_the_limit(rig: Rig) -> None:
    rig.driver.start()
    length, data = rig.driver.queues[0].request([b"x" * 3000] * 2, [8000])
    assert (length, data) == (4096, b"x" * 4096)


def test_a_request_that_is_kept(rig: Rig) -> None:
    """It is done from another thread, once, in whatever order."""
    rig.driver.start()
    queue = rig.driver.queues[0]
    head = queue.add([b"keep"], [8])
    queue.kick()
    assert queue.request([b"later"], [5])[1] == b"later"
    (kept,) = echo(rig).kept
    before = kept.write(b"now")
    kept.done()
    assert (before, queue.wait()[::2]) == (3, (head, b"now"))
    kept.done()
    assert kept.write(b"too late") == 0
    assert queue.request([b"on"], [5])[1] == b"on"


def test_a_reset_makes_requests_void(rig: Rig) -> None:
    rig.driver.start()
    queue = rig.driver.queues[0]
    queue.add([b"keep"], [8])
    queue.kick()
    rig.until(lambda: len(echo(rig).kept) == 1, "the request")
    rig.driver.reset()
    assert echo(rig).voids == 1
    rig.memory.write(0, bytes(rig.memory.ranges[0].size))
    (kept,) = echo(rig).kept
    assert (kept.write(b"x"), kept.read()) == (0, b"")
    kept.done()
    kept.refuse()
    assert not any(rig.memory.read(0, rig.memory.ranges[0].size))
    rig.driver.start()
    assert rig.driver.queues[0].request([b"again"], [5])[1] == b"again"


def test_resets_while_another_thread_answers(rig: Rig) -> None:
    """After a reset nothing is written any more, whoever is at it."""
    kept, over = echo(rig).kept, threading.Event()

    def answer() -> None:
        while not over.is_set():
            for request in list(kept):
                request.write(b"late")
                request.done()

    other = threading.Thread(target=answer)
    other.start()
    size = rig.memory.ranges[0].size
    try:
        for _ in range(30):
            rig.driver.next = 0x1_0000
            rig.driver.start()
            queue = rig.driver.queues[0]
            for _ in range(8):
                queue.add([b"keep"], [8])
                queue.kick()
            queue.wait()
            rig.driver.reset()
            rig.memory.write(0, bytes(size))
            assert not any(rig.memory.read(0x1_0000, 0x8000))
            kept.clear()
    finally:
        over.set()
        other.join()
    assert not any(rig.memory.read(0, size))


def test_one_queue_is_reset(rig: Rig) -> None:
    """What is kept of it is void, the other goes on. virtio-v1.3 §2.6.1."""
    assert rig.driver.start() & RING_RESET
    first, second = rig.driver.queues[0], rig.driver.queues[1]
    for queue in (first, second):
        queue.add([b"keep"], [8])
        queue.kick()
    rig.until(lambda: len(echo(rig).kept) == 2, "the requests")
    assert rig.regs.reset_queue(0)
    for request in echo(rig).kept:
        request.write(b"x")
        request.done()
    assert second.wait()[2] == b"x"
    assert first.take() is None
    again = rig.driver.setup_queue(0)
    assert again.request([b"again"], [5])[1] == b"again"
    assert second.request([b"still"], [5])[1] == b"still"


def test_a_request_that_is_refused(rig: Rig) -> None:
    rig.driver.start()
    rig.driver.queues[1].add([b"bad"], [8])
    rig.driver.queues[1].kick()
    rig.until_broken()
    assert "broke queue 1" in echo(rig).faults()[0]
    rig.driver.reset()
    rig.driver.start()
    assert rig.driver.queues[1].request([b"well"], [5])[1] == b"well"


def test_a_queue_that_is_broken(rig: Rig) -> None:
    """What Python's walk of the queue refuses is told as C's is."""
    rig.driver.start()
    rig.driver.queues[0].offer(999)
    rig.driver.queues[0].kick()
    rig.until_broken()
    assert "not below the queue's size" in echo(rig).faults()[0]


def test_an_exception_goes_to_the_machine(rig: Rig) -> None:
    told: list[BaseException] = []
    board = type("Told", (), {"virtio": [], "on_error": staticmethod(told.append)})()
    echo(rig).plug(board)
    rig.driver.start()
    rig.driver.queues[0].add([b"fail"], [8])
    rig.driver.queues[0].kick()
    rig.until_broken()
    rig.until(lambda: bool(told), "the exception")
    assert isinstance(told[0], ZeroDivisionError)
    with pytest.raises(ConfigError, match="was in another machine"):
        echo(rig).plug(board)


def test_configuration_that_changes(rig: Rig) -> None:
    device = echo(rig)
    device.config[0] = 7
    device.config_changed()  # before any driver
    rig.driver.start()
    assert rig.regs.config(0, 1) == 7
    rig.regs.interrupts()
    device.config[0] = 8
    device.config_changed()
    assert rig.regs.config(0, 1) == 8
    assert rig.regs.interrupts() & 2


def test_a_flood_does_not_starve_the_other_queue(rig: Rig) -> None:
    """More than a turn's worth in one queue, and stop while it is at it."""
    rig.driver.start()
    busy = rig.driver.queues[1]
    for _ in range(BUDGET // 64 + 1):
        heads = [busy.add([b"n"], [1]) for _ in range(32)]
        busy.kick()
        assert sorted(busy.wait()[0] for _ in heads) == sorted(heads)
    assert rig.driver.queues[0].request([b"me too"], [9])[1] == b"me too"
    for _ in range(32):
        busy.add([b"n"], [1])
    busy.kick()
    rig.driver.reset()


def test_a_driver_that_never_came(rig: Rig) -> None:
    assert (
        rig.device.unclaimed()
        == "the guest never used device; its kernel may have no driver for it"
    )
