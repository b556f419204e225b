"""Initial RAM disks and boot modules: placing and loading them."""

from __future__ import annotations

import os

from vmm.arch.source import Source
from vmm.arch.x86_64 import layout
from vmm.errors import BootError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.arch.source import Image
    from vmm.arch.x86_64.places import Places


def load_joined(places: Places, initrds: Sequence[Image], limit: int) -> tuple[int, int]:
    """One initrd out of several, each padded to 4 bytes as Linux wants of joined cpio archives,
    as high in low RAM as ``limit`` allows; returns (gpa, size), (0, 0) without any."""
    sources: list[Source] = []
    try:
        sources += (Source.open(image, "initrd") for image in initrds)
        sizes = [_padded(source.size) for source in sources]
        total = sum(sizes)
        if not total:
            return 0, 0
        gpa = places.top(total, limit)
        if gpa is None:
            raise _no_room(places, sources[0], len(sources), total, limit)
        places.claim(gpa, total, "initrd")
        pos = gpa
        for source, size in zip(sources, sizes, strict=True):
            source.load(places.memory, pos, 0, source.size)
            pos += size
        return gpa, total
    finally:
        for source in sources:
            source.close()


def load_modules(
    places: Places, modules: Sequence[Image], start: int
) -> list[tuple[int, int, str]]:
    """Each of ``modules`` on pages of its own, from ``start`` up; returns (gpa, size, string).

    As QEMU has it, a path may be followed by a blank and arguments; the string is all of it.
    """
    placed: list[tuple[int, int, str]] = []
    for image in modules:
        with _open_module(image) as source:
            gpa = places.bottom(source.size, start)
            if gpa is None:
                raise _no_room(places, source, 1, source.size, layout.LOW_RAM_MAX)
            places.claim(gpa, source.size, f"module {len(placed)}")
            source.load(places.memory, gpa, 0, source.size)
            start = gpa + source.size
        placed.append((gpa, source.size, _string(image)))
    return placed


def _string(image: Image) -> str:
    return "" if isinstance(image, (bytes, bytearray, memoryview)) else os.fspath(image)


def _open_module(image: Image) -> Source:
    try:
        return Source.open(image, "initrd")
    except BootError:
        path, blank, _ = _string(image).partition(" ")
        if blank:
            return Source.open(path, "initrd")
        raise


def _padded(size: int) -> int:
    return (size + 3) & ~3


def _no_room(places: Places, source: Source, count: int, total: int, limit: int) -> BootError:
    have = places.memory.size // layout.MIB
    size = f"{-(-total // layout.MIB)} MiB"
    what = f"and {count - 1} more of {size} together" if count > 1 else f"of {size}"
    end = places.kernel_end() + total + layout.PAGE
    if end > min(limit, layout.LOW_RAM_MAX):
        return source.error(
            f"{what} does not fit below {min(limit, layout.LOW_RAM_MAX):#x}, where this kernel "
            "wants it"
        )
    need = -(-end // layout.MIB)
    return source.error(
        f"{what} does not fit beside the kernel in {have} MiB of guest RAM; "
        f"give it at least {need} MiB with --memory"
    )
