"""The ACPI tables: checksums, pointers, contents, and iasl's opinion where it is installed."""

from __future__ import annotations

import itertools
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from vmm.arch.x86_64 import acpi, aml, layout
from vmm.errors import ConfigError

PCI = acpi.PciHost(0xE0000000, 255, (0xC0000000, 0x20000000), (1 << 40, 1 << 38))
MINIMAL = acpi.Hardware()
FULL = acpi.Hardware(
    range(4),
    pci=PCI,
    virtio_mmio=[(0xD0000000 + 0x200 * i, 0x200, 5 + i) for i in range(3)],
    serial=[(0x3F8, 4), (0x2F8, 3)],
    pvpanic=0x505,
    rtc=True,
    extra=[aml.device("XTRA", aml.name("_HID", aml.string("VMMX0001")))],
)
MANY = acpi.Hardware([2 * i for i in range(300)], pci=PCI, serial=[(0x3F8, 4)])
MACHINES = {"minimal": MINIMAL, "full": FULL, "many": MANY}


class Ram:
    def __init__(self) -> None:
        self.data = bytearray(1 << 20)

    def write(self, gpa: int, data: bytes, /) -> None:
        assert gpa >= layout.ACPI_TABLES
        assert gpa + len(data) <= len(self.data)
        self.data[gpa : gpa + len(data)] = data

    def table(self, gpa: int) -> bytes:
        return bytes(self.data[gpa : gpa + struct.unpack_from("<I", self.data, gpa + 4)[0]])


def walk(ram: Ram, rsdp: int) -> dict[bytes, bytes]:
    """Follow the pointers as an OS does, checking every checksum."""
    root = bytes(ram.data[rsdp : rsdp + 36])
    assert root[:8] == b"RSD PTR "
    assert sum(root[:20]) & 0xFF == 0
    assert sum(root) & 0xFF == 0
    xsdt = ram.table(struct.unpack_from("<Q", root, 24)[0])
    found = {b"XSDT": xsdt}
    for (gpa,) in struct.iter_unpack("<Q", xsdt[36:]):
        found[bytes(ram.data[gpa : gpa + 4])] = ram.table(gpa)
    facs, dsdt = struct.unpack_from("<II", found[b"FACP"], 36)
    assert struct.unpack_from("<Q", found[b"FACP"], 140)[0] == dsdt
    assert facs % 64 == 0
    found[b"DSDT"] = ram.table(dsdt)
    for data in found.values():
        assert sum(data) & 0xFF == 0
    assert ram.data[facs : facs + 4] == b"FACS"
    return found


@pytest.mark.parametrize("name", MACHINES)
def test_every_table_is_reached_from_the_rsdp_and_sums_to_zero(name: str) -> None:
    hw, ram = MACHINES[name], Ram()
    rsdp = acpi.build(hw, ram)
    assert rsdp == layout.ACPI_TABLES
    names = {b"XSDT", b"FACP", b"APIC", b"DSDT"} | ({b"MCFG"} if hw.pci else set())
    assert set(walk(ram, rsdp)) == names


@pytest.mark.parametrize("name", MACHINES)
def test_tables_do_not_overlap(name: str) -> None:
    spans = sorted((gpa, gpa + len(data)) for gpa, data in acpi.tables(MACHINES[name]).values())
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))


def test_too_many_devices_are_refused_in_one_sentence() -> None:
    devices = [(0xD0000000 + 0x1000 * i, 0x200, 5) for i in range(3000)]
    with pytest.raises(ConfigError, match="3000 virtio-mmio devices"):
        acpi.build(acpi.Hardware(virtio_mmio=devices), Ram())


def test_fadt_says_where_the_registers_are() -> None:
    fadt = acpi.tables(acpi.Hardware(rtc=True, pm_base=0xB000, sci=11))["FACP"][1]
    assert len(fadt) == 276
    sci, smi = struct.unpack_from("<HI", fadt, 46)
    assert (sci, smi) == (11, 0)
    evt, _, cnt = struct.unpack_from("<III", fadt, 56)
    assert (evt, cnt) == (0xB000, 0xB004)
    assert fadt[88:96] == bytes((4, 2, 0, 0, 0, 0, 0, 0))  # PM_TMR_LEN 0: no timer
    boot_arch, flags = struct.unpack_from("<HxI", fadt, 109)
    assert boot_arch & 1 << 1 == 0  # no 8042
    assert boot_arch & 1 << 2  # no VGA
    assert boot_arch & 1 << 3 == 0  # MSI works
    assert boot_arch & 1 << 5 == 0  # a CMOS clock
    assert flags & 1 << 10  # RESET_REG_SUP
    assert flags & 1 << 20 == 0  # not hardware-reduced
    assert flags & 1 << 4 == 0  # fixed power button
    assert fadt[116:129].hex() == "01080001f90c000000000000" + "06"
    assert struct.unpack_from("<Q", fadt, 152)[0] == 0xB000  # X_PM1a_EVT_BLK
    assert struct.unpack_from("<Q", fadt, 176)[0] == 0xB004  # X_PM1a_CNT_BLK


def test_fadt_without_a_clock_says_so() -> None:
    boot_arch = struct.unpack_from("<H", acpi.tables(MINIMAL)["FACP"][1], 109)[0]
    assert boot_arch & 1 << 5


def madt_entries(hw: acpi.Hardware) -> list[bytes]:
    data, out = acpi.tables(hw)["APIC"][1][44:], []
    while data:
        out.append(data[: data[1]])
        data = data[data[1] :]
    return out


