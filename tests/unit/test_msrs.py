"""Boot MSRs."""

from __future__ import annotations

from vmm.arch.x86_64 import msrs


def test_only_what_kvm_lists_is_set() -> None:
    assert msrs.boot_msrs([], mtrr=False) == []
    assert msrs.boot_msrs([0x277, 0x999], mtrr=False) == [(0x277, 0x0007040600070406)]


def test_the_default_memory_type_is_write_back_without_fixed_ranges() -> None:
    assert msrs.boot_msrs([]) == [(0x2FF, 1 << 11 | 6)]


def test_a_full_list() -> None:
    values = dict(msrs.boot_msrs(range(0x1000)))
    assert values[0x1A0] & 1  # fast strings
    assert values[0x10] == 0
    assert values[0x174] == values[0x175] == values[0x176] == 0
