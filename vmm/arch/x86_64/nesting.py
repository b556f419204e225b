"""An emulated x86-64 host: a PC whose emulated SVM carries kvm-amd. See vmm.arch.base.Nesting."""

from __future__ import annotations

import os

from vmm.arch.x86_64 import unpacked
from vmm.arch.x86_64.elf import Elf
from vmm.arch.x86_64.pvh import has_entry
from vmm.errors import BootError

QEMU: str = "qemu-system-x86_64"
QEMU_PACKAGE: str = "qemu-system-x86"
CPU: str = "max,-erms,-xsave"
MACHINE: str = "pc"
KERNEL_ARGS: str = (
    "console=ttyS0 reboot=t panic=-1 mitigations=off nokaslr tsc=reliable no_timer_check "
    "audit=0 random.trust_cpu=on cryptomgr.notests rodata=off"
)
KVM_MODULES: tuple[str, ...] = ("kvm-amd",)
NO_KVM: str = "kvm-amd found no SVM"


def kernel_image(path: str) -> int | None:
    """The vmlinux in a bzImage when QEMU can start it (by PVH): an emulated kernel takes 5 to
    10 s to unpack itself, the host 2, and once only."""
    try:
        inner = unpacked.vmlinux(path)
    except BootError:
        return None
    if inner is None:
        return None
    with inner:
        try:
            return os.dup(inner.fd) if has_entry(Elf(inner)) else None
        except BootError:
            return None


def measured() -> list[str]:
    """The guest measured the speed of this CPU's time stamp counter."""
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        first = file.read(65536).partition("\n\n")[0].splitlines()
    return [line for line in first if line.startswith(("model name", "bogomips"))]


def places(text: str) -> str:
    """Each CPU's RIP, its ring, and whether it waits."""
    import re

    said = []
    for number, block in enumerate(text.split("CPU#")[1:]):
        rip = ring = "?"
        halted = False
        for found in re.finditer(r"RIP=([0-9a-f]+)|CPL=(\d)|HLT=(\d)", block):
            rip = found[1] or rip
            ring = found[2] or ring
            halted = halted or found[3] == "1"
        said.append(f"CPU {number} {'halted ' if halted else ''}at {rip} in ring {ring}")
    return ", ".join(said)