def test_madt_lists_processors_ioapic_and_overrides() -> None:
    entries = madt_entries(acpi.Hardware([0, 2, 4]))
    assert [e for e in entries if e[0] == 0] == [
        struct.pack("<BBBBI", 0, 8, uid, 2 * uid, 1) for uid in range(3)
    ]
    assert [e for e in entries if e[0] == 1] == [struct.pack("<BBBBII", 1, 12, 0, 0, 0xFEC00000, 0)]
    assert [struct.unpack("<xxBBIH", e) for e in entries if e[0] == 2] == [
        (0, 0, 2, 0),
        (0, 9, 9, 0xD),
    ]


def test_madt_uses_x2apic_entries_where_a_byte_is_too_small() -> None:
    entries = madt_entries(MANY)
    local = [e[3] for e in entries if e[0] == 0]
    x2 = [struct.unpack("<4xIII", e) for e in entries if e[0] == 9]
    assert local == [2 * i for i in range(128)]
    assert x2 == [(2 * i, 1, i) for i in range(128, 300)]


def prt_entries(pci: acpi.PciHost) -> list[tuple[int, int, int]]:
    """(slot, pin, GSI) of each _PRT entry, read from its bytes."""
    dsdt = acpi.tables(acpi.Hardware(pci=pci))["DSDT"][1]
    at = dsdt.index(b"_PRT") + 4
    assert dsdt[at] == 0x12
    at += 2 + (dsdt[at + 1] >> 6)
    count, at, out = dsdt[at], at + 1, []
    for _ in range(count):
        assert (dsdt[at], dsdt[at + 2], dsdt[at + 3]) == (0x12, 4, 0x0C)
        body = dsdt[at + 4 : at + 1 + dsdt[at + 1]]
        low, slot = struct.unpack_from("<HH", body)
        pin = body[4] if body[4] < 2 else body[5]
        assert low == 0xFFFF
        assert body[-3:-1] == b"\x00\x0a"  # the source is a GSI
        out.append((slot, pin, body[-1]))
        at += 1 + dsdt[at + 1]
    return out


def test_prt_rotates_the_wires_over_the_slots() -> None:
    entries = prt_entries(acpi.PciHost(0xE0000000, 0, (0xC0000000, 0x1000), slots=7))
    assert entries == [(s, p, 20 + (s + p) % 4) for s in range(7) for p in range(4)]
    assert len(prt_entries(PCI)) == 128


def test_virtio_mmio_interrupts_are_exclusive_unless_gsis_repeat() -> None:
    alone = acpi.Hardware(virtio_mmio=[(0xFEB00000, 0x200, 5), (0xFEB01000, 0x200, 6)])
    both = acpi.Hardware(virtio_mmio=[(0xFEB00000, 0x200, 5), (0xFEB01000, 0x200, 5)])
    edge_high, shared = aml.interrupt(5), aml.interrupt(5, shared=True)
    assert acpi.tables(alone)["DSDT"][1].count(edge_high) == 1
    assert acpi.tables(both)["DSDT"][1].count(shared) == 2


def test_mcfg_names_the_ecam() -> None:
    mcfg = acpi.tables(FULL)["MCFG"][1]
    assert struct.unpack_from("<QHBB", mcfg, 44) == (0xE0000000, 0, 0, 255)


@pytest.mark.parametrize("name", MACHINES)
def test_iasl_reads_and_recompiles_every_table_without_a_remark(name: str, tmp_path: Path) -> None:
    if shutil.which("iasl") is None:
        pytest.skip("iasl (package acpica-tools) is not on PATH")
    placed = acpi.tables(MACHINES[name])
    del placed["RSDP"]  # not a table to iasl
    for sig, (_, data) in placed.items():
        (tmp_path / f"{sig}.aml").write_bytes(data)
        down = iasl(tmp_path, "-d", f"{sig}.aml")
        assert "Invalid" not in down
        assert "Unknown" not in (tmp_path / f"{sig}.dsl").read_text()
        up = iasl(tmp_path, "-p", "again", f"{sig}.dsl")
        assert "0 Errors, 0 Warnings, 0 Remarks" in up, up
        if sig != "DSDT":  # the compiler may choose other encodings for code
            assert anonymous((tmp_path / "again.aml").read_bytes()) == anonymous(data)


def anonymous(table: bytes) -> bytes:
    """A table without what names its author: checksum, creator and creator revision."""
    return table if table[:4] == b"FACS" else table[:9] + table[10:28] + table[36:]


def iasl(where: Path, *args: str) -> str:
    done = subprocess.run(
        ["iasl", *args], cwd=where, capture_output=True, text=True, timeout=60, check=False
    )
    text = done.stdout + done.stderr
    assert done.returncode == 0, text
    assert "Error" not in text.replace("0 Errors", ""), text
    return text


def test_dsdt_says_what_the_machine_has(tmp_path: Path) -> None:
    if shutil.which("iasl") is None:
        pytest.skip("iasl (package acpica-tools) is not on PATH")
    (tmp_path / "d.aml").write_bytes(acpi.tables(FULL)["DSDT"][1])
    iasl(tmp_path, "-d", "d.aml")
    text = (tmp_path / "d.dsl").read_text()
    for seen in ("Device (C003)", "Device (V002)", "Device (COM2)", "Device (XTRA)"):
        assert seen in text
    for seen in ('"QEMU0001"', '"LNRO0005"', 'EisaId ("PNP0A08")', 'EisaId ("PNP0B00")'):
        assert seen in text
    assert "Device (C004)" not in text
