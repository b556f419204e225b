"""Random accesses to every register a guest can reach, in random order: nothing raises, the device
is started and stopped in turn, whatever it is started with is sound, and it can be used after."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.virtio_mock import FakeIoEventFd, Rig, ToyDevice
from vmm.devices.virtio.transport import QueueConfig, QueueIrqs
from vmm.memory import GuestMemory

RAM = 1 << 20

# What makes things happen, beside noise.
VALUES = st.one_of(
    st.sampled_from([0, 1, 2, 3, 4, 7, 8, 0xB, 0xF, 0xF, 0xF, 0x10, 0x20, 0x40, 0x80, 0xFF]),
    st.sampled_from([0x400, 0x406, 0x1000, 0x4000, 0x8000, 0xC000, 0xFFFF, RAM - 16, RAM]),
    st.sampled_from([0x8000_0000, 0xC000_0000, 0xC000_8000, 0xCFFF_F000, 0xE000_0000]),
    st.sampled_from([0xFEB0_0000, 0xFEE0_0000, 0xFFFF_FFFF]),
    st.integers(0, (1 << 64) - 1),
)
SIZES = st.sampled_from([1, 2, 4, 4, 4, 8])
COMMON = st.sampled_from([0, 4, 8, 12, 16, 18, 20, 20, 20, 22, 24, 26, 28, 28, 32, 40, 48])
BAR = st.one_of(
    COMMON,
    st.integers(0, 0x40),
    st.sampled_from([0x1000, 0x2000, 0x2003, 0x2FFF, 0x3000, 0x3004, 0x3008, 0x3FFC, 0x7FF8]),
    st.integers(0x4000, 0x4040),
    st.integers(0x5000, 0x5010),
    st.integers(0, 0x7FF8),
)
MMIO = st.one_of(
    st.sampled_from([0x14, 0x20, 0x24, 0x30, 0x38, 0x44, 0x50, 0x64, 0x70, 0x70, 0x70, 0x80, 0x84]),
    st.sampled_from([0x90, 0xA0, 0xC0, 0xFC, 0x100, 0x104]),
    st.integers(0, 0xFF8),
)
CONFIG = st.one_of(
    st.sampled_from([4, 4, 4, 0x10, 0x10, 0x14, 0x3C, 0x40, 0x42, 0x42]), st.integers(0, 255)
)


class Checked(ToyDevice):
    """Judges what it is started with."""

    def activate(self, features: int, queues: list[QueueConfig | None], irqs: QueueIrqs) -> None:
        super().activate(features, queues, irqs)
        assert features & ~(1 << 32 | 1 << 5) == 0
        assert features & 1 << 32
        for queue, most in zip(queues, self.QUEUE_SIZES, strict=True):
            if queue is not None:
                assert queue.size.bit_count() == 1
                assert queue.size <= most
                assert queue.desc % 16 == queue.driver % 2 == queue.device % 4 == 0
                assert queue.desc + 16 * queue.size <= RAM
                assert queue.driver + 6 + 2 * queue.size <= RAM
                assert queue.device + 6 + 8 * queue.size <= RAM


def usable_after(rig: Rig, toy: Checked) -> None:
    rig.reset()
    if rig.host is not None:
        rig.pci.pci.w(4, 2, 6)
    rig.driver.next = 0x1_0000
    rig.driver.start()
    assert len(rig.driver.queues) == 2
    toy.kicked(0)
    rig.driver.queues[0].kick()
    assert toy.kicked(0) == 1
    rig.close()
    rig.memory.close()


def access(rig: Rig, addr: int, size: int, value: int | None) -> None:
    if value is None:
        assert 0 <= rig.bus.read(addr, size) < 1 << (8 * size)
    else:
        rig.bus.write(addr, size, value & ((1 << (8 * size)) - 1))


def act(rig: Rig, toy: Checked, action: str) -> None:
    """One step of a correct driver or device, whatever state the noise has left behind."""
    regs = rig.regs
    if action == "negotiate":
        regs.status = 0
        regs.status = 3
        regs.accept(1 << 32)
        regs.status = 0xB
    elif action == "queues":
        for queue in (0, 1):
            regs.set_queue(queue, 16, 0x1000, 0x2000, 0x3000)
            regs.enable(queue)
    elif action == "run":
        regs.status = regs.status | 0xF
    elif action == "reset":
        regs.status = 0
        if regs.status == 0:  # not when its BAR was moved away
            assert toy.irqs is None
    elif action == "vectors" and rig.host is not None:
        rig.pci.msix_control(0x8000)
        for vector in range(3):
            rig.pci.msix_entry(vector, 0xFEE0_0000, vector)
            rig.pci.vector(vector - 1, vector)
    elif action == "decode" and rig.host is not None:
        rig.pci.pci.w(0x10, 4, rig.WINDOW[0])
        rig.pci.pci.w(4, 2, 6)
    elif toy.irqs is not None:
        if action == "interrupt":
            toy.irqs.notify(0)
        elif action == "change":
            toy.irqs.config_changed()
        elif action == "fail":
            toy.irqs.fail()


ACTIONS = st.one_of(
    st.sampled_from(["negotiate", "queues", "run", "queues", "run", "reset"]),
    st.sampled_from(["vectors", "decode", "interrupt", "change", "fail"]),
)
READY = st.sampled_from(
    [[], ["negotiate"], ["negotiate", "queues"], ["negotiate", "queues", "run"]]
)
STEP = st.tuples(SIZES, st.one_of(st.none(), VALUES, VALUES, VALUES))
DO = st.tuples(st.just("do"), ACTIONS)


def at(where: str, offsets: st.SearchStrategy[int]) -> st.SearchStrategy[tuple[str, int]]:
    return st.tuples(st.just(where), offsets)


@settings(max_examples=300, deadline=None)
@given(READY, st.lists(st.tuples(st.one_of(DO, at("mmio", MMIO), at("mmio", MMIO)), STEP)))
def test_mmio(
    ready: list[str], steps: list[tuple[tuple[str, int | str], tuple[int, int | None]]]
) -> None:
    toy = Checked()
    rig = Rig("mmio", toy, GuestMemory([(0, RAM)]), io=FakeIoEventFd())  # type: ignore[arg-type]
    for action in ready:
        act(rig, toy, action)
    for (_, what), (size, value) in steps:
        if isinstance(what, str):
            act(rig, toy, what)
        else:
            access(rig, rig.MMIO + what, size, value)
    usable_after(rig, toy)


PCI_STEP = st.one_of(
    DO, at("bar", BAR), at("bar", BAR), at("config", CONFIG), at("port", st.integers(0, 7))
)


@settings(max_examples=300, deadline=None)
@given(READY, st.lists(st.tuples(PCI_STEP, STEP)))
def test_pci(
    ready: list[str], steps: list[tuple[tuple[str, int | str], tuple[int, int | None]]]
) -> None:
    toy = Checked()
    rig = Rig("pci", toy, GuestMemory([(0, RAM)]), io=FakeIoEventFd())  # type: ignore[arg-type]
    assert rig.host is not None
    ecam = 0xE000_0000
    rig.bus.insert(ecam, 1 << 20, rig.host.ecam)
    for action in ready:
        act(rig, toy, action)
    for (where, what), (size, value) in steps:
        if isinstance(what, str):
            act(rig, toy, what)
        elif where == "port" and value is None:
            rig.pio.read(0xCF8 + what, size)
        elif where == "port":
            rig.pio.write(0xCF8 + what, size, (value or 0) & ((1 << (8 * size)) - 1))
        elif where == "config":
            access(rig, ecam + (rig.slot << 15) + what, size, value)
        else:
            access(rig, rig.pci.pci.bar(0) + what, size, value)
        for base, length, device in rig.bus.ranges():
            if device is not rig.host.ecam:
                assert rig.WINDOW[0] <= base
                assert base + length <= sum(rig.WINDOW)
    usable_after(rig, toy)
