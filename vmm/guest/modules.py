"""Which kernel modules are needed, in which order, and their contents ready to load.

Works on a tree as ``make modules_install`` or a Debian package leaves it. Dependencies are read
from the modules themselves (their .modinfo section), so a tree on which depmod never ran, such
as an unpacked package, is as good as an installed one.
"""

from __future__ import annotations

import os
import struct

from vmm.errors import HostError

_SUFFIXES = (".ko", ".ko.xz", ".ko.zst", ".ko.gz")
_SIGNATURE = b"~Module signature appended~\n"
_NOT_FOUND = "The kernel modules in {} have no {}: choose a kernel that has it as a module"

_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")  # ELF-64 file header
_SHDR = struct.Struct("<IIQQQQIIQQ")  # section header


def module_name(path: str) -> str:
    """The name the kernel knows a module by: ``kernel/fs/9p/9p.ko.xz`` is ``9p``."""
    name = path.rpartition("/")[2].partition(".ko")[0]
    return name.removesuffix(".o").replace("-", "_")  # modules.order has .o from Linux 6.4 on


class ModuleTree:
    """The modules of one kernel, found by name below ``root``: /lib/modules/VERSION, a build tree,
    or "" for a kernel without any."""

    __slots__ = ("_builtin", "_needs", "_paths", "root")

    def __init__(self, root: str) -> None:
        """Read the lists that the tree brings along. HostError when there is no such tree."""
        self.root = root
        self._paths: dict[str, str] = {}
        self._builtin: set[str] = set()
        self._needs: dict[str, tuple[list[str], list[str]]] = {}  # by path, once read
        if not root:
            return
        if not os.path.isdir(root):
            raise HostError(f"There is no directory of kernel modules {root}")
        for path in self._lines("modules.builtin"):
            self._builtin.add(module_name(path))
        for path in self._lines("modules.dep") or self._lines("modules.order") or self._walk():
            self._paths[module_name(path)] = path

    def has(self, name: str) -> bool:
        """Is it there, as a module or inside the kernel?"""
        name = name.replace("-", "_")
        return name in self._builtin or self._find(name) is not None

    def resolve(self, names: list[str]) -> list[str]:
        """Full paths of the modules for ``names``, each after what it needs; built-ins left out.

        Hard and "pre" soft dependencies come first, a soft one only when it is there.
        HostError names a module that is missing.
        """
        order: list[str] = []
        done: set[str] = set()
        for name in names:
            self._visit(name.replace("-", "_"), order, done)
        return order

    def _visit(self, name: str, order: list[str], done: set[str]) -> None:
        if name in done or name in self._builtin:
            return
        done.add(name)
        path = self._find(name)
        if path is None:
            raise HostError(_NOT_FOUND.format(self.root, name))
        if path not in self._needs:
            self._needs[path] = dependencies(read_module(path))
        hard, soft = self._needs[path]
        for other in hard:
            self._visit(other, order, done)
        for other in soft:
            # "crc32c" is an alias of several; the generic one is always good.
            for choice in (other, other + "_generic"):
                if self.has(choice):
                    self._visit(choice, order, done)
                    break
        order.append(path)

    def _find(self, name: str) -> str | None:
        path = self._paths.get(name)
        if path is None:
            return None
        # modules.order names .ko, or .o, also where the files were compressed afterwards; and a
        # build tree's, until Linux 6.4, speaks of what will be installed.
        stem = path.partition(".ko")[0].removesuffix(".o")
        places = [os.path.join(self.root, part) for part in (stem, stem.removeprefix("kernel/"))]
        choices = (place + end for place in places for end in _SUFFIXES)
        return next((choice for choice in choices if os.path.exists(choice)), None)

    def _lines(self, name: str) -> list[str]:
        try:
            with open(os.path.join(self.root, name), encoding="utf-8", errors="replace") as file:
                return [line.partition(":")[0].strip() for line in file if line.strip()]
        except OSError:
            return []

    def _walk(self) -> list[str]:
        found = []
        for top, _, files in os.walk(self.root):
            found += [os.path.join(top, name) for name in files if name.endswith(_SUFFIXES)]
        return found


def read_module(path: str) -> bytes:
    """A module's ELF image, decompressed, without its signature.

    Checking a signature costs the guest time and says nothing: its kernel takes unsigned ones.
    """
    with open(path, "rb") as file:
        data = file.read()
    try:
        if path.endswith(".xz"):
            import lzma

            data = lzma.decompress(data)
        elif path.endswith(".gz"):
            import gzip

            data = gzip.decompress(data)
        elif path.endswith(".zst"):
            import zstandard

            data = zstandard.ZstdDecompressor().decompressobj().decompress(data)
    except Exception as error:
        raise HostError(f"The kernel module {path} cannot be unpacked: {error}") from error
    return _strip_signature(data)


def _strip_signature(data: bytes) -> bytes:
    # struct module_signature stands before the marker; its last four bytes are the length of the
    # signature, big-endian (include/linux/module_signature.h).
    if not data.endswith(_SIGNATURE):
        return data
    end = len(data) - len(_SIGNATURE)
    length = int.from_bytes(data[end - 4 : end], "big") + 12
    return data[: end - length] if length < end else data


def dependencies(image: bytes) -> tuple[list[str], list[str]]:
    """What a module's .modinfo says it needs before it: (hard, soft) names."""
    hard: list[str] = []
    soft: list[str] = []
    for item in _section(image, b".modinfo").split(b"\0"):
        key, _, value = item.decode("ascii", "replace").partition("=")
        if key == "depends":
            hard += [name.replace("-", "_") for name in value.split(",") if name]
        elif key == "softdep":
            # "pre: a b post: c"
            before = value.partition("post:")[0].replace("pre:", " ")
            soft += [name.replace("-", "_") for name in before.split()]
    return hard, soft


def _section(image: bytes, wanted: bytes) -> bytes:
    """The contents of one section of a 64-bit little-endian ELF file; empty when not found."""
    try:
        header = _EHDR.unpack_from(image)
        if not header[0].startswith(b"\x7fELF\x02\x01"):
            return b""
        shoff, shentsize, shnum, shstrndx = header[6], header[11], header[12], header[13]
        sections = [_SHDR.unpack_from(image, shoff + i * shentsize) for i in range(shnum)]
        names_at = sections[shstrndx][4]
        for name, _, _, _, offset, size, *_ in sections:
            if image.startswith(wanted + b"\0", names_at + name):
                return image[offset : offset + size]
    except (struct.error, IndexError):
        pass
    return b""
