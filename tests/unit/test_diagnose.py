"""Diagnosis of crafted vCPU states."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from vmm._native import ffi, lib
from vmm.arch.x86_64 import host, inspect
from vmm.diagnose import diagnose, exit_name, fields
from vmm.memory import GuestMemory

RAM = 4 << 20
TABLES = 0x10_0000
IDT = 0x20_0000
TEXT = 0x30_0000


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    memory = GuestMemory([(0, RAM)])
    # 2 MiB pages: the low 2 MiB as they are, and the kernel's text on the second.
    memory.write_int(TABLES, (TABLES + 0x1000) | 1, 8)
    memory.write_int(TABLES + 0x1000, (TABLES + 0x2000) | 1, 8)
    memory.write_int(TABLES + 0x2000, 0x81, 8)
    memory.write_int(TABLES + 8 * 511, (TABLES + 0x3000) | 1, 8)
    memory.write_int(TABLES + 0x3000 + 8 * 510, (TABLES + 0x4000) | 1, 8)
    memory.write_int(TABLES + 0x4000 + 8 * 8, 0x20_0000 | 0x81, 8)
    yield memory
    memory.close()


def snapshot(mode: str, rip: int, **regs: int) -> inspect.Snapshot:
    """As KVM would give it: 'real', 'protected' (flat, no paging) or 'long'."""
    raw = ffi.new("struct kvm_sregs *")
    for name in ("cs", "ds", "es", "ss"):
        segment = getattr(raw, name)
        segment.present = 1
        segment.limit = 0xFFFFF
    raw.idt.limit = 0x3FF
    if mode != "real":
        raw.cr0 = 1
        raw.cs.db = mode == "protected"
        raw.cs.l = mode == "long"
        raw.cs.selector = 8
    if mode == "long":
        raw.cr0 |= 1 << 31
        raw.cr3 = TABLES
        raw.cr4 = 0x20
        raw.efer = 0x500
    general = ffi.new("struct kvm_regs *", {"rip": rip, "rflags": 2, "rsp": 0x8000})
    for name, value in regs.items():
        setattr(general, name, value)
    return inspect.Snapshot(0, fields(general[0]), fields(raw[0]))


def event(kind: int, *extra: int) -> Any:
    made = ffi.new("struct vmm_event *", {"kind": kind})
    for i, value in enumerate(extra):
        made.extra[i] = value
    return made


@pytest.mark.parametrize(
    ("mode", "text"),
    [
        ("real", "real mode"),
        ("protected", "protected mode, 32-bit code, no paging, CPL 0"),
        ("long", "long mode, 64-bit code, 4-level paging, CPL 0"),
    ],
)
def test_modes(mode: str, text: str) -> None:
    assert snapshot(mode, 0).mode() == text


def test_virtual_8086_and_compatibility_modes() -> None:
    assert snapshot("protected", 0, rflags=1 << 17).mode().startswith("virtual-8086")
    snap = snapshot("long", 0)
    snap.sregs["cs"]["l"] = 0
    snap.sregs["ss"]["dpl"] = 3
    assert snap.mode() == "long mode (compatibility), 16-bit code, 4-level paging, CPL 3"


def test_registers_name_their_bits() -> None:
    snap = snapshot("long", 0x1234, rflags=0x246, rax=0xDEAD, r15=0xBEEF)
    snap.sregs["cr2"] = 0x5678
    text = "\n".join(snap.registers())
    for part in (
        "rip=0000000000001234",
        "0x246 [PF ZF IF]",
        "rax=000000000000dead",
        "r15=000000000000beef",
        "cr0=0x80000001 [PE PG]",
        "cr2=0x5678",
        "cr4=0x20 [PAE]",
        "efer=0x500 [LME LMA]",
        "cs  0008 base=0x0 limit=0xfffff",
        "idt base=0x0 limit=0x3ff",
    ):
        assert part in text


def test_instructions_are_read_through_the_guests_tables(memory: GuestMemory) -> None:
    memory.write(TEXT, bytes.fromhex("480fc70f90"))
    snap = snapshot("long", 0xFFFF_FFFF_8110_0000)
    lines = snap.code(memory)
    assert lines[0] == f"code at 0xffffffff81100000 = physical {TEXT:#x}:"
    assert lines[1].endswith("48 0f c7 0f  cmpxchg16b xmmword ptr [rdi]")
    assert lines[2].strip() == "90  nop"


def test_real_mode_code_is_sixteen_bit_and_has_a_base(memory: GuestMemory) -> None:
    memory.write(0x7C00 + 0x10, bytes.fromhex("b83412"))
    snap = snapshot("real", 0x10)
    snap.sregs["cs"]["base"] = 0x7C00
    assert snap.current(memory) == "mov ax, 0x1234"


def test_code_that_ends_at_an_unmapped_page(memory: GuestMemory) -> None:
    memory.write(0x1F_FFFE, b"\x90\x0f")
    snap = snapshot("long", 0x1F_FFFE)
    assert snap.fetch(memory, 0x1F_FFFE, 15) == b"\x90\x0f"
    assert "nop" in snap.code(memory)[1]
    assert snapshot("long", 0x1F_FFFF).code(memory)[1].endswith("(no instruction)")


@pytest.mark.parametrize(
    ("mode", "rip", "code", "rflags", "sentence"),
    [
        ("long", 0x40_0000, b"", 2, "not mapped by the guest's page tables"),
        ("protected", 0xFEC0_0000, b"", 2, "where there is no RAM"),
        ("protected", 0x5000, b"", 2, "among zeros"),
        ("protected", 0x5001, b"\xf4\x90", 2, "interrupts off"),
        ("protected", 0x5001, b"\xf4\x90", 0x202, "waiting for an interrupt"),
        ("protected", 0x5000, b"\xeb\xfe", 2, "jumps to itself"),
        ("long", 0xFFFF_FFFF_8110_0000, b"\x90", 2, "kernel's own text"),
    ],
)
def test_where_a_vcpu_hangs(
    memory: GuestMemory, mode: str, rip: int, code: bytes, rflags: int, sentence: str
) -> None:
    if code:
        memory.write(TEXT if mode == "long" else 0x5000, code)
    text = diagnose([snapshot(mode, rip, rflags=rflags)], memory, None, "", [[]])
    assert sentence in text


def test_triple_fault_in_real_mode(memory: GuestMemory) -> None:
    text = diagnose([snapshot("real", 0x7C00)], memory, event(lib.VMM_EV_SHUTDOWN), "", [[]])
    assert text.startswith("KVM_EXIT_SHUTDOWN")
    assert "the entry point is wrong" in text


def test_triple_fault_without_an_idt(memory: GuestMemory) -> None:
    snap = snapshot("long", 0xFFFF_FFFF_8110_0000, rsp=0xFFFF_8000_0000_0000)
    snap.sregs["idt"]["limit"] = 0
    snap.sregs["cr2"] = 0xDEAD_0000
    text = diagnose([snap], memory, event(lib.VMM_EV_SHUTDOWN), "", [[]])
    assert "The IDT is empty" in text
    assert "0xdead0000 (cr2), not mapped" in text
    assert "The stack at 0xffff800000000000 is not mapped" in text


def test_triple_fault_with_unmapped_tables(memory: GuestMemory) -> None:
    snap = snapshot("long", 0x1000)
    snap.sregs["idt"]["base"] = snap.sregs["gdt"]["base"] = 0x4000_0000
    text = diagnose([snap], memory, event(lib.VMM_EV_SHUTDOWN), "", [[]])
    assert "The IDT at 0x40000000 is not mapped" in text
    assert "The GDT at 0x40000000 is not mapped" in text


@pytest.mark.parametrize(
    ("extension", "sentence"),
    [("", "no vmx or svm"), ("vmx", "is its operand in device memory")],
)
def test_emulation_failure_shows_kvms_bytes(
    memory: GuestMemory, monkeypatch: pytest.MonkeyPatch, extension: str, sentence: str
) -> None:
    monkeypatch.setattr(host, "extension", lambda: extension)
    raw = (b"\x04\x48\x0f\xc7\x0f" + bytes(11)).ljust(16, b"\0")
    words = [int.from_bytes(raw[i : i + 8], "little") for i in (0, 8)]
    failed = event(lib.VMM_EV_INTERNAL, lib.KVM_INTERNAL_ERROR_EMULATION, 1, *words)
    text = diagnose([snapshot("long", 0x1000)], memory, failed, "", [[]])
    assert "KVM_INTERNAL_ERROR_EMULATION" in text
    assert "48 0f c7 0f" in text
    assert "cmpxchg16b" in text
    assert sentence in text


def test_other_events(memory: GuestMemory) -> None:
    snap = snapshot("protected", 0x1000)

    def said(*args: int) -> str:
        return diagnose([snap], memory, event(*args), "", [[]])

    assert "KVM_INTERNAL_ERROR_DELIVERY_EV" in said(
        lib.VMM_EV_INTERNAL, lib.KVM_INTERNAL_ERROR_DELIVERY_EV, 0xABC
    )
    assert "0xabc" in said(lib.VMM_EV_INTERNAL, lib.KVM_INTERNAL_ERROR_DELIVERY_EV, 0xABC)
    assert "KVM_INTERNAL_ERROR_99" in said(lib.VMM_EV_INTERNAL, 99)
    assert "reason 0x80000021" in said(lib.VMM_EV_FAIL_ENTRY, 0x8000_0021)
    assert "state is invalid" in said(lib.VMM_EV_FAIL_ENTRY, 0x8000_0021)
    assert "EFAULT" in said(lib.VMM_EV_ERROR, 14)
    assert "KVM_EXIT_HYPERCALL: vmm does not" in said(lib.VMM_EV_OTHER, lib.KVM_EXIT_HYPERCALL)
    assert "KVM_EXIT_4711" in said(lib.VMM_EV_OTHER, 4711)
    assert "KVM_EXIT_HLT" in said(lib.VMM_EV_HLT)


def test_exit_history_is_named_and_merged(memory: GuestMemory) -> None:
    history = ffi.new("struct vmm_exit[]", 14)
    for i in range(10):
        history[i] = {"reason": lib.KVM_EXIT_IO, "addr": 0x3FD, "size": 1, "data": i}
    history[10] = {
        "reason": lib.KVM_EXIT_IO, "addr": 0x3F8, "size": 1, "data": 0x41, "is_write": 1,
    }  # fmt: skip
    history[11] = {"reason": lib.KVM_EXIT_MMIO, "addr": 0xFEB0_0000, "size": 4, "cold": 1}
    history[12] = {"reason": lib.KVM_EXIT_SHUTDOWN, "cold": 1}
    text = diagnose(
        [snapshot("protected", 0x1000)],
        memory,
        event(lib.VMM_EV_SHUTDOWN),
        "",
        [list(history[0:13])],
    )
    assert "KVM_EXIT_IO read 1 at 0x3fd (COM1), C, 10 times" in text
    assert "KVM_EXIT_IO write 1 at 0x3f8 (COM1) = 0x41, C\n" in text
    assert "KVM_EXIT_MMIO read 4 at 0xfeb00000, Python" in text
    assert "    KVM_EXIT_SHUTDOWN\n" in text + "\n"


def test_many_vcpus_are_told_briefly_and_the_console_last(memory: GuestMemory) -> None:
    snaps = [snapshot("protected", 0x1000 + i) for i in range(4)]
    for i, snap in enumerate(snaps):
        snap.index = i
    snaps[1].state = "waiting for SIPI"
    console = "".join(f"line {i}\n" for i in range(100))
    lines = diagnose(snaps, memory, None, console, [[]] * 4).splitlines()
    assert (
        "vCPU 3: protected mode, 32-bit code, no paging, CPL 0, rip=0000000000001003 rflags=0x2 []"
        in lines
    )
    assert sum("rax=" in line for line in lines) == 1
    assert lines[-1] == "  line 99"
    assert lines[-20] == "  line 80"


def test_names_come_from_the_header() -> None:
    assert exit_name(lib.KVM_EXIT_MMIO) == "KVM_EXIT_MMIO"
    assert exit_name(12345) == "KVM_EXIT_12345"


def test_without_capstone_bytes_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "capstone", None)
    assert inspect.disassemble(b"\x90", 0, 64) == ["90  (not decoded: capstone is not installed)"]
