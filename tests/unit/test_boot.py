"""Loading kernels: what lands in memory, how the vCPU starts, and what is refused and how."""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support import kernels
from vmm.arch.x86_64 import boot, layout
from vmm.arch.x86_64.bootparams import BootParams
from vmm.arch.x86_64.state import BootState, Segment
from vmm.errors import BootError, ConfigError
from vmm.memory import GuestMemory

MIB = 1 << 20
RAM = 64 * MIB
Load = Callable[..., BootState]


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    ram = GuestMemory(layout.ram_ranges(RAM))
    yield ram
    ram.close()


@pytest.fixture
def load(memory: GuestMemory) -> Load:
    def load_kernel(kernel: object, **options: object) -> BootState:
        options.setdefault("cache", False)
        return boot.load_kernel(memory, kernel, **options)  # type: ignore[arg-type]

    return load_kernel


def zero_page(memory: GuestMemory) -> BootParams:
    params = BootParams()
    params.data[:] = memory.read(layout.ZERO_PAGE, 4096)
    return params


def string_at(memory: GuestMemory, gpa: int) -> bytes:
    return memory.read(gpa, 256).split(b"\0")[0]


# ---- the 64-bit protocol ------------------------------------------------------------------


def test_bzimage_lands_where_it_prefers_and_starts_in_long_mode(
    load: Load, memory: GuestMemory
) -> None:
    image = kernels.bzimage()
    state = load(image, protocol="bzimage", cmdline="console=ttyS0", rsdp=0xE0000)
    assert (state.kind, state.mode, state.rip) == ("bzimage", "long", kernels.BASE + 0x200)
    assert state.rsi == layout.ZERO_PAGE
    code = image[kernels.SETUP_SIZE : -len(b"signature")]
    assert memory.read(kernels.BASE, len(code) + 16) == code + bytes(16)
    params = zero_page(memory)
    assert params["header"] == 0x53726448
    assert params["version"] == 0x020F
    assert params["sentinel"] == 0
    assert params["type_of_loader"] == 0xFF
    assert params["vid_mode"] == 0xFFFF
    assert params["acpi_rsdp_addr"] == 0xE0000
    assert (params["ramdisk_image"], params["ramdisk_size"]) == (0, 0)
    assert string_at(memory, params["cmd_line_ptr"]) == b"console=ttyS0"
    assert "6.1.0-test" in state.description
    assert "someone" not in state.description


def test_long_mode_state(load: Load, memory: GuestMemory) -> None:
    state = load(kernels.bzimage(), protocol="bzimage")
    assert state.cr0 & 0x8000_0001 == 0x8000_0001
    assert not state.cr0 & 0x6000_0000, "caches must be on"
    assert (state.cr4, state.efer) == (0x20, 0x500)
    assert (state.cs.selector, state.cs.l, state.cs.db) == (0x10, 1, 0)
    assert state.ds.selector == 0x18
    gdt = memory.read(state.gdt_base, state.gdt_limit + 1)
    cs, ds, tss = struct.unpack_from("<3Q", gdt, 16)
    assert cs == 0x00AF_9B00_0000_FFFF
    assert ds == 0x00CF_9300_0000_FFFF
    assert tss & 0xFF << 40 == 0x8B << 40
    assert state.rflags == 2


@pytest.mark.parametrize("gigabyte_pages", [False, True])
def test_page_tables_map_the_first_4_gib_to_itself(
    load: Load, memory: GuestMemory, gigabyte_pages: bool
) -> None:
    state = load(kernels.bzimage(), protocol="bzimage", gigabyte_pages=gigabyte_pages)
    for address in (0, 0x1234_5678, kernels.BASE, 0xFFFF_FFFF):
        assert walk(memory, state.cr3, address) == address
    assert walk(memory, state.cr3, 1 << 32) is None


def walk(memory: GuestMemory, cr3: int, address: int) -> int | None:
    """What a linear address maps to. Intel SDM vol 3 §4.5."""
    table = cr3
    for shift in (39, 30, 21):
        entry = memory.read_int(table + 8 * (address >> shift & 511), 8)
        if not entry & 1:
            return None
        table = entry & ~0xFFF
        if shift != 39 and entry & 0x80:
            return table + (address & (1 << shift) - 1)
    raise AssertionError("no page is that small here")


