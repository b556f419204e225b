"""What a machine said, and what is said about it."""

from __future__ import annotations

import os
from contextlib import suppress

_TAIL, _TAIL_PANIC = 30, 100  # lines of a log that are shown, and shown after a panic


def init_said(log: str) -> str:
    """Why the guest's /init gave up, when it did: the last it said on the console, or ""."""
    for line in reversed(log.splitlines()):
        _, mark, text = line.partition("vmm-init: ")
        if mark:
            return text.strip()
    return ""


def print_tail(log: bytearray, noun: str) -> None:
    """The end of the machine's log on stderr, to go with an error: more of it after a panic, as
    the reason stands before that."""
    lines = log.decode(errors="replace").replace("\r", "").splitlines()[-_TAIL_PANIC:]
    if not any("Kernel panic" in line for line in lines):
        lines = lines[-_TAIL:]
    if lines:
        say([f"--- the end of the {noun}'s log ---", *lines])


def say(lines: list[str]) -> None:
    """Lines on descriptor 2, as sys.stderr is None when the caller had closed it."""
    with suppress(OSError):
        os.write(2, "".join(f"{line}\n" for line in lines).encode(errors="replace"))
