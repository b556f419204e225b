"""Builds a guest's first root file system: /init, modules and the plan."""

from __future__ import annotations

import hashlib
import io
import os
from contextlib import suppress

from vmm.errors import HostError
from vmm.guest.cpio import S_IFCHR, CpioWriter
from vmm.guest.modules import read_module

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.guest.kernels import KernelTree
    from vmm.guest.plan import Plan

_KEEP = 6  # bases kept in the cache: a few kernels, a few sets of modules
_FORMAT = "1"  # part of the cache key: change it with what _write_base writes


class Initramfs:
    """What every start with one kernel, one /init and one set of modules has in common.

    ``modules`` are the names asked for; ``load`` gives the paths, inside the archive, that the
    plan has to load for some of them, in order; ``key`` changes with what is in the archive.
    """

    __slots__ = ("_init", "_paths", "_tree", "base", "key")

    def __init__(self, kernel: KernelTree, modules: list[str], cache: str | None) -> None:
        """Take the base from the directory ``cache``, if any, or build and try to keep it there."""
        from vmm.guest.initbin import init_path

        self._tree = kernel.modules
        self._paths = self._tree.resolve(modules)
        with open(init_path(), "rb") as file:
            self._init = file.read()
        key = hashlib.sha256(_FORMAT.encode() + self._init)
        for path in self._paths:
            stat = os.stat(path)
            key.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode(errors="replace"))
        self.key = key.hexdigest()[:24]
        cached = os.path.join(cache, f"{self.key}.cpio") if cache else None
        self.base = self._load(cached)

    def load(self, names: list[str]) -> list[str]:
        """Paths in the archive of these modules and of what they need, in the order to load."""
        return [_inside(path) for path in self._tree.resolve(names)]

    def with_plan(self, plan: Plan) -> int:
        """A memfd with the archive and ``plan`` as /plan; the caller owns it."""
        extra = io.BytesIO()
        writer = CpioWriter(extra)
        writer.add_file("plan", plan.encode(), 0o600)
        writer.close()
        fd = os.memfd_create("vmm-initramfs")
        try:
            with os.fdopen(os.dup(fd), "wb") as file:
                file.write(self.base)
                file.write(extra.getbuffer())
        except OSError as error:
            os.close(fd)
            raise HostError(f"Cannot write the initramfs to memory: {error.strerror}") from error
        return fd

    def _load(self, cached: str | None) -> bytes:
        if cached is not None:
            with suppress(OSError), open(cached, "rb") as file:
                os.utime(cached)
                return file.read()
        out = io.BytesIO()
        writer = CpioWriter(out)
        writer.add_node("dev/console", S_IFCHR | 0o600, 5, 1)
        writer.add_node("dev/null", S_IFCHR | 0o666, 1, 3)
        writer.add_file("init", self._init, 0o755)
        for path in self._paths:
            writer.add_file(_inside(path), read_module(path))
        writer.close()
        data = out.getvalue()
        if cached is not None:
            with suppress(OSError):  # a full disk only costs the next start some time
                _store(cached, data)
        return data


def _inside(path: str) -> str:
    return "/modules/" + os.path.basename(path).partition(".ko")[0] + ".ko"


def _store(path: str, data: bytes) -> None:
    directory = os.path.dirname(path)
    partial = f"{path}.{os.getpid()}"
    with open(partial, "wb") as file:
        file.write(data)
    os.replace(partial, path)
    bases = list(os.scandir(directory))
    bases.sort(key=lambda entry: entry.stat().st_mtime, reverse=True)
    for entry in bases[_KEEP:]:
        os.unlink(entry.path)
