"""The kernel image in the form that starts fastest under emulation."""

from __future__ import annotations

import os

from vmm.arch.x86_64 import unpacked
from vmm.arch.x86_64.elf import Elf
from vmm.arch.x86_64.pvh import has_entry
from vmm.errors import BootError


def unpacked_kernel(path: str) -> int | None:
    """A descriptor, the caller's, of the vmlinux in a bzImage when QEMU can start it (by PVH).

    An emulated kernel takes 5 to 10 s to unpack itself, the host 2, and once only. None: use
    ``path`` as it is.
    """
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
