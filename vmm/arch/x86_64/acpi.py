"""The ACPI tables of a machine, as bytes in guest RAM below 1 MiB. ACPI-6.5 §5.2.

The hardware they describe: fixed power-management registers (vmm/devices/acpi_pm.py), one
IOAPIC, local APICs, at most one PCI host bridge with ECAM, virtio-mmio devices, and the ISA
devices the machine has. A device may hand over AML of its own, which lands in \\_SB.
"""

from __future__ import annotations

import struct

from vmm.arch.x86_64 import aml, layout
from vmm.devices.acpi_pm import PM1_CNT_LEN, PM1_EVT_LEN, RESET_PORT, RESET_VALUE, SLP_TYP_S5
from vmm.errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Protocol

    class Memory(Protocol):
        """Where tables are written: vmm.memory.GuestMemory, or a stand-in."""

        def write(self, gpa: int, data: bytes, /) -> None: ...


_OEM_ID = b"VMM   "
_CREATOR = b"VMM "

# FADT fixed feature flags, ACPI-6.5 Table 5.10.
_WBINVD = 1 << 0
_PROC_C1 = 1 << 2
_SLP_BUTTON = 1 << 5  # there is no fixed sleep button
_FIX_RTC = 1 << 6  # RTC wake is not in fixed register space
_RESET_REG_SUP = 1 << 10
_HEADLESS = 1 << 12

# IA-PC boot architecture flags, ACPI-6.5 Table 5.11. "8042" stays clear: Linux skips its probe.
_LEGACY_DEVICES = 1 << 0
_VGA_NOT_PRESENT = 1 << 2
_ASPM_CONTROLS = 1 << 4  # the OS must not touch ASPM
_CMOS_RTC_NOT_PRESENT = 1 << 5

# _OSC control bits the OS may have: native hot-plug, PME, AER, PCIe capability structure, LTR.
# PCI Firmware 3.3 §4.5.1.
_OSC_PCI = "33DB4D5B-1FF7-401C-9657-7441C03DD766"
_OSC_GRANTED = 1 << 0 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5


class PciHost:
    """A PCI host bridge: ECAM at ``ecam`` for buses 0..``last_bus``, MMIO windows as
    (base, size) in bytes, and the GSIs that INTA..INTD of slot 0 are wired to (slots rotate).
    ``slots``: how many have wires; an OS walks them all for each device."""

    __slots__ = ("ecam", "gsis", "last_bus", "mmio32", "mmio64", "slots")

    def __init__(
        self,
        ecam: int,
        last_bus: int,
        mmio32: tuple[int, int],
        mmio64: tuple[int, int] | None = None,
        gsis: Sequence[int] = (20, 21, 22, 23),
        slots: int = 32,
    ) -> None:
        self.ecam = ecam
        self.last_bus = last_bus
        self.mmio32 = mmio32
        self.mmio64 = mmio64
        self.gsis = tuple(gsis)
        self.slots = slots


class Hardware:
    """What the tables must say; every address and size in bytes.

    ``apic_ids`` one per vCPU (vCPU n has processor UID n); ``virtio_mmio`` (base, size, gsi);
    ``serial`` (port, irq); ``pvpanic`` an I/O port or None; ``rtc`` whether a CMOS clock answers
    at 0x70; ``extra`` AML that devices supplied, put into \\_SB as it is.
    """

    __slots__ = (
        "apic_ids",
        "extra",
        "pci",
        "pit_gsi",
        "pm_base",
        "pvpanic",
        "rtc",
        "sci",
        "serial",
        "virtio_mmio",
    )

    def __init__(
        self,
        apic_ids: Sequence[int] = (0,),
        *,
        pci: PciHost | None = None,
        virtio_mmio: Sequence[tuple[int, int, int]] = (),
        serial: Sequence[tuple[int, int]] = (),
        pvpanic: int | None = None,
        rtc: bool = False,
        pm_base: int = 0x600,
        sci: int = 9,
        pit_gsi: int = 2,
        extra: Sequence[bytes] = (),
    ) -> None:
        self.apic_ids = tuple(apic_ids)
        self.pci = pci
        self.virtio_mmio = tuple(virtio_mmio)
        self.serial = tuple(serial)
        self.pvpanic = pvpanic
        self.rtc = rtc
        self.pm_base = pm_base
        self.sci = sci
        self.pit_gsi = pit_gsi
        self.extra = tuple(extra)


