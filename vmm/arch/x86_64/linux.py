"""Entering Linux with a zero page: the 64-bit protocol for bzImage and vmlinux, and the 32-bit
one for 32-bit bzImages. x86 boot.rst §1.14, §1.15.
"""

from __future__ import annotations

from vmm.arch.x86_64 import bzimage, layout
from vmm.arch.x86_64.bootparams import BootParams
from vmm.arch.x86_64.places import Places
from vmm.arch.x86_64.request import LINUX_CMDLINE_MAX
from vmm.arch.x86_64.state import PAGE_TABLES_SIZE, BootState, long_mode, protected_mode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.arch.source import Source
    from vmm.arch.x86_64.bzimage import BzImage
    from vmm.arch.x86_64.elf import Elf
    from vmm.arch.x86_64.request import Request

XEN = b"Xen"
XEN_ELFNOTE_GUEST_OS = 6


def boot_bzimage(request: Request, image: BzImage) -> BootState:
    """Enter ``image`` where it unpacks itself."""
    places = _places(request, image.source)
    cmdline = request.encoded_cmdline(image.header["cmdline_size"])
    kernel = image.load(places)
    start = kernel[0]
    if image.is_64bit:
        entry = start + bzimage.ENTRY_64
        state = long_mode(request.memory, entry, gigabyte_pages=request.gigabyte_pages)
    else:
        state = protected_mode(request.memory, start)
    _pass_boot_params(request, places, state, image.header, cmdline, image.initrd_limit)
    return request.finish(state, "bzimage", f"{image.description}, unpacks itself", kernel)


def boot_elf(request: Request, exe: Elf, image: BzImage | None) -> BootState:
    """Enter a 64-bit vmlinux. ``image`` is the bzImage it was the payload of, if any."""
    places = _places(request, exe.source)
    header = image.header if image else BootParams.synthetic()
    cmdline = request.encoded_cmdline(header["cmdline_size"] or LINUX_CMDLINE_MAX)
    kernel = exe.load(places)
    entry = exe.physical(exe.entry)
    state = long_mode(request.memory, entry, gigabyte_pages=request.gigabyte_pages)
    initrd_limit = image.initrd_limit if image else layout.LOW_RAM_MAX
    _pass_boot_params(request, places, state, header, cmdline, initrd_limit)
    return request.finish(state, "elf", elf_description(exe, image), kernel)


def is_linux(exe: Elf) -> bool:
    """Whether the notes name Linux."""
    guest_os = exe.notes.get((XEN, XEN_ELFNOTE_GUEST_OS), b"")
    return guest_os.rstrip(b"\0") == b"linux" or any(name == b"Linux" for name, _ in exe.notes)


def elf_description(exe: Elf, image: BzImage | None) -> str:
    if image:
        return f"{image.description}, unpacked by the host"
    return f"{'Linux vmlinux' if is_linux(exe) else 'ELF file'}, {exe.bits}-bit"


def _places(request: Request, source: Source) -> Places:
    """Memory with what these protocols need already taken."""
    places = Places(request.memory, source)
    places.claim(layout.GDT, layout.GDT_SIZE, "the GDT")
    places.claim(layout.ZERO_PAGE, layout.PAGE, "boot_params")
    places.claim(layout.SETUP_DATA, layout.PAGE, "setup_data")
    places.claim(layout.PAGE_TABLES, PAGE_TABLES_SIZE, "the page tables")
    places.claim(layout.CMDLINE, layout.CMDLINE_AREA, "the command line")
    return places


def _pass_boot_params(
    request: Request,
    places: Places,
    state: BootState,
    header: BootParams,
    cmdline: bytes,
    initrd_limit: int,
) -> None:
    """Load the initrds, then fill and write the zero page."""
    memory = request.memory
    header.set_loader()
    header.set_ramdisk(0, 0)
    if request.initrds:
        from vmm.arch.x86_64.initrd import load_joined

        gpa, size = load_joined(places, request.initrds, initrd_limit)
        header.set_ramdisk(gpa, size)
        state.initrd = [(gpa, size)]
    memory.write(layout.CMDLINE, cmdline)
    header.set_cmdline(layout.CMDLINE)
    header.set_e820(layout.e820_table(memory))
    header["acpi_rsdp_addr"] = request.rsdp
    if request.seed:
        header.set_seed(memory, request.seed)
    memory.write(layout.ZERO_PAGE, header.data)
    state.rsi = layout.ZERO_PAGE
