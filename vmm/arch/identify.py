"""Saying in words what a file is that cannot be booted."""

from __future__ import annotations

from vmm.arch import unpack

ELF_MAGIC = b"\x7fELF"

#: (offset, bytes, what it is)
SIGNATURES = (
    (0x04, b"zimg", "an EFI zboot kernel"),
    (0x38, b"ARM\x64", "a kernel Image"),
    (0x38, b"RSC\x05", "a kernel Image"),
    (0x30, b"RISCV", "a kernel Image"),
    (0x24, b"\x18\x28\x6f\x01", "a zImage"),
    (0x38, b"\xcd\x23\x82\x81", "a kernel Image"),
    (0x10008, b"S390EP", "a kernel image"),
    (0x202, b"HdrS", "a bzImage"),
    (0, b"\x27\x05\x19\x56", "a U-Boot uImage"),
    (0, b"\xd0\x0d\xfe\xed", "a flattened device tree or FIT image"),
    (0, b"070701", "a cpio archive, perhaps an initrd"),
    (0, b"070702", "a cpio archive, perhaps an initrd"),
    (0, b"QFI\xfb", "a qcow2 disk image"),
    (0, b"KDMV", "a VMDK disk image"),
    (0, b"hsqs", "a squashfs image"),
    (0, b"!<arch>\n", "an archive: a Debian package or a static library"),
    (0, b"\xed\xab\xee\xdb", "an RPM package"),
    (0, b"PK\x03\x04", "a zip archive"),
    (257, b"ustar", "a tar archive"),
    (0x400, b"\xe2\xe1\xf5\xe0", "an erofs image"),
    (0x438, b"\x53\xef", "an ext2, ext3 or ext4 image"),
    (0, b"#!", "a script"),
)  # fmt: skip


#: What e_machine of an ELF file and the machine of a PE file mean.
ELF_MACHINES = {
    2: "SPARC", 3: "x86", 4: "m68k", 8: "MIPS", 15: "PA-RISC", 20: "PowerPC", 21: "64-bit PowerPC",
    22: "s390", 40: "32-bit Arm", 42: "SuperH", 43: "64-bit SPARC", 50: "Itanium", 62: "x86-64",
    93: "ARC", 94: "Xtensa", 183: "arm64", 243: "RISC-V", 258: "LoongArch",
}  # fmt: skip
PE_MACHINES = {
    0x14C: "x86", 0x8664: "x86-64", 0x1C2: "32-bit Arm", 0xAA64: "arm64", 0x5032: "RISC-V",
    0x5064: "RISC-V", 0x6232: "LoongArch", 0x6264: "LoongArch",
}  # fmt: skip
#: (offset, bytes) that only kernels of one architecture have.
_MARKS = (
    (0x38, b"ARM\x64", "arm64"),
    (0x38, b"RSC\x05", "RISC-V"),
    (0x30, b"RISCV", "RISC-V"),
    (0x24, b"\x18\x28\x6f\x01", "32-bit Arm"),
    (0x10008, b"S390EP", "s390"),
    (0x202, b"HdrS", "x86-64"),
)
#: How somebody runs a kernel for each on a host of any kind.
EMULATORS = {
    "arm64": "qemu-system-aarch64 -M virt -cpu max",
    "RISC-V": "qemu-system-riscv64 -M virt",
    "64-bit PowerPC": "qemu-system-ppc64 -M pseries",
    "s390": "qemu-system-s390x",
    "x86": "qemu-system-i386",
    "x86-64": "qemu-system-x86_64",
}
#: Whose ELF files QEMU boots.
_BOOT_ELF = ("64-bit PowerPC", "s390", "x86", "x86-64")
#: As much of a file as is looked at.
HEAD = 0x10010


def architecture(head: bytes) -> str:
    """What a kernel that starts with ``head`` is for, or empty."""
    if head.startswith(ELF_MAGIC) and len(head) >= 20:
        machine = int.from_bytes(head[18:20], "big" if head[5] == 2 else "little")
        return ELF_MACHINES.get(machine, f"machine type {machine}")
    found = next((name for at, mark, name in _MARKS if head[at : at + len(mark)] == mark), "")
    if found or not head.startswith(b"MZ"):
        return found
    at = int.from_bytes(head[0x3C:0x40], "little")
    if head[at : at + 4] != b"PE\0\0" or len(head) < at + 6:
        return ""
    return PE_MACHINES.get(int.from_bytes(head[at + 4 : at + 6], "little"), "")


def another(head: bytes, own: tuple[str, ...], path: str) -> str:
    """The rest of a sentence about a file that is a kernel of another architecture than those in
    ``own``, for Source.error: both by name, and what would run it. Empty when it is none."""
    name = architecture(head)
    if not name or name in own:
        return ""
    text = f"is {describe(head)}, and this machine runs kernels for {own[0]}"
    if name in EMULATORS and (name in _BOOT_ELF or not head.startswith(ELF_MAGIC)):
        text += f"; '{EMULATORS[name]} -m 512 -kernel {path or 'FILE'}' would emulate one for it"
    return text


def describe(head: bytes) -> str:
    """What a file that starts with ``head`` seems to be, as a noun."""
    if not head:
        return "nothing"
    for offset, magic, name in SIGNATURES:
        if head[offset : offset + len(magic)] == magic:
            return name + _for(head)
    if head.startswith(ELF_MAGIC):
        return "an ELF file" + _for(head)
    if kind := unpack.packing(head):
        return f"{kind} data"
    if head.startswith(b"MZ"):
        return "an EFI program, perhaps a unified kernel image; its .linux section is the kernel"
    if head[0x1FE:0x200] == b"\x55\xaa":
        return "a disk image or boot sector"
    if not any(head):
        return "zeros"
    if all(9 <= byte <= 13 or 32 <= byte < 127 for byte in head[:512]):
        return "text"
    return "of no format known here"


def _for(head: bytes) -> str:
    name = architecture(head)
    return f" for {name}" if name else ""
