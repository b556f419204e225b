"""``struct boot_params``, the zero page of Linux, and the setup header inside it.

Little-endian throughout. x86 boot.rst §1.2, x86 zero-page.rst.
"""

from __future__ import annotations

import struct

from vmm.arch.x86_64 import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.memory import GuestMemory

SIZE = 4096
#: Where the setup header starts, in a bzImage and in the zero page, and the most it may reach.
HEADER = 0x1F1
HEADER_MAX = 0x290
BOOT_FLAG = 0xAA55
HEADER_MAGIC = 0x53726448  # "HdrS"

# loadflags
LOADED_HIGH = 1 << 0
KEEP_SEGMENTS = 1 << 6
CAN_USE_HEAP = 1 << 7
# xloadflags
XLF_KERNEL_64 = 1 << 0
XLF_CAN_BE_LOADED_ABOVE_4G = 1 << 1

SETUP_RNG_SEED = 9
E820_MAX_ENTRIES = 128
E820_TABLE = 0x2D0

#: name: (offset, bytes)
FIELDS = {
    "acpi_rsdp_addr": (0x070, 8),
    "ext_ramdisk_image": (0x0C0, 4),
    "ext_ramdisk_size": (0x0C4, 4),
    "ext_cmd_line_ptr": (0x0C8, 4),
    "alt_mem_k": (0x1E0, 4),
    "e820_entries": (0x1E8, 1),
    "sentinel": (0x1EF, 1),
    "setup_sects": (0x1F1, 1),
    "syssize": (0x1F4, 4),
    "vid_mode": (0x1FA, 2),
    "boot_flag": (0x1FE, 2),
    "jump": (0x200, 2),
    "header": (0x202, 4),
    "version": (0x206, 2),
    "kernel_version": (0x20E, 2),
    "type_of_loader": (0x210, 1),
    "loadflags": (0x211, 1),
    "code32_start": (0x214, 4),
    "ramdisk_image": (0x218, 4),
    "ramdisk_size": (0x21C, 4),
    "heap_end_ptr": (0x224, 2),
    "cmd_line_ptr": (0x228, 4),
    "initrd_addr_max": (0x22C, 4),
    "kernel_alignment": (0x230, 4),
    "relocatable_kernel": (0x234, 1),
    "xloadflags": (0x236, 2),
    "cmdline_size": (0x238, 4),
    "payload_offset": (0x248, 4),
    "payload_length": (0x24C, 4),
    "setup_data": (0x250, 8),
    "pref_address": (0x258, 8),
    "init_size": (0x260, 4),
}


class BootParams:
    """A zero page being filled; ``self["name"]`` is a field of FIELDS."""

    __slots__ = ("data",)

    def __init__(self, setup: bytes = b"") -> None:
        """``setup`` is the first part of a bzImage; only its setup header is taken."""
        self.data = bytearray(SIZE)
        if setup:
            end = min(0x202 + setup[0x201], HEADER_MAX, len(setup))
            self.data[HEADER:end] = setup[HEADER:end]

    @classmethod
    def synthetic(cls) -> BootParams:
        """The header for a kernel that comes without one: an ELF vmlinux."""
        self = cls()
        self["boot_flag"] = BOOT_FLAG
        self["header"] = HEADER_MAGIC
        self["version"] = 0x020C
        self["loadflags"] = LOADED_HIGH
        self["kernel_alignment"] = 2 * layout.MIB
        return self

    def __getitem__(self, name: str) -> int:
        offset, size = FIELDS[name]
        return int.from_bytes(self.data[offset : offset + size], "little")

    def __setitem__(self, name: str, value: int) -> None:
        offset, size = FIELDS[name]
        self.data[offset : offset + size] = value.to_bytes(size, "little")

    def set_loader(self) -> None:
        """Fields every boot loader writes. x86 boot.rst §1.3."""
        self["vid_mode"] = 0xFFFF  # "normal"
        self["type_of_loader"] = 0xFF  # no assigned id
        self["loadflags"] = self["loadflags"] & ~(CAN_USE_HEAP | KEEP_SEGMENTS)
        self["code32_start"] = 0
        self["setup_data"] = 0

    def set_cmdline(self, gpa: int) -> None:
        self["cmd_line_ptr"] = gpa & 0xFFFF_FFFF
        self["ext_cmd_line_ptr"] = gpa >> 32

    def set_ramdisk(self, gpa: int, size: int) -> None:
        self["ramdisk_image"] = gpa & 0xFFFF_FFFF
        self["ramdisk_size"] = size & 0xFFFF_FFFF
        self["ext_ramdisk_image"] = gpa >> 32
        self["ext_ramdisk_size"] = size >> 32

    def set_e820(self, table: list[tuple[int, int, int]]) -> None:
        table = table[:E820_MAX_ENTRIES]
        self["e820_entries"] = len(table)
        packed = b"".join(struct.pack("<QQI", *entry) for entry in table)
        self.data[E820_TABLE : E820_TABLE + len(packed)] = packed

    def set_seed(self, memory: GuestMemory, seed: bytes) -> None:
        """Hand the guest's random number generator its first entropy: a ``struct setup_data``."""
        memory.write(layout.SETUP_DATA, struct.pack("<QII", 0, SETUP_RNG_SEED, len(seed)) + seed)
        self["setup_data"] = layout.SETUP_DATA
