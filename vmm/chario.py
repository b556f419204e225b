"""Byte streams from the guest and bytes for it: thin owners of the C objects.

Output goes into a `Stream`, a ring that remembers the tail; a `Sink` empties it into a file
descriptor from a thread of its own. What is typed goes into an `Input`, which the terminal, a
pipe or Python feeds. Memory never grows with what either side sends.
"""

from __future__ import annotations

import os

from vmm._native import ffi, lib
from vmm.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: Bytes of output that are remembered.
STREAM_SIZE = 1 << 20
#: Bytes of input that wait for the guest.
INPUT_SIZE = 64 << 10

#: What `Input.events` reports.
QUIT = 1
HELP = 2
EOF = 4


class Stream:
    """What the guest printed. ``native`` is the struct vmm_stream *. Any thread may use it."""

    __slots__ = ("_fds", "capacity", "native")

    def __init__(self, capacity: int = STREAM_SIZE) -> None:
        self.capacity = capacity
        self.native = lib.vmm_stream_create(capacity)
        if self.native == ffi.NULL:
            raise HostError(f"no memory for a console of {capacity} bytes")

    def write(self, data: bytes) -> None:
        """Append; what a slow reader has not taken may be overwritten."""
        lib.vmm_stream_write(self.native, data, len(data))

    def read(self, start: int, size: int = STREAM_SIZE) -> tuple[int, bytes]:
        """(offset of the first byte, bytes) from absolute offset ``start`` on, or from the oldest
        byte still kept."""
        size = min(size, self.capacity)
        buf = ffi.new("uint8_t[]", size)
        at = ffi.new("uint64_t *")
        n = lib.vmm_stream_read(self.native, start, buf, size, at)
        return int(at[0]), bytes(ffi.buffer(buf, n))

    @property
    def total(self) -> int:
        """Bytes ever written."""
        return int(lib.vmm_stream_total(self.native))

    def wait(self, beyond: int, timeout_ms: int) -> int:
        """Wait, without the GIL, until ``total`` > ``beyond`` or the stream ends; the total."""
        return int(lib.vmm_stream_wait(self.native, beyond, timeout_ms))

    def finish(self) -> None:
        """No more will be written; who waits is woken."""
        lib.vmm_stream_close(self.native)

    def close(self) -> None:
        """Free it. No sink and no device uses it any more."""
        if self.native != ffi.NULL:
            lib.vmm_stream_destroy(self.native)
            self.native = ffi.NULL


class Sink:
    """A thread that writes a stream to ``fd``, which stays the caller's.

    After ``limit`` bytes (0: no limit) one line says so and the rest is dropped.
    """

    __slots__ = ("_native",)

    def __init__(self, stream: Stream, fd: int, *, limit: int = 0, name: str = "") -> None:
        self._native = lib.vmm_sink_create(stream.native, fd, limit)
        if self._native == ffi.NULL:
            what = name or f"file descriptor {fd}"
            raise HostError(
                f"cannot write console output to {what}: {os.strerror(ffi.errno)}", errno=ffi.errno
            )

    def flush(self, timeout: float = 5.0) -> bool:
        """Wait until everything so far is written (or dropped); False when time ran out."""
        return not lib.vmm_sink_flush(self._native, int(timeout * 1000))

    @property
    def error(self) -> int:
        """0, or the errno after which output is dropped: EPIPE, ENOSPC, EIO ..."""
        return -int(lib.vmm_sink_error(self._native))

    @property
    def written(self) -> int:
        return int(lib.vmm_sink_written(self._native))

    @property
    def dropped(self) -> int:
        return int(lib.vmm_sink_dropped(self._native))

    def close(self) -> None:
        """Stop at once; ``flush`` first. Before the stream is closed."""
        if self._native != ffi.NULL:
            lib.vmm_sink_destroy(self._native)
            self._native = ffi.NULL