def build(hw: Hardware, memory: Memory) -> int:
    """Write every table into guest RAM at layout.ACPI_TABLES; returns the address of the RSDP.

    Raises ConfigError when they do not fit below 1 MiB, where an OS looks (ACPI-6.5 §5.2.5.1).
    """
    placed = tables(hw)
    for gpa, data in placed.values():
        memory.write(gpa, data)
    return placed["RSDP"][0]


def tables(
    hw: Hardware, base: int = layout.ACPI_TABLES, size: int = layout.ACPI_TABLES_SIZE
) -> dict[str, tuple[int, bytes]]:
    """Signature → (address, bytes) of every table, laid out from ``base`` with the RSDP first."""
    placed: dict[str, tuple[int, bytes]] = {}
    cursor = base + 64  # the RSDP takes 36 bytes

    def place(name: str, data: bytes) -> int:
        nonlocal cursor
        gpa = cursor
        cursor = (gpa + len(data) + 63) & ~63  # the FACS must be 64-byte aligned
        placed[name] = (gpa, data)
        return gpa

    facs_at = place("FACS", facs())
    dsdt_at = place("DSDT", dsdt(hw))
    roots = [place("FACP", fadt(hw, facs_at, dsdt_at)), place("APIC", madt(hw))]
    if hw.pci is not None:
        roots.append(place("MCFG", mcfg(hw.pci)))
    xsdt_at = place("XSDT", table(b"XSDT", 1, struct.pack(f"<{len(roots)}Q", *roots)))
    if cursor > base + size:
        raise ConfigError(
            f"the ACPI tables of {len(hw.apic_ids)} vCPUs and {len(hw.virtio_mmio)} virtio-mmio "
            f"devices need {cursor - base} bytes and {size} are there; ask for fewer"
        )
    return {"RSDP": (base, rsdp(xsdt_at)), **placed}


# ---- one function per table ---------------------------------------------------------------


def table(signature: bytes, revision: int, body: bytes) -> bytes:
    """A system description table: the common header and its checksum. ACPI-6.5 §5.2.6."""
    head = struct.pack(
        "<4sIBB6s8sI4sI",
        signature,
        36 + len(body),
        revision,
        0,
        _OEM_ID,
        b"VMM" + signature.ljust(5),
        1,
        _CREATOR,
        1,
    )
    return with_checksum(head + body, 9)


def with_checksum(data: bytes, at: int) -> bytes:
    """``data`` with byte ``at`` (now 0) such that all bytes sum to 0 modulo 256."""
    return data[:at] + bytes((-sum(data) & 0xFF,)) + data[at + 1 :]


def rsdp(xsdt: int) -> bytes:
    """Root System Description Pointer, revision 2. ACPI-6.5 §5.2.5.3."""
    data = struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, _OEM_ID, 2, 0, 36, xsdt, 0)
    return with_checksum(with_checksum(data[:20], 8) + data[20:], 32)


def facs() -> bytes:
    """Firmware ACPI Control Structure: nothing in it but its version. ACPI-6.5 §5.2.10."""
    return struct.pack("<4sII4x4xI8xB31x", b"FACS", 64, 0, 0, 2)


def _gas(port: int, bits: int, access: int) -> bytes:
    """Generic Address Structure in I/O space. ACPI-6.5 §5.2.3.2."""
    return struct.pack("<BBBBQ", 1 if port else 0, bits, 0, access, port)


def fadt(hw: Hardware, facs_at: int, dsdt_at: int) -> bytes:
    """Fixed ACPI Description Table, revision 6.5, not hardware-reduced. ACPI-6.5 §5.2.9."""
    evt, cnt = hw.pm_base, hw.pm_base + PM1_EVT_LEN
    boot = _LEGACY_DEVICES | _VGA_NOT_PRESENT | _ASPM_CONTROLS
    boot |= 0 if hw.rtc else _CMOS_RTC_NOT_PRESENT
    flags = _WBINVD | _PROC_C1 | _SLP_BUTTON | _FIX_RTC | _RESET_REG_SUP | _HEADLESS
    body = struct.pack(
        "<IIBBHIBBBB",
        facs_at,
        dsdt_at,
        0,
        0,  # preferred PM profile: unspecified
        hw.sci,
        0,  # no SMI_CMD: the machine is always in ACPI mode
        0,
        0,
        0,
        0,
    )
    # PM1a_EVT, PM1b_EVT, PM1a_CNT, PM1b_CNT, PM2_CNT, PM_TMR, GPE0, GPE1; then their lengths.
    body += struct.pack("<8I", evt, 0, cnt, 0, 0, 0, 0, 0)
    body += struct.pack("<8B", PM1_EVT_LEN, PM1_CNT_LEN, 0, 0, 0, 0, 0, 0)
    # P_LVL2_LAT and P_LVL3_LAT past their limits: no C2, no C3. Then flush and duty fields,
    # RTC day alarm, month alarm, century.
    body += struct.pack("<HHHHBB", 101, 1001, 0, 0, 0, 0)
    body += struct.pack("<BBB", 0, 0, 0x32 if hw.rtc else 0)
    body += struct.pack("<HBI", boot, 0, flags)
    body += _gas(RESET_PORT, 8, 1) + struct.pack("<BHB", RESET_VALUE, 0, 5)
    body += struct.pack("<QQ", 0, dsdt_at)  # X_FIRMWARE_CTRL: FIRMWARE_CTRL is used
    body += _gas(evt, 32, 2) + _gas(0, 0, 0) + _gas(cnt, 16, 2)
    body += _gas(0, 0, 0) * 7  # PM1b_CNT, PM2_CNT, PM_TMR, GPE0, GPE1, sleep control and status
    body += struct.pack("<8s", b"VMM")  # hypervisor vendor identity
    return table(b"FACP", 6, body)


