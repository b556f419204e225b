"""The builder of device trees, read back by libfdt's reader."""

from __future__ import annotations

import sys
from typing import Any

import libfdt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.arch import fdt
from vmm.arch.fdt import Fdt
from vmm.errors import BootError, HostError


def tree(blob: bytes) -> dict[str, Any]:
    """Nodes and properties as nested dicts, in order."""
    read = libfdt.Fdt(blob)

    def node(offset: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        at = read.first_property_offset(offset, libfdt.QUIET_NOTFOUND)
        while at >= 0:
            prop = read.get_property_by_offset(at)
            found[prop.name] = bytes(prop)
            at = read.next_property_offset(at, libfdt.QUIET_NOTFOUND)
        at = read.first_subnode(offset, libfdt.QUIET_NOTFOUND)
        while at >= 0:
            found[read.get_name(at)] = node(at)
            at = read.next_subnode(at, libfdt.QUIET_NOTFOUND)
        return found

    return node(0)


CELLS = {"#address-cells": b"\0\0\0\2", "#size-cells": b"\0\0\0\2"}


def test_a_machine() -> None:
    made = Fdt(["vmm,test", "linux,dummy-virt"], "a model")
    chip = made.phandle()
    made.memory([(0x8000_0000, 64 << 20), (1 << 36, 1 << 32)])
    made.chosen("a b=c", console="/serial@1000", initrd=(0x8400_0000, 0x1234), seed=b"\1\2\0\3")
    with made.node("serial", 0x1000):
        made.set("compatible", ["arm,pl011", "arm,primecell"])
        made.reg((0x1000, 0x1000), (0x1_0000_0000, 8))
        made.set("interrupts", [0, 1, 4])
        made.set("interrupt-parent", chip)
        made.set("dma-coherent", True)
        made.set("disabled", False)
        with made.node("child"):
            made.set("x", b"raw")
    assert tree(made.finish()) == {
        **CELLS,
        "compatible": b"vmm,test\0linux,dummy-virt\0",
        "model": b"a model\0",
        "memory@80000000": {
            "device_type": b"memory\0",
            "reg": (0x8000_0000).to_bytes(8, "big") + (64 << 20).to_bytes(8, "big"),
        },
        "memory@1000000000": {
            "device_type": b"memory\0",
            "reg": (1 << 36).to_bytes(8, "big") + (1 << 32).to_bytes(8, "big"),
        },
        "chosen": {
            "bootargs": b"a b=c\0",
            "stdout-path": b"/serial@1000\0",
            "linux,initrd-start": (0x8400_0000).to_bytes(8, "big"),
            "linux,initrd-end": (0x8400_1234).to_bytes(8, "big"),
            "rng-seed": b"\1\2\0\3",
        },
        "serial@1000": {
            "compatible": b"arm,pl011\0arm,primecell\0",
            "reg": bytes.fromhex(
                "0000000000001000 0000000000001000 0000000100000000 0000000000000008"
            ),
            "interrupts": bytes.fromhex("00000000 00000001 00000004"),
            "interrupt-parent": chip.to_bytes(4, "big"),
            "dma-coherent": b"",
            "child": {"x": b"raw"},
        },
    }


def test_phandles_differ() -> None:
    made = Fdt()
    assert len({made.phandle() for _ in range(10)}) == 10
    assert 0 not in {made.phandle()}


def test_little_is_chosen() -> None:
    made = Fdt()
    made.chosen("")
    assert tree(made.finish()) == {**CELLS, "chosen": {"bootargs": b"\0"}}


def test_too_large_is_one_sentence() -> None:
    made = Fdt()
    made.set("x", bytes(fdt.SIZE_MAX))
    with pytest.raises(BootError, match=r"device tree is 209\d{4} bytes long .* takes 2097152"):
        made.finish()
    made = Fdt()
    made.chosen("y" * 5000)
    with pytest.raises(BootError, match="takes 4096"):
        made.finish(4096)


@pytest.mark.parametrize("value", [-1, 1 << 32])
def test_a_cell_has_32_bits(value: int) -> None:
    with pytest.raises(OverflowError):
        Fdt().set("x", value)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libfdt", None)
    with pytest.raises(HostError, match="pip install pylibfdt"):
        Fdt()


names = st.text("abcdefghijklmnopqrstuvwxyz0123456789,._+-", min_size=1, max_size=31)
values = st.one_of(
    st.just(True),
    st.integers(0, (1 << 32) - 1),
    st.text(st.characters(codec="utf-8", exclude_characters="\0")),
    st.binary(max_size=3000),
    st.lists(st.integers(0, (1 << 32) - 1), max_size=20),
)
nodes = st.recursive(
    st.dictionaries(names.map("p".__add__), values, max_size=4),
    lambda children: st.dictionaries(names.map("n".__add__), children, max_size=4),
    max_leaves=12,
)


@given(nodes)
def test_any_tree_is_read_as_it_was_written(wanted: dict[str, Any]) -> None:
    made = Fdt()

    def write(content: dict[str, Any]) -> dict[str, Any]:
        expected: dict[str, Any] = {}
        for name, value in content.items():
            if isinstance(value, dict):
                with made.node(name):
                    expected[name] = write(value)
            else:
                made.set(name, value)
                expected[name] = encoded(value)
        return expected

    assert tree_of(made, write(wanted))


def encoded(value: object) -> bytes:
    if value is True:
        return b""
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return value.encode() + b"\0"
    numbers = value if isinstance(value, list) else [value]
    return b"".join(n.to_bytes(4, "big") for n in numbers)


def tree_of(made: Fdt, expected: dict[str, Any]) -> bool:
    return tree(made.finish(1 << 30)) == {**CELLS, **expected}
