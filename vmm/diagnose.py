"""Why a guest is where it is: text for people, made from vCPU state when something went wrong.

Called when a guest cannot go on (an exception that could not be delivered, an instruction that
could not be emulated, an exit nobody handles), and for a deadline that passed. All of it runs
after the guest stopped or while it is paused; nothing here raises for what a guest did to itself.
"""

from __future__ import annotations

import errno
import os

from vmm._native import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from vmm.memory import GuestMemory

#: How many vCPUs are shown in full, how many exits of each, how many lines of the console.
FULL_VCPUS = 2
MAX_EXITS = 8
CONSOLE_LINES = 20

#: Of the flags in an emulation failure's data: bytes of the instruction follow.
#: KVM api.rst §5, KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES.
INSTRUCTION_BYTES = 1


class VcpuSnapshot:
    """One vCPU at one moment; each architecture has its own kind.

    ``regs`` are its general registers by name; ``state`` is what the vCPU is doing (running,
    halted, waiting for its start), or empty.
    """

    __slots__ = ("index", "regs", "state")

    def __init__(self, index: int, regs: dict[str, int], state: str = "") -> None:
        self.index = index
        self.regs = regs
        self.state = state

    def mode(self) -> str:
        """The CPU's mode in words."""
        return ""

    def registers(self) -> list[str]:
        """All registers, a line for each few."""
        return [f"{name}={value:#x}" for name, value in self.regs.items()]

    def code(self, memory: GuestMemory) -> list[str]:
        """Where the program counter leads and the instructions there."""
        return []

    def current(self, memory: GuestMemory, given: bytes = b"") -> str:
        """The instruction the vCPU is at, as assembly text, or nothing. ``given``: its bytes as
        KVM saw them, which may be gone from memory."""
        return ""

    def where(self, memory: GuestMemory) -> list[str]:
        """Guesses from the state alone: what kind of place the vCPU is at."""
        return []

    def undelivered(self, memory: GuestMemory) -> list[str]:
        """Guesses at why an exception could not be delivered."""
        return []

    def not_emulated(self, memory: GuestMemory, given: bytes) -> list[str]:
        """Guesses at why KVM could not emulate the instruction; ``given`` as for ``current``."""
        return []

    def refused(self, reason: int) -> list[str]:
        """Guesses at why the CPU did not enter the guest, by the hardware's ``reason``."""
        return []

    def port_name(self, port: int) -> str:
        """What usually answers an I/O port, or nothing."""
        return ""


def fields(struct: Any) -> dict[str, Any]:
    """A cffi struct's fields by name; structs inside it the same way."""
    found: dict[str, Any] = {}
    for name, field in ffi.typeof(struct).fields:
        value = getattr(struct, name)
        if field.type.kind == "struct":
            found[name] = fields(value)
        elif field.type.kind == "primitive":
            found[name] = int(value)
    return found


def constant_name(prefix: str, value: int) -> str:
    """The name of a constant from <linux/kvm.h> by its prefix; the number when it has none."""
    for name in dir(lib):
        if name.startswith(prefix) and getattr(lib, name) == value:
            return name
    return f"{prefix}{value}"


def exit_name(reason: int) -> str:
    """``KVM_EXIT_IO`` and the like."""
    return constant_name("KVM_EXIT_", reason)


def diagnose(
    vcpus: Sequence[VcpuSnapshot],
    memory: GuestMemory,
    event: Any,
    console_tail: str,
    exits: Sequence[Sequence[Any]],
) -> str:
    """All that is known, guesses first.

    ``event`` is the struct vmm_event * that ended the run, or None when it did not end (a
    deadline); ``exits`` the struct vmm_exit history of each vCPU in ``vcpus``, oldest first.
    """
    parts = []
    if event is not None:
        parts += _event_lines(
            event, next((v for v in vcpus if v.index == event.vcpu), None), memory
        )
    for number, snap in enumerate(vcpus):
        if number < FULL_VCPUS:
            parts += _vcpu_lines(snap, memory)
            parts += _exit_lines(snap, exits[number] if number < len(exits) else [])
        else:
            parts.append(_short_line(snap))
    tail = console_tail.splitlines()[-CONSOLE_LINES:]
    if tail:
        parts += ["The console's last lines:", *(f"  {line}" for line in tail)]
    return "\n".join(parts)