def madt(hw: Hardware) -> bytes:
    """Multiple APIC Description Table. ACPI-6.5 §5.2.12."""
    body = struct.pack("<II", layout.LAPIC, 1)  # PCAT_COMPAT: the PICs are there too
    for uid, apic_id in enumerate(hw.apic_ids):
        if apic_id < 255 and uid < 255:
            body += struct.pack("<BBBBI", 0, 8, uid, apic_id, 1)
        else:
            body += struct.pack("<BBHIII", 9, 16, 0, apic_id, 1, uid)
    body += struct.pack("<BBBBII", 1, 12, 0, 0, layout.IOAPIC, 0)
    if hw.pit_gsi != 0:
        body += struct.pack("<BBBBIH", 2, 10, 0, 0, hw.pit_gsi, 0)
    # MPS INTI flags 0xD: active-high, level-triggered.
    body += struct.pack("<BBBBIH", 2, 10, 0, hw.sci, hw.sci, 0xD)
    # NMI on LINT1 of every processor.
    body += struct.pack("<BBBHB", 4, 6, 0xFF, 0, 1)
    if any(i >= 255 for i in hw.apic_ids) or len(hw.apic_ids) > 255:
        body += struct.pack("<BBHIB3x", 10, 12, 0, 0xFFFFFFFF, 1)
    return table(b"APIC", 5, body)


def mcfg(pci: PciHost) -> bytes:
    """Where ECAM is. PCI Firmware 3.3 §4.1.2."""
    return table(b"MCFG", 1, struct.pack("<8xQHBB4x", pci.ecam, 0, 0, pci.last_bus))


def dsdt(hw: Hardware) -> bytes:
    """Differentiated System Description Table, in AML. ACPI-6.5 §5.2.11.1."""
    typ = aml.integer(SLP_TYP_S5)
    zero = aml.integer(0)
    items = [_processor(uid) for uid in range(len(hw.apic_ids))]
    if hw.pci is not None:
        items += [_pci_host(hw.pci), _motherboard(hw.pci)]
    gsis = [gsi for _, _, gsi in hw.virtio_mmio]
    items += [
        _virtio_mmio(nr, base, size, gsi, shared=gsis.count(gsi) > 1)
        for nr, (base, size, gsi) in enumerate(hw.virtio_mmio)
    ]
    items += [_serial(nr, *where) for nr, where in enumerate(hw.serial)]
    if hw.rtc:
        items.append(_isa("RTC_", "PNP0B00", 0x70, 2, 8))
    if hw.pvpanic is not None:
        crs = aml.resources(aml.io(hw.pvpanic, 1))
        items.append(
            aml.device("PEVT", aml.name("_HID", aml.string("QEMU0001")), aml.name("_CRS", crs))
        )
    items += hw.extra
    body = aml.name("\\_S5", aml.package(typ, typ, zero, zero)) + aml.scope("\\_SB", *items)
    return table(b"DSDT", 2, body)


# ---- DSDT devices -------------------------------------------------------------------------


def _processor(uid: int) -> bytes:
    """A processor device; its _UID is what the MADT says. ACPI-6.5 §8.4."""
    hid = aml.name("_HID", aml.string("ACPI0007"))
    return aml.device(f"C{uid:03X}", hid, aml.name("_UID", aml.integer(uid)))