class Input:
    """Bytes on their way to the guest. ``native`` is the struct vmm_input *."""

    __slots__ = ("native",)

    def __init__(self, capacity: int = INPUT_SIZE) -> None:
        self.native = lib.vmm_input_create(capacity)
        if self.native == ffi.NULL:
            raise HostError(f"no memory for {capacity} bytes of console input")

    def push(self, data: bytes) -> int:
        """Accept what there is room for; how many bytes that was."""
        return int(lib.vmm_input_push(self.native, data, len(data)))

    def wait(self, timeout_ms: int) -> int:
        """Wait, without the GIL, for room; how much there is."""
        return int(lib.vmm_input_wait(self.native, timeout_ms))

    def drain(self, timeout_ms: int) -> bool:
        """Wait until the guest's device took everything; False when time ran out."""
        return not lib.vmm_input_drain(self.native, timeout_ms)

    @property
    def level(self) -> int:
        """Bytes waiting."""
        return int(lib.vmm_input_level(self.native))

    @property
    def total(self) -> int:
        """Bytes ever accepted."""
        return int(lib.vmm_input_total(self.native))

    @property
    def eof(self) -> bool:
        """No more will come, and the guest's device took everything."""
        return bool(lib.vmm_input_eof(self.native))

    def send_break(self) -> None:
        lib.vmm_input_break(self.native)

    def finish(self) -> None:
        """No more will be sent."""
        lib.vmm_input_close(self.native)

    def attach(self, loop: Any, fd: int, *, escapes: bool = False, eventfd: int = -1) -> None:
        """Feed from ``fd`` on the I/O thread ``loop`` (struct vmm_loop *), as fast as the guest
        takes it. ``eventfd`` is written whenever ``events`` has something. With ``escapes``
        Ctrl-A is a prefix if ``fd`` is a terminal. ``fd`` stays the caller's.
        """
        rc = lib.vmm_input_source(self.native, loop, fd, int(escapes), eventfd)
        if rc:
            raise HostError(
                f"cannot read console input from file descriptor {fd}: {os.strerror(-rc)}",
                errno=-rc,
            )

    def detach(self) -> None:
        """Stop feeding; returns once the I/O thread is done. Before the loop goes."""
        lib.vmm_input_unsource(self.native)

    def kick(self) -> None:
        """Look at the source again, after this process came to the terminal's foreground."""
        lib.vmm_input_kick(self.native)

    def events(self) -> int:
        """QUIT | HELP | EOF bits since the last call."""
        return int(lib.vmm_input_events(self.native))

    def close(self) -> None:
        """Free it. No device uses it any more."""
        if self.native != ffi.NULL:
            lib.vmm_input_destroy(self.native)
            self.native = ffi.NULL


class Watch:
    """Patterns looked for in a stream as it is written, whoever reads it.

    When one passes, ``fd`` (an eventfd) becomes readable, so that a thread in poll() wakes.
    """

    __slots__ = ("_own", "_stream", "fd", "patterns")

    #: A Linux kernel that dies says this, whatever else it does afterwards.
    PANIC = (b"Kernel panic - not syncing",)

    def __init__(self, stream: Stream, patterns: tuple[bytes, ...] = PANIC, fd: int = -1) -> None:
        """``fd``: an eventfd of the caller's, or -1 to have one made. A stream takes 8 patterns
        of up to 63 bytes in all; more is a ValueError."""
        self._stream = stream
        self.patterns: dict[int, bytes] = {}
        self._own = fd < 0
        self.fd = fd if fd >= 0 else os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        for pattern in patterns:
            bit = lib.vmm_stream_watch(stream.native, pattern, self.fd)
            if bit < 0:
                raise ValueError(f"cannot watch for {pattern!r}: {os.strerror(-bit)}")
            self.patterns[bit] = pattern

    def matched(self) -> list[bytes]:
        """The patterns that have passed, in the order given."""
        bits = int(lib.vmm_stream_matched(self._stream.native))
        return [pattern for bit, pattern in self.patterns.items() if bits >> bit & 1]

    def close(self) -> None:
        """Stop telling; before the stream is closed."""
        if self.fd >= 0:
            lib.vmm_stream_unwatch(self._stream.native, self.fd)
            if self._own:
                os.close(self.fd)
            self.fd = -1
