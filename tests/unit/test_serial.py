"""The 16550A, paragraph by paragraph of its data sheet. No KVM: the same C model is called."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from vmm._native import lib
from vmm.chario import Input, Sink, Stream
from vmm.devices.serial import Serial
from vmm.irq import NullIrqChip

RBR = THR = DLL = 0
IER = DLM = 1
IIR = FCR = 2
LCR, MCR, LSR, MSR, SCR = 3, 4, 5, 6, 7

DR, OE, PE, FE, BI, THRE, TEMT, FIFO_ERR = 1, 2, 4, 8, 16, 32, 64, 128
DTR, RTS, OUT1, OUT2, LOOP = 1, 2, 4, 8, 16


class Port:
    """A port with everything around it."""

    def __init__(self) -> None:
        self.out = Stream(4096)
        self.inp = Input(4096)
        self.irq = NullIrqChip().line(4)
        self.dev = Serial("serial0", self.out, self.inp, self.irq)

    def __getitem__(self, reg: int) -> int:
        return self.dev.read(reg, 1)

    def __setitem__(self, reg: int, value: int) -> None:
        self.dev.write(reg, 1, value)

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
    """PC16550D §8.0 table I."""
    assert [port[r] for r in (IER, IIR, LCR, MCR, LSR)] == [0, 1, 0, 0, THRE | TEMT]
    assert port[MSR] & 0x0F == 0
    port[SCR] = 0x5A
    port[IER], port[LCR], port[MCR], port[FCR] = 0xFF, 0x7F, 0xFF, 0xC1
    port.dev.reset()
    assert [port[r] for r in (IER, IIR, LCR, MCR, LSR)] == [0, 1, 0, 0, THRE | TEMT]
    assert port[SCR] == 0x5A
    assert not port.irq.level


def test_registers_keep_what_is_theirs(port: Port) -> None:
    port[IER] = 0xF0
    assert port[IER] == 0  # bits 4-7 are always 0
    port[MCR] = 0xE0
    assert port[MCR] == 0  # bits 5-7 are always 0
    for value in (0, 0x55, 0xAA, 0xFF):
        port[SCR] = value
        assert port[SCR] == value
    port[LCR] = 0x1F
    assert port[LCR] == 0x1F


def test_divisor_latch(port: Port) -> None:
    """PC16550D §8.1, §8.3: DLAB gives DLL and DLM the places of RBR/THR and IER."""
    port[IER] = 0x05
    port[LCR] = 0x83
    port[DLL], port[DLM] = 0x01, 0xC2
    assert (port[DLL], port[DLM]) == (0x01, 0xC2)
    port[LCR] = 0x03
    assert port[IER] == 0x05
    assert port.printed == b""
    port.dev.reset()
    port[LCR] = 0x80
    assert (port[DLL], port[DLM]) == (0x01, 0xC2)  # not touched by a reset


def test_transmit(port: Port) -> None:
    for c in b"ok\n":
        assert port[LSR] & (THRE | TEMT) == THRE | TEMT
        port[THR] = c
    assert port.printed == b"ok\n"
    assert port.dev.stats()["tx"] == 3


def test_wide_access_is_bytes_in_turn(port: Port) -> None:
    port.dev.write(LCR, 2, 0x0B03)
    assert (port[LCR], port[MCR]) == (0x03, 0x0B)
    assert port.dev.read(LCR, 2) == 0x0B03
    port.dev.write(SCR, 1, 0x77)
    assert port.dev.read(0, 8) >> 56 == 0x77
    assert port.dev.read(4, 4) >> 24 == 0x77


def test_thre_interrupt(port: Port) -> None:
    """PC16550D §8.5: raised when THR is empty and enabled; IIR or writing THR clears it."""
    port[MCR] = OUT2
    assert not port.irq.level
    port[IER] = 0x02
    assert port.irq.level
    assert port[IIR] == 0x02
    assert not port.irq.level
    assert port[IIR] == 0x01
    port[THR] = ord("x")  # sent at once: empty again
    assert port.irq.level
    assert port[IIR] == 0x02
    port[IER] = 0
    port[IER] = 0x02  # enabling it anew raises it anew
    assert port.irq.level
    assert port[IIR] == 0x02
    port[IER] = 0x02  # was enabled already
    assert port[IIR] == 0x01


def test_thre_interrupt_is_an_edge_per_character(port: Port) -> None:
    """For a guest that programmed its IOAPIC for edges and never reads IIR."""
    port[MCR] = OUT2
    port[IER] = 0x02
    before = port.irq.count
    for _ in range(10):
        port[THR] = 0x41
    assert port.irq.count == before + 10


def test_iir_read_for_another_cause_keeps_thre(port: Port) -> None:
    port[MCR] = OUT2 | RTS
    port[IER] = 0x03
    port.inp.push(b"a")
    assert port[IIR] == 0x04
    assert port[RBR] == ord("a")
    assert port[IIR] == 0x02


def test_out2_gates_the_line(port: Port) -> None:
    port[IER] = 0x02
    assert not port.irq.level
    port[MCR] = OUT2
    assert port.irq.level
    port[MCR] = OUT2 | LOOP  # loopback forces the pin off
    assert not port.irq.level
    port[MCR] = 0
    assert not port.irq.level


def test_receive_one_character_mode(port: Port) -> None:
    port[MCR] = RTS | OUT2
    port[IER] = 0x01
    port.inp.push(b"abc")
    for c in b"abc":
        assert port.irq.level
        assert port[IIR] == 0x04
        assert port[LSR] & DR
        assert port[RBR] == c
    assert not port.irq.level
    assert not port[LSR] & DR
    assert port[RBR] == ord("c")  # the register still holds it
    assert port.irq.count == 3  # one edge each


@pytest.mark.parametrize(("bits", "level"), [(0, 1), (1, 4), (2, 8), (3, 14)])
def test_fifo_trigger_levels(port: Port, bits: int, level: int) -> None:
    """PC16550D §8.4: FCR bits 6-7; below the level it is a character timeout."""
    port[FCR] = 0x01 | bits << 6
    port[MCR] = RTS | OUT2
    port[IER] = 0x01
    port.inp.push(bytes(range(level)))
    assert port[IIR] == 0xC4
    assert port[RBR] == 0
    if level > 1:
        assert port[IIR] == 0xCC
        assert port.irq.level
    for i in range(1, level):
        assert port[RBR] == i
    assert port[IIR] == 0xC1
    assert not port.irq.level


def test_character_timeout(port: Port) -> None:
    """PC16550D §8.7: reading one character clears it; with more there it comes again."""
    port[FCR] = 0xC1
    port[MCR] = RTS | OUT2
    port[IER] = 0x01
    port.inp.push(b"xyz")
    before = port.irq.count
    assert port[IIR] == 0xCC
    for c in b"xyz":
        assert port.irq.level
        assert port[RBR] == c
    assert not port.irq.level
    assert port.irq.count == before + 2


def test_long_input_arrives_whole_and_in_order(port: Port) -> None:
    port[FCR] = 0x81
    port[MCR] = RTS | OUT2
    port[IER] = 0x01
    data = bytes(i * 7 & 0xFF for i in range(3000))
    assert port.inp.push(data) == 3000
    got = bytearray()
    while port[LSR] & DR:
        got.append(port[RBR])
    assert bytes(got) == data
    assert port[LSR] & OE == 0


def test_fcr_needs_bit_0(port: Port) -> None:
    port[FCR] = 0xC0
    assert port[IIR] == 0x01
    port[FCR] = 0xC1
    assert port[IIR] == 0xC1
    port[FCR] = 0xC0
    assert port[IIR] == 0x01


def test_fcr_clears_the_receiver(port: Port) -> None:
    port[FCR] = 0x01
    port[MCR] = LOOP
    for c in b"abcd":
        port[THR] = c
    assert port[LSR] & DR
    port[FCR] = 0x03
    assert not port[LSR] & DR
    for c in b"ab":
        port[THR] = c
    port[FCR] = 0x00  # changing bit 0 clears too
    assert not port[LSR] & DR


def test_nothing_arrives_before_the_port_is_open(port: Port) -> None:
    """What is typed early waits outside: probing and FIFO clears lose none of it."""
    port.inp.push(b"early")
    port[IER] = 0
    port[FCR] = 0x01
    port[FCR] = 0x07
    port[FCR] = 0x00
    assert port[LSR] & DR == 0
    assert port[LSR] & DR == 0
    port[RBR]
    port[IIR]
    port[MSR]
    port[IER] = 0x05
    port[FCR] = 0x01
    port[FCR] = 0x81
    port[MCR] = DTR | RTS | OUT2
    got = bytearray()
    while port[LSR] & DR:
        got.append(port[RBR])
    assert bytes(got) == b"early"


def test_open_port_loses_what_it_clears(port: Port) -> None:
    port[FCR] = 0x01
    port[MCR] = RTS
    port.inp.push(b"x" * 20)
    assert port[LSR] & DR
    port[FCR] = 0x03
    left = 0
    while port[LSR] & DR:
        port[RBR]
        left += 1
    assert left == 4


def test_polling_guest_needs_no_rts(port: Port) -> None:
    port.inp.push(b"hi")
    got = bytearray()
    for _ in range(40):
        if port[LSR] & DR:
            got.append(port[RBR])
    assert bytes(got) == b"hi"


def test_printing_guest_is_no_poller(port: Port) -> None:
    port.inp.push(b"hi")
    for _ in range(8):
        assert port[LSR] == THRE | TEMT
        port[THR] = 0x2E
    assert port.inp.level == 2


def test_rts_off_holds_the_far_end(port: Port) -> None:
    port[FCR] = 0x01
    port[IER] = 0x01
    port[MCR] = RTS | OUT2
    port[MCR] = OUT2
    port.inp.push(b"later")
    assert port.inp.level == 5
    assert not port.irq.level
    port[MCR] = RTS | OUT2
    assert port.inp.level == 0
    assert port.irq.level


def test_loopback_data(port: Port) -> None:
    """PC16550D §8.8: the transmitter's output is the receiver's input; SIN is disconnected."""
    port[MCR] = LOOP | RTS
    port.inp.push(b"outside")
    port[THR] = 0xA5
    assert port[LSR] & DR
    assert port[RBR] == 0xA5
    assert not port[LSR] & DR
    assert port.printed == b""
    assert port.inp.level == 7


def test_loopback_modem_lines(port: Port) -> None:
    """PC16550D §8.8: DTR, RTS, OUT1, OUT2 come back as DSR, CTS, RI, DCD."""
    port[MCR] = LOOP
    port[MSR]
    for mcr, msr in ((DTR, 0x20), (RTS, 0x10), (OUT1, 0x40), (OUT2, 0x80)):
        port[MCR] = LOOP | mcr
        assert port[MSR] & 0xF0 == msr
    port[MCR] = 0
    assert port[MSR] & 0xF0 == 0xB0


def test_modem_deltas_and_interrupt(port: Port) -> None:
    """PC16550D §8.6.2: a delta stays until MSR is read; RI counts on its trailing edge."""
    port[MCR] = LOOP
    port[MSR]
    port[IER] = 0x08
    assert port[IIR] == 0x01
    port[MCR] = LOOP | RTS
    assert port[IIR] == 0x00
    assert port[MSR] == 0x11
    assert port[IIR] == 0x01
    port[MCR] = LOOP | OUT1
    assert port[MSR] == 0x41
    port[MCR] = LOOP
    assert port[MSR] == 0x04
    port[MCR] = LOOP | DTR | OUT2
    assert port[MSR] == 0xAA


@pytest.mark.parametrize("fifo", [False, True])
def test_overrun(port: Port, fifo: bool) -> None:
    """PC16550D §8.6: the FIFO keeps its 16; the lone register is overwritten."""
    port[FCR] = int(fifo)
    port[MCR] = LOOP
    size = 16 if fifo else 1
    for i in range(size + 1):
        port[THR] = i
    port[IER] = 0x04
    assert port[IIR] & 0x0F == 0x06
    assert port[LSR] & (OE | DR) == OE | DR
    assert port[LSR] & OE == 0
    assert port[IIR] & 0x0F == 0x01
    first = port[RBR]
    assert first == (0 if fifo else 1)
    assert port.dev.stats()["overruns"] == 1


def test_break_received(port: Port) -> None:
    port[FCR] = 0x01
    port[MCR] = RTS | OUT2
    port[IER] = 0x05
    port.inp.push(b"a")
    port.inp.send_break()
    assert port[LSR] == DR | THRE | TEMT | FIFO_ERR  # behind the character
    assert port[RBR] == ord("a")
    assert port[IIR] == 0xC6
    assert port[LSR] & (BI | FE | DR | FIFO_ERR) == BI | FE | DR | FIFO_ERR
    assert port[LSR] == DR | THRE | TEMT
    assert port[RBR] == 0
    assert port[LSR] == THRE | TEMT


def test_break_sent(port: Port) -> None:
    """PC16550D §8.1: the output is held low, the transmitter goes on."""
    port[LCR] = 0x43
    port[THR] = ord("x")
    assert port[LSR] & THRE
    port[LCR] = 0x03
    port[THR] = ord("y")
    assert port.printed == b"y"
    assert port.dev.stats()["breaks"] == 1


def test_interrupt_priorities(port: Port) -> None:
    """PC16550D table III."""
    port[FCR] = 0x01
    port[MCR] = LOOP
    port[IER] = 0x0F
    for i in range(17):
        port[THR] = i
    port[MCR] = LOOP | RTS
    assert port[IIR] == 0xC6
    port[LSR]
    assert port[IIR] == 0xC4
    for _ in range(16):
        port[RBR]
    assert port[IIR] == 0xC2
    assert port[IIR] == 0xC0
    port[MSR]
    assert port[IIR] == 0xC1


def test_factory_registers_ignore_writes(port: Port) -> None:
    lsr, msr = port[LSR], port[MSR]
    port[LSR] = 0xFF
    port[MSR] = 0xFF
    assert (port[LSR], port[MSR]) == (lsr, msr)


def test_no_backends() -> None:
    dev = Serial("serial1", None)
    dev.write(THR, 1, 0x41)
    assert dev.read(LSR, 1) == THRE | TEMT
    assert dev.read(RBR, 1) == 0
    dev.close()
    dev.close()


def test_unclaimed_names_the_kernel_option(port: Port) -> None:
    assert "CONFIG_SERIAL_8250_CONSOLE" in (port.dev.unclaimed() or "")
    port[LSR]
    assert port.dev.unclaimed() is None


def test_guest_is_held_back_by_a_slow_reader() -> None:
    """THRE stays low until the reader goes on; nothing a polite guest wrote is lost."""
    out, chip = Stream(4096), NullIrqChip()
    irq = chip.line(4)
    dev = Serial("serial0", out, None, irq)
    r, w = os.pipe()
    sink = Sink(out, w)
    dev.write(FCR, 1, 1)
    dev.write(MCR, 1, OUT2)
    sent = 0
    while dev.read(LSR, 1) & THRE:
        dev.write(THR, 1, sent & 0xFF)
        sent += 1
        assert sent < 1 << 20
    assert dev.read(LSR, 1) & TEMT == 0
    dev.write(IER, 1, 2)
    assert dev.read(IIR, 1) == 0xC1
    for i in range(40):  # a rude guest fills the FIFO and loses the rest
        dev.write(THR, 1, i)
    assert dev.stats()["dropped"] >= 24
    held = 16 - (40 - dev.stats()["dropped"])
    got = bytearray()
    while not irq.level:
        got += os.read(r, 65536)
    assert dev.read(IIR, 1) == 0xC2
    assert dev.read(LSR, 1) & THRE
    os.set_blocking(r, False)
    assert _drain(sink, r, got)
    assert held >= 0
    assert got[:sent] == bytes(i & 0xFF for i in range(sent))
    assert len(got) == dev.stats()["tx"]
    sink.close()
    dev.close()
    irq.close()
    out.close()
    os.close(r)
    os.close(w)


def _drain(sink: Sink, fd: int, into: bytearray) -> bool:
    for _ in range(100):
        if sink.flush(0.02):
            break
        try:
            into += os.read(fd, 65536)
        except BlockingIOError:
            continue
    try:
        while chunk := os.read(fd, 65536):
            into += chunk
    except BlockingIOError:
        return True
    return False


def test_linux_finds_a_16550a(port: Port) -> None:
    """The steps of Linux's autoconfig: scratch IER bits, loopback lines, FIFO identification."""
    port[IER] = 0
    assert port[IER] == 0
    port[IER] = 0x0F
    assert port[IER] == 0x0F
    port[IER] = 0
    port[MCR] = LOOP | 0x0A
    assert port[MSR] & 0xF0 == 0x90
    port[MCR] = 0
    port[LCR] = 0xBF
    port[FCR] = 0
    port[LCR] = 0
    port[FCR] = 1
    assert port[IIR] >> 6 == 3
    # size_fifo(): 256 characters into the loop, 16 come back
    port[FCR] = 0x07
    port[MCR] = LOOP
    for i in range(256):
        port[THR] = i
    count = 0
    while port[LSR] & DR and count < 256:
        port[RBR]
        count += 1
    assert count == 16
    assert port.printed == b""


def test_access_through_a_c_bus(port: Port) -> None:
    from vmm._native import ffi

    bus = lib.vmm_bus_create()
    assert lib.vmm_bus_add(bus, 0x3F8, 8, port.dev.native()) == 0
    data = ffi.new("uint8_t[8]", b"Z")
    assert lib.vmm_bus_access(bus, 0x3F8, 1, data, 1) == 0
    assert lib.vmm_bus_access(bus, 0x3FD, 1, data, 0) == 0
    assert data[0] == THRE | TEMT
    assert port.printed == b"Z"
    assert lib.vmm_bus_remove(bus, 0x3F8) == 0
    lib.vmm_bus_destroy(bus)
