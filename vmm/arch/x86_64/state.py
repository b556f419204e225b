"""What the boot vCPU starts with: registers, descriptor and page tables."""

from __future__ import annotations

import struct

from vmm.arch.x86_64 import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.memory import GuestMemory

CR0_PE = 1 << 0
CR0_ET = 1 << 4
CR0_PG = 1 << 31
CR4_PAE = 1 << 5
EFER_LME = 1 << 8
EFER_LMA = 1 << 10
RFLAGS_RESERVED = 1 << 1

# Selectors that x86 boot.rst asks for: __BOOT_CS and __BOOT_DS. x86 boot.rst §1.14.
BOOT_CS = 0x10
BOOT_DS = 0x18
BOOT_TSS = 0x20

# Segment types. Intel SDM vol 3 §3.4.5.1 and §3.5.
CODE = 0xB  # execute, read, accessed
DATA = 0x3  # read, write, accessed
TSS_BUSY = 0xB

PTE_PRESENT_RW = 0x3
PTE_LARGE = 0x80


class Segment:
    """One segment register, its hidden part included; the names are ``struct kvm_segment``'s.

    ``limit`` is in bytes whatever ``g`` says. KVM api.rst §4.13.
    """

    __slots__ = ("base", "db", "dpl", "g", "l", "limit", "present", "s", "selector", "type")

    def __init__(
        self,
        selector: int,
        type: int,
        *,
        base: int = 0,
        limit: int = 0xFFFF_FFFF,
        s: int = 1,
        l: int = 0,  # noqa: E741 - kvm_segment's name
        db: int = 0,
        g: int = 1,
    ) -> None:
        self.selector = selector
        self.type = type
        self.base = base
        self.limit = limit
        self.s = s
        self.l = l
        self.db = db
        self.g = g
        self.dpl = 0
        self.present = 1

    def descriptor(self) -> int:
        """The low 8 bytes of its table entry. Intel SDM vol 3 §3.4.5."""
        limit = self.limit >> 12 if self.g else self.limit
        access = self.type | self.s << 4 | self.dpl << 5 | self.present << 7
        flags = self.l << 1 | self.db << 2 | self.g << 3
        return (
            limit & 0xFFFF
            | (self.base & 0xFF_FFFF) << 16
            | access << 40
            | (limit >> 16) << 48
            | flags << 52
            | (self.base >> 24 & 0xFF) << 56
        )


class BootState:
    """All that the boot vCPU needs, and what was loaded where.

    ``mode`` is "long", "protected" or "real". In real mode only ``cs``, ``ds``, ``rip`` and
    ``rsp`` are to be set and everything else keeps its value at power-on; otherwise every
    register named here is, ``ds`` also being es, fs, gs and ss, and the LDT unusable.
    """

    __slots__ = (
        "cmdline",
        "cr0",
        "cr3",
        "cr4",
        "cs",
        "description",
        "ds",
        "e820",
        "efer",
        "entry",
        "gdt_base",
        "gdt_limit",
        "initrd",
        "kernel",
        "kind",
        "mode",
        "rax",
        "rbx",
        "rflags",
        "rip",
        "rsi",
        "rsp",
        "tr",
    )

    def __init__(self, mode: str, entry: int, cs: Segment, ds: Segment, tr: Segment) -> None:
        self.mode = mode
        self.entry = self.rip = entry
        self.rax = self.rbx = self.rsi = self.rsp = 0
        self.rflags = RFLAGS_RESERVED
        self.cr0 = self.cr3 = self.cr4 = self.efer = 0
        self.gdt_base = self.gdt_limit = 0
        self.cs = cs
        self.ds = ds
        self.tr = tr
        #: The protocol used: "bzimage", "elf", "pvh", "multiboot" or "flat".
        self.kind = ""
        #: One line for people: what was recognised and how it is entered.
        self.description = ""
        self.cmdline = ""
        #: (first byte, end) of the kernel in guest memory, what it will need at start included.
        self.kernel: tuple[int, int] = (0, 0)
        #: (gpa, size) of each initrd or module.
        self.initrd: list[tuple[int, int]] = []
        #: The memory map told to the guest: (gpa, size, E820_*).
        self.e820: list[tuple[int, int, int]] = []

    def summary(self) -> list[str]:
        """Lines for ``--dry-run``."""
        lines = [
            f"kernel    {self.kernel[0]:#x}-{self.kernel[1] - 1:#x}  {self.description}",
            f"entry     {self.entry:#x} ({self.mode} mode, {self.kind} protocol)",
        ]
        lines += [f"initrd    {gpa:#x}-{gpa + size - 1:#x}" for gpa, size in self.initrd]
        lines += [f"cmdline   {self.cmdline}"] if self.cmdline else []
        names = {layout.E820_RAM: "ram", layout.E820_RESERVED: "reserved"}
        lines += [
            f"e820      {gpa:#x}-{gpa + size - 1:#x} {names[kind]}" for gpa, size, kind in self.e820
        ]
        return lines


