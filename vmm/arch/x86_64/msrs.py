"""Model-specific registers as firmware would leave them. Intel SDM vol 4 §2.1."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

IA32_TIME_STAMP_COUNTER = 0x10
IA32_SYSENTER_CS = 0x174
IA32_SYSENTER_ESP = 0x175
IA32_SYSENTER_EIP = 0x176
IA32_MISC_ENABLE = 0x1A0
IA32_PAT = 0x277
IA32_MTRR_DEF_TYPE = 0x2FF
IA32_STAR = 0xC0000081
IA32_LSTAR = 0xC0000082
IA32_CSTAR = 0xC0000083
IA32_FMASK = 0xC0000084
IA32_KERNEL_GS_BASE = 0xC0000102

#: IA32_MISC_ENABLE: fast strings on; no branch trace store, no PEBS.
_FAST_STRINGS, _BTS_UNAVAILABLE, _PEBS_UNAVAILABLE = 1 << 0, 1 << 11, 1 << 12
#: IA32_MTRR_DEF_TYPE: MTRRs on, fixed ranges off, write-back. Intel SDM vol 3 §12.11.2.1.
_MTRR_ENABLE, _WRITE_BACK = 1 << 11, 6
#: WB, WT, UC-, UC, twice: the value at reset. Intel SDM vol 3 §12.12.4.
_PAT_RESET = 0x0007040600070406

_BOOT = (
    (IA32_SYSENTER_CS, 0),
    (IA32_SYSENTER_ESP, 0),
    (IA32_SYSENTER_EIP, 0),
    (IA32_STAR, 0),
    (IA32_LSTAR, 0),
    (IA32_CSTAR, 0),
    (IA32_FMASK, 0),
    (IA32_KERNEL_GS_BASE, 0),
    # KVM takes a write of 0 from outside as "a CPU starts" and keeps all vCPUs' counters equal.
    (IA32_TIME_STAMP_COUNTER, 0),
    (IA32_MISC_ENABLE, _FAST_STRINGS | _BTS_UNAVAILABLE | _PEBS_UNAVAILABLE),
    (IA32_PAT, _PAT_RESET),
)


def boot_msrs(supported: Iterable[int], *, mtrr: bool = True) -> list[tuple[int, int]]:
    """(index, value) pairs for KVM_SET_MSRS, the same on every vCPU.

    ``supported``: KVM_GET_MSR_INDEX_LIST, which leaves out the MTRRs: ``mtrr`` says whether the
    guest's CPUID has them. Write-back as the default type is what lets Linux use the PAT.
    """
    known = set(supported)
    out = [(index, value) for index, value in _BOOT if index in known]
    if mtrr:
        out.append((IA32_MTRR_DEF_TYPE, _MTRR_ENABLE | _WRITE_BACK))
    return out
