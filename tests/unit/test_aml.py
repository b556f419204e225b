"""AML terms, byte for byte as the specification prints them, and by PkgLength's inverse."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmm.arch.x86_64 import aml


def decode_pkg_length(data: bytes) -> tuple[int, int]:
    """(total length, bytes the field takes). ACPI-6.5 §20.2.4."""
    extra = data[0] >> 6
    if extra == 0:
        return data[0] & 0x3F, 1
    total = data[0] & 0xF
    for i in range(extra):
        total |= data[1 + i] << (4 + 8 * i)
    return total, 1 + extra


@given(st.integers(0, (1 << 28) - 5))
def test_pkg_length_counts_itself(size: int) -> None:
    total, field = decode_pkg_length(aml.pkg_length(size))
    assert len(aml.pkg_length(size)) == field
    assert total == size + field


@pytest.mark.parametrize(
    ("size", "field"),
    [(0, 1), (62, 1), (63, 2), (4093, 2), (4094, 3), ((1 << 20) - 4, 3), ((1 << 20) - 3, 4)],
)
def test_pkg_length_takes_the_shortest_form(size: int, field: int) -> None:
    assert len(aml.pkg_length(size)) == field


def test_pkg_length_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="too long"):
        aml.pkg_length(1 << 28)


@pytest.mark.parametrize(
    ("path", "encoded"),
    [
        ("_CRS", b"_CRS"),
        ("\\_S5", b"\\_S5_"),
        ("\\", b"\\\x00"),
        ("\\_SB.PCI0", b"\\\x2e_SB_PCI0"),
        ("^^A.B.C", b"^^\x2f\x03A___B___C___"),
    ],
)
def test_name_string(path: str, encoded: bytes) -> None:
    assert aml.name_string(path) == encoded


@pytest.mark.parametrize("path", ["TOOLONG", "1ABC", "ab", "A-B", "A..B", "ÄB"])
def test_name_string_refuses_what_is_no_name(path: str) -> None:
    with pytest.raises(ValueError, match="not an AML name segment"):
        aml.name_string(path)


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (0, "00"),
        (1, "01"),
        (2, "0a02"),
        (0xFF, "0aff"),
        (0x100, "0b0001"),
        (0x10000, "0c00000100"),
        (1 << 32, "0e0000000001000000"),
    ],
)
def test_integer_is_the_shortest(value: int, encoded: str) -> None:
    assert aml.integer(value).hex() == encoded


@pytest.mark.parametrize("value", [-1, 1 << 64])
def test_integer_refuses_what_is_not_64_bit(value: int) -> None:
    with pytest.raises(ValueError, match="64-bit"):
        aml.integer(value)


def test_eisa_id_is_big_endian_letters() -> None:
    assert aml.eisa_id("PNP0A03").hex() == "0c41d00a03"


def test_uuid_is_mixed_endian() -> None:
    assert (
        aml.uuid("33DB4D5B-1FF7-401C-9657-7441C03DD766")
        .hex()
        .endswith("5b4ddb33f71f1c4096577441c03dd766")
    )


def test_resource_template_bytes() -> None:
    crs = aml.resources(
        aml.io(0x3F8, 8),
        aml.irq(4),
        aml.memory32_fixed(0xD0000000, 0x200),
        aml.interrupt(5),
    )
    body = (
        "4701f803f8030108"  # IO
        "221000"  # IRQ
        "86090001000000d000020000"  # Memory32Fixed
        "890600030105000000"  # Interrupt: consumer, edge, active-high, exclusive
        "7900"  # End Tag
    )
    size = len(bytes.fromhex(body))
    assert crs.hex() == "11" + aml.pkg_length(size + 2).hex() + "0a" + f"{size:02x}" + body
    assert aml.interrupt(20, level=True, shared=True).hex() == "890600090114000000"


def test_windows_state_both_ends_and_the_length() -> None:
    assert aml.word_bus(0, 255).hex() == "880d00020c0000000000ff0000000001"
    assert aml.word_io(0xD00, 0xFFFF).hex() == "880d00010c030000000dffff000000f3"
    assert aml.dword_memory(0xC0000000, 0x20000000).hex() == (
        "871700000c0100000000000000c0ffffffdf0000000000000020"
    )
    assert aml.qword_memory(1 << 40, 1 << 30)[14:22] == (1 << 40).to_bytes(8, "little")