def test_a_32_bit_bzimage_starts_in_protected_mode(load: Load) -> None:
    state = load(kernels.bzimage(xloadflags=0, version=0x020A))
    assert (state.mode, state.rip, state.rsi) == ("protected", kernels.BASE, layout.ZERO_PAGE)
    assert (state.cr0, state.cr3, state.cr4, state.efer) == (0x11, 0, 0, 0)
    assert (state.cs.selector, state.cs.db, state.cs.l) == (0x10, 1, 0)
    with pytest.raises(BootError, match="32-bit, which only protocol bzimage starts"):
        load(kernels.bzimage(xloadflags=0), protocol="elf")


def test_vmlinux_by_the_64_bit_protocol(load: Load, memory: GuestMemory) -> None:
    state = load(kernels.vmlinux(), cmdline="x", seed=b"s" * 32)
    assert (state.kind, state.mode, state.rip) == ("elf", "long", kernels.ENTRY)
    assert state.kernel == (kernels.BASE, kernels.BASE + len(kernels.CODE) + 0x3000)
    assert memory.read(kernels.BASE, len(kernels.CODE)) == kernels.CODE
    params = zero_page(memory)
    assert params["boot_flag"] == 0xAA55
    assert params["header"] == 0x53726448
    data = memory.read(params["setup_data"], 16 + 32)
    assert struct.unpack_from("<QII", data) == (0, 9, 32)
    assert data[16:] == b"s" * 32


def test_a_virtual_entry_point_is_translated(load: Load) -> None:
    high = 0xFFFF_FFFF_8000_0000
    image = kernels.vmlinux(virtual=high, entry=kernels.ENTRY + high)
    assert load(image).rip == kernels.ENTRY


@pytest.mark.parametrize("kind", sorted(kernels.PACKERS))
def test_a_payload_is_unpacked_by_the_host(load: Load, memory: GuestMemory, kind: str) -> None:
    image = kernels.bzimage(kernels.payload(kind, kernels.vmlinux()))
    state = load(image, protocol="elf")
    assert (state.kind, state.rip) == ("elf", kernels.ENTRY)
    assert memory.read(kernels.BASE, len(kernels.CODE)) == kernels.CODE
    assert zero_page(memory)["version"] == 0x020F, "the bzImage's own header is passed on"
    assert "6.1.0-test" in state.description


@pytest.mark.parametrize("kind", sorted(kernels.PACKERS))
def test_whole_kernels_may_be_packed(load: Load, kind: str) -> None:
    assert load(kernels.PACKERS[kind](kernels.vmlinux())).kind == "elf"
    assert load(kernels.PACKERS[kind](kernels.bzimage()), protocol="bzimage").kind == "bzimage"


def test_auto_falls_back_to_the_guests_own_unpacker(load: Load) -> None:
    image = kernels.bzimage(b"\x89LZO\0\r\n\x1a\n" + bytes(100))
    assert load(image).kind == "bzimage"
    with pytest.raises(BootError, match="cannot unpack"):
        load(image, protocol="elf")


# ---- initrds ------------------------------------------------------------------------------


def test_initrds_are_joined_on_4_bytes_at_the_top(
    load: Load, memory: GuestMemory, tmp_path: Path
) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"12345")
    second.write_bytes(b"67")
    state = load(kernels.vmlinux(), initrds=[str(first), second])
    params = zero_page(memory)
    gpa, size = params["ramdisk_image"], params["ramdisk_size"]
    assert state.initrd == [(gpa, size)]
    assert memory.read(gpa, size) == b"12345\0\0\x0067\0\0"
    assert gpa % 4096 == 0
    assert gpa + size <= RAM < gpa + size + 4096


def test_an_initrd_stays_below_initrd_addr_max(load: Load) -> None:
    image = kernels.bzimage(xloadflags=1, initrd_addr_max=32 * MIB - 1)
    gpa, size = load(image, protocol="bzimage", initrds=[b"x" * 5000]).initrd[0]
    assert gpa + size <= 32 * MIB


def test_an_initrd_goes_below_the_kernel_when_above_is_full(load: Load) -> None:
    end = RAM - kernels.BASE
    state = load(kernels.bzimage(init_size=end), protocol="bzimage", initrds=[bytes(MIB)])
    gpa, size = state.initrd[0]
    assert gpa >= layout.HIMEM
    assert gpa + size <= kernels.BASE


