"""The nested machine as it was before its first command, kept so that the next start is short.

QEMU's "x-ignore-shared": RAM is a file that the first machine writes through and later ones map
privately, so that pages are read when they are touched; the devices' state is a small second file.
"""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress

from vmm.nested.cache import private_dir

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from typing import Any

    from vmm.nested.qemu import Qemu

_KEEP = 3  # each takes some 300 MB
_ROOM = 1 << 30  # free space without which none is made
_PATIENCE_S = 60.0  # for one answer of QEMU
_DRAFT = ".draft-"


class Snapshot:
    """A directory with the files ``ram`` and ``state``."""

    __slots__ = ("path",)

    def __init__(self, path: str) -> None:
        self.path = path

    @property
    def ram(self) -> str:
        return os.path.join(self.path, "ram")

    @property
    def state(self) -> str:
        return os.path.join(self.path, "state")

    def discard(self) -> None:
        """Remove it."""
        shutil.rmtree(self.path, ignore_errors=True)

    def publish(self, key: str) -> Snapshot:
        """Make a draft the snapshot for ``key``; the older ones beyond a few go."""
        target = os.path.join(os.path.dirname(self.path), key)
        try:
            os.rename(self.path, target)
        except OSError:
            self.discard()  # somebody else was faster: theirs is as good
        _prune(os.path.dirname(target))
        return Snapshot(target)


def find(key: str) -> Snapshot | None:
    """The snapshot for ``key``, if there is one."""
    top = private_dir("nested", "snapshots")
    found = Snapshot(os.path.join(top, key)) if top else None
    if found is None or not os.path.exists(found.state):
        return None
    with suppress(OSError):
        os.utime(found.path)
    return found


def draft(memory: int) -> Snapshot | None:
    """A new directory for a snapshot of ``memory`` bytes; None when there is no room for one."""
    top = private_dir("nested", "snapshots")
    try:
        if top is None or shutil.disk_usage(top).free < _ROOM:
            return None
        made = Snapshot(os.path.join(top, f"{_DRAFT}{os.getpid()}-{time.monotonic_ns()}"))
        os.mkdir(made.path, 0o700)
        fd = os.open(made.ram, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.truncate(fd, memory)
        os.close(fd)
    except OSError:
        return None
    return made


def save(qemu: Qemu, target: Snapshot) -> bool:
    """Write the devices' state, which stops the machine. False when QEMU cannot."""
    partial = target.state + ".new"
    try:
        fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            monitor = _ready(qemu, fd)
            # Migration stops the machine at its end; stopping it before would keep it stopped.
            _command(monitor, "migrate", uri="fd:state")
            limit = time.monotonic() + _PATIENCE_S
            while (status := _command(monitor, "query-migrate").get("status")) != "completed":
                if status in ("failed", "cancelled") or time.monotonic() > limit:
                    return False
                time.sleep(0.01)
        finally:
            os.close(fd)
        os.rename(partial, target.state)
    except (OSError, ValueError):
        return False
    return True


def load(qemu: Qemu, source: Snapshot) -> bool:
    """Fill a machine that was started with ``incoming`` and let it run. False when QEMU cannot."""
    try:
        fd = os.open(source.state, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _command(_ready(qemu, fd), "migrate-incoming", uri="fd:state")
        finally:
            os.close(fd)
    except (OSError, ValueError):
        return False
    return True


def _ready(qemu: Qemu, fd: int) -> socket.socket:
    """The monitor, once it takes commands and knows ``fd`` as "state"."""
    monitor = qemu.monitor
    assert monitor is not None
    monitor.settimeout(_PATIENCE_S)
    _answer(monitor)  # its greeting
    _command(monitor, "qmp_capabilities")
    ignore = {"capability": "x-ignore-shared", "state": True}
    _command(monitor, "migrate-set-capabilities", capabilities=[ignore])
    _command(monitor, "getfd", fd, fdname="state")
    return monitor


def _command(
    monitor: socket.socket, name: str, fd: int = -1, **arguments: object
) -> dict[str, Any]:
    """One QMP command, with a descriptor for it or none; what it returns. ValueError: refused."""
    import json
    import socket

    data = json.dumps({"execute": name, "arguments": arguments}).encode()
    socket.send_fds(monitor, [data], [fd] if fd >= 0 else [])
    while True:
        answer = _answer(monitor)
        if "error" in answer:
            raise ValueError(f"{name}: {answer['error']}")
        if isinstance(answer.get("return"), dict):
            result: dict[str, Any] = answer["return"]
            return result


def _answer(monitor: socket.socket) -> dict[str, Any]:
    """The next line from QEMU; events are lines too."""
    import json

    line = b""
    while not line.endswith(b"\n"):
        byte = monitor.recv(1)
        if not byte:
            raise ValueError("QEMU closed its monitor")
        line += byte
    answer: dict[str, Any] = json.loads(line)
    return answer


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
