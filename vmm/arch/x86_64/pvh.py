"""The PVH entry: an ELF note names a 32-bit entry point, EBX points to ``hvm_start_info``.

Little-endian. xen pvh.pandoc, include/public/arch-x86/hvm/start_info.h.
"""

from __future__ import annotations

import struct

from vmm.arch.x86_64 import layout
from vmm.arch.x86_64.linux import XEN, elf_description, is_linux
from vmm.arch.x86_64.places import Area, Places
from vmm.arch.x86_64.request import CMDLINE_MAX, LINUX_CMDLINE_MAX
from vmm.arch.x86_64.state import BootState, protected_mode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.arch.x86_64.bzimage import BzImage
    from vmm.arch.x86_64.elf import Elf
    from vmm.arch.x86_64.request import Request

XEN_ELFNOTE_PHYS32_ENTRY = 18
XEN_HVM_START_MAGIC_VALUE = 0x336EC578

# magic, version, flags, nr_modules, modlist_paddr, cmdline_paddr, rsdp_paddr, memmap_paddr,
# memmap_entries
HVM_START_INFO = struct.Struct("<4I4QI4x")
# paddr, size, cmdline_paddr
HVM_MODLIST_ENTRY = struct.Struct("<3Q8x")
# addr, size, type (E820's numbers)
HVM_MEMMAP_TABLE_ENTRY = struct.Struct("<2QI4x")


def has_entry(exe: Elf) -> bool:
    return (XEN, XEN_ELFNOTE_PHYS32_ENTRY) in exe.notes


def boot(request: Request, exe: Elf, image: BzImage | None) -> BootState:
    """Load ``exe`` and start it by its PVH entry. Raises BootError, ConfigError."""
    desc = exe.notes.get((XEN, XEN_ELFNOTE_PHYS32_ENTRY))
    if desc is None:
        raise exe.source.error(
            "has no PVH entry note; a Linux kernel needs CONFIG_PVH=y for one, "
            "or use protocol elf or bzimage"
        )
    if len(desc) not in (4, 8):
        raise exe.source.error(f"has a PVH entry note of {len(desc)} bytes; 4 or 8 are expected")
    entry = int.from_bytes(desc, "little")
    if not exe.loaded_at(entry):
        raise exe.source.error(f"has its PVH entry point {entry:#x} outside what is loaded")
    linux = is_linux(exe)
    limit = LINUX_CMDLINE_MAX if linux else CMDLINE_MAX
    if image:
        limit = image.header["cmdline_size"] or limit
    cmdline = request.encoded_cmdline(limit)
    places = Places(request.memory, exe.source)
    places.claim(layout.GDT, layout.GDT_SIZE, "the GDT")
    places.claim(layout.START_INFO, layout.START_INFO_SIZE, "hvm_start_info")
    places.claim(layout.CMDLINE, layout.CMDLINE_AREA, "the command line")
    kernel = exe.load(places)
    state = protected_mode(request.memory, entry)
    modules: list[tuple[int, int, str]] = []
    if request.initrds:
        from vmm.arch.x86_64 import initrd

        if linux:  # looks at the first module only
            modules = [(*initrd.load_joined(places, request.initrds, layout.LOW_RAM_MAX), "")]
        else:
            modules = initrd.load_modules(places, request.initrds, kernel[1])
    state.initrd = [(gpa, size) for gpa, size, _ in modules]
    state.rbx = layout.START_INFO
    _write_start_info(request, places, cmdline, modules)
    return request.finish(state, "pvh", elf_description(exe, image), kernel)


def _write_start_info(
    request: Request, places: Places, cmdline: bytes, modules: list[tuple[int, int, str]]
) -> None:
    strings = Area(places, layout.CMDLINE, layout.CMDLINE_AREA)
    info = Area(places, layout.START_INFO, layout.START_INFO_SIZE)
    info.skip(HVM_START_INFO.size)
    memmap = layout.e820_table(request.memory)
    cmdline_paddr = strings.put(cmdline)
    memmap_paddr = info.put(b"".join(HVM_MEMMAP_TABLE_ENTRY.pack(*entry) for entry in memmap))
    modlist = b"".join(
        HVM_MODLIST_ENTRY.pack(gpa, size, strings.put_string(string) if string else 0)
        for gpa, size, string in modules
    )
    fields = (
        XEN_HVM_START_MAGIC_VALUE,
        1,
        0,
        len(modules),
        info.put(modlist) if modules else 0,
        cmdline_paddr,
        request.rsdp,
        memmap_paddr,
        len(memmap),
    )
    request.memory.write(layout.START_INFO, HVM_START_INFO.pack(*fields))
