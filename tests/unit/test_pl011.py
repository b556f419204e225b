"""PL011, paragraph by paragraph of its manual; and whatever a guest writes. The C model itself."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.chario import Input, Stream
from vmm.devices.pl011 import Pl011
from vmm.irq import NullIrqChip

DR, RSR, FR, IBRD, FBRD, LCR, CR, IFLS = 0, 4, 0x18, 0x24, 0x28, 0x2C, 0x30, 0x34
IMSC, RIS, MIS, ICR, DMACR = 0x38, 0x3C, 0x40, 0x44, 0x48
BUSY, RXFE, TXFF, RXFF, TXFE = 8, 0x10, 0x20, 0x40, 0x80
RX, TX, TIMEOUT, BREAK, OVERRUN = 0x10, 0x20, 0x40, 0x200, 0x400
FIFOS, ON, LOOP = 0x10, 0x301, 0x80


class Port:
    """A port with everything around it."""

    def __init__(self, room: int = 4096) -> None:
        self.out = Stream(room)
        self.inp = Input(4096)
        self.irq = NullIrqChip().line(1)
        self.dev = Pl011("serial0", self.out, self.inp, self.irq)

    def __getitem__(self, reg: int) -> int:
        return self.dev.read(reg, 4)

    def __setitem__(self, reg: int, value: int) -> None:
        self.dev.write(reg, 4, value)

    def open(self, fifos: bool = True) -> None:
        """As Linux does."""
        self[LCR] = 0x60 | (FIFOS if fifos else 0)
        self[CR] = ON
        self[IMSC] = RX | TIMEOUT

    def close(self) -> None:
        self.dev.close()
        self.irq.close()
        self.inp.close()
        self.out.close()

    @property
    def printed(self) -> bytes:
        return self.out.read(0)[1]


@pytest.fixture
def port() -> Iterator[Port]:
    p = Port()
    yield p
    p.close()


def test_reset_state(port: Port) -> None:
    """DDI 0183G table 3-1."""
    wanted = {RSR: 0, IBRD: 0, FBRD: 0, LCR: 0, CR: 0x300, IFLS: 0x12, IMSC: 0, RIS: 0, MIS: 0}
    assert {reg: port[reg] for reg in wanted} == wanted
    assert port[FR] & (BUSY | RXFE | TXFF | RXFF | TXFE) == RXFE | TXFE
    for reg in (IBRD, FBRD, LCR, CR, IFLS, IMSC, DMACR):
        port[reg] = 0xFFFF_FFFF
    port.dev.reset()
    assert {reg: port[reg] for reg in wanted} == wanted
    assert port[DMACR] == 0


def test_it_says_what_it_is(port: Port) -> None:
    """DDI 0183G §3.3.15: PL011 r1p4 or later, whose FIFOs Linux takes for 16 deep or 32."""
    assert bytes(port[reg] for reg in range(0xFE0, 0x1000, 4)).hex() == "111034000df005b1"


def test_registers_keep_what_they_have_bits_for(port: Port) -> None:
    masks = {IBRD: 0xFFFF, FBRD: 0x3F, LCR: 0xFF, CR: 0xFF87, IFLS: 0x3F, IMSC: 0x7FF, DMACR: 7}
    for reg, mask in masks.items():
        port[reg] = 0xFFFF_FFFF
        assert port[reg] == mask
    for reg in (RIS, MIS, 0x50, 0x800, 0xFE0):
        before = port[reg]
        port[reg] = 0xFFFF_FFFF
        assert port[reg] == before


def test_bytes_out(port: Port) -> None:
    port[CR] = ON
    for byte in b"hello":
        port[DR] = byte
    assert port.printed == b"hello"
    assert port[FR] & (BUSY | TXFF | TXFE) == TXFE


@pytest.mark.parametrize("control", [0, 0x300, 0x201])
def test_nothing_goes_out_with_the_transmitter_off(port: Port, control: int) -> None:
    port[CR] = control
    port[DR] = 0x41
    assert port.printed == b""
    assert port.dev.stats()["dropped"] == 1


def test_early_consoles_write_bytes(port: Port) -> None:
    port[CR] = ON
    port.dev.write(DR, 1, 0x41)
    port.dev.write(DR, 2, 0x42)
    assert port.printed == b"AB"
    assert port.dev.read(FR, 1) == port[FR] & 0xFF


def test_the_transmit_interrupt(port: Port) -> None:
    port.open()
    port[IMSC] = TX
    assert not port.irq.level  # nothing was sent yet
    port[DR] = 0x41
    assert (port[RIS] & TX, port[MIS], port.irq.level) == (TX, TX, True)
    port[ICR] = TX
    assert (port[MIS], port.irq.level) == (0, False)


def test_bytes_in(port: Port) -> None:
    port.open()
    port.inp.push(b"ab")
    assert port.irq.level
    assert port[RIS] & (RX | TIMEOUT) == TIMEOUT
    assert port[FR] & (RXFE | RXFF) == 0
    assert [port[DR], port[DR]] == [0x61, 0x62]
    assert port[FR] & RXFE
    assert not port.irq.level
    assert port[DR] == 0


@pytest.mark.parametrize(("select", "level"), [(0, 2), (1, 4), (2, 8), (3, 12), (4, 14)])
def test_the_receive_interrupt_has_a_level(port: Port, select: int, level: int) -> None:
    """DDI 0183G §3.3.9."""
    port[IFLS] = select << 3
    port.open()
    port.inp.push(bytes(level - 1))
    assert not port[RIS] & RX
    port.inp.push(b"x")
    assert port[RIS] & RX
    port[DR]
    assert not port[RIS] & RX
    assert port.irq.level  # the timeout's


def test_without_fifos_there_is_one_byte(port: Port) -> None:
    port.open(fifos=False)
    port.inp.push(b"abc")
    assert port.inp.level == 2
    assert port[FR] & RXFF
    assert port[RIS] & RX
    assert [port[DR] for _ in range(4)] == [0x61, 0x62, 0x63, 0]


def test_a_full_fifo_holds_the_far_end_back(port: Port) -> None:
    port.open()
    port.inp.push(bytes(range(40)))
    assert port[FR] & RXFF
    assert port.inp.level == 24
    assert [port[DR] for _ in range(40)] == list(range(40))


def test_a_driver_that_starts_up_loses_nothing(port: Port) -> None:
    """Linux drains the FIFO, asks for interrupts, and turns the FIFOs on after that."""
    port.inp.push(b"typed ahead")
    port[CR] = ON
    for _ in range(32):
        if port[FR] & RXFE:
            break
        port[DR]
    port[IMSC] = RX | TIMEOUT
    port[CR] = 0
    port[LCR] = 0x70
    port[CR] = ON
    assert bytes(port[DR] for _ in range(11)) == b"typed ahead"


def test_who_polls_gets_input(port: Port) -> None:
    port[CR] = ON
    port.inp.push(b"x")
    for _ in range(100):
        if not port[FR] & RXFE:
            break
    assert port[DR] == 0x78


def test_a_break_is_a_character(port: Port) -> None:
    """DDI 0183G §3.3.1: an error comes with its character, and RSR has it after."""
    port.open()
    port.inp.push(b"a")
    port.inp.send_break()
    port.inp.push(b"b")
    assert port[DR] == 0x61
    assert port[RSR] == 0
    assert port[RIS] & BREAK
    assert port[DR] == 0x400
    assert port[RSR] == 4
    assert port[DR] == 0x62
    port[ICR] = BREAK
    assert not port[RIS] & BREAK


def test_loopback(port: Port) -> None:
    """DDI 0183G §2.4.4."""
    port[LCR] = FIFOS
    port[CR] = ON | LOOP
    port[IMSC] = RX | TIMEOUT
    port.inp.push(b"outside")
    for byte in range(17):
        port[DR] = byte
    assert port[RIS] & OVERRUN
    assert port[FR] & RXFF
    assert [port[DR] for _ in range(17)] == [*range(16), 0]
    assert port.printed == b""
    assert port.inp.level == 7
    for out, line, interrupt in ((0x800, 1, 2), (0x400, 2, 8), (0x1000, 4, 4), (0x2000, 0x100, 1)):
        port[ICR] = 0x7FF
        port[CR] = ON | LOOP | out
        assert port[FR] & 0x107 == line
        assert port[RIS] & interrupt
        port[CR] = ON | LOOP
    port[CR] = ON
    assert port.inp.level == 0
    assert port[FR] & 0x107 == 7


def test_a_break_sent_hides_what_is_written(port: Port) -> None:
    port[CR] = ON
    port[LCR] = 1
    port[DR] = 0x41
    assert port.printed == b""


@pytest.mark.parametrize(("offset", "size"), [(IMSC, 8), (IMSC + 1, 1), (IMSC + 2, 2)])
def test_what_is_between_registers_is_nothing(port: Port, offset: int, size: int) -> None:
    port.dev.write(offset, size, 0x55)
    assert port.dev.read(offset, size) == 0
    assert port[IMSC] == 0


def test_nothing_around_it() -> None:
    dev = Pl011("serial0", None)
    dev.write(CR, 4, ON)
    dev.write(DR, 4, 0x41)
    assert dev.read(FR, 4) & (TXFE | RXFE) == TXFE | RXFE
    assert "CONFIG_SERIAL_AMBA_PL011" in (Pl011("serial1", None).unclaimed() or "")
    assert dev.unclaimed() is None
    dev.close()


access = st.tuples(
    st.sampled_from(["r", "w"]),
    st.one_of(
        st.sampled_from([DR, RSR, FR, LCR, CR, IFLS, IMSC, RIS, MIS, ICR, DMACR]),
        st.integers(0, 0xFF8),
    ),
    st.sampled_from([4, 4, 4, 1, 2, 8]),
    st.one_of(
        st.sampled_from([0, 0x10, ON, ON | LOOP, 0x7FF, 0xFFFF]), st.integers(0, (1 << 64) - 1)
    ),
)
event = st.one_of(
    access,
    st.tuples(st.just("in"), st.binary(max_size=40)),
    st.tuples(st.just("break")),
    st.tuples(st.just("reset")),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(event, max_size=60))
def test_whatever_a_guest_writes(todo: list[tuple[object, ...]]) -> None:
    port = Port(256)
    for step in todo:
        match step:
            case ("r", int(offset), int(size), _):
                assert 0 <= port.dev.read(offset, size) < 1 << 8 * size
            case ("w", int(offset), int(size), int(value)):
                port.dev.write(offset, size, value & (1 << 8 * size) - 1)
            case ("in", bytes(data)):
                assert port.inp.push(data) <= len(data)
            case ("break",):
                port.inp.send_break()
            case ("reset",):
                port.dev.reset()
        flags, masked = port[FR], port[MIS]
        assert masked == port[RIS] & port[IMSC]
        assert port.irq.level == bool(masked)
        assert not (flags & RXFE and flags & RXFF)
        assert flags & TXFE  # no sink: what is written is gone at once
        if flags & RXFE:
            assert not port[RIS] & (RX | TIMEOUT)
    port.close()
