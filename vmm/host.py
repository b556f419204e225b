"""Facts about this host that more than one room asks for."""

from __future__ import annotations

CPUINFO = "/proc/cpuinfo"
#: Set in the environment inside a nested machine, so that nobody nests again by mistake.
NESTED = "VMM_NESTED"


def cpu_extension(cpuinfo: str = CPUINFO) -> str:
    """How this CPU runs guests in hardware: ``vmx`` (Intel), ``svm`` (AMD), or empty.

    Without one a working /dev/kvm emulates in software. The first CPU's entry says it for all.
    """
    try:
        with open(cpuinfo, "rb") as f:
            head = f.read(8192)
    except OSError:
        return ""
    for line in head.split(b"\n"):
        if line.startswith(b"flags"):
            words = line.split()
            return next((name for name in ("vmx", "svm") if name.encode() in words), "")
    return ""
