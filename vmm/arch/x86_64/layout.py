"""Where everything is in an x86-64 guest's physical address space.

```
0x0000_0000  RAM up to LOW_RAM_MAX; its first MiB:
             0x500 GDT · 0x6000 PVH/multiboot info · 0x7000 boot_params · 0x9000 page tables
             0x20000 command line · 0x9fc00 reserved (EBDA, VGA) · 0xe0000 ACPI tables
0xc000_0000  PCI MMIO, 32-bit
0xe000_0000  PCI ECAM
0xf000_0000  devices that a user brings
0xfeb0_0000  virtio-mmio · 0xfec0_0000 I/O APIC · 0xfee0_0000 local APIC · 0xfeff_c000 KVM's own
0xff00_0000  the test device's window
0x1_0000_0000  the rest of RAM, then memory that devices bring
```
"""

from __future__ import annotations

from vmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.memory import GuestMemory

MIB = 1 << 20
GIB = 1 << 30
PAGE = 4096

# RAM: below the 32-bit hole, and the rest above 4 GiB.
LOW_RAM_MAX = 0xC000_0000
HIGH_RAM_BASE = 1 << 32

# The first MiB. Boot data lies between BOOT_DATA and EBDA and is free again once the guest runs.
GDT = 0x500
GDT_SIZE = 0x100
FLAT_LOAD = 0x7C00
START_INFO = 0x6000
START_INFO_SIZE = 0x1000
ZERO_PAGE = 0x7000
SETUP_DATA = 0x8000
PAGE_TABLES = 0x9000
CMDLINE = 0x2_0000
CMDLINE_AREA = 0x1_0000
EBDA = 0x9_FC00
ACPI_TABLES = 0xE_0000
ACPI_TABLES_SIZE = 0x2_0000
HIMEM = 0x10_0000

# The 32-bit hole.
PCI_MMIO32 = 0xC000_0000
PCI_MMIO32_SIZE = 0x2000_0000
ECAM = 0xE000_0000
ECAM_SIZE = 0x1000_0000
USER_MMIO = 0xF000_0000
USER_MMIO_SIZE = 0x0800_0000
VIRTIO_MMIO = 0xFEB0_0000
VIRTIO_MMIO_STRIDE = 0x1000
VIRTIO_MMIO_MAX = 32
IOAPIC = 0xFEC0_0000
LAPIC = 0xFEE0_0000
KVM_IDENTITY_MAP = 0xFEFF_C000
KVM_TSS = 0xFEFF_D000  # 3 pages
KVM_RESERVED_SIZE = 0x4000
TESTDEV = 0xFF00_0000
TESTDEV_SIZE = 0x1_0000

#: Where the 64-bit PCI window starts unless RAM reaches further.
PCI_MMIO64_MIN = 0x40_0000_0000
PCI_MMIO64_SIZE = 64 * GIB

#: Where memory of devices starts is a multiple of this: guests add memory in blocks, the largest
#: that Linux uses are 2 GiB.
DEVICE_MEMORY_ALIGN = 2 * GIB

# Types of an E820 entry. ACPI-6.5 §15.
E820_RAM = 1
E820_RESERVED = 2


def ram_ranges(size: int) -> list[tuple[int, int]]:
    """``size`` bytes of RAM as (gpa, size) ranges around the 32-bit hole. Raises ConfigError."""
    if size < HIMEM or size % PAGE:
        raise ConfigError(f"{size} bytes of RAM: at least 1 MiB and whole 4 KiB pages are needed")
    if size <= LOW_RAM_MAX:
        return [(0, size)]
    return [(0, LOW_RAM_MAX), (HIGH_RAM_BASE, size - LOW_RAM_MAX)]


def pci_mmio64(size: int, phys_bits: int = 39) -> tuple[int, int]:
    """(gpa, size) of the 64-bit PCI window for ``size`` bytes of RAM on a CPU with ``phys_bits``
    physical address bits. Above all RAM, aligned to 1 GiB. Raises ConfigError when RAM leaves
    no room for one."""
    top = 1 << phys_bits
    ram_end = max(HIGH_RAM_BASE, size - LOW_RAM_MAX + HIGH_RAM_BASE)
    base = (ram_end + GIB - 1) & ~(GIB - 1)
    if base <= PCI_MMIO64_MIN < top:
        base = PCI_MMIO64_MIN
    room = min(PCI_MMIO64_SIZE, top - base)
    if room < GIB:
        raise ConfigError(
            f"{size // MIB} MiB of RAM leave no room for PCI memory below the CPU's limit of "
            f"{phys_bits} physical address bits; ask for less with --memory"
        )
    return base, room


def device_memory(size: int, phys_bits: int) -> tuple[int, int, int]:
    """(gpa, end, alignment) of what is free above ``size`` bytes of RAM on a CPU with
    ``phys_bits`` physical address bits."""
    ram_end = max(HIGH_RAM_BASE, size - LOW_RAM_MAX + HIGH_RAM_BASE)
    base = (ram_end + DEVICE_MEMORY_ALIGN - 1) // DEVICE_MEMORY_ALIGN * DEVICE_MEMORY_ALIGN
    return base, max(base, 1 << phys_bits), DEVICE_MEMORY_ALIGN


def virtio_mmio(index: int) -> int:
    """Address of the ``index``-th virtio-mmio slot. Raises ConfigError past the last."""
    if not 0 <= index < VIRTIO_MMIO_MAX:
        raise ConfigError(f"virtio-mmio has room for {VIRTIO_MMIO_MAX} devices; use pci for more")
    return VIRTIO_MMIO + index * VIRTIO_MMIO_STRIDE


def low_ram_end(memory: GuestMemory) -> int:
    """The end of the RAM range that starts at 0; 0 when there is none."""
    return next((r.size for r in memory.ranges if r.gpa == 0), 0)


def e820_table(memory: GuestMemory) -> list[tuple[int, int, int]]:
    """The memory map told to the guest: (gpa, size, E820_*) in order, disjoint."""
    table = [
        (EBDA, 0xA_0000 - EBDA, E820_RESERVED),
        (ACPI_TABLES, ACPI_TABLES_SIZE, E820_RESERVED),
        (ECAM, ECAM_SIZE, E820_RESERVED),
        (KVM_IDENTITY_MAP, KVM_RESERVED_SIZE, E820_RESERVED),
    ]
    for r in memory.ranges:
        start, end = r.gpa, r.gpa + r.size
        if start < EBDA:
            table.append((start, min(end, EBDA) - start, E820_RAM))
            start = HIMEM
        if end > start:
            table.append((start, end - start, E820_RAM))
    return sorted(table)
