"""Every error vmm raises on purpose, and the exit status each one maps to.

A message is one sentence: what was tried, on what, what the kernel said, what to do.
What a guest does wrong is never an exception, except that it panicked, vanished or ran late.
"""

from __future__ import annotations

import errno as _errno
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.result import RunResult

#: Exit statuses of ``vmm`` that are its own and not the guest's.
STATUS_USAGE = 2
STATUS_TIMEOUT = 124
STATUS_HOST = 125
STATUS_GUEST = 255


class VmmError(Exception):
    """Base of every error raised by vmm; ``status`` is the exit status it maps to."""

    status: int = STATUS_HOST


class ConfigError(VmmError):
    """The user asked for something that cannot be: a bad flag, value or combination."""

    status = STATUS_USAGE


class HostError(VmmError):
    """The host could not do what was asked: a file, a limit, a missing program."""

    def __init__(self, message: str, *, errno: int | None = None) -> None:
        super().__init__(message)
        self.errno = errno


class KvmError(HostError):
    """A KVM ioctl failed. Carries ``ioctl`` (its name), ``errno`` and ``hint``."""

    def __init__(self, ioctl: str, errno: int, what: str = "", hint: str = "") -> None:
        name = _errno.errorcode.get(errno, str(errno))
        text = f"{ioctl} failed{' ' + what if what else ''}: {name} ({os.strerror(errno)})."
        super().__init__(f"{text} {hint}".rstrip(), errno=errno)
        self.ioctl = ioctl
        self.hint = hint


class BootError(VmmError):
    """A kernel, initrd or payload cannot be booted; says what was recognised."""


class MemoryFault(VmmError):
    """The host side asked for guest-physical memory that is not RAM."""

    def __init__(self, gpa: int, size: int) -> None:
        super().__init__(f"{size} bytes at guest-physical {gpa:#x} are not all RAM")
        self.gpa = gpa
        self.size = size


class GuestError(VmmError):
    """The guest ended badly; ``console`` is the tail of what it printed."""

    status = STATUS_GUEST

    def __init__(self, message: str, *, console: str = "") -> None:
        super().__init__(message)
        self.console = console


class CommandFailed(VmmError):
    """A command in a guest ended with a status that is not 0; ``result`` is its RunResult."""

    def __init__(self, result: RunResult) -> None:
        last = result.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        super().__init__(f"{result.message}{f' It said: {last}' if last else ''}")
        self.result = result
        self.status = result.status


class GuestPanic(GuestError):
    """The guest's kernel panicked."""


class GuestLost(GuestError):
    """The guest vanished: it could not go on, or left KVM in a way that nobody handles."""


class GuestTimeout(GuestError):
    """The guest did not end, or did not say what was expected, by the deadline."""

    status = STATUS_TIMEOUT