def test_an_initrd_that_does_not_fit_says_how_much_memory_would_do(load: Load) -> None:
    with pytest.raises(BootError, match=r"50 MiB does not fit beside.*at least 6[78] MiB") as e:
        load(kernels.vmlinux(), initrds=[bytes(50 * MIB)])
    need = int(str(e.value).split("at least ")[1].split()[0])
    ram = GuestMemory(layout.ram_ranges(need * MIB))
    boot.load_kernel(ram, kernels.vmlinux(), initrds=[bytes(50 * MIB)])
    ram.close()


@pytest.mark.parametrize("what", ["kernel", "initrd"])
def test_files_that_are_none(load: Load, tmp_path: Path, what: str) -> None:
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "fifo")
    for name, words in [
        ("missing", "No such file"),
        ("", "is a directory"),
        ("empty", "is empty"),
        ("fifo", "is not a regular file"),
        ("nul\0", "null byte"),
    ]:
        path = os.path.join(tmp_path, name)
        kernel, initrds = (path, []) if what == "kernel" else (kernels.vmlinux(), [path])
        with pytest.raises(BootError, match=words) as e:
            load(kernel, initrds=initrds)
        assert what in str(e.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_an_unreadable_kernel(load: Load, tmp_path: Path) -> None:
    path = tmp_path / "k"
    path.write_bytes(b"x")
    path.chmod(0)
    with pytest.raises(BootError, match="Permission denied"):
        load(path)


# ---- the command line ---------------------------------------------------------------------


def test_the_command_line_is_bounded_by_the_kernel(load: Load, memory: GuestMemory) -> None:
    image = kernels.bzimage(cmdline_size=100)
    load(image, protocol="bzimage", cmdline="x" * 100)
    assert string_at(memory, layout.CMDLINE) == b"x" * 100
    with pytest.raises(ConfigError, match="101 bytes long and this kernel takes 100"):
        load(image, protocol="bzimage", cmdline="x" * 101)
    with pytest.raises(ConfigError, match="2048 bytes long and this kernel takes 2047"):
        load(kernels.vmlinux(), cmdline="x" * 2048)


def test_a_command_line_area_bounds_what_a_kernel_claims(load: Load) -> None:
    with pytest.raises(ConfigError, match="takes 65535"):
        load(kernels.bzimage(cmdline_size=0xFFFF_FFFF), cmdline="x" * 70000)


@pytest.mark.parametrize(("text", "words"), [("a\0b", "NUL at position 1"), ("né", "ASCII")])
def test_command_lines_that_cannot_be(load: Load, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load(kernels.vmlinux(), cmdline=text)


# ---- PVH ----------------------------------------------------------------------------------


def test_pvh_start_info(load: Load, memory: GuestMemory) -> None:
    state = load(
        kernels.vmlinux(), protocol="pvh", cmdline="a b", initrds=[b"12345", b"6"], rsdp=0xE0000
    )
    assert (state.kind, state.mode, state.rip) == ("pvh", "protected", kernels.ENTRY + 1)
    assert (state.cr0, state.cr4, state.efer) == (0x11, 0, 0)
    info = struct.unpack("<4I4Q2I", memory.read(state.rbx, 56))
    magic, version, _, modules, modlist, cmdline, rsdp, memmap, entries, _ = info
    assert (magic, version, rsdp) == (0x336EC578, 1, 0xE0000)
    assert string_at(memory, cmdline) == b"a b"
    assert modules == 1, "Linux looks at one module only"
    gpa, size, _, _ = struct.unpack("<4Q", memory.read(modlist, 32))
    assert memory.read(gpa, size) == b"12345\0\0\x006\0\0\0"
    table = [struct.unpack("<2QI4x", memory.read(memmap + 24 * i, 24)) for i in range(entries)]
    assert table == state.e820


@pytest.mark.parametrize("bits", [32, 64])
def test_what_is_not_linux_starts_by_pvh_with_a_module_each(
    load: Load, memory: GuestMemory, bits: int
) -> None:
    notes = kernels.note(b"Xen", 18, struct.pack("<I", kernels.ENTRY))
    state = load(kernels.elf(bits=bits, notes=notes), initrds=[b"one", b"two!"])
    assert (state.kind, state.rip) == ("pvh", kernels.ENTRY)
    assert [memory.read(*where) for where in state.initrd] == [b"one", b"two!"]


@pytest.mark.parametrize(
    ("notes", "words"),
    [
        (b"", "no PVH entry note"),
        (kernels.note(b"Xen", 18, b"12"), "PVH entry note of 2 bytes"),
        (kernels.note(b"Xen", 18, struct.pack("<Q", 1 << 40)), "0x10000000000 outside"),
    ],
)
def test_pvh_refusals(load: Load, notes: bytes, words: str) -> None:
    with pytest.raises(BootError, match=words):
        load(kernels.elf(notes=notes), protocol="pvh")


# ---- multiboot and flat -------------------------------------------------------------------


def multiboot_info(memory: GuestMemory, state: BootState) -> tuple[int, ...]:
    assert (state.rax, state.mode, state.kind) == (0x2BADB002, "protected", "multiboot")
    name = memory.read_int(state.rbx + 64, 4)
    return (*struct.unpack("<14I", memory.read(state.rbx, 56)), name)


@pytest.mark.parametrize("bits", [32, 64])
def test_multiboot_elf(load: Load, memory: GuestMemory, tmp_path: Path, bits: int) -> None:
    path = tmp_path / "pay load"
    path.write_bytes(kernels.multiboot_elf(bits=bits))
    module = tmp_path / "mod"
    module.write_bytes(b"module")
    state = load(path, cmdline="a b", initrds=[f"{module} x y", b"other"])
    assert state.rip == 0x40000C
    info = multiboot_info(memory, state)
    flags, lower, upper, _, cmdline, mods, mods_addr = info[:7]
    assert flags == 0x24D
    assert (lower, upper) == (639, RAM // 1024 - 1024)
    assert string_at(memory, cmdline) == b"pay_load a b"
    assert mods == 2
    start, end, string = struct.unpack("<3I", memory.read(mods_addr, 12))
    assert memory.read(start, end - start) == b"module"
    assert start % 4096 == 0
    assert start >= state.kernel[1]
    assert string_at(memory, string) == f"{module} x y".encode()
    assert memory.read(*state.initrd[1]) == b"other"
    length, addr = info[11:13]
    table = []
    while length > 0:
        size, base, span, kind = struct.unpack("<I2QI", memory.read(addr, 24))
        table.append((base, span, kind))
        addr += size + 4
        length -= size + 4
    assert table == state.e820
    assert string_at(memory, info[14]) == b"vmm"


def test_multiboot_by_addresses_in_the_header(load: Load, memory: GuestMemory) -> None:
    image = kernels.multiboot_flat()
    state = load(image)
    assert state.rip == 0x200000 + 48
    assert memory.read(0x200000, len(image)) == image
    assert state.kernel == (0x200000, 0x200000 + len(image) + 0x4000)
    multiboot_info(memory, state)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (kernels.multiboot_elf(7), "a video mode"),
        (kernels.multiboot_elf(0x103), "features 0x100"),
        (kernels.elf(bits=32), "no multiboot header"),
        (kernels.multiboot_flat(base=0x7000_0000), "needs RAM up to"),
        (kernels.multiboot_flat(base=0x9F000, bss=0x10000), "overlaps the BIOS area"),
        (kernels.multiboot_flat(base=0x6000), "overlaps the multiboot information"),
        (bytes(16) + kernels.multiboot_header(3) + kernels.CODE, "without addresses"),
    ],
)
def test_multiboot_refusals(load: Load, image: bytes, words: str) -> None:
    with pytest.raises(BootError, match=words):
        load(image, protocol="multiboot")


def test_flat_code_starts_where_a_boot_sector_does(load: Load, memory: GuestMemory) -> None:
    state = load(b"\xf4" * 600, protocol="flat")
    assert (state.kind, state.mode, state.rip) == ("flat", "real", 0x7C00)
    assert (state.cs.base, state.cs.limit, state.cs.selector) == (0, 0xFFFF, 0)
    assert memory.read(0x7C00, 601) == b"\xf4" * 600 + b"\0"


def test_flat_code_has_a_limit_and_takes_no_initrd(load: Load) -> None:
    load(bytes(layout.EBDA - 0x7C00), protocol="flat")
    with pytest.raises(BootError, match="overlaps the BIOS area"):
        load(bytes(layout.EBDA - 0x7C00 + 1), protocol="flat")
    with pytest.raises(ConfigError, match="cannot be given an initrd"):
        load(b"x", protocol="flat", initrds=[b"x"])


# ---- what is refused ----------------------------------------------------------------------


def at(offset: int, magic: bytes) -> bytes:
    return bytes(offset) + magic + bytes(2000)


def zboot(machine: int) -> bytes:
    """The start of an EFI zboot kernel with this PE machine."""
    head = bytearray(b"MZ\0\0zimg" + bytes(0x100))
    head[0x3C:0x40] = (0x80).to_bytes(4, "little")
    head[0x80:0x86] = b"PE\0\0" + machine.to_bytes(2, "little")
    return bytes(head)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (
            at(0x38, b"ARM\x64"),
            "is a kernel Image for arm64, and this machine runs kernels for x86-64; "
            "'qemu-system-aarch64 -M virt -cpu max -m 512 -kernel FILE' would emulate one for it$",
        ),
        (at(0x38, b"RSC\x05"), "Image for RISC-V, and .* x86-64; 'qemu-system-riscv64 -M virt"),
        (at(0x10008, b"S390EP"), "is a kernel image for s390, and .* 'qemu-system-s390x -m"),
        (at(0x24, b"\x18\x28\x6f\x01"), "is a zImage for 32-bit Arm, and .* for x86-64$"),
        (zboot(0xAA64), "is an EFI zboot kernel for arm64, and .* 'qemu-system-aarch64"),
        (zboot(0x8664), "is an EFI zboot kernel for x86-64, not a bzImage"),
        (b"#!/bin/sh\necho\n", "is a script"),
        (b"just some words\n", "is text"),
        (bytes(4096), "is zeros"),
        (b"070701" + bytes(200), "cpio archive, perhaps an initrd"),
        (b"MZ" + bytes(600), "unified kernel image"),
        (b"\x01\x02\x03", "of no format known here"),
        (
            kernels.PACKERS["gzip"](at(0x38, b"ARM\x64")),
            "is gzip data; what it holds is a kernel Image for arm64, and",
        ),
        (kernels.PACKERS["xz"](b"070701" + bytes(200)), "xz data that holds a cpio archive"),
        (kernels.PACKERS["gzip"](kernels.PACKERS["gzip"](b"x")), "gzip data that holds gzip data"),
        (
            kernels.elf(machine=183),
            "is an ELF file for arm64, and this machine runs kernels for x86-64$",
        ),
        (kernels.elf(machine=21), "64-bit PowerPC, and .* 'qemu-system-ppc64 -M pseries"),
        (kernels.elf(machine=0x3E00, data=2), "is a big-endian ELF file"),
        (kernels.elf(machine=999), "machine type 999"),
        (kernels.elf(machine=0x1600, data=2), "is an ELF file for s390"),
        (kernels.elf(type_=1), r"is a relocatable object \(.o or .ko\)"),
        (kernels.elf(type_=4), "is a core dump"),
        (kernels.elf(bits=32), "without a multiboot header or a PVH note"),
        (kernels.elf(segments=()), "program headers"),
        (kernels.elf(entry=0x1234), "entry point 0x1234 outside"),
        (kernels.bzimage(version=0x0204), "boot protocol 2.04; 2.10"),
        (kernels.bzimage(loadflags=0), "is a zImage"),
        (kernels.bzimage(syssize=0), "truncated"),
        (kernels.bzimage()[:3000], "is truncated"),
        (kernels.bzimage(init_size=RAM), "needs RAM up to .* give it more than 80 MiB"),
        (kernels.bzimage(pref_address=1 << 40), "where there is no RAM"),
        (kernels.bzimage(pref_address=0x8000, init_size=1), "kernel at .* overlaps setup_data"),
        (kernels.vmlinux(segments=((0x7800, kernels.CODE, 4096),)), "segment 0 .* boot_params"),
    ],
)
def test_refusals_say_what_it_is(load: Load, image: bytes, words: str) -> None:
    with pytest.raises(BootError, match=words):
        load(image)


