"""The small fixed devices of a PC, and those that payload guests know from QEMU."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.bus import Bus
from vmm.device import Device
from vmm.devices.debugexit import DebugExit
from vmm.devices.fwcfg import FwCfg
from vmm.devices.i8042 import I8042
from vmm.devices.port80 import Port80, Sink
from vmm.devices.pvpanic import PvPanic
from vmm.devices.rtc import Rtc
from vmm.devices.testdev import TestDev
from vmm.irq import IrqLine, NullIrqChip


@pytest.fixture
def pio() -> Bus:
    return Bus("pio", 1 << 16)


@pytest.fixture
def resets() -> list[str]:
    return []


@pytest.fixture
def kbc(pio: Bus, resets: list[str]) -> I8042:
    dev = I8042(lambda: resets.append("reset"))
    dev.place(pio)
    return dev


# ---- i8042 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("pulse", [0xFE, 0xF0, 0xFC])
def test_reset_by_pulse(pio: Bus, kbc: I8042, resets: list[str], pulse: int) -> None:
    assert pio.read(0x64, 1) & 2 == 0  # kb_wait() does not wait
    pio.write(0x64, 1, pulse)
    assert resets == ["reset"]


def test_what_does_not_reset(pio: Bus, kbc: I8042, resets: list[str]) -> None:
    pio.write(0x64, 1, 0xFF)
    pio.write(0x64, 1, 0xD1)
    pio.write(0x60, 1, 0xDF)
    pio.write(0x92, 1, 0x02)
    pio.write(0x60, 1, 0xFE)
    assert resets == []


def test_reset_by_output_port_and_port_92(pio: Bus, kbc: I8042, resets: list[str]) -> None:
    pio.write(0x64, 1, 0xD1)
    pio.write(0x60, 1, 0x02)
    pio.write(0x92, 1, 0x01)
    assert resets == ["reset", "reset"]


def test_a20(pio: Bus, kbc: I8042) -> None:
    assert pio.read(0x92, 1) == 2
    pio.write(0x64, 1, 0xDD)
    assert pio.read(0x92, 1) == 0
    pio.write(0x64, 1, 0xD1)
    pio.write(0x60, 1, 0x03)
    assert pio.read(0x92, 1) == 2
    pio.write(0x64, 1, 0xD0)
    assert pio.read(0x60, 1) & 3 == 3


def test_linux_probe_finds_a_controller_and_nothing_on_it(pio: Bus, kbc: I8042) -> None:
    def command(code: int) -> int:
        pio.write(0x64, 1, code)
        assert pio.read(0x64, 1) & 1, "a driver would wait for its timeout"
        value = pio.read(0x60, 1)
        assert pio.read(0x64, 1) & 1 == 0
        return value

    assert pio.read(0x64, 1) & 1 == 0  # i8042_flush(): nothing to flush
    ctr = command(0x20)
    pio.write(0x64, 1, 0x60)
    pio.write(0x60, 1, ctr & ~1 | 0x10)
    assert command(0x20) == ctr & ~1 | 0x10
    assert command(0xAA) == 0x55
    pio.write(0x64, 1, 0xD3)  # the loop of the mouse port does not come back as the mouse's
    pio.write(0x60, 1, 0x5A)
    assert pio.read(0x64, 1) & 0x21 == 0x01
    pio.read(0x60, 1)
    assert command(0xA9) not in (0x00, 0xFA, 0xFF)
    assert command(0xAB) == 0x00
    pio.write(0x60, 1, 0xF2)  # identify: the controller's own timeout answers
    assert pio.read(0x64, 1) & 0x41 == 0x41
    assert pio.read(0x60, 1) == 0xFE


def test_keyboard_interrupt_line() -> None:
    irq = NullIrqChip().line(1)
    dev = I8042(lambda: None, irq)
    dev.write(0, 1, 0xF2)
    assert irq.level
    dev.read(0, 1)
    assert not irq.level
    dev.write(4, 1, 0x60)
    dev.write(0, 1, 0x44)
    dev.write(0, 1, 0xF2)
    assert not irq.level
    dev.reset()
    irq.close()


# ---- small ones --------------------------------------------------------------------------------


def test_pvpanic(pio: Bus) -> None:
    seen: list[str] = []
    dev = PvPanic(lambda: seen.append("panic"), lambda: seen.append("crash"))
    dev.place(pio)
    assert pio.read(0x505, 1) == 3
    for value in (0x00, 0xFC, 0x02, 0x01, 0x03):
        pio.write(0x505, 1, value)
    assert seen == ["crash", "panic", "panic"]
    assert dev.events == 3
    dev.reset()
    assert dev.events == 0
    PvPanic(lambda: None).write(0, 1, 2)


@pytest.mark.parametrize(
    ("size", "value", "status"), [(1, 0, 1), (1, 0x10, 0x21), (2, 0x1234, 0x2469), (4, 3, 7)]
)
def test_debug_exit(pio: Bus, size: int, value: int, status: int) -> None:
    seen: list[int] = []
    DebugExit(seen.append).place(pio)
    pio.write(0xF4, size, value)
    assert seen == [status]
    assert pio.read(0xF4, size) == 0


def test_port80(pio: Bus) -> None:
    dev = Port80()
    dev.place(pio)
    pio.write(0x80, 1, 0x55)
    pio.write(0xED, 1, 0x11)
    assert (dev.post_code, dev.last(0xED), pio.read(0x80, 1), pio.read(0x87, 1)) == (
        0x55,
        0x11,
        0x55,
        0,
    )
    assert not pio.unclaimed
    dev.reset()
    assert dev.post_code == 0


# ---- fw_cfg ------------------------------------------------------------------------------------


def test_fw_cfg(pio: Bus) -> None:
    FwCfg(5 << 30, 3).place(pio)

    def get(key: int, size: int) -> bytes:
        pio.write(0x510, 2, key)
        return bytes(pio.read(0x511, 1) for _ in range(size))

    assert get(0x00, 6) == b"QEMU\0\0"
    assert get(0x01, 4) == b"\x01\0\0\0"
    assert int.from_bytes(get(0x03, 8), "little") == 5 << 30
    assert int.from_bytes(get(0x05, 2), "little") == 3
    assert int.from_bytes(get(0x0F, 2), "little") == 3
    assert get(0x19, 4) == b"\0\0\0\0"
    assert get(0x4000, 4) == b"QEMU"
    assert get(0xFFFF, 4) == b"\0\0\0\0"
    assert get(0x8001, 1) == b"\0"


# ---- pc-testdev --------------------------------------------------------------------------------


class Chip(NullIrqChip):
    def __init__(self) -> None:
        self.lines: dict[int, IrqLine] = {}

    def line(self, gsi: int) -> IrqLine:
        self.lines[gsi] = super().line(gsi)
        return self.lines[gsi]


def test_testdev(pio: Bus) -> None:
    mmio, chip = Bus("mmio", 1 << 64), Chip()
    dev = TestDev(chip)
    dev.place(pio, mmio)
    pio.write(0xE0, 4, 0x87654321)
    assert pio.read(0xE0, 4) == 0x87654321
    assert pio.read(0xE2, 2) == 0x8765
    assert pio.read(0xE3, 1) == 0x87
    assert pio.read(0xE8, 4) == 0x87654321
    pio.write(0xE1, 1, 0xAA)
    assert pio.read(0xE8, 4) == 0x8765AA21
    pio.write(0xE4, 4, 0x123000)
    assert dev.flushed == 0x123000
    assert pio.read(0xE0, 4) == 0x8765AA21
    pio.write(0x200E, 1, 1)
    assert chip.lines[14].level
    pio.write(0x200E, 1, 0)
    assert not chip.lines[14].level
    assert chip.lines[14].count == 1
    pio.write(0x2017, 1, 5)
    assert chip.lines[23].level
    mmio.write(0xFF000010, 8, 0x1122334455667788)
    assert mmio.read(0xFF000012, 2) == 0x5566
    assert mmio.read(0xFF00FFFF, 1) == 0
    dev.reset()
    assert not chip.lines[23].level
    assert mmio.read(0xFF000010, 8) == 0
    dev.close()


# ---- all of them -------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(
            st.integers(0, 80),
            st.integers(0, 0x1F),
            st.sampled_from([1, 2, 4]),
            st.one_of(st.none(), st.integers(0, (1 << 32) - 1)),
        ),
        max_size=60,
    )
)
def test_any_access_anywhere(accesses: list[tuple[int, int, int, int | None]]) -> None:
    """Random accesses around every port: nothing raises, reads fit their width."""
    pio, mmio = Bus("pio", 1 << 16), Bus("mmio", 1 << 64)
    devices: list[Device] = []
    for dev in (
        I8042(lambda: None),
        PvPanic(lambda: None),
        DebugExit(lambda status: None),
        Port80(),
        Sink("sink", (0x61,)),
        FwCfg(1 << 30, 1),
        Rtc(None),
    ):
        dev.place(pio)
        devices.append(dev)
    testdev = TestDev(NullIrqChip())
    testdev.place(pio, mmio)
    ranges = pio.ranges()
    for which, offset, size, value in accesses:
        base, length, _ = ranges[which % len(ranges)]
        addr = base + offset % (length + 2)
        if value is None:
            assert 0 <= pio.read(addr, size) < 1 << (8 * size)
        else:
            pio.write(addr, size, value & ((1 << (8 * size)) - 1))
    for dev2 in (*devices, testdev):
        dev2.reset()
        dev2.close()
