"""What a file is that may be a kernel for x86-64. See vmm.arch.base.Kernels."""

from __future__ import annotations

from vmm.arch import unpack
from vmm.arch.x86_64 import bzimage, elf, linux
from vmm.arch.x86_64.bzimage import BzImage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.arch.source import Source

DEBIAN: str = "amd64"
BUILD_IMAGE: str = "arch/x86/boot/bzImage"
IMAGE_PREFIXES: tuple[str, ...] = ("vmlinuz-", "vmlinux-", "bzImage-")
TEXT_ADDRESS: str = r"ffffffff[89a-f][0-9a-f]{7}"
OPTIONS = {
    "64BIT": ("the kernel is not for x86-64", True),
    "SERIAL_8250_CONSOLE": ("nothing is seen on the serial console (--serial)", True),
    "ACPI": ("no power-off, no power button, no PCI interrupts", True),
    "KVM_GUEST": ("slower clocks and locks", True),
    "PVH": ("no PVH entry (--boot pvh); bzImage and ELF still work", False),
}


def is_linux(source: Source) -> bool:
    head = source.head(bzimage.HEAD)
    if bzimage.recognised(head):
        return True
    if head.startswith(elf.MAGIC):
        return linux.is_linux(elf.Elf(source))
    return bool(unpack.packing(head))


def release(source: Source) -> str:
    if bzimage.recognised(source.head(bzimage.HEAD)):
        return BzImage(source).version
    return ""


def recognise(source: Source) -> str:
    head = source.head(bzimage.HEAD)
    if bzimage.recognised(head):
        image = BzImage(source)
        packing = image.payload_packing()
        if not packing:
            text = "not packed in a known way: the guest unpacks itself"
        elif unpack.available(packing):
            text = f"packed with {packing}, which the host unpacks"
        else:
            text = f"packed with {packing}, which needs a Python package here: the guest unpacks it"
        return f"{image.description}, {text}"
    if head.startswith(elf.MAGIC):
        return linux.elf_description(elf.Elf(source), None)
    packing = unpack.packing(head)
    return f"packed with {packing} as a whole" if packing else ""


def payload(source: Source) -> tuple[int, int, str, int] | None:
    head = source.head(bzimage.HEAD)
    if bzimage.recognised(head):
        image = BzImage(source)
        packing = image.payload_packing()
        if not packing or not unpack.available(packing):
            return None
        offset, length = image.payload
        # gzip's own last four bytes are the size; the others have it appended.
        length -= 0 if packing == "gzip" else 4
        return offset, length, packing, image.unpack_limit()
    packing = unpack.packing(head)
    if packing and unpack.available(packing):
        return 0, source.size, packing, unpack.size_limit(source.size)
    return 0, source.size, "", source.size
