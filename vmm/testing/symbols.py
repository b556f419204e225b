"""Names for a kernel's addresses, from its System.map."""

from __future__ import annotations

import os
import re
from bisect import bisect_right

from vmm.arch.base import native_kernels

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_OFFSET = re.compile(r"Kernel Offset: 0x([0-9a-f]{1,16}) from")
_FAR = 1 << 20  # a symbol is no name for what is further away
_MAX_MAP = 64 << 20


class Symbols:
    """Sorted (address, name) pairs of a kernel."""

    def __init__(self, pairs: Iterable[tuple[int, str]]) -> None:
        ordered = sorted(pairs)
        self._addresses = [address for address, _ in ordered]
        self._names = [name for _, name in ordered]

    def __len__(self) -> int:
        return len(self._names)

    def name(self, address: int) -> str | None:
        """The symbol and how far behind it: function+0x12; or None."""
        at = bisect_right(self._addresses, address) - 1
        if at < 0 or address - self._addresses[at] > _FAR:
            return None
        return f"{self._names[at]}+{address - self._addresses[at]:#x}"

    def annotate(self, text: str) -> str:
        """The text with a name behind each address that has none yet. Where the kernel says how
        far it was moved (KASLR), that is taken off first."""
        moved = _OFFSET.search(text)
        offset = int(moved[1], 16) if moved else 0

        def named(match: re.Match[str]) -> str:
            name = self.name(int(match[1], 16) - offset)
            return f"{match[0]} ({name})" if name else match[0]

        # Of the kernel's text or of a module, as oopses and registers have it.
        address = rf"\b(?:0x)?({native_kernels().TEXT_ADDRESS})\b(?! *\(?[\w.]+\+0x)"
        return re.sub(address, named, text)


def load(kernel: str) -> Symbols | None:
    """The symbols of the kernel image at ``kernel``, from the System.map beside it or at the top of
    the tree it was built in; None when there are none to be had."""
    for path in _candidates(os.path.realpath(kernel)):
        try:
            found = _system_map(path)
        except (OSError, ValueError):
            continue
        if len(found):
            return found
    return None


def _candidates(kernel: str) -> list[str]:
    folder, name = os.path.split(kernel)
    version = name.partition("-")[2]
    deep = native_kernels().BUILD_IMAGE.count("/")
    top = os.path.normpath(os.path.join(folder, *[".."] * deep))
    found = [os.path.join(folder, f"System.map-{version}")] if version else []
    return [*found, *(os.path.join(place, "System.map") for place in (folder, top))]


def _system_map(path: str) -> Symbols:
    if os.path.getsize(path) > _MAX_MAP:
        raise ValueError("no System.map is as long as that")
    pairs = []
    with open(path, encoding="ascii", errors="replace") as file:
        for line in file:
            words = line.split()
            if len(words) == 3 and words[1] in "tTwW":
                pairs.append((int(words[0], 16), words[2]))
    return Symbols(pairs)
