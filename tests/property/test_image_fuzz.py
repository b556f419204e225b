"""Hostile Images: whatever a file says, loading it works or is a BootError, within the RAM."""

from __future__ import annotations

import functools
import struct

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import images
from vmm.arch.image import open_image
from vmm.arch.source import Source
from vmm.errors import BootError
from vmm.memory import GuestMemory

MIB = 1 << 20
BASE = 0x8000_0000
RAM = 24 * MIB
SAMPLES = {
    f"{name} {form}": made
    for name in images.FORMATS
    for form, made in {
        "plain": images.make(name),
        **{kind: pack(images.make(name)) for kind, pack in images.PACKERS.items()},
        **{
            f"zboot {kind}": images.zboot(pack(images.make(name)))
            for kind, pack in images.PACKERS.items()
        },
    }.items()
}
EXTREMES = [
    *(0, 1, 2, 0x7F, 0xFF, 0xFFFF, 4096, 2 * MIB, RAM, RAM - 4096, 1 << 30, 0x7FFF_FFFF),
    *(0xFFFF_F000, 0xFFFF_FFFF, 1 << 32, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1),
]
LIMITS = settings(deadline=2000, max_examples=150, suppress_health_check=[HealthCheck.too_slow])


@functools.cache
def memory() -> GuestMemory:
    """Shared: nobody looks at it."""
    return GuestMemory([(BASE, RAM)])


def survives(data: bytes, name: str) -> None:
    if not data:
        return
    form = images.FORMATS[name.partition(" ")[0]][0]
    source = Source.open(data, "kernel")
    found = None
    try:
        found = open_image(source, form)
        start, end = found.load(memory(), BASE)
        assert BASE <= start < end <= BASE + RAM
        assert start % form.offset_step == 0
    except BootError:
        pass  # what else there can be
    finally:
        if found is not None and found.source is not source:
            found.source.close()


samples = st.sampled_from(sorted(SAMPLES))
fields = st.tuples(st.integers(0, 0x48), st.sampled_from([1, 2, 4, 8]), st.sampled_from(EXTREMES))


@LIMITS
@given(samples, st.floats(0, 1))
def test_truncated_anywhere(name: str, where: float) -> None:
    data = SAMPLES[name]
    survives(data[: int(where * len(data))], name)


@LIMITS
@given(samples, st.lists(st.integers(0, 1 << 30), min_size=1, max_size=6), st.booleans())
def test_flipped_bits(name: str, bits: list[int], in_header: bool) -> None:
    data = bytearray(SAMPLES[name])
    span = min(len(data), 0x40) if in_header else len(data)
    for bit in bits:
        data[bit // 8 % span] ^= 1 << bit % 8
    survives(bytes(data), name)


@LIMITS
@given(samples, st.lists(fields, min_size=1, max_size=4))
def test_overwritten_fields(name: str, changes: list[tuple[int, int, int]]) -> None:
    data = bytearray(SAMPLES[name])
    for offset, size, value in changes:
        data[offset : offset + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
    survives(bytes(data), name)


@LIMITS
@given(
    st.sampled_from(sorted(images.FORMATS)),
    st.sampled_from(EXTREMES),
    st.sampled_from(EXTREMES),
    st.sampled_from(EXTREMES),
)
def test_headers(name: str, text_offset: int, size: int, flags: int) -> None:
    data = bytearray(images.make(name))
    data[8:32] = struct.pack("<3Q", text_offset, size, flags)
    survives(bytes(data), name)


@LIMITS
@given(samples, st.binary(max_size=3000))
def test_a_good_start_and_garbage(name: str, tail: bytes) -> None:
    survives(SAMPLES[name][:64] + tail, name)
