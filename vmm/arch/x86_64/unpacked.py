"""Kernels unpacked by the host: what to unpack, from the cache when it has it."""

from __future__ import annotations

import os

from vmm.arch.source import Source
from vmm.arch.x86_64 import bzimage, elf

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from vmm.arch.x86_64.bzimage import BzImage

    class Request(Protocol):
        """What unpacking needs of a boot.request.Request."""

        cache: bool
        opened: list[Source]


class Alone:
    """What unpacking needs when nothing is loaded."""

    __slots__ = ("cache", "opened")

    def __init__(self) -> None:
        self.cache = True
        self.opened: list[Source] = []


def vmlinux(path: str) -> Source | None:
    """The vmlinux inside the bzImage at ``path``, for a loader that is not ours; the caller
    closes it. None when the file is no bzImage or this host cannot unpack it; what is inside
    may then be asked of the kernel itself. Raises BootError when the file cannot be read or is
    damaged."""
    with Source.open(path, "kernel") as source:
        if not bzimage.recognised(source.head(0x206)):
            return None
        return payload(Alone(), bzimage.BzImage(source))


def whole_file(request: Request, source: Source, head: bytes) -> Source | None:
    """What ``source`` holds if all of it is packed, as a vmlinux.gz is; None when it is not.
    Raises BootError, without unpacking all of it, when that is no kernel."""
    from vmm.arch import unpack

    kind = unpack.packing(head)
    if not kind:
        return None
    limit = unpack.size_limit(source.size)
    if not (inner := _cached(request, source, "f")):
        first = next(iter(unpack.unpack(source, 0, source.size, kind, limit)), b"")
        from vmm.arch import identify
        from vmm.arch.x86_64 import multiboot

        if not (
            bzimage.recognised(first)
            or first.startswith(elf.MAGIC)
            or multiboot.search(first[: multiboot.SEARCH]) is not None
        ):
            if other := identify.another(first, elf.OWN, source.path):
                raise source.error(f"is {kind} data; what it holds {other}")
            raise source.error(f"is {kind} data that holds {identify.describe(first)}")
        inner = _unpack(request, source, "f", (0, source.size), kind, limit)
    return inner


def payload(request: Request, image: BzImage) -> Source | None:
    """The vmlinux inside a bzImage; None when this host cannot unpack it."""
    source = image.source
    if inner := _cached(request, source, "p"):
        return inner
    kind = image.payload_packing()
    from vmm.arch import unpack

    if not unpack.available(kind):
        return None
    offset, length = image.payload
    size = image.unpack_limit()
    # gzip's own last four bytes are the size; the others have it appended.
    length -= 0 if kind == "gzip" else 4
    return _unpack(request, source, "p", (offset, length), kind, size, exact=True)


def _cached(request: Request, source: Source, part: str) -> Source | None:
    if not request.cache or not source.key:
        return None
    from vmm.arch import kcache

    found = kcache.lookup(source.key + part)
    return _inner(request, source, part, found) if found else None


def _unpack(
    request: Request,
    source: Source,
    part: str,
    where: tuple[int, int],
    kind: str,
    limit: int,
    exact: bool = False,
) -> Source:
    """Unpack into the cache, or into memory when it cannot take it. ``exact``: ``limit`` is
    what must come out."""
    from vmm.arch import unpack

    def fill(fd: int) -> int:
        size = unpack.write_sparse(fd, unpack.unpack(source, *where, kind, limit))
        if exact and size != limit:
            raise source.error(
                f"has a damaged payload: it unpacks to {size} bytes and not to {limit}"
            )
        return size

    found = None
    if request.cache and source.key:
        from vmm.arch import kcache

        found = kcache.store(source.key + part, fill)
    if found is None:
        fd = os.memfd_create("vmm-kernel", os.MFD_CLOEXEC)
        try:
            found = fd, fill(fd)
        except OSError as e:
            os.close(fd)
            raise source.error(f"cannot be unpacked: {e.strerror}") from e
        except BaseException:
            os.close(fd)
            raise
    return _inner(request, source, part, found)


def _inner(request: Request, source: Source, part: str, found: tuple[int, int]) -> Source:
    fd, size = found
    inner = Source(source.name, size, fd=fd, what="kernel")
    inner.key = source.key and source.key + part
    request.opened.append(inner)
    return inner