@pytest.mark.parametrize(
    "start",
    [0x100, layout.GDT, layout.ZERO_PAGE, layout.PAGE_TABLES + 0x5FF0, layout.CMDLINE, 0xE0000],
)
def test_a_segment_over_boot_data_is_refused(load: Load, start: int) -> None:
    segments = ((start, b"x" * 16, 16), (kernels.BASE, kernels.CODE, len(kernels.CODE)))
    with pytest.raises(BootError, match="overlaps"):
        load(kernels.vmlinux(segments=segments))


def test_segments_over_each_other_are_refused(load: Load) -> None:
    code = (kernels.BASE, kernels.CODE, 4096)
    with pytest.raises(BootError, match=r"segment 1 .* overlaps segment 0"):
        load(kernels.vmlinux(segments=(code, code)))


@pytest.mark.parametrize("kind", sorted(kernels.PACKERS))
def test_a_payload_that_lies_about_its_size(load: Load, kind: str) -> None:
    vmlinux = kernels.vmlinux()
    packed = kernels.payload(kind, vmlinux)[:-4]
    for size, words in [
        (len(vmlinux) + 1, "damaged"),
        (len(vmlinux) - 1, "damaged|unpacks"),
        (0, "claims to unpack to 0 bytes"),
        (0xFFFF_FFFF, "claims to unpack to 4294967295 bytes"),
    ]:
        with pytest.raises(BootError, match=words):
            load(kernels.bzimage(packed + struct.pack("<I", size)))


