"""Hostile kernels: whatever a file says, loading it works or is a BootError, soon and within
memory of the file's own scale."""

from __future__ import annotations

import functools
import itertools
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support import kernels
from vmm.arch import unpack
from vmm.arch.source import Source
from vmm.arch.x86_64 import boot, layout
from vmm.arch.x86_64.elf import Elf
from vmm.errors import BootError, ConfigError
from vmm.memory import GuestMemory

MIB = 1 << 20
RAM = 48 * MIB

#: Every one small, so that mutations hit what matters.
SAMPLES: dict[str, bytes] = {
    "vmlinux": kernels.vmlinux(),
    "pvh32": kernels.elf(bits=32, notes=kernels.PVH_NOTE),
    "multiboot": kernels.multiboot_elf(),
    "multiboot flat": kernels.multiboot_flat(),
    "bzimage": kernels.bzimage(),
    **{
        f"bzimage {kind}": kernels.bzimage(kernels.payload(kind, kernels.vmlinux()))
        for kind in kernels.PACKERS
    },
    **{f"{kind} vmlinux": pack(kernels.vmlinux()) for kind, pack in kernels.PACKERS.items()},
}
EXTREMES = [
    *(0, 1, 2, 3, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 1 << 24, 0x7FFF_FFFF, 0x8000_0000),
    *(0xFFFF_F000, 0xFFFF_FFFF, 1 << 32, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1),
]
LIMITS = settings(deadline=2000, max_examples=150, suppress_health_check=[HealthCheck.too_slow])


@functools.cache
def memory() -> GuestMemory:
    """Shared: a guest's RAM is too big to clear for each example, and nobody looks at it."""
    return GuestMemory(layout.ram_ranges(RAM))


def survives(image: bytes, protocol: str, name: str) -> None:
    if not image:
        return
    tracemalloc.start()
    try:
        boot.load_kernel(memory(), image, protocol=protocol, initrds=[b"initrd"], cmdline="x")
    except BootError:
        pass
    except ConfigError:
        # About what the user gave: a flat payload's initrd, a kernel with no room for a cmdline.
        if protocol != "flat" and image[0x238:0x23C] != bytes(4):
            raise
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    # Two pieces of unpacked data at most, and the buffers to read from. A stream of these kinds
    # names its window, whatever its length: reserved up to a limit, touched as far as it is filled.
    window = unpack.XZ_MEMORY_MAX if any(k in name for k in ("xz", "lzma", "zstd")) else 0
    assert peak < 2 * unpack.LZ4_BLOCK + 4 * len(image) + 4 * MIB + window


protocols = st.sampled_from(boot.PROTOCOLS)
samples = st.sampled_from(sorted(SAMPLES))


@LIMITS
@given(samples, protocols, st.floats(0, 1))
def test_truncated_anywhere(name: str, protocol: str, where: float) -> None:
    image = SAMPLES[name]
    survives(image[: int(where * len(image))], protocol, name)


