"""Any sequence of accesses and host events: no crash, no hang, and the line agrees with IIR."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from vmm.chario import Input, Stream
from vmm.devices.serial import Serial
from vmm.irq import NullIrqChip

ACCESS = st.tuples(
    st.sampled_from(["r", "w"]),
    st.integers(0, 7),
    st.sampled_from([1, 1, 1, 2, 4, 8]),
    st.one_of(
        st.sampled_from([0, 1, 2, 3, 7, 0x0F, 0x10, 0x1F, 0x80, 0xC1, 0xFF]),
        st.integers(0, (1 << 64) - 1),
    ),
)
EVENT = st.one_of(
    ACCESS,
    st.tuples(st.just("in"), st.binary(max_size=40)),
    st.tuples(st.just("break")),
    st.tuples(st.just("reset")),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(EVENT, max_size=60))
def test_line_agrees_with_iir(events: list[tuple[object, ...]]) -> None:
    out, inp, irq = Stream(256), Input(64), NullIrqChip().line(4)
    dev = Serial("serial0", out, inp, irq)
    try:
        for event in events:
            match event:
                case ("r", int(reg), int(size), _):
                    size = size if size <= 8 - reg else 1
                    assert 0 <= dev.read(reg, size) < 1 << (8 * size)
                case ("w", int(reg), int(size), int(value)):
                    size = size if size <= 8 - reg else 1
                    dev.write(reg, size, value & ((1 << (8 * size)) - 1))
                case ("in", bytes(data)):
                    assert inp.push(data) <= len(data)
                case ("break",):
                    inp.send_break()
                case ("reset",):
                    dev.reset()
            level, mcr = irq.level, dev.read(4, 1)
            assert mcr & 0xE0 == 0
            if mcr & 0x18 != 0x08:
                assert not level  # OUT2 off, or loopback
            else:
                iir = dev.read(2, 1)
                assert level == (not iir & 1)
                if iir & 0x0F == 0x02:
                    # Reading cleared it; enabling it again brings it back.
                    ier, lcr = dev.read(1, 1), dev.read(3, 1)
                    if not lcr & 0x80:
                        dev.write(1, 1, ier & ~2)
                        dev.write(1, 1, ier)
                        assert irq.level
        lsr = dev.read(5, 1)
        assert lsr & 0x60 == 0x60  # no sink: the transmitter is always empty
    finally:
        dev.close()
        irq.close()
        inp.close()
        out.close()