@pytest.mark.parametrize("protocol", ["bzimage", "multiboot"])
def test_the_wrong_protocol_for_a_file(load: Load, protocol: str) -> None:
    with pytest.raises(BootError):
        load(kernels.vmlinux(), protocol=protocol)
    with pytest.raises(ConfigError, match="is not one of auto, bzimage"):
        load(kernels.vmlinux(), protocol="uefi")


def test_the_cpu_can_run_nothing_32_bit_by_the_elf_protocol(load: Load) -> None:
    with pytest.raises(BootError, match="32-bit ELF"):
        load(kernels.multiboot_elf(), protocol="elf")


# ---- the state itself ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("segment", "descriptor"),
    [
        (Segment(0x10, 0xB, l=1), 0x00AF_9B00_0000_FFFF),
        (Segment(0x10, 0xB, db=1), 0x00CF_9B00_0000_FFFF),
        (Segment(0, 0xB, base=0x12345678, limit=0x67, s=0, g=0), 0x1200_8B34_5678_0067),
    ],
)
def test_descriptors(segment: Segment, descriptor: int) -> None:
    assert segment.descriptor() == descriptor


def test_the_summary_names_everything(load: Load) -> None:
    state = load(kernels.vmlinux(), cmdline="quiet", initrds=[b"x"])
    text = "\n".join(state.summary())
    for words in ("0x1000000", "quiet", "initrd", "long mode", "e820      0x0-0x9fbff ram"):
        assert words in text


@pytest.mark.parametrize("size", [1, 2, 128, 3072, 3073, 5120])
def test_the_memory_map_is_ordered_and_disjoint_and_within_ram(size: int) -> None:
    ram = GuestMemory(layout.ram_ranges(size * MIB))
    table = layout.e820_table(ram)
    assert table == sorted(table)
    for (base, span, _), (following, _, _) in itertools.pairwise(table):
        assert base + span <= following
    usable = sum(span for _, span, kind in table if kind == layout.E820_RAM)
    assert usable == size * MIB - (layout.HIMEM - layout.EBDA)
    assert all(ram.contains(b, s) for b, s, kind in table if kind == layout.E820_RAM)
    ram.close()


def test_the_64_bit_pci_window_is_above_ram_and_within_reach() -> None:
    for size, bits in [(128 * MIB, 39), (5 << 30, 36), (400 << 30, 46), (300 << 30, 39)]:
        base, span = layout.pci_mmio64(size, bits)
        end = sum(layout.ram_ranges(size)[-1])
        assert end <= base
        assert base % (1 << 30) == 0
        assert base + span <= 1 << bits
    with pytest.raises(ConfigError):
        layout.pci_mmio64(64 << 30, 36)
