"""Multiboot 1 payloads: 32-bit protected mode, EBX points to the information structure.

ELF files, and others whose header says where they go. Little-endian. Multiboot-0.6.96 §3.
"""

from __future__ import annotations

import os
import struct

from vmm.arch.x86_64 import layout
from vmm.arch.x86_64.elf import Elf
from vmm.arch.x86_64.places import Area, Places
from vmm.arch.x86_64.request import CMDLINE_MAX
from vmm.arch.x86_64.state import BootState, protected_mode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.arch.source import Source
    from vmm.arch.x86_64.request import Request

HEADER_MAGIC = 0x1BADB002
BOOTLOADER_MAGIC = 0x2BADB002
#: The header lies in the first 8 KiB, on a 4-byte boundary. Multiboot-0.6.96 §3.1.
SEARCH = 8192

# Header flags.
PAGE_ALIGN = 1 << 0
MEMORY_INFO = 1 << 1
VIDEO_MODE = 1 << 2
AOUT_KLUDGE = 1 << 16
#: Features the loader must refuse when it does not know them.
REQUIRED = 0xFFFF

# magic, flags, checksum; then, with AOUT_KLUDGE, header_addr, load_addr, load_end_addr,
# bss_end_addr, entry_addr
HEADER = struct.Struct("<3I")
ADDRESSES = struct.Struct("<5I")

# flags, mem_lower, mem_upper, boot_device, cmdline, mods_count, mods_addr, syms, mmap_length,
# mmap_addr, drives_length, drives_addr, config_table, boot_loader_name. Multiboot-0.6.96 §3.3.
INFO = struct.Struct("<7I16x6I20x")
INFO_MEMORY = 1 << 0
INFO_CMDLINE = 1 << 2
INFO_MODS = 1 << 3
INFO_MEM_MAP = 1 << 6
INFO_BOOT_LOADER_NAME = 1 << 9

MODULE = struct.Struct("<3I4x")  # mod_start, mod_end, string
MMAP = struct.Struct("<I2QI")  # size of the rest, base_addr, length, type (E820's numbers)


def search(head: bytes) -> int | None:
    """The offset of a valid header in ``head``, the first SEARCH bytes of a file."""
    magic = HEADER_MAGIC.to_bytes(4, "little")
    at = head.find(magic)
    while at >= 0 and at + HEADER.size <= len(head):
        if not at % 4 and not sum(HEADER.unpack_from(head, at)) & 0xFFFF_FFFF:
            return at
        at = head.find(magic, at + 1)
    return None


def find_header(source: Source) -> bool:
    return search(source.head(SEARCH)) is not None


def boot(request: Request, source: Source, exe: Elf | None) -> BootState:
    """Load ``source``, which ``exe`` is when it is an ELF file. Raises BootError, ConfigError."""
    offset = search(source.head(SEARCH))
    if offset is None:
        raise source.error("has no multiboot header in its first 8 KiB")
    flags = HEADER.unpack(source.read(offset, HEADER.size))[1]
    if unknown := flags & REQUIRED & ~(PAGE_ALIGN | MEMORY_INFO):
        wanted = "a video mode" if unknown == VIDEO_MODE else f"features {unknown:#x}"
        raise source.error(f"asks by its multiboot header for {wanted}, which there is not")
    places = Places(request.memory, source)
    places.claim(layout.GDT, layout.GDT_SIZE, "the GDT")
    places.claim(layout.START_INFO, layout.START_INFO_SIZE, "the multiboot information")
    places.claim(layout.CMDLINE, layout.CMDLINE_AREA, "the command line")
    cmdline = request.encoded_cmdline(CMDLINE_MAX)
    if flags & AOUT_KLUDGE:
        entry, kernel = _load_by_header(places, source, offset)
    elif exe is None:
        raise source.error("has a multiboot header without addresses and is not an ELF file")
    else:
        kernel = exe.load(places)
        entry = exe.physical(exe.entry)
    state = protected_mode(request.memory, entry)
    modules: list[tuple[int, int, str]] = []
    if request.initrds:
        from vmm.arch.x86_64 import initrd

        modules = initrd.load_modules(places, request.initrds, max(kernel[1], layout.HIMEM))
    state.initrd = [(gpa, size) for gpa, size, _ in modules]
    state.rax = BOOTLOADER_MAGIC
    state.rbx = layout.START_INFO
    _write_info(request, places, cmdline, modules)
    form = f"{exe.bits}-bit ELF file" if exe else "file"
    return request.finish(state, "multiboot", f"multiboot {form}", kernel)


def _load_by_header(places: Places, source: Source, offset: int) -> tuple[int, tuple[int, int]]:
    """Load what the header's addresses say; returns the entry and (first byte, end)."""
    data = source.read(offset + HEADER.size, ADDRESSES.size)
    header_addr, load_addr, load_end, bss_end, entry = ADDRESSES.unpack(data)
    start = offset - (header_addr - load_addr)
    size = load_end - load_addr if load_end else source.size - start
    end = max(load_addr + size, bss_end)
    if not (0 <= start <= offset and 0 < size <= source.size - start):
        raise source.error(
            "has a multiboot header whose addresses do not fit the file: "
            f"header_addr {header_addr:#x}, load_addr {load_addr:#x}, load_end_addr {load_end:#x}"
        )
    if not load_addr <= entry < end:
        raise source.error(f"has its entry point {entry:#x} outside what is loaded")
    places.claim(load_addr, end - load_addr, "code")
    source.load(places.memory, load_addr, start, size)
    return entry, (load_addr, end)


def _write_info(
    request: Request, places: Places, cmdline: bytes, modules: list[tuple[int, int, str]]
) -> None:
    strings = Area(places, layout.CMDLINE, layout.CMDLINE_AREA)
    info = Area(places, layout.START_INFO, layout.START_INFO_SIZE)
    info.skip(INFO.size)
    # By custom the first word is the program's own name.
    name = os.path.basename(places.source.path).encode("ascii", "replace").replace(b" ", b"_")
    table = layout.e820_table(request.memory)
    mmap = info.put(b"".join(MMAP.pack(MMAP.size - 4, *entry) for entry in table))
    mods = b"".join(
        MODULE.pack(gpa, gpa + size, strings.put_string(string)) for gpa, size, string in modules
    )
    fields = (
        INFO_MEMORY
        | INFO_CMDLINE
        | (INFO_MODS if modules else 0)
        | INFO_MEM_MAP
        | INFO_BOOT_LOADER_NAME,
        layout.EBDA >> 10,
        max(0, places.low_end - layout.HIMEM) >> 10,
        0,
        strings.put((name + b" " + cmdline) if len(cmdline) > 1 else name + b"\0"),
        len(modules),
        info.put(mods) if modules else 0,
        MMAP.size * len(table),
        mmap,
        0,
        0,
        0,
        strings.put_string("vmm"),
    )
    request.memory.write(layout.START_INFO, INFO.pack(*fields))
