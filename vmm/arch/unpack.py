"""Unpacking compressed kernels on the host, bounded whatever the file says."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, Protocol

    from vmm.arch.source import Source

    class Decoder(Protocol):
        @property
        def eof(self) -> bool: ...
        @property
        def needs_input(self) -> bool: ...
        def decompress(self, data: bytes, max_length: int) -> bytes: ...


#: First bytes -> name. LZMA-alone has no magic; this is what the kernel's build makes of it.
MAGICS = (
    (b"\x1f\x8b\x08", "gzip"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\x02\x21\x4c\x18", "lz4"),
    (b"\x04\x22\x4d\x18", "lz4 frame"),
    (b"BZh", "bzip2"),
    (b"\x5d\x00\x00", "lzma"),
    (b"\x89LZO\0\r\n\x1a\n", "lzo"),
)
#: What unpacks each; lzo has nothing.
MODULES = {
    "gzip": "zlib",
    "xz": "lzma",
    "zstd": "zstandard",
    "lz4": "lz4.block",
    "lz4 frame": "lz4.frame",
    "bzip2": "bz2",
    "lzma": "lzma",
}
LZ4_LEGACY_MAGIC = 0x184C2102
LZ4_BLOCK = 8 << 20
#: Linux unpacks xz and zstd with windows of up to 128 MiB; a little more is liblzma's own.
WINDOW_LOG_MAX = 27
XZ_MEMORY_MAX = 192 << 20

#: A kernel shrinks 3 to 10 times; tiny ones are mostly zeros.
RATIO_MAX = 64
SMALL_MAX = 16 << 20

_IN = 256 << 10
_OUT = 1 << 20
#: Zeros are left out of what is written in runs of this many bytes.
_HOLE = 64 << 10


def packing(head: bytes) -> str:
    """How a file that starts with ``head`` is packed, or "" when it is not."""
    return next((name for magic, name in MAGICS if head.startswith(magic)), "")


def size_limit(packed: int) -> int:
    """The most that ``packed`` bytes may unpack to."""
    return max(SMALL_MAX, packed * RATIO_MAX)


def available(kind: str) -> bool:
    """Whether this host can unpack ``kind``."""
    try:
        return kind in MODULES and bool(__import__(MODULES[kind]))
    except ImportError:
        return False


def unpack(source: Source, offset: int, length: int, kind: str, limit: int) -> Iterator[bytes]:
    """The unpacked bytes of ``length`` packed ones at ``offset`` of ``source``, in pieces.

    ``kind`` is one of MAGICS' names. Raises BootError when the stream is damaged, ends early,
    gives more than ``limit`` bytes or needs a module that is not installed.
    """
    total = 0
    try:
        for piece in _pieces(source, offset, length, kind, limit):
            total += len(piece)
            if total > limit:
                raise source.error(_too_much(kind, limit))
            yield piece
    except ImportError as e:
        raise source.error(
            f"is packed with {kind} and Python's {e.name} module is missing; pip install {e.name}"
        ) from e
    except (EOFError, MemoryError, OSError, ValueError, ArithmeticError) as e:
        raise source.error(f"holds damaged {kind} data: {e}") from e


def write_sparse(fd: int, pieces: Iterator[bytes]) -> int:
    """Write ``pieces`` to an empty file, zeros as holes; returns the size. Raises OSError."""
    pos = 0
    zeros = bytes(_HOLE)
    for piece in pieces:
        view = memoryview(piece)
        start = 0  # of what is not written yet
        for at in range(0, len(piece), _HOLE):
            if piece[at : at + _HOLE] == zeros:
                _pwrite(fd, view[start:at], pos + start)
                start = at + _HOLE
        _pwrite(fd, view[start:], pos + start)
        pos += len(piece)
    os.ftruncate(fd, pos)
    return pos


def _pwrite(fd: int, view: memoryview, pos: int) -> None:
    while view:
        done = os.pwrite(fd, view, pos)
        view = view[done:]
        pos += done


def _too_much(kind: str, limit: int) -> str:
    return f"unpacks ({kind}) to more than {limit} bytes, which no kernel of its size does"


def _pieces(source: Source, offset: int, length: int, kind: str, limit: int) -> Iterator[bytes]:
    if kind == "lz4":
        return _lz4_legacy(source, offset, length, limit)
    if kind == "zstd":
        return _zstd(source, offset, length)
    if kind == "gzip":
        return _stream(source, offset, length, kind, _Gzip())
    if kind in ("xz", "lzma"):
        import lzma

        form = lzma.FORMAT_XZ if kind == "xz" else lzma.FORMAT_ALONE
        decoder: Decoder = lzma.LZMADecompressor(form, memlimit=XZ_MEMORY_MAX)
        return _translated(_stream(source, offset, length, kind, decoder), lzma.LZMAError)
    if kind == "lz4 frame":
        import lz4.frame  # type: ignore[import-untyped]

        untyped: Any = lz4.frame.LZ4FrameDecompressor()
        return _translated(_stream(source, offset, length, kind, untyped), RuntimeError)
    if kind == "bzip2":
        import bz2

        return _stream(source, offset, length, kind, bz2.BZ2Decompressor())
    raise source.error(f"is packed with {kind}, which the host side cannot unpack")


def _translated(pieces: Iterator[bytes], error: type[Exception]) -> Iterator[bytes]:
    """``pieces`` with a library's own exception as the ValueError that ``unpack`` expects."""
    try:
        yield from pieces
    except error as e:
        raise ValueError(str(e)) from e


