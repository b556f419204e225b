"""bzImage: the setup header, the compressed payload, and the 64-bit and 32-bit entries.

x86 boot.rst §1.2-1.3, §1.14, §1.15.
"""

from __future__ import annotations

from vmm.arch.x86_64 import bootparams, layout
from vmm.arch.x86_64.bootparams import BootParams

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.arch.source import Source
    from vmm.arch.x86_64.places import Places

#: init_size and pref_address came with 2.10, Linux 2.6.31.
VERSION_MIN = 0x020A
ENTRY_64 = 0x200
#: What is read to recognise and describe a kernel.
HEAD = 4096


def recognised(head: bytes) -> bool:
    """Whether a file that starts with ``head`` has the setup header's magics."""
    return head[0x1FE:0x200] == b"\x55\xaa" and head[0x202:0x206] == b"HdrS"


class BzImage:
    """A parsed bzImage; offsets are in its file."""

    __slots__ = ("code", "code_size", "header", "payload", "source", "version")

    def __init__(self, source: Source) -> None:
        """Raises BootError when it is too old, truncated or contradicts itself."""
        self.source = source
        head = source.read(0, bootparams.HEADER_MAX)
        self.header = header = BootParams(head)
        if header["version"] < VERSION_MIN:
            raise source.error(
                f"is a Linux kernel of boot protocol {_dotted(header['version'])}; "
                f"{_dotted(VERSION_MIN)} (Linux 2.6.31) is the oldest that can be booted"
            )
        if not header["loadflags"] & bootparams.LOADED_HIGH:
            raise source.error("is a zImage, which loads low and needs a BIOS; build a bzImage")
        self.code = 512 * ((header["setup_sects"] or 4) + 1)
        self.code_size = 16 * header["syssize"]
        if not self.code_size or self.code + self.code_size > source.size:
            raise source.error(
                f"is truncated: its header speaks of {self.code + self.code_size} bytes and the "
                f"file has {source.size}"
            )
        #: (offset, length) of the compressed vmlinux.
        self.payload = (self.code + header["payload_offset"], header["payload_length"])
        self.version = self._version()

    def _version(self) -> str:
        start = self.header["kernel_version"]
        if not start or start + 0x200 >= self.code:
            return ""
        start += 0x200
        text = self.source.read(start, min(128, self.code - start)).split(b"\0")[0]
        words = text.decode("ascii", "replace").split(" ")
        return "".join(c for c in words[0] if c.isprintable())

    @property
    def is_64bit(self) -> bool:
        header = self.header
        return header["version"] >= 0x020C and bool(header["xloadflags"] & bootparams.XLF_KERNEL_64)

    @property
    def initrd_limit(self) -> int:
        """Where an initrd must end. Linux says 2 GiB to please old loaders; kernels that can be
        loaded above 4 GiB take an initrd anywhere below it."""
        header = self.header
        if header["version"] >= 0x020C and (
            header["xloadflags"] & bootparams.XLF_CAN_BE_LOADED_ABOVE_4G
        ):
            return layout.LOW_RAM_MAX
        return header["initrd_addr_max"] + 1

    @property
    def description(self) -> str:
        bits = 64 if self.is_64bit else 32
        return f"Linux {self.version or '(unknown version)'} bzImage, {bits}-bit"

    def load(self, places: Places) -> tuple[int, int]:
        """Copy the protected-mode code to where the kernel prefers it, with the room it needs to
        unpack itself; returns (first byte, end)."""
        start = self.header["pref_address"]
        size = max(self.header["init_size"], self.code_size)
        places.claim(start, size, "kernel")
        self.source.load(places.memory, start, self.code, self.code_size)
        return start, start + size

    def payload_packing(self) -> str:
        """How the payload is packed; "" when that is not known or there is none. Raises
        BootError when the header places it outside the file."""
        from vmm.arch import unpack

        offset, length = self.payload
        if not length:
            return ""
        if offset + length > self.code + self.code_size:
            raise self.source.error("has a damaged header: its payload lies outside the kernel")
        return unpack.packing(self.source.read(offset, min(length, 16)))

    def unpack_limit(self) -> int:
        """The exact size the payload unpacks to, by its own word, once that is plausible."""
        from vmm.arch import unpack

        offset, length = self.payload
        size = unpack.declared_size(self.source, offset, length)
        most = min(self.header["init_size"], unpack.size_limit(length))
        if not 0 < size <= most:
            raise self.source.error(
                f"has a damaged payload: it claims to unpack to {size} bytes and at most {most} "
                "are possible"
            )
        return size


def _dotted(version: int) -> str:
    return f"{version >> 8}.{version & 0xFF:02}"