def _isa(seg: str, hid: str, port: int, size: int, irq: int, *terms: bytes) -> bytes:
    crs = aml.resources(aml.io(port, size), aml.irq(irq))
    return aml.device(seg, aml.name("_HID", aml.eisa_id(hid)), *terms, aml.name("_CRS", crs))


def _serial(nr: int, port: int, irq: int) -> bytes:
    uid = aml.name("_UID", aml.integer(nr + 1))
    return _isa(f"COM{nr + 1:X}", "PNP0501", port, 8, irq, uid)


def _virtio_mmio(nr: int, base: int, size: int, gsi: int, *, shared: bool) -> bytes:
    crs = aml.resources(aml.memory32_fixed(base, size), aml.interrupt(gsi, shared=shared))
    return aml.device(
        f"V{nr:03X}",
        aml.name("_HID", aml.string("LNRO0005")),
        aml.name("_UID", aml.integer(nr)),
        aml.name("_CCA", aml.integer(1)),
        aml.name("_CRS", crs),
    )


def _motherboard(pci: PciHost) -> bytes:
    """ECAM as a reserved resource, or the OS does not trust the MCFG. PCI Firmware 3.3 §4.1.2."""
    crs = aml.resources(aml.memory32_fixed(pci.ecam, (pci.last_bus + 1) << 20))
    hid = aml.name("_HID", aml.eisa_id("PNP0C02"))
    return aml.device("MBRD", hid, aml.name("_UID", aml.integer(0)), aml.name("_CRS", crs))


def _pci_host(pci: PciHost) -> bytes:
    """The PCI Express root complex: identity, windows, INTx wiring, _OSC. ACPI-6.5 §6.2.13."""
    windows = [
        aml.word_bus(0, pci.last_bus),
        aml.io(0xCF8, 8),
        aml.word_io(0, 0xCF7),
        aml.word_io(0xD00, 0xFFFF),
        aml.dword_memory(*pci.mmio32),
    ]
    if pci.mmio64 is not None:
        windows.append(aml.qword_memory(*pci.mmio64))
    return aml.device(
        "PCI0",
        aml.name("_HID", aml.eisa_id("PNP0A08")),
        aml.name("_CID", aml.eisa_id("PNP0A03")),
        aml.name("_SEG", aml.integer(0)),
        aml.name("_BBN", aml.integer(0)),
        aml.name("_UID", aml.integer(0)),
        aml.name("_CCA", aml.integer(1)),
        aml.name("_CRS", aml.resources(*windows)),
        aml.name("_PRT", _prt(pci.gsis, pci.slots)),
        _osc(),
    )


def _prt(gsis: tuple[int, ...], slots: int) -> bytes:
    """PCI routing: pin p of slot s is GSI gsis[(s + p) % len]. ACPI-6.5 §6.2.13."""
    # Put together by hand: 128 packages of 4 would be half the time of all tables.
    ends = [
        [aml.integer(pin) + aml.integer(0) + aml.integer(gsi) for gsi in gsis] for pin in range(4)
    ]
    entries = []
    for slot in range(slots):
        address = b"\x0c" + struct.pack("<I", slot << 16 | 0xFFFF)
        for pin in range(4):
            body = b"\x04" + address + ends[pin][(slot + pin) % len(gsis)]
            entries.append(b"\x12" + aml.pkg_length(len(body)) + body)
    return aml.package(*entries)


def _osc() -> bytes:
    """_OSC: what the OS may control natively; the rest of what it asks is masked off.

    ACPI-6.5 §6.2.11, PCI Firmware 3.3 §4.5.1.
    """
    cdw1, cdw3, asked = aml.name_string("CDW1"), aml.name_string("CDW3"), aml.local(0)
    return aml.method(
        "_OSC",
        4,
        aml.create_dword_field(aml.arg(3), 0, "CDW1"),
        aml.if_(
            aml.equal(aml.arg(0), aml.uuid(_OSC_PCI)),
            aml.create_dword_field(aml.arg(3), 8, "CDW3"),
            aml.and_(cdw3, aml.integer(_OSC_GRANTED), asked),
            aml.if_(
                aml.not_(aml.equal(aml.arg(1), aml.integer(1))),
                aml.or_(cdw1, aml.integer(0x08), cdw1),  # unrecognised revision
            ),
            aml.if_(
                aml.not_(aml.equal(cdw3, asked)),
                aml.or_(cdw1, aml.integer(0x10), cdw1),  # capabilities masked
            ),
            aml.store(asked, cdw3),
        ),
        aml.else_(aml.or_(cdw1, aml.integer(0x04), cdw1)),  # unrecognised UUID
        aml.ret(aml.arg(3)),
        serialized=True,
    )
