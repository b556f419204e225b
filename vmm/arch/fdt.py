"""Flattened device trees: what tells a guest its hardware where there is no ACPI. By libfdt.

Devicetree Specification v0.4. Addresses and sizes are two cells each, at every bus.
"""

from __future__ import annotations

from contextlib import contextmanager

from vmm.errors import BootError, HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any, TypeAlias

    Value: TypeAlias = bool | int | str | bytes | Sequence[int] | Sequence[str]

#: The largest that kernels take. Linux arch/arm64/booting.rst §2.
SIZE_MAX = 2 << 20
_SIZE_HINT = 16 << 10


class Fdt:
    """A tree under construction; the root is open until ``finish``. Nodes are written in order,
    a node's properties before its children."""

    def __init__(self, compatible: Sequence[str] = (), model: str = "") -> None:
        """Raises HostError when the library is missing."""
        try:
            import libfdt  # type: ignore[import-untyped]
        except ImportError as e:
            raise HostError(
                "This machine is described by a device tree, and Python's libfdt module is "
                "missing; pip install pylibfdt"
            ) from e
        self._writer: Any = libfdt.FdtSw(_SIZE_HINT)
        self._phandles = 0
        self._writer.finish_reservemap()
        self._writer.begin_node("")
        self.set("#address-cells", 2)
        self.set("#size-cells", 2)
        if compatible:
            self.set("compatible", list(compatible))
        if model:
            self.set("model", model)

    @contextmanager
    def node(self, name: str, address: int | None = None) -> Iterator[None]:
        """A child of the node that is open, with its unit address. v0.4 §2.2.1."""
        self._writer.begin_node(name if address is None else f"{name}@{address:x}")
        yield
        self._writer.end_node()

    def set(self, name: str, value: Value) -> None:
        """A property of the open node: True is an empty one and False none, a number a cell,
        several as many cells, text with its NUL, several one after another, bytes as they are.
        v0.4 §2.2.4."""
        if value is not False:
            self._writer.property(name, _encode(value))

    def set64(self, name: str, *values: int) -> None:
        """Numbers of two cells each."""
        self._writer.property(name, b"".join(v.to_bytes(8, "big") for v in values))

    def reg(self, *ranges: tuple[int, int]) -> None:
        """(address, size) of each of the device's ranges. v0.4 §2.3.6."""
        self.set64("reg", *(number for pair in ranges for number in pair))

    def phandle(self) -> int:
        """A number for a node that others speak of, not set yet: ``set("phandle", n)`` there."""
        self._phandles += 1
        return self._phandles

    def memory(self, ranges: Sequence[tuple[int, int]]) -> None:
        """RAM: (gpa, size) each. v0.4 §3.4."""
        for gpa, size in ranges:
            with self.node("memory", gpa):
                self.set("device_type", "memory")
                self.reg((gpa, size))

    def chosen(
        self,
        cmdline: str,
        *,
        console: str = "",
        initrd: tuple[int, int] | None = None,
        seed: bytes = b"",
    ) -> None:
        """What the kernel is told: its command line, the path of its first console, (gpa, size)
        of its initrd, entropy. v0.4 §3.6; Linux chosen.yaml."""
        with self.node("chosen"):
            self.set("bootargs", cmdline)
            if console:
                self.set("stdout-path", console)
            if initrd is not None:
                self.set64("linux,initrd-start", initrd[0])
                self.set64("linux,initrd-end", initrd[0] + initrd[1])
            if seed:
                self.set("rng-seed", seed)

    def finish(self, limit: int = SIZE_MAX) -> bytes:
        """The blob; nothing can be added after that. Raises BootError when it is longer than
        ``limit`` bytes."""
        self._writer.end_node()
        blob = bytes(self._writer.as_fdt().as_bytearray())
        if len(blob) > limit:
            raise BootError(
                f"this machine's device tree is {len(blob)} bytes long and a kernel takes {limit}; "
                "give it fewer devices or a shorter command line"
            )
        return blob


def _encode(value: Value) -> bytes:
    if value is True:
        return b""
    if isinstance(value, bytes):
        return value
    if isinstance(value, (int, str)):
        return _item(value)
    return b"".join(_item(item) for item in value)


def _item(item: int | str) -> bytes:
    if isinstance(item, str):
        return item.encode("utf-8", "replace") + b"\0"
    return item.to_bytes(4, "big")
