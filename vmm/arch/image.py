"""The Image of arm64 and riscv64: its header, the forms it is packed in, and loading it.

Linux arch/arm64/booting.rst §4, arch/riscv/boot-image-header.rst, drivers/firmware/efi/libstub's
zboot. The two headers are one: 64 bytes with the same fields in the same places but for a version
and two magics.
"""

from __future__ import annotations

import os
import struct

from vmm.arch import unpack
from vmm.arch.source import Source

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.memory import GuestMemory

MIB = 1 << 20
#: code0, code1, text_offset, image_size, flags.
_HEADER = struct.Struct("<2I3Q32x")
HEADER_SIZE = _HEADER.size
#: Where a kernel may lie: multiples of this, and its text offset from there.
ALIGN = 2 * MIB
#: More than any kernel needs, its bss included: what claims it is damaged.
SIZE_MAX = 1 << 30
_BIG_ENDIAN = 1

#: "MZ", "zimg", offset and length of the packed Image. zboot-header.S.
_ZBOOT = struct.Struct("<2s2x4s2I")


class Format:
    """What is different between the two. ``name`` is as vmm.arch.identify has it; with
    ``old_offset`` a header without a size is of an old kernel with that text offset, else it is
    damaged."""

    __slots__ = ("magics", "name", "offset_step", "old_offset")

    def __init__(
        self,
        name: str,
        magics: tuple[tuple[int, bytes], ...],
        offset_step: int,
        old_offset: int | None,
    ) -> None:
        self.name = name
        #: (offset, bytes), one of which a header has.
        self.magics = magics
        #: Text offsets are multiples of this.
        self.offset_step = offset_step
        self.old_offset = old_offset


ARM64 = Format("arm64", ((0x38, b"ARM\x64"),), 4096, 0x8_0000)
#: Headers before version 0.2 have the other magic alone.
RISCV64 = Format("RISC-V", ((0x38, b"RSC\x05"), (0x30, b"RISCV\0\0\0")), ALIGN, None)


class Image:
    """A recognised Image. ``size`` is what it needs in memory from its first byte on."""

    __slots__ = ("description", "size", "source", "text_offset")

    def __init__(self, source: Source, form: Format) -> None:
        """Raises BootError when this is no Image for ``form``, or damaged. ``source`` stays the
        caller's."""
        self.source = source
        if source.size < HEADER_SIZE:
            raise source.error(f"is {source.size} bytes long, too short for a kernel Image")
        head = source.read(0, HEADER_SIZE)
        _, _, offset, size, flags = _HEADER.unpack(head)
        if not any(head.startswith(magic, at) for at, magic in form.magics):
            raise source.error(_refusal(source, form))
        if flags & _BIG_ENDIAN:
            raise source.error(
                f"is a big-endian kernel for {form.name}, and only little-endian ones are booted "
                "here; build it so"
            )
        if not size:
            if form.old_offset is None:
                raise source.error("has a damaged header: it does not say how much memory it needs")
            offset, size = form.old_offset, source.size
        if size > SIZE_MAX:
            raise source.error(
                f"has a damaged header: it claims to need {size} bytes, and at most {SIZE_MAX} are "
                "plausible"
            )
        if offset % form.offset_step or offset > SIZE_MAX:
            raise source.error(
                f"has a damaged header: its text offset is {offset:#x}, which is no multiple of "
                f"{form.offset_step:#x} below {SIZE_MAX:#x}"
            )
        self.text_offset = offset
        self.size = size
        self.description = f"Linux Image for {form.name}, {source.size} bytes"

    def load(self, memory: GuestMemory, base: int) -> tuple[int, int]:
        """Copy it to its offset from ``base``, a multiple of ALIGN in RAM; returns (its first
        byte, which is the entry, and the end of what it needs). Raises BootError when the RAM
        does not reach that far."""
        start = base + self.text_offset
        end = start + self.size
        if not memory.contains(start, self.size):
            have = memory.size // MIB
            need = -(-(end - base) // MIB)
            raise self.source.error(
                f"needs {need} MiB of RAM to start in and the guest has {have} MiB; "
                "give it more with --memory"
            )
        # What follows in the file is no part of the kernel: a signature, say.
        self.source.load(memory, start, 0, min(self.source.size, self.size))
        return start, end


def open_image(source: Source, form: Format) -> Image:
    """The Image in a file: as it is, packed as a whole (Image.gz), or in an EFI program that
    unpacks itself (zboot). ``Image.source`` is ``source``, or a new one that the caller closes.
    Raises BootError."""
    inner = source
    limit = min(unpack.size_limit(source.size), SIZE_MAX)
    # An EFI program may be packed once more, by whoever packs every kernel the same.
    for _ in range(2):
        where = _packed(inner)
        if where is None:
            break
        outer = inner
        try:
            inner = _unpacked(outer, *where, limit)
        finally:
            if outer is not source:
                outer.close()
    try:
        return Image(inner, form)
    except BaseException:
        if inner is not source:
            inner.close()
        raise


def _packed(source: Source) -> tuple[int, int, str] | None:
    """(offset, length, how) of what is packed in a file; None when it is not."""
    head = source.head(HEADER_SIZE)
    kind = unpack.packing(head)
    if kind:
        return 0, source.size, kind
    if len(head) < _ZBOOT.size:
        return None
    mz, zimg, offset, length = _ZBOOT.unpack_from(head)
    if (mz, zimg) != (b"MZ", b"zimg"):
        return None
    if not length or offset + length > source.size:
        raise source.error(
            f"is truncated: its packed kernel is {length} bytes at {offset:#x} and the file has "
            f"{source.size:#x}"
        )
    kind = unpack.packing(source.read(offset, min(length, 16)))
    if not kind:
        name = head[24:32].split(b"\0")[0].decode("ascii", "replace")
        raise source.error(f"is an EFI zboot kernel packed in a way that is not known ({name!r})")
    return offset, length, kind


def _unpacked(source: Source, offset: int, length: int, kind: str, limit: int) -> Source:
    """In memory of its own. Raises BootError, before all of it is unpacked when it is too long."""
    fd = os.memfd_create("vmm-kernel", os.MFD_CLOEXEC)
    try:
        size = unpack.write_sparse(fd, unpack.unpack(source, offset, length, kind, limit))
        if not size:
            raise source.error(f"holds nothing but empty {kind} data")
    except OSError as e:
        os.close(fd)
        raise source.error(f"cannot be unpacked: {e.strerror}") from e
    except BaseException:
        os.close(fd)
        raise
    return Source(source.name, size, fd=fd, what=source.what)


def _refusal(source: Source, form: Format) -> str:
    from vmm.arch import identify

    head = source.head(identify.HEAD)
    other = identify.another(head, (form.name,), source.path)
    return other or f"is {identify.describe(head)}, not a kernel Image for {form.name}"
