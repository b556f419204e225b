"""ELF executables: program headers, notes, and loading. 32 and 64 bits, little-endian x86."""

from __future__ import annotations

import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.arch.source import Source
    from vmm.arch.x86_64.places import Places
    from vmm.errors import BootError

MAGIC = b"\x7fELF"
#: What the host's KVM runs, as vmm.arch.identify has it.
OWN = ("x86-64", "x86")
EM_386 = 3
EM_X86_64 = 62
ET_EXEC = 2
ET_DYN = 3
PT_LOAD = 1
PT_NOTE = 4

TYPES = {1: "a relocatable object (.o or .ko)", 4: "a core dump"}

# e_type, e_machine, e_version, e_entry, e_phoff, e_shoff, e_flags, e_ehsize, e_phentsize, e_phnum
_EHDR = {1: struct.Struct("<HHIIIIIHHH"), 2: struct.Struct("<HHIQQQIHHH")}
# 32: p_type, p_offset, p_vaddr, p_paddr, p_filesz, p_memsz; 64: p_flags comes second.
_PHDR = {1: struct.Struct("<6I8x"), 2: struct.Struct("<I4x5Q8x")}
_NHDR = struct.Struct("<3I")

#: More than any kernel has; bounds the work a hostile file can ask for.
SEGMENTS_MAX = 128
NOTES_SIZE_MAX = 1 << 20


class LoadSegment:
    """One PT_LOAD: where it is in the file, and where in memory."""

    __slots__ = ("filesz", "memsz", "offset", "paddr", "vaddr")

    def __init__(self, offset: int, vaddr: int, paddr: int, filesz: int, memsz: int) -> None:
        self.offset = offset
        self.vaddr = vaddr
        self.paddr = paddr
        self.filesz = filesz
        self.memsz = memsz


class Elf:
    """A parsed executable. ``bits`` is 32 or 64; ``notes`` maps (name, type) to the descriptor."""

    __slots__ = ("bits", "entry", "notes", "segments", "source")

    def __init__(self, source: Source) -> None:
        """Raises BootError when this is no x86 executable, or damaged."""
        self.source = source
        self.segments: list[LoadSegment] = []
        self.notes: dict[tuple[bytes, int], bytes] = {}
        ident = source.read(0, 16)
        kind = ident[4]
        if not ident.startswith(MAGIC) or kind not in _EHDR:
            raise source.error("is not an ELF file of 32 or 64 bits")
        self.bits = 32 * kind
        if ident[5] != 1:
            raise _not_ours(source)
        header = _EHDR[kind].unpack(source.read(16, _EHDR[kind].size))
        type_, machine, _, self.entry, phoff, _, _, _, phentsize, phnum = header
        if machine not in (EM_386, EM_X86_64):
            raise _not_ours(source)
        if type_ not in (ET_EXEC, ET_DYN):
            raise source.error(f"is {TYPES.get(type_, 'no executable')}, not a kernel")
        phdr = _PHDR[kind]
        if phentsize != phdr.size or not 1 <= phnum <= SEGMENTS_MAX:
            raise source.error(
                f"has {phnum} ELF program headers of {phentsize} bytes; 1 to {SEGMENTS_MAX} of "
                f"{phdr.size} are expected"
            )
        for fields in phdr.iter_unpack(source.read(phoff, phnum * phdr.size)):
            self._add(*fields)
        if not self.segments:
            raise source.error("is an ELF file with nothing to load")

    def _add(
        self, type_: int, offset: int, vaddr: int, paddr: int, filesz: int, memsz: int
    ) -> None:
        if type_ == PT_NOTE:
            self._add_notes(offset, filesz)
        if type_ != PT_LOAD or not memsz:
            return
        if filesz > memsz:
            raise self.source.error(
                f"has an ELF segment of {filesz} bytes in the file and {memsz} in memory"
            )
        if offset + filesz > self.source.size:
            raise self.source.error(
                f"is truncated: an ELF segment ends at {offset + filesz:#x} and the file at "
                f"{self.source.size:#x}"
            )
        self.segments.append(LoadSegment(offset, vaddr, paddr, filesz, memsz))

    def _add_notes(self, offset: int, size: int) -> None:
        data = self.source.read(offset, min(size, NOTES_SIZE_MAX))
        pos = 0
        while pos + _NHDR.size <= len(data):
            namesz, descsz, type_ = _NHDR.unpack_from(data, pos)
            name = pos + _NHDR.size
            desc = name + (namesz + 3 & ~3)
            pos = desc + (descsz + 3 & ~3)
            if desc + descsz > len(data):
                return
            key = (data[name : name + namesz].rstrip(b"\0"), type_)
            self.notes.setdefault(key, data[desc : desc + descsz])

    def load(self, places: Places) -> tuple[int, int]:
        """Copy every segment to its physical address; returns (first byte, end). Raises
        BootError when they do not fit or overlap."""
        for nr, s in enumerate(self.segments):
            places.claim(s.paddr, s.memsz, f"segment {nr}")
        for s in self.segments:
            self.source.load(places.memory, s.paddr, s.offset, s.filesz)
        return min(s.paddr for s in self.segments), max(s.paddr + s.memsz for s in self.segments)

    def loaded_at(self, address: int) -> bool:
        """Whether a segment is loaded at the physical ``address``."""
        return any(s.paddr <= address < s.paddr + s.memsz for s in self.segments)

    def physical(self, address: int) -> int:
        """``address`` if a segment is loaded there, else what that virtual address is loaded at.
        Raises BootError when it is neither."""
        if self.loaded_at(address):
            return address
        for s in self.segments:
            if s.vaddr <= address < s.vaddr + s.memsz:
                return address - s.vaddr + s.paddr
        raise self.source.error(f"has its entry point {address:#x} outside what is loaded")


def _not_ours(source: Source) -> BootError:
    from vmm.arch import identify

    head = source.head(64)
    text = identify.another(head, OWN, source.path)
    return source.error(text or "is a big-endian ELF file")
