"""Kernels small enough to make on the spot, in every form the loaders know."""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
from collections.abc import Callable, Sequence

import lz4.block  # type: ignore[import-untyped]
import lz4.frame  # type: ignore[import-untyped]
import zstandard

BASE = 0x1000000
ENTRY = BASE + 0x40
CODE = b"\xf4" * 64 + b"\xeb\xfe" + bytes(range(256)) * 8

PHYS32_ENTRY = 18
GUEST_OS = 6


def note(name: bytes, type_: int, desc: bytes) -> bytes:
    name += b"\0"
    head = struct.pack("<3I", len(name), len(desc), type_)
    return head + name + bytes(-len(name) % 4) + desc + bytes(-len(desc) % 4)


LINUX_NOTES = note(b"Xen", GUEST_OS, b"linux\0") + note(b"Linux", 0x101, b"6.1.0\0")
PVH_NOTE = note(b"Xen", PHYS32_ENTRY, struct.pack("<Q", ENTRY + 1))

Segment = tuple[int, bytes, int]  # paddr, data, memsz


def elf(
    *,
    bits: int = 64,
    segments: Sequence[Segment] = ((BASE, CODE, len(CODE) + 0x3000),),
    entry: int = ENTRY,
    notes: bytes = b"",
    machine: int | None = None,
    type_: int = 2,
    virtual: int = 0,
    data: int = 1,
    prefix: bytes = b"",
) -> bytes:
    """An executable; ``virtual`` is added to each p_vaddr, ``prefix`` follows the headers."""
    if machine is None:
        machine = 62 if bits == 64 else 3
    ehdr, phdr = (64, 56) if bits == 64 else (52, 32)
    count = len(segments) + bool(notes)
    offset = ehdr + phdr * count + len(prefix)
    offset += -offset % 4
    table, body = b"", b""

    def add(kind: int, paddr: int, blob: bytes, memsz: int) -> None:
        nonlocal table, body
        at = offset + len(body)
        vaddr = paddr + virtual
        if bits == 64:
            table += struct.pack("<2I6Q", kind, 7, at, vaddr, paddr, len(blob), memsz, 4096)
        else:
            table += struct.pack("<8I", kind, at, vaddr, paddr, len(blob), memsz, 7, 4096)
        body += blob + bytes(-len(blob) % 4)

    for paddr, blob, memsz in segments:
        add(1, paddr, blob, memsz)
    if notes:
        add(4, 0, notes, len(notes))
    ident = b"\x7fELF" + bytes([bits // 32, data, 1]) + bytes(9)
    form = "<HHIQQQIHHHHHH" if bits == 64 else "<HHIIIIIHHHHHH"
    head = struct.pack(form, type_, machine, 1, entry, ehdr, 0, 0, ehdr, phdr, count, 0, 0, 0)
    head = ident + head + table + prefix
    return head + bytes(-len(head) % 4) + body


def vmlinux(**changes: object) -> bytes:
    """A 64-bit Linux with both entries."""
    return elf(notes=LINUX_NOTES + PVH_NOTE, **changes)  # type: ignore[arg-type]


def lz4_legacy(data: bytes, block: int = 8 << 20) -> bytes:
    out = b"\x02\x21\x4c\x18"
    for at in range(0, len(data), block):
        packed = lz4.block.compress(data[at : at + block], store_size=False)
        out += struct.pack("<I", len(packed)) + packed
    return out


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda d: gzip.compress(d, mtime=0),
    "xz": lambda d: lzma.compress(d, lzma.FORMAT_XZ, lzma.CHECK_CRC32, preset=0),
    "lzma": lambda d: lzma.compress(d, lzma.FORMAT_ALONE, preset=0),
    "bzip2": bz2.compress,
    "lz4": lz4_legacy,
    "lz4 frame": lz4.frame.compress,
    "zstd": lambda d: zstandard.ZstdCompressor(write_content_size=False).compress(d),
}


def payload(kind: str, data: bytes) -> bytes:
    """What the kernel's build puts into a bzImage: packed, then the size unless gzip has it."""
    packed = PACKERS[kind](data)
    return packed if kind == "gzip" else packed + struct.pack("<I", len(data))


SETUP_SECTS = 3
SETUP_SIZE = 512 * (SETUP_SECTS + 1)
VERSION = b"6.1.0-test (someone@somewhere) #1"


def bzimage(packed: bytes = b"", *, tail: bytes = b"signature", **fields: int) -> bytes:
    """A bzImage around ``packed``; ``fields`` override the setup header's (see BootParams)."""
    from vmm.arch.x86_64.bootparams import FIELDS

    code = bytes(0x200) + CODE
    code += bytes(-len(code) % 16)
    at = len(code)
    code += packed
    code += bytes(-len(code) % 16)
    setup = bytearray(SETUP_SIZE)
    values = {
        "setup_sects": SETUP_SECTS,
        "syssize": len(code) // 16,
        "boot_flag": 0xAA55,
        "jump": 0x6AEB,
        "header": 0x53726448,
        "version": 0x020F,
        "kernel_version": 0x300,
        "loadflags": 1,
        "sentinel": 0xFF,
        "initrd_addr_max": 0x7FFF_FFFF,
        "kernel_alignment": 0x200000,
        "relocatable_kernel": 1,
        "xloadflags": 0x7F,
        "cmdline_size": 2047,
        "payload_offset": at if packed else 0,
        "payload_length": len(packed),
        "pref_address": BASE,
        "init_size": 0x200000,
        **fields,
    }
    for name, value in values.items():
        offset, size = FIELDS[name]
        setup[offset : offset + size] = value.to_bytes(size, "little")
    setup[0x500 : 0x500 + len(VERSION)] = VERSION
    return bytes(setup) + code + tail


def multiboot_header(flags: int = 3, addresses: Sequence[int] = ()) -> bytes:
    magic = 0x1BADB002
    checksum = -(magic + flags) & 0xFFFF_FFFF
    return struct.pack("<3I", magic, flags, checksum) + struct.pack(
        f"<{len(addresses)}I", *addresses
    )


def multiboot_elf(flags: int = 3, bits: int = 32, **changes: object) -> bytes:
    base = 0x400000
    code = multiboot_header(flags) + CODE
    values: dict[str, object] = {
        "bits": bits,
        "segments": ((base, code, len(code) + 0x5000),),
        "entry": base + 12,
        **changes,
    }
    return elf(**values)  # type: ignore[arg-type]


def multiboot_flat(base: int = 0x200000, bss: int = 0x4000, pad: int = 16) -> bytes:
    """A payload that is no ELF file: the header, after ``pad`` bytes, has the addresses."""
    size = pad + 32 + len(CODE)
    addresses = (base + pad, base, base + size, base + size + bss, base + pad + 32)
    return bytes(pad) + multiboot_header(0x10003, addresses) + CODE