def long_mode(memory: GuestMemory, entry: int, *, gigabyte_pages: bool = False) -> BootState:
    """64-bit mode, the first 4 GiB identity-mapped; writes GDT and page tables.
    x86 boot.rst §1.15."""
    cs = Segment(BOOT_CS, CODE, l=1)
    state = BootState("long", entry, cs, Segment(BOOT_DS, DATA, db=1), _tss())
    state.cr0 = CR0_PG | CR0_ET | CR0_PE
    state.cr3 = layout.PAGE_TABLES
    state.cr4 = CR4_PAE
    state.efer = EFER_LME | EFER_LMA
    _write_gdt(memory, state)
    _write_page_tables(memory, gigabyte_pages)
    return state


def protected_mode(memory: GuestMemory, entry: int) -> BootState:
    """32-bit mode, flat, paging off; writes the GDT. x86 boot.rst §1.14."""
    cs = Segment(BOOT_CS, CODE, db=1)
    state = BootState("protected", entry, cs, Segment(BOOT_DS, DATA, db=1), _tss())
    state.cr0 = CR0_ET | CR0_PE
    _write_gdt(memory, state)
    return state


def real_mode(entry: int) -> BootState:
    """16-bit real mode at 0000:``entry``, the stack below it."""
    cs = Segment(0, CODE, limit=0xFFFF, g=0)
    ds = Segment(0, DATA, limit=0xFFFF, g=0)
    state = BootState("real", entry, cs, ds, Segment(0, TSS_BUSY, limit=0xFFFF, s=0, g=0))
    state.cr0 = CR0_ET
    state.rsp = entry
    return state


def _tss() -> Segment:
    # Never used, but VM entry wants TR to hold a busy one. Intel SDM vol 3 §26.3.1.2.
    return Segment(BOOT_TSS, TSS_BUSY, limit=0x67, s=0, g=0)


def _write_gdt(memory: GuestMemory, state: BootState) -> None:
    entries = (
        0,
        0,
        state.cs.descriptor(),
        state.ds.descriptor(),
        state.tr.descriptor(),
        0,  # a TSS takes two entries in long mode
    )
    memory.write(layout.GDT, struct.pack("<6Q", *entries))
    state.gdt_base = layout.GDT
    state.gdt_limit = 8 * len(entries) - 1


def _write_page_tables(memory: GuestMemory, gigabyte_pages: bool) -> None:
    """PML4, one PDPT, and four page directories unless 1 GiB pages do. Intel SDM vol 3 §4.5."""
    pml4 = layout.PAGE_TABLES
    pdpt = pml4 + layout.PAGE
    memory.write_int(pml4, pdpt | PTE_PRESENT_RW, 8)
    large = PTE_PRESENT_RW | PTE_LARGE
    if gigabyte_pages:
        memory.write(pdpt, struct.pack("<4Q", *range(large, 4 * layout.GIB, layout.GIB)))
        return
    directory = pdpt + layout.PAGE
    pages = range(directory | PTE_PRESENT_RW, directory + 4 * layout.PAGE, layout.PAGE)
    memory.write(pdpt, struct.pack("<4Q", *pages))
    memory.write(directory, struct.pack("<2048Q", *range(large, 4 * layout.GIB, 2 * layout.MIB)))


#: What ``long_mode`` writes, from layout.PAGE_TABLES on.
PAGE_TABLES_SIZE = 6 * layout.PAGE
