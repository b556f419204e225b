"""An x86-64 vCPU that stands still, in words: its mode, its registers, the code it is at.

Everything here reads a snapshot and guest memory and gives text; nothing raises for what a guest
may have done to itself.
"""

from __future__ import annotations

from vmm.arch.x86_64 import host
from vmm.arch.x86_64.paging import CR0_PE, CR0_PG, EFER_LMA, levels, translate
from vmm.diagnose import VcpuSnapshot, fields
from vmm.errors import MemoryFault

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmm.kvm import Vcpu
    from vmm.memory import GuestMemory

# Bit names as the manual prints them. Intel SDM vol 3 §2.5, §2.2.1, §2.3.
CR0 = {0: "PE", 1: "MP", 2: "EM", 3: "TS", 4: "ET", 5: "NE", 16: "WP", 18: "AM", 29: "NW",
       30: "CD", 31: "PG"}  # fmt: skip
CR4 = {0: "VME", 1: "PVI", 2: "TSD", 3: "DE", 4: "PSE", 5: "PAE", 6: "MCE", 7: "PGE", 8: "PCE",
       9: "OSFXSR", 10: "OSXMMEXCPT", 11: "UMIP", 12: "LA57", 13: "VMXE", 14: "SMXE",
       16: "FSGSBASE", 17: "PCIDE", 18: "OSXSAVE", 20: "SMEP", 21: "SMAP", 22: "PKE", 23: "CET",
       24: "PKS"}  # fmt: skip
EFER = {0: "SCE", 8: "LME", 10: "LMA", 11: "NXE", 12: "SVME", 13: "LMSLE", 14: "FFXSR",
        15: "TCE"}  # fmt: skip
RFLAGS = {0: "CF", 2: "PF", 4: "AF", 6: "ZF", 7: "SF", 8: "TF", 9: "IF", 10: "DF", 11: "OF",
          14: "NT", 16: "RF", 17: "VM", 18: "AC", 19: "VIF", 20: "VIP", 21: "ID"}  # fmt: skip
IF = 1 << 9
VM = 1 << 17

GENERAL = ("rax rbx rcx rdx", "rsi rdi rbp rsp", "r8 r9 r10 r11", "r12 r13 r14 r15")
SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")

#: Ports that a boot commonly touches.
PORTS = {0x20: "PIC", 0x21: "PIC", 0xA0: "PIC", 0xA1: "PIC", 0x40: "PIT", 0x43: "PIT",
         0x60: "i8042", 0x61: "speaker", 0x64: "i8042", 0x70: "CMOS", 0x71: "CMOS",
         0x80: "POST", 0xF4: "debug exit", 0x402: "debugcon", 0x505: "pvpanic",
         0x510: "fw_cfg", 0x511: "fw_cfg", 0xCF8: "PCI address", 0xCF9: "reset",
         0xCFC: "PCI data"}  # fmt: skip
MAX_INSN = 15
#: VM-entry failure due to invalid guest state. Intel SDM vol 3 §26.7.
INVALID_STATE = 0x8000_0021
#: Where Linux links its text. x86 mm.rst: __START_KERNEL_map.
LINUX_TEXT = 0xFFFF_FFFF_8000_0000


def bits(value: int, names: dict[int, str]) -> str:
    """``0x80000011 [PE ET PG]``."""
    words = [name for bit, name in names.items() if value >> bit & 1]
    return f"{value:#x} [{' '.join(words)}]"


def _segment(name: str, s: dict[str, int]) -> str:
    flags = [word for word, key in (("16/32", "db"), ("64", "l"), ("4K", "g")) if s[key]]
    if s["unusable"] or not s["present"]:
        flags.append("unusable" if s["unusable"] else "not present")
    return (
        f"{name:<3} {s['selector']:04x} base={s['base']:#x} limit={s['limit']:#x} "
        f"type={s['type']:#x} dpl={s['dpl']} {' '.join(flags)}".rstrip()
    )


def disassemble(code: bytes, address: int, width: int, count: int = 1) -> list[str]:
    """The first instructions of ``code`` as assembly, ``bytes  text`` each. Bytes that are no
    instruction end the list; without capstone there is one line, of bytes."""
    try:
        import capstone  # type: ignore[import-untyped]
    except ImportError:
        return [f"{code[:MAX_INSN].hex(' ')}  (not decoded: capstone is not installed)"]
    modes = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}
    engine = capstone.Cs(capstone.CS_ARCH_X86, modes[width])
    return [
        f"{bytes(insn.bytes).hex(' ')}  {insn.mnemonic} {insn.op_str}".rstrip()
        for insn in engine.disasm(code, address, count)
    ]


