"""Where vmm keeps what it can make again."""

from __future__ import annotations

import os
import stat


def cache_dir() -> str:
    """Where this user's caches of vmm are: $XDG_CACHE_HOME/vmm, else ~/.cache/vmm."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "vmm")


def private_dir(*names: str) -> str | None:
    """A directory in the cache that is ours alone, made if need be; None when there is none.

    What is kept there is run with all our rights: nobody else may be able to put it there.
    """
    path = os.path.join(cache_dir(), *names)
    try:
        os.makedirs(path, 0o700, exist_ok=True)
        info = os.lstat(path)
    except OSError:
        return None
    ours = stat.S_ISDIR(info.st_mode) and info.st_uid == os.geteuid()
    return path if ours and not info.st_mode & (stat.S_IWGRP | stat.S_IWOTH) else None