def _stream(
    source: Source, offset: int, length: int, kind: str, decoder: Decoder
) -> Iterator[bytes]:
    end = offset + length
    while not decoder.eof:
        data = b""
        if decoder.needs_input:
            if offset >= end:
                raise source.error(f"is truncated: its {kind} data ends early")
            data = source.read(offset, min(_IN, end - offset))
            offset += len(data)
        piece = decoder.decompress(data, _OUT)
        if piece:
            yield piece


class _Gzip:
    """zlib's decoder with the interface of lzma's and bz2's."""

    def __init__(self) -> None:
        import zlib

        self._zlib = zlib.decompressobj(zlib.MAX_WBITS | 16)
        self._error = zlib.error
        self._more = False

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def needs_input(self) -> bool:
        return not self._more

    def decompress(self, data: bytes, max_length: int) -> bytes:
        try:
            piece = self._zlib.decompress(self._zlib.unconsumed_tail + data, max_length)
        except self._error as e:
            raise ValueError(str(e)) from e
        # A full piece may have more behind it even when all input is taken.
        self._more = bool(self._zlib.unconsumed_tail) or len(piece) == max_length
        return piece


def _zstd(source: Source, offset: int, length: int) -> Iterator[bytes]:
    import zstandard

    decoder = zstandard.ZstdDecompressor(max_window_size=1 << WINDOW_LOG_MAX)
    feed: Any = _Reader(source, offset, length)
    reader = decoder.stream_reader(feed, read_size=_IN)
    try:
        while piece := reader.read(_OUT):
            yield piece
    except zstandard.ZstdError as e:
        raise ValueError(str(e)) from e


class _Reader:
    """A part of a Source as what zstandard reads from."""

    def __init__(self, source: Source, offset: int, length: int) -> None:
        self._source = source
        self._pos = offset
        self._end = offset + length

    def read(self, size: int) -> bytes:
        data = self._source.read(self._pos, min(size, self._end - self._pos))
        self._pos += len(data)
        return data


def _lz4_legacy(source: Source, offset: int, length: int, limit: int) -> Iterator[bytes]:
    """The frame format of ``lz4 -l``: the magic, then blocks of at most 8 MiB, each after its
    packed size as u32, until the end. Frames may follow each other. LZ4 Frame Format."""
    import lz4.block  # type: ignore[import-untyped]

    end = offset + length
    total = 0
    while offset < end:
        if end - offset < 4:
            raise source.error("is truncated: its lz4 data ends early")
        size = int.from_bytes(source.read(offset, 4), "little")
        offset += 4
        if size == LZ4_LEGACY_MAGIC:
            continue
        if size > end - offset:
            raise source.error("is truncated: its lz4 data ends early")
        # A block cannot grow more than 255 times.
        room = min(LZ4_BLOCK, 255 * size, limit - total + 1)
        try:
            piece = lz4.block.decompress(source.read(offset, size), uncompressed_size=room)
        except lz4.block.LZ4BlockError as e:
            if room == limit - total + 1:
                raise source.error(_too_much("lz4", limit)) from e
            raise ValueError(str(e)) from e
        offset += size
        total += len(piece)
        yield piece


def declared_size(source: Source, offset: int, length: int) -> int:
    """What a bzImage's payload says it unpacks to: its last four bytes. x86 boot.rst §1.3."""
    if length < 8:
        raise source.error(f"has a damaged header: its payload is only {length} bytes long")
    return int.from_bytes(source.read(offset + length - 4, 4), "little")
