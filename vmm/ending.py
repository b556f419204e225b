"""How a run ended, and what is to be said about it."""

from __future__ import annotations

import time

from vmm._native import ffi, lib
from vmm.result import RunResult

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from vmm.chardev import CharDev

#: How much of the console a result carries.
CONSOLE_TAIL = 16 * 1024

PANICKED = "The guest's kernel panicked."
#: What a device says of the end, and the sentence for it.
_MESSAGES = {
    "poweroff": "The guest powered off.",
    "reset": "The guest asked for a reset; vmm ends instead of rebooting.",
    "panic": PANICKED,
    "watchdog": "The guest did not feed its watchdog in time.",
}


class End:
    """Why a run is over: the reason and status of its RunResult, one sentence, and for a vCPU
    that left KVM for good, which one and the event."""

    __slots__ = ("event", "message", "reason", "status", "vcpu")

    def __init__(self, reason: str, status: int, message: str, vcpu: int = 0, event: Any = None):
        self.reason = reason
        self.status = status
        self.message = message
        self.vcpu = vcpu
        self.event = event


def by_device(reason: str, status: int) -> End:
    """A device says that the guest asked to end."""
    if reason == "debug-exit":
        return End(reason, status, f"The guest wrote its debug-exit port: status {status}.")
    return End(reason, status, _MESSAGES.get(reason, reason))


def by_event(index: int, event: Any, shutdown: str) -> End:
    """vCPU ``index`` came back with something that no device answers. ``shutdown``: what it did
    when KVM says KVM_EXIT_SHUTDOWN."""
    if event.kind == lib.VMM_EV_SYSTEM:
        reason = {
            lib.KVM_SYSTEM_EVENT_SHUTDOWN: "poweroff",
            lib.KVM_SYSTEM_EVENT_RESET: "reset",
        }.get(event.extra[0], "panic")
        return by_device(reason, 255 if reason == "panic" else 0)
    text = {
        lib.VMM_EV_HLT: "halted with no interrupt that could wake it",
        lib.VMM_EV_SHUTDOWN: shutdown,
        lib.VMM_EV_INTERNAL: "did what this host's KVM cannot run",
        lib.VMM_EV_FAIL_ENTRY: "could not be entered (bad CPU state)",
        lib.VMM_EV_DEBUG: "raised a debug exit nobody asked for",
        lib.VMM_EV_ERROR: "could not be run",
    }.get(event.kind, f"left KVM for reason {event.extra[0]}, which vmm does not know")
    copy = ffi.new("struct vmm_event *", event[0])
    return End("lost", 255, f"The guest's vCPU {index} {text}.", index, copy)


def result(
    end: End,
    consoles: list[CharDev],
    silence: str,
    diagnosis: str,
    started_at: float,
    first_run_ns: int,
) -> RunResult:
    """The run in one object. ``diagnosis``: what the vCPUs say; what the console says is added,
    or ``silence`` when it says nothing."""
    for port in consoles:
        port.finish()
    text = consoles[-1].console.tail(CONSOLE_TAIL) if consoles else ""
    if end.reason in ("panic", "timeout", "watchdog", "lost") and consoles:
        diagnosis = "\n".join(filter(None, [diagnosis, _from_console(text, silence)]))
    first = first_run_ns / 1e9
    return RunResult(
        status=end.status,
        reason=end.reason,
        console=text,
        duration_s=time.monotonic() - started_at,
        message=end.message,
        diagnosis=diagnosis,
        clocks={"start_to_first_run_s": first - started_at} if first else {},
    )


def _from_console(text: str, silence: str) -> str:
    """The worst report a kernel printed, cut out, and a guess at what it means."""
    from vmm import oops

    report = oops.worst(oops.scan(text))
    hint = oops.guess(text) if text.strip() else silence
    lines = [f"the kernel reported ({report.kind}):", report.text] if report else []
    return "\n".join([*lines, f"guess: {hint}"] if hint else lines)
