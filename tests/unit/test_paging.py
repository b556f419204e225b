"""Walks of page tables laid out by hand, one per mode."""

from __future__ import annotations

import pytest

from vmm.arch.x86_64.paging import levels, translate
from vmm.errors import MemoryFault

P, PS = 1, 1 << 7
NX = 1 << 63


class Tables:
    """Sparse memory: what was not written and is below ``size`` reads as zero."""

    def __init__(self, size: int = 1 << 20) -> None:
        self.size = size
        self.words: dict[int, int] = {}

    def read_int(self, gpa: int, size: int) -> int:
        if not 0 <= gpa <= self.size - size:
            raise MemoryFault(gpa, size)
        return self.words.get(gpa, 0) & ((1 << 8 * size) - 1)


def sregs(mode: str, cr3: int = 0x1000) -> dict[str, int]:
    return {
        "off": {"cr0": 1, "cr3": cr3, "cr4": 0, "efer": 0},
        "32": {"cr0": 0x8000_0001, "cr3": cr3, "cr4": 0x10, "efer": 0},
        "pae": {"cr0": 0x8000_0001, "cr3": cr3, "cr4": 0x20, "efer": 0},
        "4": {"cr0": 0x8000_0001, "cr3": cr3, "cr4": 0x20, "efer": 0x500},
        "5": {"cr0": 0x8000_0001, "cr3": cr3, "cr4": 0x1020, "efer": 0x500},
    }[mode]


def test_levels() -> None:
    assert [levels(sregs(m)) for m in ("off", "32", "pae", "4", "5")] == [0, 2, 3, 4, 5]


def test_no_paging_is_the_address_itself() -> None:
    assert translate(Tables(), sregs("off"), 0x1_0000_1234) == 0x1234


def test_four_levels() -> None:
    t = Tables()
    # The kernel's own address 0xffffffff81000000: indices 511, 510, 8, 0.
    t.words = {
        0x1000 + 8 * 511: 0x2000 | P,
        0x2000 + 8 * 510: 0x3000 | P,
        0x3000 + 8 * 8: 0x4000 | P | NX,
        0x4000: 0x5000 | P | NX,
        0x3000 + 8 * 9: 0x60_0000 | P | PS | NX,
        0x2000 + 8 * 511: 0xC000_0000 | P | PS,
    }
    s = sregs("4", 0x1000 | 0x18)
    assert translate(t, s, 0xFFFF_FFFF_8100_0123) == 0x5123
    assert translate(t, s, 0xFFFF_FFFF_8120_1234) == 0x60_1234
    assert translate(t, s, 0xFFFF_FFFF_C012_3456) == 0xC012_3456
    assert translate(t, s, 0xFFFF_FFFF_8100_1000) is None
    assert translate(t, s, 0x1234) is None


@pytest.mark.parametrize("linear", [0x8000_0000_0000, 0xFFFF_7FFF_FFFF_FFFF])
def test_what_is_not_canonical_maps_nothing(linear: int) -> None:
    t = Tables()
    t.words = {0x1000 + 8 * i: 0x1000 | P for i in range(512)}
    assert translate(t, sregs("4"), linear) is None


def test_five_levels() -> None:
    t = Tables()
    t.words = {
        0x1000 + 8 * 1: 0x2000 | P,
        0x2000: 0x3000 | P,
        0x3000: 0x4000 | P,
        0x4000: 0x5000 | P,
        0x5000 + 8 * 7: 0x9000 | P,
    }
    assert translate(t, sregs("5"), (1 << 48) | 0x7ABC) == 0x9ABC
    # PS in the two upper levels is reserved, not a page.
    t.words[0x2000] |= PS
    assert translate(t, sregs("5"), (1 << 48) | 0x7ABC) == 0x9ABC


def test_pae() -> None:
    t = Tables()
    # cr3 is aligned to 32 bytes only.
    t.words = {
        0x1020 + 8 * 3: 0x2000 | P,
        0x2000 + 8 * 5: 0x3000 | P,
        0x3000 + 8 * 9: 0x1_2345_6000 | P | NX,
        0x2000 + 8 * 6: 0x20_0000 | P | PS,
    }
    s = sregs("pae", 0x1020)
    linear = 3 << 30 | 5 << 21 | 9 << 12 | 0x42
    assert translate(t, s, linear) == 0x1_2345_6042
    assert translate(t, s, 3 << 30 | 6 << 21 | 0x1_2345) == 0x21_2345
    assert translate(t, s, 0x1000) is None


def test_32_bit() -> None:
    t = Tables()
    t.words = {
        0x1000 + 4 * 1: 0x2000 | P,
        0x2000 + 4 * 2: 0x7000 | P,
        0x1000 + 4 * 2: 0x0080_0000 | 1 << 13 | P | PS,
    }
    s = sregs("32")
    assert translate(t, s, 1 << 22 | 2 << 12 | 0x10) == 0x7010
    assert translate(t, s, 2 << 22 | 0x1_2345) == 0x1_0081_2345
    assert translate(t, s, 3 << 22) is None
    # Without PSE the bit means nothing and the entry leads to a table.
    t.words[0x1000 + 4 * 2] = 0x2000 | P | PS
    assert translate(t, {**s, "cr4": 0}, 2 << 22 | 2 << 12) == 0x7000


@pytest.mark.parametrize("mode", ["32", "pae", "4", "5"])
def test_tables_outside_ram_map_nothing(mode: str) -> None:
    assert translate(Tables(), sregs(mode, 0xFFFF_F000), 0x1234) is None
    t = Tables()
    t.words = {0x1000: 0xFFFF_F000 | P}
    assert translate(t, sregs(mode), 0x1234) is None
