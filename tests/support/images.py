"""Images of arm64 and riscv64, small enough to make on the spot."""

from __future__ import annotations

import struct
from collections.abc import Callable

from tests.support import kernels
from vmm.arch import image

BODY = bytes(range(256)) * 32

#: By the name the loader knows it by: the format, and the magics of its header.
FORMATS = {
    "arm64": (image.ARM64, bytes(8), b"ARM\x64"),
    "RISC-V": (image.RISCV64, b"RISCV\0\0\0", b"RSC\x05"),
}


def make(
    name: str,
    *,
    text_offset: int | None = None,
    size: int = 3 << 20,
    flags: int = 0,
    magic: bytes | None = None,
    magic2: bytes | None = None,
    body: bytes = BODY,
) -> bytes:
    """An Image; ``text_offset`` is what today's kernels have unless it is given."""
    _, first, second = FORMATS[name]
    if text_offset is None:
        text_offset = 0 if name == "arm64" else 2 << 20
    return (
        struct.pack("<2I3Q", 0x91005A4D, 0x14000000, text_offset, size, flags)
        + bytes(16)
        + (first if magic is None else magic)
        + (second if magic2 is None else magic2)
        + bytes(4)
        + body
    )


def zboot(payload: bytes, kind: bytes = b"gzip", *, offset: int = 0x200) -> bytes:
    """An EFI program that unpacks itself. zboot-header.S."""
    head = struct.pack("<2s2x4s2I", b"MZ", b"zimg", offset, len(payload)) + bytes(8) + kind
    return head.ljust(offset, b"\0") + payload + bytes(64)


PACKERS: dict[str, Callable[[bytes], bytes]] = kernels.PACKERS