@LIMITS
@given(samples, protocols, st.lists(st.integers(0, 1 << 30), min_size=1, max_size=6), st.booleans())
def test_flipped_bits(name: str, protocol: str, bits: list[int], in_header: bool) -> None:
    image = bytearray(SAMPLES[name])
    span = min(len(image), 0x300) if in_header else len(image)
    for bit in bits:
        image[bit // 8 % span] ^= 1 << bit % 8
    survives(bytes(image), protocol, name)


fields = st.tuples(st.integers(0, 0x400), st.sampled_from([1, 2, 4, 8]), st.sampled_from(EXTREMES))


@LIMITS
@given(samples, protocols, st.lists(fields, min_size=1, max_size=4))
def test_overwritten_fields(name: str, protocol: str, changes: list[tuple[int, int, int]]) -> None:
    image = bytearray(SAMPLES[name])
    for offset, size, value in changes:
        offset = offset // size * size % (len(image) - 8)
        image[offset : offset + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
    survives(bytes(image), protocol, name)


SETUP_FIELDS = [
    *("setup_sects", "syssize", "version", "kernel_version", "loadflags", "initrd_addr_max"),
    *("xloadflags", "cmdline_size", "payload_offset", "payload_length", "pref_address"),
    *("init_size", "setup_data", "jump"),
]
header_fields = st.dictionaries(
    st.sampled_from(SETUP_FIELDS), st.sampled_from(EXTREMES), min_size=1, max_size=4
)


@LIMITS
@given(st.sampled_from(sorted(kernels.PACKERS)), protocols, header_fields)
def test_setup_headers(kind: str, protocol: str, changes: dict[str, int]) -> None:
    from vmm.arch.x86_64.bootparams import FIELDS

    changes = {name: value & (1 << 8 * FIELDS[name][1]) - 1 for name, value in changes.items()}
    packed = kernels.payload(kind, kernels.vmlinux())
    image = kernels.bzimage(packed, **changes)  # type: ignore[arg-type]
    survives(image, protocol, kind)


@LIMITS
@given(samples, protocols, st.binary(max_size=3000))
def test_a_good_start_and_garbage(name: str, protocol: str, tail: bytes) -> None:
    survives(SAMPLES[name][:64] + tail, protocol, name)


@LIMITS
@given(st.binary(max_size=400))
def test_any_notes(notes: bytes) -> None:
    with Source.open(kernels.elf(notes=notes or b"x"), "kernel") as source:
        exe = Elf(source)
    assert sum(len(desc) for desc in exe.notes.values()) <= len(notes)


@LIMITS
@given(st.sampled_from(sorted(kernels.PACKERS)), st.binary(max_size=2000), st.integers(0, 40))
def test_damaged_streams(kind: str, data: bytes, at: int) -> None:
    packed = bytearray(kernels.PACKERS[kind](data * 20))
    packed[at % len(packed)] ^= 0x55
    with Source.open(bytes(packed), "kernel") as source:
        try:
            size = sum(map(len, unpack.unpack(source, 0, len(packed), kind, 1 * MIB)))
        except BootError:
            return
    assert size <= MIB


# ---- what is not refused is right ---------------------------------------------------------

#: Addresses around everything there is to collide with.
places = st.one_of(
    st.sampled_from([0, 0x500, 0x7000, 0x9000, 0xF000, 0x20000, 0x30000, 0x9F000, 0xFFFFF, RAM]),
    st.integers(0x100000, RAM + 8192),
)
segments = st.lists(
    st.tuples(places, st.binary(min_size=1, max_size=300), st.integers(0, 9000)),
    min_size=1,
    max_size=6,
)


@LIMITS
@given(segments)
def test_segments_land_where_they_say_or_are_refused(
    wanted: list[tuple[int, bytes, int]],
) -> None:
    table = [(paddr, data, len(data) + more) for paddr, data, more in wanted]
    claimed = [(paddr, paddr + size) for paddr, _, size in table]
    taken = [(0, 0x600), (0x7000, 0x9000), (0x9000, 0xF000), (0x20000, 0x30000)]
    spans = sorted([*claimed, *taken, (0x9FC00, 0x100000)])
    apart = all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    fits = all(end <= RAM for _, end in claimed)
    image = kernels.elf(segments=table, entry=table[0][0])
    ram = GuestMemory(layout.ram_ranges(RAM))
    try:
        if apart and fits:
            boot.load_kernel(ram, image, protocol="elf")
            for paddr, data, size in table:
                assert ram.read(paddr, size) == data + bytes(size - len(data))
        else:
            with pytest.raises(BootError):
                boot.load_kernel(ram, image, protocol="elf")
    finally:
        ram.close()


@LIMITS
@given(
    st.lists(st.integers(1, 3 * MIB), min_size=1, max_size=5),
    st.integers(1 * MIB, RAM),
    st.integers(0, RAM),
)
def test_initrds_never_touch_the_kernel(sizes: list[int], init_size: int, most: int) -> None:
    image = kernels.bzimage(init_size=init_size, initrd_addr_max=most, xloadflags=1)
    initrds = [b"i" * size for size in sizes]
    ram = GuestMemory(layout.ram_ranges(RAM))
    try:
        state = boot.load_kernel(ram, image, protocol="bzimage", initrds=initrds)
    except BootError:
        total = sum(sizes) + 4 * len(sizes) + 4096
        above = min(RAM, most) - max(state_end := kernels.BASE + init_size, layout.HIMEM)
        below = min(kernels.BASE, most) - layout.HIMEM
        assert state_end > RAM or (above < total and below < total)
    else:
        ((gpa, size),) = state.initrd
        start, end = state.kernel
        assert gpa + size <= start or gpa >= end
        assert gpa >= layout.HIMEM
        assert gpa + size <= min(RAM, most + 1)
        at = gpa
        for data in initrds:
            assert ram.read(at, len(data)) == data
            at += (len(data) + 3) & ~3
        assert at == gpa + size
    finally:
        ram.close()


@given(st.integers(256, 8 << 18))
def test_ram_goes_around_the_hole(pages: int) -> None:
    size = pages * layout.PAGE
    ranges = layout.ram_ranges(size)
    assert sum(span for _, span in ranges) == size
    for gpa, span in ranges:
        assert gpa + span <= layout.LOW_RAM_MAX or gpa >= layout.HIGH_RAM_BASE
