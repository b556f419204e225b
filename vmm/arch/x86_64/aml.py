"""ACPI Machine Language: only what the machine's DSDT and self-describing devices need.

Every function returns the bytes of one AML term; terms are put together by concatenation.
ACPI-6.5 §20.2 (encoding), §6.4 (resource data).
"""

from __future__ import annotations

import struct

#: Resource sharing and triggering, as `interrupt` takes them. ACPI-6.5 §6.4.3.6.
_CONSUMER, _EDGE, _SHARED = 1 << 0, 1 << 1, 1 << 3


# ---- names and lengths --------------------------------------------------------------------


def pkg_length(size: int) -> bytes:
    """PkgLength of a package whose content is ``size`` bytes; it counts itself.

    ACPI-6.5 §20.2.4. Raises ValueError past 2^28 - 1.
    """
    if size + 1 < 1 << 6:
        return bytes((size + 1,))
    for extra in (1, 2, 3):
        total = size + 1 + extra
        if total < 1 << (4 + 8 * extra):
            low = extra << 6 | total & 0xF
            return bytes((low,)) + (total >> 4).to_bytes(extra, "little")
    raise ValueError(f"an AML package of {size} bytes is too long")


def name_string(path: str) -> bytes:
    r"""NameString: ``\_SB.PCI0``, ``_CRS``, ``^FOO``. Short segments are padded with ``_``.

    ACPI-6.5 §20.2.2. Raises ValueError for a segment that no AML name can be.
    """
    rest = path.lstrip("\\^")
    prefix = path[: len(path) - len(rest)].encode()
    segs = b"".join(_name_seg(s) for s in rest.split(".")) if rest else b""
    count = len(segs) // 4
    if count == 0:
        return prefix + b"\x00"
    if count == 1:
        return prefix + segs
    if count == 2:
        return prefix + b"\x2e" + segs
    return prefix + b"\x2f" + bytes((count,)) + segs


def _name_seg(seg: str) -> bytes:
    good = 1 <= len(seg) <= 4 and seg.isascii() and seg == seg.upper() and not seg[0].isdigit()
    if not good or not seg.replace("_", "A").isalnum():
        raise ValueError(f"{seg!r} is not an AML name segment")
    return seg.ljust(4, "_").encode()


# ---- data ---------------------------------------------------------------------------------


def integer(value: int) -> bytes:
    """The shortest constant for ``value``. ACPI-6.5 §20.2.3."""
    if value in (0, 1):
        return bytes((value,))
    for op, size in ((0x0A, 1), (0x0B, 2), (0x0C, 4), (0x0E, 8)):
        if 0 <= value < 1 << (8 * size):
            return bytes((op,)) + value.to_bytes(size, "little")
    raise ValueError(f"{value:#x} is no 64-bit AML integer")


def string(text: str) -> bytes:
    """A NUL-terminated ASCII string. ACPI-6.5 §20.2.3."""
    return b"\x0d" + text.encode("ascii") + b"\x00"


def buffer(data: bytes) -> bytes:
    """A Buffer that holds ``data``. ACPI-6.5 §20.2.5.4."""
    return _block(b"\x11", integer(len(data)) + data)


def package(*items: bytes) -> bytes:
    """A Package of at most 255 elements. ACPI-6.5 §20.2.5.4."""
    return _block(b"\x12", bytes((len(items),)) + b"".join(items))


def eisa_id(text: str) -> bytes:
    """A compressed EISA id (``PNP0A08``) as an integer. ACPI-6.5 §19.6.36."""
    a, b, c = (ord(ch) - 0x40 for ch in text[:3])
    vendor = a << 10 | b << 5 | c
    return b"\x0c" + struct.pack(">HH", vendor, int(text[3:], 16))


def uuid(text: str) -> bytes:
    """ToUUID: a Buffer with the mixed-endian bytes of a UUID. ACPI-6.5 §19.6.142."""
    p = [int(part, 16) for part in text.split("-")]
    return buffer(struct.pack("<IHH", *p[:3]) + struct.pack(">H", p[3]) + p[4].to_bytes(6, "big"))


# ---- named objects and code ---------------------------------------------------------------


def _block(op: bytes, body: bytes) -> bytes:
    return op + pkg_length(len(body)) + body


def name(path: str, value: bytes) -> bytes:
    """Name (path, value). ACPI-6.5 §20.2.5.1."""
    return b"\x08" + name_string(path) + value


def scope(path: str, *terms: bytes) -> bytes:
    """Scope (path) {...}. ACPI-6.5 §20.2.5.1."""
    return _block(b"\x10", name_string(path) + b"".join(terms))


