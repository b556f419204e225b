"""The nested machine as it was before its first command, kept so that the next start is short.

QEMU's "x-ignore-shared": RAM is a file that the first machine writes through and later ones map
privately, so that pages are read when they are touched; the devices' state is a small second file.
"""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress

from vmm.guest.cache import private_dir

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.nested.monitor import Monitor
    from vmm.nested.qemu import Qemu

_KEEP = 4  # each takes some 300 MB
_ROOM = 1 << 30  # free space without which none is made
_PATIENCE_S = 60.0  # for the devices' state to be written
_DRAFT = ".draft-"

STATE, RAM = 0, 1  # in Snapshot.fds


class Snapshot:
    """A directory with the files ``ram`` and ``state``.

    ``fds`` are both files, open; they stay good when somebody else removes the directory.
    Whoever uses them takes them out.
    """

    __slots__ = ("fds", "path")

    def __init__(self, path: str) -> None:
        self.path = path
        self.fds: list[int] = []

    @property
    def ram(self) -> str:
        return os.path.join(self.path, "ram")

    @property
    def state(self) -> str:
        return os.path.join(self.path, "state")

    def discard(self) -> None:
        """Remove it, in one step for everybody else."""
        while self.fds:
            os.close(self.fds.pop())
        dead = f"{os.path.dirname(self.path)}/{_DRAFT}{os.getpid()}-{time.monotonic_ns()}"
        with suppress(OSError):
            os.rename(self.path, dead)
            shutil.rmtree(dead, ignore_errors=True)

    def publish(self, key: str) -> Snapshot | None:
        """Make a draft the snapshot for ``key``, ready for use; the older ones beyond a few go."""
        target = os.path.join(os.path.dirname(self.path), key)
        try:
            os.rename(self.path, target)
        except OSError:
            self.discard()  # somebody else was faster: theirs is as good
        _prune(os.path.dirname(target))
        return find(key)


def find(key: str) -> Snapshot | None:
    """The snapshot for ``key``, opened, if there is one."""
    top = private_dir("nested", "snapshots")
    if top is None:
        return None
    found = Snapshot(os.path.join(top, key))
    try:
        for path in (found.state, found.ram):
            found.fds.append(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        os.utime(found.path)
    except OSError:
        while found.fds:
            os.close(found.fds.pop())
        return None
    return found


def draft(memory: int) -> Snapshot | None:
    """A new directory for a snapshot of ``memory`` bytes; None when there is no room for one."""
    top = private_dir("nested", "snapshots")
    try:
        if top is None or shutil.disk_usage(top).free < _ROOM:
            return None
        made = Snapshot(os.path.join(top, f"{_DRAFT}{os.getpid()}-{time.monotonic_ns()}"))
        os.mkdir(made.path, 0o700)
        for path in (made.state, made.ram):
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            made.fds.append(os.open(path, flags, 0o600))
        os.truncate(made.fds[RAM], memory)
    except OSError:
        return None
    return made


def save(qemu: Qemu, state: int) -> bool:
    """Write the devices' state, which stops the machine. False when QEMU cannot."""
    try:
        monitor = _ready(qemu, state)
        # Migration stops the machine at its end; stopping it before would keep it stopped.
        monitor.command("migrate", {"uri": "fd:state"})
        limit = time.monotonic() + _PATIENCE_S
        while (status := monitor.command("query-migrate").get("status")) != "completed":
            if status in ("failed", "cancelled") or time.monotonic() > limit:
                return False
            time.sleep(0.01)
    except (OSError, ValueError):
        return False
    return True


def load(qemu: Qemu, state: int) -> bool:
    """Fill a machine that was started with ``incoming`` and let it run. False when QEMU cannot."""
    try:
        _ready(qemu, state).command("migrate-incoming", {"uri": "fd:state"})
    except (OSError, ValueError):
        return False
    return True


def _ready(qemu: Qemu, fd: int) -> Monitor:
    """The monitor, once it knows ``fd`` as "state"."""
    monitor = qemu.monitor
    ignore = {"capability": "x-ignore-shared", "state": True}
    monitor.command("migrate-set-capabilities", {"capabilities": [ignore]})
    monitor.command("getfd", {"fdname": "state"}, fd)
    return monitor


def _prune(top: str) -> None:
    kept = []
    with suppress(OSError):
        for entry in os.scandir(top):
            if not entry.name.startswith(_DRAFT):
                kept.append((entry.stat().st_mtime, entry.path))
            elif not os.path.exists(f"/proc/{entry.name[len(_DRAFT) :].partition('-')[0]}"):
                Snapshot(entry.path).discard()  # whoever made it was killed
        for _, path in sorted(kept, reverse=True)[_KEEP:]:
            Snapshot(path).discard()
