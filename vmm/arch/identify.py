"""Saying in words what a file is that cannot be booted."""

from __future__ import annotations

from vmm.arch import unpack

ELF_MAGIC = b"\x7fELF"

#: (offset, bytes, what it is)
SIGNATURES = (
    (0x38, b"ARM\x64", "a kernel Image for arm64"),
    (0x38, b"RSC\x05", "a kernel Image for RISC-V"),
    (0x30, b"RISCV", "a kernel Image for RISC-V"),
    (0x24, b"\x18\x28\x6f\x01", "a zImage for 32-bit Arm"),
    (0x04, b"zimg", "an EFI zboot kernel, for another architecture"),
    (0x38, b"\xcd\x23\x82\x81", "a kernel Image for LoongArch"),
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


def describe(head: bytes) -> str:
    """What a file that starts with ``head`` seems to be, as a noun."""
    if not head:
        return "nothing"
    for offset, magic, name in SIGNATURES:
        if head[offset : offset + len(magic)] == magic:
            return name
    if head.startswith(ELF_MAGIC):
        return "an ELF file"
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