class Snapshot(VcpuSnapshot):
    """A VcpuSnapshot of an x86-64 vCPU: ``regs`` are struct kvm_regs' fields, ``sregs`` struct
    kvm_sregs', segments and tables as dicts of theirs."""

    __slots__ = ("sregs",)

    def __init__(
        self, index: int, regs: dict[str, int], sregs: dict[str, Any], state: str = ""
    ) -> None:
        super().__init__(index, regs, state)
        self.sregs = sregs

    def code_width(self) -> int:
        """16, 32 or 64: how the bytes at RIP are read."""
        cs = self.sregs["cs"]
        if self.sregs["efer"] & EFER_LMA and cs["l"]:
            return 64
        real = not self.sregs["cr0"] & CR0_PE or self.regs["rflags"] & VM
        return 32 if cs["db"] and not real else 16

    def mode(self) -> str:
        """The CPU's mode in words."""
        sregs = self.sregs
        if not sregs["cr0"] & CR0_PE:
            return "real mode"
        paging = {
            0: "no paging",
            2: "32-bit paging",
            3: "PAE paging",
            4: "4-level paging",
            5: "5-level paging",
        }[levels(sregs)]
        if self.regs["rflags"] & VM:
            return f"virtual-8086 mode, {paging}"
        width = self.code_width()
        name = "protected mode"
        if sregs["efer"] & EFER_LMA:
            name = "long mode" if width == 64 else "long mode (compatibility)"
        return f"{name}, {width}-bit code, {paging}, CPL {sregs['ss']['dpl'] & 3}"

    def registers(self) -> list[str]:
        """All of them, a line for each few."""
        regs, sregs = self.regs, self.sregs
        lines = [f"rip={regs['rip']:016x} rflags={bits(regs['rflags'], RFLAGS)}"]
        lines += [" ".join(f"{n:>3}={regs[n]:016x}" for n in row.split()) for row in GENERAL]
        lines.append(f"cr0={bits(sregs['cr0'], CR0)} cr2={sregs['cr2']:#x} cr3={sregs['cr3']:#x}")
        lines.append(f"cr4={bits(sregs['cr4'], CR4)} efer={bits(sregs['efer'], EFER)}")
        lines += [_segment(name, sregs[name]) for name in SEGMENTS]
        for name in ("gdt", "idt"):
            lines.append(f"{name} base={sregs[name]['base']:#x} limit={sregs[name]['limit']:#x}")
        return lines

    def linear_rip(self) -> int:
        """RIP with its segment's base, as the paging sees it."""
        if self.code_width() == 64:
            return self.regs["rip"]
        base: int = self.sregs["cs"]["base"]
        return (base + self.regs["rip"]) & 0xFFFF_FFFF

    def fetch(self, memory: GuestMemory, linear: int, size: int) -> bytes:
        """Up to ``size`` bytes at a linear address; shorter where it leaves what is mapped RAM."""
        data = b""
        while len(data) < size:
            at = linear + len(data)
            gpa = translate(memory, self.sregs, at)
            run = min(size - len(data), 0x1000 - (at & 0xFFF))
            if gpa is None:
                break
            try:
                data += memory.read(gpa, run)
            except MemoryFault:
                break
        return data

    def code(self, memory: GuestMemory) -> list[str]:
        """Where RIP leads and the instructions there."""
        linear = self.linear_rip()
        gpa = translate(memory, self.sregs, linear)
        if gpa is None:
            return [f"code at {linear:#x}: not mapped"]
        if not memory.contains(gpa, 1):
            return [f"code at {linear:#x} = physical {gpa:#x}: not RAM"]
        data = self.fetch(memory, linear, 4 * MAX_INSN)
        lines = disassemble(data, self.regs["rip"], self.code_width(), 4)
        return [f"code at {linear:#x} = physical {gpa:#x}:"] + [
            f"  {line}" for line in lines or [f"{data[:MAX_INSN].hex(' ')}  (no instruction)"]
        ]

    def current(self, memory: GuestMemory, given: bytes = b"") -> str:
        """The instruction at RIP as assembly text, or nothing. ``given``: its bytes as KVM saw
        them, which may be gone from memory."""
        data = given or self.fetch(memory, self.linear_rip(), MAX_INSN)
        lines = disassemble(data, self.regs["rip"], self.code_width())
        return lines[0].partition("  ")[2] if lines else ""

    def where(self, memory: GuestMemory) -> list[str]:
        """Guesses from the state alone: what kind of place the vCPU is at."""
        linear = self.linear_rip()
        gpa = translate(memory, self.sregs, linear)
        if gpa is None:
            return [
                f"RIP {linear:#x} is not mapped by the guest's page tables: a wild jump or return."
            ]
        if not memory.contains(gpa, 1):
            return [f"RIP leads to {gpa:#x}, where there is no RAM: a wild jump or a wrong entry."]
        found = []
        head = self.fetch(memory, linear, 2)
        if self.fetch(memory, linear, 16) == bytes(16):
            found.append("RIP is among zeros: nothing was loaded there, or it was cleared.")
        # A halted vCPU's RIP is past its hlt (f4).
        halted = self.state == "halted" or self.fetch(memory, linear - 1, 1) == b"\xf4"
        if self.state.startswith("waiting"):
            pass
        elif halted and not self.regs["rflags"] & IF:
            found.append("It halted with interrupts off: the guest stopped itself for good.")
        elif halted:
            found.append("It is idle in hlt, waiting for an interrupt.")
        elif head == b"\xeb\xfe":
            found.append("It jumps to itself for ever (jmp $): the guest stopped itself.")
        if linear >= LINUX_TEXT and levels(self.sregs) >= 4:
            found.append("It is in the kernel's own text.")
        return found

    def undelivered(self, memory: GuestMemory) -> list[str]:
        """Guesses at why an exception could not be delivered."""
        sregs: dict[str, Any] = self.sregs
        found = []
        if not sregs["cr0"] & CR0_PE:
            found.append(
                "A triple fault in real mode: the entry point is wrong, or the payload is not what "
                "--boot took it for."
            )
        if sregs["idt"]["limit"] == 0:
            found.append(
                "The IDT is empty, so any exception ends in a triple fault: look for the first one."
            )
        elif translate(memory, sregs, sregs["idt"]["base"]) is None:
            found.append(f"The IDT at {sregs['idt']['base']:#x} is not mapped.")
        if sregs["cr0"] & CR0_PG:
            if sregs["cr2"] and translate(memory, sregs, sregs["cr2"]) is None:
                found.append(f"The last page fault was at {sregs['cr2']:#x} (cr2), not mapped now.")
            stack = self.regs["rsp"] if self.code_width() == 64 else sregs["ss"]["base"]
            stack = (stack if self.code_width() == 64 else stack + self.regs["rsp"]) - 8
            if translate(memory, sregs, stack & 0xFFFF_FFFF_FFFF_FFFF) is None:
                found.append(
                    f"The stack at {self.regs['rsp']:#x} is not mapped: no frame fits there."
                )
            if translate(memory, sregs, sregs["gdt"]["base"]) is None:
                found.append(f"The GDT at {sregs['gdt']['base']:#x} is not mapped.")
        return found

    def not_emulated(self, memory: GuestMemory, given: bytes) -> list[str]:
        text = self.current(memory, given)
        what = f"'{text}'" if text else "the instruction at RIP"
        if host.extension():
            return [
                f"KVM had to emulate {what} and cannot: is its operand in device memory, or no RAM?"
            ]
        guess = (
            f"This host's KVM has {host.NO_EXTENSION} and emulates every instruction: it cannot "
            f"emulate {what}, or an exception there could not be delivered. Try --accel nested."
        )
        return [guess, *self.undelivered(memory)]

    def refused(self, reason: int) -> list[str]:
        if reason & 0xFFFF_FFFF != INVALID_STATE:
            return []
        return ["The guest's state is invalid by Intel SDM vol 3 §26.3."]

    def port_name(self, port: int) -> str:
        """What usually answers a port, or nothing."""
        for base, name in ((0x3F8, "COM1"), (0x2F8, "COM2"), (0x3E8, "COM3"), (0x2E8, "COM4")):
            if base <= port < base + 8:
                return name
        return PORTS.get(port, "")


def snapshot(vcpu: Vcpu, state: str = "") -> Snapshot:
    """A snapshot of a vCPU that is paused or has ended; ``state`` is what it is doing. Raises
    KvmError."""
    regs = vcpu.get("KVM_GET_REGS", "kvm_regs")
    sregs = vcpu.get("KVM_GET_SREGS", "kvm_sregs")
    return Snapshot(vcpu.index, fields(regs[0]), fields(sregs[0]), state)
