"""Loading a kernel: what it is, by which protocol it starts, and the vCPU's first state.

Everything a file says is checked before it is used; what cannot be booted is a BootError.
"""

from __future__ import annotations

from vmm.arch.source import Source
from vmm.arch.x86_64 import bzimage, elf, layout, linux
from vmm.arch.x86_64.bzimage import BzImage
from vmm.arch.x86_64.elf import Elf
from vmm.arch.x86_64.places import Places
from vmm.arch.x86_64.request import Request
from vmm.arch.x86_64.state import BootState, real_mode
from vmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.arch.source import Image
    from vmm.errors import BootError
    from vmm.memory import GuestMemory

PROTOCOLS = ("auto", "bzimage", "elf", "pvh", "multiboot", "flat")

#: What "auto" does with a 64-bit bzImage: "elf" unpacks it on the host, once, and enters the
#: vmlinux; "pvh" does too, by its other entry; "bzimage" leaves the unpacking to the guest.
AUTO_BZIMAGE = "elf"


def load_kernel(
    memory: GuestMemory,
    kernel: Image,
    *,
    initrds: Sequence[Image] = (),
    cmdline: str = "",
    protocol: str = "auto",
    rsdp: int | None = None,
    seed: bytes = b"",
    gigabyte_pages: bool = False,
    cache: bool = True,
) -> BootState:
    """Put ``kernel`` (a path, or its bytes) and all it needs into ``memory``, which must read
    as zeros, and say how the boot vCPU starts.

    ``initrds`` are joined for Linux, modules of their own otherwise. ``rsdp``: address of the
    ACPI tables' root. ``seed``: entropy for Linux's generator. ``gigabyte_pages``: the CPU has
    them. ``cache``: unpacked kernels may be kept on disk. Raises BootError for files that cannot
    be booted, ConfigError for a protocol or command line that cannot be.
    """
    if protocol not in PROTOCOLS:
        raise ConfigError(f"boot protocol {protocol!r} is not one of {', '.join(PROTOCOLS)}")
    request = Request(memory, initrds, cmdline, protocol, rsdp, seed, gigabyte_pages, cache)
    try:
        source = Source.open(kernel, "kernel")
        request.opened.append(source)
        return _boot(request, source)
    finally:
        for source in request.opened:
            source.close()


def _boot(request: Request, source: Source) -> BootState:
    if request.protocol == "flat":
        return _boot_flat(request, source)
    head = source.head(bzimage.HEAD)
    if not bzimage.recognised(head) and not head.startswith(elf.MAGIC):
        from vmm.arch.x86_64 import unpacked

        inner = unpacked.whole_file(request, source, head)
        if inner is not None:
            source, head = inner, inner.head(bzimage.HEAD)
    if bzimage.recognised(head):
        return _boot_bzimage(request, source)
    if head.startswith(elf.MAGIC):
        return _boot_elf(request, Elf(source), None)
    from vmm.arch.x86_64 import multiboot

    if request.protocol in ("auto", "multiboot") and multiboot.find_header(source):
        return multiboot.boot(request, source, None)
    raise _refusal(source, request.protocol)


def _refusal(source: Source, protocol: str) -> BootError:
    """The error for a file that is neither bzImage, ELF nor multiboot."""
    from vmm.arch import identify

    head = source.head(identify.HEAD)
    if other := identify.another(head, elf.OWN, source.path):
        return source.error(other)
    what = identify.describe(head)
    wanted = "a bzImage, an x86 ELF kernel or a multiboot payload"
    if protocol != "auto":
        wanted = f"what protocol {protocol} boots"
    return source.error(f"is {what}, not {wanted}")


def _boot_flat(request: Request, source: Source) -> BootState:
    """Raw 16-bit code at FLAT_LOAD, where a BIOS puts a boot sector; nothing is passed."""
    if request.initrds:
        raise ConfigError("a flat payload cannot be given an initrd; nothing would tell it where")
    start = layout.FLAT_LOAD
    Places(request.memory, source).claim(start, source.size, "code")
    source.load(request.memory, start, 0, source.size)
    kernel = (start, start + source.size)
    return request.finish(real_mode(start), "flat", f"flat code, {source.size} bytes", kernel)


def _boot_bzimage(request: Request, source: Source) -> BootState:
    image = BzImage(source)
    protocol = request.protocol
    if protocol == "multiboot":
        raise source.error(f"is a {image.description}, which does not start by multiboot")
    if protocol == "auto":
        protocol = AUTO_BZIMAGE if image.is_64bit else "bzimage"
    if protocol == "bzimage":
        return linux.boot_bzimage(request, image)
    if protocol == "elf" and not image.is_64bit:
        raise source.error(f"is a {image.description}, which only protocol bzimage starts")
    from vmm.arch.x86_64 import unpacked

    inner = unpacked.payload(request, image)
    if inner is not None:
        return _boot_elf(request, Elf(inner), image, protocol)
    if request.protocol == "auto":
        return linux.boot_bzimage(request, image)
    raise source.error(
        f"is a {image.description} whose payload this host cannot unpack; "
        "let it unpack itself with protocol bzimage"
    )


def _boot_elf(request: Request, exe: Elf, image: BzImage | None, protocol: str = "") -> BootState:
    """``image`` is the bzImage that ``exe`` was the payload of, if any."""
    protocol = protocol or request.protocol
    if protocol == "auto":
        protocol = _elf_protocol(exe)
    if protocol == "pvh":
        from vmm.arch.x86_64 import pvh

        return pvh.boot(request, exe, image)
    if protocol == "multiboot":
        from vmm.arch.x86_64 import multiboot

        return multiboot.boot(request, exe.source, exe)
    if protocol == "bzimage":
        raise exe.source.error("is an ELF file, not a bzImage")
    if exe.bits != 64:
        raise exe.source.error(
            "is a 32-bit ELF file without a multiboot header or a PVH note, "
            "so nothing says how it starts"
        )
    return linux.boot_elf(request, exe, image)


def _elf_protocol(exe: Elf) -> str:
    """How "auto" starts an ELF file. A 64-bit Linux is entered in 64-bit mode although it may
    have a PVH note too: that is the shorter way."""
    if exe.bits == 64 and linux.is_linux(exe):
        return "elf"
    from vmm.arch.x86_64 import multiboot, pvh

    if pvh.has_entry(exe):
        return "pvh"
    return "multiboot" if multiboot.find_header(exe.source) else "elf"


__all__ = ["AUTO_BZIMAGE", "PROTOCOLS", "BootState", "load_kernel"]