def device(path: str, *terms: bytes) -> bytes:
    """Device (path) {...}. ACPI-6.5 §20.2.5.2."""
    return _block(b"\x5b\x82", name_string(path) + b"".join(terms))


def method(path: str, args: int, *terms: bytes, serialized: bool = False) -> bytes:
    """Method (path, args) {...}. ACPI-6.5 §20.2.5.2."""
    flags = args | (0x08 if serialized else 0)
    return _block(b"\x14", name_string(path) + bytes((flags,)) + b"".join(terms))


def arg(nr: int) -> bytes:
    return bytes((0x68 + nr,))


def local(nr: int) -> bytes:
    return bytes((0x60 + nr,))


def ret(value: bytes) -> bytes:
    return b"\xa4" + value


def if_(predicate: bytes, *terms: bytes) -> bytes:
    return _block(b"\xa0", predicate + b"".join(terms))


def else_(*terms: bytes) -> bytes:
    return _block(b"\xa1", b"".join(terms))


def equal(a: bytes, b: bytes) -> bytes:
    return b"\x93" + a + b


def not_(a: bytes) -> bytes:
    return b"\x92" + a


def and_(a: bytes, b: bytes, target: bytes = b"\x00") -> bytes:
    return b"\x7b" + a + b + target


def or_(a: bytes, b: bytes, target: bytes = b"\x00") -> bytes:
    return b"\x7d" + a + b + target


def store(value: bytes, target: bytes) -> bytes:
    return b"\x70" + value + target


def create_dword_field(buf: bytes, offset: int, path: str) -> bytes:
    """CreateDWordField (buf, offset in bytes, path). ACPI-6.5 §20.2.5.2."""
    return b"\x8a" + buf + integer(offset) + name_string(path)


# ---- resources ----------------------------------------------------------------------------


def resources(*descriptors: bytes) -> bytes:
    """ResourceTemplate () {...}: a Buffer closed by an End Tag. ACPI-6.5 §6.4.2.8."""
    return buffer(b"".join(descriptors) + b"\x79\x00")


def io(port: int, size: int) -> bytes:
    """I/O ports, 16-bit decode. ``size`` 1..255. ACPI-6.5 §6.4.2.5."""
    return struct.pack("<BBHHBB", 0x47, 1, port, port, 1, size)


def irq(nr: int) -> bytes:
    """An ISA interrupt, edge-triggered and active-high. ACPI-6.5 §6.4.2.1."""
    return struct.pack("<BH", 0x22, 1 << nr)


def interrupt(gsi: int, *, level: bool = False, shared: bool = False) -> bytes:
    """An Extended Interrupt, active-high, by GSI. ACPI-6.5 §6.4.3.6."""
    flags = _CONSUMER | (0 if level else _EDGE) | (_SHARED if shared else 0)
    return struct.pack("<BHBBI", 0x89, 6, flags, 1, gsi)


def memory32_fixed(base: int, size: int) -> bytes:
    """A read-write range below 4 GiB. ACPI-6.5 §6.4.3.4."""
    return struct.pack("<BHBII", 0x86, 9, 1, base, size)


# Address space descriptors, as a bridge produces them: fixed minimum and maximum
# (ACPI-6.5 §6.4.3.5). Resource types: 0 memory (flags: cacheable 0x2, read-write 0x1), 1 I/O
# (flags: entire range 0x3), 2 bus numbers.
_FIXED = 0x0C


def word_bus(first: int, last: int) -> bytes:
    """A range of bus numbers, ends included. ACPI-6.5 §6.4.3.5.3."""
    return struct.pack("<BHBBBHHHHH", 0x88, 13, 2, _FIXED, 0, 0, first, last, 0, last - first + 1)


def word_io(first: int, last: int) -> bytes:
    """A window of I/O ports, ends included. ACPI-6.5 §6.4.3.5.3."""
    return struct.pack("<BHBBBHHHHH", 0x88, 13, 1, _FIXED, 3, 0, first, last, 0, last - first + 1)


def dword_memory(base: int, size: int) -> bytes:
    """A non-cacheable read-write window below 4 GiB. ACPI-6.5 §6.4.3.5.2."""
    return struct.pack("<BHBBBIIIII", 0x87, 23, 0, _FIXED, 1, 0, base, base + size - 1, 0, size)


def qword_memory(base: int, size: int) -> bytes:
    """A non-cacheable read-write window anywhere. ACPI-6.5 §6.4.3.5.1."""
    return struct.pack("<BHBBBQQQQQ", 0x8A, 43, 0, _FIXED, 1, 0, base, base + size - 1, 0, size)
