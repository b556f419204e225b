"""Guest-physical memory: where it is, and bounds-checked access to it.

One table of RAM ranges serves Python (here) and C (native/mem.c). A range is a mapping of this
process, from a memfd that other processes can share, or anonymous private memory.
"""

from __future__ import annotations

import errno
import os
import struct

from vmm._native import ffi, lib
from vmm.errors import HostError, MemoryFault

MIB = 1 << 20
GIB = 1 << 30
PAGE = 4096

#: Where RAM can come from.
BACKINGS = ("anon", "memfd", "hugetlb")


class RamRange:
    """One run of guest RAM. ``gpa`` and ``size`` in bytes; ``hva`` the host address, as int;
    ``fd``/``offset`` name the file behind it (``fd`` is -1 for anonymous memory)."""

    __slots__ = ("fd", "gpa", "hva", "offset", "size")

    def __init__(self, gpa: int, size: int, hva: int, fd: int, offset: int) -> None:
        self.gpa = gpa
        self.size = size
        self.hva = hva
        self.fd = fd
        self.offset = offset


class GuestMemory:
    """The RAM of one guest. Owns its mappings and its memfd; ``close`` gives them back.

    Access outside RAM raises MemoryFault. ``memory[gpa]`` is a byte, ``memory[a:b]`` bytes.
    """

    def __init__(self, ranges: list[tuple[int, int]], *, backing: str = "anon") -> None:
        """``ranges``: (gpa, size) pairs, page-aligned, disjoint. Raises HostError when the host
        cannot give that much."""
        self.table = lib.vmm_mem_create()
        #: What the guest has at boot.
        self.ranges: list[RamRange] = []
        #: What devices added; in no memory map.
        self.added: list[RamRange] = []
        self.backing = backing
        self._advice: list[int] = []
        #: Files of `added` that are ours.
        self._files: list[int] = []
        self.size = sum(size for _, size in ranges)
        self.fd = -1
        try:
            if backing != "anon":
                self.fd = _memfd(self.size, hugetlb=backing == "hugetlb")
            #: Bytes of a host page, the least that can be given back.
            self.page = os.sysconf("SC_PAGE_SIZE")
            if backing == "hugetlb":
                self.page = os.fstatvfs(self.fd).f_bsize
            offset = 0
            for gpa, size in ranges:
                self.ranges.append(self._map(gpa, size, self.fd, offset))
                offset += size
        except BaseException:
            self.close()
            raise

    def add(self, gpa: int, size: int) -> RamRange:
        """Memory of the same kind as the rest, for a device to manage, before the guest runs. It is
        address space until it is touched. Raises HostError."""
        fd = -1
        if self.backing != "anon":
            fd = _memfd(size, hugetlb=self.backing == "hugetlb")
            self._files.append(fd)
        added = self._map(gpa, size, fd, 0)
        self.added.append(added)
        for advice in self._advice:
            lib.vmm_madvise(ffi.cast("void *", added.hva), size, advice)
        return added

    def _map(self, gpa: int, size: int, fd: int, offset: int) -> RamRange:
        ptr = lib.vmm_ram_map(fd, offset, size)
        if ptr == ffi.NULL:
            raise _no_memory(size, ffi.errno)
        hva = int(ffi.cast("uintptr_t", ptr))
        rc = lib.vmm_mem_add(self.table, gpa, size, ptr)
        if rc:
            lib.vmm_ram_unmap(ptr, size)
            raise ValueError(f"RAM range {gpa:#x}+{size:#x}: {os.strerror(-rc)}")
        advice = lib.MADV_DONTNEED if fd < 0 else lib.MADV_REMOVE
        lib.vmm_mem_lend(self.table, gpa, self.page, advice)
        return RamRange(gpa, size, hva, fd, offset)

    def close(self) -> None:
        """Unmap everything. No vCPU or I/O thread may still use the memory."""
        for r in (*self.ranges, *self.added):
            lib.vmm_ram_unmap(ffi.cast("void *", r.hva), r.size)
        self.ranges = []
        self.added = []
        if self.table != ffi.NULL:
            lib.vmm_mem_destroy(self.table)
            self.table = ffi.NULL
        for fd in (*self._files, self.fd):
            if fd >= 0:
                os.close(fd)
        self._files = []
        self.fd = -1

    def advise(self, advice: int) -> None:
        """madvise(2) all there is, and what is added later; an advice this host does not know is
        ignored."""
        self._advice.append(advice)
        for r in (*self.ranges, *self.added):
            lib.vmm_madvise(ffi.cast("void *", r.hva), r.size, advice)

    def prefault(self) -> None:
        """Touch every page now, so that the guest never waits for one. Raises HostError."""
        for r in self.ranges:
            rc = lib.vmm_madvise(ffi.cast("void *", r.hva), r.size, lib.MADV_POPULATE_WRITE)
            if rc:
                raise _no_memory(r.size, -rc)

    def view(self, gpa: int, size: int) -> memoryview:
        """A writable view of RAM that lies in one range. Valid until ``close``."""
        ptr = lib.vmm_mem_at(self.table, gpa, size) if gpa >= 0 and size >= 0 else ffi.NULL
        if ptr == ffi.NULL:
            raise MemoryFault(gpa, size)
        return memoryview(ffi.buffer(ptr, size))

    def contains(self, gpa: int, size: int) -> bool:
        """Whether ``size`` bytes at ``gpa`` lie in one range of RAM."""
        return (
            0 <= gpa < 1 << 64
            and 0 <= size < 1 << 64
            and bool(lib.vmm_mem_at(self.table, gpa, size))
        )

    def read(self, gpa: int, size: int) -> bytes:
        buf = bytearray(size)
        if not 0 <= gpa < 1 << 64 or lib.vmm_mem_read(self.table, gpa, ffi.from_buffer(buf), size):
            raise MemoryFault(gpa, size)
        return bytes(buf)

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        size = len(data) if not isinstance(data, memoryview) else data.nbytes
        if not 0 <= gpa < 1 << 64 or lib.vmm_mem_write(
            self.table, gpa, ffi.from_buffer(data), size
        ):
            raise MemoryFault(gpa, size)

    def read_int(self, gpa: int, size: int) -> int:
        """A little-endian unsigned integer of ``size`` bytes."""
        return int.from_bytes(self.read(gpa, size), "little")

    def write_int(self, gpa: int, value: int, size: int) -> None:
        self.write(gpa, value.to_bytes(size, "little"))

    def __getitem__(self, key: int | slice) -> int | bytes:
        if isinstance(key, slice):
            if key.start is None or key.stop is None or key.step not in (None, 1):
                raise ValueError("memory[start:stop] needs both ends and no step")
            return self.read(key.start, max(0, key.stop - key.start))
        return self.read(key, 1)[0]

    def __setitem__(self, key: int | slice, value: int | bytes) -> None:
        if isinstance(key, slice):
            if key.start is None or not isinstance(value, (bytes, bytearray)):
                raise ValueError("memory[start:...] = bytes")
            if key.stop is not None and key.stop - key.start != len(value):
                raise ValueError(f"{len(value)} bytes do not fit {key.stop - key.start}")
            self.write(key.start, value)
        else:
            self.write(key, struct.pack("B", value))


def _memfd(size: int, *, hugetlb: bool) -> int:
    flags = os.MFD_CLOEXEC | (os.MFD_HUGETLB if hugetlb else 0)
    try:
        fd = os.memfd_create("vmm-ram", flags)
    except OSError as e:
        raise HostError(f"memfd_create for guest RAM failed: {e.strerror}", errno=e.errno) from e
    try:
        os.ftruncate(fd, size)
    except OSError as e:
        os.close(fd)
        raise _no_memory(size, e.errno or errno.ENOMEM) from e
    return fd


def _no_memory(size: int, err: int) -> HostError:
    return HostError(
        f"{size // MIB} MiB of guest RAM could not be mapped: {os.strerror(err)}; "
        "ask for less with --memory",
        errno=err,
    )