def _event_lines(event: Any, snap: VcpuSnapshot | None, memory: GuestMemory) -> list[str]:
    """What KVM said, and guesses at the cause."""
    kind = event.kind
    if kind == lib.VMM_EV_INTERNAL:
        lines = _internal_lines(event, snap, memory)
    elif kind == lib.VMM_EV_SHUTDOWN:
        lines = ["KVM_EXIT_SHUTDOWN: an exception in the guest could not be delivered."]
        lines += _guesses(snap.undelivered(memory) if snap else [])
    elif kind == lib.VMM_EV_FAIL_ENTRY:
        reason = event.extra[0]
        lines = [f"KVM_EXIT_FAIL_ENTRY: the CPU refused to enter the guest, reason {reason:#x}."]
        lines += _guesses(snap.refused(reason) if snap else [])
    elif kind == lib.VMM_EV_ERROR:
        code = int(event.extra[0]) & 0xFFFF
        name = errno.errorcode.get(code, str(code))
        lines = [f"KVM_RUN failed: {name} ({os.strerror(code)})."]
    elif kind == lib.VMM_EV_OTHER:
        lines = [f"{exit_name(event.extra[0])}: vmm does not handle this exit."]
    elif kind == lib.VMM_EV_HLT:
        lines = ["KVM_EXIT_HLT: the vCPU halted outside KVM's interrupt controller."]
    elif kind == lib.VMM_EV_SYSTEM:
        lines = [f"{constant_name('KVM_SYSTEM_EVENT_', event.extra[0])}."]
    else:
        lines = [f"event {kind} of vCPU {event.vcpu}"]
    return lines


def _internal_lines(event: Any, snap: VcpuSnapshot | None, memory: GuestMemory) -> list[str]:
    suberror = event.extra[0]
    name = constant_name("KVM_INTERNAL_ERROR_", suberror)
    lines = [f"KVM_EXIT_INTERNAL_ERROR, {name}: KVM itself could not go on."]
    if suberror != lib.KVM_INTERNAL_ERROR_EMULATION:
        data = " ".join(f"{event.extra[i]:#x}" for i in range(1, 8))
        return [*lines, f"  its data: {data}"]
    given = b""
    if event.extra[1] & INSTRUCTION_BYTES:
        raw = b"".join(int(event.extra[i]).to_bytes(8, "little") for i in (2, 3))
        given = raw[1 : 1 + min(raw[0], 15)]
        lines.append(f"  instruction bytes as KVM saw them: {given.hex(' ')}")
    return lines + _guesses(snap.not_emulated(memory, given) if snap else [])


def _guesses(sentences: list[str]) -> list[str]:
    return [f"  guess: {sentence}" for sentence in sentences]


def _vcpu_lines(snap: VcpuSnapshot, memory: GuestMemory) -> list[str]:
    doing = f", {snap.state}" if snap.state else ""
    lines = [f"vCPU {snap.index}: {snap.mode()}{doing}"]
    # A vCPU that was never started has nothing to show.
    if snap.state.startswith("waiting"):
        return lines
    lines += _guesses(snap.where(memory))
    lines += [f"  {line}" for line in snap.registers()]
    return lines + [f"  {line}" for line in snap.code(memory)]


def _short_line(snap: VcpuSnapshot) -> str:
    doing = f", {snap.state}" if snap.state else ""
    return f"vCPU {snap.index}: {snap.mode()}{doing}, {snap.registers()[0]}"


def _exit_lines(snap: VcpuSnapshot, exits: Sequence[Any]) -> list[str]:
    """The last exits, equal ones in a row on one line."""
    merged: list[tuple[tuple[int, ...], int]] = []
    for e in exits:
        key = (e.reason, e.addr, e.size, e.is_write, e.cold, e.data if e.is_write else 0)
        if merged and merged[-1][0] == key:
            merged[-1] = (key, merged[-1][1] + 1)
        else:
            merged.append((key, 1))
    lines = ["  last exits:"] if merged else []
    for (reason, addr, size, is_write, cold, data), count in merged[-MAX_EXITS:]:
        text = f"    {exit_name(reason)}"
        if size:
            name = snap.port_name(addr) if reason == lib.KVM_EXIT_IO else ""
            text += f" {'write' if is_write else 'read'} {size} at {addr:#x}"
            text += f" ({name})" if name else ""
            text += f" = {data:#x}" if is_write else ""
            text += ", Python" if cold else ", C"
        lines.append(text + (f", {count} times" if count > 1 else ""))
    return lines
